"""Power spectra, and what they and the fine contrast say of a codec that blurs."""

import dataclasses

import numpy as np
import pytest
import squares
from scipy import ndimage

from histokit import runs
from histokit.evaluate import preflight
from histokit.metrics import spectrum
from histokit.tiles import data


def waves(frequency, n=3, side=64):
    """Tiles of one plane wave each, in different directions."""
    y, x = np.mgrid[:side, :side]
    turns = np.linspace(0, np.pi / 2, n)
    grey = [127 + 80 * np.sin(2 * np.pi * frequency * (x * np.cos(t) + y * np.sin(t))) for t in turns]
    return np.repeat(np.array(grey)[..., None], 3, -1).round().astype(np.uint8)


@pytest.mark.parametrize("frequency", [0.1, 0.25, 0.4])
def test_a_wave_has_its_power_at_its_frequency_in_every_direction(frequency):
    at, power = spectrum.radial_power(waves(frequency))
    assert abs(at[power.argmax()] - frequency) < 0.04
    assert power[np.abs(at - frequency) > 0.08].max() < 0.01 * power.max()


def test_power_sums_to_the_mean_square():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 1)).repeat(3, -1).astype(np.uint8)
    _, power = spectrum.radial_power(noise)
    expected = np.full(15, np.var(np.arange(256) / 255))
    assert power[1:] == pytest.approx(expected, rel=0.25), "white noise: the variance at every frequency"


def test_it_turns_with_the_tile_and_refuses_what_is_none():
    noise = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_allclose(spectrum.radial_power(noise)[1], spectrum.radial_power(np.rot90(noise, axes=(1, 2)))[1])
    for bad in (noise[:0], noise[:, :16], noise[0]):
        with pytest.raises(ValueError, match="square tiles"):
            spectrum.radial_power(bad)


class Blur:
    """A codec that takes the mean of 3 x 3 pixels."""

    reads_px = 32

    def __init__(self, size):
        self.size = size

    def __call__(self, pixels):
        return ndimage.uniform_filter(pixels, (0, self.size, self.size, 0))


def test_a_gap_says_what_a_codec_takes(root, monkeypatch):
    squares.dataset()
    tiles = data.load(runs.start(experiment="exp", step="look"))
    noise = np.random.default_rng(0).integers(0, 256, (len(tiles), 32, 32, 3)).astype(np.uint8)
    monkeypatch.setattr(data, "pixels", lambda rows, px=0: noise[: len(rows)])
    none, soft = (preflight.codec_gap(tiles, Blur(size)) for size in (1, 3))
    assert none.contrast == 1 and np.array_equal(none.real, none.coded) and none.said().endswith("real tiles is left.")
    assert soft.contrast < 0.5 and soft.coded[-1] < 0.1 * soft.real[-1] and soft.coded[0] > 0.5 * soft.real[0]
    assert "part: decoder" in soft.said()
    larger = dataclasses.replace(soft, px=(224, 128))
    assert "`tile_px: 128` in 00_dataset" in larger.said() and "part: decoder" not in larger.said()
