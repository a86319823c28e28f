"""Ways a tile can take before a classifier sees it. One so far: through the autoencoder of a base, as every synthetic tile has gone."""

import numpy as np
from PIL import Image

from histokit.diffusion import backbone
from histokit.tiles import data, decode

VERSION = 1


def load(base_model, device, tile_px, tiles=None):
    """`VaeRoundTrip` of a base by name, see `backbone.load`."""
    return VaeRoundTrip(backbone.load(base_model, device, tiles=tiles), tile_px)


class VaeRoundTrip:
    """Tiles as the base model's autoencoder gives them back, `tile_px` wide: the way every synthetic tile has gone.

    They are read at the base's own size, `reads_px`, and brought to the dataset's afterwards, as a synthetic tile's file is.
    """

    def __init__(self, model, tile_px):
        self.model, self.tile_px, self.reads_px = model.need("vae"), tile_px, model.tile_px
        self.identity = {"vae": model.identity.get("vae", model.name), "tile_px": model.tile_px}
        self.identity |= {part: model.identity[part] for part in ("decoder",) if part in model.identity}

    def __call__(self, pixels):
        out = []
        for i in range(0, len(pixels), 4):
            part = pixels[i : i + 4]
            part = np.concatenate([part, np.repeat(part[-1:], 4 - len(part), axis=0)])  # one fixed shape
            mean, logvar = backbone.encode(self.model, data.to_float(part))
            out.append(backbone.decode(self.model, backbone.latents(mean, logvar, self.model.scaling))[: len(pixels) - i])
        return _resized(np.concatenate(out), self.tile_px) if out else np.zeros((0, self.tile_px, self.tile_px, 3), np.uint8)


def _resized(pixels, px):
    if pixels.shape[1] == px:
        return pixels
    return np.stack([decode.fitted(Image.fromarray(tile), px, "resize") for tile in pixels])
