"""How synthetic tiles look beside real ones: KID with its floor, examples nobody picked, a map that is no metric.

Likeness is not usefulness: a set can look right and teach nothing, or look odd and help; the arms decide that. No encoder judges
alone, least of all one that chose the tiles. Nothing here is a threshold.
"""

import json

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.metrics import distributions
from histokit.tiles import data
from histokit.vision import features

VERSION = 3
LOW_LEVEL = "colour-texture"  # fixed, no weights: a second judge that no training could please
TWICE = 2.0  # times the floor from which a KID that is not told apart is not called alike
TOO_SMALL = "n too small to say"
COLUMNS = "class encoder real cases synthetic kid p n kid_at_n floor floor_high farther reading".split()


def embed(encoders, real, synthetic, device="cpu"):
    """{encoder: (features of real tiles [N, D], of synthetic tiles [M, D])} for each named encoder and the low-level one."""
    found = {}
    for name in dict.fromkeys([*encoders, LOW_LEVEL]):
        encoder = features.load(name, device)
        found[name] = (features.embed(encoder, real), features.embed(encoder, synthetic))
    return found


def classes(dataset, made):
    """The classes to look at, in the order of the dataset: the rare ones, and whatever else was made."""
    return [name for name in dataset.classes if name in dataset.tail or name in set(made["label"])]


def surroundings(tiles, synthetic, classes, *, most=500, others=1500, seed=0):
    """The real tiles worth embedding: of the named classes all training and at most `most` held-out ones each, every source of a synthetic
    tile, and `others` more drawn by seed, so that 130,000 tiles cost no more than 3,000."""
    rng = np.random.default_rng(seed)
    real = tiles[tiles["use"].eq("labelled") & tiles["source"].eq("real")].reset_index(drop=True)
    sources = {tile_id for text in synthetic["sources"] for tile_id in json.loads(text or "[]")} if "sources" in synthetic else set()
    mine, train = real["label"].isin(classes), real["split"].eq("train")
    keep = (mine & train) | real["tile_id"].isin(sources)
    for name in classes:
        held_out = np.flatnonzero(real["label"].eq(name) & ~train)
        keep.iloc[rng.permutation(held_out)[:most]] = True
    keep.iloc[rng.permutation(np.flatnonzero(~mine & ~keep))[:others]] = True
    return real[keep].reset_index(drop=True)


def fidelity(embedded, real, synthetic, classes, *, permutations=1000, most=500, seed=0):
    """KID of each class in each encoder, against real tiles that no generator saw, beside the real-against-real floor.

    Real tiles are those of val and test. Floor and value are at the same n, the floor between real tiles of different cases. More
    than `most` tiles on a side are subsampled, seeded; `real` and `synthetic` count those used.

    Args:
        embedded: {encoder: (real [N, D], synthetic [M, D])} of `embed`.
        real, synthetic: the manifests those rows belong to.
        classes: class names.

    Returns:
        DataFrame, one row per class and encoder. `farther` is the share of case splits in which synthetic tiles lie farther from real
        ones than real ones of other cases do. Numbers are NaN where n is too small, and `reading` says so.
    """
    rows, rng = [], np.random.default_rng(seed)
    held_out = real["split"].isin(["val", "test"]).to_numpy()
    for name in classes:
        r = np.flatnonzero(held_out & real["label"].eq(name).to_numpy())
        s = np.flatnonzero(synthetic["label"].eq(name).to_numpy())
        r, s = (np.sort(rng.permutation(ids)[:most]) for ids in (r, s))
        cases = real["case_id"].to_numpy()[r]
        for encoder, (of_real, of_synthetic) in embedded.items():
            row = {"class": name, "encoder": encoder, "real": len(r), "cases": len(set(cases)), "synthetic": len(s)}
            rows.append(row | _fidelity(of_real[r], of_synthetic[s], cases, permutations, seed))
    return pd.DataFrame(rows, columns=COLUMNS)


def _fidelity(real, synthetic, cases, permutations, seed):
    row = dict.fromkeys(COLUMNS[5:-1], np.nan) | {"reading": TOO_SMALL}
    try:
        row["kid"], row["p"] = distributions.kid_test(synthetic, real, permutations, seed)
    except distributions.TooSmall:
        return row
    try:
        value, floor, row["n"] = distributions.kid_beside_floor(real, synthetic, cases, seed=seed)
    except distributions.TooSmall:
        return row | {"reading": f"no floor: {TOO_SMALL}"}
    row |= {"kid_at_n": np.median(value), "floor": np.median(floor), "floor_high": np.quantile(floor, 0.95)}
    row["farther"] = (value > floor).mean()
    if row["farther"] >= 0.95:
        return row | {"reading": "farther than real tiles of other cases"}
    if row["kid_at_n"] > TWICE * abs(row["floor"]) and row["kid"] > 0:  # else it would read as praise
        return row | {"reading": "n too small to be sure: its middle lies far above that of other real cases"}
    return row | {"reading": "not told apart from other real cases at this n"}


def table(fidelity):
    """The rows of `fidelity` for reading; KID in thousandths, as the field prints it."""

    def number(value, form="{:+.2f}"):
        return "" if np.isnan(value) else form.format(value)

    rows = []
    for row in fidelity.to_dict("records"):
        n = f"{row['synthetic']} synthetic, {row['real']} real of {row['cases']} cases"
        shown = {"class": row["class"], "encoder": row["encoder"], "tiles": n, "KID x 1000": number(1000 * row["kid"])}
        shown |= {"p": number(row["p"], "{:.3f}"), "n per side": number(row["n"], "{:.0f}"), "KID at n": number(1000 * row["kid_at_n"])}
        floor = f"{number(1000 * row['floor'])} (95 % below {number(1000 * row['floor_high'])})" if row["floor"] == row["floor"] else ""
        rows.append(shown | {"floor at n": floor, "reading": row["reading"]})
    return pd.DataFrame(rows)


def examples(embedded, real, synthetic, classes, seed=0):
    """The best, median and worst synthetic tile of each class by its judge's score, with what to hold against them; nobody picks.

    Args:
        embedded: (real [N, D], synthetic [M, D]) in one encoder.
        real, synthetic: manifests; `sources` of a synthetic row is a JSON list of tile ids, `scores` a JSON object.

    Returns:
        DataFrame `class, rank, score, synthetic, source, nearest, distance, real`: rows of the manifests by position, -1 for none.
        `nearest` is the closest training tile of any class, `real` a held-out tile of the class drawn by seed.
    """
    rows, rng = [], np.random.default_rng(seed)
    train = np.flatnonzero(real["split"].eq("train") & real["use"].eq("labelled"))
    where = {tile_id: i for i, tile_id in enumerate(real["tile_id"])}
    distance, nearest = distributions.nearest(embedded[1], embedded[0][train]) if len(train) else (None, None)
    scores = synthetic["scores"].map(judge_score).to_numpy(float)
    for name in classes:
        made = np.flatnonzero(synthetic["label"].eq(name))
        made = made[np.argsort(-np.nan_to_num(scores[made], nan=-np.inf), kind="stable")]
        held_out = np.flatnonzero(real["split"].isin(["val", "test"]) & real["label"].eq(name))
        ranks = dict(zip((0, len(made) // 2, len(made) - 1), ("best", "median", "worst"), strict=True)) if len(made) > 2 else {}
        for k, rank in ranks.items():
            row = {"class": name, "rank": rank, "score": scores[made[k]], "synthetic": int(made[k])}
            row["source"] = where.get(_first_source(synthetic, made[k]), -1)
            row["nearest"] = int(train[nearest[made[k], 0]]) if len(train) else -1
            row["distance"] = distance[made[k], 0] if len(train) else np.nan
            rows.append(row | {"real": int(rng.choice(held_out)) if len(held_out) else -1})
    return pd.DataFrame(rows, columns=["class", "rank", "score", "synthetic", "source", "nearest", "distance", "real"])


def judge_score(scores):
    """The probability that 05's judge gave the asked class, from a manifest row's JSON; NaN where no judge saw the tile."""
    held = json.loads(scores).get("judge") if scores else None
    return np.nan if held is None else float(held)


def _first_source(synthetic, i):
    sources = json.loads(synthetic["sources"].iloc[i] or "[]")
    return sources[0] if sources else ""


def strips(chosen, real, synthetic):
    """Pixels uint8 [R, 4, H, W, 3] of `examples`: real, source, synthetic, nearest real; and a caption [R][4] for each.

    A tile that does not exist, such as the source of text-to-image, is white.
    """
    columns = ((real, "real"), (real, "source"), (synthetic, "synthetic"), (real, "nearest"))
    stack, captions = [], []
    for row in chosen.to_dict("records"):
        tiles = [data.pixels(table.iloc[row[name]])[0] if row[name] >= 0 else None for table, name in columns]
        blank = np.full_like(next(tile for tile in tiles if tile is not None), 255)
        stack.append(np.stack([blank if tile is None else tile for tile in tiles]))
        near = f"{real['label'].iloc[row['nearest']]}, distance {row['distance']:.2f}" if row["nearest"] >= 0 else "no training tile"
        score = "no score" if np.isnan(row["score"]) else f"score {row['score']:.2f}"
        source = real["label"].iloc[row["source"]] if row["source"] >= 0 else "no source"
        captions.append([row["class"], source, f"{row['rank']}, {score}", near])
    return (np.stack(stack) if stack else np.empty((0, 4, 1, 1, 3), np.uint8)), captions


def _compile_once(library):
    """Keep what numba makes of UMAP's slowest four functions, 20 s in every new kernel, in numba's cache."""
    for module, name in (
        ("umap_", "smooth_knn_dist"),
        ("umap_", "compute_membership_strengths"),
        ("utils", "fast_knn_indices"),
        ("utils", "submatrix"),
    ):
        slow = getattr(getattr(library, module, None), name, None)
        if hasattr(slow, "enable_caching"):
            slow.enable_caching()


def compile_umap():
    """Lets numba compile what `umap` needs, which it keeps on disk; half a minute that the first run need not wait for."""
    some = np.random.default_rng(0).random((44, 8))
    umap(some[:40], some[40:])


def umap(real, synthetic, seed=0):
    """Two-dimensional places of real [N, 2] and synthetic tiles [M, 2]: fitted on real, synthetic laid on top. Not a metric.

    McInnes et al. (2018), arXiv:1802.03426. Distances between groups mean little, and a joint fit would pull the sets together.

    Raises:
        distributions.TooSmall: fewer than ten real tiles.
    """
    if len(real) < 10:
        raise distributions.TooSmall(f"{TOO_SMALL}: {len(real)} real tiles, a UMAP needs at least 10")
    import umap as library

    _compile_once(library)
    fitted = library.UMAP(n_neighbors=min(15, len(real) - 1), random_state=files.seed("umap", seed) % 2**32, n_jobs=1).fit(np.asarray(real))
    placed = fitted.transform(np.asarray(synthetic)) if len(synthetic) else np.empty((0, 2))
    return fitted.embedding_, placed
