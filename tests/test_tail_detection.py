"""Tail detection against scikit-learn, against tiles repeated instead of weighted, and where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from planted import CLASSES, dataset, predicted, tiles
from sklearn import metrics as sk

from histokit.evaluate import tail_detection, verdict, wording
from histokit.metrics import classification

ROWS, VAL = tiles([20, 15, 12, 10]), tiles([9, 9, 9, 9], split="val")
ARMS = {"real": {}, "augmented": {"Polyp": 1.5, "Serrated": 1.5}}


def measured(answers, validation, baseline="real"):
    return tail_detection.measure(verdict.measure(answers, dataset(), resamples=300), validation, baseline)


@pytest.fixture(scope="module")
def answers():
    return predicted(ROWS, ARMS)


def tail_score(p, arm, run):
    tail = [CLASSES.index(name) for name in dataset().tail]
    return p.probabilities[p.arms.index(arm), run][:, tail].sum(axis=1), np.isin(p.y, tail)


def test_every_figure_is_that_of_one_classifier_after_the_other(answers):
    validation = replace(answers, y=answers.y[::-1].copy(), probabilities=answers.probabilities[:, :, ::-1] ** 0.9)
    found = measured(answers, validation).set_index(["arm", "endpoint"])["value"]
    for arm in answers.arms:
        each = [tail_score(answers, arm, r) for r in range(len(answers.runs))]
        held = [classification.head_threshold(*tail_score(validation, arm, r)) for r in range(len(answers.runs))]
        assert found[arm, tail_detection.AUROC] == pytest.approx(np.mean([sk.roc_auc_score(rare, score) for score, rare in each]))
        assert found[arm, tail_detection.MISSED] == pytest.approx(np.mean([classification.tail_missed(*one) for one in each]))
        carried = [classification.tail_missed(*one, threshold=t) for one, t in zip(each, held, strict=True)]
        assert found[arm, tail_detection.CARRIED] == pytest.approx(np.mean(carried))
        flagged = [(score[~rare] > t).mean() for (score, rare), t in zip(each, held, strict=True)]
        assert found[arm, tail_detection.FLAGGED] == pytest.approx(np.mean(flagged))


def test_a_tile_that_counts_twice_is_a_tile_that_is_there_twice():
    rng = np.random.default_rng(0)
    score, rare = np.round(rng.random(60), 1), rng.random(60) < 0.3  # rounded, so that there are ties
    weight = rng.integers(1, 4, 60)
    twice, theirs = np.repeat(score, weight), np.repeat(rare, weight)
    found = np.array(tail_detection._endpoints(score, rare, weight[None].astype(float), 0.5))[:, 0]
    assert found[0] == pytest.approx(sk.roc_auc_score(theirs, twice))
    assert found[1] == pytest.approx(classification.tail_missed(twice, theirs))
    assert found[2] == pytest.approx(classification.tail_missed(twice, theirs, threshold=0.5))
    assert found[3] == pytest.approx((twice[~theirs] > 0.5).mean())


def test_an_arm_that_finds_more_is_said_to_and_one_like_the_baseline_differs_by_nothing(answers):
    twice = {name: getattr(answers, name)[[0, 1, 0]] for name in ("called", "probabilities")}
    same = replace(answers, arms=["real", "augmented", "twin"], **twice)
    found = measured(same, None).set_index(["arm", "endpoint"])
    better, twin = found.loc[("augmented", tail_detection.AUROC)], found.loc[("twin", tail_detection.AUROC)]
    assert (
        0 < better["difference_low"] < better["difference"] < better["difference_high"] and better["low"] < better["value"] < better["high"]
    )
    assert twin[["difference", "difference_low", "difference_high"]].eq(0).all()
    assert found.loc[("augmented", tail_detection.MISSED), "difference_high"] < 0, "it misses fewer"
    assert found.loc[[("real", name) for name in tail_detection.ENDPOINTS], "difference"].isna().all()


def test_without_validation_tiles_no_threshold_is_carried_and_nothing_is_said_of_one(answers):
    found = measured(answers, None)
    assert found[found["endpoint"].isin([tail_detection.CARRIED, tail_detection.FLAGGED])]["value"].isna().all()
    said, n = tail_detection.remarks(found, "augmented", "real"), int(ROWS["label"].isin(dataset().tail).sum())
    assert (
        len(said) == 2
        and said[0].startswith("AUROC: augmented ")
        and said[1] == f"{n} rare and {len(ROWS) - n} common test tiles of 57 cases."
    )
    shown = tail_detection.table(found, "real")
    assert shown["arm"].tolist() == ["real", "augmented"] and shown[tail_detection.CARRIED].eq("not known").all()
    assert shown["missed beside real"].tolist() == ["", ""]


def test_the_threshold_of_validation_tiles_is_carried(answers):
    read = predicted(VAL, ARMS)
    found = measured(answers, read)
    assert found["value"].notna().all()
    said = tail_detection.remarks(found, "augmented", "real")
    assert len(said) == 4 and said[1].startswith("tail_missed, validation threshold: augmented ") and "flags" in said[2]


def test_every_arm_that_misses_more_is_named_whichever_is_judged(answers):
    found = measured(answers, predicted(VAL, ARMS), "augmented")
    row = found.set_index(["arm", "endpoint"]).loc[("real", tail_detection.CARRIED)]
    assert row["difference_low"] > 0
    said = "At that threshold real misses more rare tiles than augmented, by intervals above 0."
    for judged in ("augmented", "real"):
        assert said in tail_detection.remarks(found, judged, "augmented")
    gap = wording.points(*row[["difference", "difference_low", "difference_high"]])
    assert tail_detection.table(found, "augmented")["missed beside augmented"].tolist() == [gap, ""]


def test_few_cases_and_few_seeds_give_numbers_without_intervals():
    few = measured(predicted(tiles([20, 15, 2, 2]), ARMS), None)
    short = measured(predicted(ROWS, ARMS, seeds=2), None)
    for found in (few, short):
        assert found[found["endpoint"].eq(tail_detection.AUROC)][["low", "high"]].isna().all(axis=None)
        assert found[found["endpoint"].eq(tail_detection.AUROC)]["value"].notna().all()


def test_without_rare_or_without_common_tiles_there_is_nothing_to_detect():
    for cases in ([20, 15, 0, 0], [0, 0, 12, 10]):
        found = measured(predicted(tiles(cases), ARMS), None)
        assert found.empty and tail_detection.remarks(found, "augmented", "real")[0].startswith(
            "Detection takes test tiles of rare and of common"
        )
