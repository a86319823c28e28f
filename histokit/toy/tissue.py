"""Draws one H&E-like tile from a `Look`, the handful of numbers that say what a tissue is like.

Every drawn thing also goes into a mask and a cell list, so the truth of a tile is known. Nothing here knows a class,
a case or a file: that is `dataset`; sheets and glands are in `epithelium`, canvas, stain and light in `canvas`.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from histokit.toy.canvas import MASK_VALUES, Slide, blob, develop, ramp, scatter, smooth_noise, truth_of, two_nearest
from histokit.toy.epithelium import clusters, glands, nests, sheets

MARGIN = 16  # px drawn around the tile and cut off, so that nothing ends at the border


@dataclass(frozen=True)
class Look:
    """What a tissue looks like. Lengths in pixels of 0.5 um, numbers of cells per 1000 px^2, shares in [0, 1]."""

    # the nuclei of epithelium: of glands, sheets and floating clusters
    size: float = 8.0  # mean diameter
    spread: float = 0.1  # standard deviation of the diameter over its mean (pleomorphism)
    elongation: float = 1.3  # long over short axis
    chromatin: float = 0.3  # 0 evenly dark, 1 open and clumped with nucleoli
    # glands
    gland: str = "none"  # none | round | elongated | cribriform, and of other tissue single (one round lumen) | solid (none)
    gland_size: float = 50.0  # short diameter
    gap: float = 10.0  # stroma between two glands
    lumen: float = 0.15  # share of the gland
    layers: float = 1.0  # rows of nuclei; above 1.5 is pseudostratified
    goblet: float = 0.0  # pale vacuoles in the cytoplasm
    plasma: float = 0.5  # cytoplasm of epithelium: 0 pale and pink, 1 dense and bluish
    # everything that is not a gland, as shares of the tile
    sheet: float = 0.0  # solid epithelium
    fat: float = 0.0
    mucin: float = 0.0
    necrosis: float = 0.0
    # in other tissue only
    oedema: float = 0.0
    blood: float = 0.0
    nests: float = 0.0  # clusters of cells in a tile of 128 px
    # stroma, which fills the rest
    fibres: float = 0.6  # contrast of the fibres
    coherence: float = 0.7  # 1 all in one direction, 0 in all directions
    waviness: float = 0.3
    spindles: float = 1.0  # spindle nuclei along the fibres
    lymphocytes: float = 1.0  # small dark round nuclei
    angle: float = 0.0  # degrees in [0, 180) from the x axis towards +y; of fibres and long glands


def render(look, stain, rng, px=128):
    """Draw a look in a stain.

    Returns:
        Image [px, px, 3] uint8, mask [px, px] uint8 of `MASK_VALUES`, and the truth as a dict (see `truth_of`).
    """
    slide = Slide(px + 2 * MARGIN, rng)
    for draw in (stroma, sheets, fat, mucin, pools, nests, glands, necrosis, loose_cells):
        draw(slide, look, rng)
    slide.ink_nuclei(look)
    cut = slice(MARGIN, MARGIN + px)
    return develop(slide, stain, rng)[cut, cut], slide.mask[cut, cut].copy(), truth_of(slide, cut)


# ---------------------------------------------------------------------------------------------- tissue


def stroma(slide, look, rng):
    """Fill the canvas with fibres: noise stretched along one direction and bent by a slow warp."""
    n, theta = slide.n, np.deg2rad(look.angle)
    bend = 3.2 * look.waviness * smooth_noise(rng, n, 17) + 26 * (1 - look.coherence) * smooth_noise(rng, n, 42)
    across = slide.y * np.cos(theta) - slide.x * np.sin(theta) + bend
    along = slide.x * np.cos(theta) + slide.y * np.sin(theta) + 4 * smooth_noise(rng, n, 20)
    white = rng.standard_normal((64, 64))
    strand = ndimage.map_coordinates(white, [across / 2.1, along / 19], order=1, mode="grid-wrap")
    bundle = ndimage.map_coordinates(white, [across / 6.5 + 20, along / 34], order=1, mode="grid-wrap")

    # the true direction of the fibres is along the level lines of `across`
    gy, gx = np.gradient(across)
    slide.fibre_angle = np.arctan2(gx, -gy) + np.pi  # radians, modulo pi
    texture = look.fibres * (0.30 * strand + 0.26 * bundle) + 0.10 * slide.fine * (1 - 0.5 * look.fibres)
    slack = ramp(bundle * look.fibres - 1.25, 1.2) * 0.8  # thin clefts between bundles
    slide.lay(np.ones((n, n)), 0.13 + 0.06 * texture, np.clip(0.58 + texture, 0.08, 1.6) * (1 - slack))


def fat(slide, look, rng):
    """Round vacuoles pressed against each other, with thin membranes and a few flat nuclei between them."""
    if look.fat <= 0:
        return
    n, spacing = slide.n, rng.uniform(25, 40)
    centres = scatter(rng, np.ones((n, n), bool), 4 * n**2 / spacing**2, spacing * 0.8)
    nearest, second, owner = two_nearest(slide, centres)
    region = blob(rng, n, look.fat, 30)
    inside = region[centres[:, 0].astype(int).clip(0, n - 1), centres[:, 1].astype(int).clip(0, n - 1)] > 0.5
    wall = rng.uniform(0.9, 1.7)
    depth = np.minimum((second - nearest) / 2 - wall, spacing * 0.66 - nearest)
    vacuole = ramp(rounded(depth, 7)) * inside[owner]
    slide.lay(vacuole, 0.015, 0.03, "fat")

    rim = scatter(rng, inside[owner] & (depth > -1.5) & (depth < 0.3), 0.35 * look.fat * n**2 / spacing**2 * 2, 14)
    at = rim.astype(int)
    gy, gx = np.gradient(ndimage.gaussian_filter(depth, 2))
    angle = np.arctan2(gx[at[:, 0], at[:, 1]], -gy[at[:, 0], at[:, 1]])
    slide.add_nuclei(rim, 6, 0.15, 3.0, angle, 1.35, rng)


def rounded(depth, radius):
    """Depth [n, n] px of a shape whose corners are rounded to `radius` (a morphological opening)."""
    core = ndimage.distance_transform_edt(depth > 0) > radius
    return ndimage.gaussian_filter(radius + 0.5 - ndimage.distance_transform_edt(~core), 0.8)


def mucin(slide, look, rng):
    """Pools of pale bluish mucin with streaks, and clusters of cells that float in them."""
    if look.mucin <= 0:
        return
    n = slide.n
    pool = blob(rng, n, look.mucin, 30, ragged=0)
    streaks = smooth_noise(rng, n, 9) + 0.6 * slide.fine
    slide.lay(pool, np.clip(0.15 + 0.055 * streaks, 0.02, 1), 0.06 + 0.02 * streaks, "mucin")

    core = ndimage.binary_erosion(pool > 0.5, iterations=9)
    clusters(slide, look, scatter(rng, core, rng.integers(3, 7), 34), rng)


def pools(slide, look, rng):
    """What fills a gap that is no mucin: oedema, pale pink and even, or blood, a crowd of red discs."""
    if look.oedema > 0:
        slide.lay(blob(rng, slide.n, look.oedema, 26), 0.05, 0.2 + 0.05 * smooth_noise(rng, slide.n, 6))
    if look.blood > 0:
        discs = np.abs(smooth_noise(rng, slide.n, 3.5))
        slide.lay(blob(rng, slide.n, look.blood, 26), 0.05, 0.75 + 0.5 * ramp(0.6 - discs, 0.5))


def necrosis(slide, look, rng):
    """Dead tissue: granular eosin without structure, nuclear dust and pale ghosts of nuclei."""
    if look.necrosis <= 0:
        return
    region = blob(rng, slide.n, look.necrosis, 26)
    slide.cover *= 1 - region
    dead = region > 0.5
    slide.cells = [c[~dead[c[:, 0].astype(int), c[:, 1].astype(int)]] for c in slide.cells]
    slide.lay(region, 0.13 + 0.04 * slide.fine, 0.62 + 0.07 * slide.grain + 0.16 * slide.fine, "necrosis")
    slide.in_gland &= ~dead
    ghosts = scatter(rng, dead, look.necrosis * slide.n**2 / 260, 11)
    slide.add_nuclei(ghosts, 7.5, 0.15, 1.2, rng.uniform(0, np.pi, len(ghosts)), 0.34, rng, count=False)
    dust = scatter(rng, dead, look.necrosis * slide.n**2 / 110, 3)
    slide.add_nuclei(dust, 2.3, 0.4, 1.2, rng.uniform(0, np.pi, len(dust)), 1.3, rng, count=False)


def loose_cells(slide, look, rng):
    """Spindle nuclei along the fibres and lymphocytes between them, where there is stroma."""
    free = (slide.mask == MASK_VALUES["stroma"]) & (slide.cover < 0.1)
    room = ndimage.binary_erosion(free, iterations=2) if look.gland != "none" or look.fat else free
    area = room.sum() / 1000
    points = scatter(rng, room, look.spindles * area, 7)
    at = points.astype(int)
    angle = slide.fibre_angle[at[:, 0], at[:, 1]] + 0.12 * rng.standard_normal(len(points))
    slide.add_nuclei(points, 6.6, 0.16, 3.2, angle, 1.3, rng, open_=0.2)

    room &= slide.cover < 0.1
    points = scatter(rng, room, look.lymphocytes * area, 7.0)
    slide.add_nuclei(points, 6.7, 0.08, 1.1, rng.uniform(0, np.pi, len(points)), 1.65, rng, open_=0.1)
