"""More real tiles of the classes that were made rare: what a perfect generator could bring.

One that knows the cases a class has could at best draw more tiles of these, `same_cases`; one that knew the tissue of others, tiles of
`new_cases`. They come from what a budget withholds, and of invented tissue they are drawn.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from histokit import toy
from histokit.core import files
from histokit.tiles import data

VERSION = 1
WHOSE = ("any", "same_cases", "new_cases")
GIVEN = "given"  # column: a real tile that the class does not have, or that is taken from what a budget withholds
DRAWN_FROM = 1000  # index in its case from which a tile is in no dataset
PER_CASE = 3  # drawn tiles of a new case


def real_tiles(tiles, n=0, whose="any", draw=None):
    """The real training tiles, with `n` of each class that was made rare; 0 for as many as there are.

    Fewer are taken from those a class has, more from those that a budget withholds, so every larger number holds the smaller one.

    Args:
        tiles: manifest of 00_dataset.
        whose: what is added is of `same_cases` as the tiles a class has, of `new_cases`, or of any.
        draw: `draw(own, count, whose)` -> rows, a `Drawn`, for a class of invented tissue, of which nothing is withheld.

    Returns:
        Training rows; those that were added come last, with `given` true.

    Raises ValueError where no class was made rare, or one has fewer than n tiles.
    """
    real = data.training(tiles).assign(**{GIVEN: False})
    if not n:
        return real
    rare = made_rare(tiles, draw)
    if not rare:
        raise ValueError("real_tiles needs a class that a budget makes rare: real tiles that can be given back one by one")
    kept, added = [real[~real["label"].isin(rare)]], []
    for name in rare:
        own = _shuffled(real[real["label"].eq(name)])
        more = max(0, n - len(own))
        extra = spare(tiles, name, more, whose, draw)
        if len(extra) < more:
            of = "" if whose == "any" else f" of {whose.replace('_', ' ')}"
            raise ValueError(f"real_tiles {n}: {name} has {len(own) + len(extra)} training tiles with those withheld{of}")
        kept.append(own.head(n))
        added.append(extra)
    return pd.concat([*kept, *added])


def made_rare(tiles, draw=None):
    """The classes of a manifest of 00_dataset that have true tiles to spare: withheld by a budget, or to be drawn."""
    return sorted(set(_withheld(tiles)["label"])) or (sorted(draw.classes) if draw else [])


def spare(tiles, name, most, whose="any", draw=None):
    """Up to `most` true training rows of a class beyond those it has, `given` true; `whose` and `draw` as in `real_tiles`."""
    own, withheld = data.training(tiles, name), _withheld(tiles)
    if draw and not len(withheld):
        return draw(_shuffled(own), most, whose).assign(**{GIVEN: True})
    pool = withheld[withheld["label"].eq(name)]
    known = pool["case_id"].isin(set(own["case_id"]))
    pool = _shuffled(pool[{"any": known | ~known, "same_cases": known, "new_cases": ~known}[whose]])
    return pool.head(most).assign(use="labelled", **{GIVEN: True})


def _withheld(tiles):
    return tiles[tiles["use"].eq("withheld") & tiles["split"].eq("train")]


def _shuffled(rows):
    return rows.loc[rows["tile_id"].map(files.digest).sort_values(kind="stable").index]


class Drawn:
    """`draw` of `real_tiles` for invented tissue: true tiles that are in no dataset, written below the run folder.

    Those of the same cases take turns among them; a new case has three tiles. The first n are the same however many are drawn.
    """

    def __init__(self, run, dataset):
        self.run, self.classes = run, dataset.tail

    def __call__(self, own, count, whose):
        name, cases = own["label"].iloc[0], sorted(set(own["case_id"]))
        places = [(cases[i % len(cases)], DRAWN_FROM + i // len(cases)) for i in range(count)]
        if whose == "new_cases":
            places = [(f"X{i // PER_CASE + 1:03d}", DRAWN_FROM + i % PER_CASE) for i in range(count)]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # a tile follows from its place alone
            rows = list(pool.map(lambda place: self._row(own.iloc[0], name, *place), places))
        return pd.DataFrame(rows, columns=own.columns)

    def _row(self, like, name, case, index):
        path = self.run.path("drawn", files.slug(name), f"{case}_{index}.png")
        if not path.is_file():
            files.write_png(path, toy.tile(name, case, index)[0])
        below = path.relative_to(self.run.folder).as_posix()
        told = {"tile_id": f"{self.run.step}/{below}", "root": self.run.step, "file_name": below, "path": str(path), "case_id": case}
        told |= {"sha256": files.sha256(path), "mask": "", "patient": "", "slide": ""}
        return {**like.to_dict(), **{key: value for key, value in told.items() if key in like.index}}
