"""Differences between arms, with intervals that hold when cases and training seeds are drawn anew.

The unit is the case: tiles of one case are no independent evidence. Cases and classifier seeds are resampled together, the same
resamples for every arm, so arms subtract replicate by replicate. A case is a weight: what a resample needs is one weighted sum of
per-case confusion counts, which makes 2,000 resamples a sparse matrix product. Plain percentile intervals are too narrow at
eight cases (83 to 93 % coverage, simulated in tests); drawing n - 1 of n units and Student's t with effective degrees of freedom
are not. Nothing here knows a class name or an arm.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse, stats

VERSION = 1
MIN_CASES = 8  # below it: counts and range, no interval
MIN_SEEDS = 3  # two seeds leave coverage at 0.89 when training noise dominates


class Weights(NamedTuple):
    """How often each case and each classifier seed counts in each replicate."""

    cases: np.ndarray  # [B, K] float, mean 1 within a stratum
    seeds: np.ndarray  # [B, S] float


def confusion_by_case(y_true, y_pred, case, n_classes):
    """Confusion counts of each case and seed, sparse [S * C * C, K]; column k sums to (tiles of case k) x S.

    Args:
        y_true: [N] int label ids.
        y_pred: [S, N] int, one row per classifier seed.
        case: [N] int in [0, K), every value used.
    """
    y_pred = np.atleast_2d(y_pred)
    seed = np.arange(len(y_pred))[:, None]
    rows = (seed * n_classes + np.asarray(y_true)) * n_classes + y_pred  # [S, N]
    columns = np.broadcast_to(case, rows.shape)
    shape = (len(y_pred) * n_classes**2, int(np.max(case)) + 1)
    return sparse.csr_array((np.ones(rows.size), (rows.ravel(), columns.ravel())), shape=shape)


def strata(y_true, case):
    """The stratum [K] of each case: the rarest class (fewest cases) it holds, so no class gets lost in a resample."""
    pairs = np.unique(np.stack([case, y_true], 1), axis=0)  # [P, 2] distinct (case, class)
    classes, cases_of = np.unique(pairs[:, 1], return_counts=True)
    rarity = dict(zip(classes.tolist(), cases_of.tolist(), strict=True))
    stratum = {}
    for k, label in sorted(pairs.tolist(), key=lambda pair: (rarity[pair[1]], pair[1])):
        stratum.setdefault(k, label)
    return np.array([stratum[k] for k in sorted(stratum)])


def resample(strata, n_seeds, n=2000, seed=0):
    """Random weights for `n` bootstrap replicates over cases and seeds together.

    Within each stratum n_h - 1 of its n_h cases are drawn with replacement and weighted n_h / (n_h - 1), so that the variance of a
    mean is unbiased at small n_h (Rao and Wu 1988, JASA 83:231); seeds alike, and the crossing of both overstates rather than
    understates (Owen 2007, arXiv:0706.1062). A single case or seed cannot be redrawn and is held fixed.

    Args:
        strata: [K] stratum of each case.
        n_seeds: classifier seeds S, common to all arms.
    """
    rng = np.random.default_rng(seed)
    cases = np.ones((n, len(strata)), np.float32)
    for h in np.unique(strata):
        members = np.flatnonzero(strata == h)
        cases[:, members] = _redraw(len(members), n, rng)
    return Weights(cases, _redraw(n_seeds, n, rng))


def _redraw(units, n, rng):
    """[n, units] weights of drawing units - 1 of `units` with replacement; ones when there is a single unit."""
    drawn = np.ones((n, units), np.float32)
    if units > 1:
        for block in np.array_split(drawn, 1 + n * units // 2**22):  # counts are int64: keep them small when every tile is a case
            block[:] = rng.multinomial(units - 1, np.full(units, 1 / units), size=len(block)) * (units / (units - 1))
    return drawn


def leave_out(strata, n_seeds, most=50, seed=0):
    """Weights of the delete-one jackknife, and which block (a stratum, or -1 for seeds) each replicate belongs to.

    More than `most` cases of a stratum are deleted in `most` random groups: the degrees of freedom stop mattering there.

    Returns:
        Weights of R replicates, block [R].
    """
    rng = np.random.default_rng(seed)
    rows, blocks = [], []
    for h in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == h))
        for gone in np.array_split(members, min(most, len(members))) if len(members) > 1 else []:
            row = np.ones(len(strata))
            row[members] = len(members) / (len(members) - len(gone))
            row[gone] = 0
            rows.append(row)
            blocks.append(h)
    over_seeds = 1 - np.eye(n_seeds) if n_seeds > 1 else np.empty((0, n_seeds))
    cases = np.concatenate([np.reshape(rows, (-1, len(strata))), np.ones((len(over_seeds), len(strata)))])
    seeds = np.concatenate([np.ones((len(rows), n_seeds)), over_seeds])
    return Weights(cases, seeds), np.array(blocks + [-1] * len(over_seeds), int)


def replicates(by_case, weights, statistic, n_classes, budget=2**25):
    """The statistic of every weighted replicate, averaged over seeds, [B, E].

    Args:
        by_case: sparse [S * C * C, K] of `confusion_by_case`.
        weights: B replicates.
        statistic: confusion [..., C, C] -> [..., E], for instance recalls stacked with balanced accuracies.
        budget: bytes of one block of dense confusions.
    """
    n_seeds = weights.seeds.shape[1]
    block = max(1, budget // (8 * by_case.shape[0]))
    found = []
    for start in range(0, len(weights.cases), block):
        counts = (by_case @ weights.cases[start : start + block].T).T  # [b, S * C * C]
        values = statistic(counts.reshape(-1, n_seeds, n_classes, n_classes))  # [b, S, E]
        share = weights.seeds[start : start + block]
        share = share / share.sum(1, keepdims=True)
        found.append(np.einsum("bse,bs->be", values, share))
    return np.concatenate(found) if found else np.empty((0, 0))


def estimate(by_case, statistic, n_seeds, n_classes):
    """The statistic of all cases as they are, averaged over seeds, [E]."""
    once = Weights(np.ones((1, by_case.shape[1])), np.ones((1, n_seeds)))
    return replicates(by_case, once, statistic, n_classes)[0]


def degrees_of_freedom(left_out, block):
    """Effective degrees of freedom [E] of a stratified mean; infinite when nothing varies.

    Satterthwaite (1946): (sum v_h)^2 / sum(v_h^2 / (n_h - 1)) with v_h the jackknife variance of block h, seeds being one block.

    Args:
        left_out: [R, E] jackknife replicates (of a difference: replicates of one arm minus the other).
        block: [R] of `leave_out`.
    """
    total, spread = np.zeros((2, left_out.shape[1]))
    for h in np.unique(block):
        values = left_out[block == h]
        n = len(values)
        known = np.where(np.isnan(values), 0, values)
        centre = known.sum(0) / np.maximum((~np.isnan(values)).sum(0), 1)
        variance = (n - 1) / n * np.nansum((values - centre) ** 2, 0)
        total, spread = total + variance, spread + variance**2 / max(n - 1, 1)
    return np.divide(total**2, spread, out=np.full(total.shape, np.inf), where=spread > 0)


def interval(estimate, replicates, df, level=0.95, bounds=(-1.0, 1.0)):
    """Low and high ends [E] of estimate +- t(df) x standard deviation of the replicates, within `bounds`.

    Simulated coverage is in `tests/test_stats.py`. NaN where more than one replicate in twenty has no value.
    """
    estimate, replicates = np.asarray(estimate, float), np.asarray(replicates, float)
    missing = np.isnan(replicates).mean(0) > 0.05
    half = stats.t.ppf((1 + level) / 2, df) * np.nanstd(np.where(missing, 0, replicates), axis=0)
    low, high = np.clip([estimate - half, estimate + half], *bounds)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def sign_flip(contributions, n=10_000, seed=0):
    """Two-sided p in (0, 1] that paired differences are symmetric about 0; small p: one arm finds more.

    Exact up to 14 cases (with 5 it cannot go below 1/16), else `n` random flips. Holds for the classifiers as trained: training
    noise is outside it, so it comes beside the interval and never instead of it.

    Args:
        contributions: [K] one number per case, summing to the statistic.
    """
    contributions = np.asarray(contributions, float)
    k = len(contributions)
    if k <= 14:
        signs = 1 - 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(n, k))
        signs[0] = 1  # the truth is one of the flips, so p is never 0
    sums = np.abs(signs @ contributions)
    return float((sums >= abs(contributions.sum()) * (1 - 1e-9) - 1e-15).mean())
