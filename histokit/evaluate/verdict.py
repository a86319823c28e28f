"""From the predictions of all arms to the numbers of a verdict.

Measures every endpoint of every arm on the same resamples and sets arms against each other. `stats` and `classification` do the arithmetic,
`wording` the wording; where calls moved is counted in `error_analysis`, and how like real tiles the synthetic ones are in `likeness`.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from histokit.evaluate import error_analysis, wording
from histokit.metrics import classification, stats

VERSION = 4
LEVEL = 0.95
TAIL, HEAD, F1 = GROUPS = ("tail balanced accuracy", "head balanced accuracy", "macro-F1")


@dataclass(frozen=True)
class Measured:
    """Every endpoint of every arm, as it is and under the same resamples. E endpoints: the classes, then `GROUPS`."""

    predictions: object  # `predictions.Predictions`
    roles: dict
    classes_of: dict  # endpoint -> label ids it is a mean over
    left_out: dict  # endpoint -> {class: why}
    value: dict  # arm -> [E]
    drawn: dict  # arm -> [B, E]
    left: dict  # arm -> [R, E] delete-one replicates
    weights: stats.Weights  # B resamples of cases and runs
    without: stats.Weights  # R times without a unit
    block: np.ndarray  # [R] what that unit was

    @property
    def endpoints(self):
        return list(self.classes_of)

    @property
    def resamples(self):
        return len(self.weights.cases)


def measure(predictions, held, *, resamples=2000, seed=0):
    """Recall of each class, tail and head balanced accuracy and macro-F1 of every arm, with what their intervals need.

    A mean is as sure as its weakest class (`stats.MIN_CASES`): a class with fewer test cases keeps its own row, but a group is a mean over
    the classes that have enough and names the others. Where none has, it is a mean over those with two or more, then with one, and has no
    interval.

    Args:
        predictions: Predictions.
        held: Dataset (classes, roles, cannot_be_evaluated).
    """
    p, names = predictions, predictions.classes
    if set(names) & set(GROUPS):
        raise ValueError(f"a class is called {(set(names) & set(GROUPS)).pop()!r}, which names a figure here; rename the class")
    pairs = np.unique(np.stack([p.y, p.case], 1), axis=0)
    cases_of = np.bincount(pairs[:, 0], minlength=len(names))
    classes_of, left_out = {name: [i] for i, name in enumerate(names)}, {name: {} for name in names}
    members = {TAIL: held.tail, HEAD: held.head, F1: names}
    for group, inside in members.items():
        ids = [names.index(name) for name in inside]
        used = next((some for least in (stats.MIN_CASES, 2, 1) if (some := [i for i in ids if cases_of[i] >= least])), [])
        classes_of[group] = used
        left_out[group] = {names[i]: _few(cases_of[i]) for i in ids if i not in used}

    def statistic(confusion):
        groups = [classification.balanced_accuracy(confusion, classes_of[g]) for g in (TAIL, HEAD)]
        groups.append(classification.macro_f1(confusion, classes_of[F1]))
        return np.concatenate([classification.recall(confusion), np.stack(groups, -1)], -1)

    strata = stats.strata(p.y, p.case)
    weights, (without, block) = stats.resample(strata, p.runs, resamples, seed), stats.leave_out(strata, p.runs, seed=seed)
    value, drawn, left = {}, {}, {}
    for arm, called in zip(p.arms, p.called, strict=True):
        by_case = stats.confusion_by_case(p.y, called, p.case, len(names))
        value[arm] = stats.estimate(by_case, statistic, len(names))
        drawn[arm] = stats.replicates(by_case, weights, statistic, len(names))
        left[arm] = stats.replicates(by_case, without, statistic, len(names))
    return Measured(p, dict(held.roles), classes_of, left_out, value, drawn, left, weights, without, block)


def _few(cases):
    return "no test tile" if not cases else "one test case" if cases == 1 else f"{cases} test cases"


def _counts(m, endpoint):
    """(mask of its test tiles [N], number of cases, cases of its class with the fewest, that class) of an endpoint."""
    p, ids = m.predictions, m.classes_of[endpoint]
    mask = np.isin(p.y, ids)
    smallest, weakest = min(((len(set(p.case[p.y == i])), p.classes[i]) for i in ids), default=(0, ""))
    return mask, len(set(p.case[mask])), smallest, weakest


def difference(m, arm, baseline, endpoint):
    """One `wording.Difference`: `endpoint` of `arm` minus that of `baseline`; an interval only where n carries one."""
    p, e = m.predictions, m.endpoints.index(endpoint)
    mask, cases, smallest, weakest = _counts(m, endpoint)
    a, b = p.called[p.arms.index(arm)], p.called[p.arms.index(baseline)]
    hits, base_hits = a == p.y, b == p.y  # [R, N]
    low = high = chance = np.nan
    value, base = m.value[arm][e], m.value[baseline][e]
    if smallest >= stats.MIN_CASES and len(p.seeds) >= stats.MIN_SEEDS:
        drawn, left = (held[arm][:, [e]] - held[baseline][:, [e]] for held in (m.drawn, m.left))
        ends = stats.interval([value - base], drawn, left, m.block, LEVEL)
        low, high = (float(end[0]) for end in ends)
        if endpoint != F1:
            ids = m.classes_of[endpoint]
            size = np.bincount(p.y, minlength=len(p.classes))
            share = (hits - base_hits.astype(float)).mean(0)[mask] / (size[p.y[mask]] * len(ids))
            chance = stats.sign_flip(np.bincount(p.case[mask], share)[np.unique(p.case[mask])])
    return wording.Difference(
        endpoint=endpoint, arm=arm, baseline=baseline, classes=[p.classes[i] for i in m.classes_of[endpoint]],
        left_out=m.left_out[endpoint], value=float(value), base=float(base), low=low, high=high, tiles=int(mask.sum()), cases=cases,
        smallest=smallest, weakest=weakest, seeds=len(p.seeds), found=hits[:, mask].sum(1).tolist(),
        base_found=base_hits[:, mask].sum(1).tolist(), p=chance, same=bool((a == b)[:, mask].all()),
    )  # fmt: skip


def differences(m, baseline):
    """{arm: {endpoint: Difference}} of every other arm against the baseline."""
    return {arm: {e: difference(m, arm, baseline, e) for e in m.endpoints} for arm in m.predictions.arms if arm != baseline}


def levels(m):
    """One row per endpoint and arm: mean over seeds, interval, found, tiles, cases; ends are NaN where a class has too few cases."""
    p, rows = m.predictions, []
    for e, endpoint in enumerate(m.endpoints):
        mask, cases, smallest, _ = _counts(m, endpoint)
        for arm, called in zip(p.arms, p.called, strict=True):
            low = high = [np.nan]
            if smallest >= stats.MIN_CASES and len(p.seeds) >= stats.MIN_SEEDS:
                drawn, left = m.drawn[arm][:, [e]], m.left[arm][:, [e]]
                low, high = stats.interval(m.value[arm][[e]], drawn, left, m.block, LEVEL, bounds=(0, 1))
            found = (called == p.y)[:, mask].sum(1).tolist()
            row = {"endpoint": endpoint, "role": m.roles.get(endpoint, "all"), "tiles": int(mask.sum()), "cases": cases, "arm": arm}
            rows.append(row | {"value": m.value[arm][e], "low": low[0], "high": high[0], "found": found})
    return pd.DataFrame(rows)


def main_arms(m, parts, most=5):
    """The arms a reader compares first: the baseline, the rivals that find the rare classes best, the judged one; `most` in all."""
    tail = m.endpoints.index(TAIL)
    best = sorted(parts.rivals, key=lambda arm: -np.nan_to_num(m.value[arm][tail]))[: most - 2]
    chosen = {parts.baseline, parts.judged, *best}
    return [arm for arm in m.predictions.arms if arm in chosen]


def level_table(m, arms=None):
    """The same for reading: rows are endpoints, a column per arm (or of some), counts where n carries no interval."""

    def shown(row):
        if not row.tiles:
            return "no test tile"
        if np.isnan(row.low):
            return f"found {wording.counts(row.found, row.tiles)}"
        return f"{wording.percent(row.value)} [{100 * row.low:.1f} to {100 * row.high:.1f}]"

    table = levels(m)
    table["text"] = [shown(row) for row in table.itertuples()]
    table = table.pivot_table("text", ["endpoint", "role", "tiles", "cases"], "arm", aggfunc="first", sort=False)
    return table.reindex(columns=arms or m.predictions.arms).rename_axis(columns=None).reset_index()


def difference_table(all_differences):
    """Rows for reading and for CSV: every endpoint of every arm against the baseline."""
    rows = []
    for of_arm in all_differences.values():
        for d in of_arm.values():
            numbers = {"difference": d.difference, "low": d.low, "high": d.high, "p_sign_flip": d.p}
            n = {"tiles": d.tiles, "cases": d.cases, "seeds": d.seeds}
            rows.append({"arm": d.arm, "baseline": d.baseline, "endpoint": d.endpoint, **numbers, **n, "reading": wording.reading(d)})
    return pd.DataFrame(rows)


def controls(m, parts, specs):
    """What arms with wrong labels say about the judged one, in sentences; [] without such an arm.

    Synthetic tiles whose labels are shuffled teach nothing about a class. Where they help, or the judged arm does not do better, what
    helped was the number of tiles, or how the others were weighed beside them.
    """
    said = []
    for arm in m.predictions.arms:
        if (specs.get(arm) or {}).get("labels", "own") != "shuffled" or arm == parts.baseline:
            continue
        alone, beside = difference(m, arm, parts.baseline, TAIL), difference(m, parts.judged, arm, TAIL)
        gap = wording.points(beside.difference, beside.low, beside.high)
        if alone.outcome == "more":
            said.append(f"Control failed: {arm}, whose labels are wrong, finds the rare classes more often than {parts.baseline} as well.")
        elif beside.outcome == "more":
            said.append(f"Control: {parts.judged} finds the rare classes more often than {arm}, whose labels are wrong: {gap}.")
        else:
            said.append(f"Control: nothing shows that {parts.judged} does better than {arm}, whose labels are wrong: {gap}.")
    return said


def conclude(m, parts, held, made=None, *, demo=False, specs=None):
    """Everything results.json holds: the sentence first, the numbers behind it, how they were made.

    `made`: the synthetic tiles the judged arm trained on; a rare class without any is named in the sentence. `specs`: settings of the
    arms, as the recipe has them; they tell which are controls.
    """
    p, every = m.predictions, differences(m, parts.baseline)
    rivals = [difference(m, parts.judged, rival, TAIL) for rival in parts.rivals]
    mine = every[parts.judged]
    draws, generators = len(p.levels(0)), len(p.levels(1)) if parts.generated else 0
    lacking = [name for name in held.tail if name not in set(made["label"])] if made is not None and parts.generated else []
    leaked = wording.leaked(held.copies, len(p.y))
    count = {"rare": bool(held.tail), "draws": draws, "generators": generators, "has_cases": held.has_cases}
    return {
        "sentence": wording.sentence(mine[TAIL], mine[HEAD], rivals, demo=demo, lacking=lacking, leaked=leaked, **count),
        "classes": {name: wording.line(mine[name]) for name in p.classes},
        "controls": controls(m, parts, specs or {}),
        "main_arms": main_arms(m, parts),
        "arm": parts.judged,
        "baseline": parts.baseline,
        "demo": demo,
        "n": {"tiles": len(p.y), "cases": len(set(p.case)) if held.has_cases else None, "seeds": len(p.seeds), **count},
        "runs": p.runs.tolist(),
        "interval": {
            "method": f"bootstrap over {', '.join(['cases (stratified by class)', *stats.redrawn(p.runs)])} together, n - 1 of n units, "
            "Student's t with Satterthwaite degrees of freedom, those of draws and generators apart",
            "level": LEVEL,
            "B": m.resamples,
            "unit": "case" if held.has_cases else "tile, for want of case ids: intervals are too narrow",
            "none_below": {"cases": stats.MIN_CASES, "seeds": stats.MIN_SEEDS},
        },
        "arms": {arm: dict(zip(m.endpoints, m.value[arm].tolist(), strict=True)) for arm in p.arms},
        "differences": {arm: {e: plain(d) for e, d in of_arm.items()} for arm, of_arm in every.items()},
        "rivals": [plain(d) for d in rivals],
        "alarms": json.loads(error_analysis.alarms(p, m.roles).to_json(orient="records")),
        "predictions": p.hashes,
        "notes": [*p.notes, *wording.left_out_copies(held.copies)],
    }  # fmt: skip


def plain(d):
    """A `wording.Difference` as results.json holds it."""
    return asdict(d) | {"difference": d.difference, "outcome": d.outcome, "text": wording.line(d)}
