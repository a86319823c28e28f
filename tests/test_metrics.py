"""Metrics against scikit-learn, and against second definitions of themselves."""

import numpy as np
import pytest
from sklearn import metrics as sk

from histokit import metrics


def labels(seed=0, n=400, n_classes=5):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_classes, n)
    return true, np.where(rng.random(n) < 0.6, true, rng.integers(0, n_classes, n))


def gaussians(n, m, shift=0.0, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)), rng.normal(size=(m, width)) + shift


def kid_by_double_loop(x, y):
    def kernel(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    def within(z):
        n = len(z)
        return sum(kernel(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_classification_metrics_agree_with_scikit_learn():
    true, called = labels()
    matrix = metrics.confusion(true, called, 5)
    assert (matrix == sk.confusion_matrix(true, called)).all()
    np.testing.assert_allclose(metrics.recall(matrix), sk.recall_score(true, called, average=None))
    np.testing.assert_allclose(metrics.balanced_accuracy(matrix), sk.balanced_accuracy_score(true, called))
    np.testing.assert_allclose(metrics.f1(matrix), sk.f1_score(true, called, average=None))
    np.testing.assert_allclose(metrics.macro_f1(matrix), sk.f1_score(true, called, average="macro"))


def test_a_class_never_predicted_counts_zero_as_in_scikit_learn():
    true, called = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    expected = sk.f1_score(true, called, labels=[0, 1, 2], average="macro", zero_division=0)
    np.testing.assert_allclose(metrics.macro_f1(metrics.confusion(true, called, 3)), expected)


def test_a_class_without_a_test_tile_is_nan_and_never_dropped():
    matrix = metrics.confusion([0, 0, 1], [0, 2, 1], 3)
    np.testing.assert_equal(metrics.recall(matrix), [0.5, 1.0, np.nan])
    np.testing.assert_equal(metrics.f1(matrix), [2 / 3, 1.0, np.nan])
    assert np.isnan(metrics.balanced_accuracy(matrix)) and np.isnan(metrics.macro_f1(matrix))
    assert metrics.balanced_accuracy(matrix, [0, 1]) == 0.75
    assert np.isnan(metrics.balanced_accuracy(matrix, []))


def test_leading_axes_are_kept():
    many = np.stack([[metrics.confusion(*labels(2 * i + j), 5) for j in range(2)] for i in range(3)])
    tail = metrics.balanced_accuracy(many, [1, 4])
    assert metrics.recall(many).shape == (3, 2, 5) and tail.shape == (3, 2)
    np.testing.assert_allclose(tail[2, 1], metrics.balanced_accuracy(many[2, 1], [1, 4]))


@pytest.mark.parametrize("true, called", [([0, 3], [0, 1]), ([0, 1], [0, -1]), ([0, 1], [0])])
def test_labels_outside_the_class_list_are_refused(true, called):
    with pytest.raises(ValueError, match=r"labels run from|one prediction per tile"):
        metrics.confusion(true, called, 3)


def test_kid_agrees_with_a_double_loop():
    x, y = gaussians(12, 17, shift=0.3)
    np.testing.assert_allclose(metrics.kid(x, y), kid_by_double_loop(x, y), rtol=1e-12)
    np.testing.assert_allclose(metrics.kid_test(x, y, permutations=5)[0], kid_by_double_loop(x, y), rtol=1e-9)


def test_kid_is_unbiased_and_keeps_its_sign():
    values = [metrics.kid(*gaussians(15, 15, seed=s)) for s in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8


def test_kid_p_is_uniform_when_nothing_differs_and_small_after_a_shift():
    p = [metrics.kid_test(*gaussians(12, 12, seed=s), permutations=99, seed=s)[1] for s in range(200)]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.10
    assert metrics.kid_test(*gaussians(40, 40, shift=1.0), permutations=199)[1] == 1 / 200


def test_kid_of_a_set_with_itself_is_not_significant():
    x, _ = gaussians(20, 20)
    assert metrics.kid_test(x, x, permutations=99)[1] > 0.9


def test_kid_refuses_what_n_cannot_carry_and_broken_features():
    x, y = gaussians(9, 30)
    with pytest.raises(ValueError, match="n too small to say: 9 tiles"):
        metrics.kid(x, y)
    with pytest.raises(ValueError, match="one encoder"):
        metrics.kid(np.ones((20, 3)), np.ones((20, 4)))
    y[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 30 feature rows"):
        metrics.kid(y, y)


def test_halves_share_no_case_and_lose_no_tile():
    groups = np.repeat(["a", "b", "c", "d", "e"], [3, 8, 5, 1, 6])
    for left, right in metrics.halves(groups, repeats=20):
        assert not set(groups[left]) & set(groups[right])
        assert sorted([*left, *right]) == list(range(23))


def test_the_floor_is_that_of_other_cases():
    # each case has its own colour: real tiles of other cases are far apart, and synthetic tiles of the same kind are no farther
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 8)
    real = rng.normal(size=(96, 6)) + rng.normal(size=(12, 6))[groups]
    same = rng.normal(size=(96, 6)) + rng.normal(size=(12, 6))[groups]
    value, floor, n = metrics.kid_beside_floor(real, same, groups, repeats=40)
    assert n >= 40 and np.median(floor) > metrics.kid(real[::2], real[1::2])
    assert (value > floor).mean() < 0.9
    value, floor, _ = metrics.kid_beside_floor(real, same + 2, groups, repeats=40)
    assert (value > floor).all()


def test_floor_needs_ten_tiles_in_each_half_of_the_cases():
    x, y = gaussians(60, 30)
    with pytest.raises(ValueError, match="n too small to say: 5 tiles"):
        metrics.kid_beside_floor(x, y, ["big"] * 55 + ["small"] * 5)
    with pytest.raises(ValueError, match="n too small to say: 0 tiles"):
        metrics.kid_beside_floor(x, y, ["only"] * 60)


def test_nearest_finds_copies_at_distance_zero():
    keys, queries = gaussians(50, 9, seed=3)
    queries[4] = keys[31]
    distance, index = metrics.nearest(queries, keys, k=3, block=4)
    brute = np.linalg.norm(queries[:, None] - keys, axis=-1)
    assert (index == np.argsort(brute, axis=1)[:, :3]).all()
    np.testing.assert_allclose(distance, np.sort(brute, axis=1)[:, :3])
    assert distance[4, 0] == 0 and index[4, 0] == 31
    with pytest.raises(ValueError, match="at least k = 3"):
        metrics.nearest(queries, keys[:2], k=3)
