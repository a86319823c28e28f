"""How far tiles lie from the training tiles: the nearest one of each, in what an encoder sees and in outlines.

Arrays of distances come out; what is near enough to be a copy is asked in `copy_detection`.
"""

import functools
from typing import NamedTuple

import numpy as np

from histokit.metrics import memorisation
from histokit.tiles import near_duplicates
from histokit.vision import features


class Found(NamedTuple):
    """Of N tiles: the distance [N] to the nearest training tile, its row [N], and the distance [N] of the same two in the other space."""

    distance: np.ndarray
    row: np.ndarray
    other: np.ndarray


class Nearest:
    """Distances of tiles to the training tiles, the least over the 8 symmetries: 1 - cosine, in features and in outlines."""

    def __init__(self, training, encoder):
        self.training, self.encoder, self.picture = training, encoder, features.load("picture")
        feats = features.embed(encoder, training)
        self.mean, std = np.mean(feats, axis=0), np.std(feats, axis=0)
        self.weight = np.divide(1, std, out=np.zeros_like(std), where=std > 0.01 * np.median(std) + 1e-9)
        self.real = self.vectors(training)

    def vectors(self, tiles):
        """{space: [N, D]} unit vectors of the tiles as they are."""
        feats, waves = features.embed(self.encoder, tiles), features.embed(self.picture, tiles)
        return {self.encoder.name: self._standard(feats), "outline": _unit(waves)}

    def views(self, tiles, codec=None):
        """{space: [N, 8, D]} unit vectors of the tiles in their 8 symmetries."""
        feats = features.embed(self.encoder, tiles, augment="symmetries", codec=codec)
        waves = features.embed(self.picture, tiles, codec=codec).reshape(-1, near_duplicates.LOW, near_duplicates.LOW)
        outlines = near_duplicates.symmetric(waves).reshape(len(tiles), 8, near_duplicates.LOW**2)  # also of no tile at all
        return {self.encoder.name: self._standard(feats), "outline": _unit(outlines)}

    def _standard(self, feats):
        return _unit((feats - self.mean) * self.weight)

    def __call__(self, tiles, codec=None, apart=False):
        """{space: Found}; `apart`: the nearest among tiles of other cases only, distance NaN where there is none."""
        alike = {space: _best(views, self.real[space]) for space, views in self.views(tiles, codec).items()}  # [N, T] each
        own = tiles["case_id"].to_numpy()[:, None] == self.training["case_id"].to_numpy()[None] if apart else False
        found, one = {}, np.arange(len(tiles))
        for space, other in ((self.encoder.name, "outline"), ("outline", self.encoder.name)):
            allowed = np.where(own, -np.inf, alike[space])
            row = allowed.argmax(axis=1)
            best = allowed[one, row]
            found[space] = Found(np.where(np.isfinite(best), 1 - best, np.nan), row, 1 - alike[other][one, row])
        return found

    @functools.cached_property
    def apart(self):
        """{space: [T] distance of each training tile to the nearest other one}."""
        out = {}
        for space, views in self.views(self.training).items():
            alike = _best(views, self.real[space])
            np.fill_diagonal(alike, -np.inf)
            out[space] = 1 - alike.max(axis=1)
        return out

    def ratio(self, tiles, around, codec=None):
        """{space: [N]} `memorisation.ratio` of each tile; real tiles of its own case count neither as training tiles nor as around it.

        Not finite where all of them are of its own case.
        """
        case, pool = tiles["case_id"].to_numpy()[:, None], self.vectors(around)
        own, many = case != "", around["label"].value_counts().min()  # of each class
        out = {}
        for space, views in self.views(tiles, codec).items():
            near, far = 1 - _best(views, self.real[space]), 1 - _best(views, pool[space])
            near[own & (case == self.training["case_id"].to_numpy())] = np.inf
            far[own & (case == around["case_id"].to_numpy())] = np.nan
            far.sort(axis=1)
            out[space] = memorisation.ratio(near.min(axis=1), far[:, :many])  # NaN is sorted last
        return out


def _unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def _best(views, real, block=64):
    """Largest cosine [N, T] over the views [N, V, D]."""
    parts = [np.einsum("nvd,td->nvt", views[i : i + block], real, optimize=True).max(axis=1) for i in range(0, len(views), block)]
    return np.concatenate(parts) if parts else np.zeros((0, len(real)))
