"""Epithelium of a `Look`: solid sheets, nests, glands of five kinds, and the cytoplasm and nuclei that all are made of.

A gland is a stadium on a jittered lattice: its outline, its lumen and the rows of nuclei follow from the same few numbers.
"""

import numpy as np
from scipy import ndimage

from histokit.toy.canvas import MASK_VALUES, blob, ramp, scatter, smooth_noise, two_nearest

# ---------------------------------------------------------------------------------------------- sheets


def sheets(slide, look, rng):
    """Solid epithelium: granular cytoplasm, nuclei as close as their size allows."""
    if look.sheet <= 0:
        return
    region = blob(rng, slide.n, look.sheet)
    slide.lay(region, *cytoplasm(slide, look), "gland")
    slide.in_gland |= region > 0.5
    fill_with_nuclei(slide, look, region > 0.8, rng)


def nests(slide, look, rng):
    """Round clusters of cells in the stroma, or in a pool."""
    if look.nests > 0:
        clusters(slide, look, scatter(rng, slide.mask != MASK_VALUES["fat"], look.nests * slide.n**2 / 128**2, 34), rng)


def clusters(slide, look, centres, rng):
    """Round clusters of cells at centres [N, 2] (y, x)."""
    if len(centres) == 0:
        return
    nearest, _, _ = two_nearest(slide, centres)
    radius = rng.uniform(9, 15)
    cluster = ramp(radius + 2.0 * smooth_noise(rng, slide.n, 10) - nearest, 1.3)
    slide.lay(cluster, *cytoplasm(slide, look), "gland")
    slide.in_gland |= cluster > 0.5
    fill_with_nuclei(slide, look, ndimage.binary_erosion(cluster > 0.5, iterations=2), rng, 1.12)


# ---------------------------------------------------------------------------------------------- glands

FILLED = ("cribriform", "single", "solid")  # cells all over, not along the base: several round lumina, one, none


def glands(slide, look, rng):
    """Tubes cut across: stadium-shaped outlines on a jittered lattice, with lumina and nuclei along the base."""
    if look.gland == "none":
        return
    places = gland_lattice(slide, look, rng)
    depth, owner = gland_depth(slide, places)  # px below the outline, < 0 outside
    body = ramp(depth)
    cleft = ramp(depth + rng.uniform(1, 3.5) + 1.2 * smooth_noise(rng, slide.n, 11)) * (rng.random() < 0.4)
    slide.lay(cleft * (1 - body), 0.02, 0.05)  # shrinkage pulls a gland off its stroma
    slide.lay(ramp(depth + 1.0, 2) * (1 - ramp(depth - 0.6, 2)), 0.2, 0.75)  # basement membrane
    slide.lay(ramp(depth - 0.8), *cytoplasm(slide, look))
    slide.mask[depth > 0] = MASK_VALUES["gland"]
    slide.in_gland |= depth > 0
    if look.gland in FILLED:
        lumen = holes(slide, look, places, depth, owner, rng)
        fill_with_nuclei(slide, look, (depth > 0.5 * look.size) & (lumen < -0.5 * look.size), rng, 1.12)
    else:
        wall, rough = gland_wall(places, look), 0.4 + 1.1 * (look.gland == "elongated")
        lumen = depth - wall[owner] + rough * smooth_noise(rng, slide.n, 8)
        line_with_nuclei(slide, look, places, wall, lumen, rng)
    slide.lay(0.5 * ramp(lumen + 1.6, 3) * body, 0.22, 0.75)  # brush border
    secretion = rng.uniform(0, 0.12)
    slide.lay(ramp(lumen, 1.3) * body, 0.02, 0.03 + secretion * (1 + 0.3 * slide.fine), "lumen")


def gland_lattice(slide, look, rng):
    """Glands as rows (y, x, half length of the axis, radius, angle, bend) of an array [G, 6]."""
    n, radius = slide.n, look.gland_size / 2
    long = {"round": 0.12, "elongated": 1.5}.get(look.gland, 0.25)
    dv, du = 2 * radius + look.gap, 2 * radius * (1 + long) + look.gap
    theta = np.deg2rad(look.angle)
    count = int(1.5 * n / dv) + 2, int(1.5 * n / du) + 2
    row, col = np.meshgrid(np.arange(-count[0], count[0] + 1), np.arange(-count[1], count[1] + 1), indexing="ij")
    shift = rng.uniform(0, 1, 2)
    u = (col + 0.5 * (row % 2) + shift[0]).ravel() * du
    v = (row + shift[1]).ravel() * dv * (0.9 if look.gland != "elongated" else 1)
    jitter = 0.5 * look.gap + 1
    u, v = u + rng.uniform(-jitter, jitter, u.shape), v + 0.6 * rng.uniform(-jitter, jitter, v.shape)
    y, x = n / 2 + u * np.sin(theta) + v * np.cos(theta), n / 2 + u * np.cos(theta) - v * np.sin(theta)
    seen = (np.abs(y - n / 2) < n / 2 + radius * (1 + long)) & (np.abs(x - n / 2) < n / 2 + radius * (1 + long))
    g = int(seen.sum())
    radii = radius * rng.uniform(0.84, 1.06, g)
    halves = radius * long * rng.uniform(0.6, 1.15, g)
    lean = 0.10 if look.gland == "elongated" else 3
    bend = rng.normal(0, 0.004, g) if look.gland == "elongated" else np.zeros(g)
    return np.column_stack([y[seen], x[seen], halves, radii, theta + lean * rng.standard_normal(g), bend])


def gland_depth(slide, places):
    """Depth [n, n] in px below the nearest gland outline and that gland's index [n, n]."""
    depth, owner = np.full((slide.n, slide.n), -1e3), np.zeros((slide.n, slide.n), int)
    wy, wx = slide.y + slide.warp[0], slide.x + slide.warp[1]
    for k, (y, x, half, radius, angle, bend) in enumerate(places):
        u = (wx - x) * np.cos(angle) + (wy - y) * np.sin(angle)
        v = (wy - y) * np.cos(angle) - (wx - x) * np.sin(angle) + bend * u * u
        own = radius - np.hypot(np.maximum(np.abs(u) - half, 0), v)
        owner[own > depth] = k
        depth = np.maximum(depth, own)
    return depth, owner


def gland_wall(places, look):
    """Thickness [G] of the epithelium that leaves `look.lumen` of each stadium's area open."""
    half, radius = places[:, 2], places[:, 3]
    area = look.lumen * (np.pi * radius**2 + 4 * half * radius)  # = pi r^2 + 4 half r of the inner stadium
    inner = (-2 * half + np.sqrt(4 * half**2 + np.pi * area)) / np.pi
    return radius - inner


def holes(slide, look, places, depth, owner, rng):
    """The round lumina of glands that cells fill: depth [n, n] in px below their outline, < 0 outside."""
    if look.gland == "solid":
        return np.full(depth.shape, -1e3)
    if look.gland == "single":
        radius, shift = np.sqrt(look.lumen) * places[:, 3], 0.2 * places[:, 3] * rng.uniform(-1, 1, (2, len(places)))
        away = slide.y + slide.warp[0] - (places[:, 0] + shift[0])[owner], slide.x + slide.warp[1] - (places[:, 1] + shift[1])[owner]
        return radius[owner] - np.hypot(*away)
    radius = rng.uniform(5, 8)
    pitch = radius * np.sqrt(np.pi / max(look.lumen, 0.05)) * 0.93
    centres = scatter(rng, depth > radius + 0.75 * look.size, slide.n**2 / pitch**2 * 2, pitch)
    if len(centres) == 0:
        return np.full(depth.shape, -1e3)
    nearest, _, owner = two_nearest(slide, centres)
    return radius * rng.uniform(0.75, 1.2, len(centres))[owner] - nearest


def line_with_nuclei(slide, look, places, wall, lumen, rng):
    """Rows of nuclei along the base of each gland, long axes towards the lumen, vacuoles above them."""
    long, short = look.size * np.sqrt(look.elongation), look.size / np.sqrt(look.elongation)
    found = []  # (points [N, 2], angle [N], half height [N] in px) of one row in one gland
    vacuoles = [np.zeros((0, 2))]
    for place, thick in zip(places, wall, strict=True):
        flat = thick < 1.3 * long  # a low wall has flat nuclei
        high, wide = (short, long) if flat else (long, short)
        for layer in range(round(look.layers)):
            below = 0.5 * high + 1.0 + 0.62 * layer * high
            if layer and below > thick - 0.3 * high:
                break
            points, normal = outline(place, below, 1.04 * wide, rng)
            jitter = (0.06 + 0.13 * (look.layers > 1.5)) * high * rng.standard_normal((len(points), 1))
            points = points + jitter * np.column_stack([np.sin(normal), np.cos(normal)])
            found.append((points, normal + flat * np.pi / 2, np.full(len(points), 0.48 * high)))
        vacuoles.append(outline(place, 0.5 * (high + thick) + 1, 1.1 * look.size, rng)[0])
    if look.goblet > 0:
        add_vacuoles(slide, look, unwarp(slide, np.concatenate(vacuoles)), lumen, rng)
    points, angle, reach = (np.concatenate(part) for part in zip(*found, strict=True))
    points, angle, reach = on_canvas(slide, unwarp(slide, points), angle, reach)
    at = points.astype(int)
    keep = lumen[at[:, 0], at[:, 1]] < -reach  # none reaches into the lumen
    add_epithelial(slide, look, points[keep], angle[keep] + 0.12 * rng.standard_normal(keep.sum()), rng)


def outline(place, below, pitch, rng):
    """Points [N, 2] every `pitch` px on the line `below` px under a gland's outline, and outward angles [N]."""
    y, x, half, radius, angle, bend = place
    r = radius - below
    if r < 1:
        return np.zeros((0, 2)), np.zeros(0)
    length = 2 * np.pi * r + 4 * half
    s = (np.arange(max(int(length / pitch), 3)) + rng.uniform(0, 1)) * pitch % length
    s = (s + 0.12 * pitch * rng.standard_normal(len(s))) % length

    # walk a stadium: straight, half circle, straight, half circle
    arc = np.pi * r
    turn = np.where(s < 2 * half, np.pi / 2, np.where(s < 2 * half + arc, np.pi / 2 - (s - 2 * half) / r, 0))
    back = s - 2 * half - arc
    turn = np.where(back >= 0, np.where(back < 2 * half, -np.pi / 2, -np.pi / 2 - (back - 2 * half) / r), turn)
    u0 = np.where(s < 2 * half, s - half, np.where(back < 0, half, np.where(back < 2 * half, half - back, -half)))
    u, v = u0 + r * np.cos(turn), r * np.sin(turn)
    v = v - bend * u * u
    points = np.column_stack([y + u * np.sin(angle) + v * np.cos(angle), x + u * np.cos(angle) - v * np.sin(angle)])
    return points, angle + turn


def unwarp(slide, points):
    """Where points [N, 2] of straight ground lie on the warped canvas."""
    at = points.astype(int).clip(0, slide.n - 1)
    return points - np.column_stack([slide.warp[0][at[:, 0], at[:, 1]], slide.warp[1][at[:, 0], at[:, 1]]])


def on_canvas(slide, points, *others):
    """The points [N, 2] that lie on the canvas, with the rows of `others` that belong to them."""
    keep = ((points >= 0) & (points < slide.n - 1)).all(axis=1)
    return (points[keep], *(other[keep] for other in others))


def add_vacuoles(slide, look, points, lumen, rng):
    """Goblet cells: pale round patches between nuclei and lumen."""
    (points,) = on_canvas(slide, points)
    if len(points) == 0:
        return
    cover, ink, cells = slide.cover, slide.ink, slide.cells
    slide.cover, slide.ink, slide.cells = np.zeros_like(cover), np.zeros_like(ink), []
    slide.add_nuclei(points, look.size * 1.3, 0.12, 1.15, rng.uniform(0, np.pi, len(points)), 1.0, rng)
    pale = slide.cover * look.goblet * (lumen < 0)
    slide.cover, slide.ink, slide.cells = cover, ink, cells
    slide.lay(0.9 * pale, 0.09, 0.10)


# ---------------------------------------------------------------------------------------------- what both are made of


def cytoplasm(slide, look):
    """Hematoxylin and eosin [n, n] of epithelium."""
    blue = 0.08 + 0.26 * look.plasma
    return blue + 0.03 * slide.fine, 0.34 + 0.16 * look.plasma + 0.06 * slide.fine + 0.03 * slide.grain


def fill_with_nuclei(slide, look, where, rng, crowding=1.0):
    """Nuclei of the look's epithelium all over `where`, long ones along the fibres."""
    spacing = look.size * (1.08 + 0.3 * look.spread) / crowding
    points = scatter(rng, where, slide.n**2 / spacing**2, spacing)
    at = points.astype(int)
    angle = slide.fibre_angle[at[:, 0], at[:, 1]] if look.elongation > 1.8 else rng.uniform(0, np.pi, len(points))
    add_epithelial(slide, look, points, angle + 0.15 * rng.standard_normal(len(points)), rng)


def add_epithelial(slide, look, points, angle, rng):
    """Nuclei with the look's size and chromatin; open ones get a nucleolus."""
    ink = 1.45 - 0.45 * look.chromatin
    slide.add_nuclei(points, look.size, look.spread, look.elongation, angle, ink, rng, open_=look.chromatin)
    if look.chromatin > 0.45 and len(points):
        spots = points[rng.random(len(points)) < 0.8]
        spots = np.clip(spots + 0.12 * look.size * rng.standard_normal(spots.shape), 0, slide.n - 1)
        slide.add_nuclei(spots, 0.22 * look.size, 0.2, 1.1, np.zeros(len(spots)), 1.6, rng, count=False)
