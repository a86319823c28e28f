"""Frechet distance and MMD beside their floors: equal sets lie at the floor, shifted ones above, and few tiles are not read."""

import numpy as np
import pandas as pd
import pytest

from histokit.fidelity import frechet


def tables(real, made, cases=20):
    """Manifests of one class: `real` held-out tiles of `cases` cases, and `made` synthetic ones."""
    held = pd.DataFrame({"label": "a", "split": "test", "case_id": [f"c{i % cases}" for i in range(real)]})
    return held, pd.DataFrame({"label": ["a"] * made})


def measured(real, made, shift=0.0, classes=("a",), dimensions=4):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(real, dimensions)), rng.normal(size=(made, dimensions)) + shift
    return frechet.measure({"eye": features}, *tables(real, made), list(classes)).iloc[0]


def test_tiles_of_the_same_kind_lie_at_the_floor_and_shifted_ones_above(monkeypatch):
    monkeypatch.setattr(frechet, "ENOUGH", 40)
    same, far = measured(400, 200, dimensions=16), measured(400, 200, shift=1.0, dimensions=16)
    assert same["n"] == far["n"] == 200 and 0.5 < same["frechet"] / same["frechet_floor"] < 2
    assert far["frechet"] - far["frechet_floor"] == pytest.approx(16, rel=0.1), "sixteen dimensions, each mean moved by 1"
    assert far["mmd"] > 5 * far["mmd_floor"] and far["reading"] == "farther than real tiles of other cases"


def test_below_what_it_wants_the_numbers_stand_there_and_are_not_read():
    row = measured(60, 30)
    assert row["frechet"] > 0 and row["wanted"] == 2000 and np.isnan(row["frechet_infinity"])
    assert row["reading"] == "n too small to say: mostly bias below 2,000 a side"
    assert measured(60, 30, dimensions=1500)["wanted"] == 3000


def test_too_few_or_none_give_a_row_without_numbers():
    for real, made in ((60, 9), (60, 0), (0, 30)):
        row = measured(real, made)
        assert np.isnan(row["frechet"]) and row["reading"].startswith("n too small to say: needs 10")
    assert frechet.table(pd.DataFrame([measured(60, 0)])).iloc[0]["Frechet"] == ""


def test_several_classes_have_a_row_together():
    rng, (held, made) = np.random.default_rng(0), tables(80, 40)
    held.loc[held.index % 2 == 1, "label"] = made.loc[made.index % 2 == 1, "label"] = "b"
    found = frechet.measure({"eye": (rng.normal(size=(80, 3)), rng.normal(size=(40, 3)))}, held, made, ["a", "b"]).set_index("class")
    assert list(found.index) == ["a", "b", frechet.ALL] and found.loc[frechet.ALL, "n"] == 40 and found.loc["a", "n"] == 20


def test_no_encoder_no_row():
    assert frechet.measure({}, *tables(10, 0), ["a"]).empty
