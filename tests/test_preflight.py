"""What a dataset and a base cannot show, on planted data where the answer is known."""

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.diffusion import codecs
from histokit.evaluate import preflight
from histokit.tiles import data, staining
from histokit.vision import features


def rows(name, cases, per_case):
    return pd.DataFrame([{"label": name, "case_id": f"{name}{k}"} for k in range(cases) for _ in range(per_case)])


def test_the_detectable_difference_is_seen_in_four_of_five_simulated_studies():
    cases, per_case = 30, 4
    least = preflight.detectable(rows("a", cases, per_case), ["a"])["detectable"][0]
    rng, seen = np.random.default_rng(0), 0
    shared, own = np.sqrt(preflight.DISAGREE * preflight.ALIKE), np.sqrt(preflight.DISAGREE * (1 - preflight.ALIKE))
    for _ in range(2000):
        x = least + shared * rng.normal(size=(cases, 1)) + own * rng.normal(size=(cases, per_case))
        mean = x.mean(axis=1)
        seen += abs(mean.mean()) > 2.0452 * mean.std(ddof=1) / np.sqrt(cases)  # t of 29 degrees of freedom
    assert seen / 2000 == pytest.approx(0.8, abs=0.04)


def test_more_cases_see_more_and_more_tiles_of_the_same_case_hardly():
    def least(cases, per_case):
        return preflight.detectable(rows("a", cases, per_case), ["a"])["detectable"][0]

    assert least(40, 4) == pytest.approx(least(10, 4) / 2)
    assert least(10, 400) > 0.8 * least(10, 40)
    assert np.isnan(least(7, 20)) and least(8, 1) < 1
    assert np.isnan(preflight.detectable(rows("a", 9, 1), ["b"])["detectable"][0])


def stained(haematoxylin, eosin, seed, px=32):
    """A tile without any shape: noise around one mixture of the two stains."""
    from histokit.tiles import augment

    rng = np.random.default_rng(seed)
    density = haematoxylin * augment.STAINS[0].numpy() + eosin * augment.STAINS[1].numpy()
    pixels = (10 ** -(density + rng.normal(0, 0.02, (px, px, 3))) * 256 - 1).clip(0, 255)
    return pixels.astype(np.uint8)


def test_stain_amounts_are_those_a_tile_was_made_of():
    made = [(0.3, 0.1), (0.1, 0.4), (0.5, 0.5)]
    np.testing.assert_allclose(staining.stains(np.stack([stained(*m, i) for i, m in enumerate(made)])), made, atol=0.02)


def test_colour_alone_is_caught_where_it_goes_with_class_and_not_where_it_goes_with_the_case():
    rng, labels, cases, by_class, by_case = np.random.default_rng(0), [], [], [], []
    for k in range(24):
        name, own = "ab"[k % 2], rng.uniform(0.1, 0.5)
        for i in range(4):
            labels.append(name)
            cases.append(f"c{k}")
            by_class.append(stained(0.2 if name == "a" else 0.4, 0.2, 100 * k + i))
            by_case.append(stained(own, 0.2, 100 * k + i))
    caught, _ = preflight.colour_trap(staining.colour(np.stack(by_class)), labels, cases)
    assert caught > 0.95
    accuracy, share = preflight.colour_trap(staining.colour(np.stack(by_case)), labels, cases)
    assert accuracy < 0.8 and share == pytest.approx(max(0, 2 * accuracy - 1))  # without folds by case it would be near 1
    assert np.isnan(preflight.colour_trap(np.zeros((8, 2)), ["a"] * 4 + ["b"] * 4, [f"c{i}" for i in range(4)] + ["d"] * 4)[0])


def test_a_ceiling_falls_where_the_autoencoder_takes_the_class_away():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 60)
    feats = np.c_[np.where(labels == "a", -2, 2) + rng.normal(0, 0.5, 120), rng.normal(size=120)]
    lost = feats.copy()
    lost[:, 0] = -2  # all look like a
    top = preflight.ceiling(feats, labels, feats, lost, labels, ["a", "b", "c"]).set_index("class")
    assert top.loc["a", "coded"] == 1 and top.loc["b", "real"] > 0.95 and top.loc["b", "coded"] < 0.05
    assert top.loc["c", "tiles"] == 0 and np.isnan(top.loc["c", "real"])


def test_the_warnings_name_what_cannot_be_shown_and_are_silent_where_all_can():
    limits = preflight.detectable(pd.concat([rows("few", 3, 9), rows("some", 9, 1), rows("many", 90, 4)]), ["few", "some", "many"])
    top = pd.DataFrame({"class": ["many"], "tiles": [40], "real": [0.8], "coded": [0.3]})
    said = list(preflight.warnings(limits, (0.9, 0.8), top, ["few", "some", "many"]))
    assert [text.split(":")[0] for text in said] == [
        "few",
        "some",
        "Colour alone, without a single shape, reaches a balanced accuracy of 90 %",
        "many",
    ]
    assert "3 test cases" in said[0] and "9 test tiles of 9 cases" in said[1] and "names 80 % of its real tiles names 30 % after" in said[3]
    assert list(preflight.warnings(limits, (0.3, 0.1), top.assign(coded=0.7), ["many"])) == []
    top = pd.DataFrame({"class": ["none", "many", "head"], "tiles": [0, 40, 40], "real": [np.nan, 0.1, 0.9], "coded": [np.nan, 0.1, 0.9]})
    said = list(preflight.warnings(preflight.detectable(rows("other", 9, 1), ["none"]), (0.3, 0.1), top, ["none", "many"]))
    assert said[0] == "none: no test tile: no run on this split can show help."
    assert said[1].startswith("none: no validation tile") and "finds 10 % of 40 validation tiles, of the other classes 90 %" in said[2]


def test_a_survey_of_a_dataset_is_strict_json_and_sees_no_answer_on_a_test_tile(root, monkeypatch):
    squares.dataset({split: dict.fromkeys(squares.CLASSES, 6) for split in ("train", "val", "test")})
    run = runs.start(experiment="exp", step="look")
    tiles, held = data.load(run), data.dataset(run)
    asked = []
    monkeypatch.setattr(preflight, "ceiling", lambda *args, spy=preflight.ceiling: asked.append(args) or spy(*args))
    found = preflight.survey(tiles, held, features.load("colour-texture"), codecs.VaeRoundTrip(tiny_model(), held.tile_px))
    files.dumps(found.plain())
    assert found.trap[0] > 0.9  # the classes of `squares` are colours
    assert len(found.stains) == tiles["case_id"].nunique() and found.top["tiles"].tolist() == [6, 6, 6]
    assert len(asked[0][4]) == 18, "validation tiles alone"
    assert preflight.survey(tiles[tiles["label"].eq("red")], held, None).warnings[0].startswith("Without two labelled classes")
    assert torch.is_grad_enabled()
