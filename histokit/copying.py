"""Did the generator copy training tiles? The protocol, measured on tiles: two spaces, planted copies, held-out tiles of other cases.

`memorisation` holds the arithmetic and says what passes; here tiles become distances. What counts as near is asked of real tiles that no
generator saw; planted copies of training tiles show whether the detector would have noticed. Nothing here rejects or deletes a tile.
"""

import io
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from histokit import augment, copies, data, features, memorisation, set_metrics

VERSION = 1
PLANTED = 60  # training tiles of which each kind of copy is planted
PAIRS = 20  # closest pairs that a person looks at
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
        "flip": lambda x: x[:, :, ::-1],
        "turn": lambda x: np.rot90(x, axes=(1, 2)),
        "crop 90 %": _cropped,
        "JPEG 75": _jpeg,
        "stain": _restained,
    }
    return {kind: Planted(kind, change) for kind, change in kinds.items()} | ({"autoencoder": vae} if vae else {})


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


class Nearest:
    """Distances of tiles to the training tiles, the least over the 8 symmetries: 1 - cosine, in features and in outlines."""

    def __init__(self, training, encoder):
        self.training, self.encoder, self.picture = training, encoder, features.load("picture")
        feats = features.embed(encoder, training)
        self.mean, std = np.mean(feats, axis=0), np.std(feats, axis=0)
        self.weight = np.divide(1, std, out=np.zeros_like(std), where=std > 0.01 * np.median(std) + 1e-9)
        self.real = {encoder.name: _unit((feats - self.mean) * self.weight), "outline": _unit(features.embed(self.picture, training))}

    def views(self, tiles, codec=None):
        """{space: [N, 8, D]} unit vectors of the tiles in their 8 symmetries."""
        feats = (features.embed(self.encoder, tiles, augment="symmetries", codec=codec) - self.mean) * self.weight
        waves = features.embed(self.picture, tiles, codec=codec).reshape(-1, copies.LOW, copies.LOW)
        return {self.encoder.name: _unit(feats), "outline": _unit(copies.symmetric(waves).reshape(len(tiles), 8, -1))}

    def __call__(self, tiles, codec=None, apart=False):
        """{space: (distance [N], row [N] of the training tile)}; `apart`: to those of other cases only, NaN where there is none."""
        out = {}
        for space, views in self.views(tiles, codec).items():
            alike = _best(views, self.real[space])  # [N, T]
            if apart:
                alike[tiles["case_id"].to_numpy()[:, None] == self.training["case_id"].to_numpy()[None]] = -np.inf
            row = alike.argmax(axis=1)
            best = alike[np.arange(len(row)), row]
            out[space] = np.where(np.isfinite(best), 1 - best, np.nan), row
        return out


def _unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def _best(views, real, block=64):
    """Largest cosine [N, T] over the views [N, V, D]."""
    parts = [np.einsum("nvd,td->nvt", views[i : i + block], real, optimize=True).max(axis=1) for i in range(0, len(views), block)]
    return np.concatenate(parts) if parts else np.zeros((0, len(real)))


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
        return Report(pd.DataFrame(columns=ROW), {}, pd.DataFrame(columns=PAIR), {})
    learned = _learned(tiles, made, classes)
    near = Nearest(learned, encoder)
    copied = {}
    sample = learned.sample(min(PLANTED, len(learned)), random_state=seed) if len(learned) else learned
    for kind, codec in planted(vae).items():
        for space, (distance, _) in near(sample, codec).items():
            copied.setdefault(space, {})[kind] = distance
    rows, gates, pairs, detectors = [], {}, [], {}
    for name in classes:
        own = _some(made[made["label"].eq(name)], most, seed)
        held = _some(tiles[_kept_out(tiles) & tiles["label"].eq(name)], most, seed)
        if len(own):
            found = _class(name, own, held, near, copied, seed)
            rows, gates[name], detectors[name] = rows + found["rows"], found["gate"], found["detectors"]
            pairs.append(found["pairs"])
    closest = pd.concat(pairs).sort_values("rank", kind="stable").head(PAIRS) if pairs else pd.DataFrame(columns=PAIR)
    return Report(pd.DataFrame(rows, columns=ROW), gates, closest.reset_index(drop=True), detectors)


ROW = (
    "class space synthetic held_out cases cut copies expected excess low high copied_training most_copied most_copied_times closest certain"
).split()
PAIR = "class tile_id nearest space distance other_space other_distance rank".split()


def _kept_out(tiles):
    return tiles["split"].isin(["val", "test"]) & tiles["use"].eq("labelled") & tiles["source"].eq("real")


def _learned(tiles, made, classes):
    """What a generator of these classes can have copied: their training tiles, and every tile that it rendered anew."""
    sources = {name for text in made.get("sources", pd.Series(dtype=str)) for name in json.loads(text or "[]")}
    training = data.training(tiles)
    return training[training["label"].isin(classes) | training["tile_id"].isin(sources)].reset_index(drop=True)


def _some(rows, most, seed):
    return rows.sample(min(most, len(rows)), random_state=seed).sort_index().reset_index(drop=True)


def _class(name, own, held, near, copied, seed):
    ours, theirs = near(own), near(held)
    training = near.training[near.training["label"].eq(name)].reset_index(drop=True)
    across = near(training, apart=True) if len(training) else {}
    rows, found, bounds, closest, limit = [], [], [], {}, {}
    for space, (distance, row) in ours.items():
        real = np.r_[theirs[space][0], across[space][0] if space in across else []]
        closest[space] = float(distance.min())
        limit[space] = memorisation.certain(real, np.concatenate(list(copied[space].values())))
        line = dict.fromkeys(ROW, np.nan) | {"class": name, "space": space, "synthetic": len(own), "held_out": len(held)}
        line |= {"cases": held["case_id"].nunique(), "closest": closest[space], "certain": limit[space]}
        try:
            detector = memorisation.calibrate(space, theirs[space][0], held["case_id"].to_numpy(), copied[space], seed)
        except set_metrics.TooSmall:
            rows.append(line)
            continue
        many = int((distance < detector.strict).sum())
        excess, low, high = memorisation.excess(many, len(own), detector.strict_rate, detector.real_tiles)
        share, most, times = memorisation.copied_from(distance, row, detector.strict, len(near.training))
        line |= {"cut": detector.strict, "copies": many, "expected": detector.strict_rate, "excess": excess, "low": low, "high": high}
        most_copied = near.training["tile_id"].iloc[most] if most >= 0 else ""
        line |= {"copied_training": share, "most_copied": most_copied, "most_copied_times": times}
        rows.append(line)
        found.append(detector)
        bounds.append((low, high))
    pairs = _pairs(name, own, ours, near.training)
    return {"rows": rows, "gate": memorisation.gate(found, bounds, closest, limit), "pairs": pairs, "detectors": found}


def _pairs(name, own, ours, training):
    """The closest pairs of a class in either space, by their rank there."""
    spaces = list(ours)
    rows = []
    for space in spaces:
        other = spaces[1 - spaces.index(space)]
        distance, row = ours[space]
        for rank, i in enumerate(np.argsort(distance, kind="stable")[:PAIRS]):
            pair = [name, own["tile_id"].iloc[i], training["tile_id"].iloc[row[i]], space, distance[i], other, ours[other][0][i], rank]
            rows.append(dict(zip(PAIR, pair, strict=True)))
    return pd.DataFrame(rows, columns=PAIR).drop_duplicates(["tile_id", "nearest"])


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
            shown |= {"copies": f"{row['copies']:.0f}, {percent(row['expected'])} expected"}
            shown |= {"excess": f"{100 * row['excess']:+.1f} points [{100 * row['low']:+.1f} to {100 * row['high']:+.1f}]"}
            shown |= {"training tiles copied": percent(row["copied_training"])}
        rows.append(shown | {"closest pair": f"{row['closest']:.3f}, a copy below {row['certain']:.3f}"})
    return pd.DataFrame(rows)


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
