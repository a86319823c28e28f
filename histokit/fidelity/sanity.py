"""Signs that synthetic tiles are not what they are said to be: one picture over and over, another label, another stain.

Beside the distance that `likeness` measures and the copies that `copy_detection` finds. Every number stands beside the same number of
real tiles; a sign tells where to look, the arms tell what the tiles are good for.
"""

import json

import numpy as np
import pandas as pd
from scipy.spatial.distance import pdist

from histokit.metrics import distributions
from histokit.tiles import data, staining
from histokit.vision import probes

VERSION = 1
FEW_KINDS = 0.5  # of the Vendi score of as many real tiles, below which a set repeats itself
DOUBTFUL = 0.5  # of the share of real tiles that a judge calls right, below which labels are doubtful
STRANGE = 0.5  # share of tiles outside the stain of real ones, where about a tenth of the real ones lie
LEAST = 10  # tiles a side
COLUMNS = "class encoder real synthetic n vendi vendi_real density coverage called_right real_called_right".split()


def signs(embedded, real, synthetic, classes, *, most=500, seed=0):
    """Diversity, coverage and label of the synthetic tiles of each class, in each encoder.

    Vendi score of `n` synthetic and `n` real held-out tiles, on features standardised by the real ones, with a Gaussian kernel half as
    wide as two real tiles are apart: tiles that lie elsewhere are not less diverse for it. Density and coverage against all held-out real
    tiles, from 30 a side on. `called_right`: share of synthetic tiles that a balanced logistic regression on the real training tiles calls
    by their label, and the same of held-out real ones.

    Args:
        embedded: {encoder: (real [N, D], synthetic [M, D])} of `likeness.embed`.
        real, synthetic: the manifests those rows belong to.

    Returns:
        DataFrame, one row per class and encoder; NaN where n is too small.
    """
    rng, rows = np.random.default_rng(seed), []
    train, labels = real["split"].eq("train").to_numpy(), real["label"].to_numpy(str)
    picked = {}
    for name in classes:
        held_out, made = np.flatnonzero(~train & (labels == name)), np.flatnonzero(synthetic["label"].eq(name))
        picked[name] = [np.sort(rng.permutation(ids)[:most]) for ids in (held_out, made)]
    for encoder, (of_real, of_synthetic) in embedded.items():
        judge = probes.judge(of_real[train], labels[train]) if len(set(labels[train])) > 1 else None
        for name in classes:
            r, s = (feats[ids] for feats, ids in zip((of_real, of_synthetic), picked[name], strict=True))
            row = dict.fromkeys(COLUMNS, np.nan) | {"class": name, "encoder": encoder, "real": len(r), "synthetic": len(s)}
            row["n"] = n = min(len(r), len(s))
            if n >= LEAST:
                both = [(x - r.mean(0)) / np.where(r.std(0) > 0, r.std(0), 1) for x in (s, r)]
                both = [x[np.random.default_rng(seed).permutation(len(x))[:n]].astype(float) for x in both]
                width = np.median(pdist(both[1])) / 2
                row["vendi"], row["vendi_real"] = (distributions.vendi(x, width or 1) for x in both)
            if n >= distributions.MIN_NEIGHBOURS:
                found = distributions.precision_recall_density_coverage(r, s)
                row |= {key: found[key] for key in ("density", "coverage")}
            if judge is not None:
                right = [float((judge.predict(x) == name).mean()) if len(x) else np.nan for x in (s, r)]
                row["called_right"], row["real_called_right"] = right
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(
        "class", key=lambda c: c.map(list(classes).index), kind="stable", ignore_index=True
    )


def stain(real, synthetic, classes, *, most=300, seed=0):
    """Share of the synthetic tiles of each class stained unlike its real ones, and how strongly they are stained beside them.

    Unlike: mean haematoxylin or mean eosin of the tile outside the middle 95 % of the real tiles of the class, which about a tenth of those
    are too.

    Returns:
        DataFrame class, real, synthetic (tiles measured), outside (share; NaN below ten tiles a side), haematoxylin, eosin (mean of the
        synthetic tiles over that of the real ones).
    """
    rng, rows = np.random.default_rng(seed), []
    for name in classes:
        tables = [table[table["label"].eq(name)] for table in (real, synthetic)]
        tables = [table.iloc[np.sort(rng.permutation(len(table))[:most])] for table in tables]
        row = {
            "class": name,
            "real": len(tables[0]),
            "synthetic": len(tables[1]),
            "outside": np.nan,
            "haematoxylin": np.nan,
            "eosin": np.nan,
        }
        if min(map(len, tables)) >= LEAST:
            r, s = (staining.stains(data.pixels(table)) for table in tables)
            low, high = np.quantile(r, [0.025, 0.975], axis=0)
            row["outside"] = float(((s < low) | (s > high)).any(axis=1).mean())
            row["haematoxylin"], row["eosin"] = (s.mean(0) / r.mean(0).clip(1e-6)).tolist()
        rows.append(row)
    return pd.DataFrame(rows, columns=["class", "real", "synthetic", "outside", "haematoxylin", "eosin"])


def remarks(found, stained):
    """What the rows of `signs` and `stain` give cause to look at, in sentences; none where nothing does."""
    for name, rows in found.groupby("class", sort=False):
        share = rows["vendi"] / rows["vendi_real"]
        if share.lt(FEW_KINDS).all():
            where = ", ".join(f"{row.encoder} {row.vendi:.1f} against {row.vendi_real:.1f}" for row in rows.itertuples())
            yield f"{name}: the synthetic tiles repeat themselves (Vendi score, beside as many real tiles: {where})."
        doubtful = rows[rows["real_called_right"].ge(0.3) & rows["called_right"].lt(DOUBTFUL * rows["real_called_right"])]
        if len(doubtful) and len(doubtful) == rows["real_called_right"].ge(0.3).sum():
            where = ", ".join(
                f"{row.encoder} {_percent(row.called_right)} against {_percent(row.real_called_right)}" for row in doubtful.itertuples()
            )
            yield f"{name}: the labels are doubtful (called by their label, beside real tiles: {where})."
    for row in stained[stained["outside"].ge(STRANGE)].itertuples():
        strength = f"haematoxylin {row.haematoxylin:.2f}, eosin {row.eosin:.2f} times that of the real ones"
        yield f"{row[1]}: {_percent(row.outside)} of the synthetic tiles are stained unlike its real tiles ({strength})."


def _percent(share):
    return f"{100 * share:.0f} %"


def table(found, stained):
    """Both for reading: one row per class and encoder."""
    outside = stained.set_index("class")["outside"]

    def number(value, form):
        return "" if np.isnan(value) else form.format(value)

    rows = []
    for row in found.to_dict("records"):
        shown = {"class": row["class"], "encoder": row["encoder"], "tiles": f"{row['synthetic']} synthetic, {row['real']} real"}
        vendi = number(row["vendi"], "{:.1f}") and f"{row['vendi']:.1f}, real {row['vendi_real']:.1f}"
        called = number(row["called_right"], "{:.0%}") and f"{row['called_right']:.0%}, real {row['real_called_right']:.0%}"
        shown |= {
            "Vendi score at equal n": vendi,
            "density": number(row["density"], "{:.2f}"),
            "coverage": number(row["coverage"], "{:.2f}"),
        }
        rows.append(shown | {"called by their label": called, "unlike real stain": number(outside[row["class"]], "{:.0%}")})
    return pd.DataFrame(rows)


def plain(found, stained):
    """As results.json holds it."""
    return {
        "signs": json.loads(found.to_json(orient="records")),
        "stain": json.loads(stained.to_json(orient="records")),
        "signs_said": list(remarks(found, stained)),
    }
