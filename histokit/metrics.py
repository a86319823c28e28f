"""Numbers that say how good a classifier, or a set of synthetic tiles, is.

Classification metrics take a confusion matrix with any number of leading axes, so that one call serves one run, all seeds or
two thousand resamples. Set metrics take two feature matrices and do not care who extracted them. A class without a test tile
is NaN and stays in the list; what a set is too small to carry is refused, not estimated. No interval is computed here.
"""

import numpy as np

VERSION = 1
MIN_KID = 10  # tiles per side: below it the noise of KID exceeds a shift of 0.3 standard deviations many times over


class TooSmall(ValueError):
    """A set that holds too few tiles for this number; the text starts with "n too small to say"."""


def confusion(y_true, y_pred, n_classes):
    """Counts [C, C] int64: row = true class, column = predicted class.

    Args:
        y_true: [N] int in [0, n_classes).
        y_pred: [N] int in [0, n_classes).

    Raises:
        ValueError: lengths differ or a label is outside the class list.
    """
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    if y_true.shape != y_pred.shape:
        raise ValueError(f"confusion needs one prediction per tile, got {y_true.shape} labels and {y_pred.shape} predictions")
    for name, labels in (("true", y_true), ("predicted", y_pred)):
        if len(labels) and not (0 <= labels.min() and labels.max() < n_classes):
            raise ValueError(f"{name} labels run from {labels.min()} to {labels.max()}, expected 0 to {n_classes - 1}; check class order")
    return np.bincount(y_true * n_classes + y_pred, minlength=n_classes**2).reshape(n_classes, n_classes)


def recall(confusion):
    """Share of each class that was found, [..., C] in [0, 1], higher is better; NaN for a class without a true tile.

    Args:
        confusion: [..., C, C] counts, rows = true class; weights of a resample are as good as counts.
    """
    confusion = np.asarray(confusion, float)
    true = confusion.sum(-1)  # [..., C]
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.divide(hits, true, out=np.full(true.shape, np.nan), where=true > 0)


def balanced_accuracy(confusion, classes=None):
    """Mean recall over a fixed list of classes, [...] in [0, 1], higher is better; NaN when one of them has no tile.

    scikit-learn's `balanced_accuracy_score` averages over the classes that happen to occur, so its value changes meaning when
    one is absent. Here the caller names the classes: the rare ones for *tail*, the common ones for *head* balanced accuracy.

    Args:
        confusion: [..., C, C] counts.
        classes: label ids to average over, all when None; an empty list gives NaN.
    """
    found = recall(confusion)
    found = found if classes is None else found[..., list(classes)]
    return found.mean(-1) if found.shape[-1] else np.full(found.shape[:-1], np.nan)


def f1(confusion):
    """F1 of each class, 2 TP / (2 TP + FP + FN), [..., C] in [0, 1], higher is better; NaN for a class without a true tile."""
    confusion = np.asarray(confusion, float)
    true, called = confusion.sum(-1), confusion.sum(-2)  # [..., C]
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.divide(2 * hits, true + called, out=np.full(true.shape, np.nan), where=true > 0)


def macro_f1(confusion, classes=None):
    """Mean F1 over a fixed list of classes, [...] in [0, 1], higher is better; NaN when one of them has no true tile.

    A class that is never predicted counts 0, as in scikit-learn with `zero_division=0`.
    """
    scores = f1(confusion)
    scores = scores if classes is None else scores[..., list(classes)]
    return scores.mean(-1) if scores.shape[-1] else np.full(scores.shape[:-1], np.nan)


def _cubic(x, y):
    """Polynomial kernel (x.y / D + 1)^3, [N, M] float64; Bińkowski et al. (2018), arXiv:1801.01401."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _features(*sets, least=MIN_KID):
    """Feature matrices as float64, checked; says what is wrong with which."""
    sets = [np.asarray(x, np.float64) for x in sets]
    for x in sets:
        if x.ndim != 2 or x.shape[1] != sets[0].shape[1]:
            raise ValueError(f"features must be [N, D] of one encoder, got shapes {[x.shape for x in sets]}")
        if len(x) < least:
            raise TooSmall(f"n too small to say: {len(x)} tiles on one side, KID needs at least {least}")
        if not np.isfinite(x).all():
            raise ValueError(f"{(~np.isfinite(x).all(1)).sum()} of {len(x)} feature rows hold NaN or infinity; check the encoder")
    return sets


def _mmd(kxx, kyy, kxy):
    """Unbiased squared maximum mean discrepancy from three kernel blocks."""
    n, m = len(kxx), len(kyy)
    within = (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return within - 2 * kxy.mean()


def kid(x, y):
    """Kernel Inception Distance of two feature sets: 0 expected for equal distributions, lower is better.

    The unbiased estimate over the full sets (no subsets): its mean does not depend on n, its noise does, and it is negative about
    every second time when the truth is 0. It is never clipped. Only comparable within one encoder. arXiv:1801.01401, eq. 4.

    Args:
        x: [N, D] float, N >= 10.
        y: [M, D] float, M >= 10.

    Raises:
        TooSmall: fewer than ten tiles on a side. ValueError: other widths, NaN.
    """
    x, y = _features(x, y)
    return float(_mmd(_cubic(x, x), _cubic(y, y), _cubic(x, y)))


def kid_test(x, y, permutations=1000, seed=0):
    """KID of two sets and the share p in (0, 1] of relabellings that give as much or more; small p: the sets differ.

    Exact at tile level. Tiles of one case are alike, so a small p may only say "other cases"; read it beside `kid_beside_floor`.

    Args:
        x: [N, D] float.
        y: [M, D] float.

    Returns:
        (KID, p); p is never below 1 / (permutations + 1).
    """
    x, y = _features(x, y)
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
    real, synthetic = _features(real, synthetic)
    rr, ss, rs = _cubic(real, real), _cubic(synthetic, synthetic), _cubic(real, synthetic)
    rng = np.random.default_rng(seed)
    value, floor = np.zeros((2, repeats))
    for i, (a, b) in enumerate(splits):
        a, b, s = a[:n], b[:n], rng.permutation(len(synthetic))[:n]
        floor[i] = _mmd(rr[np.ix_(a, a)], rr[np.ix_(b, b)], rr[np.ix_(a, b)])
        value[i] = _mmd(rr[np.ix_(a, a)], ss[np.ix_(s, s)], rs[np.ix_(a, s)])
    return value, floor, n


def nearest(queries, keys, k=1, block=2048):
    """The k nearest rows of `keys` for each query by Euclidean distance, in float64 and blocks.

    Args:
        queries: [B, D] float.
        keys: [N, D] float, N >= k.

    Returns:
        distance [B, k] ascending, index [B, k] int64 into `keys`.
    """
    queries, keys = _features(queries, keys, least=0)
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
