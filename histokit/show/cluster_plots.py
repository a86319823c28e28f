"""Figures of clusters: how many there should be, what is in them, and whether made tiles follow.

Tables and pixels in, axes out, as in `plots`.
"""

import numpy as np

from histokit.show.plots import FAINT, INK, TAIL, image_grid, new_axes, nth_colour

CURVES = {
    "silhouette": "silhouette (higher is better)",
    "s_dbw": "S_Dbw (lower is better)",
    "stability": "stability (1: other tiles say the same)",
}
ROWS = 12  # clusters in one picture


def cluster_number(table, title="How many clusters?", axes=None):
    """The three answers of `cluster_number.choose` side by side, the number that is taken marked.

    Args:
        table: k, silhouette, s_dbw, stability, key, chosen.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for ax, (name, what) in zip(axes, CURVES.items(), strict=True):
        for i, (key, rows) in enumerate(table.groupby("key", sort=False)):
            ax.plot(rows["k"], rows[name], color=nth_colour(i), marker="o", markersize=3, lw=1.2, label=key or None)
            taken = rows[rows["chosen"]]
            ax.plot(taken["k"], taken[name], color=nth_colour(i), marker="*", markersize=12, ls="none")
        ax.set(xlabel="clusters")
        ax.set_title(what, loc="left", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].figure.suptitle(f"{title} ★ is taken", x=0.01, ha="left", fontsize=10)
    if table["key"].nunique() > 1:
        axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def gallery(shown, pixels, called, key="", first=0, ax=None):
    """What is in each cluster, a row each: the tiles nearest to its centre, and at the end those nearest to another cluster.

    Args:
        shown: of `clusters.examples`. pixels: uint8 [n, H, W, 3], one for each row of it.
        called: {(class or "", cluster): words}.
        key: class whose clusters are drawn, "" for those of all classes.
        first: the cluster to begin with; `ROWS` are drawn.
    """
    mine = shown["key"].eq(key) & shown["cluster"].between(first, first + ROWS - 1)
    rows, cols = shown[mine], int(shown[mine].groupby("cluster").size().max())
    blank = np.full(pixels.shape[1:], 255, np.uint8)
    tiles, captions = [], []
    for k, part in rows.groupby("cluster", sort=True):
        inner = part["role"].eq("medoid").to_numpy()
        where = np.flatnonzero(mine.to_numpy() & shown["cluster"].eq(k).to_numpy())
        tiles += [*pixels[where], *[blank] * (cols - len(part))]
        head = f"{k}: {called[key, k]} ({part['tiles'].iloc[0]} tiles)"
        captions += [
            head,
            *[""] * (int(inner.sum()) - 1),
            *[f"on the border, next: {part['next'].iloc[0]}"] * (len(part) - int(inner.sum())),
        ]
        captions += [""] * (cols - len(part))
    last = rows["cluster"].max()
    title = f"{key or 'All classes'}: clusters {first} to {last}, nearest to the centre first"
    ax = image_grid(np.stack(tiles), title, None, cols=cols, ax=ax, size=1.15)
    height, width = pixels.shape[1] + 4, pixels.shape[2] + 4
    for i, text in enumerate(captions):
        if text:
            ax.text((i % cols) * width + 3, (i // cols) * height + 4, text, va="top", fontsize=7, color=INK, bbox=BOX)
    return ax


BOX = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}


def prompt_sizes(prompts, title="Training tiles of each prompt", ax=None):
    """Tiles of each prompt, the largest of each class first, on a logarithmic scale.

    Args:
        prompts: DataFrame label, tiles.
    """
    ax = ax or new_axes(9, 3)
    rows = prompts.sort_values(["label", "tiles"], ascending=[True, False], kind="stable").reset_index(drop=True)
    for i, (name, part) in enumerate(rows.groupby("label", sort=True)):
        ax.bar(part.index, part["tiles"], color=nth_colour(i), width=0.8, label=f"{name} ({len(part)})")
    ax.set_yscale("log")
    ax.set(xlabel="prompts, by class and size", ylabel="tiles")
    ax.set_xticks([])
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def crosses(tables, title="Where made tiles fall", axes=None):
    """Asked cluster (rows) against the cluster a made tile falls into (columns), as counts; the diagonal is what was asked for.

    Args:
        tables: {class: DataFrame of counts, index asked, columns fallen}.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(1, len(tables), figsize=(3.4 * len(tables), 3.4), layout="constrained", squeeze=False)
        axes = axes[0]
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        both = sorted({*table.index, *table.columns})
        full = table.reindex(index=both, columns=both, fill_value=0).to_numpy()
        ax.imshow(full, cmap="Blues", vmin=0, vmax=max(1, full.max()))
        for i, row in enumerate(full):
            for j, n in enumerate(row):
                if n:
                    colour = "white" if n > full.max() / 2 else INK
                    ax.text(j, i, n, ha="center", va="center", fontsize=7, color=colour, weight="bold" if i == j else "normal")
        ax.set(
            xticks=range(len(both)), yticks=range(len(both)), xticklabels=both, yticklabels=both, xlabel="falls into", ylabel="asked for"
        )
        ax.tick_params(labelsize=7)
        ax.set_title(name, loc="left", fontsize=9)
    axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return axes


def mode_collapse(found, title="How much of a class is reached, at equally many tiles", axes=None):
    """Share of a class's clusters that are reached, and Vendi score: real tiles in grey, each source beside them.

    Args:
        found: of `cluster_fidelity.collapse`.
    """
    import matplotlib.pyplot as plt

    names, sources = list(dict.fromkeys(found["class"])), list(dict.fromkeys(found["source"]))
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(max(7, 1.6 * len(names) + 3), 3), layout="constrained")
    for ax, (column, what) in zip(axes, (("clusters", "share of its clusters reached"), ("vendi", "Vendi score")), strict=True):
        for i, source in enumerate(sources):
            part = found[found["source"].eq(source)].set_index("class").reindex(names)
            at = np.arange(len(names)) + 0.8 * (i - (len(sources) - 1) / 2) / len(sources)
            ax.bar(at, part[column], width=0.75 / len(sources), color=FAINT if source == "real" else nth_colour(i - 1), label=source)
        counts = found.groupby("class", sort=False)["tiles"].first()
        ax.set_xticks(range(len(names)), [f"{name}\nn = {counts[name]}" for name in names], fontsize=8)
        ax.set_title(what, loc="left", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(1, color=TAIL, lw=0.6, ls=":")
    axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return axes
