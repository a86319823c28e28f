"""Is a made tile what its prompt asked for, and do the made tiles of a class reach all that the class is?

Cluster fidelity is the share of made tiles that fall into the cluster they were asked for; beside it what would be hit without listening.
Mode collapse is what an average hides: how many of a class's clusters are reached, and how varied the tiles are, beside real ones.
"""

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.metrics import distributions, stats
from histokit.morphology import clusters, prompt_table
from histokit.runs import places
from histokit.tiles import data
from histokit.vision import features

VERSION = 2
REAL = "real"
REPEATS = 20  # draws of equally many tiles, of which the mean is shown


def asked(made, prompts):
    """The cluster [N] int that each made tile was asked for; -1 where its prompt is none of the table's or names no cluster.

    By the prompt itself; of tiles that were made by captions of other clusters nothing is known, see `placed`.

    Args:
        made: manifest rows. prompts: see `prompt_table.Called`.
    """
    known = {(row.label, row.text): row.cluster for row in prompts.itertuples()}
    return np.array([known.get(pair, -1) for pair in zip(made["label"], made["prompt"], strict=True)], dtype=int)


def placed(run, step, made):
    """One row for each made tile of a class that the step captioned: where it falls, and where it should.

    Args:
        step: a 10_morphology_prompts.

    Returns:
        DataFrame tile_id, label, asked (-1: no cluster), cluster, distance, margin, hit (1, 0; NaN where none was asked for); the index is
        that of `made`.
    """
    held, called = clusters.load(run.parent(step, "")), prompt_table.Called.read(run, step)
    made = made[made["label"].isin(called.captioned())]
    found = clusters.assign_tiles(held, made, run.device, called.among())
    same = {root: _clusters_of(run, root) in ("", clusters.digest(held)) for root in made["root"].unique()}
    wanted = np.where(made["root"].map(same), asked(made, called.prompts), -1)
    hit = np.where(wanted >= 0, found.cluster == wanted, np.nan)
    return pd.DataFrame(
        {"tile_id": made["tile_id"], "label": made["label"], "asked": wanted, "cluster": found.cluster, "distance": found.distance,
         "margin": found.margin, "hit": hit.astype(float)}, index=made.index,
    )  # fmt: skip


def _clusters_of(run, root):
    """Digest of the clusters that the captions of a generating step are about, "" where nobody knows."""
    folder = next(iter(run.parents(root).values()), None) if root not in (run.step, "data") else None
    given = (places.read(folder) or {}).get("parameters", {}) if folder else {}
    step = given.get("captions") or given.get("options", {}).get("captions", "")
    return clusters.digest(clusters.load(run.parent(step, ""))) if step else ""


def fidelity(placed, captions, tiles):
    """How often made tiles fall where they were asked to, per class; higher is better, `by chance` is what to beat.

    Args:
        placed: of `placed`.
        captions: table of `prompt_table.Called`. tiles: manifest, for the class of each captioned tile.

    Returns:
        DataFrame class, tiles, hit (share), low, high (Wilson, 95 %, tiles as independent), by chance (the hits of tiles that follow the
        class's real ones whatever is asked).
    """
    label = captions["tile_id"].map(tiles.set_index("tile_id")["label"])
    rows = []
    for name, own in placed[placed["asked"].ge(0)].groupby("label", sort=True):
        real = captions.loc[label.eq(name), "cluster"].value_counts(normalize=True)
        low, high = stats.wilson(int(own["hit"].sum()), len(own))
        row = {"class": name, "tiles": len(own), "hit": own["hit"].mean(), "low": low, "high": high}
        rows.append(row | {"by chance": float(own["asked"].map(real).fillna(0).mean())})
    return pd.DataFrame(rows, columns=["class", "tiles", "hit", "low", "high", "by chance"])


def crosses(placed, name):
    """Counts [asked, fallen] of one class's made tiles, as a DataFrame."""
    own = placed[placed["label"].eq(name) & placed["asked"].ge(0)]
    return pd.crosstab(own["asked"], own["cluster"])


def collapse(run, step, tiles, sources, seed=0):
    """How much of each class is reached, at equally many tiles: real ones, and those of each source.

    Args:
        step: a 10_morphology_prompts; "" gives an empty table.
        tiles: manifest of 00.
        sources: {name: made manifest rows}; of those with fewest tiles of a class (two at least) as many are drawn from all.

    Returns:
        DataFrame class, source, tiles (drawn), clusters (share of those with a real training tile, weighted alike), real_mass (share of the
        real tiles that lie in a reached cluster), vendi; means over `REPEATS` draws. What real tiles reach is drawn with replacement, as a
        perfect generator would make them: all of ten tiles reach every form of ten tiles, which says nothing. All else is drawn without.
    """
    columns = ["class", "source", "tiles", "clusters", "real_mass", "vendi"]
    if not step:
        return pd.DataFrame(columns=columns)
    held = clusters.load(run.parent(step, ""))
    encoder, called = features.load(held.facts["encoder"], run.device), prompt_table.Called.read(run, step)
    training = data.training(tiles)
    own = training[training["tile_id"].isin(called.table["tile_id"])]
    rows = []
    for name in called.captioned():
        sets = {REAL: own[own["label"].eq(name)], **{source: made[made["label"].eq(name)] for source, made in sources.items()}}
        sets = {source: part for source, part in sets.items() if len(part) >= 2}
        if REAL not in sets or len(sets) < 2:
            continue
        feats = {source: features.embed(encoder, part) for source, part in sets.items()}
        where = {source: held.assign(feats[source], [name] * len(part), called.among()).cluster for source, part in sets.items()}
        mass = pd.Series(where[REAL]).value_counts(normalize=True)
        n = min(map(len, sets.values()))
        for source in sets:
            rng = np.random.default_rng(files.seed(seed, name, "collapse") % 2**32)
            count = len(where[source])
            apart = [rng.permutation(count)[:n] for _ in range(REPEATS)]
            drawn = [rng.integers(count, size=n) for _ in range(REPEATS)] if source == REAL else apart
            reached = [mass.index.isin(where[source][some]) for some in drawn]
            row = {"class": name, "source": source, "tiles": n, "clusters": float(np.mean([r.mean() for r in reached]))}
            row["real_mass"] = float(np.mean([mass.to_numpy()[r].sum() for r in reached]))
            rows.append(row | {"vendi": float(np.mean([distributions.vendi(held.space(feats[source])[some]) for some in apart]))})
    return pd.DataFrame(rows, columns=columns)


def remarks(found):
    """A sentence for each class of `collapse`'s table and source that reaches less than a draw from the real tiles does."""
    for name, part in found.groupby("class", sort=False):
        real = part[part["source"].eq(REAL)].iloc[0]
        for row in part[part["source"].ne(REAL)].itertuples():
            if row.clusters < 0.8 * real["clusters"]:
                yield (
                    f"{name}: {row.tiles} tiles of {row.source} reach {row.clusters:.0%} of its clusters, as many real ones "
                    f"{real['clusters']:.0%}: forms of the class are missing."
                )
