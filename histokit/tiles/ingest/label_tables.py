"""Tables as users have them: any encoding, separator or program, all cells as text; and whether one lists the tiles of a folder.

One reader for `histokit init` and for 00, so that what is drafted is what is read. Cells stay as they are spelt: 007 and 1.10 are names.
"""

import os
import re
import unicodedata
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from histokit.tiles.decode import SUFFIXES
from histokit.tiles.ingest import levels

VERSION = 1
FILES = 0.5  # share of a column's cells that must be files below the root for the table to count
KNOWN = {  # column names people use, as `_plain` spells them, for ours
    "file_name": (
        "file name", "filename", "file", "image", "path", "image path", "img", "img path", "tile", "patch", "name", "id", "image id",
    ),
    "label": (
        "label", "class", "cls", "class name", "category", "tissue", "tissue type", "diagnosis", "y", "target", "annotation", "type",
        "ground truth", "gt", "klasse",
    ),
    "split": ("split", "set", "subset", "partition", "dataset split", "fold"),
    "case_id": ("case id", "case", "caseid", "biopsy", "specimen", "biopsy id", "specimen id"),
    "patient": ("patient", "patient id", "patientid", "subject", "subject id", "participant", "participant id", "pid"),
    "slide": ("slide", "slide id", "slideid", "wsi", "wsi id", "slide name"),
    "mask": ("mask", "mask path", "segmentation", "mask file", "mask name"),
    "group": ("group", "centre", "center", "hospital", "scanner", "site", "domain", "institution", "lab"),
    "mpp": ("mpp", "microns per pixel", "resolution", "um per px", "um per pixel"),
}  # fmt: skip
PLACES = ("x", "y", "row", "col", "column", "left", "top", "level", "width", "height", "index", "idx", "magnification", "mag")
MOST_CLASSES = 200


class TableError(ValueError):
    """A table that cannot be read; the text says why and what to do."""


def read(path, root=None, names=None):
    """A table as text: DataFrame of str, "" where a cell is empty, cells without the blanks around them.

    Text files in UTF-8, UTF-16 or, where they are neither, Windows-1252; comma, semicolon, tab or bar between cells; workbooks (their first
    sheet) and parquet. Where the first line holds one of the `names` (`Names` of the pictures below `root`) it is no header, and the
    columns are called 1, 2, ...

    Raises TableError.
    """
    path = Path(path)
    try:
        table = _raw(path)
    except (OSError, TableError):
        raise
    except Exception as error:  # pandas, pyarrow, openpyxl and zipfile have their own for a broken file
        raise TableError(f"{path}: is not a table that can be read ({type(error).__name__}: {error}); save it as CSV") from error
    if not table.shape[1]:
        raise TableError(f"{path}: is not a table: it has no column")
    beside = path.parent.relative_to(root).as_posix() if root is not None and path.parent.is_relative_to(root) else ""
    if names is not None and any(_is_file(str(cell), names, beside) for cell in table.columns):
        table = _raw(path, header=None)
        table.columns = [str(i + 1) for i in range(table.shape[1])]
        table.attrs["header"] = False
    table.columns = [str(name).strip() for name in table.columns]
    return table.apply(lambda column: column.str.strip())


def _is_file(cell, names, beside):
    named = cell.lower().endswith(SUFFIXES) or any(c.isdigit() for c in cell)  # a picture may be called as a column is
    return named and names.find([cell], "" if beside == "." else beside)[0] is not None


def _raw(path, header=0):
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = pd.read_parquet(path)
        return _as_text(table.reset_index() if table.index.name else table)
    if suffix in (".xlsx", ".xls"):
        if suffix == ".xls":
            raise TableError(f"{path}: workbooks of Excel before 2007 are not read; save it as .xlsx or CSV")
        return _as_text(pd.read_excel(path, header=header, dtype=object, engine="openpyxl", keep_default_na=False, na_values=[""]))
    data = path.read_bytes()
    if b"\0" in data[:1000] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TableError(f"{path}: is not text; save it as CSV")
    coding = encoding(data)
    first = data.decode(coding).lstrip().split("\n", 1)[0]
    if not first.strip():
        raise TableError(f"{path}: is not a table: it is empty")
    separator = max(",;\t|", key=first.count)
    how = {"sep": separator, "header": header, "dtype": str, "keep_default_na": False, "encoding": coding, "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more cells than the header would be cut
            table = pd.read_csv(path, on_bad_lines="error", **how)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as error:
        raise TableError(f"{path}: is not a table: {error}; a cell that holds the separator {separator!r} needs quotes") from error
    return table if header == 0 else table.astype(str)


def encoding(data):
    """The coding of a text file's bytes: by its mark, else UTF-8 where it is valid, else Windows-1252, as older spreadsheets save."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _as_text(table):
    """Cells as a person wrote them: 3 for 3.0 where a column holds whole numbers, dates by their day."""

    def cell(value):
        if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
            return ""
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return str(value.date()) if hasattr(value, "date") and str(value).endswith("00:00:00") else str(value)

    return pd.DataFrame({str(name): [cell(v) for v in table[name].tolist()] for name in table.columns}, dtype=str)


# --- names to files --------------------------------------------------------------------------------------------------


class Names:
    """The pictures below a root by every way a table may spell one: relative, absolute, by its name or its stem alone."""

    def __init__(self, root, pictures):
        self.root = os.path.realpath(root)
        self.exact = {_fold(name): name for name in pictures}
        self.by_leaf, self.by_stem = defaultdict(list), defaultdict(list)
        for name in pictures:
            leaf = PurePosixPath(name)
            self.by_leaf[_fold(leaf.name)].append(name)
            self.by_stem[_fold(leaf.stem)].append(name)

    def find(self, cells, beside=""):
        """The picture of each cell, None where there is none or more than one. `beside`: the table's folder, relative to the root."""
        return [self._one(cell, beside) for cell in cells]

    def _one(self, cell, beside):
        text = cell.replace("\\", "/")
        if not text:
            return None
        if text.startswith("/") or PureWindowsPath(cell).drive:
            lies = os.path.realpath(text)
            text = os.path.relpath(lies, self.root) if lies.startswith(self.root + os.sep) else text.rpartition("/")[2]
        text = os.path.normpath(text)
        for way in (text, f"{beside}/{text}" if beside else ""):
            if way and (found := self.exact.get(_fold(way))):
                return found
        if "/" in text:
            return None
        for index in (self.by_leaf, self.by_stem):
            held = index.get(_fold(text), ())
            if beside:
                held = [name for name in held if name.startswith(beside + "/")] or held
            if len(held) == 1:
                return held[0]
        return None


def _fold(name):
    """A name with one spelling of its accents and its suffix in lower case, as disks and programs mix them up."""
    stem, dot, suffix = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{suffix.lower()}" if dot else suffix


# --- what a table is -------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """One table below the root and what it is good for."""

    name: str
    rows: int = 0
    columns: dict = field(default_factory=dict)  # ours -> theirs
    files: int = 0  # rows whose file is there
    split: str = ""  # train, val or test where its name says so
    why_not: str = ""  # "" where it lists tiles with their classes
    data: pd.DataFrame | None = None  # our columns, `file_name` as it is on disk, rows without a file left out


def judge(root, name, names):
    """`Table`: whether a table below the root lists tiles and their classes, by its cells and not by its name.

    Args:
        name: relative to the root.
        names: `Names` of the pictures.
    """
    told = Table(name)
    try:
        cells = read(Path(root) / name, root, names)
    except (OSError, ValueError) as error:
        told.why_not = str(error).replace(f"{Path(root) / name}: ", "")
        return told
    told.rows, beside = len(cells), name.rpartition("/")[0]
    if not len(cells):
        told.why_not = "it has no rows"
        return told
    by_column = {column: names.find(cells[column], beside) for column in _text_like(cells)}
    counts = {column: sum(hit is not None for hit in hits) for column, hits in by_column.items()}
    best = max(counts, key=counts.get, default=None)
    if best is None or not counts[best]:
        column = _known(cells.columns).get("file_name", cells.columns[0])
        told.why_not = f"0 of {len(cells)} names in its column {column!r} are files below the folder, first {str(cells[column].iloc[0])!r}"
        return told
    told.files = counts[best]
    columns = {"file_name": best, **roles(cells.drop(columns=best))}
    if told.files < FILES * len(cells):
        lost = next(cell for cell, hit in zip(cells[best], by_column[best], strict=True) if hit is None)
        told.why_not = f"only {told.files} of {len(cells)} names in its column {best!r} are files below the folder, first missing {lost!r}"
    elif "label" not in columns:
        told.why_not = "it has no column that could be the class of a tile"
    told.columns, told.split = columns, levels.split_of(PurePosixPath(name).stem) or levels.split_of(beside.rpartition("/")[2]) or ""
    told.data = pd.DataFrame({ours: cells[theirs] for ours, theirs in columns.items()}).assign(file_name=by_column[best])
    told.data = told.data[told.data["file_name"].notna()].reset_index(drop=True)
    return told


def _text_like(cells, most=20):
    """Columns that could name files: many different cells; the known names first."""
    known = _known(cells.columns).get("file_name")
    many = [column for column in cells if cells[column].nunique() > 0.5 * len(cells) or column == known]
    return sorted(many, key=lambda column: column != known)[:most]


def _plain(name):
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name))
    return re.sub(r"[_\-\s.]+", " ", spaced).strip().casefold()


def _known(columns):
    """{ours: theirs} by the names of columns alone."""
    lower = {}
    for name in columns:
        lower.setdefault(_plain(name), name)
    return {ours: lower[known] for ours, options in KNOWN.items() if (known := next((o for o in options if o in lower), None))}


def roles(cells):
    """{ours: theirs} of the columns beside that of the files, by their names and what is in them."""
    placed = [name for name in cells if _plain(name) in PLACES]
    coordinates = {"x", "y"} <= {_plain(name) for name in cells}
    found = {}
    for ours, theirs in _known(name for name in cells if not (name in placed and (coordinates or _plain(name) != "y"))).items():
        if ours != "file_name" and (FITS[ours](cells[theirs]) or (ours == "label" and _is_label(cells[theirs], 0.8))):
            found[ours] = theirs
    if "label" not in found:
        free = [name for name in cells if name not in found.values() and name not in placed and _is_label(cells[name])]
        if len(free) == 1 and (cells.attrs.get("header") is False or cells.shape[1] == 1):
            found["label"] = free[0]
    return found


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
