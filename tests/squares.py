"""A finished 00_dataset of plain coloured tiles, and finished synthetic steps, small enough to check by eye."""

import dataclasses
import json

import numpy as np
import pandas as pd
from PIL import Image

from histokit import runs
from histokit.core import files
from histokit.tiles import data

CLASSES = ["red", "green", "blue"]
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
PX = 64


def tile(name, seed, noise=12):
    """uint8 [PX, PX, 3] of a class's colour, with its own noise."""
    rng = np.random.default_rng(seed)
    return (np.array(COLOURS[name]) + rng.normal(0, noise, (PX, PX, 3))).clip(0, 255).astype(np.uint8)


def row(folder, file_name, pixels, **facts):
    path = folder / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    empty = dict.fromkeys(("patient", "slide", "group", "mask"), "")
    known = {"tile_id": file_name, "file_name": file_name, "mpp": 0.5, "width": PX, "height": PX, "sha256": files.sha256(path)}
    return {**empty, **known, "use": "labelled", **facts}


def dataset(per_split=None, experiment="exp", classes=CLASSES):
    """Write tiles and a finished 00_dataset; per_split = {split: {class: tiles}}. Two tiles make a case."""
    per_split = per_split or {split: dict.fromkeys(classes, 5) for split in ("train", "val", "test")}
    folder, rows = files.root() / "tiles", []
    for s, (split, numbers) in enumerate(per_split.items()):
        for c, (name, n) in enumerate(numbers.items()):
            for i in range(n):
                facts = {"root": "data", "label": name, "split": split, "case_id": f"{split}-{name}-{i // 2}", "source": "real"}
                rows.append(row(folder, f"{split}/{name}/{i}.png", tile(name, 1000 * s + 100 * c + i), **facts))
    run = runs.start(experiment=experiment, step="00_dataset")
    frozen = data.Dataset(
        name="squares", classes=list(classes), terms={c: c for c in classes}, roles={c: "tail" if c == "blue" else "head" for c in classes},
        tile_px=PX, fit="resize", mpp=0.5, root="tiles", has_cases=True, counts={},
    )  # fmt: skip
    files.write_json(run.path("dataset.json"), dataclasses.asdict(frozen))
    run.finish(pd.DataFrame(rows))


def synthetic(numbers, step="made", experiment="exp", class_name="", status="kept", pixels=None, **facts):
    """Write a finished step of synthetic tiles; numbers = {class: tiles}, pixels = {class: [arrays]} instead of drawn ones."""
    run = runs.start(experiment=experiment, step=step, class_name=class_name)
    place, rows = run.folder.relative_to(files.root() / "outputs" / experiment / step), []
    for c, (name, n) in enumerate(numbers.items()):
        for i in range(n):
            picture = pixels[name][i] if pixels else tile(name, 9000 + 100 * c + i)
            made = {
                "root": step,
                "label": name,
                "split": "",
                "case_id": "",
                "source": "synthetic",
                "method": "drawn",
                "sources": json.dumps([]),
            }
            made |= {
                "prompt": "",
                "seed": i,
                "settings": "{}",
                "lora_sha": "",
                "token_sha": "",
                "scores": "",
                "status": status,
                "reason": "",
            }
            made |= {"run_id": run.run_id, **facts}
            rows.append(row(files.root() / "outputs" / experiment / step, str(place / f"{name}-{i}.png"), picture, **made))
    columns = list(row(files.root() / "outputs", "none.png", tile("red", 0))) + ["root", "label", "split", "case_id", "source", "status"]
    run.finish(pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(dict.fromkeys(columns))))
