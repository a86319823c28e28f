"""What the arms of 06_classifier predicted, checked to be about the same tiles.

Reads `<step>/<arm>/<seed>/predictions.parquet` and refuses what cannot be compared tile by tile. Nothing is measured here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histokit.core import files

VERSION = 2
COLUMNS = ("tile_id", "case_id", "split", "arm", "seed", "gen_seed", "y")


@dataclass(frozen=True)
class Predictions:
    """What every arm said about the same test tiles, in every run: a draw of the rare tiles, a generator seed, a classifier seed."""

    classes: list
    arms: list  # [A]
    runs: np.ndarray  # [R, 3] int, common to all arms: draw of the rare tiles, generator seed, classifier seed
    tile_id: np.ndarray  # [N] str
    case_id: np.ndarray  # [N] str
    y: np.ndarray  # [N] int label ids
    called: np.ndarray  # [A, R, N] int label ids
    probabilities: np.ndarray  # [A, R, N, C] float
    hashes: dict  # "arm/seed", after "experiment/" for a replicate -> sha256 of the file
    notes: list  # what was left out, in words
    group: np.ndarray = None  # [N] str, of each tile; "" where it has none

    @property
    def case(self):
        """[N] int, the case of each tile."""
        return np.unique(self.case_id, return_inverse=True)[1]

    def levels(self, column):
        """The distinct draws (0), generator seeds (1) or classifier seeds (2)."""
        return sorted(set(self.runs[:, column].tolist()))

    @property
    def seeds(self):
        return self.levels(2)


def read(folders, classes, arms=(), split="test"):
    """The predictions on test tiles, or those of another split, below the folders of finished 06_classifier steps.

    Args:
        folders: one folder, or {(draw, generator): folder}; each holds `<arm>/<seed>/predictions.parquet`. An arm that generator 0 of
            a draw alone has, for want of synthetic tiles, stands for every generator of that draw.
        classes: class list of the dataset; a file with another one is refused.
        arms: names in the order to show them; others found follow.

    Raises:
        FileNotFoundError: no predictions, or none of a named arm.
        ValueError: names the file and what is wrong with it: other tiles, other labels, other classes, NaN, a tile twice.
    """
    folders = folders if isinstance(folders, dict) else {(0, 0): folders}
    tables, hashes = {}, {}
    for (draw, generator), folder in folders.items():
        own, sums = _tables(folder, classes, split)
        mine = {arm for arm, _ in own}
        shared = {(arm, s): t for (d, g, arm, s), t in tables.items() if (d, g) == (draw, 0) and arm not in mine} if generator else {}
        tables |= {(draw, generator, *key): table for key, table in (own | shared).items()}
        where = "" if (draw, generator) == (0, 0) else f"{Path(folder).parent.name}/"
        hashes |= {(draw, generator, *key): (f"{where}{key[0]}/{key[1]}", value) for key, value in sums.items()}
    first_folder = next(iter(folders.values()))
    found = list(dict.fromkeys(arm for _, _, arm, _ in tables))
    missing = [arm for arm in arms if arm not in found]
    if missing or not tables:
        what, held = f"arm {missing[0]!r}" if missing else "any arm", ", ".join(found) or "nothing"
        raise FileNotFoundError(f"{first_folder} holds no predictions.parquet of {what} (found: {held}); run that step again")
    order = [*arms, *(arm for arm in found if arm not in arms)]
    of = {arm: {(d, g, s) for d, g, a, s in tables if a == arm} for arm in order}
    runs = sorted(set.intersection(*of.values()))
    if not runs:
        raise ValueError(f"{first_folder}: no classifier seed is common to all arms ({of}); arms are compared seed by seed")
    more = {arm: sorted(held - set(runs)) for arm, held in of.items() if held - set(runs)}
    notes = [f"{_said(dropped)} of {arm} are left out: not every arm has them" for arm, dropped in more.items()]
    d, g, s = runs[0]
    first_key, first = (order[0], d, g, s), tables[d, g, order[0], s]
    for arm in order:
        for d, g, s in runs:
            _same_tiles(first_folder, (arm, d, g, s), tables[d, g, arm, s], first_key, first)
    scores = [f"p_{name}" for name in classes]
    p = np.array([[tables[d, g, arm, s][scores].to_numpy() for d, g, s in runs] for arm in order])
    return Predictions(
        classes=list(classes),
        arms=order,
        runs=np.array(runs),
        tile_id=first["tile_id"].to_numpy(str),
        case_id=first["case_id"].to_numpy(str),
        y=first["y"].to_numpy(int),
        called=p.argmax(-1),
        probabilities=p,
        hashes=dict(hashes[d, g, arm, s] for arm in order for d, g, s in runs if (d, g, arm, s) in hashes),
        notes=notes,
        group=first["group"].fillna("").to_numpy(str) if "group" in first else np.full(len(first), ""),
    )


def _said(runs):
    """Runs in words: `seeds [4, 5]`, or with their draw and generator where there are several."""
    plain = all((d, g) == (0, 0) for d, g, _ in runs)
    return f"seeds {[s for _, _, s in runs]}" if plain else "runs " + ", ".join(f"draw {d} generator {g} seed {s}" for d, g, s in runs)


def _tables(folder, classes, split):
    """{(arm, seed): rows of the split} and {(arm, seed): sha256} of one folder."""
    tables, hashes = {}, {}
    for path in sorted(Path(folder).glob("*/*/predictions.parquet")):
        table, key = _checked(path, classes, split)
        if key in tables:
            raise ValueError(f"{path}: arm {key[0]!r}, seed {key[1]} is already in another folder; remove the copy")
        tables[key], hashes[key] = table, files.sha256(path)
    return tables, hashes


def _checked(path, classes, split):
    """The rows of one split of one predictions file sorted by tile, and its (arm, seed)."""
    table = files.read_table(path)
    lacking = [name for name in COLUMNS if name not in table]
    scores = [name for name in table if name.startswith("p_")]
    if lacking:
        raise ValueError(f"{path} lacks the column {lacking[0]!r}; predictions hold {', '.join(COLUMNS)} and p_<class>")
    if set(scores) != {f"p_{name}" for name in classes}:
        odd = sorted(set(scores) ^ {f"p_{name}" for name in classes})
        raise ValueError(f"{path}: its classes are not those of the dataset ({', '.join(odd[:4])}); train the classifier on this dataset")
    rows = table[table["split"] == split].sort_values("tile_id", ignore_index=True)
    keys = rows[["arm", "seed"]].drop_duplicates()
    if len(keys) != 1:
        raise ValueError(
            f"{path}: expected the {split} tiles of one arm and one seed, got {len(rows)} {split} rows and {len(keys)} of these"
        )
    wrong = ~np.isfinite(rows[scores].to_numpy(float)).all(1)
    if wrong.any():
        raise ValueError(f"{path}: tile {rows['tile_id'][wrong.argmax()]!r} has a score that is NaN or infinite ({wrong.sum()} such tiles)")
    if rows["tile_id"].duplicated().any():
        raise ValueError(f"{path}: tile {rows.loc[rows['tile_id'].duplicated(), 'tile_id'].iloc[0]!r} is predicted twice")
    if not rows["y"].between(0, len(classes) - 1).all():
        raise ValueError(f"{path}: label ids run from {rows['y'].min()} to {rows['y'].max()}, the dataset has 0 to {len(classes) - 1}")
    return rows, (str(keys["arm"].iloc[0]), int(keys["seed"].iloc[0]))


def _same_tiles(folder, key, table, first_key, first):
    for column in ("tile_id", "case_id", "y"):
        if len(table) != len(first) or (table[column] != first[column]).any():
            one, other = ("/".join(map(str, (k[0], k[3]))) + (f" of draw {k[1]}, generator {k[2]}" * any(k[1:3])) for k in (key, first_key))
            raise ValueError(
                f"{folder}: {one} and {other} do not hold the same test tiles ({len(table)} and {len(first)} rows, "
                f"first differing in {column}); arms are compared tile by tile, so run that step again"
            )
