"""Numbers that compare a set of synthetic tiles with a real one.

Each takes feature matrices [N, D] of one frozen encoder and does not care who extracted them; float64 from there on. What a set is
too small to carry is refused, not estimated. No interval is computed here and no threshold is set. Definitions, traps and sizes:
Stein et al. (2023), arXiv:2306.04675, is the review that the choice follows.
"""

import numpy as np

VERSION = 2
MIN_KID = 10  # tiles per side: below it the noise of KID exceeds a shift of 0.3 standard deviations many times over
MIN_NEIGHBOURS = 30  # tiles per side for precision, recall, density, coverage: below it they are near 1 whatever is compared
MIN_EXTRAPOLATED = 500  # tiles per side: with 100 of equal sets the extrapolated distance is 7 to 12, the truth 0
BLOCK = 1024  # rows of a distance matrix at a time


class TooSmall(ValueError):
    """A set that holds too few tiles for this number; the text starts with "n too small to say"."""


def _features(*sets, least, what):
    """Feature matrices as float64, checked; says what is wrong with which."""
    sets = [np.asarray(x, np.float64) for x in sets]
    for x in sets:
        if x.ndim != 2 or x.shape[1] != sets[0].shape[1]:
            raise ValueError(f"features must be [N, D] of one encoder, got shapes {[x.shape for x in sets]}")
        if len(x) < least:
            raise TooSmall(f"n too small to say: {len(x)} tiles on one side, {what} needs at least {least}")
        if not np.isfinite(x).all():
            raise ValueError(f"{(~np.isfinite(x).all(1)).sum()} of {len(x)} feature rows hold NaN or infinity; check the encoder")
    return sets


# --- Frechet distance ------------------------------------------------------------------------------------------------


def frechet(x, y):
    """Frechet distance of two Gaussians fitted to feature sets, >= 0, 0 for equal sets, lower is better; FID with Inception's features.

    ||mx - my||^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^1/2 with unbiased covariances (Heusel et al. 2017, arXiv:1706.08500, eq. 6), exact for
    fewer tiles than dimensions too: nothing is added to a covariance. Its bias falls as 1 / N, so only sets of equal size compare, and
    beside each value belongs that of real against real at the same N.

    Args:
        x: [N, D] float, N >= 2.
        y: [M, D] float, M >= 2.
    """
    x, y = _features(x, y, least=2, what="a covariance")
    shift = x.mean(0) - y.mean(0)
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))  # covariances a' a and b' b
    # tr (a'a b'b)^1/2 is the nuclear norm of a b', and rotating the rows of a or b does not change it
    a, b = (np.linalg.qr(z, mode="r") if len(z) > z.shape[1] else z for z in (a, b))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * root))  # rounding alone would go below


def frechet_extrapolated(x, y, points=15, seed=0):
    """Frechet distance at infinitely many tiles: the intercept of its values at N/2 ... N tiles a side on 1 / N; may be negative.

    Chong and Forsyth (2020), arXiv:1911.07023, section 4, from seeded subsets of both sides.

    Raises:
        TooSmall: fewer than 500 tiles on a side.
    """
    x, y = _features(x, y, least=MIN_EXTRAPOLATED, what="an extrapolated Frechet distance")
    n = min(len(x), len(y))
    rng = np.random.default_rng(seed)
    sizes = np.linspace(n // 2, n, points).astype(int)
    values = [frechet(x[rng.permutation(len(x))[:k]], y[rng.permutation(len(y))[:k]]) for k in sizes]
    return float(np.polyfit(1 / sizes, values, 1)[1])


# --- kernels ---------------------------------------------------------------------------------------------------------


def _cubic(x, y):
    """Polynomial kernel (x.y / D + 1)^3, [N, M] float64; Bińkowski et al. (2018), arXiv:1801.01401."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd(kxx, kyy, kxy):
    """Unbiased squared maximum mean discrepancy from three kernel blocks."""
    n, m = len(kxx), len(kyy)
    within = (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return within - 2 * kxy.mean()


def kid_test(x, y, permutations=1000, seed=0):
    """Kernel Inception Distance of two sets, 0 expected for equal distributions, lower is better; and the share p in (0, 1] of
    relabellings that give as much or more: a small p says that the sets differ.

    The unbiased estimate over the full sets (no subsets; arXiv:1801.01401, eq. 4): its mean does not depend on n, its noise does, and it
    is negative about every second time when the truth is 0. It is never clipped. Only comparable within one encoder. p is exact at tile
    level; tiles of one case are alike, so a small p may only say "other cases": read it beside `kid_beside_floor`.

    Args:
        x: [N, D] float, N >= 10.
        y: [M, D] float, M >= 10.

    Raises:
        TooSmall: fewer than ten tiles on a side. ValueError: other widths, NaN.

    Returns:
        (KID, p); p is never below 1 / (permutations + 1).
    """
    x, y = _features(x, y, least=MIN_KID, what="KID")
    pooled = np.concatenate([x, y])
    kernel = _cubic(pooled, pooled)
    n, m = len(x), len(y)
    rng = np.random.default_rng(seed)
    left = np.zeros((n + m, permutations + 1))  # 1 where a tile is called x; column 0 is the truth
    left[:n, 0] = 1
    for column in left.T[1:]:
        column[rng.permutation(n + m)[:n]] = 1
    diagonal = np.diag(kernel)
    across = kernel @ left  # [N + M, P + 1]
    xx = (left * across).sum(0)
    xy = ((1 - left) * across).sum(0)
    yy = kernel.sum() - xx - 2 * xy
    dx = diagonal @ left
    values = (xx - dx) / (n * (n - 1)) + (yy - (diagonal.sum() - dx)) / (m * (m - 1)) - 2 * xy / (n * m)
    slack = 1e-9 * np.abs(values).max()  # equal relabellings must count as equal
    return float(values[0]), float((values >= values[0] - slack).mean())


def halves(groups, repeats=100, seed=0):
    """Random splits of tiles into two sides that share no group (case), as even as the groups allow.

    Args:
        groups: [N] case of each tile.

    Returns:
        List of `repeats` pairs of index arrays. A single group gives an empty second side.
    """
    groups = np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    splits = []
    for _ in range(repeats):
        sides = [[], []]
        for group in rng.permutation(groups.max() + 1):
            shorter = 0 if len(sides[0]) <= len(sides[1]) else 1
            sides[shorter].extend(rng.permutation(np.flatnonzero(groups == group)))
        splits.append(tuple(np.array(rng.permutation(side), int) for side in sides))
    return splits


def kid_beside_floor(real, synthetic, groups, repeats=100, seed=0):
    """KID of synthetic against real tiles, and of real against real tiles of other cases, both at the same n.

    Each repeat splits the real cases in two: `floor` compares the halves, `value` compares one half with as many synthetic tiles.
    The spread over repeats is that of subsets, not a confidence interval.

    Args:
        real: [N, D] float.
        synthetic: [M, D] float.
        groups: [N] case of each real tile.

    Returns:
        value [repeats], floor [repeats], n tiles per side.

    Raises:
        TooSmall: fewer than ten tiles on a side once the cases are split.
    """
    splits = halves(groups, repeats, seed)
    n = min([len(synthetic)] + [len(side) for split in splits for side in split])
    if n < MIN_KID:
        raise TooSmall(f"n too small to say: {n} tiles on a side when the real cases are halved, KID needs at least {MIN_KID}")
    real, synthetic = _features(real, synthetic, least=MIN_KID, what="KID")
    rr, ss, rs = _cubic(real, real), _cubic(synthetic, synthetic), _cubic(real, synthetic)
    rng = np.random.default_rng(seed)
    value, floor = np.zeros((2, repeats))
    for i, (a, b) in enumerate(splits):
        a, b, s = a[:n], b[:n], rng.permutation(len(synthetic))[:n]
        floor[i] = _mmd(rr[np.ix_(a, a)], rr[np.ix_(b, b)], rr[np.ix_(a, b)])
        value[i] = _mmd(rr[np.ix_(a, a)], ss[np.ix_(s, s)], rs[np.ix_(a, s)])
    return value, floor, n


def mmd_rbf(x, y, sigma=10.0):
    """Squared maximum mean discrepancy x 1000 of features scaled to length 1, Gaussian kernel of width `sigma`; lower is better.

    The biased estimate (means over all pairs, a tile with itself included), >= 0, with a floor that falls as 1 / N. Jayasumana et al.
    (2024), arXiv:2401.09603, call it CMMD with features of CLIP ViT-L/14 at 336 px and sigma 10; with others it is MMD-RBF.
    """
    x, y = _features(x, y, least=2, what="MMD")
    x, y = _unit(x), _unit(y)
    kernel = lambda a, b: np.exp((a @ b.T - 1) / sigma**2).mean()  # |a - b|^2 = 2 - 2 a.b on unit length  # noqa: E731
    return float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def vendi(x, width=None):
    """Vendi score of one set, 1 to N: how many wholly different tiles would be as diverse; higher is more diverse.

    exp of the entropy of the eigenvalues of K / N; Friedman and Dieng (2023), arXiv:2210.02410, definition 3.1. It grows with N: compare
    sets of equal size.

    Args:
        width: None takes cosine similarities for K, as most do; they call a set alike that lies far from the origin. A number takes a
            Gaussian kernel of that width, in units of the features, which does not mind where a set lies.
    """
    (x,) = _features(x, least=1, what="the Vendi score")
    if width is None:
        x = _unit(x) / np.sqrt(len(x))
        kernel = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    else:
        kernel = np.exp(-_squared_distances(x, x) / (2 * width**2)) / len(x)
    values = np.linalg.eigvalsh(kernel)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def _unit(x):
    """Rows scaled to length 1; a row of zeros stays."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


# --- neighbours ------------------------------------------------------------------------------------------------------


def _squared_distances(x, y):
    """Squared Euclidean distances [N, M], never below 0."""
    return ((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)).clip(0)


def _radii(x, k):
    """Squared distance [N] of each row to its k-th nearest other row."""
    out = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        squared = _squared_distances(x[start : start + BLOCK], x)
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        out[start : start + BLOCK] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return out


def precision_recall_density_coverage(real, synthetic, k=5):
    """How much of the synthetic set looks real, and how much of the real set is reached; all higher is better.

    A ball around each tile reaches to its k-th nearest neighbour in its own set, its edge included.
    precision: share of synthetic tiles in any real ball; recall: share of real tiles in any synthetic ball (Kynkaanniemi et al. 2019,
    arXiv:1904.06991, eq. 1 and 2). density: balls a synthetic tile is in, over k, may pass 1; coverage: share of real balls that hold a
    synthetic tile (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4), 1 - 2^-k expected of equal sets of equal size. One outlier
    among the real tiles lifts precision; density and coverage stand it. Remove exact duplicates first: their balls have no radius.

    Args:
        real: [N, D] float, N >= 30.
        synthetic: [M, D] float, M >= 30.

    Returns:
        Dict of precision, recall, density, coverage.

    Raises:
        TooSmall: fewer than 30 tiles on a side, or not more than k.
    """
    real, synthetic = _features(real, synthetic, least=max(MIN_NEIGHBOURS, k + 1), what="precision and recall")
    of_real, of_synthetic = _radii(real, k), _radii(synthetic, k)
    hits, reached = np.zeros(len(synthetic)), np.zeros(len(synthetic), bool)
    covered, recalled = np.zeros((2, len(real)), bool)
    for start in range(0, len(real), BLOCK):
        rows = slice(start, start + BLOCK)
        squared = _squared_distances(real[rows], synthetic)  # [b, M]
        inside = squared <= of_real[rows, None]
        hits += inside.sum(0)
        reached |= inside.any(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (squared <= of_synthetic).any(1)
    return {
        "precision": float(reached.mean()), "recall": float(recalled.mean()),
        "density": float(hits.mean() / k), "coverage": float(covered.mean()),
    }  # fmt: skip


def realism(synthetic, real, k=5):
    """Realism [M] of each synthetic tile, higher is better; 1 and above lies inside a real ball, a copy is infinite.

    max over real tiles of radius / distance, balls larger than the median left out, since an outlier's holds everything;
    Kynkaanniemi et al. (2019), eq. 5.
    """
    real, synthetic = _features(real, synthetic, least=1, what="realism")
    if len(real) <= k:
        raise TooSmall(f"n too small to say: {len(real)} real tiles, realism with k = {k} needs more than {k}")
    radii = _radii(real, k)
    small = radii <= np.median(radii)
    real, radii = real[small], radii[small]
    out = np.empty(len(synthetic))
    for start in range(0, len(synthetic), BLOCK):
        squared = _squared_distances(synthetic[start : start + BLOCK], real)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(squared > 1e-9 * (1 + radii), radii / squared, np.inf)
        out[start : start + BLOCK] = np.sqrt(ratio.max(1))
    return out


def nearest(queries, keys, k=1, block=2048):
    """The k nearest rows of `keys` for each query by Euclidean distance, in float64 and blocks.

    Args:
        queries: [B, D] float.
        keys: [N, D] float, N >= k.

    Returns:
        distance [B, k] ascending, index [B, k] int64 into `keys`.
    """
    queries, keys = _features(queries, keys, least=0, what="nearest")
    if len(keys) < k:
        raise ValueError(f"nearest needs at least k = {k} keys, got {len(keys)}")
    distance, index = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), block):
        some = slice(start, start + block)
        squared = (queries[some] ** 2).sum(1)[:, None] - 2 * queries[some] @ keys.T + (keys**2).sum(1)
        near = np.argpartition(squared, min(2 * k, len(keys) - 1), axis=1)[:, : 2 * k]
        # measured again from differences, because a copy must come out at exactly 0 and the expanded square does not
        exact = np.linalg.norm(queries[some][:, None] - keys[near], axis=-1)
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        distance[some], index[some] = np.take_along_axis(exact, order, 1), np.take_along_axis(near, order, 1)
    return distance, index


# --- copying ---------------------------------------------------------------------------------------------------------


def data_copying(synthetic, held_out):
    """Whether synthetic tiles lie nearer to the training tiles than held-out real tiles do; C_T of Meehan et al. (2020).

    The Mann-Whitney statistic of the distances to the nearest training tile, arXiv:2004.05675, section 3, without its cells.

    Args:
        synthetic: [M] distance of each synthetic tile to its nearest training tile.
        held_out: [N] the same of real tiles of other cases.

    Returns:
        z: standard normal where nothing is copied, far below 0 where much is. auc in [0, 1]: chance that a synthetic tile is farther
        away than a held-out one, ties counting half; 0.5 where nothing is copied.
    """
    synthetic, held_out = np.asarray(synthetic, float), np.asarray(held_out, float)
    if not (len(synthetic) and len(held_out)):
        raise TooSmall("n too small to say: data copying needs synthetic and held-out tiles")
    pooled = np.concatenate([synthetic, held_out])
    _, which, ties = np.unique(pooled, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[which]
    m, n = len(synthetic), len(held_out)
    u = ranks[:m].sum() - m * (m + 1) / 2
    total = m + n
    variance = m * n / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    return float((u - m * n / 2) / np.sqrt(variance)) if variance > 0 else 0.0, float(u / (m * n))
