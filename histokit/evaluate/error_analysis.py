"""What the arms called the test tiles, counted as it is: no resample, no interval.

Between which classes calls moved, in which groups of tiles an arm holds, what a rare call is worth, what became of each tile. `verdict`
says how sure a difference is; these tables say where it comes from.
"""

import numpy as np
import pandas as pd

from histokit.metrics import classification

VERSION = 1


def confusion(p, arm):
    """Share of each true class (rows) called each class, mean over runs, [C, C]; NaN rows for classes without a test tile.

    Args:
        p: `predictions.Predictions`, here and below.
    """
    n = len(p.classes)
    counts = np.mean([classification.confusion(p.y, called, n) for called in p.called[p.arms.index(arm)]], axis=0)
    size = counts.sum(1, keepdims=True)
    return np.divide(counts, size, out=np.full(counts.shape, np.nan), where=size > 0)


def confusions(p):
    """`confusion` of every arm, one row per true class, called class and arm."""
    names = p.classes
    tables = {arm: confusion(p, arm) for arm in p.arms}
    return pd.DataFrame(
        [(arm, names[i], names[j], share) for arm, table in tables.items() for (i, j), share in np.ndenumerate(table)],
        columns=["arm", "true", "called", "share"],
    )


def groups(p, group=None, only=None):
    """Mean recall of every arm within each group of test tiles (scanner, centre, skin type), mean over runs; no rows for one group.

    A group's mean is over the classes that every group has, so that groups differ in tissue and not in classes; the worst one counts.

    Args:
        group: [N] str, the tiles' own groups by default; "" for a tile that belongs to none.
        only: names of classes to keep to.

    Returns:
        DataFrame group, tiles, cases, classes, and a column per arm; its last rows are "worst" and "gap" (best minus worst).
    """
    group = p.group if group is None else np.asarray(group, str)
    names = sorted(set(group) - {""}) if group is not None else []
    wanted = {p.classes.index(name) for name in (p.classes if only is None else only)}
    inside = {name: set(p.y[group == name].tolist()) & wanted for name in names}
    common = sorted(set.intersection(*inside.values())) if names else []
    if len(names) < 2 or not common:
        return pd.DataFrame(columns=["group", "tiles", "cases", "classes", *p.arms])
    rows = []
    for name in names:
        mask = (group == name) & np.isin(p.y, common)
        hits = p.called[:, :, mask] == p.y[mask]  # [A, R, n]
        recall = np.mean([hits[:, :, p.y[mask] == c].mean(axis=(1, 2)) for c in common], axis=0)
        facts = {"group": name, "tiles": int(mask.sum()), "cases": len(set(p.case[mask])), "classes": len(common)}
        rows.append(facts | dict(zip(p.arms, recall.tolist(), strict=True)))
    table = pd.DataFrame(rows)
    ends = {"worst": table[p.arms].min(), "gap": table[p.arms].max() - table[p.arms].min()}
    more = [{"group": name, "tiles": "", "cases": "", "classes": len(common), **values} for name, values in ends.items()]
    return pd.concat([table, pd.DataFrame(more)], ignore_index=True)


def alarms(p, roles, prevalence=0.01):
    """What a rare call of each arm is worth: one row per arm.

    A call of any rare class counts, right or not within them, as it would send the slide to somebody. Means over runs and classes, so
    that the sizes of the classes in the test set do not matter.

    Args:
        roles: {class: "head" or "tail"}.
        prevalence: share of rare tiles among all, at which the predictive value is stated.

    Returns:
        DataFrame arm, flagged (share of rare tiles), false_alarms (per 1,000 common tiles), ppv (NaN where nothing is ever flagged),
        prevalence. No rows without a rare and a common class in the test.
    """
    tail = [i for i, name in enumerate(p.classes) if roles[name] == "tail"]
    groups = {"tail": [i for i in tail if (p.y == i).any()], "head": [i for i in set(p.y.tolist()) if i not in tail]}
    rows = []
    for arm, called in zip(p.arms, p.called, strict=True):
        if groups["tail"] and groups["head"]:
            flagged = np.isin(called, tail)  # [R, N]
            hit, false = (np.mean([flagged[:, p.y == i].mean() for i in sorted(ids)]) for ids in (groups["tail"], groups["head"]))
            total = prevalence * hit + (1 - prevalence) * false
            ppv = prevalence * hit / total if total else np.nan
            rows.append({"arm": arm, "flagged": hit, "false_alarms": 1000 * false, "ppv": ppv, "prevalence": prevalence})
    return pd.DataFrame(rows, columns=["arm", "flagged", "false_alarms", "ppv", "prevalence"])


def changes(p, roles, parts):
    """What became of each test tile: share of runs in which baseline and judged arm call it right, and a word for the change.

    `still missed`, `newly found` and `lost` are rare tiles, `newly flagged` common ones that the judged arm calls rare more often; a
    change counts from a quarter of the runs on.

    Args:
        roles: {class: "head" or "tail"}. parts: `question.Roles`.

    Returns:
        DataFrame tile_id, case_id, label, baseline, judged (shares right), flagged_before, flagged_now (shares called rare), change.
    """
    few = 0.25
    tail = [i for i, name in enumerate(p.classes) if roles[name] == "tail"]
    one, other = (p.called[p.arms.index(arm)] for arm in (parts.baseline, parts.judged))
    right = [(called == p.y).mean(axis=0) for called in (one, other)]
    flagged = [np.isin(called, tail).mean(axis=0) for called in (one, other)]
    rare = np.isin(p.y, tail)
    change = np.full(len(p.y), "", dtype=object)
    change[rare & (right[1] < 0.5)] = "still missed"
    change[rare & (right[1] - right[0] >= few)] = "newly found"
    change[rare & (right[0] - right[1] >= few)] = "lost"
    change[~rare & (flagged[1] - flagged[0] >= few)] = "newly flagged"
    table = {"tile_id": p.tile_id, "case_id": p.case_id, "label": np.array(p.classes)[p.y], "baseline": right[0], "judged": right[1]}
    return pd.DataFrame(table | {"flagged_before": flagged[0], "flagged_now": flagged[1], "change": change})
