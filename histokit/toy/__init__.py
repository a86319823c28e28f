"""Invented tissue whose truth is known; knows nothing of the rest."""

from histokit.toy.dataset import CLASSES, generator, plan, random_look, tile, write

__all__ = ["CLASSES", "generator", "plan", "random_look", "tile", "write"]
