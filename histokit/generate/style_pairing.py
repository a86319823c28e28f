"""Whose layout is drawn in whose style: one row per image, before any is made.

Tables in, a table out. Layouts come from annotated training tiles, styles from tiles of one slide or patient (`style_sampling.Pool`), which
nobody need have annotated; none of either is ever for validation or test.
"""

import json

import pandas as pd
import torch

from histokit.core import files
from histokit.diffusion import style_sampling
from histokit.tiles import data, masks

VERSION = 1
PAIRINGS = {
    "random": "style tiles drawn alike, so a slide with more of them lends its style more often",
    "balanced": "every slide or patient lends its style equally often",
    "within_class": "balanced, among those that show the class of the layout",
}
POOLS = ("unannotated", "annotated", "both")
LABELS = ("layout", "style")
COLUMNS = [
    "job", "class", "number", "tile_id", "symmetry", "styles", "style_home", "pairing", "target_group", "prompt", "seed", "lora_sha",
    "token_sha", "prompt_id", "policy",
]  # fmt: skip


def lenders(tiles, which, classes=None, allowed=False):
    """Training tiles that lend their style, and a sentence where a study becomes transductive.

    Args:
        which: `unannotated` tiles, whose masks nobody drew or that are held back, `annotated` ones, or `both`; or `test`, with `allowed`.
        classes: only tiles of these; None takes all.
    """
    if which not in (*POOLS, "test"):
        raise ValueError(f"style_from is {which!r}; use {', '.join(POOLS)}")
    rows = data.learnable(tiles) if which != "test" else tiles[tiles["split"].eq("test") & tiles["source"].eq("real")]
    said = style_sampling.refuse_held_out(rows, allowed)
    if which in ("unannotated", "annotated"):
        drawn = set(rows.loc[masks.has(rows), "case_id"])  # a case is annotated or not, whole
        rows = rows[rows["case_id"].isin(drawn) == (which == "annotated")]
    if classes is not None:
        rows = rows[rows["label"].isin(list(classes))]
    if not len(rows):
        raise ValueError(f"no training tile is there to lend its style (style_from: {which}); use both, or annotate fewer cases")
    return rows.reset_index(drop=True), said


def job_table(layouts, pool, num_images, *, classes=None, pairing="balanced", label="layout", seed=0):
    """One row per image to make; the first n rows of a class are the same whatever `num_images` is.

    Args:
        layouts: manifest rows of annotated training tiles, whose masks are taken.
        pool: style_sampling.Pool of the lenders.
        num_images: of each class.
        classes: those to make; None takes those of the layouts.
        pairing: see `PAIRINGS`.
        label: an image has the class of its `layout`, or that of its `style`; then layouts of all other classes are taken, and styles of
            tiles of the class.

    Returns:
        DataFrame, columns `COLUMNS`: tile_id is the layout's tile, in symmetry `symmetry`; styles a JSON list of tile ids of one slide.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing {pairing!r} is unknown; use {', '.join(PAIRINGS)}")
    if label not in LABELS:
        raise ValueError(f"label is {label!r}; an image has the class of its layout, or of its style")
    style_sampling.refuse_held_out(layouts)
    rows = []
    for name in dict.fromkeys(layouts["label"]) if classes is None else classes:
        own = layouts[layouts["label"].ne(name) if label == "style" else layouts["label"].eq(name)].sort_values("tile_id")
        if not len(own):
            raise ValueError(f"class {name!r} has no annotated training tile, so no layout; leave it out, or annotate a case of it")
        homes = _homes(pool, name if pairing == "within_class" or label == "style" else None)
        for i in range(num_images):
            g = torch.Generator().manual_seed(files.seed(seed, name, i, "style and layout"))
            lap, place = divmod(i, len(own))
            layout = own.iloc[files.shuffled(range(len(own)), seed, name, "layouts", lap)[place]]
            home = _home(homes, pairing, i, seed, name, g)
            styles = pool.tiles["tile_id"].iloc[pool.of(home, g)].tolist()
            row = {"job": f"{files.slug(name)}-{i:05d}", "class": name, "number": i, "tile_id": layout["tile_id"]}
            row |= {"symmetry": int(torch.randint(8, (1,), generator=g)), "styles": json.dumps(styles), "style_home": str(home)}
            row |= {"pairing": pairing, "seed": files.seed(seed, name, i), "target_group": "", "prompt": "", "prompt_id": -1}
            rows.append(row | {"lora_sha": "", "token_sha": "", "policy": "style_layout"})
    return pd.DataFrame(rows, columns=COLUMNS)


def _homes(pool, name):
    """{slide or patient: usable tiles}, of those that show the class where one is named."""
    label = pool.tiles["label"].to_numpy()
    found = {home: places for home, places in sorted(pool.of_home.items()) if name is None or (label[places] == name).any()}
    if not found:
        raise ValueError(f"no tile of {name!r} lends its style; use pairing: balanced, or style_from: both")
    return found


def _home(homes, pairing, i, seed, name, generator):
    names = list(homes)
    if pairing == "random":
        sizes = torch.tensor([len(homes[home]) for home in names]).double()
        return names[int(torch.multinomial(sizes, 1, generator=generator))]
    lap, place = divmod(i, len(names))
    return names[files.shuffled(range(len(names)), seed, name, "homes", lap)[place]]
