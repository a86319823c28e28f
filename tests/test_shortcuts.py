import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import squares
from PIL import Image

from histokit import runs
from histokit.fidelity import shortcuts
from histokit.tiles import data, decode


def manifests(n=40):
    """Real tiles of ten cases and synthetic tiles made from them, of one class."""
    real = pd.DataFrame({"tile_id": [f"r{i}" for i in range(n)], "label": "a", "case_id": [f"c{i % 10}" for i in range(n)]})
    sources = [json.dumps([f"r{i}"]) for i in range(n)]
    return real, pd.DataFrame({"tile_id": [f"s{i}" for i in range(n)], "label": "a", "sources": sources})


def test_a_trace_in_every_synthetic_tile_is_found_and_no_trace_is_chance():
    rng, (real, made) = np.random.default_rng(0), manifests()
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    traced = b + 4 * np.eye(6)[0]
    found = shortcuts.probe({"clean": (a, b), "traced": (a, traced)}, real, made, ["a"]).set_index("encoder")["auroc"]
    assert found["traced"] > 0.98 and 0.3 < found["clean"] < 0.7
    (said,) = shortcuts.probe_remarks(shortcuts.probe({"traced": (a, traced)}, real, made, ["a"]))
    assert said.startswith("a: synthetic tiles give themselves away (AUROC traced ")


def test_what_was_made_from_a_case_stays_on_its_side():
    """Features that are nothing but the case tell nothing apart, although a split by tile would find each again."""
    rng, (real, made) = np.random.default_rng(1), manifests(60)
    of_case = rng.normal(size=(10, 30))
    a = of_case[np.arange(60) % 10] + 0.01 * rng.normal(size=(60, 30))
    b = of_case[np.arange(60) % 10] + 0.01 * rng.normal(size=(60, 30))
    assert shortcuts.probe({"e": (a, b)}, real, made, ["a"])["auroc"].iloc[0] < 0.75


def test_too_few_tiles_or_one_case_are_not_judged():
    real, made = manifests(9)
    x = np.random.default_rng(0).normal(size=(9, 3))
    assert shortcuts.probe({"e": (x, x)}, real, made, ["a", "none"])["auroc"].isna().all()
    real, made = manifests(40)
    x = np.random.default_rng(0).normal(size=(40, 3))
    assert shortcuts.probe({"e": (x, x + 9)}, real.assign(case_id="one"), made, ["a"])["auroc"].isna().all()


def test_tiles_that_are_coded_otherwise_are_said(tmp_path):
    def written(name, n, **how):
        paths = [tmp_path / f"{i}-{name}" for i in range(n)]
        for path in paths:
            Image.fromarray(squares.tile("red", 1)).save(path, **how)
        return pd.DataFrame({"path": [str(path) for path in paths]})

    png, coarse, fine = written("a.png", 3), written("b.jpg", 3, quality=60), written("c.jpg", 3, quality=95)
    assert list(decode.codecs(png)) == ["PNG 64 x 64 px"]
    assert next(iter(decode.codecs(coarse))).startswith("JPEG 64 x 64 px, quantisation ")
    assert list(decode.codecs(coarse)) != list(decode.codecs(fine)), "the quality is another codec"
    assert decode.codec_remarks(png, png) == []
    (said,) = decode.codec_remarks(coarse, png)
    assert "real tiles are JPEG 64 x 64 px" in said and "added ones PNG 64 x 64 px" in said
    assert decode.codec_remarks(png, png.head(0)) == []


def test_cases_outside_the_stain_of_the_training_cases_are_known(root, monkeypatch):
    def tinted(name, seed, noise=12):
        dark = 0.5 if seed // 1000 == 1 and seed % 100 >= 4 else 1.0  # of the test tiles, all but the first two cases
        return (
            (np.array(squares.COLOURS[name]) * dark + np.random.default_rng(seed).normal(0, 2 + seed % 7, (64, 64, 3)))
            .clip(0, 255)
            .astype(np.uint8)
        )

    monkeypatch.setattr(squares, "tile", tinted)
    squares.dataset({"train": {"red": 20, "blue": 20}, "test": {"red": 12, "blue": 12}})
    tiles = data.load(runs.start(experiment="exp", step="07_evaluate"))
    where = shortcuts.stain_range(tiles)
    test = tiles[tiles["split"].eq("test")]
    assert set(where.index) == set(test["tile_id"]) and set(where) <= {"inside", "outside"}
    dark = test[test["file_name"].str.extract(r"/(\d+)\.png")[0].astype(int).ge(4).to_numpy()]
    assert where[dark["tile_id"]].eq("outside").all()
    train = tiles[tiles["split"].eq("train")]
    again = pd.concat([train, train.assign(split="test", tile_id="again-" + train["tile_id"])], ignore_index=True)
    assert shortcuts.stain_range(again, per_case=9).eq("inside").all(), "training cases lie in their own range"
    with_one = tiles[tiles["split"].eq("test") | tiles["case_id"].isin(["train-red-0", "train-blue-0"])]
    assert shortcuts.stain_range(with_one).eq("outside").all(), "one case is no range"

    same = again.assign(tile_id=again["tile_id"].str.replace("train", "there"))
    (said,) = shortcuts.elsewhere(tiles, same[same["split"].eq("test")], "house")
    assert said.startswith("0 of ") and "cases of house are stained outside" in said
    (said,) = shortcuts.elsewhere(tiles, dark.assign(split="val"), "house")  # whatever its split is called there
    n = len(dark.drop_duplicates(["label", "case_id"]))
    assert said.startswith(f"{n} of {n} cases")
    coded = dark.copy()
    coded["path"] = [str(Path(path).with_suffix(".jpg")) for path in coded["path"]]
    for old, new in zip(dark["path"], coded["path"], strict=True):
        Image.open(old).save(new, quality=80)
    lines = shortcuts.elsewhere(tiles, coded, "house")
    assert len(lines) == 2 and lines[0].startswith("Tiles of house are JPEG 64 x 64 px") and "trained on PNG 64 x 64 px" in lines[0]
    assert shortcuts.elsewhere(tiles, dark.head(0), "house") == []


@pytest.mark.parametrize("rows", [0, 1])
def test_without_test_tiles_there_is_nothing_to_place(root, rows):
    squares.dataset({"train": {"red": 2}, "val": {"red": rows}})
    assert shortcuts.stain_range(data.load(runs.start(experiment="exp", step="07_evaluate"))).empty
