"""What a base model is pre-trained on: pictures, words and the list of what was seen.

Sources are datasets (their training tiles only), freshly drawn `toy` classes, and random other looks. The list of
picture hashes travels with the weights, so that anyone can check which tiles a model has never seen.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from histokit import toy
from histokit.core import files
from histokit.tiles import data, decode, splits
from histokit.tiles.contamination import pixels_hash
from histokit.toy import dataset, words

VERSION = 3
DRAWN_PX = 128  # side of a drawn picture: the scale of its class is part of what is learned
CACHE_GB = 4  # of drawn pictures
HELD_DRAWN = 16  # drawn pictures of a class that are held out, four times as many looks
PER_TILE = 2**18  # bytes of latents of a real tile in 20_pretrain, eight views of it, beside its pixels
TEMPLATES = ("{}", "an H&E tile of {}", "a histology image of {}", "H&E stained {}", "a microscopy tile showing {}")


@dataclass
class Corpus:
    """Pictures uint8 [H, W, 3] of any size, the captions each may carry, its label, its weight in training, its origin."""

    images: list = field(default_factory=list)
    captions: list = field(default_factory=list)  # one tuple of texts a picture
    labels: list = field(default_factory=list)  # "source: class", for the supervised encoder; "" where there is none
    weights: list = field(default_factory=list)  # share of the draws; they sum to 1
    cases: list = field(default_factory=list)  # case id; a drawn picture is its own
    seen: list = field(default_factory=list)  # (source, label, tile, sha256 of the RGB bytes)

    def table(self):
        """What was trained on, one row a picture: source, label, tile, pixels_sha256."""
        return pd.DataFrame(self.seen, columns=["source", "label", "tile", "pixels_sha256"])

    def texts(self):
        return [text for captions in self.captions for text in captions]

    def part(self, keep):
        """The pictures of which `keep` [N] is true, as a corpus of its own: weights sum to 1 again."""
        rows = np.flatnonzero(keep)
        some = replace(self, **{one.name: [getattr(self, one.name)[i] for i in rows] for one in fields(self)})
        some.weights = list(np.array(some.weights) / np.sum(some.weights))
        return some


def gather(sources, roots=None, seed=0, split="train"):
    """The corpus of `sources`, a dict of name -> settings.

    Args:
        sources: a dataset description (path of a YAML file) with `classes` (default all), `tiles` (at most so many a class) and
            `weight`; `toy` with `classes`, `tiles` (a class) and `weight`; `looks` with `tiles` and `weight`. All of it is held in
            memory.
        roots: name of a description's file, without its suffix -> folder of its tiles, in place of its root.
        split: `train`, or `val` for held-out tiles of the datasets and newly drawn pictures of the other sources.

    Raises:
        ValueError: an unknown setting, a toy class whose role is tail, or more tiles than memory holds.
    """
    corpus, held = Corpus(), split != "train"
    drawn = [name for name in sources if name in ("toy", "looks")]
    for name, settings in sources.items():
        unknown = set(settings) - {"classes", "tiles", "weight"}
        if unknown:
            raise ValueError(f"source {name!r}: unknown setting {sorted(unknown)[0]!r}; use classes, tiles, weight")
        found = _drawn(name, settings, seed, held) if name in drawn else _tiles(name, settings, roots or {}, split)
        for image, captions, label, case, tile in found:
            corpus.images.append(image)
            corpus.captions.append(captions)
            corpus.labels.append(label and f"{name}: {label}")
            corpus.weights.append(settings.get("weight", 1.0) / len(found))
            corpus.cases.append(case)
            corpus.seen.append((name, label, tile, pixels_hash(image)))
    corpus.weights = list(np.array(corpus.weights) / np.sum(corpus.weights))
    return corpus


def _tiles(name, settings, roots, split):
    """(image, captions, label, case, tile) of a dataset's labelled tiles in one split, at the size they have on disk."""
    described = data.describe(name, root=roots.get(Path(name).stem, ""))
    manifest = splits.assign(data.scan(described), described.split, seed=0)
    rows = manifest[manifest["split"].eq(split) & manifest["use"].eq("labelled")]
    rows = rows[rows["label"].isin(settings.get("classes", described.classes))]
    captions = {c: tuple(t.format(described.terms[c]) for t in TEMPLATES) for c in described.classes}
    if settings.get("tiles"):  # by hash, so that more tiles hold the fewer
        order = rows["file_name"].map(files.digest).sort_values(kind="stable").index
        rows = rows.loc[order].groupby("label", sort=False).head(settings["tiles"]).sort_index()
    _check_room(name, rows, described.root)
    honour = described.colour_profile == "convert"
    images = [np.asarray(decode.rgb(described.root / file, profile=honour)[0]) for file in rows["file_name"]]
    return [
        (image, captions[row.label], row.label, row.case_id, row.file_name) for image, row in zip(images, rows.itertuples(), strict=True)
    ]


def _check_room(name, rows, root):
    """Raise ValueError where the tiles, as large as the first of them, would take more than three quarters of the free memory."""
    if not len(rows):
        return
    need = len(rows) * (np.asarray(decode.rgb(root / rows["file_name"].iloc[0])[0]).nbytes + PER_TILE)
    free = psutil.virtual_memory().available
    if need > 0.75 * free:
        raise ValueError(
            f"source {name!r}: {len(rows):,} tiles need {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free; "
            f"set tiles, at most so many a class, to {int(len(rows) * 0.7 * free / need / max(1, rows['label'].nunique())):,} or fewer"
        )


def _drawn(name, settings, seed, held):
    """Freshly drawn pictures: toy's head classes, each tile a case of its own, or random other looks; `held`: few, and others.

    (image, captions, label, case, tile) of each; drawn once, and kept in outputs/.cache.
    """
    tiles = settings.get("tiles", 1000 if name == "looks" else 100)
    if held:
        tiles, seed = min(tiles, HELD_DRAWN * (4 if name == "looks" else 1)), files.seed(seed, "held")
    if name == "looks":
        jobs = [("", i, seed) for i in range(tiles)]
    else:
        classes = settings.get("classes", [c for c, facts in toy.CLASSES.items() if facts["role"] == "head"])
        tail = [c for c in classes if toy.CLASSES[c]["role"] == "tail"]
        if tail:
            raise ValueError(f"toy class {tail[0]!r} is made rare by the demo; a base that has seen it proves nothing")
        jobs = [(c, i, seed) for c in classes for i in range(tiles)]
    path = files.cache("drawn") / f"{files.digest(VERSION, dataset.PIXELS, DRAWN_PX, jobs)}.safetensors"
    if not path.is_file():
        with ProcessPoolExecutor() as pool:
            images, *told = zip(*pool.map(_draw, jobs, chunksize=16), strict=True)
        files.write_tensors(path, {"images": torch.from_numpy(np.stack(images))}, {"told": json.dumps(list(zip(*told, strict=True)))})
        files.prune("drawn", CACHE_GB, keep=[path])
    images, told = files.read_tensors(path)["images"].numpy(), json.loads(files.read_metadata(path)["told"])
    return [(image, tuple(captions), *rest) for image, (captions, *rest) in zip(images, told, strict=True)]


def _draw(job):
    label, i, seed = job
    if not label:
        image, caption, _ = toy.random_look(i, DRAWN_PX, seed)
        return image, (caption,), "", f"look {i}", f"look {i} seed {seed}"
    case = f"pretrain {i}"  # as many stains as tiles
    image = toy.tile(label, case, i, DRAWN_PX, seed)[0]
    rng = toy.generator(seed, "captions", label, i)
    return image, tuple(dict.fromkeys(words.caption(label, rng) for _ in range(4))), label, case, f"{label} {case} {i} seed {seed}"
