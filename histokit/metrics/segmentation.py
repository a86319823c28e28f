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
