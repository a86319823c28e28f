"""The interval against simulation, the resampling against loops, the permutation test against scipy."""

import numpy as np
import planted
import pytest
import scipy.stats

from histokit.metrics import classification, stats


def study(cases, seeds=6, tiles=6, effect=0.0, noise=0.3, seed=0, draws=1, generators=1, luck=0.0):
    """Predictions of two arms on classes with `cases` test cases each: y [N], case [N], pred [2, R, N] in the order of `stats.crossed`.

    Right or wrong follows a latent with case, case x arm, seed x arm, tile and residual parts, and one of deviation `luck` for each
    draw (generator, where there is one draw) of the second arm; wrong means the next class.
    """
    rng = np.random.default_rng(seed)
    n_classes = len(cases)
    y, case = [], []
    for label, k in enumerate(cases):
        for _ in range(k):
            size = rng.integers(max(1, tiles // 2), tiles * 3 // 2 + 1)
            case += [len(set(case))] * size
            y += [label] * size
    y, case = np.array(y), np.array(case)
    n = case.max() + 1
    latent = rng.normal(0, 0.8, n)[case] + rng.normal(0, 0.35, (2, n))[:, case] + rng.normal(0, 0.6, len(y))
    runs = planted.crossed(draws, generators, seeds)
    latent = latent[:, None] + rng.normal(0, noise, (2, len(runs), 1)) + rng.normal(0, 0.5, (2, len(runs), len(y)))
    level = runs[:, 0] if draws > 1 else runs[:, 1]
    latent[1] += effect + rng.normal(0, luck, level.max() + 1)[level, None] if luck else effect
    return y, case, np.where(latent > -0.2, y, (y + 1) % n_classes)


def balanced(confusion):
    return classification.balanced_accuracy(confusion)[..., None]


def compare(y, case, pred, n=300, seed=0, runs=None):
    """Difference, low, high of arm 1 minus arm 0; `runs` is by default one draw and generator, and as many seeds as there are."""
    classes, runs = y.max() + 1, planted.crossed(seeds=pred.shape[1]) if runs is None else runs
    tables = [stats.confusion_by_case(y, p, case, classes) for p in pred]
    groups = stats.strata(y, case)
    values = [stats.estimate(t, balanced, classes) for t in tables]
    drawn = [stats.replicates(t, stats.resample(groups, runs, n, seed), balanced, classes) for t in tables]
    weights, block = stats.leave_out(groups, runs)
    left = [stats.replicates(t, weights, balanced, classes) for t in tables]
    low, high = stats.interval(values[1] - values[0], drawn[1] - drawn[0], left[1] - left[0], block)
    return (values[1] - values[0])[0], low[0], high[0]


@pytest.mark.parametrize("cases, seeds, noise", [((8,) * 2, 6, 0.3), ((12, 3), 6, 0.1), ((20,) * 2, 3, 0.4)])
def test_with_no_true_effect_the_interval_misses_zero_in_at_most_one_study_in_twenty(cases, seeds, noise):
    missed = 0
    for trial in range(200):
        _, low, high = compare(*study(cases, seeds, noise=noise, seed=trial), n=150, seed=trial)
        missed += not low <= 0 <= high
    assert missed <= 17  # 5 % of 200 is 10; above 17 a rate of 5 % is rejected at 1.5 %


def rate_of_missing_zero(trials, luck, shape, seen=None):
    """Share of studies without a true effect whose interval leaves zero out; `seen`: the runs as the analysis is told."""
    missed = 0
    for trial in range(trials):
        y, case, pred = study((20, 20), noise=0.05, seed=trial, luck=luck, **shape)
        _, low, high = compare(y, case, pred, n=150, seed=trial, runs=planted.crossed(**(seen or shape)))
        missed += not low <= 0 <= high
    return missed / trials


@pytest.mark.parametrize("shape", [{"draws": 3, "generators": 2, "seeds": 3}, {"generators": 2, "seeds": 3}])
def test_the_luck_of_a_draw_or_a_generator_is_inside_the_interval(shape):
    assert rate_of_missing_zero(120, 0.3, shape) <= 0.1  # 5 % of 120 is 6; above 12 a rate of 5 % is rejected at 1 %


def test_leaving_the_luck_of_the_draw_out_claims_too_much():
    shape = {"draws": 3, "generators": 1, "seeds": 3}
    assert rate_of_missing_zero(60, 0.3, shape, seen={"seeds": 9}) > 0.15, "nine seeds of one draw are not nine runs of three"


def test_generators_within_a_draw_are_counted_once():
    levels = stats.redrawn(planted.crossed(3, 2, 4))
    assert list(levels) == ["classifier seeds", "draws"] and levels["draws"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert list(stats.redrawn(planted.crossed(1, 2, 1))) == ["generator seeds"] and stats.redrawn(planted.crossed()) == {}
    weights, block = stats.leave_out(np.zeros(3, int), planted.crossed(3, 2, 2))
    assert [(block == k).sum() for k in (0, -1, -2)] == [3, 2, 3]
    assert (weights.runs[block == -2].reshape(3, 3, 4).sum(-1) == 4 * (1 - np.eye(3))).all()


def test_tiles_as_units_would_claim_too_much():
    # the reason for cases: the same studies with every tile its own case
    missed = 0
    for trial in range(60):
        y, case, pred = study((8, 8), tiles=20, noise=0.0, seed=trial)
        kept = [0, 0]
        for i, unit in enumerate((case, np.arange(len(y)))):
            _, low, high = compare(y, unit, pred, n=100, seed=trial)
            kept[i] = high - low
        missed += kept[1] < 0.8 * kept[0]
    assert missed > 40


def test_a_large_effect_is_found():
    difference, low, high = compare(*study((15, 15), effect=0.8, noise=0.1))
    assert 0 < low < difference < high


def test_replicates_equal_a_loop_over_drawn_cases_and_seeds():
    y, case, pred = study((4, 3), seeds=3)
    weights = stats.resample(stats.strata(y, case), planted.crossed(seeds=3), n=5, seed=1)
    table = stats.confusion_by_case(y, pred[0], case, 2)
    fast = stats.replicates(
        table, weights, lambda c: np.stack([classification.recall(c)[..., 0], classification.macro_f1(c)], -1), 2, budget=1
    )
    for b in range(5):
        by_seed = []
        for s in range(3):
            matrix = np.zeros((2, 2))
            for tile in range(len(y)):
                matrix[y[tile], pred[0, s, tile]] += weights.cases[b, case[tile]]
            by_seed.append([classification.recall(matrix)[0], classification.macro_f1(matrix)])
        np.testing.assert_allclose(fast[b], np.average(by_seed, axis=0, weights=weights.runs[b]), rtol=1e-6)


def test_one_weight_each_gives_back_the_plain_metric():
    y, case, pred = study((5, 4), seeds=2)
    table = stats.confusion_by_case(y, pred[1], case, 2)
    plain = np.mean([classification.balanced_accuracy(classification.confusion(y, p, 2)) for p in pred[1]])
    np.testing.assert_allclose(stats.estimate(table, balanced, 2), [plain])


def test_strata_are_the_rarest_class_of_each_case_and_keep_every_class():
    case = np.array([0, 0, 1, 1, 2, 3, 4])
    y = np.array([0, 2, 0, 1, 0, 0, 1])
    groups = stats.strata(y, case)
    assert groups.tolist() == [2, 1, 0, 0, 1]
    drawn = stats.resample(groups, planted.crossed(seeds=2), n=500).cases
    assert drawn[:, 0].min() == 1  # the only case of its class is held fixed
    assert (drawn[:, [1, 4]].sum(1) == 2).all() and (drawn[:, [2, 3]].sum(1) == 2).all()


def test_resampled_means_have_the_unbiased_variance():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    means = stats.resample(np.zeros(5, int), planted.crossed(), n=40_000).cases @ values / 5
    np.testing.assert_allclose(means.var(), values.var(ddof=1) / 5, rtol=0.03)


def test_resamples_are_the_same_for_every_arm_and_follow_the_seed():
    groups = np.array([0, 0, 1, 1, 1])
    one, two, other = (stats.resample(groups, planted.crossed(2, 2, 4), n=10, seed=s) for s in (0, 0, 1))
    assert (one.cases == two.cases).all() and (one.runs == two.runs).all()
    assert not (one.cases == other.cases).all()


def test_degrees_of_freedom_are_those_of_one_sample_and_lie_between_two():
    rng = np.random.default_rng(0)

    def df(sizes):
        left, block = [], []
        for h, size in enumerate(sizes):
            values = rng.normal(size=size)
            left += [-v / (size - 1) for v in values]  # deleting v moves the mean by this much, up to a constant
            block += [h] * size
        return stats.degrees_of_freedom(np.array(left)[:, None], np.array(block))[0]

    assert df([7]) == pytest.approx(6)
    assert 1 <= df([2, 30]) <= 31
    assert stats.degrees_of_freedom(np.zeros((4, 1)), np.zeros(4, int))[0] == np.inf


def test_leaving_out_covers_every_case_once_and_groups_the_many():
    weights, block = stats.leave_out(np.array([0] * 3 + [1] * 200 + [2]), planted.crossed(seeds=4))
    assert [(block == h).sum() for h in (0, 1, 2, -1)] == [3, 50, 0, 4]
    assert ((weights.cases[block == 1][:, 3:203] == 0).sum(0) == 1).all()
    np.testing.assert_allclose(weights.cases[block == 1][:, 3:203].sum(1), 200)


def test_an_interval_stays_inside_its_bounds_and_says_nan_when_replicates_have_no_value():
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.normal(0.9, 0.2, 500), np.where(rng.random(500) < 0.2, np.nan, 0.5)], 1)
    low, high = stats.interval([0.9, 0.5], drawn, rng.normal(0.9, 0.08, (6, 2)), np.zeros(6, int), bounds=(0, 1))
    assert high[0] == 1 and 0 < low[0] < 0.9
    assert np.isnan(low[1]) and np.isnan(high[1])


def test_equal_arms_have_an_interval_of_exactly_zero():
    y, case, pred = study((8, 8))
    assert compare(y, case, pred[[0, 0]]) == (0, 0, 0)


def test_sign_flip_agrees_with_scipy_and_has_its_lower_limit():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.25, -0.05])
    exact = scipy.stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert stats.sign_flip(values) == pytest.approx(exact)
    assert stats.sign_flip(np.ones(5)) == 1 / 16
    assert stats.sign_flip(np.zeros(9)) == 1
    many = np.random.default_rng(0).normal(0.3, 1, 40)
    assert stats.sign_flip(many) == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_holm_is_the_step_down_of_its_definition_and_skips_what_was_not_tested():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(stats.holm(p), [0.03, 0.06, np.nan, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]).tolist() == [1, 1]


def test_wilson_is_the_solution_of_its_equation():
    low, high = stats.wilson(16, 20)
    z = scipy.stats.norm.ppf(0.975)
    for share in (low, high):
        assert abs(16 / 20 - share) == pytest.approx(z * np.sqrt(share * (1 - share) / 20))
    assert (round(low, 2), round(high, 2)) == (0.58, 0.92), "the spec's golden value"
