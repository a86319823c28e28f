"""Pseudo-labels: tiles that nobody labelled, named by a classifier of the labelled ones.

The plain rival of a generator that learned from the same tiles: Lee (2013), "Pseudo-Label", ICML workshop on representation learning. At
most so many a class, the surest first, because a classifier of a long tail names its common classes: Wei et al. (2021), arXiv:2102.09559.
"""

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.vision import classifiers

VERSION = 1
SOURCE = "pseudo"
SETTINGS = {
    "arm": "",  # whose classifier names the tiles, seed by seed: an earlier arm of real tiles alone
    "precision": 0.9,  # share of validation tiles that are named rightly at or above the confidence asked for
    "per_class": 100,  # at most so many a class
}
LEAST = 10  # validation tiles that a threshold rests on


def settle(name, given, earlier):
    """Full settings of `pseudo` of arm `name`; `earlier` are the settled arms before it. ValueError says what is wrong."""
    if not isinstance(given, dict) or set(given) - set(SETTINGS):
        strange = sorted(set(given) - set(SETTINGS))[0] if isinstance(given, dict) else given
        raise ValueError(f"arm {name!r}: pseudo has no setting {strange!r}; use {', '.join(SETTINGS)}")
    found = {**SETTINGS, **given}
    fit = [
        other
        for other, arm in earlier.items()
        if not (arm["synthetic"] or arm["pseudo"] or arm["real_tiles"]) and arm["recolour"] == "none"
    ]
    if found["arm"] not in fit:
        raise ValueError(
            f"arm {name!r}: pseudo takes the name of an earlier arm of real tiles alone as `arm`, got {found['arm']!r}; "
            f"{'there is ' + ', '.join(fit) if fit else 'put one before it'}"
        )
    precision, most = found["precision"], found["per_class"]
    if isinstance(precision, bool) or not isinstance(precision, (int, float)) or not 0 < precision <= 1:
        raise ValueError(f"arm {name!r}: pseudo.precision is {precision!r}; expected a share above 0 and at most 1")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"arm {name!r}: pseudo.per_class is {most!r}; expected a whole number above 0")
    return found


def threshold(probabilities, y, precision):
    """The least confidence in [0, 1] from which on a classifier is right in `precision` of its answers; None where there is none.

    Args:
        probabilities: [N, C] of validation tiles. y: [N] int, their classes.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    order = np.argsort(-confidence, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last = np.append(confidence[order][:-1] != confidence[order][1:], True)  # equal confidences are taken together
    enough = np.flatnonzero((share >= precision) & (np.arange(1, len(order) + 1) >= LEAST) & last)
    return float(confidence[order][enough[-1]]) if len(enough) else None


def surest(probabilities, least, per_class):
    """Rows [M] and classes [M] of the tiles named with confidence `least` or more: of each class the `per_class` surest, in order."""
    confidence, named = probabilities.max(axis=1), probabilities.argmax(axis=1)
    order = np.argsort(-confidence, kind="stable")
    order = order[confidence[order] >= least]
    place = pd.Series(named[order]).groupby(named[order]).cumcount().to_numpy()
    rows = np.sort(order[place < per_class])
    return rows, named[rows]


def loose(tiles):
    """Rows of a manifest that an arm may name: real training tiles without a label."""
    return tiles[tiles["use"].eq("unlabelled") & tiles["split"].eq("train") & tiles["source"].eq("real")]


def added(run, name, settings, seed, real, tiles, classes):
    """The training tiles of one seed of arm `name`: its real ones, then the unlabelled ones that the same seed of its teacher is sure of.

    Args:
        settings: from `settle`; the teacher is trained in this run already.
        tiles: manifest of 00_dataset.

    Returns:
        (manifest rows, of which the named ones have a label and `source` pseudo; a line that says how many there are).
    """
    folder = run.path(settings["arm"], str(seed), "model.json").parent
    predictions = files.read_table(folder / "predictions.parquet")
    val = predictions[predictions["split"].eq("val")]
    least = threshold(val[[f"p_{c}" for c in classes]].to_numpy(), val["y"].to_numpy(), settings["precision"])
    rows = loose(tiles).reset_index(drop=True)
    if least is None or not len(rows):
        return real, f"{name}: at no confidence are answers on validation tiles right as often as asked for, so no tile was named"
    chosen, found = surest(classifiers.load(folder, run.device).predict_tiles(rows), least, settings["per_class"])
    labels = [classes[i] for i in found]
    rows = rows.iloc[chosen].assign(label=labels, source=SOURCE, use="labelled")
    told = ", ".join(f"{c} {labels.count(c)}" for c in classes if c in labels) or "none"
    return pd.concat([real, rows], ignore_index=True), f"{name}: tiles named with a confidence of {least:.2f} or more, first seed: {told}"
