"""What the arms of 06_classifier predicted, checked to be about the same tiles.

Reads `<step>/<arm>/<seed>/predictions.parquet` and refuses what cannot be compared tile by tile. Nothing is measured here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histokit import files

VERSION = 1
COLUMNS = ("tile_id", "case_id", "split", "arm", "seed", "gen_seed", "y")


@dataclass(frozen=True)
class Predictions:
    """What every arm said about the same test tiles."""

    classes: list
    arms: list  # [A]
    seeds: list  # [S], common to all arms
    tile_id: np.ndarray  # [N] str
    case_id: np.ndarray  # [N] str
    y: np.ndarray  # [N] int label ids
    called: np.ndarray  # [A, S, N] int label ids
    gen_seeds: dict  # arm -> generator seeds seen in its files
    hashes: dict  # "arm/seed" -> sha256 of the file
    notes: list  # what was left out, in words

    @property
    def case(self):
        """[N] int, the case of each tile."""
        return np.unique(self.case_id, return_inverse=True)[1]


def read(folder, classes, arms=()):
    """The test predictions below the folder of a finished 06_classifier.

    Args:
        folder: holds `<arm>/<seed>/predictions.parquet`.
        classes: class list of the dataset; a file with another one is refused.
        arms: names in the order to show them; others found follow.

    Raises:
        FileNotFoundError: no predictions, or none of a named arm.
        ValueError: names the file and what is wrong with it: other tiles, other labels, other classes, NaN, a tile twice.
    """
    tables, hashes = {}, {}
    for path in sorted(Path(folder).glob("*/*/predictions.parquet")):
        table, key = _checked(path, classes)
        if key in tables:
            raise ValueError(f"{path}: arm {key[0]!r}, seed {key[1]} is already in another folder; remove the copy")
        tables[key], hashes[f"{key[0]}/{key[1]}"] = table, files.sha256(path)
    found = list(dict.fromkeys(arm for arm, _ in tables))
    missing = [arm for arm in arms if arm not in found]
    if missing or not tables:
        what, held = f"arm {missing[0]!r}" if missing else "any arm", ", ".join(found) or "nothing"
        raise FileNotFoundError(f"{folder} holds no predictions.parquet of {what} (found: {held}); run that step again")
    order = [*arms, *(arm for arm in found if arm not in arms)]
    seeds_of = {arm: {seed for a, seed in tables if a == arm} for arm in order}
    seeds = sorted(set.intersection(*seeds_of.values()))
    if not seeds:
        raise ValueError(f"{folder}: no classifier seed is common to all arms ({seeds_of}); arms are compared seed by seed")
    more = {arm: sorted(held - set(seeds)) for arm, held in seeds_of.items() if held - set(seeds)}
    notes = [f"seeds {dropped} of {arm} are left out: not every arm has them" for arm, dropped in more.items()]
    first = tables[order[0], seeds[0]]
    for arm in order:
        for seed in seeds:
            _same_tiles(folder, (arm, seed), tables[arm, seed], (order[0], seeds[0]), first)
    scores = [f"p_{name}" for name in classes]
    return Predictions(
        classes=list(classes),
        arms=order,
        seeds=seeds,
        tile_id=first["tile_id"].to_numpy(str),
        case_id=first["case_id"].to_numpy(str),
        y=first["y"].to_numpy(int),
        called=np.array([[tables[arm, seed][scores].to_numpy().argmax(1) for seed in seeds] for arm in order]),
        gen_seeds={arm: sorted({int(g) for s in seeds for g in tables[arm, s]["gen_seed"].unique()}) for arm in order},
        hashes={f"{arm}/{seed}": hashes[f"{arm}/{seed}"] for arm in order for seed in seeds},
        notes=notes,
    )


def _checked(path, classes):
    """The test rows of one predictions file sorted by tile, and its (arm, seed)."""
    table = files.read_table(path)
    lacking = [name for name in COLUMNS if name not in table]
    scores = [name for name in table if name.startswith("p_")]
    if lacking:
        raise ValueError(f"{path} lacks the column {lacking[0]!r}; predictions hold {', '.join(COLUMNS)} and p_<class>")
    if set(scores) != {f"p_{name}" for name in classes}:
        odd = sorted(set(scores) ^ {f"p_{name}" for name in classes})
        raise ValueError(f"{path}: its classes are not those of the dataset ({', '.join(odd[:4])}); train the classifier on this dataset")
    rows = table[table["split"] == "test"].sort_values("tile_id", ignore_index=True)
    keys = rows[["arm", "seed"]].drop_duplicates()
    if len(keys) != 1:
        raise ValueError(f"{path}: expected the test tiles of one arm and one seed, got {len(rows)} test rows and {len(keys)} of these")
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
            one, other = ("/".join(map(str, k)) for k in (key, first_key))
            raise ValueError(
                f"{folder}: {one} and {other} do not hold the same test tiles ({len(table)} and {len(first)} rows, "
                f"first differing in {column}); arms are compared tile by tile, so run that step again"
            )
