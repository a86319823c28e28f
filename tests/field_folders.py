"""Small folders and tables as people have them, and what `histokit init` makes of one."""

from pathlib import Path

import pandas as pd
from folders import save, texture

TWO = {"adipose": 12, "stroma": 12, "tumour": 12}


def tiles(root, names, px=16):
    for i, name in enumerate(names):
        save(Path(root) / name, texture(i, px))
    return Path(root)


def classes(names=("adipose", "stroma", "tumour"), cases=4, per=3, suffix="png", above="", below=""):
    """CLASS/P07_1.png, each case in one class."""
    return [
        f"{above}{name}/{below}P{10 * k + c:02d}_{i}.{suffix}" for k, name in enumerate(names) for c in range(cases) for i in range(per)
    ]


def flat(names=("adipose", "stroma", "tumour"), cases=4, per=3, sub="images", suffix="png"):
    """[{file, label, patient}] of images/t0001.png and so on."""
    rows = []
    for k, name in enumerate(names):
        for c in range(cases):
            for _ in range(per):
                rows.append({"file": f"{sub}/t{len(rows):04d}.{suffix}", "label": name, "patient": f"P{10 * k + c:02d}"})
    return rows


def counts(rows):
    return rows[rows["use"].eq("labelled")].groupby("label").size().to_dict()


def write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, **options)
