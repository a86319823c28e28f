"""What else than tissue could explain a result: traces of the generator, of the codec, of the stain.

A classifier that learns "synthetic means rare" looks better in training and finds nothing more in a patient. Nothing here is a verdict;
each table says where to look.
"""

import json

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.tiles import data, decode, splits, staining
from histokit.vision import probes

VERSION = 1
TOLD = 0.9  # AUROC from which on a linear probe tells synthetic from real well enough for a classifier to use it
LEAST = 10  # tiles a side
INSIDE, OUTSIDE = "inside", "outside"


def probe(embedded, real, synthetic, classes, *, most=300, seed=0):
    """How well a linear classifier tells the synthetic tiles of a class from its real ones: one row per class and encoder.

    Logistic regression on frozen features, cross-validated so that a case, and what was made from its tiles, lies on one side. 0.5 is
    what a perfect generator gets, 1 means that every tile gives itself away.

    Args:
        embedded: {encoder: (real [N, D], synthetic [M, D])} of `likeness.embed`.
        real, synthetic: the manifests those rows belong to.
        most: tiles a side at most, drawn by seed.

    Returns:
        DataFrame class, encoder, real, synthetic (tiles used), auroc; NaN below ten tiles or two cases a side.
    """
    case_of, rng, rows = dict(zip(real["tile_id"], real["case_id"], strict=True)), np.random.default_rng(seed), []
    origin = [case_of.get(_first(text), f"synthetic {i}") for i, text in enumerate(synthetic.get("sources", [""] * len(synthetic)))]
    for name in classes:
        ids = [np.flatnonzero(table["label"].eq(name)) for table in (real, synthetic)]
        ids = [np.sort(rng.permutation(held)[:most]) for held in ids]
        groups = np.concatenate([real["case_id"].to_numpy(str)[ids[0]], np.array(origin, str)[ids[1]]])
        for encoder, (of_real, of_synthetic) in embedded.items():
            feats, made = np.concatenate([of_real[ids[0]], of_synthetic[ids[1]]]), np.repeat([0, 1], [len(held) for held in ids])
            facts = {"class": name, "encoder": encoder, "real": len(ids[0]), "synthetic": len(ids[1])}
            rows.append(facts | {"auroc": _told_apart(feats, made, groups, seed)})
    return pd.DataFrame(rows, columns=["class", "encoder", "real", "synthetic", "auroc"])


def _first(text):
    sources = json.loads(text) if isinstance(text, str) and text else []
    return sources[0] if sources else ""


def _told_apart(feats, made, groups, seed):
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(5, *(len(set(groups[made == side])) for side in (0, 1)))
    if min(np.bincount(made, minlength=2)) < LEAST or folds < 2:
        return np.nan
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=files.seed("probe", seed) % 2**32)
    try:
        score = probes.held_out(probes.linear(), np.asarray(feats, float), made, groups, split, method="decision_function")
    except ValueError:  # a fold without one of the sides: too few cases to keep them apart
        return np.nan
    return float(roc_auc_score(made, score))


def probe_remarks(found):
    """What the rows of `probe` mean for the verdict, in sentences; none where nothing is told apart."""
    for name, rows in found[found["auroc"].ge(TOLD)].groupby("class", sort=False):
        where = ", ".join(f"{row.encoder} {row.auroc:.2f}" for row in rows.itertuples())
        yield (
            f"{name}: synthetic tiles give themselves away (AUROC {where}). A classifier can learn the traces instead of the tissue; arms "
            "with `real_through: vae` show whether the gain stays when real tiles carry the autoencoder's traces too."
        )


def stain_range(tiles, *, per_case=4, seed=0):
    """Whether each labelled test tile's case was stained like the training cases of its class: Series tile_id -> "inside" | "outside".

    Inside: mean haematoxylin and mean eosin of the case both lie between the lowest and the highest of the training cases of the class.
    A class with one training case has no range; its test tiles are outside.

    Args:
        per_case: tiles of a case that its stain is measured on.
    """
    real = tiles[tiles["use"].eq("labelled") & tiles["source"].eq("real") & tiles["split"].isin(["train", "test"])]
    keys = ["label", "split", "case_id"]
    rows = pd.concat([splits.spread(part, per_case, seed) for _, part in real.groupby(keys)]) if len(real) else real
    amounts = pd.DataFrame(_stains(rows), columns=["h", "e"], index=rows.index)
    cases = pd.concat([rows[keys], amounts], axis=1).groupby(keys).mean()
    where = {}
    for label in real["label"].unique():
        seen = cases.xs(label).xs("train") if (label, "train") in cases.index.droplevel("case_id") else cases.iloc[:0]
        asked = cases.xs(label).xs("test") if (label, "test") in cases.index.droplevel("case_id") else cases.iloc[:0]
        inside = (asked >= seen.min()).all(axis=1) & (asked <= seen.max()).all(axis=1)
        where |= {(label, case): INSIDE if is_in else OUTSIDE for case, is_in in inside.items()}
    test = real[real["split"].eq("test")]
    return pd.Series([where[key] for key in zip(test["label"], test["case_id"], strict=True)], index=test["tile_id"], dtype=str)


def elsewhere(tiles, other, name, seed=0):
    """What else than tissue differs between the training tiles and labelled tiles of another source, in lines: codec, size, stain."""
    ours, theirs = (rows[rows["use"].eq("labelled") & rows["source"].eq("real")] for rows in (tiles[tiles["split"].eq("train")], other))
    if ours.empty or theirs.empty:
        return []
    said, kinds = [], [max(found, key=found.get) for found in (decode.codecs(ours, seed=seed), decode.codecs(theirs, seed=seed))]
    if kinds[0] != kinds[1]:
        said.append(f"Tiles of {name} are {kinds[1]}, those trained on {kinds[0]}: what changes there may be the codec's or the size's.")
    where = stain_range(pd.concat([ours, theirs.assign(split="test")], ignore_index=True), seed=seed)
    cases = theirs.assign(where=where.reindex(theirs["tile_id"]).to_numpy()).drop_duplicates(["label", "case_id"])
    apart = int(cases["where"].eq(OUTSIDE).sum())
    said.append(f"{apart} of {len(cases)} cases of {name} are stained outside the range of the training cases of their class.")
    return said


def _stains(rows, batch=256):
    parts = [staining.stains(data.pixels(rows.iloc[i : i + batch])) for i in range(0, len(rows), batch)]
    return np.concatenate(parts) if parts else np.zeros((0, 2))
