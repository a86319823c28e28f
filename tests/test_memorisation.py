"""Planted copies must be found, honest tiles must pass, and what cannot be calibrated must say so."""

import numpy as np
import pytest

from histokit.metrics import distributions, memorisation, stats

CASES = np.repeat(np.arange(20), 5)


def distances(n, shift=0.0, seed=0):
    """Distances of real tiles of other cases to the nearest training tile, nearer by `shift`."""
    return np.random.default_rng(seed).gamma(30, 1 / 30, n) - shift


def detector(planted=None, seed=0, space="feature"):
    planted = planted or {"exact": np.zeros(20), "crop": np.full(20, 0.05)}
    return memorisation.calibrate(space, distances(100, seed=seed), CASES, planted, seed)


def test_the_cut_calls_one_real_tile_in_twenty_a_copy_also_in_the_half_it_has_not_seen():
    rates = [detector(seed=s).real_rate for s in range(200)]
    assert np.mean(rates) == pytest.approx(0.05, abs=0.012)
    assert detector().strict < detector().cut


def test_a_detector_is_fit_for_the_copies_it_finds_and_no_others():
    found = detector({"exact": np.zeros(20), "jpeg": distances(20)})
    assert found.fit("exact") and not found.fit("jpeg") and not found.fit("never planted")
    assert memorisation.unfit([found]) == ["jpeg"]
    other = detector({"exact": distances(20), "jpeg": np.zeros(20)}, space="picture")
    assert memorisation.unfit([found, other]) == [], "one space each is enough"


@pytest.mark.parametrize("tiles, cases", [(19, 19), (40, 1)])
def test_few_tiles_or_one_case_cannot_be_calibrated(tiles, cases):
    with pytest.raises(distributions.TooSmall, match=f"{tiles} held-out tiles of {cases} case"):
        memorisation.calibrate("feature", distances(tiles), np.arange(tiles) % cases, {})


def test_excess_is_the_difference_and_its_interval_covers_the_truth():
    difference, low, high = memorisation.excess(30, 100, 0.05, 60)
    assert difference == pytest.approx(0.25) and low < 0.25 < high
    rng, missed = np.random.default_rng(0), 0
    for _ in range(400):
        one, other = rng.binomial(100, 0.05), rng.binomial(60, 0.05)
        _, low, high = memorisation.excess(one, 100, other / 60, 60)
        missed += not low <= 0 <= high
    assert missed / 400 <= 0.07


def test_excess_without_copies_still_has_an_upper_end():
    _, _, high = memorisation.excess(0, 100, 0.0, 60)
    assert high == pytest.approx(stats.wilson(0, 100)[1])


def test_copies_are_traced_to_the_tiles_they_repeat():
    share, most, count = memorisation.copied_from([0.1, 0.1, 0.1, 0.9], [3, 3, 0, 1], cut=0.5, training=10)
    assert (share, most, count) == (0.2, 3, 2)
    assert memorisation.copied_from([0.9], [0], 0.5, 10) == (0.0, -1, 0)


def test_the_ratio_does_not_call_a_dense_class_copied():
    neighbours = np.linspace(1, 2, 50)[None].repeat(2, 0)
    dense = memorisation.ratio(np.array([0.1, 0.001]), neighbours / 10)
    loose = memorisation.ratio(np.array([1.0, 0.01]), neighbours)
    np.testing.assert_allclose(dense, loose)
    assert dense[1] < 0.01 < dense[0]
    few = np.where(np.arange(50) < 3, neighbours, np.nan)
    np.testing.assert_allclose(memorisation.ratio([1.0, 0.0], few), [1 / few[0, :3].mean(), 0])
    assert memorisation.ratio([0.3], [[np.nan]]) == np.inf and memorisation.ratio([0.0], [[0.0]]) == 1


def gate(low=-0.02, high=0.01, closest=0.5, found=None):
    return memorisation.gate([detector(found)], [(low, high)], {"feature": closest}, {"feature": 0.2})


def test_the_gate_passes_blocks_and_says_when_it_cannot_tell():
    assert gate() == memorisation.Gate("pass", [])
    assert gate(low=0.03, high=0.08) == memorisation.Gate("blocked", ["3.0 to 8.0 points more copies in feature than among real tiles"])
    assert gate(high=0.08).state == "uncalibrated" and "up to 8.0 points more copies in feature" in gate(high=0.08).reasons[0]
    assert gate(closest=0.1).state == "blocked" and "as near as copies are" in gate(closest=0.1).reasons[0]
    unfit = gate(found={"flip": distances(20)})
    assert unfit.state == "uncalibrated" and "detector not fit: planted copies by flip" in unfit.reasons[0]
    assert memorisation.gate([], [], {}, {}) == memorisation.Gate("uncalibrated", [memorisation.TOO_FEW])
    assert memorisation.gate([], [], {"feature": 0.1}, {"feature": 0.2}).state == "blocked"


def test_a_pair_is_no_coincidence_when_it_is_as_near_as_copies_and_nearer_than_all_real_ones():
    real = distances(40)
    assert memorisation.certain(real, np.linspace(0, 0.1, 101)) == pytest.approx(0.095)
    assert memorisation.certain(real, np.full(5, 9.0)) == real.min()  # copies that are hard to see prove nothing
    assert memorisation.certain([np.nan], []) == 0 and memorisation.certain([np.nan], [0.2]) == 0.2


def test_an_honest_generator_is_seldom_blocked_however_many_tiles_it_makes():
    blocked = 0
    for seed in range(200):
        held, made = distances(100, seed=seed), distances(400, seed=1000 + seed)
        found = memorisation.calibrate("feature", held, CASES, {"exact": np.zeros(20), "crop": np.full(20, 0.05)}, seed)
        _, *bounds = memorisation.excess(int((made < found.strict).sum()), 400, found.strict_rate, found.real_tiles)
        limit = {"feature": memorisation.certain(held, [0.0, 0.05])}
        blocked += memorisation.gate([found], [bounds], {"feature": made.min()}, limit).state == "blocked"
    assert blocked / 200 <= 0.05
