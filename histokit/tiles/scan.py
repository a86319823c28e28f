"""From a folder of tiles to a manifest: one row per tile, nothing copied, no pixel read.

Class folders, `train/val/test/CLASS`, other levels that the description names, and tables. File names come from listings, never from
patterns, so brackets and umlauts are plain letters. Whatever a row says, its file stays inside the root.
"""

import fnmatch
import os
import posixpath
import re
from pathlib import PurePosixPath

import pandas as pd

from histokit.core import files
from histokit.tiles.decode import SUFFIXES
from histokit.tiles.description import AT, FACTS, TISSUE, found_name, nearest, own_name
from histokit.tiles.ingest import joined_facts, label_tables, levels, table_files, tile_names, walk

VERSION = 2
COLUMNS = (
    "tile_id", "root", "file_name", "label", "split", "use", "case_id", "patient", "slide", "group", "mpp", "width",
    "height", "sha256", "mask", "source",
)  # fmt: skip


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
    for one in described.facts:
        joined_facts.join(described, tiles, **one)
    _check_classes(described, tiles)
    _fill(described, tiles)
    _read_place(described, tiles)
    placed = [name for name in AT if name in tiles]
    return tiles[[*COLUMNS, *placed]].sort_values("file_name", ignore_index=True)


def _from_folders(described):
    """Rows of class folders, of train/val/test above them, or of the levels that the description names."""
    root, found = described.root, walk.look(described.root, follow=described.follow_links)
    _check_links(root, found.links)
    kinds, rows = described.levels or _usual(described), []
    if described.label_pattern:
        rows = _by_name(described, found.pictures)
    elif described.classes != [TISSUE]:
        rows = [row for name in found.pictures if (row := _row(described, name, kinds)) is not None]
    if described.unlabelled:
        folder = "" if described.unlabelled == "." else described.unlabelled
        if not (root / folder).is_dir():
            raise ValueError(f"{described.path}: `unlabelled` folder {root / described.unlabelled} does not exist")
        below = f"{folder}/" if folder else ""
        loose = [name for name in found.pictures if name.startswith(below) and not _left_out(described, name)]
        rows += [{"file_name": name, "label": TISSUE, "use": "unlabelled"} for name in loose]
    if not rows:
        raise ValueError(
            f"{described.path}: no tiles below {root}; expected CLASS/tile.png or train/CLASS/tile.png ({', '.join(SUFFIXES)}), `levels` "
            "for other folders, or a `table`"
        )
    tiles = pd.DataFrame(rows, dtype=str).fillna("")
    return _without_masks(described, tiles if "split" in tiles else tiles.assign(split=""))


def _by_name(described, pictures):
    """Rows of tiles whose file names say the class; their folders may still say a split."""
    search, rows = re.compile(described.label_pattern).search, []
    for name in pictures:
        if _left_out(described, name) or name.startswith(f"{described.unlabelled or chr(0)}/"):
            continue
        match = search(name)
        if match is None:
            raise ValueError(
                f"{described.path}: `label_pattern` {described.label_pattern!r} does not match {name!r}; widen it, or `ignore` such files"
            )
        rows.append({"file_name": name, "label": _class(described, match["label"]), "use": "labelled"})
    splits = levels.splits_of([row["file_name"] for row in rows])
    return [row | {"split": splits.get(row["file_name"], "")} for row in rows]


def _row(described, name, kinds):
    """What the folders of a picture say of it, None where it is no labelled tile."""
    if _left_out(described, name) or name.startswith(f"{described.unlabelled or chr(0)}/"):
        return None
    told = levels.read(name, kinds)
    if told is None or not told.get("class"):
        return None
    return {"file_name": name, "label": _class(described, told.pop("class")), "use": "labelled", **told}


def _class(described, label):
    """What a label or folder is called here."""
    return own_name(described.spelt.get(label, label))


def _usual(described):
    """The levels where a description names none: a class, below a split where there are folders of splits."""
    tops = [e.name for e in os.scandir(described.root) if e.is_dir(follow_symlinks=described.follow_links)]
    below = (described.root / name for name in tops if levels.split_of(name))  # a class may be called test
    return ["split", "class"] if any(entry.is_dir() for folder in below for entry in os.scandir(folder)) else ["class"]


def _left_out(described, name):
    """Whether `ignore` names a folder of a picture, or has a pattern (one with a `*`) that its file name fits."""
    *folders, leaf = name.split("/")
    return any(part in folders or ("*" in part and fnmatch.fnmatchcase(leaf, part)) for part in described.ignore)


def _without_masks(described, tiles):
    """The rows that are no mask of another row."""
    if "{" not in described.mask:
        return tiles
    masks = set(_mask_names(described, tiles))
    return tiles[~tiles["file_name"].isin(masks)].reset_index(drop=True)


def _check_links(root, links):
    for name, target in links.items():
        if not os.path.exists(target):
            raise ValueError(f"{name}: a link leads nowhere, to {target}; remove it, or bring back what it leads to")
        inside = (target + os.sep).startswith(os.path.realpath(root) + os.sep)
        if inside and os.path.isdir(target):
            raise ValueError(f"{name}: a link to the folder {target}; its tiles would count twice, so remove the link")
        if not inside:
            raise ValueError(
                f"{name}: a link leads outside the root, to {target}; put the files inside {root}, set `root` higher, or write "
                "`follow_links: true` into the description"
            )


def _from_table(described):
    """Rows of one table, or of one for each split; everything is read as text, so case 007 stays 007."""
    tables = described.table if isinstance(described.table, (dict, list)) else [described.table]
    tables = tables if isinstance(tables, dict) else {"": tables}
    tables = [(split, path) for split, held in tables.items() for path in (held if isinstance(held, list) else [held])]
    found = walk.look(described.root, follow=described.follow_links)
    tiles = [name for name in found.pictures if not _left_out(described, name)]
    names = [
        tile_names.Names(described.root, some) for some in (tiles, found.pictures + found.polygons)
    ]  # of what may be a tile, and of masks as well
    parts = [_one_table(described, path, split, *names) for split, path in tables]
    tiles = pd.concat(parts, ignore_index=True)
    texts = [name for name in tiles if name not in ("mpp", "line")]
    tiles[texts] = tiles[texts].fillna("").astype(str)  # of a column that one of the tables lacks
    twice = tiles[tiles["file_name"].duplicated(keep=False)]
    if len(twice):
        name = twice["file_name"].iloc[0]
        same = twice[twice["file_name"].eq(name)]
        raise ValueError(
            f"{same['table'].iloc[0]} rows {' and '.join(map(str, same['line'][:2]))}: both name {name!r} "
            f"({', '.join(same['label'].unique())}); a tile has one row and one label, so delete one"
        )
    if tiles["split"].eq("").all() and (of := levels.splits_of(tiles["file_name"])):  # tables of classes, folders of splits
        tiles["split"] = tiles["file_name"].map(of)
    return tiles.drop(columns=["table", "line"])


def _one_table(described, path, split, names, with_masks):
    columns, table = described.columns, table_files.read(path, described.root, names)
    theirs = {ours: columns.get(ours, ours) for ours in ("file_name", "label", "split", "mask", "mpp", *FACTS)}
    theirs |= {ours: columns[ours] for ours in AT if ours in columns}  # a table may mean anything else by x
    for ours, name in theirs.items():
        if not _has(table, name) and (ours in columns or ours in ("file_name", "label")):
            if ours == "label" and described.classes == [TISSUE]:
                continue  # a table of unlabelled tiles
            lost = name if isinstance(name, str) else next((one for one in name if one not in table), name[0])
            raise ValueError(f"{path}: has no column {lost!r} for {ours}{nearest(lost, table.columns)}; set `columns` in {described.path}")
    tiles = pd.DataFrame({ours: label_tables.pick(table, name) for ours, name in theirs.items() if _has(table, name)}).assign(
        table=str(path)
    )
    tiles["line"] = table.attrs["lines"]  # as a spreadsheet counts
    if "label" not in tiles:
        tiles["label"] = ""
    tiles = tiles[~tiles["label"].isin(described.ignore)].copy()
    tiles["use"] = tiles["label"].eq("").map({True: "unlabelled", False: "labelled"})
    tiles["label"] = tiles["label"].map(lambda label: _class(described, label)).where(tiles["label"].ne(""), TISSUE)
    if split:
        tiles["split"] = split
    joined_facts.read_split(path, tiles)
    joined_facts.read_mpp(path, tiles)
    for column, there in (("file_name", names), ("mask", with_masks)):
        if column in tiles:
            tiles[column] = _existing(described.root, there, tiles[column], tiles["line"], path, required=column == "file_name")
    return tiles


def _has(table, name):
    """Whether a table has the column, or every column of a list."""
    return set([name] if isinstance(name, str) else name) <= set(table.columns)


def _existing(root, names, cells, lines, path, required):
    """The names as they are on disk; refuses rows outside the root and files that do not exist; "" only when not required."""
    found = names.find(cells, table_files.beside(path, root), numbered=True)
    lost = [i for i, name in enumerate(found) if name is None and (required or cells.iloc[i])]
    if lost:
        where = f"{path} row {lines.iloc[lost[0]]}: {cells.iloc[lost[0]]!r}"
        leads = _leads_out(root, cells.iloc[lost[0]])
        if leads:
            raise ValueError(f"{where} leads outside the root. Write it relative to {root}, where all tiles must lie")
        raise ValueError(
            f"{where} does not exist below {root} ({len(lost)} of {len(cells)} rows are so); correct the row or delete it, or set `root`"
        )
    return pd.Series([name or "" for name in found], index=cells.index, dtype="str")


def _leads_out(root, cell):
    try:
        files.inside(root, cell.replace("\\", "/"))
    except ValueError:
        return True
    return False


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


def _read_place(described, tiles):
    """Where tiles lie on their slides, as numbers; a cell that is none is named, and one corner without the other."""
    found = [name for name in AT if name in tiles]
    if len(found) == 1:
        raise ValueError(f"{described.path}: {found[0]!r} is read and the other of x and y is not; a place on a slide needs both")
    for name in found:
        numbers = pd.to_numeric(tiles[name].replace("", None), errors="coerce")
        wrong = tiles[name].fillna("").ne("") & numbers.isna()
        if wrong.any():
            row = tiles[wrong].iloc[0]
            raise ValueError(f"{described.path}: {name} of {row['file_name']!r} is {row[name]!r}, no number of pixels")
        tiles[name] = numbers


def _shown(described):
    """Where the rows come from, for messages: a table, several, or the folder."""
    held = described.table
    held = list(held.values()) if isinstance(held, dict) else held
    flat = [
        path for one in (held if isinstance(held, list) else [held] if held else []) for path in (one if isinstance(one, list) else [one])
    ]
    return ", ".join(map(str, flat)) or described.root


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
                f"{described.path}: class {name!r} has no tile in {_shown(described)}; take it out of `classes` or add "
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
    loose = tiles["case_id"].eq("") & tiles["use"].eq("unlabelled")
    tiles.loc[loose, "case_id"] = tiles.loc[loose, "file_name"]
    if tiles["case_id"].eq("").any():
        name = tiles.loc[tiles["case_id"].eq(""), "file_name"].iloc[0]
        raise ValueError(f"{_shown(described)}: {name!r} has no case id while others have; fill in all rows or none")
    for column in ("patient", "slide", "group", "mask"):
        if column not in tiles:
            tiles[column] = ""
    if described.mask:
        owed = tiles["use"].ne("unlabelled") | tiles["use"].eq("unlabelled").all()
        tiles["mask"] = _masks(described, tiles[owed]).reindex(tiles.index).fillna("")
    default = float("nan") if described.mpp is None else described.mpp
    tiles["mpp"] = tiles["mpp"].astype(float).fillna(default) if "mpp" in tiles else default
    tiles["tile_id"] = tiles["file_name"]
    tiles["root"], tiles["source"], tiles["sha256"] = "data", "real", ""
    tiles["width"] = tiles["height"] = 0


def _masks(described, tiles):
    """Mask names from the template; a tile whose mask is missing is named."""
    names = _mask_names(described, tiles)
    paths = files.inside_all(described.root, names, described.follow_links)
    for name, mask, full in zip(tiles["file_name"], names, paths, strict=True):
        if not os.path.isfile(full) and not described.partly_annotated:
            raise ValueError(
                f"{described.path}: tile {name!r} has no mask {mask!r}; correct `mask`, `exclude` the tile, or say `partly_annotated: true`"
            )
    found = [name if os.path.isfile(full) else "" for name, full in zip(names, paths, strict=True)]
    if not any(found) and len(found):
        raise ValueError(f"{described.path}: none of {len(found)} tiles has a mask, the first is not at {names[0]!r}; correct `mask`")
    return pd.Series(found, index=tiles.index, dtype="str")


def _mask_names(described, tiles):
    names = []
    for name, label, split in zip(tiles["file_name"], tiles["label"], tiles["split"], strict=True):
        path = PurePosixPath(name)
        parts = {"stem": path.stem, "name": path.name, "path": str(path.with_suffix("")), "folder": str(path.parent)}
        parts |= {"label": found_name(label), "split": split} | {str(k): folder for k, folder in enumerate(path.parts[:-1])}
        mask = re.sub(r"\{(\w+)\}", lambda hit: parts.get(hit[1], hit[0]), described.mask)  # noqa: B023
        if "{" in mask and "{" not in name:
            known = ", ".join(f"{{{part}}}" for part in parts)
            raise ValueError(f"{described.path}: `mask` {described.mask!r} may use {known}")
        names.append(posixpath.normpath(mask))
    return names
