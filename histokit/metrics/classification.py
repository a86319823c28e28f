"""Numbers that say how good a classifier or a segmentation is.

Metrics of calls take a confusion matrix with any number of leading axes, so that one call serves one run, all seeds or two thousand
resamples; metrics of probabilities take them as they are, [N, C]. A class without a test tile is NaN and stays in the list. No
interval is computed here; what compares sets of tiles is in `distributions`.
"""

import numpy as np

VERSION = 1


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


def mcc(confusion):
    """Matthews correlation of all classes, [...] in [-1, 1], higher is better, 0 for chance; Gorodkin (2004), eq. 8.

    0 where only one class occurs or only one is called, as in scikit-learn.
    """
    confusion = np.asarray(confusion, float)
    total = confusion.sum((-2, -1))
    true, called = confusion.sum(-1), confusion.sum(-2)
    hits = np.trace(confusion, axis1=-2, axis2=-1)
    covariance = hits * total - (true * called).sum(-1)
    scale = np.sqrt((total**2 - (true**2).sum(-1)) * (total**2 - (called**2).sum(-1)))
    return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)


def shots(train_counts):
    """Label ids by number of *real* training tiles: `many` (> 100), `medium` (20 to 100), `few` (< 20).

    The groups of Liu et al. (2019), arXiv:1904.05160. Mean recall over one is `balanced_accuracy(confusion, group)`, NaN if empty.
    """
    counts = np.asarray(train_counts)
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    return {name: np.flatnonzero(chosen).tolist() for name, chosen in groups.items()}


# --- detection of the rare classes -----------------------------------------------------------------------------------


def _two_sides(score, is_tail):
    score, is_tail = np.asarray(score, float), np.asarray(is_tail, bool)
    if score.shape != is_tail.shape or score.ndim != 1:
        raise ValueError(f"one tail score per tile is needed, got {score.shape} scores and {is_tail.shape} labels")
    if np.isnan(score).any():
        raise ValueError(f"{np.isnan(score).sum()} of {len(score)} tail scores are NaN; look at the classifier, do not drop them")
    return score[~is_tail], score[is_tail]


def head_threshold(score, is_tail, keep=0.95, method="inverted_cdf"):
    """The least threshold that keeps a share of the head tiles at or below it, hence unflagged; to be carried to other tiles.

    Args:
        score: [N] float, higher is more tail: the sum of the tail classes' probabilities.
        is_tail: [N] bool.
        keep: share of head tiles; reached or passed by `inverted_cdf`, which does not go between tiles; `linear` does, as LoGex.

    Raises ValueError without head tiles.
    """
    head, _ = _two_sides(score, is_tail)
    if not len(head):
        raise ValueError("a threshold that keeps head tiles needs some; there is no tile of a common class")
    return float(np.quantile(head, keep, method=method))


def tail_missed(score, is_tail, keep=0.95, method="inverted_cdf", threshold=None):
    """tail_missed@95head: share of tail tiles at or below `head_threshold` of these same tiles, or a given one; lower is better.

    In [0, 1]; NaN without tiles on either side. LoGex calls it FPR-OOD, with head as the positive class and `method` linear. A threshold
    of the tiles it is applied to is an oracle; one from validation tiles is what a user has.
    """
    head, tail = _two_sides(score, is_tail)
    if not (len(head) and len(tail)):
        return float("nan")
    return float((tail <= (np.quantile(head, keep, method=method) if threshold is None else threshold)).mean())


def head_flagged(score, is_tail, catch=0.95):
    """head_flagged@95tail: share of head tiles flagged by the greatest threshold that catches 95 % of tail tiles; lower is better.

    In [0, 1]; NaN without tiles on either side. The clinical reading: false alarms at a sensitivity of 95 %. With fewer than a hundred
    tail tiles its own noise is above 0.08. OpenOOD calls this FPR95.
    """
    head, tail = _two_sides(score, is_tail)
    if not (len(head) and len(tail)):
        return float("nan")
    return float((head >= -np.quantile(-tail, catch, method="inverted_cdf")).mean())


def average_precision(score, is_tail):
    """Average precision of finding tail tiles by score, in [0, 1], higher is better, chance the share of tail; NaN without either side."""
    from sklearn import metrics as sk

    head, tail = _two_sides(score, is_tail)
    return float(sk.average_precision_score(is_tail, score)) if len(head) and len(tail) else float("nan")


def auroc(y_true, probabilities):
    """One-vs-rest AUROC of each class, [C] in [0, 1], higher is better; NaN where a class has no tile or all of them."""
    from sklearn import metrics as sk

    y_true, p = _probabilities(y_true, probabilities)
    mixed = [0 < (y_true == c).sum() < len(y_true) for c in range(p.shape[1])]
    return np.array([sk.roc_auc_score(y_true == c, p[:, c]) if mixed[c] else np.nan for c in range(p.shape[1])])


# --- calibration -----------------------------------------------------------------------------------------------------


def _probabilities(y_true, p):
    y_true, p = np.asarray(y_true), np.asarray(p, float)
    if p.ndim != 2 or len(p) != len(y_true):
        raise ValueError(f"probabilities must be [N, C] with one row per label, got {p.shape} for {len(y_true)} labels")
    off = np.abs(p.sum(1) - 1) if len(p) else np.zeros(0)
    if not np.isfinite(p).all() or (off > 1e-3).any():
        raise ValueError(f"probabilities must be finite and sum to 1 a row; the worst row sums to 1 +- {off.max():.3g}")
    return y_true, p


def _calibration_gap(confidence, right, bins):
    """Mean over tiles of |share right - mean confidence| of their equal-width bin (low, high]."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence)) if len(confidence) else float("nan")


def ece(y_true, probabilities, bins=15):
    """Expected calibration error of the called class, in [0, 1], lower is better; Guo et al. (2017), arXiv:1706.04599, eq. 3.

    Biased upwards below about 500 tiles: read it beside its bootstrap, and for the tail apart.
    """
    y_true, p = _probabilities(y_true, probabilities)
    return _calibration_gap(p.max(1), (p.argmax(1) == y_true).astype(float), bins)


def brier(y_true, probabilities):
    """Mean squared distance of the probabilities from the truth, summed over classes: in [0, 2], lower is better; Brier (1950)."""
    y_true, p = _probabilities(y_true, probabilities)
    return float(((p - np.eye(p.shape[1])[y_true]) ** 2).sum(1).mean())


def nll(y_true, probabilities):
    """Mean negative log likelihood in nats, >= 0, lower is better; a probability counts as at least 1e-12."""
    y_true, p = _probabilities(y_true, probabilities)
    return float(-np.log(p[np.arange(len(p)), y_true].clip(1e-12)).mean())
