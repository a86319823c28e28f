"""From a folder of tiles to a frozen manifest, and from a manifest row to pixels."""
