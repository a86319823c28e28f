"""The glass slide that `tissue` and `epithelium` draw on: maps of two stains, nuclei, a mask, and a camera that looks at it.

Light is simulated the way stain works: maps of hematoxylin and eosin, times one colour vector each, are optical
density, and the pixel is `white * exp(-density)`. Nothing here knows what a gland is.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

MASK_VALUES = {"lumen": 0, "stroma": 1, "gland": 2, "nuclei": 3, "fat": 4, "mucin": 5, "necrosis": 6}


@dataclass(frozen=True)
class Stain:
    """How a laboratory and a scanner make a tissue look; one per case."""

    hematoxylin: tuple = (0.65, 0.70, 0.29)  # optical density in red, green, blue of one unit of stain
    eosin: tuple = (0.09, 0.95, 0.28)
    white: tuple = (0.95, 0.95, 0.95)  # where there is no tissue
    blur: float = 0.6  # px
    grain: float = 0.01  # standard deviation of the sensor noise


def random_stain(rng):
    """A `Stain` from the range seen between laboratories: hue, strength, brightness, tint and focus vary."""
    hematoxylin = np.array([rng.uniform(0.50, 0.80), rng.uniform(0.58, 0.82), rng.uniform(0.12, 0.42)])
    eosin = np.array([rng.uniform(0.04, 0.24), rng.uniform(0.80, 1.0), rng.uniform(0.18, 0.62)])
    hematoxylin *= rng.uniform(0.75, 1.5) / np.linalg.norm(hematoxylin)
    eosin *= rng.uniform(0.5, 1.5) / np.linalg.norm(eosin)
    white = rng.uniform(0.80, 0.99) * (1 - rng.uniform(0, 0.09, 3))
    return Stain(tuple(hematoxylin), tuple(eosin), tuple(white), rng.uniform(0.45, 0.8), rng.uniform(0.006, 0.016))


# ---------------------------------------------------------------------------------------------- canvas


def smooth_noise(rng, n, scale):
    """Noise [n, n] with mean 0 and standard deviation 1 whose bumps are about `scale` px wide (it tiles)."""
    spectrum = fft.rfft2(rng.standard_normal((n, n))) * _low_pass(n, scale)
    spectrum[0, 0] = 0
    noise = fft.irfft2(spectrum, s=(n, n))
    return noise / noise.std()


@functools.lru_cache(32)
def _low_pass(n, scale):
    frequency = np.hypot(fft.fftfreq(n)[:, None], fft.rfftfreq(n)[None])
    return np.exp(-2 * (np.pi * scale * frequency / 2) ** 2)


def blob(rng, n, share, scale=22, ragged=0.05):
    """Soft-edged region [n, n] in [0, 1] of random outline that covers `share` of the canvas."""
    if share <= 0:
        return np.zeros((n, n))
    if share >= 1:
        return np.ones((n, n))
    noise = smooth_noise(rng, n, scale) + ragged * smooth_noise(rng, n, 3)
    return ramp((noise - np.quantile(noise, 1 - share)) * scale * 0.7)


def ramp(distance, width=1.0):
    """1 inside, 0 outside, linear over `width` px around distance 0: the anti-aliased edge of a shape."""
    return np.clip(distance / width + 0.5, 0, 1)


class Slide:
    """The canvas: stain maps, mask and cells. Drawing functions change it in place."""

    def __init__(self, n, rng):
        self.n = n
        self.y, self.x = np.mgrid[:n, :n].astype(float)
        self.hema, self.eosin = np.zeros((n, n)), np.zeros((n, n))
        self.mask = np.full((n, n), MASK_VALUES["stroma"], np.uint8)
        self.in_gland = np.zeros((n, n), bool)
        self.cover, self.ink = np.zeros((n, n)), np.zeros((n, n))  # of nuclei
        self.cells = []  # one [N, 3] array (y, x, area) per population
        self.warp = 2.2 * smooth_noise(rng, n, 14), 2.2 * smooth_noise(rng, n, 14)
        self.fine, self.grain = smooth_noise(rng, n, 2.2), smooth_noise(rng, n, 1.2)

    def lay(self, alpha, hema, eosin, name=None):
        """Put a layer of stain with opacity `alpha` [n, n] over what is there, and name it in the mask."""
        self.hema += alpha * (hema - self.hema)
        self.eosin += alpha * (eosin - self.eosin)
        if name:
            self.mask[alpha > 0.5] = MASK_VALUES[name]

    def add_nuclei(self, points, size, spread, elongation, angle, ink, rng, open_=0.0, count=True):
        """Stamp nuclei at points [N, 2] (y, x) with their long axis at `angle` [N] (radians).

        `ink` is the hematoxylin in them; `open_` in [0, 1] empties the inside and leaves the membrane.
        """
        if len(points) == 0:
            return
        k = len(points)
        diameter = size * np.exp(spread * rng.standard_normal(k)).clip(0.5, 1.9)
        ratio = np.maximum(1, elongation * (1 + 0.15 * rng.standard_normal(k)))
        a, b = diameter / 2 * np.sqrt(ratio), diameter / 2 / np.sqrt(ratio)
        inks = ink * (1 + 0.16 * rng.standard_normal(k)).clip(0.55, 1.5)
        distance = self._ellipses(points, a, b, angle, 0.05 + 0.3 * spread, rng)  # [N, p, p] px, inside > 0
        alpha = ramp(distance, rng.uniform(1.1, 1.9, k)[:, None, None])
        inside = ramp(distance - 1.9, 1.6)
        patch = inks[:, None, None] * (1.06 - (0.12 + 0.5 * open_) * inside)

        # one after the other, so that an upper nucleus hides part of a lower one
        p = distance.shape[1] // 2
        for (y, x), al, pa in zip(points.astype(int), alpha, patch, strict=True):
            window = slice(max(y - p, 0), y + p + 1), slice(max(x - p, 0), x + p + 1)
            al, pa = al[max(p - y, 0) :, max(p - x, 0) :], pa[max(p - y, 0) :, max(p - x, 0) :]
            cover, inked = self.cover[window], self.ink[window]
            al, pa = al[: cover.shape[0], : cover.shape[1]], pa[: cover.shape[0], : cover.shape[1]]
            inked += al * (pa - inked)
            np.maximum(cover, al, out=cover)
        if count:
            self.cells.append(np.column_stack([points, np.pi * a * b]))

    def _ellipses(self, points, a, b, angle, wobble, rng):
        """Signed distance (about, px) [N, p, p] to wobbly ellipses, each in a window centred on its point; exact down to -1."""
        p = int(np.ceil(a.max() * 1.15)) + 2
        step = np.arange(-p, p + 1)
        dy = step[None, :, None] - (points[:, 0] % 1)[:, None, None]
        dx = step[None, None, :] - (points[:, 1] % 1)[:, None, None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        u, v = (dx * cos + dy * sin) / a[:, None, None], (dy * cos - dx * sin) / b[:, None, None]
        phase, far, b = rng.uniform(0, 2 * np.pi, (2, len(a), 1, 1)), np.hypot(u, v), b[:, None, None]
        distance = (1 - far) * b
        near = distance > -1 - 1.6 * wobble * b  # no wobble brings the others within 1 px of the edge, where a nucleus leaves no ink
        turn, far = np.arctan2(v[near], u[near]), far[near]
        first, second, b = (np.broadcast_to(each, near.shape)[near] for each in (*phase, b))
        radius = 1 + wobble * (np.cos(2 * turn + first) + 0.6 * np.cos(3 * turn + second))
        distance[near] = (radius - far) * b
        return distance

    def ink_nuclei(self, look):
        """Turn the stamped nuclei into stain, with chromatin texture."""
        clumps = 1 + (0.10 + 0.14 * look.chromatin) * self.grain + 0.05 * self.fine
        self.hema += self.cover * (self.ink * clumps - self.hema)
        self.eosin *= 1 - 0.55 * self.cover
        self.mask[self.cover > 0.5] = MASK_VALUES["nuclei"]


def scatter(rng, where, number, gap):
    """Up to `number` random points [N, 2] (y, x) inside `where` [n, n] bool, no two closer than about `gap` px."""
    ys, xs = np.nonzero(where)
    if len(ys) == 0 or number < 1:
        return np.zeros((0, 2))
    pick = rng.integers(len(ys), size=int(4 * number) + 8)
    ys, xs = ys[pick], xs[pick]
    free, kept, half = np.ones(where.shape, bool), [], max(gap * 0.88, 1)
    for i, (y, x) in enumerate(zip(ys.tolist(), xs.tolist(), strict=True)):
        if free[y, x]:
            kept.append(i)
            h, w = int(half), int(half * 0.7)  # an octagon is near enough to a disc
            free[max(y - h, 0) : y + h + 1, max(x - w, 0) : x + w + 1] = False
            free[max(y - w, 0) : y + w + 1, max(x - h, 0) : x + h + 1] = False
            if len(kept) >= number:
                break
    return np.column_stack([ys[kept], xs[kept]]) + rng.uniform(0, 1, (len(kept), 2))


def two_nearest(slide, centres):
    """Distances [n, n] to the nearest and second nearest centre, on warped ground, and the index of the nearest."""
    y, x = slide.y + slide.warp[0], slide.x + slide.warp[1]
    first, second = np.full((2, slide.n, slide.n), np.inf)  # squared, which tell as well and take a third of the time
    owner, runner_up = np.zeros((2, slide.n, slide.n), int)
    for k, (cy, cx) in enumerate(centres):
        distance = np.square(y - cy) + np.square(x - cx)
        closer, between = distance < first, distance < second
        between &= ~closer
        second[closer], runner_up[closer] = first[closer], owner[closer]
        second[between], runner_up[between] = distance[between], k
        first[closer], owner[closer] = distance[closer], k

    def to(place, least):
        return np.hypot(y - centres[place, 0], x - centres[place, 1]) if len(centres) >= least else np.full_like(y, 1e3)

    centres = np.asarray(centres, float)
    return to(owner, 1), to(runner_up, 2), owner


# ---------------------------------------------------------------------------------------------- camera and truth


def develop(slide, stain, rng):
    """Stain maps to pixels [n, n, 3] uint8: absorb light, lose focus, vignette, add sensor noise."""
    stains = np.stack([slide.hema, slide.eosin], -1).clip(0)
    light = np.exp(-stains @ np.array([stain.hematoxylin, stain.eosin])) * np.array(stain.white)
    light = ndimage.gaussian_filter(light, (stain.blur, stain.blur, 0))
    slope = rng.normal(0, 0.025, 2)
    light *= (1 + slope[0] * (slide.y / slide.n - 0.5) + slope[1] * (slide.x / slide.n - 0.5))[..., None]
    light += stain.grain * rng.standard_normal(light.shape)
    return np.round(light * 255).clip(0, 255).astype(np.uint8)


def truth_of(slide, cut):
    """What is in the tile `cut`: numbers a measurement can be held against.

    Returns:
        dict: `nuclei_count`; `nuclei_size` (mean area, px^2, 0 if none); `gland_area`, `lumen_area`, `fat_area`,
        `mucin_area`, `necrosis_area` as shares of the tile (a gland includes its lumen and nuclei);
        `lumen_count`; `fibre_orientation` (degrees in [0, 180), x axis towards +y) and `fibre_coherence` in [0, 1].
    """
    mask, low, high = slide.mask[cut, cut], cut.start, cut.stop
    cells = np.concatenate([*slide.cells, np.zeros((0, 3))])
    cells = cells[((cells[:, :2] >= low) & (cells[:, :2] < high)).all(axis=1)]
    areas, labels = {k: float((mask == v).mean()) for k, v in MASK_VALUES.items()}, ndimage.label(mask == 0)[0]
    double = np.exp(2j * slide.fibre_angle[cut, cut]).mean()  # mean of an angle without a head or tail
    return {
        "nuclei_count": len(cells),
        "nuclei_size": float(cells[:, 2].mean()) if len(cells) else 0.0,
        "gland_area": float(slide.in_gland[cut, cut].mean()),
        "lumen_area": areas["lumen"],
        "lumen_count": int((np.bincount(labels.ravel())[1:] >= 20).sum()),
        "fat_area": areas["fat"],
        "mucin_area": areas["mucin"],
        "necrosis_area": areas["necrosis"],
        "fibre_orientation": float(np.rad2deg(np.angle(double)) / 2 % 180),
        "fibre_coherence": float(np.abs(double)),
    }
