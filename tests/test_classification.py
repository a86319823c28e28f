"""Metrics against scikit-learn, and against second definitions of themselves."""

import numpy as np
import pytest
from sklearn import metrics as sk

from histokit.metrics import classification, segmentation


def labels(seed=0, n=400, n_classes=5):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_classes, n)
    return true, np.where(rng.random(n) < 0.6, true, rng.integers(0, n_classes, n))


def test_classification_metrics_agree_with_scikit_learn():
    true, called = labels()
    matrix = classification.confusion(true, called, 5)
    assert (matrix == sk.confusion_matrix(true, called)).all()
    np.testing.assert_allclose(classification.recall(matrix), sk.recall_score(true, called, average=None))
    np.testing.assert_allclose(classification.balanced_accuracy(matrix), sk.balanced_accuracy_score(true, called))
    np.testing.assert_allclose(classification.f1(matrix), sk.f1_score(true, called, average=None))
    np.testing.assert_allclose(classification.macro_f1(matrix), sk.f1_score(true, called, average="macro"))


def test_a_class_never_predicted_counts_zero_as_in_scikit_learn():
    true, called = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    expected = sk.f1_score(true, called, labels=[0, 1, 2], average="macro", zero_division=0)
    np.testing.assert_allclose(classification.macro_f1(classification.confusion(true, called, 3)), expected)


def test_a_class_without_a_test_tile_is_nan_and_never_dropped():
    matrix = classification.confusion([0, 0, 1], [0, 2, 1], 3)
    np.testing.assert_equal(classification.recall(matrix), [0.5, 1.0, np.nan])
    np.testing.assert_equal(classification.f1(matrix), [2 / 3, 1.0, np.nan])
    assert np.isnan(classification.balanced_accuracy(matrix)) and np.isnan(classification.macro_f1(matrix))
    assert classification.balanced_accuracy(matrix, [0, 1]) == 0.75
    assert np.isnan(classification.balanced_accuracy(matrix, []))


def test_leading_axes_are_kept():
    many = np.stack([[classification.confusion(*labels(2 * i + j), 5) for j in range(2)] for i in range(3)])
    tail = classification.balanced_accuracy(many, [1, 4])
    assert classification.recall(many).shape == (3, 2, 5) and tail.shape == (3, 2)
    np.testing.assert_allclose(tail[2, 1], classification.balanced_accuracy(many[2, 1], [1, 4]))


@pytest.mark.parametrize("true, called", [([0, 3], [0, 1]), ([0, 1], [0, -1]), ([0, 1], [0])])
def test_labels_outside_the_class_list_are_refused(true, called):
    with pytest.raises(ValueError, match=r"labels run from|one prediction per tile"):
        classification.confusion(true, called, 3)


def probabilities(seed=0, n=600, n_classes=4, sharpness=1.5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes)) * sharpness
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.array([rng.choice(n_classes, p=row) for row in p]), p


def test_mcc_agrees_with_scikit_learn_also_for_one_called_class():
    true, called = labels()
    assert float(classification.mcc(classification.confusion(true, called, 5))) == pytest.approx(sk.matthews_corrcoef(true, called))
    assert classification.mcc(classification.confusion(true, np.zeros_like(true), 5)) == 0


def test_a_class_is_many_medium_or_few_by_its_real_training_tiles():
    groups = classification.shots([101, 100, 20, 19, 0])
    assert groups == {"many": [0], "medium": [1, 2], "few": [3, 4]}
    matrix = classification.confusion([0, 0, 1], [0, 2, 1], 3)
    assert np.isnan(classification.balanced_accuracy(matrix, classification.shots([500, 500, 500])["few"])), "an empty group is not zero"


def test_operating_points_are_those_of_a_search_over_all_thresholds():
    rng = np.random.default_rng(3)
    is_tail = rng.random(300) < 0.2
    score = np.round(np.where(is_tail, rng.beta(3, 2, 300), rng.beta(2, 4, 300)), 2)  # rounded, so that there are ties
    head, tail = score[~is_tail], score[is_tail]
    thresholds = np.unique(score)
    keeping = min(t for t in thresholds if (head <= t).mean() >= 0.95)
    catching = max(t for t in thresholds if (tail >= t).mean() >= 0.95)
    assert classification.tail_missed(score, is_tail) == (tail <= keeping).mean()
    assert classification.head_flagged(score, is_tail) == (head >= catching).mean()


def test_the_worked_example_of_logex():
    score = np.array([0.05, 0.10, 0.20, 0.60, 0.55, 0.30, 0.90, 0.70])  # probability of the rare classes: four common tiles, four rare ones
    is_tail = np.arange(8) >= 4
    assert classification.head_threshold(score, is_tail, method="linear") == pytest.approx(0.54)
    assert classification.tail_missed(score, is_tail, method="linear") == 0.25
    assert classification.average_precision(score, is_tail) == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)
    assert classification.tail_missed(score, is_tail) == 0.5, "without going between tiles the threshold is 0.6"


def test_a_threshold_can_be_carried_to_other_tiles():
    score, is_tail = np.array([0.1, 0.2, 0.3, 0.25, 0.9]), np.array([0, 0, 0, 1, 1], bool)
    carried = classification.head_threshold(score, is_tail, keep=0.6)
    assert carried == 0.2 and classification.tail_missed(score, is_tail, threshold=carried) == 0
    assert classification.tail_missed(np.array([0.0, 0.2, 0.21]), np.array([0, 1, 1], bool), threshold=carried) == 0.5
    with pytest.raises(ValueError, match="there is no tile of a common class"):
        classification.head_threshold(score[3:], is_tail[3:])


def test_operating_points_at_their_limits():
    is_tail = np.array([0, 0, 0, 1, 1, 1], bool)
    apart = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    assert classification.tail_missed(apart, is_tail) == classification.head_flagged(apart, is_tail) == 0
    assert classification.tail_missed(1 - apart, is_tail) == classification.head_flagged(1 - apart, is_tail) == 1
    assert classification.average_precision(apart, is_tail) == 1
    for number in (classification.tail_missed, classification.head_flagged, classification.average_precision):
        assert np.isnan(number(apart, np.zeros(6, bool))) and np.isnan(number(apart, np.ones(6, bool)))
        with pytest.raises(ValueError, match="1 of 6 tail scores are NaN"):
            number(np.where(apart == 0.3, np.nan, apart), is_tail)


def test_auroc_of_each_class_agrees_with_scikit_learn_and_an_absent_class_is_nan():
    true, p = probabilities()
    assert classification.auroc(true, p).mean() == pytest.approx(sk.roc_auc_score(true, p, multi_class="ovr"))
    absent = classification.auroc(true[true != 2], p[true != 2])
    assert np.isnan(absent[2]) and not np.isnan(absent[[0, 1, 3]]).any()


def test_calibration_agrees_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    true, p = probabilities()
    theirs = torchmetrics.multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(true), num_classes=4, n_bins=15, norm="l1")
    assert classification.ece(true, p) == pytest.approx(float(theirs), abs=1e-6)


def test_calibration_of_honest_overconfident_and_certain_probabilities():
    true, p = probabilities(n=20_000)
    assert classification.ece(true, p) < 0.02, "drawn from these very probabilities"
    sharper = p**3 / (p**3).sum(1, keepdims=True)
    assert classification.ece(true, sharper) > 0.1 > 5 * classification.ece(true, p)
    assert classification.ece(true, np.eye(4)[true]) == 0 and classification.ece(true, np.eye(4)[(true + 1) % 4]) == 1
    assert classification.brier(true, np.eye(4)[true]) == 0 and classification.brier(true, np.eye(4)[(true + 1) % 4]) == 2
    assert classification.nll(true, np.full((len(true), 4), 0.25)) == pytest.approx(np.log(4))
    assert classification.nll(true, p) == pytest.approx(sk.log_loss(true, p))


@pytest.mark.parametrize("broken", [np.full((4, 3), 0.5), np.full((4, 3), np.nan), np.full((3, 3), 1 / 3)])
def test_probabilities_that_are_none_are_refused(broken):
    with pytest.raises(ValueError, match="probabilities must be"):
        classification.ece([0, 1, 2, 0], broken)


def test_overlap_counts_pixels_and_leaves_out_what_holds_no_foreground():
    truth, called = np.zeros((2, 4, 4), bool)
    truth[:2], called[1:3] = True, True
    tp, fp, fn = (truth & called).sum(), (~truth & called).sum(), (truth & ~called).sum()
    assert segmentation.dice(tp, fp, fn) == pytest.approx(sk.f1_score(truth.ravel(), called.ravel()))
    assert segmentation.iou(tp, fp, fn) == pytest.approx(sk.jaccard_score(truth.ravel(), called.ravel()))
    np.testing.assert_equal(segmentation.dice([0, 3, 0], [0, 0, 2], [0, 0, 0]), [np.nan, 1, 0])
    np.testing.assert_equal(segmentation.iou([0, 3, 0], [0, 0, 2], [0, 0, 0]), [np.nan, 1, 0])
