"""Made tiles of toy are asked for their structures: tiles of the class pass, tiles of another class and grey ones do not."""

import numpy as np
import pandas as pd
import pytest

from histokit import toy
from histokit.core import files
from histokit.fidelity import toy_structures


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Twelve tiles of each of two classes, one per case, as manifest rows."""
    folder, rows = tmp_path_factory.mktemp("toy"), []
    for name in ("cribriform", "stroma"):
        for case in range(12):
            path = folder / f"{name}-{case}.png"
            files.write_png(path, toy.tile(name, f"T{case}", 0)[0])
            rows.append({"label": name, "path": str(path), "split": "test", "tile_px": 128, "fit": "resize", "mpp": np.nan})
    return pd.DataFrame(rows)


def test_tiles_of_the_class_lie_in_the_range_of_the_class(tiles):
    own = tiles[tiles["label"].eq("cribriform")]
    found = toy_structures.measure(own.iloc[::2], own.iloc[1::2], ["cribriform"])
    assert list(found["measure"]) == list(toy_structures.MEASURES) and found["tiles"].eq(6).all()
    assert found.set_index("measure").loc[["nuclei_count", "lumen_count"], "apart"].between(0.1, 0.9).all()


def test_a_tile_of_another_class_is_told_by_what_it_lacks(tiles):
    real, other = (tiles[tiles["label"].eq(name)] for name in ("cribriform", "stroma"))
    found = toy_structures.measure(real, other.assign(label="cribriform"), ["cribriform"])
    said = list(toy_structures.remarks(found))
    lumina = found.set_index("measure").loc["lumen_count"]
    assert lumina["made"] < lumina["low"] and lumina["inside"] < 0.2 and lumina["apart"] < 0.1
    assert any(line.startswith("cribriform: ") and "for lumen count; they have less of it" in line for line in said)
    assert toy_structures.table(found)["made tiles within"].str.contains("of 12").all()


def test_a_class_without_tiles_has_no_row(tiles):
    assert toy_structures.measure(tiles, tiles.head(0), ["cribriform"]).empty
    assert list(toy_structures.remarks(toy_structures.measure(tiles, tiles.head(0), []))) == []
