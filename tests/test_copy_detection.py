"""The memorisation protocol on planted generators: one that copies, one that does not, one that cannot be judged."""

import json

import numpy as np
import pytest
import squares
import torch

from histokit import runs
from histokit.core import files
from histokit.fidelity import closest_pairs, copy_detection, nearest_tiles
from histokit.tiles import data
from histokit.vision import encoders, features


class Fields(torch.nn.Module):
    """Mean colour of an 8 x 8 grid, as 192 features."""

    dim = 192

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)


def patterned(name, seed):
    """A class colour under a random pattern of 8 x 8 fields, which makes every tile a picture of its own."""
    rng = np.random.default_rng(seed)
    pattern = np.kron(rng.normal(0, 35, (8, 8, 1)), np.ones((8, 8, 1)))
    return (np.array(squares.COLOURS[name]) + pattern + rng.normal(0, 3, (64, 64, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def study(root, monkeypatch):
    monkeypatch.setattr(squares, "tile", patterned)
    monkeypatch.setitem(encoders.FIXED, "colour-texture", Fields)
    squares.dataset({"train": {"blue": 12, "red": 6}, "val": {"blue": 160, "red": 4}, "test": {"blue": 160, "red": 6}})
    return root


def report(pixels, label="blue", **options):
    squares.synthetic({label: len(pixels)}, step="made", pixels={label: pixels})
    run = runs.start(experiment="exp", step="07_evaluate")
    made = data.load(run, step="made")
    return copy_detection.measure(data.load(run), made, ["blue", "red"], features.load("colour-texture"), **options)


def fresh(n, label="blue"):
    return [patterned(label, 50_000 + i) for i in range(n)]


def noisy(tile, seed):
    return (tile + np.random.default_rng(seed).normal(0, 4, tile.shape)).clip(0, 255).astype(np.uint8)


def real_training(study, label="blue"):
    tiles = data.training(data.load(runs.start(experiment="exp", step="look")), label)
    return list(data.pixels(tiles)), tiles["tile_id"].tolist()


def test_a_generator_of_new_pictures_passes_and_nothing_is_called_private(study):
    found = report(fresh(80))
    assert found.gates["blue"].state == "pass", found.gates
    assert (found.rows["low"] <= 0).all() and (found.rows["high"] < 0.05).all()
    (said,) = copy_detection.sentences(found)
    assert said.startswith("blue: no copies found by colour-texture and outline, which find 1") and "private" not in said
    assert all(share >= 0.95 for d in found.detectors["blue"] for kind, share in d.found.items() if kind in ("exact", "flip", "turn"))


def test_copies_turned_and_noisy_are_found_and_traced(study):
    real, names = real_training(study)
    copied = [noisy(np.rot90(real[i % 3]), i) for i in range(20)]
    found = report(fresh(60) + copied)
    gate = found.gates["blue"]
    assert gate.state == "blocked" and "more copies" in " ".join(gate.reasons) and "as near as copies are" in " ".join(gate.reasons)
    row = found.rows.set_index("space").loc["colour-texture"]
    assert row["copies"] == 20 and row["copied_training"] == pytest.approx(3 / 18) and row["most_copied"] in names[:3]
    assert row["low"] < 20 / 80 < row["high"] + 0.02
    assert set(found.pairs["nearest"]) == set(names[:3]) and len(found.pairs) <= closest_pairs.PAIRS
    assert found.pairs["rank"].is_monotonic_increasing
    for pair in found.pairs.head(4).itertuples():  # both distances are of the pair that is shown
        look = runs.start(experiment="exp", step="look")
        synthetic, tiles = data.load(look, step="made"), data.load(look)
        near = nearest_tiles.Nearest(data.training(tiles), features.load("colour-texture"))
        alone = cosine(near, synthetic[synthetic["tile_id"].eq(pair.tile_id)], tiles[tiles["tile_id"].eq(pair.nearest)], pair.other_space)
        assert pair.other_distance == pytest.approx(1 - alone[0], abs=1e-6)


def test_few_held_out_tiles_leave_it_uncalibrated_but_a_plain_copy_is_seen(study):
    assert report(fresh(10, "red"), "red").gates["red"].state == "uncalibrated"
    real, _ = real_training(study, "red")
    gate = report(fresh(9, "red") + [real[0]], "red").gates["red"]
    assert gate.state == "blocked" and "as copies are" in gate.reasons[0]


@pytest.mark.parametrize("kept_out", [[], ["blue"]], ids=["no class has one", "another class has some"])
def test_a_class_without_a_held_out_tile_is_uncalibrated_and_a_plain_copy_is_seen(study, kept_out):
    squares.dataset({"train": {"blue": 12, "red": 6}, "val": dict.fromkeys(kept_out, 40), "test": dict.fromkeys(kept_out, 40)})
    found = report(fresh(10, "red"), "red")
    assert found.gates["red"].state == "uncalibrated" and (found.rows["held_out"] == 0).all()
    assert len(copy_detection.table(found)) == 2 and "nan" not in copy_detection.table(found).to_string().lower()
    real, _ = real_training(study, "red")
    assert report(fresh(9, "red") + [real[0]], "red").gates["red"].state == "blocked"


def test_few_held_out_tiles_are_judged_by_the_ratio_test_which_shows_copies_and_rules_out_none(study):
    rows = report(fresh(40, "red"), "red")
    assert set(rows.rows["test"]) == {"ratio"} and (rows.rows["copies"] <= 2).all()
    assert rows.gates["red"].state == "uncalibrated" and rows.gates["red"].reasons[0] == copy_detection.memorisation.TOO_FEW
    real, names = real_training(study, "red")
    found = report(fresh(20, "red") + [noisy(np.rot90(real[i % 2]), i) for i in range(20)], "red")
    assert found.gates["red"].state == "blocked" and (found.rows["copies"] >= 20).all()
    assert copy_detection.table(found)["copies"].str.contains("by the ratio test").all()
    assert set(found.rows["most_copied"]) <= set(names)


def test_the_ratio_leaves_out_what_a_tile_shares_its_case_with(study):
    tiles = data.load(runs.start(experiment="exp", step="look"))
    training = data.training(tiles)
    near = nearest_tiles.Nearest(training, features.load("colour-texture"))
    around = tiles.groupby("label").sample(6, random_state=0).reset_index(drop=True)
    own, anyone = near.ratio(training, around), near.ratio(training.assign(case_id=""), around)
    for space in own:
        assert (anyone[space] < 1e-9).all(), "a training tile is its own nearest"
        for value, row in zip(own[space], training.to_dict("records"), strict=True):
            others, far = training[training["case_id"].ne(row["case_id"])], around[around["case_id"].ne(row["case_id"])]
            one = training[training["tile_id"].eq(row["tile_id"])]
            nearest, mean = (np.sort(1 - cosine(near, one, real, space))[:n].mean() for real, n in ((others, 1), (far, 6)))
            assert value == pytest.approx(nearest / mean, rel=1e-6)


def cosine(near, one, real, space):
    """Largest cosine of the 8 symmetries of one tile with each real tile."""
    if space == "outline":
        feats = features.embed(near.picture, real)
    else:
        feats = (features.embed(near.encoder, real) - near.mean) * near.weight
    feats = feats / np.linalg.norm(feats, axis=1, keepdims=True)
    return (near.views(one)[space][0] @ feats.T).max(axis=0)


def test_ranks_and_authentic_tiles_tell_a_copier_from_an_honest_generator(study):
    honest = report(fresh(60)).rows
    assert (honest["authentic"] - honest["authentic_real"]).abs().max() < 0.2 and honest["farther"].between(0.35, 0.65).all()
    assert (honest["p"] > 0.01).all()
    real, _ = real_training(study)
    copied = report([noisy(np.rot90(real[i % 12]), i) for i in range(60)])
    assert (copied.rows["authentic"] == 0).all() and (copied.rows["farther"] < 0.02).all() and (copied.rows["p"] < 1e-6).all()
    shown = copy_detection.rank_table(copied)
    assert list(shown["authentic"]) == ["0 %", "0 %"] and shown["C_T"].str.startswith("-").all()
    red = report(fresh(5, "red"), "red")
    assert red.rows["p"].notna().all(), "ten held-out tiles rank, though they do not calibrate"


def test_a_tile_whose_prompt_pulled_too_hard_is_shown_though_it_is_far(study):
    pixels, pulls = fresh(60), list(np.random.default_rng(0).normal(0.1, 0.005, 60).round(4))
    squares.synthetic({"blue": 60}, step="made", pixels={"blue": pixels})
    run = runs.start(experiment="exp", step="07_evaluate")
    made = data.load(run, step="made")
    near = nearest_tiles.Nearest(data.training(data.load(run)), features.load("colour-texture"))(made)
    far = int(np.argmax(np.minimum(*(np.argsort(np.argsort(one.distance)) for one in near.values()))))
    pulls[far] = 0.2
    made["scores"] = [json.dumps({"prompt_pull": float(pull)}) for pull in pulls]
    found = copy_detection.measure(data.load(run), made, ["blue"], features.load("colour-texture"))
    assert len(found.pairs) <= closest_pairs.PAIRS + closest_pairs.PULLED
    last = found.pairs.iloc[-1]
    assert last["tile_id"] == made["tile_id"][far] and last["rank"] >= closest_pairs.PAIRS
    shown = closest_pairs.captions(found.pairs)
    assert shown[-1].endswith("prompt pulled 0.200") and not any("pulled" in text for text in shown[:10])
    made["scores"] = ""
    unknown = copy_detection.measure(data.load(run), made, ["blue"], features.load("colour-texture"))
    assert len(unknown.pairs) == closest_pairs.PAIRS and unknown.pairs["pull"].isna().all()


def test_a_source_of_another_class_counts_as_something_to_copy(study):
    squares.synthetic({"blue": 3}, step="made", sources=json.dumps(["train/red/0.png"]))
    run = runs.start(experiment="exp", step="07_evaluate")
    learned = copy_detection._learned(data.load(run), data.load(run, step="made"), ["blue"])
    assert len(learned) == 13 and "train/red/0.png" in set(learned["tile_id"])


def test_the_report_is_strict_json_and_a_table(study):
    found = report(fresh(30))
    files.dumps(found.plain())
    table = copy_detection.table(found)
    assert table["copies"].str.contains("expected").all() and len(table) == 2
    run = runs.start(experiment="exp", step="none")
    none = copy_detection.measure(data.load(run), data.load(run, step="made").head(0), ["blue"], features.load("colour-texture"))
    assert none.gates == {} and len(none.pairs) == len(copy_detection.table(none)) == 0
