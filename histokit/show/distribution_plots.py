"""How sets of tiles are distributed: numbers of tiles, stain, scores, features. Tables in, matplotlib axes out, as in `plots`."""

import matplotlib.pyplot as plt
import numpy as np

from histokit.show.plots import COLOURS, DROPPED, INK, KEPT, TAIL, TRAIN, new_axes, nth_colour

# ---- 00_dataset


def long_tail(counts, roles=None, title="Tiles and cases of every class", ax=None):
    """Tiles (bars) of every class and split on a log scale, largest class first, with "tiles / cases" at the end of each bar.

    Args:
        counts: table of `splits.counts`: label, split, use, tiles, cases. Withheld tiles continue the bar of train, empty.
        roles: {class: head | tail}; tail classes are named in red.
    """
    labelled = counts[counts["use"].ne("withheld")]
    withheld = counts[counts["use"].eq("withheld")].set_index("label")["tiles"].to_dict()
    train = labelled[labelled["split"].eq("train")].set_index("label")["tiles"]
    order = list(train.sort_values(ascending=False, kind="stable").index)
    ax = ax or new_axes(8, 0.8 + 0.55 * len(order))
    for offset, split in zip((-0.27, 0, 0.27), COLOURS, strict=True):
        rows = labelled[labelled["split"].eq(split)].set_index("label").loc[order]
        at = np.arange(len(order)) + offset
        ax.barh(at, rows["tiles"], height=0.25, color=COLOURS[split], label=split)
        ends = rows["tiles"].to_numpy()
        if split == "train" and withheld:
            extra = np.array([withheld.get(name, 0) for name in order])
            ax.barh(at, extra, left=ends, height=0.25, color="none", edgecolor=TRAIN, hatch="////", lw=0.5, label="withheld by budget")
            ends = ends + extra
        for name, y, end, tiles, cases in zip(order, at, ends, rows["tiles"], rows["cases"], strict=True):
            text = f"{tiles} / {cases}" if tiles else "none"
            text += f" (+{withheld[name]})" if split == "train" and name in withheld else ""
            ax.text(max(end, 1) * 1.06, y, text, va="center", fontsize=7.5, color=INK)
    ax.set_xscale("log")
    ax.set_xlim(left=0.8, right=(labelled["tiles"].max() + max(withheld.values(), default=0)) * 2)
    ax.set_yticks(range(len(order)), order)
    for tick, name in zip(ax.get_yticklabels(), order, strict=True):
        tick.set_color(TAIL if (roles or {}).get(name) == "tail" else INK)
    ax.invert_yaxis()
    ax.set_xlabel("tiles (numbers: tiles / cases)" + ("; red: rare class" if roles and "tail" in roles.values() else ""))
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.55, 1.0), ncols=4, borderaxespad=0.2)
    return ax


def codec_gap(gap, title="What the autoencoder leaves of real tiles", ax=None):
    """Power by spatial frequency of real tiles and of the same after the base's autoencoder, log scales; between them is what is lost.

    Args:
        gap: `preflight.CodecGap`.
    """
    ax = ax or new_axes(6.4, 3.4)
    ax.fill_between(gap.frequency, gap.coded, gap.real, color=DROPPED, alpha=0.15, lw=0)
    ax.plot(gap.frequency, gap.real, color=INK, label="real tiles")
    ax.plot(gap.frequency, gap.coded, color=DROPPED, label=f"after the autoencoder: {gap.contrast:.0%} of the fine contrast")
    ax.set_yscale("log")
    ax.set_xlim(0, 0.5)
    ax.set_xlabel("cycles a pixel: coarse to fine")
    ax.set_ylabel("power")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return ax


def stain_scatter(cases, roles=None, title="Mean stain of every case", ax=None):
    """One point a case, coloured by class; a rare class has larger points. Classes that lie apart can be told by stain alone.

    Args:
        cases: DataFrame label, haematoxylin, eosin (optical density).
        roles: {class: head | tail}.
    """
    ax = ax or new_axes(6.4, 4.2)
    for i, (name, rows) in enumerate(cases.groupby("label")):
        tail = (roles or {}).get(name) == "tail"
        edge, label = (INK, f"{name} (rare)") if tail else ("none", name)
        ax.scatter(
            rows["haematoxylin"], rows["eosin"], s=44 if tail else 18, color=nth_colour(i), alpha=0.8, edgecolor=edge, lw=0.8, label=label
        )
    ax.set(xlabel="haematoxylin (optical density)", ylabel="eosin (optical density)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


# ---- 05_select


def score_histograms(scores, real, cuts, title="Scores of the synthetic tiles, and where they are cut", axes=None):
    """Eight histograms: judge, likeness to training tiles and to better synthetic ones, contrast, stain, focus, margin to the means of
    other classes, realism; real tiles as an outline where they have the number.

    Args:
        scores, real, cuts: the tables of `screening.screen`, of one class.

    Returns:
        The axes.
    """
    if axes is None:
        _, axes = plt.subplots(2, 4, figsize=(13, 5.2), layout="constrained")
        axes = axes.ravel()
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    cut = cuts.set_index("name")["cut"]
    panels = [
        ("judge", "judge", "judge_p", "probability of the asked class"),
        ("similarity_feature", "across_cases", "copy", "likeness to the nearest training tile"),
        ("twin_feature", "anywhere", "duplicate", "likeness to a better synthetic tile"),
        ("contrast", "contrast", "contrast", "contrast (grey levels)"),
        ("stain", "stain", "stain", "stain (deviations from real tiles)"),
        ("focus", "focus", "focus", "sharpness (grey levels)"),
        ("centroid_margin", "", "", "margin: above 0 nearest to its own class"),
        ("realism", "", "realism", "realism: 1 is inside a real tile's ball"),
    ]
    for ax, (name, reference, limit, label) in zip(axes, panels, strict=True):
        finite = scores[name].where(np.isfinite(scores[name].astype(float)))
        values = finite.dropna().to_numpy(float)
        others = real[reference].dropna().to_numpy() if reference in real else np.zeros(0)
        at = cut[limit] if limit and np.isfinite(cut[limit]) else 0.0
        ends = np.r_[values, others, [at] if at or name == "judge" else []]
        low, high = (0.0 if name == "judge" else ends.min(), ends.max()) if len(ends) else (0.0, 1.0)
        bins = np.linspace(low, max(high, low + 1e-6), 26)
        kept = scores["status"].eq("kept") & finite.notna()
        ax.hist(
            [finite[kept], finite[~kept].dropna()],
            bins,
            stacked=True,
            color=[KEPT, DROPPED],
            label=["kept", "not kept"],
        )
        if len(others):
            ax.hist(
                others,
                bins,
                weights=np.full(len(others), len(values) / len(others)),
                histtype="step",
                color=INK,
                label="real tiles, scaled",
            )
        if at > 0:
            ax.axvline(at, color=INK, lw=1, ls="--")
            ax.text(at, 0.98, " cut", transform=ax.get_xaxis_transform(), va="top", fontsize=7)
        ax.set_xlabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=7, loc="upper left")
    for ax in axes[::4]:
        ax.set_ylabel("tiles", fontsize=8)
    return axes


# ---- 07_evaluate


def acceptance_curve(scores, title="Taken so far, from the tile nearest to its class's mean outwards", ax=None):
    """How many tiles a selection by nearness takes: of the nearest ones, up to each share of all, the share that was kept.

    A line that stays high says that what is made is near its class and passes; dashed, how many of them lie nearest to their own class.

    Args:
        scores: the table of `screening.screen`: label, centroid, centroid_rank, status.
    """
    ax = ax or new_axes(6.4, 3.2)
    for i, (name, rows) in enumerate(scores.groupby("label", sort=False)):
        rows = rows.sort_values("centroid", kind="stable")
        n = np.arange(1, len(rows) + 1)
        kept, own = (np.cumsum(column.to_numpy()) / n for column in (rows["status"].eq("kept"), rows["centroid_rank"].eq(1)))
        ax.plot(n / len(rows), kept, color=nth_colour(i), lw=1.6, label=f"{name}: kept ({kept[-1]:.0%} of {len(rows)})")
        ax.plot(n / len(rows), own, color=nth_colour(i), lw=1, ls="--", label=f"{name}: nearest to its class ({own[-1]:.0%})")
    ax.set(xlabel="share of the tiles, nearest first", ylabel="share of these taken", xlim=(0, 1), ylim=(0, 1.02))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def umap_scatter(real, real_labels, synthetic, synthetic_labels, classes, title="Real tiles, synthetic ones laid on top", ax=None):
    """A map of real tiles [N, 2] (dots) with synthetic ones [M, 2] (crosses) laid on it; a picture, not a metric, and it says so.

    Args:
        classes: those to colour; others are grey.
    """
    ax = ax or new_axes(8, 5)
    others = ~np.isin(real_labels, list(classes))
    ax.scatter(*np.asarray(real)[others].T, s=8, color="#cccccc", label="other classes, real", linewidths=0)
    for i, name in enumerate(classes):
        for places, labels, what in ((real, real_labels, "real"), (synthetic, synthetic_labels, "synthetic")):
            mine = np.asarray(places)[np.asarray(labels) == name]
            style = {"s": 20, "linewidths": 0} if what == "real" else {"s": 42, "marker": "X", "edgecolors": "black", "linewidths": 0.7}
            ax.scatter(*mine.T, color=nth_colour(i), alpha=0.75, label=f"{name}, {what} ({len(mine)})", **style)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(f"{title}. A picture, not a metric: distances between groups mean little", loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def style_followed(table, title="Does a made tile have the colour of its style?", ax=None):
    """Mean optical density of style and made tiles, a point a tile and channel, with the line on which both are alike.

    Args:
        table: DataFrame channel, wanted, got; see `style_and_layout.densities`.
    """
    ax = ax or new_axes(4.6, 4.2)
    for colour, (channel, part) in zip(("tab:red", "tab:green", "tab:blue"), table.groupby("channel", sort=False), strict=True):
        ax.scatter(part["wanted"], part["got"], s=10, alpha=0.6, color=colour, label=channel)
    ends = [min(table["wanted"].min(), table["got"].min()), max(table["wanted"].max(), table["got"].max())]
    ax.plot(ends, ends, color="0.5", linewidth=1)
    ax.set(title=title, xlabel="mean optical density of the style tiles", ylabel="of the made tile")
    ax.legend(frameon=False)
    return ax
