"""What real tiles bring, and so what synthetic ones could: the curve of real tiles read backwards, and the ceilings of any generator.

A class that was made rare on purpose has real tiles to spare. Arms with more and fewer of them (`real_tiles`) show what a real tile buys;
the recall that synthetic tiles reach is looked up on that curve.
"""

import numpy as np
import pandas as pd

from histokit.arms import comparison
from histokit.evaluate import verdict, wording
from histokit.metrics import stats

VERSION = 4
LEAST = 3  # points of a curve


def curves(m, parts, specs, counts):
    """The points of both curves, of every class whose number of real tiles differs between arms.

    Real: the baseline and the arms that differ from it in `real_tiles` alone. Synthetic: the baseline at 0, the judged arm, and the arms
    that differ from that in `per_class` alone.

    Args:
        m: verdict.Measured; parts: question.Roles.
        specs: {arm: settings} of the classifier step, as its recipe writes them.
        counts: rows of `comparison.counts`, of all replicates.

    Returns:
        DataFrame class, kind (real | synthetic), arm, tiles (mean over replicates), fewest, most, value, low, high (recall in [0, 1]),
        sorted by tiles; no rows where a class has fewer than three points of real tiles.
    """
    held = pd.DataFrame(counts).groupby(["arm", "label"])[["real", "synthetic"]].agg(["mean", "min", "max"])
    levels = verdict.levels(m).set_index(["arm", "endpoint"])
    rows = []
    for name in m.predictions.classes:
        real = [arm for arm in m.predictions.arms if _alike(specs, arm, parts.baseline, "real_tiles")]
        made = [arm for arm in m.predictions.arms if parts.generated and _alike(specs, arm, parts.judged, "per_class")]
        if len({held.loc[(arm, name), ("real", "mean")] for arm in real}) < LEAST:
            continue
        points = [("real", arm, *held.loc[(arm, name), "real"]) for arm in real]
        points += [("synthetic", arm, *held.loc[(arm, name), "synthetic"]) for arm in made]
        points += [("synthetic", parts.baseline, 0, 0, 0)] * bool(made)
        for kind, arm, *many in sorted(points, key=lambda point: (point[0], point[2])):
            tiles = dict(zip(("tiles", "fewest", "most"), map(round, many), strict=True))
            rows.append({"class": name, "kind": kind, "arm": arm} | tiles | levels.loc[(arm, name), ["value", "low", "high"]].to_dict())
    return pd.DataFrame(rows, columns=["class", "kind", "arm", "tiles", "fewest", "most", "value", "low", "high"])


def _alike(specs, arm, other, key):
    """Whether two arms differ in nothing but one setting."""
    one, two = ({**comparison.ARM, **(specs.get(name) or {})} for name in (arm, other))
    return all(one[k] == two[k] for k in one if k != key)


def looked_up(tiles, recall, reached):
    """The number of real tiles at which a curve reaches a recall.

    The curve is made to rise (isotonic regression) and is a straight line in the logarithm of the tiles between its points. Beyond its
    ends it says nothing: the end itself is returned.

    Args:
        tiles: [P] numbers, rising. recall: [..., P]. reached: [...].

    Returns:
        [...] float, between the first and the last of `tiles`.
    """
    from scipy.optimize import isotonic_regression

    at = np.log(np.asarray(tiles, float))
    recall, reached = np.asarray(recall, float), np.asarray(reached, float)
    out = np.empty(reached.shape)
    for where in np.ndindex(reached.shape):
        rising, y = isotonic_regression(recall[where]).x, reached[where]
        k = int(np.searchsorted(rising, y))  # the first point that is as high
        if k in (0, len(at)):
            out[where] = at[min(k, len(at) - 1)]
        else:
            out[where] = at[k - 1] + (at[k] - at[k - 1]) * (y - rising[k - 1]) / (rising[k] - rising[k - 1])
    return np.exp(out)


def worth(m, parts, points):
    """How many more real tiles would have done what the synthetic ones of the judged arm did: one row per class of `curves`.

    The interval is that of the same resamples of cases and seeds the verdict rests on, 2.5 to 97.5 %.

    Returns:
        DataFrame class, arm, synthetic, fewest, highest (synthetic tiles: mean over replicates, and their range), real (tiles of the
        baseline), worth, low, high (more real tiles; NaN ends where the test cases carry no interval), least, most (what the ends of the
        curve allow), text.
    """
    rows = []
    for name, part in points.groupby("class", sort=False):
        real, made = (part[part["kind"].eq(kind)] for kind in ("real", "synthetic"))
        made = made[made["arm"].eq(parts.judged) & made["tiles"].gt(0)]
        if made.empty:
            continue
        e, judged = m.endpoints.index(name), made.iloc[0]
        base = int(real.loc[real["arm"].eq(parts.baseline), "tiles"].iloc[0])
        tiles, arms = real["tiles"].tolist(), real["arm"].tolist()
        value = looked_up(tiles, [m.value[arm][e] for arm in arms], m.value[judged["arm"]][e]) - base
        low = high = np.nan
        if not np.isnan(judged["low"]):
            drawn = looked_up(tiles, np.stack([m.drawn[arm][:, e] for arm in arms], 1), m.drawn[judged["arm"]][:, e]) - base
            low, high = np.quantile(drawn, [0.025, 0.975])
        row = {"class": name, "arm": judged["arm"], "synthetic": judged["tiles"], "fewest": judged["fewest"], "highest": judged["most"]}
        row |= {"real": base, "worth": float(value)}
        row |= {"low": low, "high": high, "least": tiles[0] - base, "most": tiles[-1] - base}
        rows.append(row | {"text": sentence(row)})
    return pd.DataFrame(rows, columns="class arm synthetic fewest highest real worth low high least most text".split())


CEILINGS = {
    ("same_cases", "none"): "A perfect generator that knows these cases could bring",
    ("same_cases", "vae"): "of which this base's autoencoder leaves",
    ("new_cases", "none"): "one that knew other cases could bring",
    ("new_cases", "vae"): "of which the autoencoder leaves",
}


def ceilings(m, parts, specs):
    """The arms with true tiles in the place of made ones (`real_tiles` with `from`), beside the baseline on the rare classes.

    Returns:
        DataFrame arm, whose (same_cases | new_cases), through (none | vae), real_tiles, difference, low, high (points of tail balanced
        accuracy in [-1, 1], NaN ends where there is no interval), each beside the same through the
        autoencoder: same cases first, few tiles before many; no rows without such arms.
    """
    plain, rows = comparison.ARM | (specs.get(parts.baseline) or {}), []
    for whose, through in CEILINGS:
        for arm in m.predictions.arms:
            spec = comparison.ARM | (specs.get(arm) or {})
            alike = all(spec[key] == plain[key] for key in spec if key not in ("real_tiles", "from", "through"))
            if alike and (spec["from"], spec["through"]) == (whose, through):
                d = verdict.difference(m, arm, parts.baseline, verdict.TAIL)
                row = {"arm": arm, "whose": whose, "through": through, "real_tiles": spec["real_tiles"]}
                rows.append(row | {"difference": d.difference, "low": d.low, "high": d.high})
    rows.sort(key=lambda row: (row["whose"] == "new_cases", row["real_tiles"], row["through"] == "vae"))
    return pd.DataFrame(rows, columns=["arm", "whose", "through", "real_tiles", "difference", "low", "high"])


def ruler(m, parts, found):
    """The ceilings in one sentence and, in another, where the judged arm stands on them; [] without ceilings."""
    if found.empty:
        return []
    told = []
    for row in found.itertuples():
        gap = wording.points(row.difference, row.low, row.high)
        told.append(f"{CEILINGS[row.whose, row.through]} {gap} ({row.arm}, {row.real_tiles} tiles a class)")
    lines = ["; ".join(told)[:1].upper() + "; ".join(told)[1:] + f"; all beside {parts.baseline}, on the rare classes."]
    best = found[found["whose"].eq("same_cases") & found["through"].eq("none")]
    if parts.generated and len(best):
        mine, top = verdict.difference(m, parts.judged, parts.baseline, verdict.TAIL), best.iloc[0]
        where = "at or above" if mine.difference >= top["low"] else "below" if top["low"] == top["low"] else "beside"
        of = f"the lower bound of the first ({100 * top['low']:+.1f})" if top["low"] == top["low"] else "the first, which has no interval"
        lines.append(f"{parts.judged} with {wording.points(mine.difference, mine.low, mine.high)} stands {where} {of}.")
    return lines


def sentence(row):
    """One row of `worth` in words."""
    made = f"{row['fewest']} to {row['highest']}" if row["fewest"] != row["highest"] else row["synthetic"]
    many = f"{row['class']}: {made} synthetic tiles of {row['arm']}"
    curve = f"beyond the {row['real']} there are, by the curve from {row['real'] + row['least']} to {row['real'] + row['most']} real tiles"
    if np.isnan(row["low"]):
        return f"{many} did what {_number(row, 'worth')} more real tiles do {curve}; fewer than {stats.MIN_CASES} test cases, no interval."
    if round(row["low"]) <= row["least"] and round(row["high"]) >= row["most"]:
        return f"{many}: what they are worth in real tiles cannot be said, the interval spans the curve, {curve.rpartition('curve ')[2]}."
    if round(row["high"]) <= row["least"]:
        fewest = row["real"] + row["least"]
        return f"{many} were worth less than nothing: with the {row['real']} real ones they did no better than {fewest} real ones alone."
    if round(row["low"]) >= row["most"]:
        return f"{many} did at least what {row['most']} more real ones do, the end of the curve."
    return f"{many} were worth {_number(row, 'worth')} [{_number(row, 'low')} to {_number(row, 'high')}] real ones {curve}."


def _number(row, key):
    value = round(row[key])
    return f"{value} or fewer" if value <= row["least"] else f"{value} or more" if value >= row["most"] else f"{value}"
