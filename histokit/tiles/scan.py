"""From a folder of tiles to a manifest: one row per tile, nothing copied, no pixel read.

Three layouts: class folders, `train/val/test/CLASS`, and a table. File names come from listings, never from patterns,
so brackets and umlauts are plain letters. Whatever a row says, its file stays inside the root.
"""

import csv
import os
import re
import unicodedata
from pathlib import PurePosixPath

import pandas as pd

from histokit.core import files
from histokit.tiles.decode import SUFFIXES
from histokit.tiles.description import FACTS, SPLITS, TISSUE, nearest

VERSION = 1
COLUMNS = (
    "tile_id", "root", "file_name", "label", "split", "use", "case_id", "patient", "slide", "group", "mpp", "width",
    "height", "sha256", "mask", "source",
)  # fmt: skip
ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"} | {s: s for s in SPLITS}


def scan(described):
    """The manifest of a described dataset, columns `COLUMNS`, sorted by file name.

    `tile_id` is the file name: readable, unique, and the same on every machine. Without case ids a tile is its own
    case. Sizes and hashes stay empty; `audit.read` fills them. Splits stay as the data gives them.

    Raises:
        ValueError: names the file, the row and the remedy; for example a row outside the root, or an empty class.
    """
    tiles = _from_table(described) if described.table else _from_folders(described)
    names = tiles["file_name"]
    if described.exclude:
        unknown = sorted(set(described.exclude) - set(names))
        if unknown:
            raise ValueError(f"{described.path}: `exclude` names {unknown[0]!r}, which is not a tile{nearest(unknown[0], names[:2000])}")
        tiles = tiles[~names.isin(described.exclude)].copy()
    _read_pattern(described, tiles)
    _check_classes(described, tiles)
    _fill(described, tiles)
    return tiles[list(COLUMNS)].sort_values("file_name", ignore_index=True)


def _from_folders(described):
    """Rows of class folders, or of train/val/test above them."""
    root = described.root
    tops = [e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")]
    split_of = {name: ALIASES[name.lower()] for name in tops if name.lower() in ALIASES}
    bases = [(name, split_of[name]) for name in sorted(split_of)] or [("", "")]
    skip = {*described.ignore, described.unlabelled, described.mask.partition("/")[0] if "{" in described.mask else ""}
    rows = []
    for base, split in bases if described.classes != [TISSUE] else []:
        for entry in sorted(os.scandir(root / base), key=lambda e: e.name):
            if entry.is_dir() and entry.name not in skip and not entry.name.startswith("."):
                folder = f"{base}/{entry.name}".lstrip("/")
                rows += [(name, entry.name, split, "labelled") for name in listing(root, folder)]
    if described.unlabelled:
        folder = "" if described.unlabelled == "." else described.unlabelled
        if not (root / folder).is_dir():
            raise ValueError(f"{described.path}: `unlabelled` folder {root / described.unlabelled} does not exist")
        rows += [(name, TISSUE, "", "unlabelled") for name in listing(root, folder)]
    if not rows:
        raise ValueError(
            f"{described.path}: no tiles below {root}; expected CLASS/tile.png or train/CLASS/tile.png "
            f"({', '.join(SUFFIXES)}), or name a `table`"
        )
    tiles = pd.DataFrame(rows, columns=["file_name", "label", "split", "use"], dtype=str)
    return tiles


def listing(root, folder):
    """Relative names of the image files below root/folder, sorted; links that lead elsewhere are refused."""
    found, todo = [], [folder]
    while todo:
        here = todo.pop()
        for entry in os.scandir(root / here):
            name = f"{here}/{entry.name}".lstrip("/")
            if entry.name.startswith("."):
                continue  # .DS_Store, and ._tile.png, which macOS leaves on foreign disks
            if entry.is_symlink():
                _check_link(root, name, "a link")
            if entry.is_dir():
                todo.append(name)
            elif name.lower().endswith(SUFFIXES):
                found.append(name)
    return sorted(found)


def _check_link(root, name, where):
    target = (root / name).resolve()
    if not target.is_relative_to(root):
        raise ValueError(f"{name}: {where} leads outside the root, to {target}; put the files inside {root} or set `root` higher")
    if target.is_dir():
        raise ValueError(f"{name}: {where} to the folder {target}; its tiles would count twice, so remove the link")


def _from_table(described):
    """Rows of a CSV or parquet table; everything is read as text, so case 007 stays 007."""
    path, columns = described.table, described.columns
    table = _read_table(path)
    theirs = {ours: columns.get(ours, ours) for ours in ("file_name", "label", "split", "mask", "mpp", *FACTS)}
    for ours, name in theirs.items():
        if name not in table and (ours in columns or ours in ("file_name", "label")):
            if ours == "label" and described.classes == [TISSUE]:
                continue  # a table of unlabelled tiles
            raise ValueError(f"{path}: has no column {name!r} for {ours}{nearest(name, table.columns)}; set `columns` in {described.path}")
    tiles = pd.DataFrame({ours: table[name].str.strip() for ours, name in theirs.items() if name in table})
    tiles["line"] = range(2, len(tiles) + 2)  # as a spreadsheet counts, under one header line
    if "label" not in tiles:
        tiles["label"] = ""
    tiles = tiles[~tiles["label"].isin(described.ignore)].copy()
    tiles["use"] = tiles["label"].eq("").map({True: "unlabelled", False: "labelled"})
    tiles.loc[tiles["label"].eq(""), "label"] = TISSUE
    _read_split(path, tiles)
    _read_mpp(path, tiles)
    for column in ("file_name", "mask"):
        if column in tiles:
            tiles[column] = _existing(described.root, tiles[column], tiles["line"], path, required=column == "file_name")
    twice = tiles[tiles["file_name"].duplicated(keep=False)]
    if len(twice):
        name = twice["file_name"].iloc[0]
        same = twice[twice["file_name"].eq(name)]
        raise ValueError(
            f"{path} rows {' and '.join(map(str, same['line'][:2]))}: both name {name!r} "
            f"({', '.join(same['label'].unique())}); a tile has one row and one label, so delete one"
        )
    return tiles


def _read_table(path):
    if path.suffix.lower() == ".parquet":
        table = pd.read_parquet(path)
        return table.astype(object).where(table.notna(), "").astype(str)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)  # a German Excel writes semicolons
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", quoting=csv.QUOTE_MINIMAL)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); save it as 'CSV UTF-8'") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path}: is not a table: {error}") from error


def _read_split(path, tiles):
    if "split" not in tiles:
        tiles["split"] = ""
        return
    known = tiles["split"].str.lower().map(ALIASES | {"": ""})
    if known.isna().any():
        row = tiles[known.isna()].iloc[0]
        raise ValueError(f"{path} row {row['line']}: split {row['split']!r} of {row['file_name']!r}{nearest(row['split'], SPLITS)}")
    empty = known.eq("") & tiles["use"].eq("labelled")
    if empty.any() and not known[tiles["use"].eq("labelled")].eq("").all():
        row = tiles[empty].iloc[0]
        raise ValueError(f"{path} row {row['line']}: {row['file_name']!r} has no split while others have; fill in all rows or none")
    tiles["split"] = known


def _read_mpp(path, tiles):
    if "mpp" in tiles:
        numbers = pd.to_numeric(tiles["mpp"].str.replace(",", "."), errors="coerce")
        wrong = tiles["mpp"].ne("") & ~numbers.gt(0)
        if wrong.any():
            row = tiles[wrong].iloc[0]
            raise ValueError(f"{path} row {row['line']}: mpp {row['mpp']!r} of {row['file_name']!r} is not micrometres per pixel")
        tiles["mpp"] = numbers


def _existing(root, names, lines, path, required):
    """The names as they are on disk; refuses rows outside the root and files that do not exist; "" only when not required."""
    disk, slashed = names.tolist(), names.str.replace("\\", "/", regex=False).tolist()  # a table made on Windows
    filled = [i for i, name in enumerate(disk) if name or required]
    try:
        found = files.inside_all(root, [slashed[i] for i in filled])
    except ValueError:
        for i in filled:  # again, one by one, to name the row
            try:
                files.inside(root, slashed[i])
            except ValueError as error:
                raise ValueError(f"{path} row {lines.iloc[i]}: {error}. Write it relative to {root}, where all tiles must lie") from None
        raise
    folders = {}
    for i, full in zip(filled, map(str, found), strict=True):
        folder, _, leaf = full.rpartition("/")
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        disk[i] = slashed[i]
        if leaf in folders[folder]:
            continue
        twin = next((n for n in folders[folder] if unicodedata.normalize("NFC", n) == unicodedata.normalize("NFC", leaf)), None)
        if twin is None:
            raise ValueError(f"{path} row {lines.iloc[i]}: {names.iloc[i]!r} does not exist below {root}; correct the row or delete it")
        disk[i] = slashed[i][: len(slashed[i]) - len(leaf)] + twin  # a Mac spells an umlaut with two characters
    return pd.Series(disk, index=names.index, dtype="str")


def _read_pattern(described, tiles):
    """Case, patient, slide, group from the file name, by the description's regular expression."""
    if not described.case_pattern:
        return
    search = re.compile(described.case_pattern).search
    matches = [search(name) for name in tiles["file_name"]]
    for i, match in enumerate(matches):
        if match is None:
            raise ValueError(
                f"{described.path}: `case_pattern` {described.case_pattern!r} does not match {tiles['file_name'].iloc[i]!r}; widen it, or "
                "`exclude` the tile"
            )
    for fact in re.compile(described.case_pattern).groupindex:
        tiles[fact] = [match[fact] or "" for match in matches]


def _check_classes(described, tiles):
    """Every label is a described class and every class has tiles."""
    labels = tiles.loc[tiles["use"].eq("labelled") | (described.classes == [TISSUE]), "label"]
    counts = labels.value_counts()
    for name in counts.index:
        if name not in described.classes:
            first = tiles.loc[labels.index[labels.eq(name)][0], "file_name"]
            raise ValueError(
                f"{described.path}: {first!r} has label {name!r}, which is not in `classes`{nearest(name, described.classes)}. Add it at "
                "the end of `classes`, or to `ignore`"
            )
    for name in described.classes:
        if name not in counts.index:
            raise ValueError(
                f"{described.path}: class {name!r} has no tile in {described.table or described.root}; take it out of `classes` or add "
                f"tiles{nearest(name, counts.index)}"
            )


def _fill(described, tiles):
    """The remaining columns, with their defaults."""
    if "patient" in tiles and "case_id" not in tiles:
        tiles["case_id"] = tiles["patient"]
    if "slide" in tiles and "case_id" not in tiles:
        tiles["case_id"] = tiles["slide"]
    if "case_id" not in tiles:
        tiles["case_id"] = tiles["file_name"]  # tile = case
    if tiles["case_id"].eq("").any():
        name = tiles.loc[tiles["case_id"].eq(""), "file_name"].iloc[0]
        raise ValueError(f"{described.table or described.path}: {name!r} has no case id while others have; fill in all rows or none")
    for column in ("patient", "slide", "group", "mask"):
        if column not in tiles:
            tiles[column] = ""
    if described.mask:
        tiles["mask"] = _masks(described, tiles)
    default = float("nan") if described.mpp is None else described.mpp
    tiles["mpp"] = tiles["mpp"].astype(float).fillna(default) if "mpp" in tiles else default
    tiles["tile_id"] = tiles["file_name"]
    tiles["root"], tiles["source"], tiles["sha256"] = "data", "real", ""
    tiles["width"] = tiles["height"] = 0


def _masks(described, tiles):
    """Mask names from the template; a tile whose mask is missing is named."""
    names = []
    for name, label, split in zip(tiles["file_name"], tiles["label"], tiles["split"], strict=True):
        path = PurePosixPath(name)
        parts = {"stem": path.stem, "name": path.name, "path": str(path.with_suffix("")), "label": label, "split": split}
        mask = re.sub(r"\{(\w+)\}", lambda hit: parts.get(hit[1], hit[0]), described.mask)  # noqa: B023
        if "{" in mask and "{" not in name:
            known = ", ".join(f"{{{part}}}" for part in parts)
            raise ValueError(f"{described.path}: `mask` {described.mask!r} may use {known}")
        names.append(mask)
    for name, mask, full in zip(tiles["file_name"], names, files.inside_all(described.root, names), strict=True):
        if not os.path.isfile(full):
            raise ValueError(f"{described.path}: tile {name!r} has no mask {mask!r}; correct `mask`, or `exclude` the tile")
    return names
