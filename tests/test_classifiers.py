"""Classifiers, arms and trials on plain coloured tiles."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import squares
import torch

from histokit import runs, toy
from histokit.arms import ceilings, comparison, fit_classifier, longtail, trials
from histokit.core import files
from histokit.diffusion import backbone, codecs
from histokit.tiles import data, decode
from histokit.vision import classifiers, encoders, features


@pytest.fixture
def study(root):
    """A finished 00_dataset of three colours, five tiles each in train, val and test."""
    squares.dataset()
    return root


def compare(arms, seeds=1, steps=12, say=lambda text: None, step="06_classifier", experiment="exp", **given):
    """Run the cells of 06 on the study; returns the run (still open) and the table of trials."""
    run = runs.start(experiment=experiment, step=step, arms=arms, seeds=seeds, steps=steps, **given)
    tiles = data.load(run)
    settled = comparison.settle(arms, encoder="colour-texture")
    sets = comparison.assemble(run, tiles, settled)
    table = trials.train(run, settled, sets, tiles, seeds=seeds, steps=steps, batch_size=6, say=say, **given)
    return run, table


def predictions(run, arm, seed=0):
    return files.read_table(run.folder / arm / str(seed) / "predictions.parquet")


def separable(n=40, n_classes=3):
    """Features [3 n, 1, 4] in three well separated groups, and their targets."""
    targets = torch.arange(n_classes).repeat(n)
    return (torch.eye(4)[targets] * 4 + torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(0)))[:, None].numpy(), targets


def plain(n_classes=3, **settings):
    """Cross-entropy of classes that are all alike, the last one called rare."""
    return longtail.Objective([10] * n_classes, torch.full((n_classes,), 1 / n_classes), [False] * (n_classes - 1) + [True], **settings)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_the_linear_head_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    feats, targets = separable()
    feats += np.random.default_rng(0).normal(0, 2, feats.shape).astype(np.float32)
    head = classifiers.Linear(4, 3)
    head.standardise(torch.from_numpy(feats[:, 0]))
    batches = torch.arange(len(targets)).repeat(300, 1)  # full batches: both solve the same convex problem
    fit_classifier.fit_head(head, feats, targets, batches, plain(), lr=0.1, generator=torch.Generator().manual_seed(0), weight_decay=0.0)
    x = ((feats[:, 0] - feats[:, 0].mean(0)) / feats[:, 0].std(0)).astype(np.float64)
    theirs = LogisticRegression(C=1e6, max_iter=1000).fit(x, targets.numpy()).predict_proba(x)
    ours = classifiers.probabilities(head(torch.from_numpy(feats[:, 0])).detach())
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_the_best_check_on_validation_tiles_is_kept():
    feats, targets = separable()
    head = classifiers.Linear(4, 3)
    batches = torch.arange(len(targets)).repeat(40, 1)
    wrong = feats[:, 0], (targets + 1) % 3  # the more is learned, the worse the validation tiles do
    history = fit_classifier.fit_head(head, feats, targets, batches, plain(), lr=0.5, generator=torch.Generator().manual_seed(0), val=wrong)
    found = fit_classifier.balanced_accuracy(head(torch.from_numpy(feats[:, 0])), wrong[1])
    assert found == history["val_balanced_accuracy"].max()
    assert history.attrs["best_step"] < 40


def test_neighbours_and_prototypes_find_separated_groups_and_never_name_an_unseen_class():
    feats, targets = separable()
    for kind in (classifiers.Neighbours, classifiers.Prototype):
        head = kind(4, 5).fit(torch.from_numpy(feats[:, 0]), targets, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0]))
        found = head(torch.from_numpy(feats[:, 0])).softmax(dim=1)
        assert (found.argmax(dim=1) == targets).float().mean() > 0.95
        assert found[:, 3:].max() == 0 and torch.isfinite(found).all()


def test_balanced_neighbours_let_a_rare_class_speak():
    near = torch.zeros(21, 2)
    near[:, 0] = 1.0
    feats, targets = torch.cat([near, -near]), torch.tensor([0] * 15 + [1] * 6 + [2] * 21)
    natural = classifiers.Neighbours(2, 3).fit(feats, targets, torch.tensor([15, 6, 21]) / 42)
    balanced = classifiers.Neighbours(2, 3).fit(feats, targets, torch.tensor([1, 1, 1]) / 3)
    assert natural(near[:1]).argmax() == 0
    shares = balanced(near[:1]).softmax(dim=1)[0]
    assert shares[1] > 0.45  # six tiles weigh as much as fifteen


def test_temperature_undoes_a_known_scaling():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]  # calibrated by construction
    for scale in (0.5, 1.0, 3.0):
        assert fit_classifier.fit_temperature(scale * logits, targets) == pytest.approx(scale, rel=0.1)
    assert fit_classifier.fit_temperature(logits[:0], targets[:0]) == 1.0
    certain = torch.eye(3) * 9
    assert 0.9 < fit_classifier.fit_temperature(certain, torch.arange(3)) <= 1  # three right answers prove little


def test_balanced_accuracy_is_scikit_learns_over_the_classes_that_occur():
    from sklearn.metrics import balanced_accuracy_score

    logits, targets = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3  # class 3 has no tile
    ours = fit_classifier.balanced_accuracy(logits, targets)
    known = logits.argmax(dim=1).numpy()
    recalls = [(known[targets == c] == c).mean() for c in range(3)]
    assert ours == pytest.approx(np.mean(recalls))
    with pytest.warns(UserWarning, match="y_pred"):
        assert ours == pytest.approx(balanced_accuracy_score(targets.numpy(), known))
    assert np.isnan(fit_classifier.balanced_accuracy(logits[:0], targets[:0]))


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({}, "no arm to train"),
        ({"a": {"sampling": "balanced"}}, "no setting 'sampling'; did you mean sampler"),
        ({"a": {"sampler": "blanced"}}, "did you mean balanced"),
        ({"../a": {}}, "becomes a folder name"),
        ({"logs": {}}, "and not logs"),
        ({"a": {"per_class": 1.5, "synthetic": "keep"}}, "whole number"),
        ({"a": {"recolour": "reinhard"}}, "recolour needs per_class"),
        ({"a": {"recolour": "reinhard", "per_class": 9, "synthetic": "keep"}}, "it stands without synthetic ones"),
        ({"a": {"real_tiles": -1}}, "real_tiles is -1; expected a whole number, 0 for the budget's"),
        ({"a": {"labels": "shuffled"}}, "labels does nothing in an arm without synthetic tiles"),
        ({"a": {"mode": "knn", "loss": "logit_adjustment"}}, "loss does nothing in mode knn"),
        ({"a": {"synthetic_share": 0.5}}, "synthetic_share does nothing in an arm without synthetic tiles"),
        (
            {"a": {"synthetic": "keep", "synthetic_share": 0.5, "mode": "knn", "sampler": "balanced"}},
            "synthetic_share does nothing in mode knn",
        ),
        ({"a": {"synthetic": "keep", "synthetic_share": 0.5}}, "acts where classes are drawn; set sampler: balanced"),
        ({"a": {"synthetic": "keep", "synthetic_share": 50, "sampler": "balanced"}}, "expected more than 0 and at most 1"),
        ({"a": {"synthetic": "keep", "synthetic_share": 0, "sampler": "balanced"}}, "expected more than 0 and at most 1"),
    ],
)
def test_a_wrong_arm_is_named_before_anything_runs(arms, words):
    with pytest.raises(ValueError, match=words):
        comparison.settle(arms)


def test_doses_nest_and_rejected_tiles_stay_out(study):
    squares.synthetic({"blue": 8, "red": 3}, step="keep")
    run = runs.start(experiment="exp", step="06_classifier")
    tiles = data.load(run)
    arms = {f"dose {n}".replace(" ", "-"): {"synthetic": "keep", "per_class": n} for n in (2, 5, 0)}
    sets = comparison.assemble(run, tiles, comparison.settle({**arms, "none": {"synthetic": "keep", "status": "rejected"}}))
    chosen = [set(sets[name].query("source == 'synthetic'")["tile_id"]) for name in arms]
    assert [len(part) for part in chosen] == [4, 8, 11]
    assert chosen[0] < chosen[1] < chosen[2]
    assert sets["none"]["source"].eq("real").all()
    said = comparison.remarks(comparison.settle({"none": {"synthetic": "keep", "status": "rejected"}}), sets, tiles)
    assert said == ["Arm none: keep has no rejected tile, so it was trained on real tiles alone."]


def test_the_curve_of_real_tiles_nests_and_lends_from_the_withheld():
    rows = [("a", "red", "labelled", "train")] * 3 + [("b", "blue", "labelled", "train")] * 3 + [("c", "blue", "withheld", "train")] * 4
    rows += [("d", "blue", "labelled", "test")]
    tiles = pd.DataFrame(rows, columns=["case_id", "label", "use", "split"]).assign(source="real")
    tiles["tile_id"] = [str(i) for i in range(len(tiles))]
    sets = {n: ceilings.real_tiles(tiles, n) for n in (0, 2, 3, 5, 7)}
    chosen = {n: set(part.loc[part["label"].eq("blue"), "tile_id"]) for n, part in sets.items()}
    assert [len(part) for part in chosen.values()] == [3, 2, 3, 5, 7]
    assert chosen[2] < chosen[3] == chosen[0] < chosen[5] < chosen[7]
    assert all(part["label"].eq("red").sum() == 3 and part["use"].eq("labelled").all() for part in sets.values())
    with pytest.raises(ValueError, match="real_tiles 8: blue has 7 training tiles with those withheld"):
        ceilings.real_tiles(tiles, 8)
    with pytest.raises(ValueError, match="a class that a budget makes rare"):
        ceilings.real_tiles(tiles[tiles["use"].eq("labelled")], 2)


def test_a_ceiling_gives_tiles_of_the_same_cases_or_of_others():
    rows = [("b", "blue", "labelled")] * 2 + [("b", "blue", "withheld")] * 3 + [("c", "blue", "withheld")] * 4
    tiles = pd.DataFrame(rows, columns=["case_id", "label", "use"]).assign(source="real", split="train")
    tiles["tile_id"] = [str(i) for i in range(len(tiles))]
    for whose, cases in (("same_cases", {"b"}), ("new_cases", {"c"})):
        given = ceilings.real_tiles(tiles, 5, whose)[lambda part: part["given"]]
        assert len(given) == 3 and set(given["case_id"]) == cases and given["use"].eq("labelled").all()
    with pytest.raises(ValueError, match="real_tiles 6: blue has 5 training tiles with those withheld of same cases"):
        ceilings.real_tiles(tiles, 6, "same_cases")


def test_of_invented_tissue_a_ceiling_is_drawn_anew(root):
    run = runs.start(experiment="exp", step="06_classifier")
    own = pd.DataFrame({"label": ["mucinous"] * 3, "case_id": ["C001", "C001", "C002"], "tile_id": list("abc"), "sha256": list("abc")})
    own = own.assign(source="real", split="train", use="labelled", root="data", file_name="a.png", path="a.png")
    dataset = SimpleNamespace(tail=["mucinous"])
    few, more = (ceilings.real_tiles(own, n, "same_cases", ceilings.Drawn(run, dataset)).query("given") for n in (5, 8))
    assert more["case_id"].tolist() == ["C001", "C002"] * 2 + ["C001"] and few["sha256"].tolist() == more["sha256"].tolist()[:2]
    assert more["sha256"].nunique() == 5 and more["root"].eq("06_classifier").all()
    others = ceilings.real_tiles(own, 8, "new_cases", ceilings.Drawn(run, dataset)).query("given")
    assert others["case_id"].tolist() == ["X001"] * 3 + ["X002"] * 2
    np.testing.assert_array_equal(decode.rgb(run.path(more["file_name"].iloc[2]))[0], toy.tile("mucinous", "C001", 1001)[0])


def test_what_is_given_back_goes_through_the_autoencoder_and_what_is_own_does_not():
    tiles = pd.DataFrame({"source": ["real", "real", "synthetic"], "given": [False, True, np.nan]})
    asked = [("none", "none"), ("none", "vae"), ("vae", "none")]
    coded = [trials._Trial._coded(SimpleNamespace(arm={"real_through": real, "through": given}), tiles).tolist() for real, given in asked]
    assert coded == [[False] * 3, [False, True, False], [True, True, False]]


def test_a_tile_made_from_a_test_tile_is_refused(study):
    squares.synthetic({"blue": 1}, step="leak", sources='["test/blue/0.png"]')
    squares.synthetic({"violet": 1}, step="strange", pixels={"violet": [squares.tile("red", 0)]})
    run = runs.start(experiment="exp", step="06_classifier")
    tiles = data.load(run)
    with pytest.raises(ValueError, match=r"made from 'test/blue/0\.png', a validation, test or withheld tile"):
        comparison.assemble(run, tiles, comparison.settle({"a": {"synthetic": "leak"}}))
    with pytest.raises(ValueError, match="class 'violet'"):
        comparison.assemble(run, tiles, comparison.settle({"a": {"synthetic": "strange"}}))


# --- trials ----------------------------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_number_of_optimiser_updates(study, monkeypatch):
    squares.synthetic({"blue": 9}, step="keep")
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (taken.append(1), step(self, *a, **k))[1])
    arms = {"real": {}, "balanced": {"sampler": "balanced"}, "augmented": {"synthetic": "keep"}, "near": {"mode": "knn"}}
    counted = []
    _, table = compare(arms, say=lambda text: (counted.append(len(taken)), taken.clear()))
    assert counted == [12, 12, 12, 0]
    assert table.set_index("arm")["updates"].to_dict() == {"real": 12, "balanced": 12, "augmented": 12, "near": 0}
    assert table[table["updates"].gt(0)]["images_seen"].eq(12 * 6).all()
    with pytest.raises(RuntimeError, match="not trained alike"):
        trials.check_equal_updates(table.assign(updates=[12, 12, 31, 0]))


def test_a_class_missing_among_synthetic_tiles_keeps_all_label_ids(study):
    squares.synthetic({"blue": 4}, step="keep")  # neither red nor green
    run, _ = compare({"augmented": {"synthetic": "keep"}}, steps=60)
    table = predictions(run, "augmented")
    assert list(table.filter(like="p_")) == ["p_red", "p_green", "p_blue"]
    assert table.groupby(table["tile_id"].str.split("/").str[1])["y"].unique().map(list).to_dict() == {
        "red": [0],
        "green": [1],
        "blue": [2],
    }
    assert (table.filter(like="p_").to_numpy().argmax(axis=1) == table["y"]).all()
    assert set(table["split"]) == {"val", "test"} and (table[["arm", "seed", "gen_seed"]] == ["augmented", 0, 0]).all(axis=None)
    np.testing.assert_allclose(table.filter(like="p_").sum(axis=1), 1, atol=1e-5)


def test_predictions_of_a_replicate_carry_its_generator_seed(study):
    run, _ = compare({"near": {"mode": "knn"}}, experiment="exp-g2")
    assert predictions(run, "near")["gen_seed"].eq(2).all()


def test_a_finished_pair_is_never_trained_twice(study, monkeypatch):
    squares.synthetic({"blue": 4}, step="keep")
    run, first = compare({"real": {}, "augmented": {"synthetic": "keep"}}, seeds=2)
    whole = run.folder / "augmented" / "1" / "model.json"
    written = whole.read_bytes()
    whole.unlink()  # as if killed before it was whole
    settled, tiles = comparison.settle({"real": {}, "augmented": {"synthetic": "keep"}}, encoder="colour-texture"), data.load(run)
    sets = comparison.assemble(run, tiles, settled)
    again = trials.train(run, settled, sets, tiles, seeds=2, steps=12, batch_size=6)
    assert again["reused"].tolist() == [True, True, True, False]
    assert whole.read_bytes() == written  # no time of day in what later steps depend on
    pd.testing.assert_series_equal(first["temperature"], again["temperature"])
    before = predictions(run, "real")
    run.finish({})

    run, third = compare({"real": {}, "more": {"sampler": "balanced"}}, seeds=2)  # another recipe: the folder is set aside
    assert third["reused"].tolist() == [True, True, False, False]
    pd.testing.assert_frame_equal(predictions(run, "real"), before)
    longer = trials.train(run, settled, {**sets}, tiles, seeds=1, steps=13, batch_size=6)
    assert not longer["reused"].any()


def test_a_share_bounds_what_wrong_synthetic_tiles_can_do(study):
    """Forty pictures of red called blue, beside the real blue ones: red tiles are called blue by as much as the share lets them."""
    squares.synthetic({"blue": 40}, step="keep", pixels={"blue": [squares.tile("red", 100 + i) for i in range(40)]})
    arm = {"synthetic": "keep", "sampler": "balanced"}
    run, _ = compare({"all": arm, "few": {**arm, "synthetic_share": 0.1}, "whole": {**arm, "synthetic_share": 1.0}}, steps=200)
    red = {name: predictions(run, name).query("y == 0")["p_red"].mean() for name in ("all", "few", "whole")}
    assert red["all"] == red["whole"] < 0.7 < 0.85 < red["few"]


def test_one_changed_tile_makes_its_arm_train_again(study):
    squares.synthetic({"blue": 4}, step="keep")
    run, _ = compare({"real": {}, "augmented": {"synthetic": "keep"}})
    run.finish({})
    squares.synthetic({"blue": 4}, step="keep", pixels={"blue": [squares.tile("blue", 77 + i) for i in range(4)]})
    _, table = compare({"real": {}, "augmented": {"synthetic": "keep"}})
    assert table["reused"].tolist() == [True, False]


def test_the_same_seed_starts_every_arm_alike(study):
    run, _ = compare({"one": {}, "same": {}}, seeds=2)
    pd.testing.assert_frame_equal(predictions(run, "one").drop(columns="arm"), predictions(run, "same").drop(columns="arm"))
    weights = [files.read_tensors(run.folder / "one" / str(s) / "model.safetensors")["head.out.weight"] for s in range(2)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("mode", ["linear", "head", "knn", "prototype"])
def test_a_saved_model_predicts_the_same_from_anywhere(study, mode):
    run, _ = compare({"a": {"mode": mode, "augment": "none"}}, steps=40)
    loaded = classifiers.load(run.folder / "a" / "0")
    written = predictions(run, "a")
    tiles = data.load(run).set_index("tile_id", drop=False).loc[written["tile_id"]]
    np.testing.assert_allclose(loaded.predict_tiles(tiles), written.filter(like="p_"), atol=1e-6)
    np.testing.assert_allclose(loaded.predict(data.pixels(tiles)), written.filter(like="p_"), atol=1e-3)  # without the cache
    assert loaded.classes == squares.CLASSES and loaded.transform["tile_px"] == squares.PX
    facts = files.read_json(run.folder / "a" / "0" / "model.json")
    facts["encoder_identity"]["weights"] = "other"
    files.write_json(run.folder / "a" / "0" / "model.json", facts)
    with pytest.raises(ValueError, match=r"fitted on another 'colour-texture' \(its weights differs\)"):
        classifiers.load(run.folder / "a" / "0")


def test_a_network_trained_end_to_end_loads_and_can_steer(study, monkeypatch):
    monkeypatch.setattr(encoders, "SmallCNN", Pocket)
    run, table = compare({"full": {"mode": "full", "encoder": "cnn", "augment": "stain"}}, steps=6)
    assert table["updates"].tolist() == [6] and table["val_balanced_accuracy"].notna().all()
    written = predictions(run, "full")
    loaded = classifiers.load(run.folder / "full" / "0")
    tiles = data.load(run).set_index("tile_id", drop=False).loc[written["tile_id"]]
    np.testing.assert_allclose(loaded.predict_tiles(tiles), written.filter(like="p_"), atol=1e-6)
    assert loaded(data.to_float(data.pixels(tiles.head(2))).requires_grad_()).requires_grad
    assert not list(run.folder.rglob("checkpoint.safetensors"))  # model.safetensors holds the result


def test_tiles_too_many_for_memory_are_read_batch_by_batch_and_teach_the_same(study, monkeypatch):
    monkeypatch.setattr(encoders, "SmallCNN", Pocket)
    arms, sizes, read = {"full": {"mode": "full", "encoder": "cnn"}}, [], data.pixels
    monkeypatch.setattr(data, "pixels", lambda tiles, *size: sizes.append(len(tiles)) or read(tiles, *size))
    held, at_once = predictions(compare(arms, steps=7)[0], "full"), list(sizes)
    sizes.clear()
    monkeypatch.setattr(trials, "HELD", 0)
    streamed = predictions(compare(arms, steps=7, step="streamed")[0], "full")
    np.testing.assert_array_equal(held.filter(like="p_"), streamed.filter(like="p_"))
    assert at_once.count(6) == 0 and sizes.count(6) == 7 + 4 * 8, "one read for each update, four for the batch statistics of each check"


def test_training_end_to_end_resumes_to_the_same_bits(root, monkeypatch):
    pixels = np.stack([squares.tile(name, i) for i in range(6) for name in squares.CLASSES])
    targets = torch.arange(18) % 3
    batches = longtail.draws(targets, 3, 6, 5, torch.Generator().manual_seed(0))

    def train(folder):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = classifiers.Classifier(features.Encoder("pocket", Pocket(), 256, {}), squares.CLASSES, "full")
        how = {"lr": 1e-2, "seed": 3, "folder": folder, "val": (lambda rows: pixels[rows], targets[:6]), "jitter": True}
        history = fit_classifier.fit_full(model, lambda rows: pixels[rows], targets, batches, plain(), **how)
        return model.state_dict(), history["val_balanced_accuracy"].dropna().tolist()

    whole, curve = train(root / "whole")
    write, written = files.write_tensors, []

    def dies(path, *args):
        written.append(path.name)
        if written.count("checkpoint.safetensors") == 3:
            raise KeyboardInterrupt
        return write(path, *args)

    monkeypatch.setattr(files, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        train(root / "broken")
    monkeypatch.setattr(files, "write_tensors", write)
    resumed, again = train(root / "broken")
    assert again == curve
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


class Pocket(torch.nn.Module):
    """A network of one convolution with batch statistics, in place of the small CNN."""

    def __init__(self, dim=256):
        super().__init__()
        self.conv, self.norm, self.out = torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, dim)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


def test_a_class_without_validation_tiles_is_said_and_handled(study):
    squares.dataset({"train": {"red": 4, "green": 4, "blue": 4}, "val": {"red": 2, "green": 2}, "test": {"red": 2, "blue": 2}}, "thin")
    run = runs.start(experiment="thin", step="06_classifier")
    tiles = data.load(run)
    arms = comparison.settle({"a": {}}, encoder="colour-texture")
    sets = comparison.assemble(run, tiles, arms)
    assert comparison.remarks(arms, sets, tiles) == ["No validation tile of blue: these classes had no say in which weights were kept."]
    table = trials.train(run, arms, sets, tiles, seeds=1, steps=20, batch_size=6)
    assert table["val_balanced_accuracy"].between(0, 1).all()
    no_val = tiles[tiles["split"].ne("val")]
    assert "no validation tile" in comparison.remarks(arms, sets, no_val)[0]
    table = trials.train(run, arms, sets, no_val, seeds=1, steps=20, batch_size=6)
    assert table["val_balanced_accuracy"].isna().all() and table["temperature"].eq(1).all()


def test_shuffled_labels_keep_real_ones_and_counts_and_none_is_right(study, monkeypatch):
    squares.synthetic({"blue": 5, "red": 5}, step="keep")
    drawn, spy = [], longtail.draws
    monkeypatch.setattr(longtail, "draws", lambda targets, *rest: drawn.append(targets) or spy(targets, *rest))
    run, _ = compare({"own": {"synthetic": "keep"}, "shuffled": {"synthetic": "keep", "labels": "shuffled"}}, steps=12)
    assert torch.equal(drawn[0][:15], drawn[1][:15]) and (drawn[0][15:] != drawn[1][15:]).all() and len(drawn[0]) == 25
    facts = [files.read_json(run.folder / arm / "0" / "model.json") for arm in ("own", "shuffled")]
    assert facts[0]["class_counts"] == facts[1]["class_counts"] == [10, 5, 10]
    assert not np.allclose(*(predictions(run, arm).filter(like="p_") for arm in ("own", "shuffled")))


def test_real_training_tiles_can_pass_through_the_autoencoder(study, monkeypatch):
    from tiny import tiny_model

    monkeypatch.setattr(backbone, "load", lambda name, device, tiles: tiny_model())
    codec = codecs.VaeRoundTrip(tiny_model(), 64)
    tiles = data.load(runs.start(experiment="exp", step="look")).head(5)
    pixels = data.pixels(tiles, codec.reads_px)
    assert codec(pixels).shape == (5, 64, 64, 3) and codec(pixels).dtype == np.uint8 and len(codec(pixels[:0])) == 0
    before, calls = codec(pixels), []
    monkeypatch.setattr(codec, "_trip", lambda part: calls.append(len(part)) or type(codec)._trip(codec, part))
    np.testing.assert_array_equal(codec(pixels[::-1]), before[::-1])
    assert not calls, "what went through before is kept"
    shutil.rmtree(files.cache("coded"))
    np.testing.assert_array_equal(before[3], codec(pixels[[3, 3]])[1])  # neighbours do not matter
    assert calls == [1], "a tile that is asked for twice goes through once"
    codec._made_of = [*codec._made_of, "another decoder"]
    codec(pixels[:1])
    assert calls == [1, 1]
    run, _ = compare({"raw": {}, "coded": {"real_through": "vae"}}, base_model="tiny")
    assert not np.allclose(*(predictions(run, arm).filter(like="p_") for arm in ("raw", "coded")))


def test_a_coded_real_tile_is_what_a_synthetic_one_of_strength_0_is(study, tmp_path):
    from tiny import tiny_model

    from histokit.generate import img2img

    model = tiny_model()  # 32 px tiles, for a dataset of 64
    run = runs.start(experiment="exp", step="still", class_name="blue")
    tiles = data.load(run)
    still = {"strength": 0, "num_inference_steps": 4, "guidance_scale": 1.0}
    table = img2img.job_table(model, tiles, {"blue": "blue"}, 3, **still)
    made = img2img.render(model, table, run, tiles)
    codec = codecs.VaeRoundTrip(model, 64)
    sources = tiles.set_index("tile_id", drop=False).loc[table["tile_id"]]
    coded = codec(data.pixels(sources, codec.reads_px))
    assert abs(coded.astype(int) - data.pixels(made, 64).astype(int)).max() <= 1


def test_a_small_network_of_another_width_is_found_again(study, tmp_path):
    torch.manual_seed(0)
    net = encoders.SmallCNN(24)
    files.write_tensors(tmp_path / "ssl.safetensors", net.state_dict(), {"dim": "24", "size": "64"})
    encoder = features.load(f"cnn@{tmp_path / 'ssl.safetensors'}", frozen=False)
    model = classifiers.Classifier(encoder, ["a", "b"], "full")
    model.save(tmp_path / "model")
    pixels = np.stack([squares.tile("red", i) for i in range(3)])
    np.testing.assert_allclose(classifiers.load(tmp_path / "model").predict(pixels), model.predict(pixels), atol=1e-6)


def test_an_arm_of_tiles_from_other_classes_that_nobody_judged_is_said(study):
    borrowed = '{"source_class": "red"}'
    squares.synthetic({"blue": 3}, step="raw", settings=borrowed)
    squares.synthetic({"blue": 3}, step="judged", settings=borrowed, scores='{"judge": 0.4}')
    squares.synthetic({"blue": 3}, step="own", settings='{"source_class": "blue"}')
    run = runs.start(experiment="exp", step="06_classifier")
    tiles = data.load(run)
    arms = comparison.settle({name: {"synthetic": name} for name in ("raw", "judged", "own")}, encoder="colour-texture")
    (said,) = comparison.remarks(arms, comparison.assemble(run, tiles, arms), tiles)
    assert said.startswith("Arm raw: 3 synthetic tiles were made from tiles of another class")


def test_a_step_that_lists_a_tile_twice_is_refused(study):
    squares.synthetic({"blue": 2}, step="keep", class_name="blue", tile_id="keep/same")
    run = runs.start(experiment="exp", step="06_classifier")
    with pytest.raises(ValueError, match=r"keep lists keep/same twice \(1 such\)"):
        comparison.assemble(run, data.load(run), comparison.settle({"a": {"synthetic": "keep"}}, encoder="colour-texture"))


def test_one_class_of_a_step_that_made_all_of_them(study):
    squares.synthetic({"blue": 2, "red": 3}, step="made", class_name="all")
    run = runs.start(experiment="exp", step="keep", class_name="blue")
    assert data.load(run, step="made", class_name="blue")["label"].tolist() == ["blue", "blue"]
    assert len(data.load(run, step="made", class_name="all")) == len(data.load(run, step="made")) == 5


def test_predictions_carry_the_group_of_a_tile(study):
    run, _ = compare({"a": {}})
    assert "group" in predictions(run, "a")


# --- tiles from elsewhere --------------------------------------------------------------------------------------------


def elsewhere(labels=("red", "blue"), noise=12, copied=False):
    """A second finished 00_dataset, `house`, of other tiles and sizes."""
    folder, rows = files.root() / "other", []
    for i, name in enumerate(labels):
        for k in range(4):
            facts = {"root": "data", "label": name, "split": ("train", "test")[k % 2], "case_id": f"train-{name}-0", "source": "real"}
            pixels = squares.tile(squares.CLASSES[i % 3] if name not in squares.COLOURS else name, 7000 + 10 * i + k, noise)
            rows.append(squares.row(folder, f"{name}-{k}.png", squares.tile("red", 0) if copied else pixels, **facts))
    run = runs.start(experiment="exp", step="house")
    frozen = files.read_json(files.root() / "outputs/exp/00_dataset/dataset.json")
    files.write_json(run.path("dataset.json"), frozen | {"name": "other house", "root": "other", "tile_px": 48, "classes": list(labels)})
    run.finish(pd.DataFrame(rows))


def test_tiles_from_elsewhere_are_predicted_and_change_nothing_else(study):
    elsewhere()
    run, _ = compare({"real": {}})
    tiles, settled = data.load(run), comparison.settle({"real": {}}, encoder="colour-texture")
    other = comparison.external(run, "house", tiles)
    assert len(other) == 8 and other["split"].eq("external").all() and other["case_id"].str.startswith("house/").all()
    before = predictions(run, "real").set_index("tile_id")
    trials.train(run, settled, comparison.assemble(run, tiles, settled), tiles, seeds=1, steps=12, batch_size=6, external=other)
    after = predictions(run, "real").set_index("tile_id")
    assert set(after.index) - set(before.index) == set(other["tile_id"])
    pd.testing.assert_frame_equal(after.loc[before.index], before)
    there = after[after["split"].eq("external")]
    assert (there[[f"p_{c}" for c in squares.CLASSES]].to_numpy().argmax(1) == there["y"]).all(), "plain colours are easy anywhere"


def test_tiles_from_elsewhere_that_do_not_fit_are_refused(study):
    run = runs.start(experiment="exp", step="06_classifier")
    tiles = data.load(run)
    assert comparison.external(run, "", tiles).empty
    elsewhere(labels=("red", "violet"))
    with pytest.raises(ValueError, match="house has the class 'violet', which this dataset does not have"):
        comparison.external(run, "house", tiles)


def test_a_tile_of_this_dataset_is_not_from_elsewhere(study):
    elsewhere(labels=("red",), copied=True)
    run = runs.start(experiment="exp", step="06_classifier")
    tiles = data.load(run)
    tiles.loc[0, "sha256"] = files.sha256(files.root() / "other" / "red-0.png")
    with pytest.raises(ValueError, match=r"house: 'red-0\.png' is a tile of this dataset too"):
        comparison.external(run, "house", tiles)


def test_an_arm_is_described_by_what_sets_it_apart_from_the_baseline():
    arms = {"real": {}, "over": {"sampler": "balanced"}, "made": {"sampler": "balanced", "synthetic": "keep", "per_class": 10}}
    assert comparison.described(arms) == {"real": "", "over": "sampler balanced", "made": "keep, 10 a class, sampler balanced"}
    assert comparison.described(arms, "over") == {"real": "sampler natural", "over": "", "made": "keep, 10 a class"}


# --- few tiles ---------------------------------------------------------------------------------------------------------


def test_ldam_leaves_its_scale_in_the_checkpoint_and_in_every_probability(study):
    run, _ = compare({"plain": {}, "ldam": {"loss": "ldam", "weights": "effective", "drw": 0.5}}, steps=30)
    for name, scale in (("plain", 1.0), ("ldam", 30.0)):
        model, written = classifiers.load(run.folder / name / "0"), predictions(run, name)
        assert model.facts["scale"] == scale
        tiles = data.load(run).set_index("tile_id", drop=False).loc[written["tile_id"]]
        feats = torch.from_numpy(np.array(features.embed(model.encoder, tiles)))
        by_hand = (scale * model.head(feats) / model.temperature).double().softmax(dim=1)
        np.testing.assert_allclose(written.filter(like="p_"), by_hand, atol=1e-6)
    assert model.facts["settings"]["drw"] == 0.5 and model.facts["settings"]["weights"] == "effective"


def test_tau_normalisation_leaves_rows_of_one_length_and_no_bias(study):
    run, _ = compare(
        {"tau": {"mode": "head", "decouple": "tau_norm"}, "half": {"mode": "head", "decouple": "tau_norm", "options": {"tau_norm": 0.5}}}
    )
    whole, half = (classifiers.load(run.folder / name / "0").last for name in ("tau", "half"))
    torch.testing.assert_close(whole.weight.norm(dim=1), torch.ones(3))
    assert not whole.bias.any() and (half.weight.norm(dim=1) - 1).abs().min() > 0.05


@pytest.mark.parametrize("mode", ["head", "full"])
def test_crt_trains_a_new_last_layer_on_balanced_batches_and_nothing_else(study, monkeypatch, mode):
    monkeypatch.setattr(encoders, "SmallCNN", Pocket)
    squares.dataset({"train": {"red": 12, "green": 12, "blue": 2}, "val": dict.fromkeys(squares.CLASSES, 3), "test": {}}, "exp")
    stages, asked = [], longtail.draws

    def draws(targets, n, count, size, generator, sampler, *limit):
        batches = asked(targets, n, count, size, generator, sampler, *limit)
        stages.append((count, sampler))
        return batches

    monkeypatch.setattr(longtail, "draws", draws)
    before, spy = [], trials._Trial._new_head
    monkeypatch.setattr(trials._Trial, "_new_head", lambda self, model, seed: (before.append(states(model)), spy(self, model, seed)))
    arm = {"mode": mode, "decouple": "crt", "options": {"crt": 0.5}} | ({"encoder": "cnn"} if mode == "full" else {})
    run, table = compare({"crt": arm}, steps=20)
    assert stages == [(10, "natural"), (10, "balanced")] and table["updates"].tolist() == [20]
    now = states(classifiers.load(run.folder / "crt" / "0"))
    last = {"head.out.weight", "head.out.bias"} if mode == "full" else {"head.out.3.weight", "head.out.3.bias"}
    assert {key for key, value in before[0].items() if not torch.equal(value, now[key])} == last
    history = files.read_table(run.folder / "crt" / "0" / "history.csv")
    assert history["step"].is_monotonic_increasing and history["step"].max() == 20


def states(model):
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("encoder.")}


def test_every_setting_of_an_arm_changes_what_is_learned(study):
    squares.dataset({"train": {"red": 12, "green": 12, "blue": 2}, "val": dict.fromkeys(squares.CLASSES, 3), "test": {"red": 2}}, "exp")
    arms = {
        "plain": {},
        "focal": {"loss": "focal"},
        "ldam": {"loss": "ldam"},
        "adjusted": {"loss": "logit_adjustment"},
        "weighed": {"weights": "balanced"},
        "over_tiles": {"weights": "balanced", "options": {"mean": "tiles"}},
        "deferred": {"weights": "balanced", "drw": 0.5},
        "coarse": {"coarse": 1.0},
        "mixup": {"mixture": "mixup"},
        "balanced_mixup": {"mixture": "balanced"},
    }
    run, _ = compare(arms, steps=40)
    found = {name: classifiers.load(run.folder / name / "0").last.weight for name in arms}
    for i, one in enumerate(found):
        for other in list(found)[i + 1 :]:
            assert not torch.allclose(found[one], found[other], rtol=1e-3, atol=1e-4), (one, other)


def test_the_score_that_pays_for_missed_rare_tiles_is_head_recall_less_the_share_missed():
    tail, targets = [False, False, True], torch.tensor([0] * 10 + [1] * 10 + [2] * 4)
    logits = torch.nn.functional.one_hot(targets, 3) * 9.0
    assert fit_classifier.score("head_minus_missed", logits, targets, tail) == pytest.approx(1.0)
    logits[20] = logits[0]  # a rare tile that looks common
    assert fit_classifier.score("head_minus_missed", logits, targets, tail) == pytest.approx(1 - 1 / 4)
    logits[1] = torch.tensor([0.0, 9.0, 0.0])  # and a common one taken for another: a head recall of 0.95
    assert fit_classifier.score("head_minus_missed", logits, targets, tail) == pytest.approx(0.95 - 1 / 4)
    assert fit_classifier.score("likelihood", logits[2:3], targets[2:3], tail) == pytest.approx(-np.log1p(2 * np.exp(-9)), abs=1e-6)
    with pytest.raises(ValueError, match="needs validation tiles of rare and of common classes"):
        fit_classifier.score("head_minus_missed", logits[:20], targets[:20], tail)
    with pytest.raises(ValueError, match="select_by is 'f1'"):
        fit_classifier.score("f1", logits, targets, tail)


def test_a_head_stops_when_patience_is_spent_and_keeps_its_best_check():
    feats, targets = separable()
    batches = torch.arange(len(targets)).repeat(40, 1)
    wrong = feats[:, 0], (targets + 1) % 3
    for patience, ended in ((3, True), (0, False)):
        head, generator = classifiers.Linear(4, 3), torch.Generator().manual_seed(0)
        history = fit_classifier.fit_head(head, feats, targets, batches, plain(), lr=0.5, generator=generator, val=wrong, patience=patience)
        last, best = int(history["step"].max()), history.attrs["best_step"]
        assert (last == best + 3 * 2) == ended and (last == 40) != ended


def test_batch_statistics_follow_the_training_tiles_and_not_where_they_started():
    pixels = np.stack([squares.tile(name, i) for i in range(6) for name in squares.CLASSES])
    targets = torch.arange(18) % 3
    model = classifiers.Classifier(features.Encoder("pocket", Pocket(), 256, {}), squares.CLASSES, "full")
    started = model.net.norm.running_mean.clone()
    batches = longtail.draws(targets, 3, 4, 18, torch.Generator().manual_seed(0))
    read = lambda rows: pixels[rows]  # noqa: E731
    fit_classifier.fit_full(model, read, targets, batches, plain(), lr=1e-3, seed=0, folder=None, val=(read, targets), turns=False)
    with torch.no_grad():
        seen = model.net.conv((data.to_float(pixels) + 1) / 2 / 0.5 - 1).mean(dim=(0, 2, 3))
    torch.testing.assert_close(model.net.norm.running_mean, seen, atol=2e-3, rtol=0)
    assert not torch.allclose(started, seen, atol=2e-2)


def test_an_arm_is_trained_again_when_a_class_changes_its_role(study):
    _, first = compare({"hol": {"coarse": 0.5}})
    place = next(files.root().rglob("00_dataset/dataset.json"))
    frozen = files.read_json(place)
    files.write_json(place, frozen | {"roles": frozen["roles"] | {"red": "tail"}})
    _, again = compare({"hol": {"coarse": 0.5}})
    assert not first["reused"].any() and not again["reused"].any()
    assert compare({"hol": {"coarse": 0.5}})[1]["reused"].all()
