"""Synthetic histopathology tiles for rare classes, and an honest verdict on what they are worth."""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parent  # where the package lies; mini/ is inside, a clone has notebooks/ and params/ beside it
