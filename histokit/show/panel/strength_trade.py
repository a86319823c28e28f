"""How far strength may go, measured on a few tiles before the set is made: would 05 keep them, and how like their sources are they?

The higher the strength, the newer a tile and the sooner its class is gone; guidance may help or harm. What 05 would say is that of
`preview_scores`, by the judge that has seen real tiles only. Nothing is recorded.
"""

import itertools

import numpy as np
import pandas as pd

from histokit.generate import img2img
from histokit.metrics import stats
from histokit.runs import workload

TURNED = ("strength", "guidance_scale")
COLUMNS = ["class", *TURNED, "tiles", "kept", "low", "high", "like_source"]


def measure(model, jobs, tiles, said, tried, each=workload.TRIED):
    """What 05 would keep of `each` tiles of a class under every pair of the settings tried, one row per class and pair.

    Args:
        model: backbone.Model with its adapters.
        jobs: the job table; its first `each` rows of a class are tried.
        tiles: manifest of 00_dataset.
        said: `preview_scores.PreviewScores` of the run.
        tried: {"strength": [...], "guidance_scale": [...]}; what is left out stays as in the job table.

    Returns:
        DataFrame class, strength, guidance_scale, tiles, kept (share that 05 would keep, copies not among them), low, high (its Wilson
        interval), like_source (mean likeness to the source in [-1, 1], 1 for the source itself; NaN without one).

    Raises ValueError for another setting, or one that is no number in its range.
    """
    if unknown := [name for name in tried if name not in TURNED]:
        raise ValueError(f"tried has no {unknown[0]!r}; expected {' and '.join(TURNED)}, each with a list of values")
    if not tried or not len(jobs):
        return pd.DataFrame(columns=COLUMNS)
    few = jobs.groupby("class", sort=False).head(each).reset_index(drop=True)
    rows, given = [], {name: jobs[name].iloc[0] for name in TURNED}
    for values in itertools.product(*(tried.get(name, [given[name]]) for name in TURNED)):
        used = dict(zip(TURNED, map(float, values), strict=True))
        looked = said.table(img2img.tried(model, few, tiles, **used), few)
        for name, own in looked.groupby(few["class"], sort=False):
            kept = int(own["status"].eq("kept").sum())
            low, high = stats.wilson(kept, len(own))
            rows.append([name, *used.values(), len(own), kept / len(own), low, high, own["source"].mean()])
    return pd.DataFrame(rows, columns=COLUMNS)


def remarks(found, judge):
    """What the table of `measure` says, a sentence a class.

    Args:
        judge: why there is no judge (`PreviewScores.remark`), "" where there is one.
    """
    if len(found) and judge:
        yield f"{judge} So whether these tiles show their class was not asked."
    for name, rows in found.groupby("class", sort=False):
        best = rows.sort_values(["kept", "strength"]).iloc[-1]
        least = rows.sort_values(["kept", "strength"]).iloc[0]
        if best["kept"] == least["kept"]:
            yield f"{name}: 05 would keep {_of(best)} under all of these settings."
        else:
            yield (
                f"{name}: 05 would keep most, {_of(best)}, at {_at(best)}, and fewest, {_of(least)}, at {_at(least)}; with so few tiles "
                f"shares differ by {50 * (best['high'] - best['low']):.0f} points for no reason."
            )


def _of(row):
    return f"{row['kept'] * row['tiles']:.0f} of {row['tiles']}"


def _at(row):
    return f"strength {row['strength']:g} and guidance {row['guidance_scale']:g}"


def figure(found):
    """A panel a class: how like their sources tiles are (newer to the left) by the share 05 would keep, a line a guidance scale."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(found["class"]))
    drawn, axes = plt.subplots(1, len(names), figsize=(0.6 + 3.6 * len(names), 3.2), squeeze=False, sharey=True, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        own = found[found["class"].eq(name)]
        across = "like_source" if own["like_source"].notna().all() else "strength"
        for scale, rows in own.groupby("guidance_scale"):
            rows = rows.sort_values("strength")
            axis.plot(rows[across], rows["kept"], marker="o", label=f"guidance {scale:g}")
            for row in rows.itertuples():
                axis.annotate(
                    f"{row.strength:g}", (getattr(row, across), row.kept), (0, 6), textcoords="offset points", ha="center", fontsize=8
                )
        axis.set(title=name, xlabel="likeness to the source" if across == "like_source" else "strength", ylim=(-0.05, 1.12))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("share 05 would keep")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return drawn


def table(found):
    """The rows of `measure` as they are shown."""
    shown = found.assign(tiles=[_of(row) for row in found.to_dict("records")]).drop(columns=["kept", "low", "high"])
    return shown.rename(columns={"tiles": "05 would keep", "like_source": "like their source"}).replace(np.nan, "").round(3)
