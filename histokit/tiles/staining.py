"""Real tiles of rare classes in the stain of other cases: the cheap rival that a generator must beat.

The tissue stays, so does the label; new is the laboratory alone. Two published methods, on tensors; `tiles` makes the training tiles of
an arm out of them. Nothing is trained and no synthetic tile is involved.
"""

import os

import numpy as np
import pandas as pd
import torch

from histokit.core import files
from histokit.tiles import augment, data, decode

VERSION = 1
METHODS = ("reinhard", "macenko")
TISSUE = 0.15  # optical density from which on a pixel is stained, in one channel at least; the beta of Macenko et al.
LEAST = 200  # stained pixels that statistics need
READ = 8  # tiles of a case that its stain is measured on
SOURCE = "recoloured"  # in the column `source`

# R, G, B to the cone responses L, M, S, and their logarithms to l, alpha, beta: Reinhard et al. (2001), equations 4 and 6.
LMS = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=torch.float64)
LAB = torch.diag(torch.tensor([3.0, 6.0, 2.0], dtype=torch.float64).rsqrt()) @ torch.tensor(
    [[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [1.0, -1.0, 0.0]], dtype=torch.float64
)


def _stained(pixels):
    """Pixels [N, 3] float64 in [0, 1] of tiles uint8 [B, H, W, 3] that hold tissue; ValueError where there are too few."""
    flat = torch.as_tensor(np.ascontiguousarray(pixels)).reshape(-1, 3).double() / 255
    flat = flat[augment.optical_density(flat).amax(1) >= TISSUE]
    if len(flat) < LEAST:
        raise ValueError(f"{len(flat)} stained pixels, {LEAST} are needed to know a stain")
    return flat


def _lab(flat):
    return torch.log10((flat @ LMS.T).clamp_min(1 / 256)) @ LAB.T


def reinhard_look(pixels):
    """Mean and deviation [2, 3] of l, alpha, beta over the stained pixels of uint8 [B, H, W, 3]; Reinhard et al. (2001)."""
    lab = _lab(_stained(pixels))
    return torch.stack([lab.mean(0), lab.std(0)])


def reinhard(pixels, own, other):
    """Tiles uint8 [B, H, W, 3] with their l, alpha, beta moved and scaled from look `own` to look `other`; equations 10 and 11.

    All pixels are moved, as in the paper: white glass takes a tint as well.
    """
    flat = torch.as_tensor(np.ascontiguousarray(pixels)).reshape(-1, 3).double() / 255
    scale = torch.where(own[1] > 1e-6, other[1] / own[1].clamp_min(1e-6), 1.0)
    lab = (_lab(flat) - own[0]) * scale + other[0]
    rgb = (10.0 ** (lab @ torch.linalg.inv(LAB).T)) @ torch.linalg.inv(LMS).T
    return _uint8(rgb, pixels.shape)


def macenko_look(pixels, alpha=1.0, top=99.0):
    """Stain vectors and their strength, [3, 3]: optical density of haematoxylin, of eosin, and how much there is of each (and 0).

    Macenko et al. (2009): the singular plane of the densities, and in it the directions at the `alpha` and 100 - `alpha` percentiles of
    the angle; strength is the `top` percentile. Where the tile has one stain only, the vectors are those of Ruifrok & Johnston.
    """
    density = augment.optical_density(_stained(pixels))
    plane = torch.linalg.svd(density[torch.linspace(0, len(density) - 1, min(len(density), 200_000)).long()], full_matrices=False)[2][:2]
    plane = plane * torch.where(plane[:1].sum() < 0, -1.0, 1.0)  # the first direction is the mean one: positive
    along = density @ plane.T
    angle = torch.atan2(along[:, 1], along[:, 0])
    ends = torch.quantile(angle[:: max(1, len(angle) // 10**6)], torch.tensor([alpha, 100 - alpha], dtype=angle.dtype) / 100)
    stains = torch.nn.functional.normalize((torch.stack([ends.cos(), ends.sin()], 1) @ plane).clamp_min(0), dim=1)
    stains = stains.flip(0) if stains[0, 0] < stains[1, 0] else stains  # haematoxylin takes more of the red
    if torch.linalg.cross(stains[0], stains[1]).norm() < np.sin(np.radians(5)):
        stains = augment.STAINS[:2].to(density)
    amounts = _amounts(density, stains)
    strength = torch.quantile(amounts[:: max(1, len(amounts) // 10**6)], top / 100, dim=0)
    return torch.cat([stains, torch.cat([strength.clamp_min(0), strength.new_zeros(1)])[None]])


def _amounts(density, stains):
    return density @ torch.linalg.pinv(stains)


def macenko(pixels, own, other):
    """Tiles uint8 [B, H, W, 3] with the amounts of stain of look `own`, scaled to and drawn in the stains of look `other`.

    White glass stays white; what neither stain explains is lost, as in the paper.
    """
    flat = torch.as_tensor(np.ascontiguousarray(pixels)).reshape(-1, 3).double() / 255
    scale = torch.where(own[2, :2] > 1e-3, other[2, :2] / own[2, :2].clamp_min(1e-3), 1.0)
    amounts = _amounts(augment.optical_density(flat), own[:2]) * scale
    return _uint8(augment.from_optical_density(amounts @ other[:2]), pixels.shape)


def _uint8(rgb, shape):
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).reshape(shape).numpy()


HOW = {"reinhard": (reinhard_look, reinhard), "macenko": (macenko_look, macenko)}


class Restainer:
    """Tiles in the stains of other cases, each of which is measured once, on a few of its tiles.

    Args:
        real: training rows, as `data.training` gives them; their cases are the donors.
        method: of `METHODS`.
    """

    def __init__(self, real, method="macenko"):
        if method not in HOW:
            raise ValueError(f"stain method {method!r} is unknown; use {' or '.join(METHODS)}")
        self.method, (self.measure, self.paint) = method, HOW[method]
        self.of_case, self.looks = dict(list(real.groupby("case_id"))), {}

    def look(self, case):
        """Look of a case; None where it has too little tissue to know its stain."""
        if case not in self.looks:
            held = self.of_case[case]
            try:
                self.looks[case] = self.measure(data.pixels(held.loc[held["tile_id"].map(files.digest).sort_values().index[:READ]]))
            except ValueError:
                self.looks[case] = None
        return self.looks[case]

    def donor(self, row, turn, *seeds, cases=None):
        """The case in whose stain the tile is painted: every turn another; "" where no stain is known but its own, or not even that.

        Args:
            row: manifest row. turn: 0 for the tile's first copy, 1 for its second, ...
            seeds: of the order, beside the tile's name.
            cases: which may be donors; None for all.
        """
        others = files.shuffled(sorted(self.of_case if cases is None else cases), *seeds, row["tile_id"])
        others = [case for case in others if case != row["case_id"]]
        if not others or self.look(row["case_id"]) is None:
            return ""
        turn %= len(others)
        return next((case for case in others[turn:] + others[:turn] if self.look(case) is not None), "")

    def __call__(self, row, donor, px=None):
        """Pixels uint8 [H, W, 3] of a manifest row, `px` wide, in the stain of the case `donor`."""
        return self.paint(data.pixels(row, px), self.look(row["case_id"]), self.look(donor))[0]

    def written(self, row, donor, px=None):
        """The manifest row (dict) of that picture, which lies in the cache."""
        px = px or int(row["tile_px"])
        made_of = [VERSION, decode.VERSION, self.method, self.look(row["case_id"]).tolist(), self.look(donor).tolist()]
        key = files.digest("restained", row["sha256"] or files.sha256(row["path"]), data.shown(row), px, made_of)
        path = files.cache("restained") / key[:2] / f"{key}.png"
        if not path.exists():
            files.write_png(path, self(row, donor, px))
            files.prune("restained", 2.0, keep=[path])
        os.utime(path)
        return {**dict(row), **_as_file(path, px)}


def restained(learn, donors, copies, *seeds, cases=None, method="macenko"):
    """`learn`, and each of its tiles `copies` times in the stain of another case: (rows, place [N] of each in learn, case [N]).

    Rows without a file are of those that hold them in the cache; the case is "" for a tile as it is. A case with too little tissue to know
    its stain stays as it is.

    Args:
        learn: manifest rows. donors: rows whose cases lend their stains, see `data.learnable`. cases: which of these may; None for all.
        seeds: of which stain a tile wears.
    """
    rows, places, worn = learn.to_dict("records"), list(range(len(learn))), [""] * len(learn)
    paint = Restainer(donors, method)
    for i, (_, row) in enumerate(learn.iterrows() if copies else ()):
        for case in filter(None, dict.fromkeys(paint.donor(row, turn, *seeds, cases=cases) for turn in range(copies))):
            rows.append(paint.written(row, case))
            places.append(i)
            worn.append(case)
    return pd.DataFrame(rows, columns=learn.columns), places, worn


def _as_file(path, px):
    """What a manifest says of a square picture that is shown as it is."""
    return {"path": str(path), "fit": "resize", "tile_px": px, "sha256": files.sha256(path), "width": px, "height": px, "mask": ""}


def tiles(run, real, classes, method, per_class):
    """`per_class` recoloured tiles of each class, written as PNG below the run folder: manifest rows with `path`, `source` recoloured.

    The tiles of a class take turns, each time in the stain of another case, of whatever class. The first n tiles are the same whatever
    `per_class` is. A case with too little tissue to know its stain gives none and its tiles are left out.

    Args:
        real: training rows, as `data.training` gives them; the stains come from all of them.
        classes: which to recolour.
        method: of `METHODS`.

    Raises ValueError for a class of which no tile can be recoloured.
    """
    restain, rows = Restainer(real, method), []
    for name in classes:
        own = real[real["label"].eq(name)].sort_values("tile_id", ignore_index=True)
        for i in range(per_class if len(own) else 0):
            lap, place = divmod(i, len(own))
            row = own.iloc[files.shuffled(range(len(own)), run.seed, method, name, lap)[place]]
            donor = restain.donor(row, lap, run.seed, method)
            if not donor:
                continue
            path = run.path(SOURCE, method, files.slug(name), f"{i:04d}.png")
            pixels = restain(row, donor)
            files.write_png(path, pixels)
            place = path.relative_to(run.folder).as_posix()
            told = {"tile_id": f"{run.step}/{place}", "root": run.step, "source": SOURCE, "file_name": place, "method": method}
            rows.append({**row.to_dict(), **_as_file(path, len(pixels)), **told})
        if len(own) and not any(row["label"] == name for row in rows):
            raise ValueError(f"recolour {method}: no other case, or too little tissue in the {len(own)} training tiles of {name}")
    return pd.DataFrame(rows, columns=[*real.columns, *(c for c in ("method",) if c not in real)])


def stains(pixels):
    """Mean haematoxylin and eosin [N, 2] of tiles uint8 [N, H, W, 3], in units of optical density; Ruifrok & Johnston (2001)."""
    images = (data.to_float(pixels) + 1) / 2
    density = augment.optical_density(images).mean(dim=(2, 3))
    return (density @ torch.linalg.inv(augment.STAINS).to(density))[:, :2].numpy()


def colour(pixels):
    """Mean and deviation of optical density per channel and stain, [N, 10]: what a classifier could know of a tile without its shapes."""
    images = (data.to_float(pixels) + 1) / 2
    density = augment.optical_density(images).flatten(2)
    amounts = torch.einsum("bcn,cs->bsn", density, torch.linalg.inv(augment.STAINS).to(density))[:, :2]
    return torch.cat([part for x in (density, amounts) for part in (x.mean(-1), x.std(-1))], dim=1).numpy()
