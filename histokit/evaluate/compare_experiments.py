"""Two experiments side by side: which settings differ, and a paired verdict on the same test tiles.

Which of the two does better was not planned by either recipe: comparing until something is better finds luck. So each comparison is a look
at the test tiles, and the ledger counts it.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

from histokit.arms import predictions
from histokit.core import files
from histokit.evaluate import test_set_log, verdict, wording
from histokit.runs import places, provenance
from histokit.tiles import data

VERSION = 1
OWN = ("experiment", "recipe", "step", "class_name")  # of every run, no setting


def settings(one, other):
    """Parameters in which the steps of two experiments differ: DataFrame step, class_name, setting, and a column for each experiment.

    A step that only one of them has is one row, with the setting "(step)".
    """
    held = {name: _parameters(name) for name in (one, other)}
    rows = []
    for key in dict.fromkeys((*held[one], *held[other])):
        a, b = held[one].get(key), held[other].get(key)
        if a is None or b is None:
            rows.append((*key, "(step)", "there" if a is not None else "not there", "there" if b is not None else "not there"))
            continue
        for name in dict.fromkeys((*a, *b)):
            if name not in OWN and a.get(name) != b.get(name):
                rows.append((*key, name, a.get(name), b.get(name)))
    return pd.DataFrame(rows, columns=["step", "class_name", "setting", one, other], dtype=object)


def _parameters(experiment):
    """{(step, class): parameters} of the finished runs of an experiment."""
    top = files.root() / "outputs" / experiment
    records = [places.read(folder) for folder in provenance.runs_below(top)]
    found = {(r["step"], r.get("class_name", "")): r["parameters"] for r in records if r and r["status"] == "done"}
    if not found:
        raise FileNotFoundError(f"outputs/{experiment} holds no finished step; name two experiments below outputs/")
    return found


def paired(one, other, arms=("", ""), resamples=2000, seed=0):
    """The judged arm of one experiment against that of the other, on the same test tiles: (sentences, {endpoint: claims.Difference}).

    The look is written into the ledger first; the same arms of the same runs count once. The last sentences say how many there were.

    Args:
        arms: of each experiment, instead of the arm its 07_evaluate judged.

    Raises:
        FileNotFoundError: an experiment without a finished 07_evaluate.
        ValueError: other classes, other test tiles, or no classifier seed in common.
    """
    sides = [_side(name, arm) for name, arm in zip((one, other), arms, strict=True)]
    (dataset, a, arm_a, run_a), (other_dataset, b, arm_b, run_b) = sides
    if dataset.classes != other_dataset.classes:
        raise ValueError(f"{one} and {other} have other classes; only the same task can be compared")
    if len(a.tile_id) != len(b.tile_id) or (a.tile_id != b.tile_id).any() or (a.y != b.y).any():
        raise ValueError(f"{one} and {other} have other test tiles ({len(a.tile_id)} and {len(b.tile_id)}); arms are compared tile by tile")
    common = [run for run in a.runs.tolist() if run in b.runs.tolist()]
    if not common:
        raise ValueError(f"{one} and {other} have no classifier seed in common; train both with the same number of seeds")
    names = [f"{one}/{arm_a}", f"{other}/{arm_b}"]
    picked = [_of(side, arm, common) for side, arm in ((a, arm_a), (b, arm_b))]
    both = replace(
        a,
        arms=names,
        runs=np.array(common),
        called=np.stack([p[0] for p in picked]),
        probabilities=np.stack([p[1] for p in picked]),
        notes=[],
    )
    plan = {"judged": names[1], "baseline": names[0], "endpoint": verdict.TAIL, "level": verdict.LEVEL, "resamples": resamples}
    asks = {"experiment": f"{one} | {other}", "recipe": "histokit compare", "step": "compare"}
    asks = SimpleNamespace(**asks, run_id=files.digest(run_a, run_b, names)[:16])
    look = test_set_log.open_test(asks, dataset.name, provenance.real_tiles(one), plan)
    m = verdict.measure(both, dataset, resamples=resamples, seed=seed)
    found = {e: verdict.difference(m, names[1], names[0], e) for e in m.endpoints}
    shown = [e for e in (verdict.TAIL, verdict.HEAD, *dataset.classes) if found[e].outcome != "absent"]
    return [*(f"{wording.line(found[e])}." for e in shown), *look.remarks(dataset.name)], found


def _side(experiment, arm):
    """(dataset, predictions, arm, run id) of an experiment, as its 07_evaluate read them."""
    top = files.root() / "outputs" / experiment
    places_of = [p for p in provenance.runs_below(top) if (p / "results.json").is_file() and (places.read(p) or {}).get("status") == "done"]
    for place in places_of:
        results = files.read_json(place / "results.json")
        if isinstance(results, dict) and "sentence" in results:
            record = places.read(place)
            folder = top / record["parameters"]["arms_of"]
            dataset = data.read_frozen(top / "00_dataset" / "dataset.json")
            return dataset, predictions.read(folder, dataset.classes), arm or results["arm"], record["run_id"]
    raise FileNotFoundError(f"outputs/{experiment} has no finished 07_evaluate; run its recipe to the end")


def _of(p, arm, runs):
    """(called [R, N], probabilities [R, N, C]) of one arm in some runs."""
    if arm not in p.arms:
        raise ValueError(f"no arm {arm!r}; there is {', '.join(p.arms)}")
    at = [p.runs.tolist().index(run) for run in runs]
    return p.called[p.arms.index(arm), at], p.probabilities[p.arms.index(arm), at]
