import numpy as np
import pandas as pd
import pytest
import squares

from histokit import runs
from histokit.fidelity import sanity
from histokit.metrics import distributions
from histokit.tiles import data


def manifests(n=40, made=40):
    rows = [(f"{s}-{c}-{i}", c, s) for s in ("train", "test") for c in "ab" for i in range(n)]
    real = pd.DataFrame(rows, columns=["tile_id", "label", "split"])
    return real, pd.DataFrame({"tile_id": [f"s{i}" for i in range(made)], "label": "a"})


def feats(real, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(real), 8)) + 5 + 3 * np.eye(8)[(real["label"] == "b").astype(int)]


def said(of_made, seed=0):
    real, made = manifests(made=len(of_made))
    found = sanity.signs({"e": (feats(real, seed), of_made)}, real, made, ["a"])
    return found.iloc[0], list(sanity.remarks(found, none_stained(["a"])))


def none_stained(classes):
    return pd.DataFrame({"class": classes, "outside": np.nan, "haematoxylin": np.nan, "eosin": np.nan})


def like(label, n=40, seed=9):
    return feats(pd.DataFrame({"label": [label] * n}), seed)


def test_tiles_of_the_class_give_no_sign():
    row, remarks = said(like("a"))
    assert remarks == [] and row["called_right"] > 0.8 and 0.8 < row["vendi"] / row["vendi_real"] < 1.25
    assert row["density"] > 0.6 and row["coverage"] > 0.8


def test_one_tile_over_and_over_repeats_itself():
    one = like("a")[:1] + np.random.default_rng(1).normal(0, 0.01, (40, 8))
    row, remarks = said(one)
    assert row["vendi"] < 2 < row["vendi_real"] and row["coverage"] < 0.6
    assert len(remarks) == 1 and remarks[0].startswith("a: the synthetic tiles repeat themselves")


def test_tiles_of_another_class_have_doubtful_labels():
    row, remarks = said(like("b"))
    assert row["called_right"] < 0.2 < 0.8 < row["real_called_right"]
    assert any(line.startswith("a: the labels are doubtful") for line in remarks)


def test_the_vendi_scores_are_taken_at_equal_n_whatever_the_sizes():
    small, _ = said(like("a", n=20))
    assert small["n"] == 20 and 0.8 < small["vendi"] / small["vendi_real"] < 1.4
    assert np.isnan(small["coverage"]), "30 a side are needed"
    tiny, remarks = said(like("a", n=9))
    assert np.isnan(tiny["vendi"]) and remarks == [] and distributions.MIN_NEIGHBOURS == 30


def test_no_synthetic_tile_or_a_single_class_is_no_error():
    real, made = manifests(made=0)
    found = sanity.signs({"e": (feats(real), np.zeros((0, 8)))}, real, made, ["a"])
    assert found["called_right"].isna().all() and list(sanity.remarks(found, none_stained(["a"]))) == []
    assert sanity.signs({}, real, made, ["a"]).empty
    one = real[real["label"].eq("a")].reset_index(drop=True)
    assert sanity.signs({"e": (feats(one), like("a"))}, one, manifests()[1], ["a"])["called_right"].isna().all()
    assert len(sanity.table(found, none_stained(["a"]))) == 1


@pytest.fixture
def tiles(root):
    squares.dataset({"train": {"red": 12, "blue": 12}, "test": {"red": 12, "blue": 12}})
    darker = {"blue": [(squares.tile("blue", i) * 0.6).astype(np.uint8) for i in range(12)]}
    squares.synthetic({"blue": 12}, step="dark", pixels=darker)
    squares.synthetic({"blue": 12}, step="same")
    return runs.start(experiment="exp", step="07_evaluate")


def test_another_stain_is_measured_and_said(tiles):
    real = data.load(tiles)
    dark, same = (sanity.stain(real, data.load(tiles, step=step), ["blue"]).iloc[0] for step in ("dark", "same"))
    assert dark["outside"] == 1 and min(dark["haematoxylin"], dark["eosin"]) != pytest.approx(1, abs=0.05)
    assert same["outside"] < 0.5 and same["haematoxylin"] == pytest.approx(1, abs=0.02)
    (line,) = sanity.remarks(pd.DataFrame(columns=sanity.COLUMNS), pd.DataFrame([dark]))
    assert line.startswith("blue: 100 % of the synthetic tiles are stained unlike its real tiles (haematoxylin ")
    few = sanity.stain(real, data.load(tiles, step="dark").head(5), ["blue"]).iloc[0]
    assert np.isnan(few["outside"]) and few["synthetic"] == 5
