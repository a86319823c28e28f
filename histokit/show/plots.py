"""Figures: pictures of tiles, tables, curves over steps, and the colours that all figures share.

Arrays and tables in, matplotlib axes out; a function takes `ax=None` and returns what it drew on. One figure per idea, titled with what it
shows. No file is read here and nothing is computed that a notebook would want to keep. Sets of tiles as numbers are in
`distribution_plots`, compared arms in `arm_plots`.
"""

import matplotlib.pyplot as plt
import numpy as np

TRAIN, VAL, TEST = "#3b6ea5", "#9db7d5", "#d98a29"
COLOURS = {"train": TRAIN, "val": VAL, "test": TEST}
INK, FAINT, TAIL = "#222222", "#999999", "#b03030"
KEPT, DROPPED = "#2e7d4f", "#b03030"


def nth_colour(k):
    """The k-th colour: the ten usual ones, then the same ones paler, then again."""
    return plt.get_cmap("tab20")(2 * (k % 10) + k // 10 % 2)


def new_axes(width=8.0, height=4.0):
    """One axes of a new figure, without top and right spines."""
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


# ---- pictures of tiles


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
        ax = new_axes(
            max(cols * size + 0.2, 0.08 * len(title)), rows * size * (height + gap + band) / (height + gap) + (0.4 if title else 0.1)
        )
    ax.imshow(sheet, interpolation="none" if height * rows > 600 else "nearest")
    ax.set_anchor("W")  # below its title, however long that is
    ax.set_axis_off()
    if lines:
        for text, (top, left) in zip(captions, corners, strict=True):
            ax.text(left + width / 2, top - 2, str(text), ha="center", va="bottom", fontsize=7, color=INK)
    if title:
        ax.set_title(title, loc="left", fontsize=10)
    return ax


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


def pairs(left, right, captions, title="", ax=None, cols=4):
    """Pairs of tiles uint8 [N, H, W, 3] side by side, one caption above each pair."""
    left, right = np.asarray(left), np.asarray(right)
    gap = np.full((*left.shape[:2], 2, 3), 255, np.uint8)
    rows = -(-len(left) // cols)
    ax = new_axes(min(cols, len(left)) * 2.8, rows * 1.65 + 0.3) if ax is None else ax
    return image_grid(np.concatenate([left, gap, right], axis=2), title, captions, cols=cols, ax=ax)


def made_in_style(shown, title="Layout | style | made", ax=None):
    """Rows of three pictures, four rows beside each other: the layout on its own tile, a tile of the style, and what was made.

    Args:
        shown: DataFrame with columns layout, style, made (uint8 [H, W, 3]) and caption.
    """
    cells = [np.concatenate([row.layout, row.style, row.made], axis=1) for row in shown.itertuples()]
    ax = ax or new_axes(11, 1.35 * -(-len(cells) // 3) + 0.4)
    return image_grid(np.stack(cells), title, shown["caption"].tolist(), cols=3, ax=ax)


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


def picture(image, title="", ax=None, width=8.0):
    """One picture as it is, uint8 [H, W, 3] or the path of a PNG such as a sample sheet."""
    image = np.asarray(image) if isinstance(image, np.ndarray) else plt.imread(image)
    ax = ax or new_axes(width, width * image.shape[0] / image.shape[1] + 0.3)
    ax.imshow(image, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=10)
    return ax


# ---- tables


def table(frame, marked=None):
    """A DataFrame as a page shows it: whole texts, left-aligned, without its index; rows where `marked` (bool) holds are red."""
    numbers = dict.fromkeys(frame.select_dtypes("float").columns, lambda x: f"{x:.4g}" if abs(x) < 1000 else f"{x:,.0f}")
    style = frame.style.hide().format(numbers, escape="html", na_rep="")
    style = style.set_properties(**{"text-align": "left", "white-space": "normal", "vertical-align": "top"})
    style = style.set_table_styles([{"selector": "th", "props": "text-align: left"}])
    if marked is not None:
        style = style.apply(lambda row: [f"color: {TAIL}" if marked[row.name] else ""] * len(row), axis=1)
    return style


# ---- curves over steps


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


def accuracy_by_noise(curves, classes, title="How well the classes are told at each level of noise", ax=None):
    """Mean accuracy over the classes by timestep, one line for each classifier, and chance.

    Args:
        curves: {name: `latent_classifier.accuracy_by_noise`}.
        classes: how many.
    """
    ax = ax or new_axes(6.5, 3)
    for name, curve in curves.items():
        ax.plot((curve["low"] + curve["high"]) / 2, curve["accuracy"], marker="o", markersize=4, label=name)
    ax.axhline(1 / classes, color="0.5", linestyle=":", linewidth=1, label=f"chance, {classes} classes")
    ax.set(xlabel="timestep (more noise to the right)", ylabel="accuracy (higher is better)", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def push_by_step(table, title="The push, and the classifier's probability of the class, from step to step", axes=None):
    """Length of the push in that of the predicted noise, and probability of the class, by timestep; median and middle half of the tiles.

    Args:
        table: `class_guided.walks`.
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, column, what in zip(axes, ("ratio", "p"), ("push / predicted noise", "probability of the class"), strict=True):
        for k, (name, own) in enumerate(table.groupby("class", sort=False)):
            found = own.groupby("timestep")[column].quantile([0.25, 0.5, 0.75]).unstack()
            ax.plot(found.index, found[0.5], color=f"C{k}", label=name)
            ax.fill_between(found.index, found[0.25], found[0.75], color=f"C{k}", alpha=0.2, linewidth=0)
        ax.invert_xaxis()  # as it is walked: from noise to picture
        ax.set(xlabel="timestep, from noise to picture", ylabel=what)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=8)
    return axes


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
