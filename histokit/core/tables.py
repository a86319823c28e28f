"""Tables on disk that come back as they went: text stays text, numbers keep their last bit, no cell is a formula.

A CSV has no types, so reading needs a rule. The columns of `TEXT` are always text, with "" for what is missing. Any other
column is a number when every filled cell is one in its plain spelling (so "007" and "1e5x" stay text), and text otherwise.
Cells that a spreadsheet would run (= + - @) carry an apostrophe in the file, which reading takes off again.
"""

import csv
import re
from pathlib import Path

from histokit.core import atomic

TEXT = frozenset(
    "tile_id root file_name label split use case_id patient slide group sha256 mask source method sources prompt settings lora_sha "
    "token_sha scores status reason run_id prompt_id text class_name arm policy placeholder verdict reviewer path image".split()
)
NUMBER = frozenset("mpp width height".split())  # numbers even when every cell is empty
EXACT = 2**53  # the last integer a float holds; longer ones with gaps become Int64
FORMULA = r"^'*[=+\-@\t\r]"
INTEGER, REAL = r"-?(0|[1-9]\d{0,18})", r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|-?inf"


def write(path, table):
    """Writes a DataFrame as .csv or .parquet by its suffix; the index is not kept."""
    table = _texts_as_text(table.reset_index(drop=True))
    if table.columns.duplicated().any():
        raise ValueError(f"{path}: column {table.columns[table.columns.duplicated()][0]!r} appears twice")
    if Path(path).suffix == ".parquet":
        with atomic.atomic(path) as file:
            table.to_parquet(file, index=False)
    elif Path(path).suffix == ".csv":
        safe = table.rename(columns=lambda name: re.sub(FORMULA, lambda hit: "'" + hit[0], name))
        quoting = csv.QUOTE_MINIMAL
        for at, name in enumerate(table.columns):
            if _is_text(table[name]):
                safe.isetitem(at, table[name].str.replace(FORMULA, lambda hit: "'" + hit[0], regex=True))
                if table[name].str.contains("\r", regex=False).any():
                    quoting = csv.QUOTE_NONNUMERIC  # a lone carriage return is not quoted otherwise, and ends the row when read
        with atomic.atomic(path, "w") as file:
            safe.to_csv(file, index=False, lineterminator="\n", quoting=quoting)
    else:
        raise ValueError(f"{path}: a table is a .csv or a .parquet file")
    return Path(path)


def read(path):
    """The DataFrame in a .csv (comma, or semicolon or tab when the header has no comma) or .parquet file; errors name it."""
    import pandas as pd

    path = Path(path)
    if path.suffix not in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"{path}: a table is a .csv or a .parquet file")
    try:
        if path.suffix == ".parquet":
            return _texts_as_text(pd.read_parquet(path))
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
        separator = next((mark for mark in ",;\t" if mark in header), ",")
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8-sig", index_col=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as 'CSV UTF-8' and try again") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from error
    except OSError as error:
        if error.filename or type(error) is not OSError:
            raise
        raise ValueError(f"{path} is not a readable table: {error}") from error
    except ValueError as error:  # pyarrow's own
        raise ValueError(f"{path} is not a readable table: {error}") from error
    table.columns = [re.sub("^'(?=" + FORMULA[1:] + ")", "", name) for name in table.columns]
    for at, name in enumerate(table.columns):
        table.isetitem(at, _typed(name, table.iloc[:, at]))
    return table


def _typed(name, column):
    """A column of text as what it is, by the rule at the top."""
    import pandas as pd

    escaped = column.str.contains(r"^'+[=+\-@\t\r]", regex=True)
    if escaped.any():
        return column.where(~escaped, column.str.slice(1))
    if name in TEXT:
        return column
    filled = column[column != ""]
    if filled.empty:
        return column if name not in NUMBER else pd.Series(float("nan"), index=column.index)
    if filled.isin(("True", "False")).all() and len(filled) == len(column):
        return column == "True"
    if filled.str.fullmatch(INTEGER).all():
        numbers = [int(cell) for cell in filled]
        if max(map(abs, numbers)) >= 2**63:
            return column
        if len(filled) == len(column):
            return pd.Series(numbers, index=column.index, dtype="int64")
        if max(map(abs, numbers)) > EXACT:
            return pd.Series(numbers, index=filled.index, dtype="Int64").reindex(column.index)
    named = filled.str.fullmatch(r"[+-]?(0\d+.*|\d{16,})")  # a leading zero, or more digits than a float holds, is a name
    spelled = filled.str.fullmatch(REAL) & ~named
    if spelled.all():
        return column.where(column != "", "nan").astype(object).astype(float)
    return column


def _is_text(column):
    import pandas as pd

    return isinstance(column.dtype, pd.StringDtype)


def _texts_as_text(table):
    """A copy whose columns of `TEXT`, and all that hold text, are str without gaps; lists and dicts in cells raise."""
    import pandas as pd

    table = table.copy(deep=False)
    table.columns = [str(name) for name in table.columns]
    for at, name in enumerate(table.columns):
        column = table.iloc[:, at]
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        elif pd.api.types.is_extension_array_dtype(column.dtype) and pd.api.types.is_numeric_dtype(column.dtype):
            if not column.hasnans:
                table.isetitem(at, pd.Series(column.to_numpy(), index=column.index))
            elif column.abs().max() <= EXACT:
                table.isetitem(at, column.astype(float))
            column = table.iloc[:, at]
        if name in TEXT or column.dtype == object or _is_text(column):
            held = column.dropna()
            if column.dtype == object:
                nested = held.map(lambda cell: isinstance(cell, (list, dict, tuple, set)))
                if nested.any():
                    raise TypeError(f"column {name!r} holds a {type(held[nested].iloc[0]).__name__}; make it JSON text first")
                if name not in TEXT and len(held) and not held.map(lambda cell: isinstance(cell, str)).any():
                    table.isetitem(at, column.infer_objects())  # numbers with gaps
                    continue
            table.isetitem(at, held.astype("str").reindex(column.index, fill_value="").astype("str"))
    return table
