"""Which pictures say how a slide looks: the style pictures of a tile to learn from, and those of a slide to draw like.

Öttl et al. (2024), arXiv:2403.14429. A pool knows the tiles of each slide, or patient, by name and never by place in a list, and never
lends those of one to another. Style pictures are turned and flipped, sometimes bent, and never recoloured: colour is what they say.
"""

from dataclasses import dataclass

import numpy as np
import torch

from histokit.core import files
from histokit.tiles import augment, data, decode

VERSION = 1
KINDS = ("none", "augmented", "nearby", "mp", "random")
TISSUE = 0.2  # share of stained pixels below which a tile says little of a slide
BENT = 0.5  # share of style pictures that are bent when a picture is made
GLASS = 230 / 255  # brightness above which the darkest channel of a pixel shows glass


@dataclass(frozen=True)
class Settings:
    """How style pictures are drawn.

    Args:
        kind: `none` (no style), `augmented` (the tile itself, turned and bent), `nearby` (one tile whose centre lies within
            `relative_dist` tiles of it on its slide; needs columns x and y), `mp` (`pictures` tiles of its slide), `random` (`pictures`
            tiles of its patient; for tile folders that know no slide).
        pictures: n.
        distinct: whether no tile comes twice in a draw, where there are enough.
        relative_dist: of nearby, in tiles, along each axis.
        min_shift: of nearby, the share of its area that a style tile must not share with the target, 0 to 1.
        tissue: share of stained pixels below which a tile is no style, 0 takes all.
        px: side at which style pictures are seen.
    """

    kind: str = "random"
    pictures: int = 4
    distinct: bool = True
    relative_dist: float = 1.0
    min_shift: float = 0.0
    tissue: float = TISSUE
    px: int = 64

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"style sampling {self.kind!r} is unknown; use {', '.join(KINDS)}")
        if self.pictures < 1 or (self.kind in ("none", "augmented", "nearby") and self.pictures != 1):
            raise ValueError(
                f"style sampling {self.kind} takes {'1 picture' if self.pictures > 1 else '1 picture or more'}, got {self.pictures}"
            )
        for name in ("min_shift", "tissue"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1; got {getattr(self, name)}")

    @property
    def home(self):
        """The column within which tiles lend each other their style."""
        return "slide" if self.kind in ("nearby", "mp") else "case_id"


class Pool:
    """Tiles that lend their style, by slide or patient.

    Args:
        tiles: manifest rows of training tiles; of validation tiles where a loss is validated.
        settings: Settings.
        features: None, or a callable of manifest rows -> [N, D] float; its vectors take the place of pictures.

    Raises ValueError where the tiles do not know what `kind` needs, or none shows tissue.
    """

    def __init__(self, tiles, settings, features=None):
        self.settings = settings
        self.tiles = tiles.sort_values("tile_id").reset_index(drop=True)
        if not len(self.tiles):
            raise ValueError("the style pool is empty: no tile of that kind is for training")
        if settings.home == "slide" and self.tiles["slide"].fillna("").eq("").any():
            raise ValueError(
                f"style sampling {settings.kind} draws from one slide, and tile {self.tiles['tile_id'].iloc[0]!r} names none; say in the "
                "description how to read `slide`, or use style sampling: random, which draws from one patient"
            )
        if settings.kind == "nearby" and not {"x", "y"} <= set(self.tiles):
            raise ValueError(
                "style sampling nearby needs to know where a tile lies on its slide: columns x and y (px of its upper left corner); name "
                "them in the description's `columns` or `case_pattern`, or use mp"
            )
        self.seen = features(self.tiles) if features is not None else self._pictures()
        stained = self._stained()
        self.usable = np.flatnonzero(stained >= settings.tissue)
        if not len(self.usable):
            raise ValueError(
                f"none of {len(self.tiles)} tiles shows tissue on {settings.tissue:.0%} of its pixels; lower `tissue` in the options"
            )
        self.of_home, homes = {}, self.tiles[settings.home].to_numpy()
        for i in self.usable:
            self.of_home.setdefault(homes[i], []).append(int(i))
        self.place = {name: i for i, name in enumerate(self.tiles["tile_id"])}

    def _pictures(self):
        """uint8 [N, px, px, 3]; a style needs no more, and millions of tiles want a smaller px."""
        return data.pixels(self.tiles, self.settings.px)

    def _stained(self):
        """Share [N] of pixels that show tissue."""
        if not self.settings.tissue:
            return np.ones(len(self.tiles))
        pictures = self.seen if isinstance(self.seen, np.ndarray) and self.seen.ndim == 4 else self._pictures()
        return (pictures.min(axis=3) < GLASS * 255).mean(axis=(1, 2))

    @property
    def homes(self):
        """Slides or patients that lend a style, sorted."""
        return sorted(self.of_home)

    def beside(self, tile_id, generator):
        """Places [n] of tiles that say how the slide of a tile looks, drawn anew each time; for learning."""
        how, at = self.settings, self.place[tile_id]
        if how.kind in ("none", "augmented"):
            return [at]
        home = self.tiles[how.home].iloc[at]
        known = self.of_home.get(home, [])
        if how.kind == "nearby":
            known = [i for i in known if self._near(at, i)]
        elif how.kind == "random" or how.distinct:
            known = [i for i in known if i != at] or known
        if not known:  # a slide of one tile, or with no other near: it speaks for itself
            known = [at]
        return self._some(known, generator)

    def of(self, home, generator):
        """Places [n] of tiles of a slide or patient; for drawing in its style."""
        if home not in self.of_home:
            raise ValueError(f"no tile of {self.settings.home} {home!r} lends its style; there are {len(self.of_home)} that do")
        return self._some(self.of_home[home], generator)

    def of_case(self, case, generator):
        """Places [n] of tiles of one slide of a case."""
        homes = sorted(set(self.tiles.loc[self.usable, self.settings.home][self.tiles.loc[self.usable, "case_id"].eq(case)]))
        if not homes:
            raise ValueError(f"no tile of case {case!r} lends its style")
        return self.of(homes[int(torch.randint(len(homes), (1,), generator=generator))], generator)

    @property
    def cases(self):
        """Cases that lend a style, sorted."""
        return sorted(set(self.tiles.loc[self.usable, "case_id"]))

    def _near(self, at, other):
        """Whether a tile lies within `relative_dist` of another on its slide, and shares no more of its area than `min_shift` leaves."""
        one, two, how = self.tiles.iloc[at], self.tiles.iloc[other], self.settings
        dx, dy = (abs(float(two[axis]) - float(one[axis])) / float(one[side]) for axis, side in (("x", "width"), ("y", "height")))
        shared = max(0.0, 1 - dx) * max(0.0, 1 - dy)
        return other != at and max(dx, dy) <= how.relative_dist and shared <= 1 - how.min_shift

    def _some(self, known, generator):
        n = self.settings.pictures
        if self.settings.distinct and len(known) >= n:
            return [known[k] for k in torch.randperm(len(known), generator=generator)[:n].tolist()]
        return [known[k] for k in torch.randint(len(known), (n,), generator=generator).tolist()]

    def style(self, places, generator, bent=0.0):
        """What a style encoder reads of tiles: [B, n, 3, px, px] in [-1, 1], turned, flipped and a share of them bent, or [B, n, D].

        Args:
            places: list of B lists of n places.
            bent: share that is bent; features are neither bent nor turned.
        """
        flat, count = [i for row in places for i in row], len(places[0])
        chosen = self.seen[flat]
        if chosen.ndim == 2:
            return torch.as_tensor(chosen).float().unflatten(0, (-1, count))
        pictures = augment.random_symmetry(decode.to_float(chosen), generator)
        if self.settings.kind == "augmented" or bent:
            maps = augment.random_affine(len(pictures), generator, 1.0 if self.settings.kind == "augmented" and not bent else bent)
            pictures = augment.warp(pictures, maps)
        return pictures.unflatten(0, (-1, count))


def mean_density(pictures):
    """Mean optical density [N, 3] of pictures uint8 [N, H, W, 3]: the colour of a picture as a style passes it on."""
    return augment.optical_density(torch.as_tensor(np.ascontiguousarray(pictures)).float() / 255).mean(dim=(1, 2)).numpy()


def refuse_held_out(tiles, allowed=False):
    """Raises ValueError where layout or style would come from tiles that are not for training.

    With `allowed` (`allow_test_style`) it returns a sentence for the report instead: a study that draws in the style of its own test
    slides is transductive.
    """
    wrong = tiles[tiles["split"].ne("train")]
    if not len(wrong):
        return ""
    split, first = wrong["split"].iloc[0], wrong["tile_id"].iloc[0]
    cases = wrong["case_id"].nunique()
    if not allowed:
        raise ValueError(
            f"{len(wrong)} tiles of {cases} cases, the first {first!r}, are for {split} and not for training; neither layout nor style may "
            "come from them (options: {allow_test_style: true} makes a transductive study of it, and the report says so)"
        )
    return f"TRANSDUCTIVE: style comes from {len(wrong)} {split} tiles of {cases} cases; the verdict holds for these slides alone."


def digest(pool):
    """What a pool follows from, 16 hex."""
    known = [[row.tile_id, row.sha256] for row in pool.tiles.itertuples()]
    return files.digest("styles", VERSION, known, files.plain(vars(pool.settings)))[:16]
