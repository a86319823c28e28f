"""Frechet distance and MMD-RBF with their floors: the figures the field prints most, and when not to believe them.

KID is the headline (`likeness`), since its mean does not depend on n. A Frechet distance does: with features of D dimensions it wants
2 D tiles a side, and 2,000 at least; below that it is mostly bias, which is why its floor stands beside it and the reading says so.
"""

import numpy as np
import pandas as pd

from histokit.metrics import distributions

VERSION = 1
ENOUGH = 2000  # tiles a side from which on a Frechet distance is read, or twice the dimensions if that is more
ALL = "all rare classes"
COLUMNS = "class encoder n wanted frechet frechet_floor frechet_infinity mmd mmd_floor reading".split()


def measure(embedded, real, synthetic, classes, *, repeats=10, most=2000, seed=0):
    """Distances of each class, and of all together, to real tiles that no generator saw, beside real against real at the same n.

    Real tiles are those of val and test. Each repeat splits their cases in two: the floor compares the halves, the value one half with as
    many synthetic tiles; medians over repeats. Lower is better, and what lies below its floor is as near as real tiles are.

    Args:
        embedded: {encoder: (real [N, D], synthetic [M, D])} of `likeness.embed`.
        real, synthetic: the manifests those rows belong to.
        classes: class names.
        most: tiles a side at most.

    Returns:
        DataFrame, a row per class (and one for all) and encoder: n tiles a side, `wanted` for a Frechet distance that can be read,
        Frechet distance and its floor, its extrapolation to infinitely many tiles (NaN below 500 a side), MMD-RBF x 1000 and its floor,
        and a reading. Numbers are NaN below ten tiles a side.
    """
    rows, held_out = [], real["split"].isin(["val", "test"]).to_numpy()
    for name in [*classes, ALL] if len(classes) > 1 else classes:
        names = classes if name == ALL else [name]
        r = np.flatnonzero(held_out & real["label"].isin(names).to_numpy())
        s = np.flatnonzero(synthetic["label"].isin(names).to_numpy())
        for encoder, (of_real, of_synthetic) in embedded.items():
            found = _distances(of_real[r], of_synthetic[s], real["case_id"].to_numpy()[r], repeats, most, seed) if len(r) and len(s) else {}
            wanted = max(ENOUGH, 2 * of_real.shape[1])
            rows.append({"class": name, "encoder": encoder, "wanted": wanted, **found, "reading": _reading(found, wanted)})
    return pd.DataFrame(rows, columns=COLUMNS)


def _distances(real, synthetic, cases, repeats, most, seed):
    splits = distributions.halves(cases, repeats, seed)
    n = min([most, len(synthetic)] + [len(side) for split in splits for side in split])
    if n < distributions.MIN_KID:
        return {"n": n}
    rng, values = np.random.default_rng(seed), []
    for a, b in splits:
        one, other, made = real[a[:n]], real[b[:n]], synthetic[rng.permutation(len(synthetic))[:n]]
        pairs = ((one, made), (one, other))
        values.append([f(*pair) for f in (distributions.frechet, distributions.mmd_rbf) for pair in pairs])
    frechet, frechet_floor, mmd, mmd_floor = np.median(values, axis=0)
    row = {"n": n, "frechet": frechet, "frechet_floor": frechet_floor, "mmd": mmd, "mmd_floor": mmd_floor}
    if n >= distributions.MIN_EXTRAPOLATED:
        row["frechet_infinity"] = distributions.frechet_extrapolated(real[splits[0][0][:n]], synthetic[:n], seed=seed)
    return row


def _reading(found, wanted):
    if "frechet" not in found:
        return f"n too small to say: needs {distributions.MIN_KID} a side when the real cases are halved"
    if found["n"] < wanted:
        return f"n too small to say: mostly bias below {wanted:,} a side"
    return "farther than real tiles of other cases" if found["frechet"] > found["frechet_floor"] else "as near as real tiles of other cases"


def table(found):
    """The same for reading."""

    def number(value, form="{:.2f}"):
        return "" if value != value else form.format(value)

    rows = []
    for row in found.to_dict("records"):
        shown = {"class": row["class"], "encoder": row["encoder"], "n per side": number(row["n"], "{:.0f}")}
        shown |= {
            "Frechet": number(row["frechet"]),
            "its floor": number(row["frechet_floor"]),
            "at infinity": number(row["frechet_infinity"]),
        }
        rows.append(shown | {"MMD-RBF x 1000": number(row["mmd"]), "floor of that": number(row["mmd_floor"]), "reading": row["reading"]})
    return pd.DataFrame(rows)
