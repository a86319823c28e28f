"""How often each captioned tile is drawn: forms (the clusters of a class) that have many tiles beside those that have few.

The original keeps as many prompts of each of two classes as have tiles enough and drops the rest, and with them the rare forms that
augmentation is for; here any number of classes, and ways that drop nothing. What a tile is called has no say, so that captions of forms and
captions of the class alone are learned from the same draws. Tables in, weights out.
"""

import numpy as np
import pandas as pd

from histokit.core import files

VERSION = 1
MODES = {
    "none": "every tile equally often",
    "sqrt": "a form as often as the root of its tiles; no tile is dropped",
    "cap": "of each form `cap` tiles at most; small ones keep all",
    "equal_per_prompt": "the largest forms of each class, equally many tiles of each; the rest are dropped (the original)",
}
FEW = 5  # tiles of a form below which it is hardly learned
LEAST_PROMPTS = 10  # of a class, that `equal_per_prompt` keeps where it has as many


def forms(captions, prompts):
    """Number [N] of the form that each tile is of, and the table of forms: DataFrame label, cluster, tiles, at the places of the numbers.

    Args:
        captions: DataFrame tile_id, prompt_id, cluster, one row a tile.
        prompts: DataFrame prompt_id, label.
    """
    label = captions["prompt_id"].map(prompts.set_index("prompt_id")["label"])
    cells = pd.DataFrame({"label": label.to_numpy(), "cluster": captions["cluster"].to_numpy()})
    table = cells.groupby(["label", "cluster"], as_index=False, sort=True).size().rename(columns={"size": "tiles"})
    return cells.groupby(["label", "cluster"], sort=True).ngroup().to_numpy(), table


def feasible(table, least=0):
    """What `equal_per_prompt` could keep: for n forms of each class, as many tiles of each as the smallest of these has.

    Args:
        table: of `forms`.
        least: forms of each class that must stay; 0 asks for ten, or all of the class that has fewest.

    Returns:
        DataFrame n, tiles_per_prompt, total (C n tiles_per_prompt), dropped (forms that would go), allowed.
    """
    ranked = {name: np.sort(rows["tiles"].to_numpy())[::-1] for name, rows in table.groupby("label")}
    fewest = min(map(len, ranked.values()))
    least, rows = least or min(LEAST_PROMPTS, fewest), []
    for n in range(1, fewest + 1):
        each = int(min(counts[n - 1] for counts in ranked.values()))
        rows.append({"n": n, "tiles_per_prompt": each, "total": len(ranked) * n * each, "dropped": len(table) - len(ranked) * n})
    return pd.DataFrame(rows).assign(allowed=lambda found: found["n"].ge(least))


def weights(captions, prompts, mode="sqrt", *, total=0, cap=0, least=0, alpha=0.5, seed=0):
    """Weight [N] of each tile, how often it is drawn relative to the others; 0 where it is left out.

    Args:
        captions, prompts: see `forms`.
        mode: see `MODES`.
        total: tiles that `equal_per_prompt` keeps; 0 as many as there can be. Of every form ceil(total / (C n)).
        cap: of `cap`; 0 takes the median form.
        least: see `feasible`.
        alpha: a form is drawn as (its tiles)^alpha, of `sqrt`; 0 makes forms equally likely.

    Raises ValueError for a total that cannot be reached, naming the largest.
    """
    if mode not in MODES:
        raise ValueError(f"balance is {mode!r}; use {', '.join(MODES)}")
    form, table = forms(captions, prompts)
    count = table["tiles"].to_numpy(float)[form]
    if mode in ("none", "sqrt"):
        return np.ones(len(captions)) if mode == "none" else count ** (alpha - 1)
    if mode == "cap":
        return _first(captions, form, cap or max(1, round(float(table["tiles"].median()))), seed)
    could = feasible(table, least)
    could = could[could["allowed"]]
    if could.empty:
        raise ValueError(f"no class has {least} forms; ask for fewer (`least_prompts`), or balance: sqrt")
    if not total:
        best = could.loc[could["total"].idxmax()]
    else:
        fits = could[could["total"].ge(total)]
        if fits.empty:
            raise ValueError(f"{total} tiles in equal parts cannot be had; the most is {could['total'].max()} (`total`)")
        best = fits.loc[fits["n"].idxmax()]
    each = -(-total // (table["label"].nunique() * int(best["n"]))) if total else int(best["tiles_per_prompt"])
    kept = table.sort_values("tiles", ascending=False, kind="stable").groupby("label").head(int(best["n"])).index
    return _first(captions, form, each, seed) * np.isin(form, kept)


def remarks(captions, prompts, mode):
    """Plain sentences on what is left out, and on the forms that have too few tiles to be learned."""
    form, table = forms(captions, prompts)
    drawn = np.bincount(form, captions["weight"], len(table)) > 0
    if not drawn.all():
        some = [f"{row.label} {row.cluster}" for row in table[~drawn].itertuples()]
        yield f"balance: {mode} drops {len(some)} of {len(table)} forms: {', '.join(some[:3])}{', ...' if len(some) > 3 else ''}."
    left = int(captions["weight"].eq(0).sum())
    if left:
        yield f"{left} of {len(captions)} tiles are left out."
    few = table[table["tiles"].lt(FEW)]
    if len(few):
        count = few["tiles"].sum()
        yield f"{len(few)} of {len(table)} forms have fewer than {FEW} tiles ({count} in all): they are learned by heart, if at all."


def _first(captions, form, most, seed):
    """1 for `most` tiles of each form, chosen by hash, so that a larger number holds every smaller one; 0 for the others."""
    order = pd.DataFrame({"form": form, "order": [files.digest(seed, name) for name in captions["tile_id"]]})
    return order.groupby("form")["order"].rank(method="first").le(most).to_numpy(float)
