"""Are tiles of the rare classes found at all, as one group against the common ones? Tail detection, as LoGex reports it.

The score of a tile is the probability of all rare classes together; calling a rare tile by the name of another rare class is no mistake
here. The same resamples of cases, draws and seeds as in `verdict`, so that arms subtract. Mueller & Hein (2024), arXiv:2409.01317.
"""

import numpy as np
import pandas as pd

from histokit.evaluate import wording
from histokit.metrics import classification, stats

VERSION = 1
KEEP = 0.95  # share of common tiles that stay unflagged
AUROC, MISSED, CARRIED, FLAGGED = ENDPOINTS = (
    "AUROC", f"tail_missed@{100 * KEEP:.0f}head", "tail_missed, validation threshold", "head_flagged, validation threshold",
)  # fmt: skip


def measure(m, validation, baseline):
    """Detection of the rare tiles by every arm, and its difference from the baseline.

    Args:
        m: `verdict.Measured`, for the predictions on test tiles, the roles of the classes, and the resamples.
        validation: Predictions on validation tiles, of the same arms and runs; None where there are no such tiles.
        baseline: arm the others are held against.

    Returns:
        DataFrame, a row per arm and endpoint: value, low, high; difference, difference_low, difference_high (NaN for the baseline, and
        where n carries no interval); tail, head (tiles), cases. AUROC: higher is better. The others are shares, lower is better:
        tail_missed at the threshold that keeps 95 % of the common test tiles unflagged, an oracle, and at the one that does so on
        validation tiles, with the share of common test tiles that one flags. No rows without test tiles of rare and of common classes.
    """
    p, tail = m.predictions, [i for i, name in enumerate(m.predictions.classes) if m.roles[name] == "tail"]
    rare = np.isin(p.y, tail)
    if rare.all() or not rare.any():
        return pd.DataFrame(columns=["arm", "endpoint", "value"])
    whole = stats.Weights(np.ones((1, m.weights.cases.shape[1])), np.ones((1, len(p.runs))))
    each = (whole, m.weights, m.without)
    held = {arm: [_replicates(p, validation, a, tail, rare, weights) for weights in each] for a, arm in enumerate(p.arms)}  # [B, E]
    cases = min(len(set(p.case[rare])), len(set(p.case[~rare])))
    firm, rows = cases >= stats.MIN_CASES and len(p.seeds) >= stats.MIN_SEEDS, []
    n = {"tail": int(rare.sum()), "head": int((~rare).sum()), "cases": len(set(p.case))}
    for arm, (value, drawn, left) in held.items():
        other = held[baseline]
        own = stats.interval(value[0], drawn, left, m.block, bounds=(0, 1)) if firm else np.full((2, len(ENDPOINTS)), np.nan)
        apart = np.full((3, len(ENDPOINTS)), np.nan)
        if arm != baseline:
            apart[0] = value[0] - other[0][0]
            if firm:
                apart[1:] = stats.interval(apart[0], drawn - other[1], left - other[2], m.block)
        for e, name in enumerate(ENDPOINTS):
            row = {"arm": arm, "endpoint": name, "value": value[0, e], "low": own[0][e], "high": own[1][e]}
            rows.append(row | dict(zip(("difference", "difference_low", "difference_high"), apart[:, e], strict=True)) | n)
    return pd.DataFrame(rows)


def _replicates(p, validation, a, tail, rare, weights):
    """The endpoints [B, E] of arm number a under B weightings of cases and runs, averaged over runs."""
    by_tile, share = weights.cases[:, p.case].astype(float), weights.runs / weights.runs.sum(1, keepdims=True)
    total = np.zeros((len(by_tile), len(ENDPOINTS)))
    carry = validation is not None and not np.isin(validation.y, tail).all()
    for r, run in enumerate(p.runs.tolist()):
        score = p.probabilities[a, r][:, tail].sum(axis=1)
        carried = _carried(validation, p.arms[a], run, tail) if carry else np.nan
        total += share[:, [r]] * np.stack(_endpoints(score, rare, by_tile, carried), axis=1)
    return total


def _carried(validation, arm, run, tail):
    """The threshold that keeps 95 % of the common validation tiles unflagged, of one classifier."""
    found = validation.probabilities[validation.arms.index(arm), validation.runs.tolist().index(run)]
    return classification.head_threshold(found[:, tail].sum(axis=1), np.isin(validation.y, tail), KEEP)


def _endpoints(score, rare, weight, carried):
    """AUROC, missed, missed at a carried threshold, flagged there: [B] each, of tiles that count `weight` [B, N] times."""
    order = np.argsort(score, kind="stable")
    values, first = np.unique(score[order], return_index=True)
    head, tail = (np.add.reduceat((weight * which)[:, order], first, axis=1) for which in (~rare, rare))  # [B, distinct scores]
    heads, tails = head.sum(1), tail.sum(1)
    below = head.cumsum(1)
    auroc = (tail * (below - head / 2)).sum(1) / (heads * tails)  # Mann and Whitney (1947), ties count half
    threshold = (below < (KEEP - 1e-9) * heads[:, None]).sum(1)  # index of the least score that keeps the share
    missed = np.take_along_axis(tail.cumsum(1), threshold[:, None], axis=1)[:, 0] / tails
    if np.isnan(carried):
        return auroc, missed, np.full_like(auroc, np.nan), np.full_like(auroc, np.nan)
    low = values <= carried
    return auroc, missed, tail[:, low].sum(1) / tails, head[:, ~low].sum(1) / heads


def table(found, baseline):
    """The same for reading: a row per arm, a column per endpoint, shares in percent with their intervals; last what each misses beside
    the baseline, at the threshold of validation tiles."""

    def shown(row):
        ends = "" if np.isnan(row.low) else f" [{100 * row.low:.1f} to {100 * row.high:.1f}]"
        return "not known" if np.isnan(row.value) else f"{100 * row.value:.1f}{ends}"

    text = found.assign(text=[shown(row) for row in found.itertuples()])
    text = text.pivot_table("text", "arm", "endpoint", aggfunc="first", sort=False)[list(ENDPOINTS)]
    gaps = found[found["endpoint"].eq(CARRIED) & found["difference"].notna()].set_index("arm")
    beside = {row.Index: wording.points(row.difference, row.difference_low, row.difference_high) for row in gaps.itertuples()}
    text[f"missed beside {baseline}"] = [beside.get(arm, "") for arm in text.index]
    return text.rename_axis(columns=None).reset_index()


def remarks(found, judged, baseline):
    """What may be said of the judged arm beside the baseline, in sentences."""
    if not len(found):
        return ["Detection takes test tiles of rare and of common classes; one of them is missing."]
    said, n = [], found.iloc[0]
    for row in found[found["arm"].eq(judged) & found["endpoint"].isin([AUROC, CARRIED]) & found["value"].notna()].itertuples():
        base = found[found["arm"].eq(baseline) & found["endpoint"].eq(row.endpoint)].iloc[0]
        apart = wording.points(row.difference, row.difference_low, row.difference_high)
        said.append(f"{row.endpoint}: {judged} {100 * row.value:.1f} %, {baseline} {100 * base.value:.1f} %, {apart}.")
    flagged = found[found["arm"].eq(judged) & found["endpoint"].eq(FLAGGED)].iloc[0]
    if not np.isnan(flagged["value"]):
        said.append(
            f"With {judged}, the threshold that leaves {100 * KEEP:.0f} % of the common validation tiles unflagged flags "
            f"{100 * flagged['value']:.1f} % of the common test tiles."
        )
    carried = found[found["endpoint"].eq(CARRIED)]
    if more := carried.loc[carried["difference_low"].gt(0), "arm"].tolist():
        miss = "misses" if len(more) == 1 else "miss"
        said.append(f"At that threshold {', '.join(more)} {miss} more rare tiles than {baseline}, by intervals above 0.")
    return [*said, f"{n['tail']} rare and {n['head']} common test tiles of {n['cases']} cases."]
