"""What a judge that did not guide makes of guided tiles: does the class appear, or only what fools the guide?

An optimised picture can raise a classifier's probability without looking like the class. So a second classifier, which steered nothing, is
asked about each tile and about its unguided twin. Nothing here rejects a tile: `selection` does, by the same judge.
"""

import json

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.generate import synthetic
from histokit.metrics import stats
from histokit.runs import places, selection_reasons
from histokit.vision import classifiers

VERSION = 1


def is_guided(made):
    """Which rows [N] bool were steered by a classifier."""
    return made["method"].eq("guided").to_numpy() if "method" in made else np.zeros(len(made), bool)


def refuse(panel, made, name):
    """Raise ValueError where a judge of the panel steered these tiles: it would only agree with itself.

    Args:
        panel: from `screening.judges`.
        made: synthetic manifest rows.
        name: of the judge's step, for the message.
    """
    steered = {json.loads(row["settings"])["guide"] for row in made[is_guided(made)].to_dict("records")}
    if steered & {classifiers.identity(judge) for judge in panel}:
        raise ValueError(f"{name} steered these tiles, so it cannot judge them; name another classifier, of another encoder")


def refuse_watcher(run, source, judge):
    """Raise ValueError where the decoder that drew these tiles was trained to please the judge's step (20_pretrain, `classifier`).

    Args:
        run: current Run, of which `source` is a parent.
        source: step that made the tiles.
        judge: step of the judge.
    """
    todo, seen = list(run.parents(source).values()), set()
    while todo:
        folder = todo.pop()
        record = places.read(folder) if folder not in seen else None
        seen.add(folder)
        if record is None:
            continue
        if record["parameters"].get("part") == "decoder" and record["parameters"].get("classifier") == judge:
            raise ValueError(
                f"{judge} watched while {record['step']} trained the decoder of these tiles, so it cannot judge them; name another"
            )
        todo += [files.root() / name for request in record["parents"] for name in request["found"]]


def judged(made, panel, decisions):
    """One row per class of guided tiles: what guide and judge say of them and of their unguided twins. No row without guided tiles.

    Args:
        made: synthetic rows from `data.load`.
        panel: from `screening.judges`.
        decisions: status and reason of the same rows.

    Returns:
        DataFrame class, tiles, guide_plain, guide, judge_plain, judge (median probabilities), sure (tiles whose guide reached what was
        asked), agreed (of these, those the judge lets pass), kept.
    """
    rows, made = [], made.reset_index(drop=True)
    against = decisions["reason"].reset_index(drop=True).map(_judge_disagrees)
    for name, own in made[is_guided(made)].groupby("label", sort=False):
        scores = pd.DataFrame([json.loads(text) for text in own["scores"]], index=own.index)
        twins, column = synthetic.twins(own), panel[0].classes.index(name)
        plain, now = (np.mean([judge.predict_tiles(part) for judge in panel], axis=0)[:, column] for part in (twins, own))
        sure = scores["stop"].eq("confidence") | (json.loads(own["settings"].iloc[0])["confidence"] == 0)
        row = {"class": name, "tiles": len(own), "guide_plain": scores["guide_plain"].median(), "guide": scores["guide"].median()}
        row |= {"judge_plain": np.median(plain), "judge": np.median(now), "sure": int(sure.sum())}
        row["agreed"] = int((sure & ~against[own.index]).sum())
        rows.append(row | {"kept": int(decisions["status"].reset_index(drop=True)[own.index].eq("kept").sum())})
    return pd.DataFrame(rows, columns=["class", "tiles", "guide_plain", "guide", "judge_plain", "judge", "sure", "agreed", "kept"])


def _judge_disagrees(reason):
    return any(one["code"] == "judge" for one in selection_reasons.read(reason))


def cost(made, decisions, folders):
    """What a kept tile cost to make: one row per class, for any step that makes tiles.

    Args:
        made: synthetic rows from `data.load`.
        decisions: status of the same rows.
        folders: of the runs that made them, whose notes say how fast they were.

    Returns:
        DataFrame class, tiles, seconds (to make one, on the machine that made them; NaN where that is not known), kept, seconds_kept (to
        make one that is kept; infinite where none is).
    """
    records = [record for record in map(places.read, folders) if record]
    rates = {record["run_id"]: record.get("notes", {}).get("images_per_s") for record in records}
    rows = []
    for name, own in made.reset_index(drop=True).groupby("label", sort=False):
        found = [rates.get(run_id) for run_id in own["run_id"]]
        seconds = float(np.mean([1 / rate for rate in found])) if all(found) else float("nan")
        kept = int(decisions["status"].reset_index(drop=True)[own.index].eq("kept").sum())
        rows.append({"class": name, "tiles": len(own), "seconds": seconds, "kept": kept})
    table = pd.DataFrame(rows, columns=["class", "tiles", "seconds", "kept"])
    return table.assign(seconds_kept=table["seconds"] * table["tiles"] / table["kept"])


def remarks(table):
    """What may be said of each class whose tiles a classifier steered, in sentences."""
    for row in table.to_dict("records"):
        if not row["sure"]:
            yield f"{row['class']}: the guide was sure of none of {row['tiles']} tiles."
            continue
        low, high = stats.wilson(row["agreed"], row["sure"])
        share = f"{100 * row['agreed'] / row['sure']:.0f} % [{100 * low:.0f} to {100 * high:.0f}]"
        yield (
            f"{row['class']}: of {row['sure']} tiles the guide was sure of, the judge agrees with {row['agreed']}, {share}; "
            f"{row['sure'] - row['agreed']} convinced only the classifier that steered them. From the unguided twins to these the guide's "
            f"probability went from {row['guide_plain']:.2f} to {row['guide']:.2f}, the judge's from {row['judge_plain']:.2f} to "
            f"{row['judge']:.2f} (medians)."
        )
