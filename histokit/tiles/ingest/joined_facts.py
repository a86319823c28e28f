"""What tables say of tiles beside their class: split and scale as they are spelt, and facts of a tile, case or slide from another table."""

import pandas as pd

from histokit.tiles.description import SPLITS, nearest
from histokit.tiles.ingest import levels, table_files, tile_names

VERSION = 1


def join(described, tiles, table, on, columns):
    """Adds what another table says of each tile, or of its case or slide; a tile that it does not name is refused."""
    by_file = on == "file_name"
    names = tile_names.Names(described.root, tiles["file_name"]) if by_file else None
    facts = table_files.read(table, described.root, names)
    for ours, theirs in columns.items():
        if theirs not in facts:
            raise ValueError(
                f"{table}: has no column {theirs!r} for {ours}{nearest(theirs, facts.columns)}; set `facts` in {described.path}"
            )
        if ours != on and ours in tiles and tiles[ours].astype(str).ne("").any():
            raise ValueError(f"{described.path}: `facts` of {table.name} gives {ours}, which the data says already; leave one of them out")
    if on not in tiles:
        raise ValueError(
            f"{described.path}: `facts` joins {table.name} on {on}, which nothing gives; let `case_pattern` or `levels` name it"
        )
    keys = facts[columns[on]]
    if by_file:
        keys = pd.Series(names.find(keys, table_files.beside(table, described.root), numbered=True), dtype=object)
    known = pd.DataFrame({ours: facts[theirs] for ours, theirs in columns.items() if ours != on})
    known = known.assign(key=keys.to_numpy(), line=facts.attrs["lines"])
    known = known[known["key"].notna()].drop_duplicates([name for name in known if name != "line"])
    if known["key"].duplicated().any():
        key = known.loc[known["key"].duplicated(), "key"].iloc[0]
        raise ValueError(f"{table}: has two rows for {key!r} that differ; leave one")
    lost = tiles.loc[~tiles[on].isin(known["key"]) & tiles["use"].eq("labelled"), on]
    if len(lost):
        raise ValueError(f"{table}: has no row for {lost.iloc[0]!r} ({lost.nunique()} are so); add it, or leave the table out of `facts`")
    rows = known.set_index("key").reindex(tiles[on]).fillna("")
    for ours in rows:
        tiles[ours] = rows[ours].to_numpy()
    if "patient" in columns and on == "case_id":  # the split goes by patient
        tiles["slide"], tiles["case_id"] = tiles["case_id"], tiles["patient"]
    if "split" in columns:
        read_split(table, tiles)
    if "mpp" in columns:
        read_mpp(table, tiles)
    tiles.drop(columns="line", inplace=True)


def read_split(path, tiles):
    if "split" not in tiles:
        tiles["split"] = ""
        return
    known = tiles["split"].map(lambda text: levels.split_of(text) if text else "")
    if known.isna().any():
        row = tiles[known.isna()].iloc[0]
        raise ValueError(f"{path} row {row['line']}: split {row['split']!r} of {row['file_name']!r}{nearest(row['split'], SPLITS)}")
    empty = known.eq("") & tiles["use"].eq("labelled")
    if empty.any() and not known[tiles["use"].eq("labelled")].eq("").all():
        row = tiles[empty].iloc[0]
        raise ValueError(f"{path} row {row['line']}: {row['file_name']!r} has no split while others have; fill in all rows or none")
    tiles["split"] = known


def read_mpp(path, tiles):
    if "mpp" in tiles:
        numbers = pd.to_numeric(tiles["mpp"].str.replace(",", "."), errors="coerce")
        wrong = tiles["mpp"].ne("") & ~numbers.gt(0)
        if wrong.any():
            row = tiles[wrong].iloc[0]
            raise ValueError(f"{path} row {row['line']}: mpp {row['mpp']!r} of {row['file_name']!r} is not micrometres per pixel")
        tiles["mpp"] = numbers
