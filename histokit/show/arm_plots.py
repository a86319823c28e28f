"""Figures of compared arms: what they were trained on, how they learned, what they find. Tables in, matplotlib axes out, as in `plots`."""

import matplotlib.pyplot as plt
import numpy as np

from histokit.show.plots import FAINT, INK, TAIL, TEST, TRAIN, VAL, new_axes, nth_colour

# ---- 06_classifier


def arm_tiles(counts, title="What each arm is trained on", ax=None):
    """Training tiles per class, real ones and those added to them; arms that train on the same share a bar.

    Args:
        counts: table of `comparison.counts`.
    """
    bars, middles, y = [], {}, 0.0
    for label, rows in counts.groupby("label", sort=False):
        shared = rows.groupby(["real", "synthetic", "recoloured"], sort=False)["arm"].agg(list)
        bars += [(y + k, *numbers, arms) for k, (numbers, arms) in enumerate(shared.items())]
        middles[label] = y + (len(shared) - 1) / 2
        y += len(shared) + 0.6
    ax = ax or new_axes(8, 0.8 + 0.2 * y)
    at, real, synthetic, recoloured = np.array([bar[:-1] for bar in bars], dtype=float).T
    for numbers, left, colour, label in (
        (real, 0, TRAIN, "real"),
        (synthetic, real, TEST, "synthetic"),
        (recoloured, real, VAL, "real, recoloured"),
    ):
        if label == "real" or numbers.any():
            ax.barh(at, numbers, 0.85, left=left, color=colour, label=label)
    for y, n, made, painted, arms in bars:
        added = f" + {made + painted}" if made + painted else ""
        ax.text(n + made + painted, y, f" {_few(arms, counts['arm'].nunique())}: {n}{added}", va="center", fontsize=7, color=INK)
    ax.set_yticks(list(middles.values()), list(middles))
    ax.invert_yaxis()
    ax.set_xlim(right=counts[["real", "synthetic", "recoloured"]].sum(axis=1).max() * 1.3)
    ax.set_xlabel("training tiles")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    return ax


def _few(arms, every, most=3):
    """Names of arms for one bar: all of them, up to three, or how many more."""
    if len(arms) == every > 1:
        return "every arm"
    return ", ".join(arms[:most]) + (f" and {len(arms) - most} more" if len(arms) > most else "")


def arm_curves(history, title="Balanced accuracy on real validation tiles while training", ax=None, score="val_balanced_accuracy"):
    """One line per arm (mean over seeds) over thin lines per seed; history: table of `trials.histories`, drawn is its column `score`."""
    ax, n = ax or new_axes(8, 3.5), history["arm"].nunique()
    for i, (arm, rows) in enumerate(history.groupby("arm", sort=False)):
        table = rows.pivot_table(index="step", columns="seed", values=score)
        if len(table):
            ax.plot(table.index, table, color=nth_colour(i), lw=0.5, alpha=0.4 if n <= 6 else 0.1)
            ax.plot(table.index, table.mean(axis=1), color=nth_colour(i), lw=2 if n <= 6 else 1.2, label=arm)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("optimiser updates")
    ax.set_title(title, loc="left", fontsize=10)
    if ax.get_legend_handles_labels()[0]:
        where = {"loc": "lower right"} if n <= 6 else {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        ax.legend(frameon=False, fontsize=8 if n <= 6 else 7, **where)
    return ax


def arm_recall(recall, title="Recall of each class on real validation tiles", ax=None):
    """Recall per class: a dot per arm (mean over seeds) and a bar from the lowest to the highest seed; beyond six arms a table in colours.

    Args:
        recall: DataFrame arm, seed, label, recall, tiles.
    """
    arms, labels = list(dict.fromkeys(recall["arm"])), list(dict.fromkeys(recall["label"]))
    tiles = recall.groupby("label")["tiles"].first()
    names = [f"{label} ({tiles[label]})" for label in labels]
    if len(arms) > 6:
        table = recall.pivot_table("recall", "arm", "label", sort=False).loc[arms, labels]
        ax = ax or new_axes(2.5 + 0.8 * len(labels), 1.4 + 0.27 * len(arms))
        ax.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(table.to_numpy()):
            ax.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else INK)
        ax.set_yticks(range(len(arms)), arms, fontsize=8)
        ax.set_xticks(range(len(labels)), names, rotation=30, ha="right", fontsize=8)
        ax.spines[:].set_visible(False)
        ax.set_title(f"{title}, %", loc="left", fontsize=10)
        return ax
    ax = ax or new_axes(8, 0.9 + 0.16 * len(arms) * len(labels) + 0.15 * len(labels))
    for a, arm in enumerate(arms):
        found = recall[recall["arm"].eq(arm)].groupby("label")["recall"].agg(["mean", "min", "max"]).loc[labels]
        at = np.arange(len(labels)) - 0.35 + 0.7 * (a + 0.5) / len(arms)
        ax.hlines(at, found["min"], found["max"], color=nth_colour(a), lw=1)
        ax.plot(found["mean"], at, "o", color=nth_colour(a), ms=5, label=arm)
    ax.set_yticks(range(len(labels)), names)
    ax.invert_yaxis()
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("recall (in brackets: validation tiles)")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


# ---- 07_evaluate


def forest(rows, roles, arms, title="Recall gained or lost against the baseline", ax=None):
    """Difference of every arm from the baseline, class by class, rare classes first; the cost to the common classes on the same axis.

    A bar is the 95 % interval. A hollow dot has none: too few cases or seeds.

    Args:
        rows: DataFrame arm, baseline, endpoint, difference, low, high, tiles, cases; shares, drawn in points.
        roles: {class: head | tail}; endpoints not in it are means over classes and drawn heavier.
        arms: all arms in order, the baseline too, so that an arm keeps its colour from 06.
    """
    tail, head = ([name for name in roles if roles[name] == role] for role in ("tail", "head"))
    means = [name for name in dict.fromkeys(rows["endpoint"]) if name not in roles]
    order = [*tail, *[m for m in means if m.startswith("tail")], *[m for m in means if m.startswith("head")], *head]
    order = [name for name in order if rows["endpoint"].eq(name).any()]
    shown = list(dict.fromkeys(rows["arm"]))
    ax = ax or new_axes(8.5, 1.4 + len(order) * (0.22 + 0.16 * len(shown)))
    for a, arm in enumerate(shown):
        mine, own = rows[rows["arm"].eq(arm)].set_index("endpoint").loc[order], nth_colour(list(arms).index(arm))
        for y, row in enumerate(mine.itertuples()):
            at, sure = y - 0.35 + 0.7 * (a + 0.5) / len(shown), row.low == row.low
            ax.hlines(at, 100 * row.low, 100 * row.high, color=own, lw=1.5 if row.Index in roles else 3.5)
            ax.plot(100 * row.difference, at, "o", color=own, mfc=own if sure else "white", ms=6, label=arm if y == 0 else None)
    counts = rows.drop_duplicates("endpoint").set_index("endpoint")
    ax.set_yticks(range(len(order)), [f"{name}\n{counts.tiles[name]} tiles, {counts.cases[name]} cases" for name in order], fontsize=8)
    for label, name in zip(ax.get_yticklabels(), order, strict=True):
        label.set_color(TAIL if name in tail or name.startswith("tail") else INK)
    ax.axhline(sum(name in tail or name.startswith("tail") for name in order) - 0.5, color=FAINT, lw=0.5)
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlabel(f"points, arm minus {rows['baseline'].iloc[0]}; bar: 95 % interval, hollow: too few cases or seeds for one; red: rare")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(*_once(ax), frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.45, 1.0), ncols=4, borderaxespad=0.2)
    return ax


def arm_differences(rows, endpoint, notes=None, title="", ax=None):
    """One figure of every arm against the baseline, an arm to a row: controls that must not help, doses, other ways to use real tiles.

    Args:
        rows: DataFrame arm, baseline, endpoint, difference, low, high; shares, drawn in points.
        endpoint: which of them.
        notes: {arm: what is different about it}, written beside its name.
    """
    rows = rows[rows["endpoint"].eq(endpoint)]
    ax = ax or new_axes(8.5, 1.1 + 0.27 * len(rows))
    for y, row in enumerate(rows.itertuples()):
        ax.hlines(y, 100 * row.low, 100 * row.high, color=TRAIN, lw=2)
        ax.plot(100 * row.difference, y, "o", color=TRAIN, mfc=TRAIN if row.low == row.low else "white", ms=6)
    names = [f"{arm}: {notes[arm]}" if (notes or {}).get(arm) else arm for arm in rows["arm"]]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(f"points of {endpoint}")
    ax.set_title("bar: 95 % interval, hollow: none", loc="right", fontsize=8, color=FAINT)
    ax.set_title(title or f"Every arm against {rows['baseline'].iloc[0]}", loc="left", fontsize=10)
    return ax


def tile_curves(points, axes=None):
    """What real tiles buy, and beside it what synthetic ones do, on one scale of recall, a row per class.

    `points`: of `learning_curve.curves`.
    """
    classes = list(dict.fromkeys(points["class"]))
    if axes is None:
        _, axes = plt.subplots(len(classes), 2, figsize=(8, 0.5 + 2.6 * len(classes)), sharey="row", squeeze=False, layout="constrained")
    for pair, name in zip(axes, classes, strict=True):
        for ax, kind, colour in zip(pair, ("real", "synthetic"), (TRAIN, TEST), strict=True):
            rows = points[points["class"].eq(name) & points["kind"].eq(kind)]
            x = rows["tiles"].to_numpy(float)
            if kind == "real":
                ax.set_xscale("log")
                ax.minorticks_off()
            ax.set_xticks(x, [str(tiles) for tiles in rows["tiles"]], fontsize=8)
            ax.fill_between(x, 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.2, lw=0)
            ax.plot(x, 100 * rows["value"], "o-", color=colour)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlabel("real training tiles" if kind == "real" else "synthetic tiles added")
        pair[0].set_ylabel("recall, %")
        pair[0].set_title(f"{name}: what tiles buy", loc="left", fontsize=10)
        pair[1].set_title("band: 95 % interval", loc="right", fontsize=8, color=FAINT)
    return axes


def _once(ax):
    """Handles and labels of a legend, each label once."""
    named = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    return list(named.values()), list(named)


def confusions(tables, classes, axes=None):
    """Confusion matrices side by side, in percent of each true class; the diagonal is recall.

    Args:
        tables: {title: [C, C] shares, row = true class}; a NaN row is a class without a test tile.
    """
    if axes is None:
        size = (2.2 + len(tables) * (0.6 + 0.42 * len(classes)), 1.5 + 0.4 * len(classes))
        axes = plt.subplots(1, len(tables), figsize=size, sharey=True, layout="constrained", squeeze=False)[1][0]
    cmap = plt.get_cmap("Blues").with_extremes(bad="#dddddd")
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        points = 100 * np.asarray(table)
        ax.imshow(np.ma.masked_invalid(points), cmap=cmap, vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(points):
            if value >= 0.5:
                colour, weight = "white" if value > 60 else INK, "bold" if i == j else None
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour, weight=weight)
        ax.set_xticks(range(len(classes)), classes, rotation=35, ha="right", fontsize=8)
        ax.set_yticks(range(len(classes)), classes, fontsize=8)
        ax.set_xlabel("called")
        ax.set_title(title, loc="left", fontsize=10)
    axes[0].set_ylabel("truly")
    return axes


def confusion_difference(difference, classes, title="Where calls moved", ax=None):
    """What an arm calls more (blue) or less often (red) than the baseline, in points of each true class; rows sum to 0.

    Args:
        difference: [C, C] shares, row = true class; a NaN row is a class without a test tile.
    """
    points = 100 * np.asarray(difference)
    limit = max(1.0, np.nanmax(np.abs(points), initial=0))
    ax = ax or new_axes(2.6 + 0.62 * len(classes), 1.6 + 0.5 * len(classes))
    cmap = plt.get_cmap("RdBu").with_extremes(bad="#dddddd")
    ax.imshow(np.ma.masked_invalid(points), cmap=cmap, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(points):
        if value == value and abs(value) >= 0.05:
            colour = "white" if abs(value) > 0.6 * limit else INK
            ax.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour, weight="bold" if i == j else None)
        elif value != value and j == 0:
            ax.text(-0.4, i, "no test tile", va="center", fontsize=8, color=INK)
    ax.set_xticks(range(len(classes)), classes, rotation=35, ha="right", fontsize=8)
    ax.set_yticks(range(len(classes)), classes, fontsize=8)
    ax.set(xlabel="called", ylabel="truly")
    ax.set_title(title, loc="left", fontsize=10)
    return ax
