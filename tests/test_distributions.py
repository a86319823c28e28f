"""Set metrics against libraries where they are right, against second definitions everywhere, and at their limits."""

import numpy as np
import pytest
from scipy import stats

from histokit.metrics import distributions


def gaussians(n, m, shift=0.0, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)), rng.normal(size=(m, width)) + shift


def kid(x, y):
    return distributions.kid_test(x, y, permutations=1)[0]


def kid_by_double_loop(x, y):
    def kernel(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    def within(z):
        n = len(z)
        return sum(kernel(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kid_agrees_with_a_double_loop():
    x, y = gaussians(12, 17, shift=0.3)
    np.testing.assert_allclose(distributions.kid_test(x, y, permutations=5)[0], kid_by_double_loop(x, y), rtol=1e-9)


def test_kid_is_unbiased_and_keeps_its_sign():
    values = [kid(*gaussians(15, 15, seed=s)) for s in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8


def test_kid_p_is_uniform_when_nothing_differs_and_small_after_a_shift():
    p = [distributions.kid_test(*gaussians(12, 12, seed=s), permutations=99, seed=s)[1] for s in range(200)]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.10
    assert distributions.kid_test(*gaussians(40, 40, shift=1.0), permutations=199)[1] == 1 / 200


def test_kid_of_a_set_with_itself_is_not_significant():
    x, _ = gaussians(20, 20)
    assert distributions.kid_test(x, x, permutations=99)[1] > 0.9


def test_kid_refuses_what_n_cannot_carry_and_broken_features():
    x, y = gaussians(9, 30)
    with pytest.raises(ValueError, match="n too small to say: 9 tiles"):
        kid(x, y)
    with pytest.raises(ValueError, match="one encoder"):
        kid(np.ones((20, 3)), np.ones((20, 4)))
    y[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 30 feature rows"):
        kid(y, y)


def test_halves_share_no_case_and_lose_no_tile():
    groups = np.repeat(["a", "b", "c", "d", "e"], [3, 8, 5, 1, 6])
    for left, right in distributions.halves(groups, repeats=20):
        assert not set(groups[left]) & set(groups[right])
        assert sorted([*left, *right]) == list(range(23))


def test_the_floor_is_that_of_other_cases():
    # each case has its own colour: real tiles of other cases are far apart, and synthetic tiles of the same kind are no farther
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 8)
    real = rng.normal(size=(96, 6)) + rng.normal(size=(12, 6))[groups]
    same = rng.normal(size=(96, 6)) + rng.normal(size=(12, 6))[groups]
    value, floor, n = distributions.kid_beside_floor(real, same, groups, repeats=40)
    assert n >= 40 and np.median(floor) > kid(real[::2], real[1::2])
    assert (value > floor).mean() < 0.9
    value, floor, _ = distributions.kid_beside_floor(real, same + 2, groups, repeats=40)
    assert (value > floor).all()


def test_floor_needs_ten_tiles_in_each_half_of_the_cases():
    x, y = gaussians(60, 30)
    with pytest.raises(ValueError, match="n too small to say: 5 tiles"):
        distributions.kid_beside_floor(x, y, ["big"] * 55 + ["small"] * 5)
    with pytest.raises(ValueError, match="n too small to say: 0 tiles"):
        distributions.kid_beside_floor(x, y, ["only"] * 60)


def test_nearest_finds_copies_at_distance_zero():
    keys, queries = gaussians(50, 9, seed=3)
    queries[4] = keys[31]
    distance, index = distributions.nearest(queries, keys, k=3, block=4)
    brute = np.linalg.norm(queries[:, None] - keys, axis=-1)
    assert (index == np.argsort(brute, axis=1)[:, :3]).all()
    np.testing.assert_allclose(distance, np.sort(brute, axis=1)[:, :3])
    assert distance[4, 0] == 0 and index[4, 0] == 31
    with pytest.raises(ValueError, match="at least k = 3"):
        distributions.nearest(queries, keys[:2], k=3)


# --- Frechet distance ------------------------------------------------------------------------------------------------


def frechet_by_eigenvalues(x, y):
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()  # the trace of the square root, from the product itself
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * root


@pytest.mark.parametrize("n, m", [(200, 150), (9, 40), (8, 5), (5, 3)])
def test_frechet_agrees_with_its_definition_below_and_above_the_width(n, m):
    x, y = gaussians(n, m, shift=0.5, width=10)
    assert distributions.frechet(x, y) == pytest.approx(frechet_by_eigenvalues(x, y), rel=1e-4)


def test_frechet_agrees_with_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.fid")
    import torch

    x, y = gaussians(120, 90, shift=0.3, width=12)
    stats = [(torch.from_numpy(z.mean(0)), torch.from_numpy(np.cov(z, rowvar=False))) for z in (x, y)]
    theirs = float(module._compute_fid(stats[0][0], stats[0][1], stats[1][0], stats[1][1]))
    assert distributions.frechet(x, y) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("n", "d", "rank"), [(300, 64, 5), (300, 64, 64), (20, 64, 20), (400, 128, 20)])
def test_frechet_of_equal_sets_is_zero_and_never_below(n, d, rank):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))  # dead features, as encoders have them
    assert 0 <= distributions.frechet(x, x[::-1]) < 1e-10 * (x**2).sum()


def test_frechet_of_a_set_with_itself_a_shift_and_a_rotation():
    x, y = gaussians(60, 60, width=80)
    assert distributions.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert distributions.frechet(x, x + 0.5) == pytest.approx(80 * 0.25)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(80, 80)))[0]
    assert distributions.frechet(x @ turn, y @ turn) == pytest.approx(distributions.frechet(x, y))
    assert distributions.frechet(x, y) == pytest.approx(distributions.frechet(y, x))


def test_frechet_falls_with_n_and_its_extrapolation_does_not():
    small = distributions.frechet(*gaussians(50, 50, width=32))
    large = distributions.frechet(*gaussians(1000, 1000, width=32))
    assert small > 5 * large > 0
    assert abs(distributions.frechet_extrapolated(*gaussians(1000, 1000, width=32))) < large / 3
    with pytest.raises(distributions.TooSmall, match="100 tiles on one side, an extrapolated Frechet distance needs at least 500"):
        distributions.frechet_extrapolated(*gaussians(100, 900))


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_mmd_agrees_with_its_double_sum_and_vanishes_on_equal_sets():
    x, y = gaussians(7, 9, shift=1)
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    kernel = lambda a, b: np.mean([np.exp(-((p - q) ** 2).sum() / (2 * 0.5**2)) for p in a for q in b])  # noqa: E731
    expected = 1000 * (kernel(u, u) + kernel(v, v) - 2 * kernel(u, v))
    assert distributions.mmd_rbf(x, y, sigma=0.5) == pytest.approx(expected)
    assert distributions.mmd_rbf(x, 3 * x) == pytest.approx(0, abs=1e-9), "length does not count"


@pytest.mark.parametrize("width", [4, 40])
def test_vendi_counts_different_tiles(width):
    basis = np.eye(40)[:4, :width] if width == 40 else np.eye(4)
    assert distributions.vendi(np.repeat(basis, 5, axis=0)) == pytest.approx(4)
    assert distributions.vendi(np.ones((20, width))) == pytest.approx(1)
    assert distributions.vendi(np.eye(9)) == pytest.approx(9)
    assert distributions.vendi(np.repeat(100 * basis, 5, axis=0), width=1) == pytest.approx(4)


def test_vendi_with_a_width_does_not_mind_where_a_set_lies():
    x = np.random.default_rng(0).normal(size=(30, 4))
    here, there = distributions.vendi(x, width=1), distributions.vendi(x + 50, width=1)
    assert here == pytest.approx(there) and distributions.vendi(x + 50) < 1.1 < 2 < distributions.vendi(x)
    kernel = np.array([[np.exp(-((a - b) ** 2).sum() / 2) for b in x] for a in x]) / 30
    second = np.linalg.svd(kernel, compute_uv=False)
    assert here == pytest.approx(np.exp(-(second * np.log(second)).sum()))


# --- neighbours ------------------------------------------------------------------------------------------------------


def prdc_by_loops(real, fake, k):
    distance = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=-1)  # noqa: E731
    radius = lambda z: np.sort(distance(z, z), axis=1)[:, k]  # column 0 is the tile itself  # noqa: E731
    across, of_real, of_fake = distance(real, fake), radius(real), radius(fake)
    inside = across <= of_real[:, None]
    return {
        "precision": inside.any(0).mean(), "recall": (across <= of_fake[None]).any(1).mean(),
        "density": inside.sum(0).mean() / k, "coverage": inside.any(1).mean(),
    }  # fmt: skip


def test_precision_recall_density_coverage_agree_with_their_definition_and_with_prdc():
    real, fake = gaussians(150, 90, shift=0.4, width=5)
    for k in (3, 5):
        ours = distributions.precision_recall_density_coverage(real, fake, k)
        assert ours == pytest.approx(prdc_by_loops(real, fake, k))
        library = pytest.importorskip("prdc")
        assert ours == pytest.approx(library.compute_prdc(real, fake, k)), "no distance is exactly a radius here"


def test_blocks_do_not_change_neighbours(monkeypatch):
    real, fake = gaussians(70, 40)
    whole = distributions.precision_recall_density_coverage(real, fake), distributions.realism(fake, real).tolist()
    monkeypatch.setattr(distributions, "BLOCK", 16)
    assert whole == (distributions.precision_recall_density_coverage(real, fake), distributions.realism(fake, real).tolist())


def test_coverage_of_equal_sets_is_what_theory_says():
    found = [distributions.precision_recall_density_coverage(*gaussians(400, 400, width=8, seed=s)) for s in range(5)]
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(1 - 2**-5, abs=0.02)
    assert np.mean([f["density"] for f in found]) == pytest.approx(1, abs=0.06)


def test_a_collapsed_set_is_precise_and_covers_little_and_a_far_one_is_neither():
    real, _ = gaussians(200, 1, width=4)
    centre = real[np.argsort(np.linalg.norm(real, axis=1))[:1]]
    collapsed = distributions.precision_recall_density_coverage(real, centre + 1e-3 * np.random.default_rng(0).normal(size=(100, 4)))
    assert collapsed["precision"] == 1 and collapsed["coverage"] < 0.2 and collapsed["recall"] < 0.05
    assert set(distributions.precision_recall_density_coverage(real, real[:100] + 50).values()) == {0.0}


def test_neighbours_refuse_small_sets():
    with pytest.raises(distributions.TooSmall, match="n too small to say: 29 tiles on one side"):
        distributions.precision_recall_density_coverage(*gaussians(100, 29))
    with pytest.raises(distributions.TooSmall, match="5 real tiles, realism with k = 5 needs more than 5"):
        distributions.realism(*gaussians(3, 5))


def test_realism_is_above_one_inside_a_ball_and_infinite_for_a_copy():
    real = np.concatenate([np.linspace(0, 1, 11)[:, None], [[100.0]]])  # an outlier whose ball holds everything
    score = distributions.realism(np.array([[0.3], [0.34], [50.0]]), real, k=1)
    assert np.isinf(score[0]) and score[1] == pytest.approx(0.1 / 0.04) and score[2] < 0.01


# --- copying ---------------------------------------------------------------------------------------------------------


def test_data_copying_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    made, held = np.round(rng.gamma(2, size=60), 1), np.round(rng.gamma(3, size=45), 1)  # rounded, so that there are ties
    z, auc = distributions.data_copying(made, held)
    theirs = stats.mannwhitneyu(made, held, use_continuity=False, method="asymptotic", alternative="less")
    assert auc == pytest.approx(theirs.statistic / (60 * 45)) and stats.norm.cdf(z) == pytest.approx(theirs.pvalue)


def test_data_copying_is_far_below_zero_for_copies_and_standard_normal_without():
    rng = np.random.default_rng(0)
    assert distributions.data_copying(np.zeros(30), rng.gamma(3, size=30))[0] < -6
    z = [distributions.data_copying(rng.gamma(3, size=30), rng.gamma(3, size=30))[0] for _ in range(500)]
    assert np.mean(z) == pytest.approx(0, abs=4 / np.sqrt(500)) and np.std(z) == pytest.approx(1, abs=0.12)
    assert distributions.data_copying(np.ones(3), np.ones(3)) == (0.0, 0.5)
    with pytest.raises(distributions.TooSmall):
        distributions.data_copying([], [1.0])
