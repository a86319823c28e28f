"""Did the generator copy training tiles? The protocol, measured on tiles: two spaces, planted copies, held-out tiles of other cases.

`nearest_tiles` turns tiles into distances, `memorisation` holds the arithmetic and says what passes. What counts as near is asked of real
tiles that no generator saw; planted copies of training tiles show whether the detector would have noticed. Nothing here rejects a tile or
deletes one.
"""

import functools
import io
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtr

from histokit.fidelity import closest_pairs, nearest_tiles
from histokit.metrics import distributions, memorisation, stats
from histokit.runs import workload
from histokit.tiles import augment, data

VERSION = 3  # and of `nearest_tiles`
NEIGHBOURS = 50  # real tiles around a synthetic one, for the ratio test


@dataclass(frozen=True)
class Report:
    """What `measure` found: one row per class and space, the gate of each class, the closest pairs, the detectors."""

    rows: pd.DataFrame
    gates: dict  # class -> memorisation.Gate
    pairs: pd.DataFrame
    detectors: dict  # class -> [memorisation.Detector]

    def plain(self):
        """As results.json holds it."""
        gates = {name: {"state": gate.state, "reasons": gate.reasons} for name, gate in self.gates.items()}
        rows = json.loads(self.rows.to_json(orient="records"))
        found = {name: {d.space: d.found for d in detectors} for name, detectors in self.detectors.items()}
        return {"gates": gates, "rows": rows, "planted_found": found}


class Planted:
    """Training tiles as copies of a kind; for `features.embed`, which keeps them by `identity`."""

    def __init__(self, kind, change):
        self.identity, self._change = {"planted copy": kind, "version": VERSION}, change

    def __call__(self, pixels):
        return np.ascontiguousarray(self._change(np.asarray(pixels)))


def planted(vae=None):
    """{kind: codec} of the copies a detector has to find; `vae`: also the round trip through a base's autoencoder."""
    kinds = {
        "exact": lambda x: x,
        "flip": lambda x: augment.pixel_symmetry(x, 4),
        "turn": lambda x: augment.pixel_symmetry(x, 1),
        "crop 90 %": _cropped,
        "JPEG 75": _jpeg,
        "stain": _restained,
    }
    found = {kind: Planted(kind, change) for kind, change in kinds.items()} | ({"autoencoder": vae} if vae else {})
    assert set(found) <= set(workload.COPIES), "what is planted is counted there"
    return found


def _cropped(pixels):
    from PIL import Image

    side = pixels.shape[1]
    margin = round(0.05 * side)
    inner = pixels[:, margin : side - margin, margin : side - margin]
    return np.stack([np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.BICUBIC)) for tile in inner])


def _jpeg(pixels):
    from PIL import Image

    out = []
    for tile in pixels:
        held = io.BytesIO()
        Image.fromarray(tile).save(held, "JPEG", quality=75)
        out.append(np.asarray(Image.open(held).convert("RGB")))
    return np.stack(out)


def _restained(pixels):
    images = (data.to_float(pixels) + 1) / 2
    jittered = [augment.stain_jitter(image[None], torch.Generator().manual_seed(1)) for image in images]
    return data.to_uint8(torch.cat(jittered) * 2 - 1)


def measure(tiles, made, classes, encoder, *, vae=None, most=500, seed=0):
    """The memorisation protocol for the synthetic tiles of each class.

    Args:
        tiles: manifest of 00_dataset; its training tiles of `classes`, and the sources of synthetic tiles, are what can have been copied.
        made: synthetic rows.
        classes: class names.
        encoder: features.Encoder of the space that sees content; `outline` is the one that sees pixels.
        vae: codec of a base's autoencoder (`codecs.VaeRoundTrip`), for one more kind of planted copy; None leaves it out.
        most: held-out and synthetic tiles of a class at most, seeded.

    Returns:
        Report.
    """
    made = made[made["label"].isin(classes)]
    if made.empty:
        return Report(pd.DataFrame(columns=ROW), {}, pd.DataFrame(columns=closest_pairs.PAIR), {})
    learned = _learned(tiles, made, classes)
    near = nearest_tiles.Nearest(learned, encoder)
    copied, kinds = {}, planted(vae)
    sample = learned.sample(min(workload.PLANTED, len(learned)), random_state=seed) if len(learned) else learned
    for kind, codec in kinds.items():
        for space, found in near(sample, codec).items():
            copied.setdefault(space, {})[kind] = found.distance
    rows, gates, pairs, detectors = [], {}, [], {}
    for name in classes:
        own = _some(made[made["label"].eq(name)], most, seed)
        held = _some(tiles[_kept_out(tiles) & tiles["label"].eq(name)], most, seed)
        if len(own):
            pooled = Pooled(name, near, tiles, classes, sample, kinds, most, seed)
            found = _class(name, own, held, near, copied, pooled, seed)
            rows, gates[name], detectors[name] = rows + found["rows"], found["gate"], found["detectors"]
            pairs.append(found["pairs"])
    pairs = closest_pairs.chosen(pd.concat(pairs)) if pairs else pd.DataFrame(columns=closest_pairs.PAIR)
    rows = pd.DataFrame(rows, columns=ROW)
    if (known := rows["z"].notna()).any():
        rows.loc[known, "p"] = stats.holm(ndtr(rows.loc[known, "z"].to_numpy(float)))
    return Report(rows, gates, pairs.reset_index(drop=True), detectors)


ROW = (
    "class space synthetic held_out cases test cut copies expected excess low high copied_training most_copied most_copied_times closest "
    "certain authentic authentic_real z farther p"
).split()


def _kept_out(tiles):
    return tiles["split"].isin(["val", "test"]) & tiles["use"].eq("labelled") & tiles["source"].eq("real")


def _learned(tiles, made, classes):
    """What a generator of these classes can have copied: their training tiles, those without a label, and every tile it rendered anew."""
    sources = {name for text in made.get("sources", pd.Series(dtype=str)) for name in json.loads(text or "[]")}
    training = data.learnable(tiles)
    kept = training["label"].isin(classes) | training["tile_id"].isin(sources) | training["use"].eq("unlabelled")
    return training[kept].reset_index(drop=True)


def _some(rows, most, seed):
    return rows.sample(min(most, len(rows)), random_state=seed).sort_index().reset_index(drop=True)


class Pooled:
    """The ratio test, calibrated on real tiles of all rare classes, for one with too few held-out tiles of its own.

    Every class has as many tiles around as this one, or a small class among large ones would seem to lie near its training tiles.
    """

    def __init__(self, name, near, tiles, classes, sample, kinds, most, seed):
        self.near, self.sample, self.kinds, self.seed = near, sample, kinds, seed
        self.held = _some(tiles[_kept_out(tiles) & tiles["label"].isin(classes)], most, seed)
        real = tiles[tiles["use"].eq("labelled") & tiles["source"].eq("real") & tiles["split"].isin(["train", "val", "test"])]
        self.around = real.groupby("label").sample(frac=1, random_state=seed)
        self.around = self.around.groupby("label").head(min(NEIGHBOURS, real["label"].eq(name).sum())).reset_index(drop=True)

    def __call__(self, tiles, codec=None):
        """{space: [N]} ratio of tiles that may be copies; their own cases count."""
        return self.near.ratio(tiles.assign(case_id=""), self.around, codec)

    @functools.cached_property
    def detectors(self):
        """{space: memorisation.Detector} on ratios; empty where even all classes together are too few."""
        real = pd.concat([self.near.training, self.held])
        copied = {kind: self(self.sample, codec) for kind, codec in self.kinds.items()}
        found = {}
        for space, value in self.near.ratio(real, self.around).items():
            known, planted = np.isfinite(value), {kind: ratios[space] for kind, ratios in copied.items()}
            try:
                found[space] = memorisation.calibrate(space, value[known], real["case_id"].to_numpy()[known], planted, self.seed)
            except distributions.TooSmall:
                return {}
        return found


def _class(name, own, held, near, copied, pooled, seed):
    ours, theirs = near(own), near(held)
    training = near.training[near.training["label"].eq(name)].reset_index(drop=True)
    across = near(training, apart=True) if len(training) else {}
    rows, found, bounds, least, limit = [], [], [], {}, {}
    for space, (distance, row, _) in ours.items():
        real = np.r_[theirs[space].distance, across[space].distance if space in across else []]
        least[space] = float(distance.min())
        limit[space] = memorisation.certain(real, np.concatenate(list(copied[space].values())))
        line = dict.fromkeys(ROW, np.nan) | {"class": name, "space": space, "synthetic": len(own), "held_out": len(held)}
        line |= {"cases": held["case_id"].nunique(), "closest": least[space], "certain": limit[space], "test": ""}
        line |= _without_cut(distance, row, theirs[space], near.apart[space])
        try:
            detector = memorisation.calibrate(space, theirs[space].distance, held["case_id"].to_numpy(), copied[space], seed)
            value, few, line["test"] = distance, False, "distance"
        except distributions.TooSmall:
            few, detector = True, pooled.detectors.get(space)
            if detector is None:
                rows.append(line)
                continue
            value, line["test"] = pooled(own)[space], "ratio"
        many = int((value < detector.strict).sum())
        excess, low, high = memorisation.excess(many, len(own), detector.strict_rate, detector.real_tiles)
        share, most, times = memorisation.copied_from(value, row, detector.strict, len(near.training))
        line |= {"cut": detector.strict, "copies": many, "expected": detector.strict_rate, "excess": excess, "low": low, "high": high}
        most_copied = near.training["tile_id"].iloc[most] if most >= 0 else ""
        line |= {"copied_training": share, "most_copied": most_copied, "most_copied_times": times}
        rows.append(line)
        found.append(detector)
        bounds.append((low, high))
    pairs = closest_pairs.of_class(name, own, ours, near.training)
    return {"rows": rows, "gate": memorisation.gate(found, bounds, least, limit, few), "pairs": pairs, "detectors": found}


def _without_cut(distance, row, real, apart):
    """The two statistics that need no cut: the share of authentic tiles, and the ranks of the distances, beside held-out real tiles."""
    found = {"authentic": float((distance > apart[row]).mean())}
    if len(real.distance):
        z, farther = distributions.data_copying(distance, real.distance)
        found |= {"authentic_real": float((real.distance > apart[real.row]).mean()), "z": z, "farther": farther}
    return found


def table(report):
    """The rows of a Report for reading."""

    def percent(value):
        return "" if np.isnan(value) else f"{100 * value:.1f} %"

    rows = []
    for row in report.rows.to_dict("records"):
        shown = {"class": row["class"], "space": row["space"], "synthetic": row["synthetic"]}
        shown |= {"held out": f"{row['held_out']} of {row['cases']} cases"}
        if np.isnan(row["cut"]):
            shown |= {"copies": memorisation.TOO_FEW, "excess": "", "training tiles copied": ""}
        else:
            by = " by the ratio test" if row["test"] == "ratio" else ""
            shown |= {"copies": f"{row['copies']:.0f}{by}, {percent(row['expected'])} expected"}
            shown |= {"excess": f"{100 * row['excess']:+.1f} points [{100 * row['low']:+.1f} to {100 * row['high']:+.1f}]"}
            shown |= {"training tiles copied": percent(row["copied_training"])}
        rows.append(shown | {"closest pair": f"{row['closest']:.3f}, a copy below {row['certain']:.3f}"})
    return pd.DataFrame(rows)


def rank_table(report):
    """What needs no cut: how many tiles are authentic, and whether they lie nearer to the training tiles than held-out real ones do."""
    shown = report.rows[["class", "space"]].copy()
    for column, title in (("authentic", "authentic"), ("authentic_real", "real ones of other cases")):
        shown[title] = ["" if np.isnan(share) else f"{100 * share:.0f} %" for share in report.rows[column]]
    shown["farther than a real one"] = ["" if np.isnan(share) else f"{100 * share:.0f} %" for share in report.rows["farther"]]
    shown["C_T"] = ["n too small to say" if np.isnan(z) else f"{z:+.1f}" for z in report.rows["z"]]
    shown["p, Holm"] = ["" if np.isnan(p) else f"{p:.2g}" for p in report.rows["p"]]
    return shown


def sentences(report):
    """What may be said of each class; never that anything is private."""
    for name, gate in report.gates.items():
        detectors = report.detectors[name]
        if gate.state == "pass":
            sure = min(max(d.found[kind] for d in detectors) for kind in detectors[0].found)
            spaces = " and ".join(d.space for d in detectors)
            yield f"{name}: no copies found by {spaces}, which find {100 * sure:.0f} % of planted copies of every kind at 1 % false alarms."
        elif gate.state == "uncalibrated":
            yield f"{name}: whether there are copies cannot be said; {'; '.join(gate.reasons)}."
        else:
            yield f"{name}: copies; {'; '.join(gate.reasons)}."
