"""Overlap of predicted and true masks, from counts of pixels."""

import numpy as np

VERSION = 1


def dice(tp, fp, fn):
    """2 TP / (2 TP + FP + FN), in [0, 1], higher is better; any shape. NaN where there is no foreground in truth or prediction."""
    tp, fp, fn = (np.asarray(n, float) for n in (tp, fp, fn))
    whole = 2 * tp + fp + fn
    return np.divide(2 * tp, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def iou(tp, fp, fn):
    """TP / (TP + FP + FN), in [0, 1], higher is better; any shape. NaN where there is no foreground in truth or prediction."""
    tp, fp, fn = (np.asarray(n, float) for n in (tp, fp, fn))
    whole = tp + fp + fn
    return np.divide(tp, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def counts(drawn, seen, layers):
    """Pixels right, extra and lost of each tile and layer: tp, fp, fn, each int64 [N, K].

    Args:
        drawn, seen: uint8 [N, H, W] layer ids of the mask and of a segmenter. layers: K.
    """
    drawn, seen = (np.asarray(ids).reshape(len(ids), -1) for ids in (drawn, seen))
    found = np.empty((3, len(drawn), layers), np.int64)
    for k in range(layers):
        one, other = drawn == k, seen == k
        found[:, :, k] = (one & other).sum(1), (~one & other).sum(1), (one & ~other).sum(1)
    return tuple(found)


def per_patient(tp, fp, fn, patient, measure=dice):
    """A measure of each patient over all its tiles together, and the patients: [P, ...], [P], NaN for one without any foreground.

    Tiles of a patient are summed first: a tile of ten pixels of gland says little, and counts little.

    Args:
        tp, fp, fn: [N, ...]. patient: [N].
        measure: `dice` or `iou`.
    """
    names, place = np.unique(np.asarray(patient), return_inverse=True)
    sums = []
    for part in (tp, fp, fn):
        total = np.zeros((len(names), *np.shape(part)[1:]))
        np.add.at(total, place, np.asarray(part, float))
        sums.append(total)
    found = measure(*sums)
    return np.where(sums[0] + sums[2] > 0, found, np.nan), names  # nothing to find: neither right nor wrong
