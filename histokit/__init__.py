"""Synthetic histopathology tiles for rare classes, and an honest verdict on what they are worth."""

__version__ = "0.1.0"
