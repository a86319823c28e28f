"""Tiles that show no tissue: ink, glass, folds, blur. Rules as data, a report per class, and no rare class is emptied by them.

The limits are those of Osorio et al. (2024), arXiv:2312.09792, made on 96 px tiles, so tiles are looked at that wide. On the original's own
sample all that they drop is of one class: they are not blind to what a tile is, hence the report.
"""

import numpy as np
import pandas as pd
from PIL import Image

from histokit.tiles import data

VERSION = 1
SIDE = 96  # px; the Laplacian and the contours hang on it
RULES = {  # statistic -> (fires below or above, limit, what it catches); 0 turns a rule off
    "brightness": ("<", 70.0, "ink, folds, a black border"),
    "saturation": ("<", 3.0, "glass"),
    "brightness_std": ("<", 4.0, "flat"),
    "saturation_std": ("<", 4.0, "flat"),
    "hue_std": ("<", 1.5, "of one colour"),
    "sharpness": ("<", 100.0, "blurred"),
    "contours": ("<", 0.0, "empty"),  # published: 10, which calls dense tissue empty (9 of 552 tiles of toy, none of 718 of EBHI-Seg)
}
MOST = 0.1  # of a rare class's tiles that may go unless asked otherwise


def statistics(pixels):
    """What the rules ask about, of uint8 tiles [B, H, W, 3].

    Returns:
        DataFrame brightness and saturation (means on 0 to 255), brightness_std, saturation_std, hue_std (around the circle: pink lies on
        both sides of 0), sharpness (variance of the Laplacian of the grey tile), contours (bright areas, grey above 150, and holes).
    """
    from scipy import ndimage

    rows = []
    for picture in pixels:
        image = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        hue, saturation, value = np.asarray(image.convert("HSV"), np.float64).transpose(2, 0, 1)
        grey = np.asarray(image.convert("L"), np.float64)
        turn = np.abs(np.exp(2j * np.pi * hue / 256).mean())
        row = {
            "brightness": value.mean(),
            "saturation": saturation.mean(),
            "brightness_std": value.std(),
            "saturation_std": saturation.std(),
        }
        row["hue_std"] = np.sqrt(-2 * np.log(np.clip(turn, 1e-12, 1))) * 256 / (2 * np.pi)
        row["sharpness"] = ndimage.laplace(grey, mode="mirror").var()
        rows.append(row | {"contours": _contours(grey > 150)})
    return pd.DataFrame(rows, columns=list(RULES))


def _contours(mask):
    """Outlines of the areas of a mask [H, W], outer ones and those of holes."""
    from scipy import ndimage

    _, areas = ndimage.label(mask, structure=np.ones((3, 3)))
    _, holes = ndimage.label(np.pad(~mask, 1, constant_values=True))  # all background that reaches the edge is one
    return areas + holes - 1


def find(tiles, rules=None, rare=(), most=MOST):
    """Which tiles to leave out, and why.

    Args:
        tiles: manifest rows.
        rules: {statistic: limit} in the place of the published limits; 0 turns a rule off. None takes all as they are.
        rare: class names of which no more than the share `most` goes; where more would, all its tiles stay, and `remarks` says so.

    Returns:
        DataFrame tile_id, label, the statistics, why (rules that fired, ", " between), dropped (bool); the index is that of `tiles`.

    Raises ValueError for a statistic there is not.
    """
    limits = {name: limit for name, (_, limit, _) in RULES.items()}
    unknown = [name for name in rules or {} if name not in limits]
    if unknown:
        raise ValueError(f"junk rules have no statistic {unknown[0]!r}; use {', '.join(limits)}")
    limits |= rules or {}
    parts = [statistics(data.pixels(tiles.iloc[i : i + 256])) for i in range(0, len(tiles), 256)]
    found = pd.concat(parts, ignore_index=True).set_index(tiles.index)
    fired = pd.DataFrame({name: found[name].lt(limit) for name, limit in limits.items()})
    found.insert(0, "tile_id", tiles["tile_id"])
    found.insert(1, "label", tiles["label"])
    found["why"] = [", ".join(f"{RULES[name][2]} ({name})" for name in limits if row[name]) for _, row in fired.iterrows()]
    found["dropped"] = found["why"].ne("")
    share = found.groupby("label")["dropped"].transform("mean")
    found.loc[found["label"].isin(list(rare)) & share.gt(most), "dropped"] = False
    return found


def none(tiles):
    """`find`'s answer where nothing is asked: no tile is left out."""
    return pd.DataFrame({"tile_id": tiles["tile_id"], "label": tiles["label"], "why": "", "dropped": False}, index=tiles.index)


def report(found):
    """One row per class: tiles, how many look like junk, how many go, and which rules fired how often."""
    rows = []
    for name, part in found.groupby("label", sort=True):
        why = part.loc[part["why"].ne(""), "why"].str.split(", ").explode().value_counts()
        told = ", ".join(f"{rule}: {count}" for rule, count in why.items())
        rows.append(
            {
                "class": name,
                "tiles": len(part),
                "like junk": int(part["why"].ne("").sum()),
                "left out": int(part["dropped"].sum()),
                "rules": told,
            }
        )
    return pd.DataFrame(rows)


def remarks(found):
    """A sentence for each class whose junk stays because too much of it would go, or of which nothing is left."""
    for name, part in found.groupby("label", sort=True):
        like = int(part["why"].ne("").sum())
        if like > int(part["dropped"].sum()):
            yield (
                f"{name}: {like} of {len(part)} tiles look like junk, too many of a rare class to go by rules alone; all stay. "
                "Look at them, then set limits (`junk_rules`) or let more go (`junk_most`)."
            )
        elif len(part) and part["dropped"].all():
            yield f"{name}: all {len(part)} tiles look like junk to the rules, so none has a caption; look at them, or set `junk: false`."
