"""How far strength may go, measured on a few tiles before the set is made: are they recognised, and how like their sources are they?

The higher the strength, the newer a tile and the sooner its class is gone; guidance may help or harm. What 05 would say is that of
`preview_scores`, by the judge that has seen real tiles only. Nothing is recorded.
"""

import numpy as np
import pandas as pd

from histokit.generate import img2img
from histokit.metrics import stats
from histokit.runs import workload

TURNED = ("strength", "guidance_scale")
COLUMNS = ["class", *TURNED, "tiles", "kept", "low", "high", "like_source"]


def measure(model, jobs, tiles, said, tried, each=workload.TRIED):
    """What 05 and its judge say of `each` tiles of a class under every pair of the settings tried, one row per class and pair.

    Args:
        model: backbone.Model with its adapters.
        jobs: the job table; its first `each` rows of a class are tried.
        tiles: manifest of 00_dataset.
        said: `preview_scores.PreviewScores` of the run; without a judge nothing is measured.
        tried: see `workload.tried_pairs`.

    Returns:
        DataFrame class, strength, guidance_scale, tiles, kept (share whose class is the judge's first answer, and that 05 would keep as no
        copy, not blank and not blurred), low, high (its Wilson interval), like_source (mean likeness to the source in [-1, 1], 1 for the
        source itself; NaN without one).

    Raises ValueError for what `tried_pairs` refuses, and for strengths of tiles that have no source.
    """
    pairs = workload.tried_pairs(tried, *(jobs[name].iloc[0] if len(jobs) else 1.0 for name in TURNED))
    if "strength" in tried and jobs["tile_id"].eq("").any():
        raise ValueError("tried has strengths, and some tiles start from noise alone, where strength is always 1; leave it out of tried")
    rows, few = [], jobs.groupby("class", sort=False).head(each).reset_index(drop=True)
    for values in pairs if said.judge[0] else ():
        used = dict(zip(TURNED, map(float, values), strict=True))
        looked = said.table(img2img.tried(model, few, tiles, **used), few)
        for name, own in looked.groupby(few["class"], sort=False):
            kept = int((own["status"].eq("kept") & own["first"]).sum())
            low, high = stats.wilson(kept, len(own))
            rows.append([name, *used.values(), len(own), kept / len(own), low, high, own["source"].mean()])
    return pd.DataFrame(rows, columns=COLUMNS)


def remarks(found, tried, judge):
    """What the table of `measure` says, a sentence a class.

    Args:
        tried: as `measure` was given it.
        judge: why there is no judge (`PreviewScores.remark`), "" where there is one.
    """
    if not len(found):
        yield f"Not measured. {judge}" if tried and judge else "Not measured: `tried` names no settings."
    for name, rows in found.groupby("class", sort=False):
        order = rows.sort_values(["kept", "strength"])
        least, best = order.iloc[0], order.iloc[-1]
        if best["kept"] == least["kept"]:
            yield f"{name}: {_of(best)} are recognised and would be kept under all of these settings."
        else:
            far = best["low"] > least["high"]
            yield (
                f"{name}: most, {_of(best)}, are recognised and would be kept at {_at(best)}, fewest, {_of(least)}, at {_at(least)}"
                f"{'' if far else '; with so few tiles that may be chance'}."
            )


def _of(row):
    return f"{row['kept'] * row['tiles']:.0f} of {row['tiles']}"


def _at(row):
    return f"strength {row['strength']:g} and guidance {row['guidance_scale']:g}"


def figure(found):
    """A panel a class: how like their sources tiles are (newer to the left) by the share recognised and kept, a line a guidance scale."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(found["class"]))
    drawn, axes = plt.subplots(1, len(names), figsize=(0.6 + 3.6 * len(names), 3.2), squeeze=False, sharey=True, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        own = found[found["class"].eq(name)]
        across = "like_source" if own["like_source"].notna().all() else "strength"
        for k, (scale, rows) in enumerate(own.groupby("guidance_scale")):
            rows = rows.sort_values("strength")
            axis.plot(rows[across], rows["kept"], marker="o", label=f"guidance {scale:g}")
            for row in rows.itertuples():  # of two lines one has its strengths above, one below
                place = {"xytext": (0, -13 if k % 2 else 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axis.annotate(f"{row.strength:g}", (getattr(row, across), row.kept), **place)
        axis.set(
            title=name, xlabel="likeness to the source (newer to the left)" if across == "like_source" else "strength", ylim=(-0.05, 1.12)
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("recognised and kept")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return drawn


def table(found):
    """The rows of `measure` as they are shown."""
    shown = found.assign(tiles=[_of(row) for row in found.to_dict("records")]).drop(columns=["kept", "low", "high"])
    return shown.rename(columns={"tiles": "recognised and kept", "like_source": "like their source"}).replace(np.nan, "").round(3)
