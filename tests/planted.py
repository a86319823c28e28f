"""Experiments with a known truth, written the way the notebooks write them: what 07_evaluate reads, without the hours before it."""

import functools
import json

import numpy as np
import pandas as pd

from histokit import runs
from histokit.arms.predictions import Predictions
from histokit.core import files
from histokit.runs import selection_reasons
from histokit.tiles import data

CLASSES = ["Adeno, mucinous", "Normal", "Polyp", "Serrated"]
TAIL = ["Polyp", "Serrated"]


def dataset(classes=CLASSES, tail=TAIL, has_cases=True, tile_px=32, **changes):
    """A frozen dataset; every class has a prompt term and a role."""
    held = {"name": "planted", "classes": list(classes), "terms": {c: c.lower() for c in classes}, "tile_px": tile_px, "fit": "resize"}
    held |= {"roles": {c: "tail" if c in tail else "head" for c in classes}, "mpp": None, "root": "tiles", "has_cases": has_cases}
    return data.Dataset(**held | {"counts": {}} | changes)


def crossed(draws=1, generators=1, seeds=1):
    """Every combination as runs [R, 3] int: draw of the rare tiles, generator seed, classifier seed, the last changing fastest."""
    return np.stack(np.meshgrid(np.arange(draws), np.arange(generators), np.arange(seeds), indexing="ij"), -1).reshape(-1, 3)


def tiles(cases, per_case=5, split="test", classes=CLASSES):
    """Rows `tile_id, case_id, split, label`: `cases[c]` cases of class c with about `per_case` tiles each."""
    rows = []
    for label, n in zip(classes, cases, strict=True):
        for k in range(n):
            case = f"{label[:3]}-{split}-{k:02d}"
            rows += [{"tile_id": f"{case}/{t}", "case_id": case, "split": split, "label": label} for t in range(per_case + k % 3 - 1)]
    return pd.DataFrame(rows)


@functools.cache
def _own(kind, name):
    """A standard normal number that belongs to a case or a tile, whatever table it stands in."""
    return np.random.default_rng(files.seed(kind, name) % 2**32).normal()


def scores(rows, shift, seed, classes=CLASSES, noise=0.3, spread=0.7):
    """Class scores [N, C] of one classifier; `shift` {class: raise of its right answers} is what an arm is better at.

    Cases share a part of their difficulty in all arms and seeds, tiles another, so pairs of arms are alike as in life.
    """
    case, tile = (np.array([_own(kind, name) for name in rows[f"{kind}_id"]]) * spread for kind in ("case", "tile"))
    rng = np.random.default_rng(seed)
    own = rng.normal(0, noise, len(classes))  # training noise, one number per class
    logits = rng.normal(0, 0.4, (len(rows), len(classes)))
    y = rows["label"].map(classes.index).to_numpy()
    right = 1.2 + case + tile + np.array([shift.get(c, 0.0) for c in classes])[y] + own[y]
    logits[np.arange(len(rows)), y] += right
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def predict(folder, rows, arms, seeds=6, classes=CLASSES, replicate=(), **how):
    """Write `<arm>/<seed>/predictions.parquet` for arms {name: {class: shift}}; arms named alike but for a number get the same scores.

    `replicate`: numbers of a draw and a generator, which give the same seeds another training.
    """
    for arm, s, p in _every(rows, arms, seeds, classes, how, replicate):
        table = rows[["tile_id", "case_id", "split"]].assign(arm=arm, seed=s, gen_seed=0, y=rows["label"].map(classes.index))
        (folder / arm / str(s)).mkdir(parents=True, exist_ok=True)
        table = pd.concat([table, pd.DataFrame(p, columns=[f"p_{c}" for c in classes], index=rows.index)], axis=1)
        table.to_parquet(folder / arm / str(s) / "predictions.parquet")
    return folder


def predicted(rows, arms, seeds=6, classes=CLASSES, **how):
    """The same as `predictions.read` gives it, without the files."""
    found = {(arm, s): p for arm, s, p in _every(rows, arms, seeds, classes, how)}
    y, (tile, case) = rows["label"].map(classes.index).to_numpy(), (rows[name].to_numpy(str) for name in ("tile_id", "case_id"))
    p = np.array([[found[arm, s] for s in range(seeds)] for arm in arms])
    return Predictions(list(classes), list(arms), crossed(seeds=seeds), tile, case, y, p.argmax(-1), p, {}, [])


def _every(rows, arms, seeds, classes, how, replicate=()):
    for arm, shift in arms.items():
        for s in range(seeds):
            yield arm, s, scores(rows, shift, files.seed(arm.rstrip("0123456789"), s, *replicate) % 2**32, classes, **how)


def picture(label, case, rng, px=32, classes=CLASSES):
    """A tile [px, px, 3] uint8 whose stripes tell the class and whose tint tells the case."""
    k = classes.index(label)
    tint = np.random.default_rng(files.seed("tint", case) % 2**32).normal(0, 12, 3)
    x = np.arange(px) * (k + 1) * 2 * np.pi / px
    wave = 40 * np.sin(x + rng.uniform(0, 6))[:, None, None] * np.array([0.6, 1.0, 0.8])
    return np.clip(np.array([205, 150, 190]) + wave + tint + rng.normal(0, 10, (px, px, 3)), 0, 255).astype(np.uint8)


def experiment(root, arms, cases, name="planted", seeds=6, made=24, specs=None, has_cases=True, **how):
    """outputs/<name>/ with finished 00_dataset, keep and 06_classifier, as a recipe would leave them; returns its folder.

    Args:
        root: working root, already in $HISTOKIT_ROOT.
        arms: {arm: {class: shift}}; `specs` their settings in the recipe, by default `augmented` trains on `keep`.
        cases: test cases per class; training and validation get as many.
        made: synthetic tiles per rare class, the last third rejected.
    """
    rng = np.random.default_rng(0)
    held = dataset(has_cases=has_cases)
    rows = pd.concat([tiles(cases, split=split) for split in ("train", "val", "test")], ignore_index=True)
    if not has_cases:
        rows["case_id"] = rows["tile_id"]
    rows = _manifest(rows.assign(source="real", root="data", use="labelled"))
    for row in rows.itertuples():
        files.write_png(root / "tiles" / row.file_name, picture(row.label, row.case_id, rng))
    with_step = {"experiment": name, "recipe": ""}
    run = runs.start(**with_step, step="00_dataset", dataset="")
    files.write_json(run.path("dataset.json"), vars(held))
    run.finish(rows)

    run = runs.start(**with_step, step="keep", source="")
    train = rows[rows["split"].eq("train")]
    synthetic, why = [], [{"code": "judge", "asked": "Polyp", "seen": "Normal", "place": 2, "cut": 1}]
    for label in held.tail:
        sources = train[train["label"].eq(label)]["tile_id"].tolist()
        for i in range(made):
            kept = i < made - made // 3
            row = {"tile_id": f"s-{label}-{i}", "case_id": "", "split": "train", "label": label, "status": "kept" if kept else "rejected"}
            row |= {"sources": json.dumps([sources[i % len(sources)]]), "scores": json.dumps({"judge": round(1 - i / made, 3)})}
            synthetic.append(row | {"reason": "" if kept else selection_reasons.write(why)})
    synthetic = _manifest(pd.DataFrame(synthetic).assign(source="synthetic", root="keep", use="labelled"))
    for row in synthetic.itertuples():
        files.write_png(run.path(row.file_name), picture(row.label, row.tile_id, rng))
    run.finish(synthetic)

    specs = specs or {arm: {"synthetic": "keep"} if arm == "augmented" else {} for arm in arms}
    run = runs.start(**with_step, step="06_classifier", arms=specs, seeds=seeds)
    predict(run.path(), rows[rows["split"].ne("train")].reset_index(drop=True), arms, seeds, **how)
    size, kept = rows[rows["split"].eq("train")]["label"].value_counts(), made - made // 3
    counts = [{"arm": a, "label": c, "real": int(size.get(c, 0)), "recoloured": 0} for a in arms for c in held.classes]
    for row in counts:
        rare, spec = row["label"] in held.tail, specs.get(row["arm"]) or {}
        row["real"] = spec["real_tiles"] if rare and "real_tiles" in spec else row["real"]
        row["synthetic"] = kept if rare and spec.get("synthetic") else 0
    run.finish({"counts": counts})
    return run.folder.parent


def _manifest(rows):
    rows = rows.assign(file_name=[f"{i:04d}.png" for i in range(len(rows))], width=32, height=32, mpp=np.nan)
    return rows.assign(patient="", slide="", group="", sha256="", mask="")
