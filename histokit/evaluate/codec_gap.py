"""What the base's autoencoder takes from real tiles before anything is trained: fine contrast, frequency by frequency.

Every made tile has gone through this decoder. Where it is soft, a classifier tells made from real by that alone, and true tiles lose
worth on the way: on toy 12 points of tail balanced accuracy became 2.
"""

from dataclasses import dataclass

import numpy as np

from histokit.metrics import spectrum
from histokit.tiles import data, splits
from histokit.training.pretraining import decoder

VERSION = 2
SOFT = 0.9  # share of the fine contrast below which a decoder of one's own is worth its minutes
TILES = 32


@dataclass(frozen=True)
class Gap:
    """Power [K] of real tiles and of the same after the autoencoder, by frequency [K] in cycles a pixel."""

    frequency: np.ndarray
    real: np.ndarray
    coded: np.ndarray
    contrast: float  # fine contrast after over before; 1 is as sharp as tissue
    tiles: int
    px: tuple  # side at which tiles are seen, and at which the base draws

    def said(self):
        """What is left, and what helps where that is little."""
        what = f"After this base's autoencoder {self.contrast:.0%} of the fine contrast of {self.tiles} real tiles is left"
        if self.contrast >= SOFT:
            return f"{what}."
        if self.px[0] > self.px[1]:
            return (
                f"{what}: tiles are seen at {self.px[0]} px and the base draws {self.px[1]}, so made ones are enlarged: it may give "
                f"them away. `tile_px: {self.px[1]}` in 00_dataset shows all tiles at the base's size."
            )
        return f"{what}: made tiles will be softer than tissue. 20_pretrain with part: decoder trains its decoder on your tiles."


def measure(tiles, codec, seed=0):
    """Gap of up to `TILES` training tiles, spread over the cases; ValueError where there is none.

    Args:
        tiles: frozen manifest with paths.
        codec: `codecs.VaeRoundTrip`.
    """
    rows = splits.spread(data.training(tiles), TILES, seed)
    if not len(rows):
        raise ValueError("no training tile to send through the autoencoder")
    before, after = data.pixels(rows), codec(data.pixels(rows, codec.reads_px))
    fine = [float(decoder.fine_contrast(data.to_float(part)).mean()) for part in (before, after)]
    frequency, real = spectrum.radial_power(before)
    return Gap(frequency, real, spectrum.radial_power(after)[1], fine[1] / fine[0], len(rows), (before.shape[1], codec.reads_px))
