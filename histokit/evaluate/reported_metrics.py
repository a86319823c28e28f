"""The figures other papers report, of every arm, so that a reader can set this study beside them.

Beside the verdict, not part of it: none of them was named before the test tiles were opened. Calibration tells whether a probability can be
taken at its word, which a threshold on it needs.
"""

import numpy as np
import pandas as pd

from histokit.metrics import classification

VERSION = 1
ENOUGH = 500  # test tiles below which a calibration error is biased upwards
METRICS = {  # name -> whether more is better
    "MCC": True, "macro AUROC": True, "recall, many-shot": True, "recall, medium-shot": True, "recall, few-shot": True,
    "average precision, rare": True, "head_flagged@95tail": False, "ECE": False, "ECE, rare tiles": False, "Brier": False, "NLL": False,
}  # fmt: skip


def measure(p, dataset):
    """One row per arm and metric: mean over runs, least and most of a run; NaN where the test tiles do not carry it.

    MCC and macro AUROC (one against the rest) over all classes; mean recall of the classes with more than 100, 20 to 100 and fewer than
    20 real training tiles (Liu et al. 2019); average precision of the rare classes taken together, and the share of common tiles flagged
    by the threshold that catches 95 % of rare ones (OpenOOD's FPR95); expected calibration error, Brier score and negative log
    likelihood of the probabilities as the classifier gives them, its temperature fitted on validation tiles. See `metrics.classification`.

    Args:
        p: predictions.Predictions.
        dataset: tiles.data.Dataset, for the roles of the classes and their real training tiles.

    Returns:
        DataFrame arm, metric, value, least, most, better ("higher" or "lower").
    """
    tail = [i for i, name in enumerate(p.classes) if dataset.roles[name] == "tail"]
    held = [dataset.counts.get(name, {}).get("train", {}) for name in p.classes]
    shots = classification.shots([part.get("tiles", 0) for part in held])
    rows = []
    for arm, called, probabilities in zip(p.arms, p.called, p.probabilities, strict=True):
        runs = pd.DataFrame([_of_run(p.y, *run, tail, shots) for run in zip(called, probabilities, strict=True)])
        for name, better in METRICS.items():
            row = {"arm": arm, "metric": name, "value": runs[name].mean(skipna=False), "least": runs[name].min(), "most": runs[name].max()}
            rows.append(row | {"better": "higher" if better else "lower"})
    return pd.DataFrame(rows)


def _of_run(y, called, probabilities, tail, shots):
    confusion = classification.confusion(y, called, probabilities.shape[1])
    rare, score = np.isin(y, tail), probabilities[:, tail].sum(1)
    there = {name: [i for i in ids if (y == i).any()] for name, ids in shots.items()}
    auroc = classification.auroc(y, probabilities)
    return {
        "MCC": float(classification.mcc(confusion)),
        "macro AUROC": float(np.nanmean(auroc)) if not np.isnan(auroc).all() else np.nan,
        **{f"recall, {name}-shot": float(classification.balanced_accuracy(confusion, ids)) for name, ids in there.items()},
        "average precision, rare": classification.average_precision(score, rare),
        "head_flagged@95tail": classification.head_flagged(score, rare),
        "ECE": classification.ece(y, probabilities),
        "ECE, rare tiles": classification.ece(y[rare], probabilities[rare]),
        "Brier": classification.brier(y, probabilities),
        "NLL": classification.nll(y, probabilities),
    }


def table(found, arms=None):
    """The same for reading: a row per metric, a column per arm (or of some), each with the range over its runs."""

    def shown(row):
        return "none to say it of" if np.isnan(row.value) else f"{row.value:.3f} ({row.least:.3f} to {row.most:.3f})"

    arms = arms or list(dict.fromkeys(found["arm"]))
    cells = {(row.arm, row.metric): shown(row) for row in found.itertuples()}
    better = dict(zip(found["metric"], found["better"], strict=True))
    return pd.DataFrame(
        {f"{name} ({way} is better)": [cells[arm, name] for arm in arms] for name, way in better.items()}, index=arms
    ).T.reset_index(names="figure")


def remarks(p, dataset):
    """What has to be known to read them, in sentences."""
    rare = int(np.isin(p.y, [i for i, name in enumerate(p.classes) if dataset.roles[name] == "tail"]).sum())
    if min(len(p.y), rare) < ENOUGH:
        yield f"With {len(p.y)} test tiles, {rare} of them rare, a calibration error (ECE) is too high by chance: compare arms, not papers."
