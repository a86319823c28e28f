"""Ways a tile can take before a classifier sees it. One so far: through the autoencoder of a base, as every synthetic tile has gone."""

import hashlib
import os

import numpy as np
import torch
from PIL import Image

from histokit.core import files, machine
from histokit.diffusion import backbone
from histokit.tiles import data, decode

VERSION = 2
BUDGET_GB = 2.0  # disk for tiles that went through before; what was used least recently goes first
PRUNE_EVERY = 512  # tiles written


def load(base_model, device, tile_px, tiles=None):
    """`VaeRoundTrip` of a base by name, see `backbone.load`."""
    return VaeRoundTrip(backbone.load(base_model, device, tiles=tiles), tile_px)


class VaeRoundTrip:
    """Tiles as the base model's autoencoder gives them back, `tile_px` wide: the way every synthetic tile has gone.

    They are read at the base's own size, `reads_px`, and brought to the dataset's afterwards, as a synthetic tile's file is. What went
    through before is kept in outputs/.cache: on a CPU a trip takes as long as some twenty looks of a small encoder.
    """

    def __init__(self, model, tile_px):
        self.model, self.tile_px, self.reads_px = model.need("vae"), tile_px, model.tile_px
        self.identity = {"vae": model.identity.get("vae", model.name), "tile_px": model.tile_px}
        self.identity |= {part: model.identity[part] for part in ("decoder",) if part in model.identity}
        device = model.device.type
        self.batch = 1 if device == "cpu" else 4  # alone, a tile's bits follow from the tile, whichever others are kept already
        self._made_of = [VERSION, self.identity, [device, machine.threads()] if device == "cpu" else [device]]
        self._written = 0

    def __call__(self, pixels):
        paths = [self._path(tile) for tile in pixels]
        out = dict(zip(paths, map(_kept, paths), strict=True))
        missing = {path: i for i, path in enumerate(paths) if out[path] is None}
        for start in range(0, len(missing), self.batch):
            some = dict(list(missing.items())[start : start + self.batch])
            for path, tile in zip(some, self._trip(pixels[list(some.values())]), strict=True):
                files.write_tensors(path, {"pixels": torch.from_numpy(tile)}, {})
                out[path] = tile
        self._written += len(missing)
        if self._written >= PRUNE_EVERY:
            files.prune("coded", BUDGET_GB)
            self._written = 0
        return _resized(np.stack([out[path] for path in paths]), self.tile_px) if paths else _none(self.tile_px)

    def _path(self, tile):
        key = files.digest(hashlib.sha256(np.ascontiguousarray(tile)).hexdigest(), self._made_of)
        return files.cache("coded") / key[:2] / f"{key}.safetensors"

    def _trip(self, pixels):
        part = np.concatenate([pixels, np.repeat(pixels[-1:], self.batch - len(pixels), axis=0)])  # one fixed shape
        mean, logvar = backbone.encode(self.model, data.to_float(part))
        return backbone.decode(self.model, backbone.latents(mean, logvar, self.model.scaling), self.batch)[: len(pixels)]


def _kept(path):
    """What is kept there; None where nothing is, or no more."""
    try:
        os.utime(path)
        return files.read_tensors(path)["pixels"].numpy()
    except FileNotFoundError:
        return None


def _none(px):
    return np.zeros((0, px, px, 3), np.uint8)


def _resized(pixels, px):
    if pixels.shape[1] == px:
        return pixels
    return np.stack([decode.fitted(Image.fromarray(tile), px, "resize") for tile in pixels])
