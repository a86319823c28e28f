"""How often each captioned tile is drawn: prompts that have many tiles beside those that have few.

The original keeps as many prompts of each of two classes as have tiles enough and drops the rest, and with them the rare forms that
augmentation is for; here any number of classes, and ways that drop nothing. Tables in, weights out.
"""

import numpy as np
import pandas as pd

from histokit.core import files

VERSION = 1
MODES = {
    "none": "every tile equally often",
    "sqrt": "a prompt as often as the root of its tiles; no tile is dropped",
    "cap": "of each prompt `cap` tiles at most; small prompts keep all",
    "equal_per_prompt": "the largest prompts of each class, equally many tiles of each; the rest are dropped (the original)",
}
FEW = 5  # tiles of a prompt below which it is hardly learned
LEAST_PROMPTS = 10  # of a class, that `equal_per_prompt` keeps where it has as many


def feasible(prompts, least=0):
    """What `equal_per_prompt` could keep: for n prompts of each class, as many tiles of each as the smallest of these has.

    Args:
        prompts: DataFrame label, tiles.
        least: prompts of each class that must stay; 0 asks for ten, or all of the class that has fewest.

    Returns:
        DataFrame n, tiles_per_prompt, total (C n tiles_per_prompt), dropped (prompts that would go), allowed.
    """
    ranked = {name: np.sort(rows["tiles"].to_numpy())[::-1] for name, rows in prompts.groupby("label")}
    fewest = min(map(len, ranked.values()))
    least, rows = least or min(LEAST_PROMPTS, fewest), []
    for n in range(1, fewest + 1):
        each = int(min(counts[n - 1] for counts in ranked.values()))
        rows.append({"n": n, "tiles_per_prompt": each, "total": len(ranked) * n * each, "dropped": len(prompts) - len(ranked) * n})
    return pd.DataFrame(rows).assign(allowed=lambda table: table["n"].ge(least))


def weights(captions, prompts, mode="sqrt", *, total=0, cap=0, least=0, alpha=0.5, seed=0):
    """Weight [N] of each tile, how often it is drawn relative to the others; 0 where it is left out.

    Args:
        captions: DataFrame tile_id, prompt_id, one row a tile.
        prompts: of `captions.prompts`.
        mode: see `MODES`.
        total: tiles that `equal_per_prompt` keeps; 0 as many as there can be. Of every prompt ceil(total / (C n)).
        cap: of `cap`; 0 takes the median prompt.
        least: see `feasible`.
        alpha: a prompt is drawn as (its tiles)^alpha, of `sqrt`; 0 makes prompts equally likely.

    Raises ValueError for a total that cannot be reached, naming the largest.
    """
    if mode not in MODES:
        raise ValueError(f"balance is {mode!r}; use {', '.join(MODES)}")
    count = captions.groupby("prompt_id")["prompt_id"].transform("size").to_numpy(float)
    if mode in ("none", "sqrt"):
        return np.ones(len(captions)) if mode == "none" else count ** (alpha - 1)
    if mode == "cap":
        return _first(captions, cap or max(1, round(float(prompts["tiles"].median()))), seed)
    table = feasible(prompts, least)
    table = table[table["allowed"]]
    if table.empty:
        raise ValueError(f"no class has {least} prompts; ask for fewer (`least`), or balance: sqrt")
    if not total:
        best = table.loc[table["total"].idxmax()]
    else:
        fits = table[table["total"].ge(total)]
        if fits.empty:
            raise ValueError(f"{total} tiles in equal parts cannot be had; the most is {table['total'].max()} (`total`)")
        best = fits.loc[fits["n"].idxmax()]
    each = -(-total // (prompts["label"].nunique() * int(best["n"]))) if total else int(best["tiles_per_prompt"])
    kept = prompts.sort_values("tiles", ascending=False, kind="stable").groupby("label").head(int(best["n"]))["prompt_id"]
    return _first(captions, each, seed) * captions["prompt_id"].isin(kept).to_numpy(float)


def remarks(captions, prompts, mode):
    """Plain sentences on what is left out, and on the prompts that have too few tiles to be learned."""
    gone = captions.groupby("prompt_id")["weight"].max().eq(0)
    if gone.any():
        some = prompts.loc[prompts["prompt_id"].isin(gone[gone].index), "text"].tolist()
        yield f"balance: {mode} drops {len(some)} of {len(prompts)} prompts, {', '.join(some[:3])}{', ...' if len(some) > 3 else ''}."
    left = int(captions["weight"].eq(0).sum())
    if left:
        yield f"{left} of {len(captions)} tiles are left out."
    few = prompts[prompts["tiles"].lt(FEW)]
    if len(few):
        count = few["tiles"].sum()
        yield f"{len(few)} of {len(prompts)} prompts have fewer than {FEW} tiles ({count} in all): they are learned by heart, if at all."


def _first(captions, most, seed):
    """1 for `most` tiles of each prompt, chosen by hash, so that a larger number holds every smaller one; 0 for the others."""
    order = captions["tile_id"].map(lambda name: files.digest(seed, name))
    return captions.assign(order=order).groupby("prompt_id")["order"].rank(method="first").le(most).to_numpy(float)
