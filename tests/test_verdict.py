"""Planted predictions: what is better, equal, worse or too small must come out as such."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import planted
import pytest
from planted import CLASSES, dataset, predict, predicted, tiles

from histokit.arms import predictions
from histokit.core import files
from histokit.evaluate import error_analysis, question, verdict, wording
from histokit.fidelity import likeness
from histokit.metrics import classification, distributions
from histokit.tiles import data

ROWS = tiles([20, 15, 12, 10])


def judge(arms, rows=ROWS, seeds=6, held=None, specs=None, read=None, **options):
    """The conclusion from planted arms {name: {class: shift}}."""
    held, read = held or dataset(), read or predicted(rows, arms, seeds)
    specs = specs or {arm: {"synthetic": "keep"} if arm == "augmented" else {} for arm in arms}
    m = verdict.measure(read, held, resamples=300)
    return verdict.conclude(m, question.cast(specs, read.arms), held, **options)


def test_an_arm_that_is_better_on_rare_classes_is_said_to_be():
    found = judge({"real": {}, "augmented": {"Polyp": 1.5, "Serrated": 1.5}})
    assert found["sentence"].startswith("For this one draw and generator, augmented finds the rare classes more often than real: ")
    assert "22 cases, 6 classifier seeds" in found["sentence"]
    d = found["differences"]["augmented"][verdict.TAIL]
    assert 0 < d["low"] < d["difference"] < d["high"] and d["p"] < 0.05 and d["outcome"] == "more"


def test_an_arm_that_is_worse_on_rare_classes_hurts():
    found = judge({"real": {}, "augmented": {"Polyp": -1.5, "Serrated": -1.5}})
    assert "augmented hurts: it finds the rare classes less often than real" in found["sentence"]


def test_an_arm_that_differs_by_training_noise_alone_gives_no_evidence():
    found = judge({"real": {}, "augmented": {}})
    assert found["sentence"].startswith("No evidence, for this one draw and generator,")
    assert found["differences"]["augmented"][verdict.TAIL]["outcome"] == "none"


def test_the_same_predictions_are_called_the_same():
    found = judge({"augmented": {}, "augmented2": {}}, specs={"augmented": {}, "augmented2": {"synthetic": "keep"}})
    assert "0.0 points [0.0 to 0.0]" in found["sentence"] and "both gave the same answer on every rare tile" in found["sentence"]


def test_a_rare_class_without_a_synthetic_tile_is_named():
    read, specs = predicted(ROWS, {"real": {}, "augmented": {}}), {"real": {}, "augmented": {"synthetic": "keep"}}
    m, parts = verdict.measure(read, dataset(), resamples=50), question.cast(specs, read.arms)
    made = pd.DataFrame({"label": ["Polyp"] * 9})
    assert "; augmented has no synthetic tile of Serrated; " in verdict.conclude(m, parts, dataset(), made)["sentence"]
    assert "no synthetic tile of Polyp and Serrated" in verdict.conclude(m, parts, dataset(), made.head(0))["sentence"]
    every = pd.DataFrame({"label": ["Polyp", "Serrated"]})
    assert "no synthetic tile" not in verdict.conclude(m, parts, dataset(), every)["sentence"]


def test_few_cases_give_counts_without_an_interval():
    found = judge({"real": {}, "augmented": {"Polyp": 3}}, rows=tiles([20, 15, 2, 2]))
    assert found["sentence"].startswith("Too few cases to say, for this one draw and generator,")
    tail = found["differences"]["augmented"][verdict.TAIL]
    assert np.isnan(tail["low"]) and np.isnan(tail["p"]) and tail["cases"] == 4
    assert "too few cases for an interval" in found["classes"]["Polyp"]
    assert not np.isnan(found["differences"]["augmented"][verdict.HEAD]["low"])


def test_a_mean_is_one_over_classes_with_cases_enough_and_names_the_others():
    found = judge({"real": {}, "augmented": {"Polyp": 1.5, "Serrated": 1.5}}, rows=tiles([20, 15, 14, 3]))
    mine = found["differences"]["augmented"]
    assert mine["Serrated"]["outcome"] == "few cases" and mine["Polyp"]["cases"] == 14 and mine[verdict.TAIL]["cases"] == 14
    assert (mine[verdict.TAIL]["low"], mine[verdict.TAIL]["high"]) == (mine["Polyp"]["low"], mine["Polyp"]["high"])
    assert not np.isnan([mine["Polyp"]["low"], mine[verdict.HEAD]["low"], mine[verdict.F1]["low"]]).any()
    assert "recall of Polyp, one of the 2 rare classes, " in found["sentence"] and "left out: Serrated (3 test cases)" in found["sentence"]


def test_a_mean_of_classes_that_all_have_few_cases_has_no_interval_and_names_the_weakest():
    found = judge({"real": {}, "augmented": {"Polyp": 1.5, "Serrated": 1.5}}, rows=tiles([20, 15, 7, 3]))
    mine = found["differences"]["augmented"][verdict.TAIL]
    assert mine["cases"] == 10 and np.isnan(mine["low"]) and mine["outcome"] == "few cases"
    assert "Serrated has 3 test cases, and each class of a mean needs 8" in found["sentence"]


def test_a_class_of_one_test_case_or_none_is_left_out_of_the_tail_figure_and_named():
    found = judge({"real": {}, "augmented": {}}, rows=tiles([20, 15, 12, 1]))
    assert "recall of Polyp, one of the 2 rare classes, " in found["sentence"]
    assert "left out: Serrated (one test case)" in found["sentence"]
    assert found["arms"]["real"][verdict.TAIL] == found["arms"]["real"]["Polyp"]
    found = judge({"real": {}, "augmented": {}}, rows=tiles([20, 15, 12, 0]))
    assert "left out: Serrated (no test tile)" in found["sentence"]
    assert found["classes"]["Serrated"] == "Serrated: no test tile, so it cannot be evaluated"
    assert np.isnan(found["arms"]["real"]["Serrated"])


def test_no_rare_class_in_the_test_split_gives_no_verdict():
    found = judge({"real": {}, "augmented": {}}, rows=tiles([20, 15, 0, 0]))
    assert found["sentence"].startswith(
        "No verdict: the rare classes cannot be evaluated (Polyp (no test tile), Serrated (no test tile)); "
    )


def test_a_cost_to_the_common_classes_is_in_the_sentence():
    found = judge({"real": {}, "augmented": {"Polyp": 1.5, "Serrated": 1.5, "Normal": -1.5, CLASSES[0]: -1.5}})
    assert "augmented finds the rare classes more often" in found["sentence"] and "at a cost to the common classes: -" in found["sentence"]


def test_oversampling_that_does_as_well_is_held_against_the_gain():
    found = judge({"real": {}, "oversampled": {"Polyp": 1.7, "Serrated": 1.7}, "augmented": {"Polyp": 1.5, "Serrated": 1.5}})
    assert "augmented finds the rare classes more often than real" in found["sentence"]
    assert "not shown to beat oversampled, the best of the arms without synthetic tiles (" in found["sentence"]


def test_one_classifier_seed_carries_no_claim():
    found = judge({"real": {}, "augmented": {"Polyp": 3, "Serrated": 3}}, seeds=1)
    assert found["sentence"].startswith("Too few classifier seeds to say")


def test_results_hold_what_a_reader_needs_to_check_them(tmp_path):
    read = predictions.read(predict(tmp_path, ROWS, {"real": {}, "augmented": {}}), CLASSES, ["real", "augmented"])
    found = judge({"real": {}, "augmented": {}}, read=read, demo=True)
    assert next(iter(found)) == "sentence" and found["sentence"].endswith("demo size, not evidence.")
    assert found["n"]["tiles"] == len(ROWS) and found["n"]["cases"] == 57 and found["n"]["seeds"] == 6
    assert found["interval"]["B"] == 300 and found["interval"]["level"] == 0.95 and len(found["predictions"]) == 12
    polyp = found["differences"]["augmented"]["Polyp"]
    assert len(polyp["found"]) == len(polyp["base_found"]) == 6 and polyp["tiles"] == (ROWS["label"] == "Polyp").sum()
    assert polyp["value"] == pytest.approx(np.mean(polyp["found"]) / polyp["tiles"])
    assert found["predictions"]["real/3"] == files.sha256(tmp_path / "real" / "3" / "predictions.parquet")
    files.write_json(tmp_path / "results.json", found)
    assert json.loads((tmp_path / "results.json").read_text())["sentence"] == found["sentence"]


def test_tiles_without_case_ids_say_so():
    rows = ROWS.assign(case_id=ROWS["tile_id"])
    found = judge({"real": {}, "augmented": {}}, rows=rows, held=dataset(has_cases=False))
    assert "takes every tile for a case" in found["sentence"] and found["n"]["cases"] is None


def test_endpoints_equal_their_plain_definitions():
    read = predicted(ROWS, {"real": {}, "augmented": {"Polyp": 1}}, seeds=3)
    m = verdict.measure(read, dataset(), resamples=10)
    matrices = np.stack([classification.confusion(read.y, called, 4) for called in read.called[read.arms.index("real")]])
    expected = [*classification.recall(matrices).mean(0), classification.balanced_accuracy(matrices, [2, 3]).mean()]
    expected += [classification.balanced_accuracy(matrices, [0, 1]).mean(), classification.macro_f1(matrices).mean()]
    np.testing.assert_allclose(m.value["real"], expected)
    shares = error_analysis.confusion(read, "real")
    np.testing.assert_allclose(np.diag(shares), expected[:4])
    np.testing.assert_allclose(shares.sum(1), 1)


def test_tables_show_every_endpoint_of_every_arm():
    m = verdict.measure(predicted(tiles([20, 15, 3, 0]), {"real": {}, "oversampled": {}, "augmented": {}}), dataset(), resamples=50)
    levels = verdict.level_table(m).set_index("endpoint")
    assert list(levels.index) == [*CLASSES, *verdict.GROUPS] and list(levels.columns)[-3:] == ["real", "oversampled", "augmented"]
    assert levels.loc["Serrated", "real"] == "no test tile" and levels.loc["Polyp", "real"].startswith("found ")
    assert "% [" in levels.loc["Normal", "augmented"]
    table = verdict.difference_table(verdict.differences(m, "real"))
    assert len(table) == 2 * len(m.endpoints) and set(table["reading"]) <= {*wording.READING.values(), "higher", "lower"}


def test_a_class_named_like_a_figure_is_refused():
    classes = ["a", "macro-F1"]
    rows = tiles([3, 3], classes=classes)
    with pytest.raises(ValueError, match="rename the class"):
        verdict.measure(predicted(rows, {"real": {}, "more": {}}, seeds=1, classes=classes), dataset(classes, ["a"]))


SPECS = {"real": {}, "oversampled": {}, "shuffled": {"synthetic": "keep", "labels": "shuffled"}, "augmented": {"synthetic": "keep"}}


def test_the_judged_arm_is_the_first_with_synthetic_tiles_and_their_own_labels():
    parts = question.cast(SPECS, list(SPECS))
    assert (parts.baseline, parts.judged, parts.rivals, parts.synthetic) == ("real", "augmented", ["oversampled"], "keep")
    assert question.cast(SPECS, list(SPECS), judged="oversampled").rivals == []
    assert question.cast({}, ["a", "b", "c"]).judged == "c"
    assert question.cast(SPECS, list(SPECS), baseline="augmented", judged="real").generated is False


@pytest.mark.parametrize(
    "arms, options, said",
    [(["real"], {}, "one arm only"), (list(SPECS), {"judged": "augmentd"}, "no arm 'augmentd'"), (["a", "b"], {"baseline": "b"}, "both")],
)
def test_a_cast_that_makes_no_comparison_is_refused(arms, options, said):
    with pytest.raises(ValueError, match=said):
        question.cast(SPECS, arms, **{"judged": "b"} | options if said == "both" else options)


def test_predictions_come_back_as_they_were_planted(tmp_path):
    arms = {"real": {}, "augmented": {"Polyp": 1}}
    read, made = predictions.read(predict(tmp_path, ROWS, arms, seeds=2), CLASSES, list(arms)), predicted(ROWS, arms, seeds=2)
    assert read.arms == made.arms and (read.runs == made.runs).all()
    order = np.argsort(made.tile_id, kind="stable")
    assert (read.tile_id == made.tile_id[order]).all() and (read.called == made.called[:, :, order]).all()


def change(folder, arm="real", seed=1):
    path = folder / arm / str(seed) / "predictions.parquet"
    return path, files.read_table(path)


@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda t: t.drop(columns="case_id"), "lacks the column 'case_id'"),
        (lambda t: t.rename(columns={"p_Polyp": "p_polyp"}), "classes are not those of the dataset"),
        (lambda t: t.assign(p_Polyp=np.nan), "NaN or infinite"),
        (lambda t: pd.concat([t, t.iloc[[4]]]), "is predicted twice"),
        (lambda t: t.assign(y=t["y"] + 1), "label ids run from"),
        (lambda t: t.iloc[1:], "do not hold the same test tiles"),
        (lambda t: t.assign(case_id="one"), "first differing in case_id"),
        (lambda t: t.assign(split="val"), "0 test rows"),
    ],
)
def test_predictions_that_cannot_be_compared_are_refused_and_the_file_is_named(tmp_path, break_it, said):
    predict(tmp_path, ROWS, {"real": {}, "augmented": {}}, seeds=2)
    path, table = change(tmp_path)
    files.write_table(path, break_it(table))
    with pytest.raises(ValueError, match=said) as error:
        predictions.read(tmp_path, CLASSES)
    assert str(tmp_path) in str(error.value)


def test_a_missing_arm_and_an_empty_folder_are_named(tmp_path):
    predict(tmp_path, ROWS, {"real": {}}, seeds=1)
    with pytest.raises(FileNotFoundError, match=r"arm 'augmented'.*found: real"):
        predictions.read(tmp_path, CLASSES, ["real", "augmented"])
    with pytest.raises(FileNotFoundError, match="any arm"):
        predictions.read(tmp_path / "nothing", CLASSES)


def test_seeds_that_not_every_arm_has_are_left_out_and_said(tmp_path):
    predict(tmp_path, ROWS, {"real": {}, "augmented": {}}, seeds=4)
    shutil.rmtree(tmp_path / "real" / "2")
    read = predictions.read(tmp_path, CLASSES)
    assert read.seeds == [0, 1, 3] and "seeds [2] of augmented are left out" in read.notes[0]
    assert read.called.shape == (2, 3, len(ROWS))


def replicated(tmp_path, luck, draws=3, generators=2, gain=0.0):
    """Folders of `draws` x `generators` replicates: synthetic tiles of each are worth `gain` plus its own luck of deviation `luck`."""
    folders, rng = {}, np.random.default_rng(0)
    for d in range(draws):
        for g in range(generators):
            folders[d, g] = tmp_path / f"study-d{d}-g{g}" / "06_classifier"
            shift = dict.fromkeys(["Polyp", "Serrated"], gain + rng.normal(0, luck))
            predict(folders[d, g], ROWS, {"augmented": shift} | ({} if g else {"real": {}}), seeds=3, replicate=(d, g), noise=0.1)
    return folders


def test_replicates_are_read_together_and_an_arm_without_a_generator_stands_for_all(tmp_path):
    folders = replicated(tmp_path, luck=0.5)
    read = predictions.read(folders, CLASSES, ["real", "augmented"])
    assert read.runs.tolist() == planted.crossed(3, 2, 3).tolist() and read.called.shape == (2, 18, len(ROWS))
    real = read.called[0].reshape(3, 2, 3, -1)
    assert (real[:, 0] == real[:, 1]).all(), "one real arm for both generators of a draw"
    assert len(read.hashes) == 3 * 2 * 3 + 3 * 3
    shutil.rmtree(folders[2, 1] / "augmented" / "1")
    fewer = predictions.read(folders, CLASSES, ["real", "augmented"])
    assert len(fewer.runs) == 17 and "draw 2 generator 1 seed 1 of real are left out" in fewer.notes[0]


def test_helps_is_said_of_a_gain_over_three_draws_and_two_generators(tmp_path):
    found = judge({}, read=predictions.read(replicated(tmp_path, luck=0.1, gain=2.0), CLASSES, ["real", "augmented"]),
                  specs={"real": {}, "augmented": {"synthetic": "keep"}})  # fmt: skip
    assert found["sentence"].startswith("augmented helps: over 3 draws and 2 generator seeds it finds the rare classes more often")
    assert "classifier seeds, draws together" in found["interval"]["method"] and found["n"]["draws"] == 3


def test_the_interval_holds_the_luck_of_the_draw(tmp_path):
    roles = {"real": {}, "augmented": {"synthetic": "keep"}}
    read = predictions.read(replicated(tmp_path, luck=2.0, generators=1, gain=1.0), CLASSES, ["real", "augmented"])
    blind = replace(read, runs=planted.crossed(seeds=9))  # the same answers, taken for nine classifier seeds of one draw
    wide, narrow = (judge({}, read=one, specs=roles)["differences"]["augmented"][verdict.TAIL] for one in (read, blind))
    assert wide["difference"] == narrow["difference"]
    assert wide["high"] - wide["low"] > 1.3 * (narrow["high"] - narrow["low"])


def pictures(n_real=120, n_made=60, shift=0.0, cases=12, seed=0):
    """Manifests and features of one class: real tiles of several cases in all splits, synthetic tiles shifted by `shift`."""
    rng = np.random.default_rng(seed)
    case = np.arange(n_real) % cases
    split = np.where(case < 2, "train", "test")
    real = pd.DataFrame({"tile_id": [f"r{i}" for i in range(n_real)], "case_id": [f"c{k}" for k in case], "split": split})
    real = real.assign(label="Polyp", use="labelled", source="real")
    made = pd.DataFrame({"tile_id": [f"s{i}" for i in range(n_made)], "label": "Polyp", "status": "kept"})
    sources = [json.dumps([f"r{i % 2}"]) for i in range(n_made)]
    made = made.assign(sources=sources, scores=[json.dumps({"judge": i / n_made}) for i in range(n_made)], source="synthetic")
    feats = rng.normal(size=(n_real, 5)) + 0.5 * rng.normal(size=(cases, 5))[case]
    return real, made, feats, rng.normal(size=(n_made, 5)) + 0.5 * rng.normal(size=(cases, 5))[rng.integers(0, cases, n_made)] + shift


def test_fidelity_tells_a_shifted_set_from_one_that_is_no_farther_than_other_cases():
    for shift, said in ((0.0, "not told apart from other real cases at this n"), (1.5, "farther than real tiles of other cases")):
        real, made, of_real, of_made = pictures(shift=shift)
        row = likeness.fidelity({"e": (of_real, of_made)}, real, made, ["Polyp"], permutations=99).iloc[0]
        assert row["reading"] == said and row["n"] >= 40 and 0 < row["p"] <= 1
        assert row["real"] == 100 and row["cases"] == 10  # training tiles are what the generator saw


@pytest.mark.parametrize(
    "size, said", [((54, 5), "n too small to say"), ((10, 60), "n too small to say"), ((20, 60), "no floor: n too small to say")]
)
def test_fidelity_says_when_n_is_too_small(size, said):
    real, made, of_real, of_made = pictures(*size)
    row = likeness.fidelity({"e": (of_real, of_made)}, real, made, ["Polyp"], permutations=9).iloc[0]
    assert row["reading"].startswith(said) and np.isnan(row["floor"])


def test_examples_are_the_best_the_median_and_the_worst_with_their_source_and_nearest_training_tile():
    real, made, of_real, of_made = pictures()
    of_made[30] = of_real[13]  # a copy of a training tile
    shown = likeness.examples((of_real, of_made), real, made, ["Polyp", "Serrated"])
    assert shown["rank"].tolist() == ["best", "median", "worst"] and shown["synthetic"].tolist() == [59, 29, 0]
    assert (np.diff(shown["score"]) < 0).all() and shown["source"].tolist() == [1, 1, 0]
    copied = likeness.examples((of_real, of_made[[30, 30, 30]]), real, made.iloc[[30] * 3].reset_index(drop=True), ["Polyp"])
    assert set(copied["nearest"]) == {13} and set(copied["distance"]) == {0.0}
    assert (real["split"].iloc[shown["nearest"]] == "train").all() and (real["split"].iloc[shown["real"]] == "test").all()


def test_strips_show_white_where_there_is_no_source(tmp_path):
    real, made, of_real, of_made = pictures(n_real=30, n_made=4)
    for table, letter in ((real, "r"), (made, "s")):
        paths = [str(tmp_path / f"{letter}{i}.png") for i in range(len(table))]
        for path in paths:
            files.write_png(path, np.full((8, 8, 3), 90, np.uint8))
        table[["path", "tile_px", "fit", "mpp"]] = [[path, 8, "resize", np.nan] for path in paths]
    made["sources"] = "[]"
    stack, captions = likeness.strips(likeness.examples((of_real, of_made), real, made, ["Polyp"]), real, made)
    assert stack.shape == (3, 4, 8, 8, 3) and (stack[:, 1] == 255).all() and (stack[:, [0, 2, 3]] == 90).all()
    assert captions[0][1] == "no source" and captions[0][2] == "best, score 0.75" and captions[2][2].startswith("worst")


def test_of_many_tiles_those_that_matter_are_embedded():
    real, made, _, _ = pictures(n_real=4000)
    common = real.assign(label="Normal", tile_id="n" + real["tile_id"])
    made.loc[0, "sources"] = json.dumps(["nr7", "r0"])
    near = likeness.surroundings(pd.concat([real, common]), made, ["Polyp"], most=50, others=20)
    polyp = near[near["label"].eq("Polyp")]["split"].value_counts()
    assert polyp.to_dict() == {"train": real["split"].eq("train").sum(), "test": 50} and near["label"].eq("Normal").sum() == 21
    assert "nr7" in set(near["tile_id"]) and near["tile_id"].is_unique


def test_only_the_tiles_an_arm_trained_on_are_shown():
    made = pd.DataFrame({"tile_id": list("abcd"), "label": ["x", "x", "x", "y"], "status": ["kept", "rejected", "kept", "quarantined"]})
    assert [len(data.used(made, s)) for s in ("kept", "rejected", "all")] == [2, 1, 4]
    dose, more = (set(data.used(made, "all", n)["tile_id"]) for n in (1, 2))
    assert len(dose) == 2 and "d" in dose and dose < more and len(more) == 3


def test_a_tile_without_a_score_has_none():
    assert likeness.judge_score('{"judge": 0.5, "black": 1}') == 0.5
    assert np.isnan(likeness.judge_score("")) and np.isnan(likeness.judge_score('{"focus": 3}'))


def test_a_picture_of_few_tiles_is_refused():
    with pytest.raises(distributions.TooSmall, match="9 real tiles"):
        likeness.umap(np.ones((9, 3)), np.ones((2, 3)))


def test_the_planted_truth_is_there():
    rows = SimpleNamespace(plain=planted.scores(ROWS, {}, 0), better=planted.scores(ROWS, {"Polyp": 2}, 0))
    polyp, y = (ROWS["label"] == "Polyp").to_numpy(), ROWS["label"].map(CLASSES.index).to_numpy()
    hit = {name: p.argmax(1) == y for name, p in vars(rows).items()}
    assert hit["better"][polyp].mean() > hit["plain"][polyp].mean() and (hit["better"] == hit["plain"])[~polyp].all()


def test_groups_are_compared_over_the_classes_they_share():
    read = predicted(ROWS, {"real": {}, "augmented": {}})
    truth = np.array([name in ("Polyp", "Serrated", "Normal") for name in ROWS["label"]])
    group = np.where(np.arange(len(ROWS)) % 3 == 0, "B", "A")
    group = np.where(truth, group, "A")  # no tile of the first class in B
    called = np.where((group == "B")[None, None] & (np.arange(len(ROWS)) % 2 == 0)[None, None], (read.y + 1) % 4, read.y)
    read = replace(read, group=group, called=np.broadcast_to(called, read.called.shape))
    table = error_analysis.groups(read).set_index("group")
    assert table["classes"].tolist() == [3] * 4 and table.loc["A", "real"] == 1 and table.loc["worst", "real"] == table.loc["B", "real"]
    in_b = [(called[0, 0] == read.y)[(group == "B") & (read.y == c)].mean() for c in (1, 2, 3)]
    assert table.loc["B", "augmented"] == pytest.approx(np.mean(in_b))
    assert table.loc["gap", "real"] == pytest.approx(1 - np.mean(in_b))
    assert len(error_analysis.groups(replace(read, group=np.full(len(ROWS), "A")))) == 0


def test_the_confusion_table_holds_every_arm():
    read = predicted(ROWS, {"real": {}, "augmented": {"Polyp": 1.0}})
    table = error_analysis.confusions(read)
    assert len(table) == 2 * 4 * 4
    assert table.groupby(["arm", "true"])["share"].sum().to_numpy() == pytest.approx(1)
    diagonal = table[table["true"].eq(table["called"]) & table["arm"].eq("augmented")]["share"].to_numpy()
    assert diagonal == pytest.approx(verdict.measure(read, dataset(), resamples=20).value["augmented"][:4])


def test_alarms_are_counted_per_thousand_common_tiles_and_by_hand():
    read = predicted(ROWS, {"real": {}, "augmented": {}})
    called = np.broadcast_to(read.y, read.called.shape).copy()
    normal = np.flatnonzero(read.y == 1)
    called[1][:, normal[: len(normal) // 2]] = 2  # half of one of two common classes is called rare
    called[0][:, np.flatnonzero(read.y == 2)] = 3  # rare for rare still counts as flagged
    table = error_analysis.alarms(replace(read, called=called), dataset().roles).set_index("arm")
    assert table.loc["real", ["flagged", "false_alarms", "ppv"]].tolist() == [1, 0, 1]
    share = (len(normal) // 2) / len(normal) / 2
    assert table.loc["augmented", "false_alarms"] == pytest.approx(1000 * share)
    assert table.loc["augmented", "ppv"] == pytest.approx(0.01 / (0.01 + 0.99 * share))
    never = error_analysis.alarms(replace(read, called=np.zeros_like(called)), dataset().roles)
    assert never["ppv"].isna().all()


def test_every_tile_that_changed_is_named_by_how():
    read = predicted(ROWS, {"real": {}, "augmented": {}})
    called = np.broadcast_to(read.y, read.called.shape).copy()
    polyp, normal = np.flatnonzero(read.y == 2), np.flatnonzero(read.y == 1)
    called[0][:, polyp[0]] = called[0][:, polyp[1]] = called[1][:, polyp[1]] = called[1][:, polyp[2]] = 0
    called[1][:2, normal[0]] = 2  # two of six runs
    called[1][:1, normal[1]] = 2  # one of six: noise
    parts = question.cast({"real": {}, "augmented": {"synthetic": "keep"}}, read.arms)
    table = error_analysis.changes(replace(read, called=called), dataset().roles, parts)
    names = read.tile_id[[*polyp[:3], normal[0]]]
    found = table[table["change"].ne("")].set_index("tile_id")["change"].to_dict()
    assert found == dict(zip(names, ["newly found", "still missed", "lost", "newly flagged"], strict=True))


def unlucky(trial, draws=3, generators=2, seeds=3, luck=0.4):
    """Predictions of an arm that truly adds nothing, whose draws and generators have luck of their own."""
    rows, rng = tiles([14, 12, 10, 9], per_case=4), np.random.default_rng(trial)
    runs = planted.crossed(draws, generators, seeds)
    of_draw, of_generator = rng.normal(0, luck, (draws, 2)), rng.normal(0, luck, (draws, generators, 2))
    p = []
    for arm in range(2):
        shifts = [(of_draw[d] + of_generator[d, g]) * arm for d, g, _ in runs]
        p.append(
            [planted.scores(rows, dict(zip(planted.TAIL, s, strict=True)), [trial, arm, *r]) for s, r in zip(shifts, runs, strict=True)]
        )
    p, y = np.array(p), rows["label"].map(CLASSES.index).to_numpy()
    tile, case = (rows[name].to_numpy(str) for name in ("tile_id", "case_id"))
    return predictions.Predictions(CLASSES, ["real", "augmented"], runs, tile, case, y, p.argmax(-1), p, {}, [])


@pytest.mark.slow
def test_with_no_true_effect_helps_is_said_in_at_most_one_experiment_in_twenty():
    specs, said = {"real": {}, "augmented": {"synthetic": "keep"}}, {"helps": 0, "hurts": 0}
    for trial in range(200):
        m = verdict.measure(unlucky(trial), dataset(), resamples=100, seed=trial)
        sentence = verdict.conclude(m, question.cast(specs, ["real", "augmented"]), dataset())["sentence"]
        said = {word: n + (f"augmented {word}" in sentence) for word, n in said.items()}
    assert said["helps"] <= 10, said
