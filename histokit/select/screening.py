"""Synthetic tiles before their judges: an independent classifier, the nearest training tiles, a person.

Gathers what `selection` decides on. The judge must have seen real tiles only; the encoder that measures distances should not be
the judge's, so that no encoder judges its own choice.
"""

import json

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from histokit.metrics import distributions
from histokit.morphology import cluster_fidelity
from histokit.select import guide_check, reviews, scoring, selection
from histokit.tiles import augment, data, near_duplicates, staining
from histokit.vision import classifiers, features, pathology_encoders

VERSION = 6
SAMPLE = 300  # real tiles that stand for all in the calibration of cuts


def judges(run, step, arm=""):
    """The classifiers of one arm of a finished 06 step, one per seed; their mean probability is the judge.

    Raises ValueError when the arm is not there or has seen synthetic tiles.
    """
    folders = classifiers.trained(run.parent(step), step, arm)
    panel = [classifiers.load(folder, run.device) for folder in folders]
    if any(judge.facts["n_synthetic"] for judge in panel):
        name = folders[0].parent.name
        raise ValueError(f"judge arm {name!r} of {step} was trained on synthetic tiles; a judge must have seen real ones only")
    return panel


def remarks(panel, encoder):
    """Plain sentences on how far the judge can be trusted; empty when there is nothing to say."""
    said = (
        [f"The judge and the distances use the same encoder, {encoder}: it judges its own choice."]
        if panel[0].facts["encoder"] == encoder
        else []
    )
    for name in dict.fromkeys([encoder, panel[0].facts["encoder"]]):
        licence = pathology_encoders.known(name).get("licence", "MIT")
        if pathology_encoders.restricted(licence):
            said.append(f"Tiles chosen with {name} may come under its licence ({licence}); read it before they are shared.")
    if panel[0].mode not in ("knn", "prototype") and panel[0].facts["settings"]["sampler"] == "natural":
        shares = np.array(panel[0].facts["class_counts"]) / max(1, sum(panel[0].facts["class_counts"]))
        if panel[0].facts["settings"]["loss"] == "cross_entropy" and shares.min() < 0.2 / len(shares):
            said.append("The judge drew tiles as they come, so it seldom answers with a rare class; give its arm sampler: balanced.")
    return said


def screen(run, made, tiles, panel, encoder_name, thresholds, quota=None, centroids="unit", clusters=""):
    """Score and judge the tiles of every class in `made`.

    Args:
        made: synthetic manifest rows from `data.load`; empty is allowed.
        tiles: manifest of 00_dataset.
        panel: from `judges`.
        encoder_name: encoder of the distances.
        thresholds: see `selection.calibrate`.
        quota: see `selection.limit`.
        centroids: see `scoring.to_centroids`.
        clusters: step of 10_morphology_prompts that is asked where each tile falls, "" for none.

    Returns:
        manifest (the rows with scores, status, reason), scores DataFrame (one row per tile, with class and decision),
        cuts DataFrame (with class), real DataFrame (the likeness and contrast of real tiles and their probability that the cuts come from).
    """
    guide_check.refuse(panel, made, "the judge")
    encoder, verdicts = features.load(encoder_name, run.device), reviews.of_run(run)
    if place := features.source(encoder_name):
        run.input(place)
    fallen = cluster_fidelity.placed(run, clusters, made).set_index("tile_id") if clusters and len(made) else None
    manifests, scores, cuts, reals = [], [], [], []
    usual = typical(data.training(tiles)) if len(made) else None
    for name, rows in made.groupby("label", sort=False):
        rows = rows.reset_index(drop=True)
        own = scored(rows, tiles, name, panel, encoder, centroids, usual)
        if fallen is not None:
            where = fallen.reindex(rows["tile_id"]).reset_index(drop=True)
            own = own.assign(
                cluster_asked=where["asked"].fillna(-1).astype(int), cluster=where["cluster"], cluster_distance=where["distance"]
            )
        real = of_real(tiles, name, panel, encoder, usual)
        table = selection.calibrate(thresholds, real)
        sizes = data.training(tiles)["label"].value_counts()
        decided = selection.decide(own, table, name, verdicts)
        decided = selection.limit(decided, own, quota, int(sizes.get(name, 0)), int(sizes.max()))
        manifests.append(selection.merged(rows, own, decided))
        scores.append(pd.concat([rows[["tile_id", "label", "path"]], own, decided], axis=1))
        cuts.append(table.assign(label=name))
        reals.append(real.assign(asked=name))
    if not manifests:
        columns = {name: "" for name in ("scores", "status", "reason") if name not in made}
        return made.assign(**columns), pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    return tuple(pd.concat(parts, ignore_index=True) for parts in (manifests, scores, cuts, reals))


def scored(rows, tiles, name, panel, encoder, centroids, usual):
    """What `selection.decide` asks of rows that were made for the class `name`; without a panel the judge's columns say nothing.

    Args:
        tiles: manifest of 00_dataset; likeness is to all that can have been learned from, the rest to labelled training tiles.
        usual: from `typical`.
    """
    training, learned = data.training(tiles), data.learnable(tiles)
    out = {"sha256": rows["sha256"], "judge": np.nan, "judge_class": "", "judge_rank": 0, "own_source": _own_source(rows, training, name)}
    if panel:
        classes, probabilities = panel[0].classes, np.mean([judge.predict_tiles(rows) for judge in panel], axis=0)  # [B, C]
        out |= {"judge": probabilities[:, classes.index(name)], "judge_class": [classes[i] for i in probabilities.argmax(axis=1)]}
        out["judge_rank"] = scoring.rank_of(probabilities, classes.index(name))
    looks = _looks(rows)
    out |= {"brightness": looks["brightness"], "contrast": looks["contrast"], "focus": looks["focus"]}
    out["stain"] = scoring.deviation(looks["stains"], usual[1])
    alike, labels = features.scaling(features.embed(encoder, training)), training["label"].to_numpy(str)
    feats, reals = alike(features.embed(encoder, rows)), alike(features.embed(encoder, training))
    places = scoring.to_centroids(feats, reals, labels, name, centroids)
    out |= dict(zip(("centroid_rank", "centroid", "centroid_margin"), places, strict=True))
    out["realism"] = _realism(feats, reals[labels == name])
    order = np.argsort(-out["judge"], kind="stable")  # of two alike the one the judge likes better stays
    for space, (views, real) in spaces(rows, learned, encoder).items():
        similarity, index = scoring.nearest_similarity(views, real)
        twin, twin_of = scoring.twins(views, order)
        out |= {f"similarity_{space}": similarity.numpy(), f"nearest_{space}": learned["tile_id"].to_numpy()[index.numpy()]}
        out |= {f"twin_{space}": twin, f"twin_of_{space}": [rows["tile_id"].iloc[i] if i >= 0 else "" for i in twin_of]}
    return pd.DataFrame(out)


def _own_source(rows, training, name):
    """Whether each row was made from real training tiles of the class alone, [B] bool."""
    own = set(training.loc[training["label"].eq(name), "tile_id"])
    sources = [json.loads(text) if isinstance(text, str) and text else [] for text in rows.get("sources", [""] * len(rows))]
    return [bool(some) and set(some) <= own for some in sources]


def of_real(tiles, name, panel, encoder, usual):
    """How real tiles score where one is made for the class `name`: what `selection.calibrate` takes.

    Args:
        tiles: manifest of 00_dataset.
        usual: from `typical`.
    """
    held = [_judged(tiles, name, panel)] if panel else []
    return pd.concat([_real(data.training(tiles), data.learnable(tiles), name, encoder), usual[0], *held], ignore_index=True)


def variances(run, manifest, tiles, encoder_name):
    """How varied a class's tiles are beside real training tiles of it, in the space that likeness is measured in.

    Returns:
        DataFrame class, made, kept (shares of the real tiles' variance; 1 is as varied), tiles (how many kept), real (how many).
    """
    encoder, training, rows = features.load(encoder_name, run.device), data.training(tiles), []
    alike = features.scaling(features.embed(encoder, training))
    for name, made in manifest.groupby("label", sort=False):
        kept, real = made[made["status"].eq("kept")], training[training["label"].eq(name)]
        of = [scoring.variance(alike(features.embed(encoder, part))) if len(part) else np.nan for part in (made, kept, real)]
        rows.append({"class": name, "made": of[0] / of[2], "kept": of[1] / of[2], "tiles": len(kept), "real": len(real)})
    return pd.DataFrame(rows, columns=["class", "made", "kept", "tiles", "real"])


def spaces(rows, training, encoder):
    """{space: (eight views of each row [B, 8, D], training tiles [N, D])}: what the encoder sees, and the picture's outline."""
    alike = features.scaling(features.embed(encoder, training))
    views = features.embed(encoder, rows, augment="symmetries")
    picture = features.load("picture")
    outline, real_outline = features.embed(picture, rows), features.embed(picture, training)
    turned = near_duplicates.symmetric(outline.reshape(-1, near_duplicates.LOW, near_duplicates.LOW)).reshape(
        len(rows), 8, near_duplicates.LOW**2
    )
    return {"feature": (alike(views), alike(features.embed(encoder, training))), "picture": (turned, real_outline)}


def _real(training, learned, name, encoder):
    """How real tiles score: likeness to the nearest one of `learned` of another case, to any other, to a copy of itself, and contrast."""
    own = training[training["label"].eq(name)]
    asked = own if len(own) >= selection.ENOUGH else training  # a rare class borrows from all
    asked = asked.sample(min(SAMPLE, len(asked)), random_state=0)
    views, real = spaces(asked, learned, encoder)["feature"]
    position = learned.index.get_indexer(asked.index)
    cases, real_cases = asked["case_id"].to_numpy(), learned["case_id"].to_numpy()
    copied = features.scaling(features.embed(encoder, learned))(features.embed(encoder, asked, codec=KnownCopy()))
    table = pd.DataFrame({"tile_id": asked["tile_id"], "label": asked["label"]})
    table["across_cases"] = scoring.real_similarity(views, real, position, cases, real_cases)
    table["anywhere"] = scoring.real_similarity(views, real, position)
    table["known_copy"] = [float(scoring.nearest_similarity(c[None], r[None])[0]) for c, r in zip(copied, real[position], strict=True)]
    shown = own.sample(min(SAMPLE, len(own)), random_state=0)
    contrast = pd.DataFrame({"tile_id": shown["tile_id"], "label": shown["label"], "contrast": _looks(shown)["contrast"]})
    return pd.concat([table, contrast], ignore_index=True)


def typical(training):
    """Focus and stain of real training tiles of all classes, at most `SAMPLE`, and the stains [N, 2] themselves: the laboratory's."""
    every = training.sample(min(SAMPLE, len(training)), random_state=0)
    looks = _looks(every)
    table = pd.DataFrame({"tile_id": every["tile_id"], "label": every["label"], "focus": looks["focus"]})
    return table.assign(stain=scoring.deviation(looks["stains"], looks["stains"])), looks["stains"]


def _realism(feats, real, k=5):
    """Realism [B] beside the real training tiles of the class; NaN where these are too few to have neighbours."""
    k = min(k, len(real) - 1)
    return distributions.realism(feats, real, k) if k >= 1 and len(feats) else np.full(len(feats), np.nan)


def _judged(tiles, name, panel):
    """What the judge makes of real validation tiles, on which it has not been trained; at most 300 of the class and 300 of others."""
    held = tiles[tiles["split"].eq("val") & tiles["use"].eq("labelled") & tiles["source"].eq("real")]
    parts = []
    for column, rows in (("judge", held[held["label"].eq(name)]), ("judge_of_others", held[held["label"].ne(name)])):
        rows = rows.sample(min(SAMPLE, len(rows)), random_state=0)
        if len(rows):
            probabilities = np.mean([judge.predict_tiles(rows) for judge in panel], axis=0)[:, panel[0].classes.index(name)]
            parts.append(pd.DataFrame({"tile_id": rows["tile_id"], "label": rows["label"], column: probabilities}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["judge", "judge_of_others"], dtype=float)


class KnownCopy:
    """A copy as it would hide: 90 % of the tile cut out and enlarged again, its stains a little stronger or weaker."""

    identity = {"known copy": 1}  # noqa: RUF012

    def __call__(self, pixels):
        side = pixels.shape[1]
        margin = round(side * 0.05)
        images = (data.to_float(pixels) + 1) / 2
        inner = images[:, :, margin : side - margin, margin : side - margin]
        images = F.interpolate(inner, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        strong = [augment.stain_jitter(image[None], torch.Generator().manual_seed(1), strength=0.1) for image in images]
        return data.to_uint8(torch.cat(strong) * 2 - 1)


def _looks(rows):
    """{brightness, contrast, focus [B], stains [B, 2]} of tiles."""
    parts = []
    for i in range(0, len(rows), 256):
        pixels = data.pixels(rows.iloc[i : i + 256])
        parts.append([*scoring.tone(pixels), scoring.focus(pixels), staining.stains(pixels)])
    return dict(zip(("brightness", "contrast", "focus", "stains"), map(np.concatenate, zip(*parts, strict=True)), strict=True))
