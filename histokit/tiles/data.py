"""Tiles of a dataset: their description, their manifest, their pixels.

`description`, `scan` and `freeze` are for 00_dataset; every later notebook reads what 00 froze with `dataset` and `load`.
Label ids come from `Dataset.label_id` and nowhere else. No model is loaded here.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.tiles import decode, splits
from histokit.tiles.decode import to_float, to_uint8
from histokit.tiles.description import TISSUE, Description, describe, nearest
from histokit.tiles.scan import scan

__all__ = [
    "Dataset", "Description", "dataset", "describe", "freeze", "load", "pixels", "read_frozen", "scan", "shown", "to_float",
    "to_uint8", "training", "um_per_px", "used", "without_memory",
]  # fmt: skip
VERSION = 2
PLACE = ".root.json"  # where the real tiles lie, beside dataset.json
MEMORY = ("path", "folder", "tile_px", "fit", "profile")  # columns that `load` adds and no file holds


@dataclass(frozen=True)
class Dataset:
    """What 00_dataset froze into dataset.json. The position of a class in `classes` is its label id."""

    name: str
    classes: list
    terms: dict  # class -> words for a prompt
    roles: dict  # class -> head | tail
    tile_px: int
    fit: str
    mpp: float | None
    root: str  # of the real tiles; relative to the working root, or absolute
    has_cases: bool  # False: a tile is its own case, and every interval has to say so
    counts: dict  # class -> split -> {tiles, cases}, labelled tiles only
    cannot_be_evaluated: dict = field(default_factory=dict)  # class -> why
    procedural: str = ""
    licence: str = ""
    follow_links: bool = False  # whether links among the real tiles may lead out of the root
    colour_profile: str = "convert"  # or ignore: how embedded colour profiles are read
    copies: dict = field(default_factory=dict)  # of `audit.settle`: left_out, test, labels
    layers: dict = field(default_factory=dict)  # tissue in a mask -> its values, the background first, see `masks.Layers`

    @property
    def head(self):
        return [name for name in self.classes if self.roles[name] == "head"]

    @property
    def tail(self):
        return [name for name in self.classes if self.roles[name] == "tail"]

    def asked(self, class_name):
        """The classes that a run of `class_name` is about: that one, or every rare class for "all"."""
        return self.tail if class_name == "all" else [class_name]

    def label_id(self, name):
        """Label id of one class name; ValueError names the nearest class."""
        if name not in self.roles:
            raise ValueError(f"{self.name} has no class {name!r}{nearest(name, self.classes)}")
        return self.classes.index(name)


def freeze(run, manifest, described, copies=None):
    """Write dataset.json into the run folder and return the manifest for `run.finish`, with the columns of `load`.

    From here on the order of classes, their roles and terms are fixed for the experiment.

    Args:
        run: the run of 00_dataset.
        manifest: split (and budgeted) manifest, its sizes filled by `audit.read`.
        described: Description.
        copies: what `audit.settle` found.

    Raises:
        ValueError: a class without training tiles, or tiles of several sizes without `fit`.
    """
    manifest = without_memory(manifest)
    check_sizes(manifest, described)
    labelled = manifest[manifest["use"].ne("withheld") & manifest["label"].isin(described.classes)]
    for name in described.classes:
        rows = labelled[labelled["label"].eq(name)]
        if not rows["split"].eq("train").any():
            where = ", ".join(f"{n} in {s}" for s, n in rows["split"].value_counts().items()) or "none at all"
            raise ValueError(f"{described.path}: class {name!r} has no training tile ({where}); move a case of it to train or drop it")
    table = splits.counts(manifest, described.classes)
    table = table[table["use"].ne("withheld")]
    counts = {name: {} for name in described.classes}
    for row in table.itertuples():
        counts[row.label][row.split] = {"tiles": row.tiles, "cases": row.cases}
    root, work = described.root, files.root().resolve()
    frozen = Dataset(
        name=described.name,
        classes=list(described.classes),
        terms=described.terms,
        roles=splits.roles(manifest, described.classes, described.roles, described.tail_below),
        tile_px=described.tile_px,
        fit=described.fit or "resize",
        mpp=described.mpp,
        root=root.relative_to(work).as_posix() if root.is_relative_to(work) else str(root),
        has_cases=bool(manifest["case_id"].ne(manifest["tile_id"]).any()),
        counts=counts,
        cannot_be_evaluated=splits.not_evaluable(manifest, described.classes),
        procedural=described.procedural,
        licence=described.licence,
        follow_links=described.follow_links,
        colour_profile=described.colour_profile,
        layers=described.layers,
        copies=dict(copies or {}),
    )
    held = {f.name: getattr(frozen, f.name) for f in fields(Dataset)}
    files.write_json(run.path(PLACE), {"root": held.pop("root")})  # moved tiles are the same tiles, so it is no part of the result
    files.write_json(run.path("dataset.json"), held)
    return located(manifest, frozen, files.root() / "outputs" / run.experiment)


def check_sizes(manifest, described):
    """Raise ValueError where tiles differ in size, or are not square, and the description does not say what to do."""
    sizes = manifest.loc[manifest["width"].gt(0), ["width", "height", "file_name"]].drop_duplicates(["width", "height"])
    shown = [f"{r.file_name!r} is {r.width} x {r.height} px" for r in sizes.head(2).itertuples()]
    if described.fit or not shown:
        return
    if len(sizes) > 1:
        problem = f"tiles have {len(sizes)} sizes ({' but '.join(shown)})"
    elif (sizes["width"] != sizes["height"]).any():
        problem = f"tiles are not square ({shown[0]})"
    else:
        return
    raise ValueError(
        f"{described.path}: {problem}, so `fit` must say how they become {described.tile_px} px: `crop` keeps the scale and the centre, "
        "`resize` scales the shorter side, `resample_to_mpp` brings all to one `target_mpp`"
    )


def dataset(run, step="00_dataset"):
    """The Dataset that 00_dataset froze for this experiment."""
    return read_frozen(Path(run.parent(step)) / "dataset.json")


def read_frozen(path):
    """The Dataset in a dataset.json."""
    held = files.read_json(path)
    if "root" not in held:
        place = Path(path).with_name(PLACE)
        if not place.is_file():
            raise ValueError(f"{place} is missing, which says where the tiles lie; run that 00_dataset again, or copy hidden files as well")
        held["root"] = files.read_json(place)["root"]
    known = {f.name for f in fields(Dataset)}
    try:
        return Dataset(**{name: value for name, value in held.items() if name in known})
    except TypeError as error:
        raise ValueError(f"{path}: written by another version of histokit ({error}); run that 00_dataset again") from error


def load(run, step="00_dataset", class_name=None, dataset_step="00_dataset"):
    """The manifest of a finished step.

    Args:
        run: the current Run; the step becomes one of its parents.
        step: id of the step to read.
        class_name: folder of one class; None for the step's only manifest, or that of all its classes, concatenated.
        dataset_step: id of the 00_dataset step, which knows where real tiles lie.

    Returns:
        DataFrame with five columns more than the file: `path` (absolute, inside its root), `folder` (that root), `tile_px`, `fit` and
        `profile`, which `pixels` uses. They are for memory only; `without_memory` takes them off.
    """
    if class_name:
        folders = [run.parent(step, class_name)]
    else:
        folders = list(run.parents(step).values())
    tables = pd.concat([files.read_table(_manifest(Path(folder))) for folder in folders], ignore_index=True)
    if class_name and step != dataset_step:  # a step that made all classes in one folder
        tables = tables[tables["label"].eq(class_name)].reset_index(drop=True) if class_name != "all" else tables
    return located(tables, dataset(run, dataset_step), files.root() / "outputs" / run.experiment)


def _manifest(folder):
    found = [folder / name for name in ("manifest.csv", "manifest.parquet") if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no manifest.csv; is it a step that writes tiles?")
    return found[0]


def located(manifest, held, experiment):
    """The manifest with the columns of `MEMORY`; `held` is the Dataset, `experiment` the folder of its steps.

    Raises:
        ValueError: a row whose file leaves its root; names the row.
    """
    path, folder = (pd.Series("", index=manifest.index, dtype=object) for _ in range(2))
    for name, rows in manifest.groupby("root", sort=False):
        root = files.root() / held.root if name == "data" else files.inside(experiment, name)
        folder[rows.index] = str(root)
        try:
            path[rows.index] = [str(p) for p in files.inside_all(root, rows["file_name"].tolist(), name == "data" and held.follow_links)]
        except ValueError as error:
            raise ValueError(f"manifest of {experiment.name}, root {name!r}: {error}") from error
    memory = {"path": path.astype("str"), "folder": folder.astype("str"), "tile_px": held.tile_px, "fit": held.fit}
    return manifest.assign(**memory, profile=held.colour_profile == "convert")


def without_memory(manifest):
    """The manifest as files hold it: without the columns that `load` added."""
    return manifest.drop(columns=[c for c in MEMORY if c in manifest])


def training(tiles, class_name=None):
    """Rows to learn from: real, labelled, in train; of one class, or of all. Where nothing has a label, `tissue` is the class of all."""
    use = "labelled" if tiles["use"].eq("labelled").any() or tiles["label"].ne(TISSUE).any() else "unlabelled"
    rows = tiles[tiles["split"].eq("train") & tiles["use"].eq(use) & tiles["source"].eq("real")]
    return rows if class_name is None else rows[rows["label"].eq(class_name)]


def learnable(tiles):
    """Rows that a generator can have learned from, and so have copied: real training tiles, with a label or without."""
    return tiles[tiles["split"].eq("train") & tiles["use"].ne("withheld") & tiles["source"].eq("real")]


def used(made, status="kept", per_class=0):
    """The synthetic rows that an arm trains on: those of this status ("all" for any), and of each class at most `per_class` (0: all).

    The ones to keep are chosen by hash, so that a larger dose holds every smaller one.
    """
    made = made if status == "all" else made[made["status"].eq(status)]
    if per_class:
        order = made["tile_id"].map(files.digest).sort_values(kind="stable").index
        made = made.loc[order].groupby("label", sort=False).head(per_class).sort_index()
    return made.reset_index(drop=True)


def pixels(tiles, tile_px=None, fit=None):
    """uint8 RGB [N, tile_px, tile_px, 3] of the rows of a manifest; a single row (Series) gives N = 1.

    The only resize of histokit, see `decode.fitted`. Real and synthetic tiles both come this way.

    Args:
        tiles: DataFrame or row with `path`, as `load` returns.
        tile_px: side of the result; by default the dataset's.
        fit: how much of the file is shown, as `Dataset.fit` says it; by default the dataset's.

    Raises:
        decode.BadImage: names the file that cannot be used, why, and what to do.
    """
    if isinstance(tiles, pd.Series):
        tiles = tiles.to_frame().T
    if "path" not in tiles:
        raise ValueError(f"pixels needs the column `path`, which data.load adds; got {list(tiles.columns)}")
    sides = [tile_px] * len(tiles) if tile_px else [int(px) for px in tiles["tile_px"]]
    if len(set(sides)) > 1:
        raise ValueError(f"tiles of several datasets ({sorted(set(sides))} px) in one array; pass tile_px")
    fits = [fit] * len(tiles) if fit else tiles["fit"].tolist() if "fit" in tiles else ["resize"] * len(tiles)
    scales = tiles["mpp"].tolist() if "mpp" in tiles else [None] * len(tiles)
    # a synthetic tile is one whole field already
    fits = ["resize" if made else f for f, made in zip(fits, _synthetic(tiles), strict=True)]
    profiles = tiles["profile"].tolist() if "profile" in tiles else [True] * len(tiles)
    side = sides[0] if sides else tile_px or 0
    result = np.empty((len(tiles), side, side, 3), np.uint8)

    def read(i, path):
        image, _ = decode.rgb(path, profile=profiles[i])
        result[i] = decode.fitted(image, side, fits[i], scales[i], path)

    jobs = list(enumerate(tiles["path"]))
    if len(jobs) < 32:
        for job in jobs:
            read(*job)
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: read(*job), jobs))
    return result


def shown(row):
    """What of a file the pixels of a manifest row show, as part of a key: `fit`, and the scale where the fit asks for it."""
    if getattr(row, "source", "") == "synthetic":
        return ["resize", ""]
    fit = str(getattr(row, "fit", "") or "resize")
    ignored = [] if getattr(row, "profile", True) else ["profile ignored"]
    return [fit, str(getattr(row, "mpp", "")) if fit.startswith("resample") else "", *ignored]


def _synthetic(tiles):
    return tiles["source"].eq("synthetic").tolist() if "source" in tiles else [False] * len(tiles)


def um_per_px(row, tile_px=None):
    """Micrometres per pixel of one manifest row on `tile_px` pixels (its file when None); NaN where `mpp` is unknown."""
    if tile_px is None:
        return float(row["mpp"])
    side = decode.field(row["width"], row["height"], row["fit"], row["tile_px"], row["mpp"], row["file_name"])
    return float(row["mpp"]) * side / tile_px
