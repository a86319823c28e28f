"""Figures. Arrays and tables in, matplotlib axes out; every function takes `ax=None` and returns what it drew on.

One figure per idea, titled with what it shows. No file is read here and nothing is computed that a notebook would want to
keep. New functions go at the end, under the heading of their notebook.
"""

import matplotlib.pyplot as plt
import numpy as np

TRAIN, VAL, TEST = "#3b6ea5", "#9db7d5", "#d98a29"
COLOURS = {"train": TRAIN, "val": VAL, "test": TEST}
INK, FAINT, TAIL = "#222222", "#999999", "#b03030"


def nth_colour(k):
    """The k-th colour: the ten usual ones, then the same ones paler, then again."""
    return plt.get_cmap("tab20")(2 * (k % 10) + k // 10 % 2)


def new_axes(width=8.0, height=4.0):
    """One axes of a new figure, without top and right spines."""
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


# ---------------------------------------------------------------------------------------------------- pictures


def image_grid(pixels, title="", captions=None, cols=8, ax=None, gap=4, size=1.25):
    """A contact sheet of uint8 [N, H, W, 3] in reading order, drawn as one picture so that pixels stay comparable.

    Args:
        captions: N short texts, drawn above each image.
        cols: images per row.
        gap: white pixels between images.
        size: inches per image when the figure is made here.
    """
    pixels = np.asarray(pixels)
    n, height, width = pixels.shape[:3]
    cols = max(1, min(cols, n))
    rows = -(-n // cols)
    lines = max((str(c).count("\n") + 1 for c in captions), default=0) if captions is not None else 0
    band = round(height * 0.14 * lines)  # room for captions
    sheet = np.full((rows * (height + gap + band), cols * (width + gap), 3), 255, np.uint8)
    corners = [((i // cols) * (height + gap + band) + band, (i % cols) * (width + gap)) for i in range(n)]
    for image, (top, left) in zip(pixels, corners, strict=True):
        sheet[top : top + height, left : left + width] = image
    if ax is None:
        ax = new_axes(cols * size + 0.2, rows * size * (height + gap + band) / (height + gap) + (0.4 if title else 0.1))
    ax.imshow(sheet, interpolation="none" if height * rows > 600 else "nearest")
    ax.set_axis_off()
    if lines:
        for text, (top, left) in zip(captions, corners, strict=True):
            ax.text(left + width / 2, top - 2, str(text), ha="center", va="bottom", fontsize=7, color=INK)
    if title:
        ax.set_title(title, loc="left", fontsize=10)
    return ax


def tile_journey(stages, title="One tile on its way", axes=None):
    """The same tile at each station, drawn equally large, with pixels and micrometres per pixel.

    Args:
        stages: list of (name, pixels uint8 [H, W, 3], micrometres per pixel or NaN).
        axes: one per stage.

    Returns:
        The axes.
    """
    if axes is None:
        _, axes = plt.subplots(1, len(stages), figsize=(2.9 * len(stages), 3.5), layout="constrained", squeeze=False)
        axes = axes[0]
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, (name, image, mpp) in zip(axes, stages, strict=True):
        height, width = image.shape[:2]
        ax.imshow(image, interpolation="nearest")
        scale = f"{mpp:.3g} µm per px" if mpp == mpp and mpp is not None else "µm per px unknown"
        ax.set_title(f"{name}\n{width} x {height} px, {scale}", fontsize=9)
        ax.set_axis_off()
        if mpp == mpp and mpp is not None:
            _scale_bar(ax, width, height, mpp)
    return axes


def _scale_bar(ax, width, height, mpp):
    """A bar of a round length, about a quarter of the tile."""
    length = max((b for b in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if b / mpp <= width * 0.35), default=0)
    if length:
        x, y = width * 0.05, height * 0.95
        ax.plot([x, x + length / mpp], [y, y], color="black", lw=4, solid_capstyle="butt")
        ax.plot([x, x + length / mpp], [y, y], color="white", lw=2, solid_capstyle="butt")
        ax.text(x, y - height * 0.03, f"{length} µm", color="white", fontsize=8, va="bottom", path_effects=_outline())


def _outline():
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=2, foreground="black")]


# --------------------------------------------------------------------------------------------------- 00_dataset


def table(frame, marked=None):
    """A DataFrame as a page shows it: whole texts, left-aligned, without its index; rows where `marked` (bool) holds are red."""
    numbers = dict.fromkeys(frame.select_dtypes("float").columns, lambda x: f"{x:.4g}" if abs(x) < 1000 else f"{x:,.0f}")
    style = frame.style.hide().format(numbers, escape="html", na_rep="")
    style = style.set_properties(**{"text-align": "left", "white-space": "normal", "vertical-align": "top"})
    style = style.set_table_styles([{"selector": "th", "props": "text-align: left"}])
    if marked is not None:
        style = style.apply(lambda row: [f"color: {TAIL}" if marked[row.name] else ""] * len(row), axis=1)
    return style


def class_grid(rows, title="", ax=None, size=1.25):
    """A contact sheet with one class per row.

    Args:
        rows: {class: uint8 [n, H, W, 3]}, all of one size; a class may have fewer tiles than the others.
    """
    cols = max(len(pixels) for pixels in rows.values())
    height, width = next(iter(rows.values())).shape[1:3]
    blank = np.full((cols, height, width, 3), 255, np.uint8)
    sheet = np.concatenate([np.concatenate([pixels, blank])[:cols] for pixels in rows.values()])
    ax = image_grid(sheet, title, cols=cols, ax=ax, size=size)
    for i, name in enumerate(rows):
        ax.text(-width * 0.06, (i + 0.5) * (height + 4), name, ha="right", va="center", fontsize=8, color=INK)
    return ax


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


# ---------------------------------------------------------------------------------------------------- 05_select

KEPT, DROPPED = "#2e7d4f", "#b03030"


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
        others = real[reference].dropna().to_numpy() if reference else np.zeros(0)
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


def pairs(left, right, captions, title="", ax=None, cols=4):
    """Pairs of tiles uint8 [N, H, W, 3] side by side, one caption above each pair."""
    left, right = np.asarray(left), np.asarray(right)
    gap = np.full((*left.shape[:2], 2, 3), 255, np.uint8)
    rows = -(-len(left) // cols)
    ax = new_axes(min(cols, len(left)) * 2.8, rows * 1.65 + 0.3) if ax is None else ax
    return image_grid(np.concatenate([left, gap, right], axis=2), title, captions, cols=cols, ax=ax)


# -------------------------------------------------------------------------------------------------- 07_evaluate


def strips(pixels, captions, columns=("real", "source", "synthetic", "nearest training tile"), title="", axes=None):
    """Rows of tiles to be looked at side by side: uint8 [R, K, H, W, 3] with a caption [R][K] each and a heading for each column.

    Returns:
        The axes [R, K].
    """
    if axes is None:
        size = (1.9 * len(columns), 2.0 * len(pixels) + 0.6)
        _, axes = plt.subplots(len(pixels), len(columns), figsize=size, layout="constrained", squeeze=False)
        axes[0, 0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for r, (row, texts) in enumerate(zip(pixels, captions, strict=True)):
        for ax, tile, text, column in zip(axes[r], row, texts, columns, strict=True):
            ax.imshow(tile, interpolation="nearest")
            ax.set_title(f"{column}\n{text}" if r == 0 else text, fontsize=8)
            ax.set_axis_off()
    return axes


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


# ---------------------------------------------------------------------------------------------------- 01, 02, 20 training


def confidence_paths(table, confidence=0.0, title="How sure the guide became", axes=None):
    """The guide's probability of each picture, one line per tile and one panel per class; a dot where the tile was taken.

    Args:
        table: `guided.paths`.
        confidence: at which a tile was finished, 0 for none.

    Returns:
        The axes.
    """
    names = list(table["class"].unique())
    if axes is None:
        _, axes = plt.subplots(1, len(names), figsize=(max(5.0, 3.6 * len(names)), 2.8), layout="constrained", squeeze=False, sharey=True)
        axes = axes.ravel()
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, name in zip(axes, names, strict=True):
        own = table[table["class"].eq(name)]
        for _, path in own.groupby("tile_id", sort=False):
            ax.plot(path["update"], path["confidence"], color=INK, lw=0.8, alpha=0.35)
        chosen = own[own["chosen"]]
        ax.plot(chosen["update"], chosen["confidence"], "o", color=KEPT, ms=4, label="taken")
        if confidence:
            ax.axhline(confidence, color=INK, lw=1, ls="--")
            ax.text(1, confidence, "sure enough ", transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=7)
        ax.set(ylim=(0, 1.03), xlabel="candidates, then updates from 1" if own["update"].lt(0).any() else "update", title=name)
        ax.title.set_fontsize(9)
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability of the class")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=7, loc="upper right")
    return axes


def loss_curve(history, title="Loss while training", ax=None):
    """The history of `loop.fit`: training losses, faint as logged and bold as a running mean, and the held-out loss."""
    ax = ax or new_axes(8, 3)
    for i, name in enumerate(c for c in history if c.startswith("loss_")):
        seen = history[history[name].notna()]
        seen = seen[seen["step"].gt(1)] if len(seen) > 2 else seen  # one update alone says little about the loss
        smooth = seen[name].rolling(max(1, len(seen) // 12), min_periods=1, center=True).mean()
        ax.plot(seen["step"], seen[name], color=f"C{i}", alpha=0.25, linewidth=0.8)
        ax.plot(seen["step"], smooth, color=f"C{i}", label=f"training, {name.removeprefix('loss_')} (running mean)")
    if "val" in history and history["val"].notna().any():
        held = history[history["val"].notna()]
        best = held.loc[held["val"].idxmin()]
        ax.plot(held["step"], held["val"], color=TEST, marker="o", markersize=3, label="held out")
        ax.plot(best["step"], best["val"], color=TEST, marker="*", markersize=12, label=f"kept: step {int(best['step']):,}")
    ax.set_xlabel("step")
    ax.set_ylabel("loss (lower is better)")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def picture(image, title="", ax=None, width=8.0):
    """One picture as it is, uint8 [H, W, 3] or the path of a PNG such as a sample sheet."""
    image = np.asarray(image) if isinstance(image, np.ndarray) else plt.imread(image)
    ax = ax or new_axes(width, width * image.shape[0] / image.shape[1] + 0.3)
    ax.imshow(image, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=10)
    return ax
