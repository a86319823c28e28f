"""Whether a table below a folder lists its tiles, and which of its columns says what: judged by the cells as well as by the names."""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from histokit.tiles.ingest import levels, table_files

VERSION = 2
FILES = 0.5  # share of a column's cells that must be files below the root for the table to count
KNOWN = {  # column names people use, as `_plain` spells them, for ours; the surer first
    "file_name": (
        "file name", "filename", "file", "image", "path", "image path", "img", "img path", "image name", "tile", "patch", "name", "id",
        "image id", "dateiname", "datei", "bild",
    ),
    "label": (
        "label", "class", "cls", "class name", "category", "consensus", "majority", "diagnosis", "diagnose", "ground truth", "gt", "target",
        "annotation", "klasse", "y", "tumor", "tumour", "grade", "tissue type", "tissue", "type",
    ),
    "split": ("split", "set", "subset", "partition", "dataset split", "fold"),
    "case_id": ("case id", "case", "caseid", "biopsy", "specimen", "biopsy id", "specimen id", "fall", "fallnummer"),
    "patient": ("patient", "patient id", "patientid", "subject", "subject id", "participant", "participant id", "pid", "patientennummer"),
    "slide": ("slide", "slide id", "slideid", "wsi", "wsi id", "slide name"),
    "mask": ("mask", "mask path", "segmentation", "mask file", "mask name"),
    "group": ("group", "centre", "center", "hospital", "scanner", "site", "domain", "institution", "lab", "klinik"),
    "mpp": ("mpp", "microns per pixel", "resolution", "um per px", "um per pixel"),
}  # fmt: skip
WORDS = {  # a word that says so in a longer name, such as "Majority Vote Label"
    "label": ("label", "class", "diagnosis", "diagnose", "consensus", "grade"), "split": ("split", "partition"),
    "patient": ("patient", "subject"), "slide": ("slide", "wsi"), "case_id": ("case", "biopsy", "specimen"),
    "group": ("hospital", "scanner", "centre", "center"),
}  # fmt: skip
IDS = {"id", "ids", "no", "nr", "number", "num", "code", "name", "identifier", "dataset", "data", "set", "the", "of"}  # beside such a word
SURE = ("label", "class", "cls", "class name", "category", "consensus", "majority", "diagnosis", "diagnose", "ground truth", "gt", "klasse")
NUMBERED = ("file name", "filename", "file", "image", "image id", "image name", "img", "tile", "patch", "tile id", "bild")
JOINED = ("split", "case_id", "patient", "slide", "group", "mpp")  # what a table without classes can say of tiles
PLACES = ("x", "y", "row", "col", "column", "left", "top", "level", "width", "height", "index", "idx", "magnification", "mag")
MOST_CLASSES = 200


# --- what a table is -------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """One table below the root and what it is good for."""

    name: str
    rows: int = 0
    columns: dict = field(default_factory=dict)  # ours -> theirs; a list of columns for a label that has one column a class
    files: int = 0  # rows whose file is there
    split: str = ""  # train, val or test where its name says so
    joined: dict = field(default_factory=dict)  # ours -> theirs, where it gives facts and not the classes
    why_not: str = ""  # "" where it lists tiles with their classes
    said: list = field(default_factory=list)  # what the owner should know of it
    data: pd.DataFrame | None = None  # our columns, `file_name` as it is on disk, rows without a file left out
    cells: pd.DataFrame | None = None  # as it was read, of a table that lists no tiles


def judge(root, name, names):
    """`Table`: whether a table below the root lists tiles and their classes, by its cells and not by its name.

    Args:
        name: relative to the root.
        names: `Names` of the pictures.
    """
    told = Table(name)
    try:
        cells = table_files.read(Path(root) / name, root, names)
    except (OSError, ValueError) as error:
        told.why_not = str(error).replace(f"{Path(root) / name}: ", "")
        return told
    told.rows, beside = len(cells), name.rpartition("/")[0]
    if not len(cells):
        told.why_not = "it has no rows"
        return told
    if cells.attrs.get("sheets", 1) > 1:
        told.said.append(f"of its {cells.attrs['sheets']} sheets {cells.attrs['sheet']!r} is read")
    by_column = {column: _files(column, cells[column].tolist(), names, beside) for column in _text_like(cells)}
    counts = {column: sum(hit is not None for hit in hits) for column, hits in by_column.items()}
    best = max(counts, key=lambda column: (counts[column], not _of_masks(by_column[column])), default=None)
    if best is None or not counts[best]:
        column = (_named(cells.columns, "file_name") or [cells.columns[0]])[0]
        told.why_not = f"0 of {len(cells)} names in its column {column!r} are files below the folder, first {str(cells[column].iloc[0])!r}"
        folder = next((c for c in cells if names.folders and cells[c].ne("").all() and set(cells[c]) <= names.folders), None)
        if folder is not None and "label" in roles(cells.drop(columns=folder)):
            told.why_not += (
                f"; its column {folder!r} names folders: the class of a slide or patient is not that of each of its tiles. Where it is, "
                "write a table with one row a tile"
            )
        told.cells = cells
        return told
    told.files = counts[best]
    columns = {"file_name": best, **roles(cells.drop(columns=best), told.said)}
    other = next((c for c, hits in by_column.items() if c != best and counts[c] == len(cells) and _of_masks(hits)), None)
    if other is not None and not _of_masks(by_column[best]):
        columns["mask"] = other
    if told.files < FILES * len(cells):
        lost = next(cell for cell, hit in zip(cells[best], by_column[best], strict=True) if hit is None)
        told.why_not = f"only {told.files} of {len(cells)} names in its column {best!r} are files below the folder, first missing {lost!r}"
    elif "label" not in columns:
        told.why_not = "it has no column that could be the class of a tile"
    told.columns, told.split = columns, levels.split_of(PurePosixPath(name).stem) or levels.split_of(beside.rpartition("/")[2]) or ""
    taken = {ours: pick(cells, theirs) for ours, theirs in columns.items()}
    told.data = pd.DataFrame(taken).assign(file_name=by_column[best])
    told.data = told.data[told.data["file_name"].notna()].reset_index(drop=True)
    twice = told.data[told.data["file_name"].duplicated(keep=False)]
    if len(twice):
        differ = "label" in twice and (twice.groupby("file_name")["label"].nunique() > 1).sum()
        other = f", {differ} of them with different classes" if differ else ""
        told.said.append(f"{twice['file_name'].nunique()} TILES HAVE MORE THAN ONE ROW{other}: 00 will stop; leave one row for each")
    return told


def _files(column, cells, names, beside, some=1000):
    """The picture of each cell; None for all where of `some`, spread over the column, not one names a picture."""
    numbered = _plain(column) in NUMBERED  # there 7 may be 0007.png; elsewhere it is a running number or a patient
    if not any(names.find(cells[:: max(1, len(cells) // some)], beside, numbered)):
        return [None] * len(cells)
    return names.find(cells, beside, numbered)


def _of_masks(names):
    """Whether the pictures a column names lie in folders of masks."""
    folders = {levels.plain(part) for name in names if name for part in name.split("/")[:-1]}
    return any(set(folder.split()) & set(levels.MASKS) for folder in folders)


def pick(cells, theirs):
    """A column of a table; of a list of columns, one a class, the name of the one that says yes, "" where not exactly one does."""
    if isinstance(theirs, str):
        return cells[theirs]
    yes = cells[list(theirs)].apply(_marks).eq(1)
    return yes.idxmax(axis=1).where(yes.sum(axis=1).eq(1), "")


def _text_like(cells, most=20):
    """Columns that could name files: many different cells; the known names first."""
    known = _named(cells.columns, "file_name")
    many = [column for column in cells if cells[column].nunique() > 0.5 * len(cells) or column in known]
    return sorted(many, key=lambda column: known.index(column) if column in known else len(known))[:most]


def _plain(name):
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name))
    return re.sub(r"[_\-\s.]+", " ", spaced).strip().casefold()


def _named(columns, ours):
    """The columns whose names say that they are `ours`, the surest first."""
    plain = {}
    for name in columns:
        plain.setdefault(_plain(name), name)
    whole = [plain[known] for known in KNOWN[ours] if known in plain]
    longer = [name for spelt, name in plain.items() if name not in whole and _says(re.findall(r"\w+", spelt), ours)]
    return whole + longer


def _says(words, ours):
    """Whether the words of a longer column name say that it is `ours`: patient_id is a patient, patient_age is none."""
    known = set(words) & set(WORDS.get(ours, ()))
    return bool(known) and (ours in ("label", "group") or set(words) - known <= IDS)


def is_sure(column):
    """Whether a column's name leaves no doubt that it holds the class: label, and not type, stage or annotation."""
    return (
        isinstance(column, list)
        or _plain(column) in SURE
        or bool({"label", "class", "diagnosis"} & set(re.findall(r"\w+", _plain(column))))
    )


def roles(cells, said=None):
    """{ours: theirs} of the columns beside that of the files, by their names and what is in them; `said` takes what to tell the owner."""
    said = [] if said is None else said
    placed = [name for name in cells if _plain(name) in PLACES]
    coordinates = {"x", "y"} <= {_plain(name) for name in cells}
    open_ = [name for name in cells if not (name in placed and (coordinates or _plain(name) != "y"))]
    found = {}
    for ours in (name for name in KNOWN if name != "file_name"):
        named = [name for name in _named(open_, ours) if name not in found.values()]
        fits = [name for name in named if FITS[ours](cells[name]) or (ours == "label" and _is_label(cells[name], 0.8))]
        if ours == "label":  # a number in a longer name is a size or a score, unless it counts few classes
            fits = [name for name in fits if _plain(name) in KNOWN["label"] or _counts_classes(cells[name])]
        if fits and ours == "label":  # of a number and a name of the same class, the name
            names = [name for name in fits if numbers(cells[name]) is None]
            fits = sorted(fits, key=lambda name: name not in names and any(_same(cells[name], cells[other]) for other in names))
        if fits:
            found[ours] = fits[0]
            others = [name for name in fits[1:] if _plain(name) not in KNOWN[ours] and not _same(cells[name], cells[fits[0]])]
            if ours == "label" and others:
                said.append(f"its columns {', '.join(map(repr, others[:3]))} could be the class as well as {fits[0]!r}")
        elif ours in ("case_id", "patient", "slide") and named and 0 < (empty := int(cells[named[0]].eq("").sum())) < len(cells):
            said.append(
                f"ITS COLUMN {named[0]!r} IS EMPTY IN {empty} OF {len(cells)} ROWS: fill it in, or 00 stops or takes every tile for a "
                "case of its own"
            )
    if "patient" in found and "case_id" in found and _within(cells[found["case_id"]], cells[found["patient"]]):
        found.setdefault("slide", found.pop("case_id"))  # a case is a patient here, and what is called one a biopsy or a slide
    marks = _one_hot(cells.drop(columns=[theirs for ours, theirs in found.items() if ours != "label"] + placed))
    if found.get("label") in (None, *marks) and marks:
        found["label"] = marks
    elif "label" not in found:
        free = [name for name in cells if name not in found.values() and name not in placed and _is_label(cells[name])]
        if len(free) == 1 and (cells.attrs.get("header") is False or (cells.shape[1] == 1 and _counts_classes(cells[free[0]]))):
            found["label"] = free[0]
    return found


def _same(one, other):
    """Whether two columns say the same, be it in other words."""
    return one.groupby(other).nunique().le(1).all() and other.groupby(one).nunique().le(1).all()


def _within(fine, coarse):
    """Whether every value of one column has one of the other, and several share one."""
    return coarse.groupby(fine).nunique().le(1).all() and coarse.nunique() < fine.nunique()


def _marks(column):
    """Its cells as numbers, true and yes as 1, false and no as 0, NaN where they are neither."""
    return pd.to_numeric(column.str.casefold().replace({"true": "1", "false": "0", "yes": "1", "no": "0"}), errors="coerce")


def _one_hot(cells):
    """The columns that together say the class, one of them 1 in every row and the others 0; [] where there are none."""
    values = {name: _marks(cells[name]) for name in cells}
    marks = [name for name, column in values.items() if column.isin([0, 1]).all()]
    total = sum(values[name] for name in marks) if marks else pd.Series(dtype=float)
    used = [name for name in marks if values[name].any()]
    return used if len(used) > 1 and total.eq(1).mean() > 0.9 and total.le(1).all() else []


def numbers(column):
    """Its filled cells as numbers [n], None where one is none."""
    filled = column[column.ne("")]
    values = pd.to_numeric(filled.str.replace(",", ".", regex=False), errors="coerce")
    return None if values.isna().any() or not len(values) else values


def _is_label(column, share=0.5):
    """Few different cells, each of several tiles, and no measurements: at least two, at most a share of the rows."""
    filled = column[column.ne("")]
    distinct = filled.nunique()
    if not 2 <= distinct <= min(MOST_CLASSES, max(2, len(filled) * share)):
        return False
    values = numbers(column)
    if values is None:
        return True
    whole = (values % 1 == 0).all()
    return bool(whole and distinct <= 50 and values.between(-1, 1000).all())


def _counts_classes(column):
    """Whether its cells are words, or numbers from 0 or 1 on without gaps, as classes are numbered."""
    values = numbers(column)
    if values is None:
        return True
    known = sorted(set(values))
    return known[0] in (0, 1) and known[-1] - known[0] == len(known) - 1


def _is_split(column):
    return set(column[column.ne("")].map(levels.split_of)) <= set(levels.SPLITS) and column.ne("").any()


def _is_case(column):
    """A name in every row, and no fractions."""
    filled, values = column[column.ne("")], numbers(column)
    return len(filled) == len(column) and (values is None or (values % 1 == 0).all())


def _is_scale(column):
    values = numbers(column)
    return values is not None and values.between(0.01, 50).all()


def _is_anything(column):
    return column.ne("").any()


FITS = {
    "label": _is_label, "split": _is_split, "case_id": _is_case, "patient": _is_case, "slide": _is_case, "mask": _is_anything,
    "group": lambda column: 1 < column.nunique() <= 50, "mpp": _is_scale,
}  # fmt: skip
