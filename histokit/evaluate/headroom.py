"""What a perfect generator could bring to the rare classes, asked before anything is trained: true tiles in the place of made ones.

Where a class was made rare on purpose there are true tiles to spare, and of invented tissue they are drawn. A linear judge on frozen
features learns with and without them and is asked about validation tiles. The verdict on ceilings is that of 07, on test tiles.
"""

import numpy as np
import pandas as pd

from histokit.arms import ceilings
from histokit.evaluate import wording
from histokit.metrics import classification, stats
from histokit.tiles import data, splits
from histokit.vision import features, probes

VERSION = 1
MORE = 30  # true tiles a class in the place of made ones
PER_CLASS = 100  # training tiles of a class that the judge learns from at most
COLUMNS = ["whose", "through", "added", "tiles", "cases", "before", "difference", "low", "high"]


def measure(run, tiles, held, encoder, codec=None, more=MORE, seed=0):
    """What up to `more` true tiles a class bring to the mean recall of the rare classes on validation tiles.

    Args:
        run: runs.Run; drawn tiles are written below its folder.
        tiles: frozen manifest with paths; held: its Dataset.
        encoder: features.Encoder.
        codec: `codecs.VaeRoundTrip` of the base, through which the added tiles go as well; None leaves that out.

    Returns:
        DataFrame whose (same_cases | new_cases), through (none | vae), added (true tiles of a class at most), tiles, cases (rare ones to
        validate on), before (mean recall of the rare classes without them), difference, low, high (in [-1, 1], NaN ends with fewer than
        eight cases of a rare class); no rows where nothing is to spare, or a class that was made rare has no validation tile.
    """
    draw = ceilings.Drawn(run, held) if held.procedural == "toy" else None
    real = data.training(tiles)
    val = tiles[tiles["split"].eq("val") & tiles["use"].eq("labelled") & tiles["source"].eq("real")]
    rare = ceilings.made_rare(tiles, draw)
    if not rare or set(rare) - set(val["label"]) or set(rare) - set(real["label"]):
        return pd.DataFrame(columns=COLUMNS)
    few = pd.concat([splits.spread(group, PER_CLASS, seed) for _, group in real.groupby("label")])
    learned, asked = features.embed(encoder, few), features.embed(encoder, val)
    plain = _called(held.classes, learned, few["label"], asked)
    rows = []
    for whose in ("same_cases", "new_cases"):
        added = pd.concat([ceilings.spare(tiles, name, more, whose, draw) for name in rare])
        for through in ("none", "vae") if len(added) and codec is not None else ("none",) if len(added) else ():
            feats = features.embed(encoder, added, codec=codec if through == "vae" else None)
            called = _called(held.classes, np.concatenate([learned, feats]), [*few["label"], *added["label"]], asked)
            rows.append([whose, through, int(added["label"].value_counts().max()), *_gain(val, held.classes, rare, plain, called)])
    return pd.DataFrame(rows, columns=COLUMNS)


def _called(classes, feats, labels, asked):
    """Place [N] in `classes` of what the judge calls features `asked` [N, D], having learned from `feats` [M, D]."""
    called = probes.judge(feats, np.asarray(labels, str)).predict(asked)
    return np.array([classes.index(name) for name in called])


def _gain(val, classes, rare, before, after, few=stats.MIN_CASES):
    """Tiles and cases of the rare classes, their mean recall before, and the difference after with the ends of its interval."""
    truth = np.array([classes.index(name) for name in val["label"]])
    case, of = np.unique(val["case_id"], return_inverse=True)[1], [classes.index(name) for name in rare]
    counts = [stats.confusion_by_case(truth, called, case, len(classes)) for called in (before, after)]
    strata, runs = stats.strata(truth, case), np.zeros((1, 3), int)

    def recall(confusion):
        return classification.balanced_accuracy(confusion, of)[..., None]

    def gained(weights):
        return np.subtract(*(stats.replicates(one, weights, recall, len(classes)) for one in counts[::-1]))

    first, last = (float(stats.estimate(one, recall, len(classes))[0]) for one in counts)
    own = val[val["label"].isin(rare)]
    low, high = np.nan, np.nan
    if own.groupby("label")["case_id"].nunique().min() >= few:
        left, block = stats.leave_out(strata, runs)
        (low,), (high,) = stats.interval([last - first], gained(stats.resample(strata, runs)), gained(left), block)
    return len(own), own["case_id"].nunique(), first, last - first, float(low), float(high)


def said(found):
    """The table of `measure` in words, [sentence, ...]; none where nothing was to spare."""
    if not len(found):
        return []
    parts = []
    for row in found.to_dict("records"):
        gap = wording.points(row["difference"], row["low"], row["high"])
        if row["through"] == "vae":
            parts[-1] += f", after this base's autoencoder {gap}"
        else:
            whose = "the same" if row["whose"] == "same_cases" else "other"
            parts.append(f"up to {row['added']} more true tiles a class, of {whose} cases: {gap}")
    first = found.iloc[0]
    hint = "" if first["low"] == first["low"] else " (too few cases for an interval: a hint)"
    return [
        f"Before anything is trained a linear judge finds {100 * first['before']:.0f} % of the rare classes on {first['tiles']} validation "
        f"tiles of {first['cases']} cases{hint}. With {'; '.join(parts)}. A perfect generator could bring about as much."
    ]
