"""The figures other papers report: each by scikit-learn's word, and what few tiles cannot say."""

import numpy as np
import planted
import pytest
from sklearn import metrics as sk

from histokit.evaluate import reported_metrics


@pytest.fixture(scope="module")
def answers():
    return planted.predicted(planted.tiles([6, 6, 5, 4], per_case=6), {"real": {}, "better": {"Polyp": 1.5}}, seeds=3)


def held(train=(400, 40, 10, 5)):
    counts = {name: {"train": {"tiles": n, "cases": 3}} for name, n in zip(planted.CLASSES, train, strict=True)}
    return planted.dataset(counts=counts)


def test_they_are_those_of_scikit_learn_averaged_over_runs(answers):
    table = reported_metrics.measure(answers, held()).set_index(["arm", "metric"])
    called, p, y = answers.called[0], answers.probabilities[0], answers.y
    rare = np.isin(y, [2, 3])
    assert table.loc[("real", "MCC"), "value"] == pytest.approx(np.mean([sk.matthews_corrcoef(y, run) for run in called]))
    assert table.loc[("real", "macro AUROC"), "value"] == pytest.approx(np.mean([sk.roc_auc_score(y, run, multi_class="ovr") for run in p]))
    assert table.loc[("real", "NLL"), "value"] == pytest.approx(np.mean([sk.log_loss(y, run) for run in p]))
    found = [sk.average_precision_score(rare, run[:, 2:].sum(1)) for run in p]
    row = table.loc[("real", "average precision, rare")]
    assert (row["value"], row["least"], row["most"]) == pytest.approx((np.mean(found), min(found), max(found)))


def test_shots_follow_the_real_training_tiles_and_an_empty_group_says_so(answers):
    table = reported_metrics.measure(answers, held()).set_index(["arm", "metric"])["value"]
    recall = np.array([np.mean([(run[answers.y == i] == i).mean() for run in answers.called[0]]) for i in range(4)])
    many, medium, few = (table["real", f"recall, {name}-shot"] for name in ("many", "medium", "few"))
    assert (many, medium, few) == pytest.approx((recall[0], recall[1], recall[2:].mean()))
    none = reported_metrics.measure(answers, held(train=(400, 400, 400, 400)))
    shown = reported_metrics.table(none, ["better"]).set_index("figure")["better"]
    assert shown["recall, few-shot (higher is better)"] == "none to say it of" and "(" in shown["MCC (higher is better)"]


def test_what_is_better_for_the_rare_class_raises_them_and_few_tiles_are_named(answers):
    table = reported_metrics.measure(answers, held()).set_index(["arm", "metric"])
    assert table.loc[("better", "MCC"), "value"] > table.loc[("real", "MCC"), "value"]
    assert table.loc[("better", "NLL"), "value"] < table.loc[("real", "NLL"), "value"] and table.loc[("real", "NLL"), "better"] == "lower"
    (said,) = reported_metrics.remarks(answers, held())
    assert f"With {len(answers.y)} test tiles, {int((answers.y >= 2).sum())} of them rare" in said


def test_without_a_rare_test_tile_the_rest_is_still_told():
    answers = planted.predicted(planted.tiles([6, 6, 0, 0], per_case=6), {"real": {}}, seeds=2)
    table = reported_metrics.measure(answers, held()).set_index("metric")["value"]
    assert table["MCC"] > 0 and np.isnan(table["average precision, rare"]) and np.isnan(table["ECE, rare tiles"])
