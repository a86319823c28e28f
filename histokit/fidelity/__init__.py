"""Synthetic tiles beside real ones: likeness, diversity, shortcuts, copies, membership."""
