"""`toy`: the embedded data. Eight tissue classes with a long tail, invented pixel by pixel, with truth.

A class is a region in the space of `tissue.Look`: a range for every number that matters to it. Stain belongs to
the case, so a classifier that only sees colour fails under a split by case. Drawing is in `tissue`, words in
`words`; `morphometry` reads from pixels what the truth says of a drawn tile.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histokit.toy import canvas, tissue, words
from histokit.toy.tissue import Look

VERSION = 3  # raise when the plan or a pixel changes; it is part of run keys and of `root` in params/datasets/toy.yaml
PIXELS = 2  # raise when a pixel changes
MPP = 0.5  # um per pixel, of every tile
MASK_VALUES = canvas.MASK_VALUES  # name -> grey value in a mask

CLASSES = {
    "stroma": {"term": "fibrous stroma", "role": "head"},
    "lymphoid": {"term": "lymphoid tissue", "role": "head"},
    "normal_gland": {"term": "normal glands", "role": "head"},
    "adenoma": {"term": "adenoma", "role": "head"},
    "fat": {"term": "fat tissue", "role": "head"},
    "solid_tumour": {"term": "solid tumour", "role": "head"},
    "mucinous": {"term": "mucinous carcinoma", "role": "tail"},
    "cribriform": {"term": "cribriform carcinoma", "role": "tail"},
}

# What makes a class: a range per field of `Look`. Fields not named come from EVERYWHERE, so that neither cell
# counts nor white area nor colour give a class away.
EVERYWHERE = {
    "size": (7.0, 9.5),
    "spread": (0.08, 0.2),
    "elongation": (1.1, 1.5),
    "chromatin": (0.0, 0.8),
    "gland": "none",
    "gland_size": (44, 64),
    "gap": (6, 20),
    "lumen": (0.08, 0.3),
    "layers": (1, 1),
    "goblet": (0, 0.8),
    "plasma": (0, 1),
    "sheet": (0, 0),
    "fat": (0, 0),
    "mucin": (0, 0),
    "necrosis": (0, 0),
    "fibres": (0.3, 1.0),
    "coherence": (0.4, 1.0),
    "waviness": (0.1, 1.0),
    "spindles": (0.5, 4.0),
    "lymphocytes": (0.0, 5.0),
    "angle": (0, 180),
}
REGIONS = {
    "stroma": {"fibres": (0.75, 1.1), "coherence": (0.75, 1.0), "waviness": (0.3, 1.2), "spindles": (2.5, 8), "fat": (0, 0.12)},
    "lymphoid": {"lymphocytes": (9, 17), "fibres": (0.1, 0.6), "spindles": (0, 1.5), "fat": (0, 0.3)},
    "normal_gland": {"gland": "round", "gland_size": (46, 74), "gap": (6, 20), "lumen": (0.06, 0.28), "goblet": (0.2, 1)},
    "adenoma": {
        "gland": "elongated", "gland_size": (36, 50), "gap": (4, 10), "lumen": (0.03, 0.13), "layers": (1.6, 3),
        "elongation": (1.9, 2.8), "size": (7.0, 8.5), "goblet": (0, 0.3), "plasma": (0.4, 1),
    },
    "fat": {"fat": (0.5, 0.95), "lymphocytes": (0, 9), "spindles": (0.5, 6)},
    "solid_tumour": {
        "sheet": (0.6, 1.0), "size": (11.5, 16), "spread": (0.2, 0.36), "elongation": (1.1, 1.6), "fat": (0, 0.15),
        "necrosis": (0, 0.12), "lymphocytes": (0, 7),
    },
    "mucinous": {"mucin": (0.4, 0.8), "size": (8, 11), "spread": (0.12, 0.25), "lymphocytes": (0, 6)},
    "cribriform": {
        "gland": "cribriform", "gland_size": (84, 120), "gap": (8, 18), "lumen": (0.12, 0.34), "size": (8, 10),
        "goblet": (0, 0),
    },
}  # fmt: skip


def tile(class_name, case, index, px=128, seed=0):
    """Draw tile `index` of a class in a case; the same bytes whatever was drawn before.

    A case fixes stain and focus and pulls the look of its tiles together. `px` is the field of view: the scale
    stays 0.5 um per pixel.

    Returns:
        Image [px, px, 3] uint8, mask [px, px] uint8 (see `MASK_VALUES`), truth dict (see `canvas.truth_of`).

    Raises:
        ValueError: `class_name` is not one of `CLASSES`.
    """
    if class_name not in CLASSES:
        raise ValueError(f"toy has no class {class_name!r}; choose one of {', '.join(CLASSES)}")
    stain = canvas.random_stain(generator(seed, "stain", case))
    rng = generator(seed, "tile", class_name, case, index)
    look = class_look(class_name, generator(seed, "look", class_name, case), rng)
    return tissue.render(look, stain, rng, px)


def generator(*names):
    """A numpy Generator seeded by a stable hash of what it is for."""
    digest = hashlib.sha256("/".join(str(n) for n in names).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def class_look(class_name, case_rng, rng, pull=0.5):
    """A `Look` inside a class's region; `pull` in [0, 1] is how much the tiles of a case resemble each other."""
    ranges = EVERYWHERE | REGIONS[class_name]
    return Look(**{name: draw(values, case_rng, rng, pull) for name, values in ranges.items()})


def draw(values, case_rng, rng, pull):
    """A number in the range (low, high), spread evenly over cases and within one; a name stays as it is."""
    shared, own = case_rng.random(), rng.random()
    if isinstance(values, str):
        return values
    u = (shared + (1 - pull) * (own - 0.5)) % 2
    return values[0] + (values[1] - values[0]) * (1 - abs(1 - u % 2))


def belongs(look, class_name):
    """Whether a look lies in a class's region (all fields that define the class, none by EVERYWHERE)."""
    for name, values in REGIONS[class_name].items():
        value = getattr(look, name)
        if value != values if isinstance(values, str) else not values[0] <= value <= values[1]:
            return False
    return True


# ---------------------------------------------------------------------------------------------- other looks


def random_look(index, px=128, seed=0):
    """Draw tissue of none of the eight classes and say in plain words what is in it, for pre-training on text.

    Whatever defines a tail class is left out: no mucin, no gland with several lumina. What they are made of is not: glands full of
    cells, with one round lumen or none, nests of cells, pools of oedema and blood.

    Returns:
        Image [px, px, 3] uint8, caption str, truth dict (see `canvas.truth_of`).
    """
    rng = generator(seed, "other", index)
    stain = canvas.random_stain(rng)
    look = other_look(rng)
    image, _, truth = tissue.render(look, stain, rng, px)
    return image, words.describe(look, stain, rng), truth


def other_look(rng):
    """A `Look` outside every region of `REGIONS`; what is drawn inside one is drawn again."""
    while True:
        look = Look(**{name: draw(values, rng, rng, 0) for name, values in other_ranges(rng).items()})
        if not any(belongs(look, name) for name in REGIONS):
            return look


def other_ranges(rng):
    """Ranges per field of `Look` for one random composition: some glands, sheets, nests, pools, fat, fibres or dead tissue."""
    small, plain = words.pick(rng, (5.5, 8), (8, 11), (11, 16)), words.pick(rng, (1.0, 1.3), (1.5, 2.2), (2.6, 4))
    ranges = EVERYWHERE | {
        "size": small, "spread": words.pick(rng, (0.03, 0.1), (0.2, 0.36)), "elongation": plain, "chromatin": (0, 1),
        "fibres": (0, 1.1), "coherence": (0.2, 1), "waviness": (0, 1.5), "goblet": (0, 1),
        "spindles": words.pick(rng, (0, 1), (1, 4), (4, 10)), "lymphocytes": words.pick(rng, (0, 1), (1, 5), (5, 12)),
    }  # fmt: skip
    filling = words.pick(rng, "round", "elongated", "single", "solid", "nests", "pool", "sheet", "fat", "necrosis", "stroma")
    if filling in ("single", "solid"):
        ranges |= {"gland": filling, "gland_size": words.pick(rng, (36, 60), (60, 90), (90, 120)), "gap": (3, 24)}
        ranges |= {"lumen": words.pick(rng, (0.02, 0.08), (0.08, 0.2)), "goblet": (0, 0), "size": words.pick(rng, (5.5, 8), (8, 11))}
    if filling in ("nests", "pool"):
        ranges |= {"nests": words.pick(rng, (2, 4), (5, 9)) if filling == "nests" else words.pick(rng, (0, 0), (2, 6))}
        ranges |= {"size": words.pick(rng, (5.5, 8), (8, 11))}
    if filling == "pool":
        ranges |= {words.pick(rng, "oedema", "oedema", "blood"): (0.2, 0.7)}
    if filling in ("round", "elongated"):
        ranges |= {"gland": filling, "gland_size": words.pick(rng, (24, 36), (36, 60), (64, 96)), "gap": (3, 40)}
        ranges |= {"lumen": words.pick(rng, (0.02, 0.08), (0.1, 0.3), (0.32, 0.45)), "layers": words.pick(rng, (1, 1), (2, 3.4))}
        ranges |= {"size": words.pick(rng, (5.5, 8), (8, 11))}  # larger nuclei find no room in a small gland
        ranges |= {"fat": words.pick(rng, (0, 0), (0.1, 0.4)), "necrosis": words.pick(rng, (0, 0), (0, 0), (0.1, 0.3))}
    if filling == "sheet":  # never with fat, which would look like the holes of a cribriform gland
        ranges |= {"sheet": words.pick(rng, (0.15, 0.5), (0.6, 1.0)), "necrosis": words.pick(rng, (0, 0), (0, 0), (0.1, 0.4))}
    if filling == "fat":
        ranges |= {"fat": (0.1, 0.5), "necrosis": words.pick(rng, (0, 0), (0, 0), (0.1, 0.3))}
    if filling == "necrosis":
        ranges |= {"necrosis": (0.3, 0.8)}
    return ranges


# ---------------------------------------------------------------------------------------------- the dataset

# Cases per split, and per class how many of them carry it and how many tiles it has there. A tail class keeps ten training tiles from
# three cases, and so many test cases that the test can show what a perfect generator of these three would bring (nine could not); eight
# validation cases carry an interval, so that 00 can say it before anything is trained.
CASES = {"train": 24, "val": 8, "test": 30}
SHARES = {  # label: {split: (cases, tiles)}
    "stroma": {"train": (16, 104), "val": (4, 12), "test": (11, 33)},
    "lymphoid": {"train": (15, 92), "val": (4, 12), "test": (11, 33)},
    "normal_gland": {"train": (16, 112), "val": (4, 12), "test": (11, 33)},
    "adenoma": {"train": (14, 84), "val": (4, 12), "test": (11, 33)},
    "fat": {"train": (13, 76), "val": (4, 12), "test": (11, 33)},
    "solid_tumour": {"train": (12, 64), "val": (4, 12), "test": (11, 33)},
    "mucinous": {"train": (3, 10), "val": (8, 16), "test": (24, 72)},
    "cribriform": {"train": (3, 10), "val": (8, 16), "test": (24, 72)},
}


def plan(seed=0):
    """The dataset's rows, without drawing anything.

    Returns:
        DataFrame with `label`, `case_id` (C001 ..), `index` (of the tile in its class and case), `split`.
    """
    rng, rows, first = generator(seed, "plan"), [], 1
    for split, cases in CASES.items():
        names, load = np.array([f"C{first + i:03d}" for i in range(cases)]), np.zeros(cases)
        first += cases
        for label, shares in SHARES.items():
            carriers, tiles = shares[split]
            least = np.lexsort([rng.random(cases), load])[:carriers]  # cases with the fewest classes so far
            load[least] += 1
            chosen = sorted(names[least])
            rows += [(label, chosen[i % carriers], i // carriers, split) for i in range(tiles)]
    table = pd.DataFrame(rows, columns=["label", "case_id", "index", "split"])
    order = {name: i for i, name in enumerate(CLASSES)}
    return table.sort_values(["label", "case_id", "index"], key=lambda c: c.map(order) if c.name == "label" else c, ignore_index=True)


def write(folder, seed=0, px=128):
    """Draw the dataset into `folder`; a finished one of the same version, seed and size is left alone.

    Writes `<class>/<case>_<index>.png`, `masks/<class>/<case>_<index>.png` and last `tiles.csv`, with columns `path`,
    `label`, `case_id`, `split`, `mask`, `mpp` and the truth. `toy.json` says what the folder holds.

    Returns:
        The table of `tiles.csv`.

    Raises:
        FileExistsError: the folder holds a dataset of another version, seed or size.
    """
    folder, meant = Path(folder), {"version": VERSION, "seed": seed, "px": px}
    note = folder / "toy.json"
    if note.exists() and json.loads(note.read_text()) != meant:
        raise FileExistsError(
            f"{folder} holds toy data {note.read_text()}, not {json.dumps(meant)}; name a new folder as `root` in the description"
        )
    if note.exists() and (folder / "tiles.csv").exists():
        return pd.read_csv(folder / "tiles.csv")

    folder.mkdir(parents=True, exist_ok=True)
    replace_text(note, json.dumps(meant))
    for name in CLASSES:
        (folder / name).mkdir(exist_ok=True)
        (folder / "masks" / name).mkdir(parents=True, exist_ok=True)

    def draw(row):
        image, mask, truth = tile(row.label, row.case_id, row.index, px, seed)
        path = f"{row.label}/{row.case_id}_{row.index:02d}.png"
        Image.fromarray(image).save(folder / path, compress_level=4)
        Image.fromarray(mask).save(folder / "masks" / path)
        what = {"path": path, "label": row.label, "case_id": row.case_id, "split": row.split}
        return what | {"mask": f"masks/{path}", "mpp": MPP} | truth

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # a tile depends on its name alone, so not on the thread
        rows = list(pool.map(draw, plan(seed).itertuples()))
    replace_text(folder / "tiles.csv", pd.DataFrame(rows).to_csv(index=False))
    return pd.read_csv(folder / "tiles.csv")


def replace_text(path, text):
    """Write a text file so that a reader sees all of it or none."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)
