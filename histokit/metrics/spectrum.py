"""Power spectra of tiles: how much of each spatial frequency they hold. Arrays in, numbers out."""

import numpy as np

VERSION = 1


def radial_power(pixels, bins=0):
    """Mean power of brightness at each spatial frequency, over directions and tiles.

    A Hann window keeps the tile's border, which is no tissue, out of it. The sum over all frequencies of the power per frequency is the
    windowed tile's mean square (Parseval).

    Args:
        pixels: [N, H, W, 3] uint8, N > 0, square.
        bins: rings between 0 and 0.5 cycles a pixel, the finest that pixels can hold; 0 takes a quarter of the side, 32 at most.

    Returns:
        Frequency [bins] in cycles a pixel (middle of each ring) and power [bins].
    """
    if pixels.ndim != 4 or not len(pixels) or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"radial_power needs square tiles [N, H, W, 3], at least one; got {pixels.shape}")
    grey = pixels.astype(np.float64).mean(-1) / 255
    side = grey.shape[1]
    bins = bins or min(32, side // 4)
    window = np.outer(np.hanning(side), np.hanning(side))
    mean = np.average(grey.reshape(len(grey), -1), axis=1, weights=window.ravel())
    grey = (grey - mean[:, None, None]) * window / np.sqrt(np.mean(window**2))
    power = np.abs(np.fft.fft2(grey)) ** 2 / side**2  # [N, H, W]
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    ring = np.minimum((radius / 0.5 * bins).astype(int), bins)  # the corners, beyond 0.5, are the last one, which is dropped
    count, total = (np.bincount(ring.ravel()[1:], of, minlength=bins + 1)[:bins] for of in (None, power.mean(0).ravel()[1:]))  # no mean
    return (np.arange(bins) + 0.5) / bins * 0.5, total / np.maximum(count, 1)
