"""Clusters of tile features: fitted once on training tiles, kept, and asked again for new tiles and for made ones.

The second word of a tile after its class, of Osorio et al. (2024), arXiv:2312.09792: tiles of one class are not one thing. Their clusters
are thrown away after the captions are written; here they stay, so that a made tile can be asked whether it is what it was asked to be. How
many there should be is in `cluster_number`, what they are called in `captions`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.vision import features

VERSION = 1
SCOPES = ("global", "per_label", "hierarchical")
SCALINGS = ("l2", "standardise", "none")
LEAST = 10  # tiles that a cluster of a class should have
STARTS = 10  # of k-means, of which the best is taken
SAMPLE = 20_000  # tiles on which the starts are compared, where there are more
MINI_BATCH = 200_000  # tiles above which k-means goes by mini-batches
ALL = ""  # the key of clusters that all classes share
NAMES = "clusters.safetensors", "clusters.json"


class Space(NamedTuple):
    """The map from features to the space of the clusters: scaled, then onto the first principal components."""

    unit: bool
    mean: np.ndarray  # [D]
    weight: np.ndarray  # [D]
    centre: np.ndarray  # [D], of what was scaled
    components: np.ndarray  # [d, D]

    def __call__(self, feats):
        """Points [N, d] float32 of features [N, D]."""
        out = np.empty((len(feats), len(self.components)), np.float32)
        for start in range(0, len(feats), 8192):
            part = _scaled(feats[start : start + 8192], self.unit, self.mean, self.weight)
            out[start : start + len(part)] = (part - self.centre) @ self.components.T
        return out


class Assigned(NamedTuple):
    """Where tiles fall."""

    cluster: np.ndarray  # [N] int, of its class where classes have their own
    distance: np.ndarray  # [N] to the centroid, lower is nearer
    margin: np.ndarray  # [N] distance to the second centroid minus that, 0 on a border; NaN with one cluster


@dataclass(frozen=True)
class Clusters:
    """Fitted clusters, in an order of their own: the largest first, families before what is in them."""

    scope: str
    space: Space
    centroids: dict  # class, or ALL, -> [k, d] float64
    sizes: dict  # the same -> [k] training tiles of each cluster
    families: np.ndarray | None  # [k] family of each cluster, of scope hierarchical
    facts: dict = field(default_factory=dict)  # encoder and its identity, seed, versions

    def of(self, label):
        """The key under which the clusters of a class stand; ValueError for a class that has none."""
        key = label if self.scope == "per_label" else ALL
        if key not in self.centroids:
            raise ValueError(f"no clusters of class {label!r}; there are some of {', '.join(self.centroids)}")
        return key

    def assign(self, feats, labels, among=None):
        """The nearest cluster of each tile, an `Assigned`.

        Args:
            feats: [N, D] float, of the encoder that the clusters were fitted on.
            labels: N class names; asked only where classes have clusters of their own, or with `among`.
            among: {class: clusters that its tiles may count for}, see `prompt_table.Called.among`; a class that is not in it has all.
        """
        _finite(feats)
        if feats.shape[1] != self.space.components.shape[1]:
            raise ValueError(f"features of width {feats.shape[1]}, clusters of width {self.space.components.shape[1]}: another encoder")
        points = self.space(feats)
        cluster = np.zeros(len(points), np.int64)
        distance, margin = np.zeros(len(points)), np.full(len(points), np.nan)
        keys = np.array([self.of(label) for label in labels], dtype=object)
        groups = np.array([(label if label in (among or {}) else "") for label in labels], dtype=object)
        for key, label in dict.fromkeys(zip(keys, groups, strict=True)):
            mine = np.flatnonzero((keys == key) & (groups == label))
            some = np.asarray(among[label], int) if label else np.arange(len(self.centroids[key]))
            near, distance[mine], margin[mine] = _nearest(points[mine], self.centroids[key][some])
            cluster[mine] = some[near]
        return Assigned(cluster, distance, margin)


def fit(feats, labels, k, *, scope="global", scaling="l2", pca=64, families=0, least=LEAST, seed=0, facts=None):
    """Clusters of training tiles.

    Args:
        feats: [N, D] float.
        labels: N class names.
        k: clusters: a number, or {class or ALL: number}. With `per_label` a class of n tiles has at most n / `least`, and at least one.
        scope: `global`, over all classes together; `per_label`; `hierarchical`, global in two levels, families of clusters.
        scaling: `l2` brings features to length 1, `standardise` to mean 0 and deviation 1.
        pca: principal components that are looked at; 0 looks at all.
        families: of `hierarchical`; 0 takes the root of k.
        seed: of the starts. The order of the clusters does not hang on it.

    Raises:
        ValueError: features that are not finite, fewer different tiles than clusters, unknown settings.
    """
    feats, labels = np.asarray(feats), np.asarray(labels, dtype=object)
    check(feats, labels, scope, scaling)
    mapped = space(feats, scaling, pca)
    points = mapped(feats)
    centroids, sizes, found = {}, {}, None
    for key, mine in parts(labels, scope).items():
        wanted = k.get(key, 1) if isinstance(k, dict) else k
        wanted = max(1, min(wanted, len(mine) // least)) if scope == "per_label" else wanted
        centres = k_means(points[mine], wanted, seed)
        names = _nearest(points[mine], centres)[0]
        count = np.bincount(names, minlength=wanted)
        found = _families(centres, families or round(wanted**0.5)) if scope == "hierarchical" else None
        order = _order(centres, count, found)
        centroids[key], sizes[key] = centres[order], count[order]
        found = None if found is None else _renumbered(found[order])
    return Clusters(scope, mapped, centroids, sizes, found, {"seed": seed, "scaling": scaling, "pca": pca, **(facts or {})})


def check(feats, labels, scope, scaling="l2"):
    """Raises ValueError for features or settings that cannot be clustered."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; use {', '.join(SCOPES)}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; use {', '.join(SCALINGS)}")
    if len(feats) != len(labels) or not len(feats):
        raise ValueError(f"{len(feats)} features of {len(labels)} tiles; there must be one for each, and at least one")
    _finite(feats)


def parts(labels, scope):
    """{class or ALL: indices [n]} of the tiles that are clustered together."""
    labels = np.asarray(labels, dtype=object)
    if scope != "per_label":
        return {ALL: np.arange(len(labels))}
    return {name: np.flatnonzero(labels == name) for name in sorted(set(labels))}


def k_means(points, k, seed=0, starts=STARTS):
    """Centroids [k, d] float64 of points [N, d], the best of several starts; ValueError with fewer different points than k."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if k < 1 or not _different(points, k):
        raise ValueError(f"{k} clusters asked of {len(points)} tiles, too few different ones; ask for fewer, or 0 to have k chosen")
    state = files.seed(seed, "k-means", k) % 2**32
    if k == 1:
        return points.mean(axis=0, dtype=np.float64)[None]
    if len(points) > MINI_BATCH:
        made = MiniBatchKMeans(k, batch_size=4096, n_init=3, random_state=state, max_no_improvement=None, max_iter=20)
        return made.fit(points).cluster_centers_.astype(np.float64)
    few = points if len(points) <= SAMPLE else points[np.random.default_rng(state).choice(len(points), SAMPLE, replace=False)]
    best = KMeans(k, n_init=starts, random_state=state).fit(few)
    if len(few) < len(points):
        best = KMeans(k, init=best.cluster_centers_, n_init=1, random_state=state).fit(points)
    return best.cluster_centers_.astype(np.float64)


def _different(points, k):
    """Whether there are k different points."""
    return any(len(np.unique(part, axis=0)) >= k for part in (points[: 50 * k], points))


def space(feats, scaling="l2", pca=64):
    """The `Space` of training features [N, D], see `fit`."""
    from sklearn.decomposition import PCA

    width = feats.shape[1]
    mean, weight = np.zeros(width), np.ones(width)
    if scaling == "standardise":
        mean, std = feats.mean(axis=0, dtype=np.float64), feats.std(axis=0, dtype=np.float64)
        weight = np.divide(1, std, out=np.zeros(width), where=std > 1e-9)
    scaled = _scaled(feats, scaling == "l2", mean, weight)
    least = min(pca or width, len(feats), width)
    if not pca or least == width:
        return Space(scaling == "l2", mean, weight, np.zeros(width), np.eye(width))
    fitted = PCA(least, svd_solver="covariance_eigh" if len(feats) > width else "full").fit(scaled)
    return Space(scaling == "l2", mean, weight, fitted.mean_.astype(np.float64), fitted.components_.astype(np.float64))


def _scaled(feats, unit, mean, weight):
    """Features as the clusters see them, float32."""
    out = (np.asarray(feats, np.float32) - mean.astype(np.float32)) * weight.astype(np.float32)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12) if unit else out


def _nearest(points, centroids, block=16384):
    """Index [N] of the nearest centroid, distance [N] to it, and how much farther the second one is [N] (NaN without one)."""
    index, first, margin = np.zeros(len(points), np.int64), np.zeros(len(points)), np.full(len(points), np.nan)
    lengths = (centroids**2).sum(axis=1)
    for start in range(0, len(points), block):
        part = points[start : start + block].astype(np.float64)
        squares = (part**2).sum(axis=1, keepdims=True) - 2 * part @ centroids.T + lengths  # [b, k]
        at = slice(start, start + len(part))
        index[at] = squares.argmin(axis=1)
        near = np.sqrt(np.partition(squares, min(1, len(centroids) - 1), axis=1)[:, :2].clip(min=0))
        first[at] = near[:, 0]
        margin[at] = near[:, 1] - near[:, 0] if len(centroids) > 1 else np.nan
    return index, first, margin


def _families(centroids, count):
    from sklearn.cluster import AgglomerativeClustering

    count = max(1, min(count, len(centroids)))
    return AgglomerativeClustering(count, linkage="ward").fit_predict(centroids) if len(centroids) > 1 else np.zeros(1, np.int64)


def _order(centroids, sizes, families):
    """Clusters from the largest to the smallest, those of one family together; equals by where they lie, so by nothing random."""
    places = np.round(centroids, 6).T[::-1]
    if families is None:
        return np.lexsort([*places, -sizes])
    rank = np.argsort(np.lexsort(places))
    first = np.array([rank[families == family].min() for family in families])  # equal families have an order too
    return np.lexsort([*places, -sizes, first, -np.bincount(families, sizes)[families]])


def _renumbered(families):
    seen = {family: i for i, family in enumerate(dict.fromkeys(families.tolist()))}
    return np.array([seen[family] for family in families.tolist()])


def _finite(feats):
    bad = np.flatnonzero(~np.isfinite(np.asarray(feats)).all(axis=1))
    if len(bad):
        raise ValueError(
            f"features of {len(bad)} tiles are not finite, the first of row {bad[0]}; check that tile and the encoder's weights"
        )


# --- with tiles ------------------------------------------------------------------------------------------------------


def encoder_facts(encoder):
    """What clusters remember of the encoder (features.Encoder) they were fitted on."""
    return {"encoder": encoder.name, "encoder_identity": files.digest(encoder.identity)}


def assign_tiles(clusters, tiles, device="cpu", among=None):
    """`Assigned` of manifest rows, by the encoder the clusters were fitted on; ValueError where its weights are others now."""
    encoder = features.load(clusters.facts["encoder"], device)
    if files.digest(encoder.identity) != clusters.facts["encoder_identity"]:
        raise ValueError(f"the clusters were fitted on {encoder.name} with other weights; fit them again, by 10_morphology_prompts")
    return clusters.assign(features.embed(encoder, tiles), tiles["label"].tolist(), among)


def examples(held, feats, labels, medoids=5, borders=2):
    """Which tiles show a cluster to a person: those nearest to its centroid, and those nearest to another cluster.

    Returns:
        DataFrame key (class or ALL), cluster, role (medoid or border), row (place of the tile in feats), next (the cluster whose centroid
        lies nearest to this one's, -1 where there is none), tiles (in the cluster).
    """
    found = held.assign(feats, labels)
    keys = np.array([held.of(label) for label in labels], dtype=object)
    rows = []
    for key, centroids in held.centroids.items():
        apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1) + np.diag(np.full(len(centroids), np.inf))
        for k in range(len(centroids)):
            mine = np.flatnonzero((keys == key) & (found.cluster == k))
            near = mine[np.argsort(found.distance[mine], kind="stable")][:medoids]
            edge = mine[np.argsort(found.margin[mine], kind="stable")][:borders] if len(centroids) > 1 else mine[:0]
            other = int(apart[k].argmin()) if len(centroids) > 1 else -1
            parts = [("medoid", row) for row in near] + [("border", row) for row in edge if row not in near]
            rows += [{"key": key, "cluster": k, "role": role, "row": int(row), "next": other, "tiles": len(mine)} for role, row in parts]
    return pd.DataFrame(rows, columns=["key", "cluster", "role", "row", "next", "tiles"])


def contents(held, found, tiles):
    """One row for each cluster: tiles, cases, the share of the case that has most, and its classes; a cluster of one case is no form.

    Args:
        held: Clusters. found: `Assigned` of the tiles. tiles: manifest rows.
    """
    keys, rows = [held.of(label) for label in tiles["label"]], []
    every = tiles.assign(key=keys, cluster=found.cluster)
    for (key, k), part in every.groupby(["key", "cluster"], sort=True):
        cases, labels = (part[name].value_counts() for name in ("case_id", "label"))
        mostly = ", ".join(f"{name} {n}" for name, n in labels.items())
        row = {
            "cluster": f"{key} {k}" if key else k,
            "tiles": len(part),
            "cases": len(cases),
            "most of one case": f"{cases.iloc[0] / len(part):.0%}",
        }
        rows.append(row | {"classes": mostly})
    return pd.DataFrame(rows)


def summary(held):
    """What results.json says of clusters: how many for each class, or for all."""
    return {"clusters": {key or "all": len(centroids) for key, centroids in held.centroids.items()}}


# --- on disk ---------------------------------------------------------------------------------------------------------


def save(folder, clusters):
    """Writes clusters.safetensors and clusters.json."""
    tensors = {"space.mean": clusters.space.mean, "space.weight": clusters.space.weight}
    tensors |= {"space.centre": clusters.space.centre, "space.components": clusters.space.components}
    tensors |= {f"centroids.{i}": held for i, held in enumerate(clusters.centroids.values())}
    tensors |= {"families": clusters.families} if clusters.families is not None else {}
    files.write_tensors(Path(folder) / NAMES[0], {name: np.ascontiguousarray(value) for name, value in tensors.items()}, {})
    told = {"scope": clusters.scope, "unit": clusters.space.unit, "classes": list(clusters.centroids), "facts": clusters.facts}
    told |= {"version": VERSION, "sizes": [held.tolist() for held in clusters.sizes.values()], "sha": digest(clusters)}
    return files.write_json(Path(folder) / NAMES[1], told)


def load(folder):
    """Clusters of a finished 10_morphology_prompts; FileNotFoundError for a folder without."""
    if not (Path(folder) / NAMES[1]).is_file():
        raise FileNotFoundError(f"{folder} holds no {NAMES[1]}; name a finished step of 10_morphology_prompts")
    told, held = files.read_json(Path(folder) / NAMES[1]), files.read_tensors(Path(folder) / NAMES[0])
    held = {name: value.numpy() for name, value in held.items()}
    space = Space(told["unit"], *(held[f"space.{name}"] for name in ("mean", "weight", "centre", "components")))
    centroids = {name: held[f"centroids.{i}"] for i, name in enumerate(told["classes"])}
    sizes = {name: np.array(count) for name, count in zip(told["classes"], told["sizes"], strict=True)}
    return Clusters(told["scope"], space, centroids, sizes, held.get("families"), told["facts"])


def digest(clusters):
    """Hash of the clusters, by which a person's names for them are kept; 16 hex digits."""
    return files.digest(json.dumps({name: np.round(held, 6).tolist() for name, held in clusters.centroids.items()}), clusters.scope)[:16]
