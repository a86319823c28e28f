"""Tables as users have them, read as text: any encoding, separator or program, titles above the header, several sheets.

One reader for `histokit init` and for 00, so that what is drafted is what is read. Cells stay as they are spelt: 007 and 1.10 are names.
"""

import csv
import io
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd

from histokit.tiles.decode import SUFFIXES

VERSION = 1
SEPARATORS = ",;\t|"
LOOKED_AT = 30  # rows at the top in which the header is looked for


class TableError(ValueError):
    """A table that cannot be read; the text says why and what to do."""


def read(path, root=None, names=None):
    """A table as text: DataFrame of str, "" where a cell is empty, cells without the blanks around them.

    Text files in UTF-8, UTF-16 or, where they are neither, Windows-1252; comma, semicolon, tab or bar between cells; workbooks and parquet.
    Lines of remarks (#) and titles above the header are passed over. Of a workbook, the first sheet that holds one of the `names`
    (`Names` of the pictures below `root`), else the first. Where the first row holds one of the `names` it is no header, and the columns
    are called 1, 2, ...; of two columns of one name the second becomes NAME.1.

    Its `attrs` hold `lines`, that of each row as a spreadsheet counts, `header` (bool), and `sheet` and `sheets` of a workbook.
    Raises TableError.
    """
    path = Path(path)
    where = beside(path, root)

    def is_file(cell):
        named = cell.lower().endswith(SUFFIXES) or any(c.isdigit() for c in cell)  # a picture may be called as a column is
        return names is not None and named and names.find([cell], where)[0] is not None

    try:
        table = _raw(path, is_file)
    except (OSError, TableError):
        raise
    except Exception as error:  # pandas, pyarrow, openpyxl and zipfile have their own for a broken file
        raise TableError(f"{path}: is not a table that can be read ({type(error).__name__}: {error}); save it as CSV") from error
    if not table.shape[1]:
        raise TableError(f"{path}: is not a table: it has no column")
    about = {"lines": list(range(2, len(table) + 2)), "header": True} | table.attrs
    table.columns = _unique([str(name).strip() for name in table.columns])
    table = table.apply(lambda column: column.str.strip())
    table.attrs = about
    return table


def beside(path, root):
    """The folder of a file, relative to the root; "" at the root or outside."""
    folder = Path(path).parent
    inside = folder.relative_to(root).as_posix() if root is not None and folder.is_relative_to(root) else ""
    return "" if inside == "." else inside


def _unique(names):
    met, out = Counter(), []
    for name in names:
        out.append(f"{name}.{met[name]}" if met[name] else name)
        met[name] += 1
    return out


def _raw(path, is_file):
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = pd.read_parquet(path)
        return _as_text(table.reset_index() if table.index.name else table)
    if suffix == ".xls":
        raise TableError(f"{path}: workbooks of Excel before 2007 are not read; save it as .xlsx or CSV")
    return _workbook(path, is_file) if suffix == ".xlsx" else _text(path, is_file)


def _text(path, is_file):
    data = path.read_bytes()
    if b"\0" in data[:1000] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TableError(f"{path}: is not text; save it as CSV")
    text = data.decode(encoding(data)).lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise TableError(f"{path}: is not a table: it is empty")
    separator, line, cells, remark = _header(text)
    bare = any(map(is_file, cells))
    if bare and len(remark) == len(cells) > 1:  # a header that begins with #
        cells, bare, line = [remark[0].lstrip("# "), *remark[1:]], False, line - 1
    how = {"sep": separator, "dtype": str, "keep_default_na": False, "index_col": False, "on_bad_lines": "error"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more cells than the header would be cut
            body = "".join(text.splitlines(keepends=True)[line:])
            table = pd.read_csv(io.StringIO(body), header=None if bare else 0, **how)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as error:
        raise TableError(f"{path}: is not a table: {error}; a cell that holds the separator {separator!r} needs quotes") from error
    if not bare:
        table.columns = cells if len(cells) == table.shape[1] else table.columns
    return _about(table.astype(str), _lines(body, separator, line, bare), header=not bare)


def _lines(body, separator, above, bare):
    """Line of every row in its file; empty lines are no rows."""
    reader, starts, before = csv.reader(io.StringIO(body), delimiter=separator), [], 0
    for cells in reader:
        if any(cells):
            starts.append(above + before + 1)
        before = reader.line_num
    return starts if bare else starts[1:]


def _about(table, lines, header, **more):
    """The table with its attrs; columns without a header are called 1, 2, ..."""
    if not header:
        table.columns = [str(i + 1) for i in range(table.shape[1])]
    table.attrs = {"lines": lines if len(lines) == len(table) else list(range(2, len(table) + 2)), "header": header, **more}
    return table


def _header(text):
    """(separator, index of the header's line, its cells, cells of a remark right above): titles are passed over, which have fewer cells."""
    best, width, whole = None, 1, False
    for separator in SEPARATORS:
        reader, rows, before, remark = csv.reader(io.StringIO(text), delimiter=separator), [], 0, []
        for cells in reader:
            if cells and any(cells):
                if cells[0].startswith("#"):
                    remark = cells
                else:
                    rows.append((before, cells, remark))
                    remark = []
            before = reader.line_num
            if len(rows) == LOOKED_AT:
                break
        if not rows:
            continue
        wide = Counter(len(cells) for _, cells, _ in rows[1:] or rows).most_common(1)[0][0]
        same = len(rows[0][1]) == wide  # of two separators that cut rows alike, the one that cuts the first row so too
        if best is None or (wide, same) > (width, whole):
            line, cells, above = next((row for row in rows if len(row[1]) >= 0.6 * wide), rows[0])
            best, width, whole = (separator, line, cells, above), wide, same
    return best or (",", 0, [], [])


def _workbook(path, is_file):
    sheets = pd.read_excel(path, sheet_name=None, header=None, dtype=object, engine="openpyxl", keep_default_na=False, na_values=[""])
    sheets = {name: _as_text(cells) for name, cells in sheets.items() if cells.notna().any(axis=None)}
    if not sheets:
        raise TableError(f"{path}: is not a table: it is empty")
    holds = (name for name, cells in sheets.items() if any(is_file(cell) for cell in cells.head(LOOKED_AT).to_numpy().ravel()))
    name = next(holds, next(iter(sheets)))
    cells = sheets[name]
    filled = cells.head(LOOKED_AT).ne("").sum(axis=1)
    top = int((filled >= 0.6 * filled.max()).to_numpy().argmax())  # what is emptier is a title
    header = cells.iloc[top].tolist()
    bare = any(map(is_file, header))
    table = cells.iloc[top if bare else top + 1 :]
    table = table[table.ne("").any(axis=1)]
    lines = [int(i) + 1 for i in table.index]
    table = table.reset_index(drop=True)
    table.columns = [text or f"column {i + 1}" for i, text in enumerate(header)]
    return _about(table, lines, header=not bare, sheet=name, sheets=len(sheets))


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
