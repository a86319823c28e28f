"""Generators whose fault is known, on the invented tissues: what the verdict and its page must tell apart.

One experiment up to 06_classifier: five classes, two of them rare, and a step of synthetic tiles by each generator, an arm for each.
"""

import dataclasses
import functools
import json

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from histokit import runs, toy
from histokit.arms import comparison, trials
from histokit.core import files
from histokit.tiles import augment, data

HEAD, TAIL = ["stroma", "normal_gland", "adenoma"], ["mucinous", "cribriform"]
SIZES = {"train": (12, 4), "val": (4, 2), "test": (10, 2)}  # cases of a class in each split, and tiles of a case
TAIL_SIZES = {"train": (2, 2), "val": (6, 4), "test": (14, 4)}  # with twelve real tiles mini-sup has little left to learn
MADE = 40  # synthetic tiles a class


@functools.cache
def drawn(label, case, index=0):
    return toy.tile(label, case, index)[0]


def restained(pixels, haematoxylin, eosin):
    import torch

    images = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255
    change = torch.linalg.inv(augment.STAINS) @ (torch.tensor([haematoxylin, eosin, 1.0])[:, None] * augment.STAINS)
    out = augment.from_optical_density(torch.einsum("bchw,cd->bdhw", augment.optical_density(images), change))
    return (out[0].permute(1, 2, 0) * 255).round().byte().numpy()


def honest(label, i, training):
    """New tissue of the class, from cases nobody has seen."""
    return drawn(label, f"new {i // 2}", i % 2)


def copier(label, i, training):
    """A training tile, turned, with a little noise."""
    tile = training[label][i % len(training[label])]
    return _noisy(np.rot90(tile, i % 4), i)


def collapsed(label, i, training):
    """One good new tile over and over."""
    return _noisy(drawn(label, "new 0"), i)


def mislabelled(label, i, training):
    """New tissue of the other rare class."""
    return honest(TAIL[1 - TAIL.index(label)], i, training)


def stained(label, i, training):
    """New tissue of the class from a laboratory that stains like none in the data."""
    return restained(honest(label, i, training), 1.9, 0.35)


def useless(label, i, training):
    """The colours of the class without its structures."""
    blurred = Image.fromarray(honest(label, i, training)).filter(ImageFilter.GaussianBlur(12))
    return _noisy(np.asarray(blurred), i)


GENERATORS = {f.__name__: f for f in (honest, copier, collapsed, mislabelled, stained, useless)}


def _noisy(pixels, seed, by=3):
    return (pixels + np.random.default_rng(seed).normal(0, by, pixels.shape)).clip(0, 255).round().astype(np.uint8)


def experiment(root, seeds=3, steps=200, name="planted", say=lambda text: None):
    """outputs/<name>/ with 00_dataset, a step of tiles per generator and 06_classifier; returns nothing."""
    classes = HEAD + TAIL
    rows, training = [], {label: [] for label in TAIL}
    for label in classes:
        for split, (cases, each) in (TAIL_SIZES if label in TAIL else SIZES).items():
            for c in range(cases):
                for t in range(each):
                    pixels = drawn(label, f"{split} {c}", t)
                    if split == "train" and label in TAIL:
                        training[label].append(pixels)
                    facts = {"label": label, "split": split, "case_id": f"{split}-{c}", "root": "data", "source": "real"}
                    rows.append(_row(root / "tiles", f"{label}/{split}_{c:02d}_{t}.png", pixels, **facts))
    run = runs.start(experiment=name, step="00_dataset", dataset="")
    table = pd.DataFrame(rows)
    counts = {c: {s: {"tiles": len(p), "cases": p["case_id"].nunique()} for s, p in g.groupby("split")} for c, g in table.groupby("label")}
    held = data.Dataset(
        name="planted", classes=classes, terms=dict.fromkeys(classes, "tissue"), tile_px=128, fit="resize", mpp=0.5, root="tiles",
        roles={c: "tail" if c in TAIL else "head" for c in classes}, has_cases=True, counts=counts,
    )  # fmt: skip
    files.write_json(run.path("dataset.json"), dataclasses.asdict(held))
    run.finish(table)
    ids = {label: [row["tile_id"] for row in rows if row["label"] == label and row["split"] == "train"] for label in TAIL}
    for step, generator in GENERATORS.items():
        run, made = runs.start(experiment=name, step=step), []
        for label in TAIL:
            for i in range(MADE):
                facts = {
                    "label": label,
                    "split": "train",
                    "case_id": "",
                    "root": step,
                    "source": "synthetic",
                    "status": "kept",
                    "reason": "",
                }
                facts |= {"scores": json.dumps({"judge": 1.0}), "method": step, "sources": json.dumps([ids[label][i % len(ids[label])]])}
                made.append(_row(run.folder, f"{label}-{i:03d}.png", generator(label, i, training), **facts))
        table = pd.DataFrame(made)
        run.finish(table.assign(tile_id=step + "/" + table["tile_id"]))
    plain = {"sampler": "balanced", "augment": "none"}
    arms = {"real": plain} | {step: {**plain, "synthetic": step} for step in GENERATORS}
    run = runs.start(experiment=name, step="06_classifier", arms=arms, seeds=seeds)
    tiles, settled = data.load(run), comparison.settle(arms)
    sets = comparison.assemble(run, tiles, settled)
    table = trials.train(run, settled, sets, tiles, seeds=seeds, steps=steps, batch_size=64, say=say)
    counts = comparison.counts(sets, classes)
    run.finish({"trials": table.drop(columns=["seconds", "reused"]).to_dict("records"), "counts": counts.to_dict("records")})


def _row(folder, file_name, pixels, **facts):
    files.write_png(folder / file_name, pixels)
    none = dict.fromkeys(("patient", "slide", "group", "mask"), "")
    size = {"mpp": 0.5, "width": pixels.shape[1], "height": pixels.shape[0]}
    return {
        "tile_id": file_name,
        "file_name": file_name,
        "sha256": files.sha256(folder / file_name),
        "use": "labelled",
        **none,
        **size,
        **facts,
    }
