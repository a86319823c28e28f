"""How many clusters? Three answers for each k, side by side: how well apart, how dense between, and whether other tiles would say the same.

Points in, a table out; what is made of it is `chosen`.
"""

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.morphology import clusters

VERSION = 1
SAMPLE = 2000  # tiles that the indices are computed on
REPEATS = 5  # pairs of subsamples whose clusters are compared
STABLE = 0.8  # of the highest stability, below which a peak is not taken


def curve(points, ks, *, seed=0, sample=SAMPLE, repeats=REPEATS):
    """One row for each k.

    Args:
        points: [N, d], in the space of the clusters.
        ks: numbers of clusters; those that there are too few points for are left out.

    Returns:
        DataFrame k, silhouette (in [-1, 1], higher is better; Rousseeuw 1987), s_dbw (lower is better), stability (mean adjusted Rand index
        of two subsamples of four fifths on all points, 1 says the same clusters), smallest (points in the smallest cluster).
    """
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    rng = np.random.default_rng(files.seed(seed, "number of clusters") % 2**32)
    few = points if len(points) <= sample else points[rng.choice(len(points), sample, replace=False)]
    halves = [rng.permutation(len(few))[: max(2, round(0.8 * len(few)))] for _ in range(2 * repeats)]
    different, rows = len(np.unique(few, axis=0)), []
    for k in sorted(k for k in set(ks) if 2 <= k < 0.8 * different):
        labels = _labels(few, few, k, seed)
        again = [_labels(few[half], few, k, seed + i) for i, half in enumerate(halves)]
        agreed = [adjusted_rand_score(*pair) for pair in zip(again[::2], again[1::2], strict=True)]
        row = {"k": k, "silhouette": float(silhouette_score(few, labels)), "s_dbw": s_dbw(few, labels)}
        rows.append(row | {"stability": float(np.mean(agreed)), "smallest": int(np.bincount(labels, minlength=k).min())})
    return pd.DataFrame(rows, columns=["k", "silhouette", "s_dbw", "stability", "smallest"])


def _labels(learn, points, k, seed):
    return clusters._nearest(points, clusters.k_means(learn, k, seed, starts=3))[0]


def s_dbw(points, labels):
    """Scatter within clusters plus density between them; lower is better. Halkidi and Vazirgiannis (2001), equations 1 to 5.

    Args:
        points: [N, d]. labels: [N] int, two clusters or more.
    """
    points = np.asarray(points, np.float64)
    names = np.unique(labels)
    parts = [points[labels == name] for name in names]
    centres = np.stack([part.mean(axis=0) for part in parts])
    spread = np.array([np.linalg.norm(part.var(axis=0)) for part in parts])  # [k]
    radius = np.sqrt(spread.sum()) / len(names)
    scatter = spread.mean() / max(np.linalg.norm(points.var(axis=0)), 1e-12)
    between = 0.0
    for i in range(len(names)):
        for j in range(len(names)):
            if i != j:
                both = np.concatenate([parts[i], parts[j]])
                middle, own, other = (_density(both, at, radius) for at in ((centres[i] + centres[j]) / 2, centres[i], centres[j]))
                between += middle / max(own, other, 1)
    return float(scatter + between / (len(names) * (len(names) - 1)))


def _density(points, at, radius):
    return int((np.linalg.norm(points - at, axis=1) <= radius).sum())


def choose(feats, labels, scope, settings, seed=0):
    """The number of clusters for each class, or for all together, and the curves it was chosen by.

    Args:
        feats: [N, D]. labels: N class names. scope: see `clusters.fit`. settings: settings.Settings.

    Returns:
        {class or ALL: k}, and the table of `curve` with a column key; empty where there are too few tiles for two clusters.
    """
    clusters.check(feats, labels, scope, settings.scaling)
    points = clusters.space(feats, settings.scaling, settings.pca)(feats)
    found, tables = {}, []
    for key, mine in clusters.parts(labels, scope).items():
        asked = settings.ks or candidates(len(mine), settings.least)
        table = curve(points[mine], asked, seed=seed)
        found[key] = chosen(table, max(1, len(mine) // settings.least))
        tables.append(table.assign(key=key, chosen=table["k"].eq(found[key])))
    return found, pd.concat(tables, ignore_index=True)


def chosen(table, largest):
    """The largest k that other draws of the tiles agree on, and on more than on one cluster fewer or more; 1 where there is none.

    A peak of stability, of `STABLE` of the highest one at least (Ben-Hur et al. 2002, stability as the choice of k). The other two are
    shown and do not choose: the silhouette likes two best, and S_Dbw falls on past the truth (11 for nine blobs in 16 dimensions).

    Args:
        table: of `curve`. largest: k at most.
    """
    fit = table[table["k"].le(largest)]
    if fit.empty:
        return 1
    value = fit["stability"]
    peak = value.ge(value.shift(1, fill_value=-1)) & value.ge(value.shift(-1, fill_value=-1)) & value.ge(STABLE * value.max())
    return int(fit.loc[peak, "k"].max())


def candidates(n, least=clusters.LEAST, most=40):
    """Numbers of clusters worth a look for n tiles: all up to 12, then in steps, none with fewer than `least` tiles to a cluster."""
    top = min(most, max(1, n // least))
    return [k for k in (*range(2, 13), *range(14, 21, 2), *range(24, most + 1, 4)) if k <= top]
