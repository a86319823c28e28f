"""Did tiles that were made from a layout and a style follow both, and does the style say more than it should?

Three questions of STEDM (arXiv:2403.14429) as numbers: colour beside that of the style tiles, the made mask beside what a segmenter of real
tiles sees, and whether a style vector knows how much foreground its pictures hold, which is the layout's to say.
"""

import json

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.diffusion import style_sampling
from histokit.metrics import segmentation
from histokit.tiles import data, masks

VERSION = 1
CHANNELS = ("red", "green", "blue")


def densities(made, tiles, px=64):
    """Mean optical density of made tiles and of the style tiles each was made from.

    Args:
        made: manifest rows of 30_style_layout. tiles: manifest of 00. px: side at which they are looked at.

    Returns:
        DataFrame tile_id, channel, got, wanted (mean of its style tiles), other (of those of another made tile), a row a tile and channel.
    """
    styles = [json.loads(text)[1:] for text in made["sources"]]
    known = tiles[tiles["tile_id"].isin({name for some in styles for name in some})].reset_index(drop=True)
    density = dict(zip(known["tile_id"], style_sampling.mean_density(data.pixels(known, px)), strict=True))
    wanted = np.array([np.mean([density[name] for name in some], axis=0) for some in styles])
    got = style_sampling.mean_density(data.pixels(made, px))
    other = wanted[np.roll(files.shuffled(range(len(wanted)), 0, "other styles"), 1)] if len(wanted) else wanted
    rows = [
        {"tile_id": name, "channel": channel, "got": got[i, c], "wanted": wanted[i, c], "other": other[i, c]}
        for i, name in enumerate(made["tile_id"])
        for c, channel in enumerate(CHANNELS)
    ]
    return pd.DataFrame(rows, columns=["tile_id", "channel", "got", "wanted", "other"])


def followed(found):
    """How far made tiles took the colour of their style, one row a channel of `densities`.

    Returns:
        DataFrame channel, correlation (in [-1, 1], higher is better), slope (1: as far as the style tiles), distance (mean absolute
        difference, lower is better), of_others (the same to the style of another tile: what `distance` must lie below).
    """
    rows = []
    for channel, own in found.groupby("channel", sort=False):
        x, y = own["wanted"].to_numpy(), own["got"].to_numpy()
        tells = len(x) > 2 and x.std() > 0 and y.std() > 0
        row = {"channel": channel, "correlation": float(np.corrcoef(x, y)[0, 1]) if tells else float("nan")}
        row["slope"] = float(np.polyfit(x, y, 1)[0]) if tells else float("nan")
        row |= {"distance": float(np.abs(x - y).mean()), "of_others": float(np.abs(own["other"] - y).mean())}
        rows.append(row)
    return pd.DataFrame(rows, columns=["channel", "correlation", "slope", "distance", "of_others"])


def agreement(made, seen, layers):
    """How far what a segmenter sees on made tiles is what their masks say: IoU of each layer, over all pixels of a tile.

    Args:
        made: manifest rows with `mask`. seen: uint8 [N, px, px] ids by a segmenter that learned from real tiles alone.
        layers: masks.Layers.

    Returns:
        DataFrame tile_id and a column a layer, in [0, 1], higher is better; NaN where neither has it.
    """
    drawn = masks.pixels(made, layers, seen.shape[-1]) if len(made) else seen
    table = {"tile_id": made["tile_id"].to_numpy()}
    for k, name in enumerate(layers.names):
        one, other = drawn == k, seen == k
        counts = [(a & b).sum(axis=(1, 2)) for a, b in ((one, other), (~one, other), (one, ~other))]
        table[name] = segmentation.iou(*counts)
    return pd.DataFrame(table)


def leakage(vectors, foreground, cases, folds=5):
    """Share of the variance of the foreground that a ridge on style vectors predicts, cases apart; 0 says that style knows no layout.

    A style that has seen its own target can carry its mask, and a tile then follows the style where it should follow the layout.

    Args:
        vectors: [N, D] float, of N style draws. foreground: [N] share of foreground of the tile each was drawn for. cases: [N].

    Returns:
        R2 on held-out cases, at most 1; NaN with fewer than eight cases, which tell nothing, or without any variance.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    foreground = np.asarray(foreground, float)
    count = min(folds, len(set(cases)))
    if len(set(cases)) < 8 or not foreground.std() > 0:
        return float("nan")
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    told = cross_val_predict(model, np.asarray(vectors, float), foreground, groups=np.asarray(cases), cv=GroupKFold(count))
    return float(1 - ((foreground - told) ** 2).sum() / ((foreground - foreground.mean()) ** 2).sum())


def remarks(table, leak=float("nan")):
    """What a reader should know, in sentences. table: of `followed`, None where nothing was made."""
    if table is not None and len(table) and table["correlation"].notna().any():
        yield (
            f"Colour follows the style with correlation {table['correlation'].min():.2f} to {table['correlation'].max():.2f} and slope "
            f"{table['slope'].min():.2f} to {table['slope'].max():.2f} over the channels; the distance to the own style is "
            f"{table['distance'].mean():.3f}, to another's {table['of_others'].mean():.3f}."
        )
        if table["correlation"].min() < 0.5:
            yield "THE STYLE IS HARDLY FOLLOWED: train longer, raise style_scale, or let the style in by another `injection`."
    if leak > 0.1:
        yield f"The style vector tells {leak:.0%} of how much foreground its target has: it carries layout, which is the mask's to say."
