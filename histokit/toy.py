"""`toy`: the embedded data. Eight tissue classes with a long tail, invented pixel by pixel, with truth.

A class is a region in the space of `tissue.Look`: a range for every number that matters to it. Stain belongs to
the case, so a classifier that only sees colour fails under a split by case. `measure` reads from pixels alone what
the truth says of a drawn tile, so what a class *is* can be measured on a generated one.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from histokit import tissue
from histokit.tissue import Look

VERSION = 1  # raise when a pixel changes; it is part of run keys
MPP = 0.5  # um per pixel, of every tile
MASK_VALUES = tissue.MASK_VALUES  # name -> grey value in a mask

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
        Image [px, px, 3] uint8, mask [px, px] uint8 (see `MASK_VALUES`), truth dict (see `tissue.truth_of`).

    Raises:
        ValueError: `class_name` is not one of `CLASSES`.
    """
    if class_name not in CLASSES:
        raise ValueError(f"toy has no class {class_name!r}; choose one of {', '.join(CLASSES)}")
    stain = tissue.random_stain(generator(seed, "stain", case))
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


# ---------------------------------------------------------------------------------------------- words


def caption(class_name, rng):
    """One of several plain captions of a class, chosen by the numpy Generator `rng`."""
    opening = pick(rng, "an H&E tile of {}", "a histology tile of {}", "{}, H&E stain", "a tissue tile with {}", "{}")
    return opening.format(pick(rng, *CAPTIONS[class_name]))


CAPTIONS = {
    "stroma": (
        "fibrous stroma", "fibrous stroma, wavy fibres and spindle nuclei", "stroma with thin spindle nuclei along pink fibres",
        "wavy pink fibres with few spindle nuclei",
    ),
    "lymphoid": (
        "lymphoid tissue", "lymphoid tissue, many small round dark nuclei", "crowded small round nuclei, lymphoid tissue",
        "dense lymphocytes",
    ),
    "normal_gland": (
        "normal glands", "normal glands, round glands with open lumina", "round regular glands with one lumen each",
        "normal glands with nuclei along the base",
    ),
    "adenoma": (
        "adenoma", "adenoma, long crowded glands", "long glands with rows of crowded oval nuclei",
        "adenoma, crowded long glands with narrow lumina and dark oval nuclei",
    ),
    "fat": (
        "fat tissue", "fat tissue, large white vacuoles with thin walls", "white fat cells with thin walls",
        "fat tissue and a little stroma",
    ),
    "solid_tumour": (
        "solid tumour", "solid tumour, sheets of large irregular nuclei", "sheets of cells with large irregular nuclei, no glands",
        "solid tumour without lumen",
    ),
    "mucinous": ("mucinous carcinoma", "mucinous carcinoma, cell clusters floating in pale mucin pools"),
    "cribriform": ("cribriform carcinoma", "cribriform carcinoma, glands with several round holes"),
}  # fmt: skip


def random_look(index, px=128, seed=0):
    """Draw tissue of none of the eight classes and say in plain words what is in it, for pre-training on text.

    Whatever defines a tail class is left out: no mucin, no gland with several lumina.

    Returns:
        Image [px, px, 3] uint8, caption str, truth dict (see `tissue.truth_of`).
    """
    rng = generator(seed, "other", index)
    stain = tissue.random_stain(rng)
    look = other_look(rng)
    image, _, truth = tissue.render(look, stain, rng, px)
    return image, describe(look, stain, rng), truth


def other_look(rng):
    """A `Look` outside every region of `REGIONS`; what is drawn inside one is drawn again."""
    while True:
        look = Look(**{name: draw(values, rng, rng, 0) for name, values in other_ranges(rng).items()})
        if not any(belongs(look, name) for name in REGIONS):
            return look


def other_ranges(rng):
    """Ranges per field of `Look` for one random composition: some glands, sheets, fat, fibres or dead tissue."""
    small, plain = pick(rng, (5.5, 8), (8, 11), (11, 16)), pick(rng, (1.0, 1.3), (1.5, 2.2), (2.6, 4))
    ranges = EVERYWHERE | {
        "size": small, "spread": pick(rng, (0.03, 0.1), (0.2, 0.36)), "elongation": plain, "chromatin": (0, 1),
        "fibres": (0, 1.1), "coherence": (0.2, 1), "waviness": (0, 1.5), "goblet": (0, 1),
        "spindles": pick(rng, (0, 1), (1, 4), (4, 10)), "lymphocytes": pick(rng, (0, 1), (1, 5), (5, 12)),
    }  # fmt: skip
    filling = pick(rng, "round", "elongated", "sheet", "sheet", "fat", "necrosis", "stroma")
    if filling in ("round", "elongated"):
        ranges |= {"gland": filling, "gland_size": pick(rng, (24, 36), (36, 60), (64, 96)), "gap": (3, 40)}
        ranges |= {"lumen": pick(rng, (0.02, 0.08), (0.1, 0.3), (0.32, 0.45)), "layers": pick(rng, (1, 1), (2, 3.4))}
        ranges |= {"size": pick(rng, (5.5, 8), (8, 11))}  # larger nuclei find no room in a small gland
        ranges |= {"fat": pick(rng, (0, 0), (0.1, 0.4)), "necrosis": pick(rng, (0, 0), (0, 0), (0.1, 0.3))}
    if filling == "sheet":  # never with fat, which would look like the holes of a cribriform gland
        ranges |= {"sheet": pick(rng, (0.15, 0.5), (0.6, 1.0)), "necrosis": pick(rng, (0, 0), (0, 0), (0.1, 0.4))}
    if filling == "fat":
        ranges |= {"fat": (0.1, 0.5), "necrosis": pick(rng, (0, 0), (0, 0), (0.1, 0.3))}
    if filling == "necrosis":
        ranges |= {"necrosis": (0.3, 0.8)}
    return ranges


def describe(look, stain, rng):
    """A caption of what is in a look: three to six phrases, the most visible first, others dropped by chance."""
    body = gland_words(look, rng) + sheet_words(look, rng) + filling_words(look, rng)
    rest = cell_words(look, rng) + fibre_words(look, rng) + stain_words(stain, rng)
    rest = [phrase for phrase in rest if rng.random() < 0.75]
    words = ", ".join([*body, *rest][:6]) or "stroma"
    return pick(rng, "an H&E tile with {}", "a histology tile with {}", "{}", "tissue with {}").format(words)


def gland_words(look, rng):
    """Phrases about the glands and their nuclei."""
    if look.gland == "none":
        return []
    size = grade(look.gland_size, (36, "small"), (60, ""), ("", "large"))
    shape = "round" if look.gland == "round" else "long"
    lumen = grade(look.lumen, (0.09, "narrow lumen"), (0.32, "open lumen"), ("", "wide lumen"))
    rows = "rows of nuclei" if look.layers > 1.5 else "one row of nuclei"
    crowd = pick(rng, "crowded", "close") if look.gap < 8 else pick(rng, "scattered", "distant") if look.gap > 22 else ""
    glands = " ".join(f"{crowd} {size} {shape} glands with {lumen} and {rows}".split())
    pale = ["pale vacuoles in the glands"] if look.goblet > 0.5 else []
    return [glands, *pale, nuclear_words(look)]


def sheet_words(look, rng):
    """Phrases about solid epithelium."""
    if look.sheet <= 0.05:
        return []
    where = pick(rng, "a sheet of cells", "solid cells") if look.sheet > 0.6 else pick(rng, "nests of cells", "cell nests")
    return [f"{where} with {nuclear_words(look)}"]


def nuclear_words(look):
    """Size, regularity, shape and chromatin of the epithelial nuclei in words."""
    size = grade(look.size, (8, "small"), (11, "medium"), ("", "large"))
    order = grade(look.spread, (0.12, "regular"), (0.2, ""), ("", "irregular"))
    shape = grade(look.elongation, (1.4, "round"), (2.4, "oval"), ("", "spindle"))
    tone = grade(look.chromatin, (0.25, "dark"), (0.7, ""), ("", "pale"))
    return " ".join(f"{size} {order} {tone} {shape} nuclei".split())


def filling_words(look, rng):
    """Phrases about fat and dead tissue."""
    words = []
    if look.fat > 0.05:
        words.append(pick(rng, "some", "a little") + " fat" if look.fat < 0.3 else pick(rng, "much fat", "many fat vacuoles"))
    if look.necrosis > 0.05:
        some = "a little " if look.necrosis < 0.25 else pick(rng, "much ", "large ") if look.necrosis > 0.5 else ""
        words.append(some + pick(rng, "necrosis", "dead tissue with dust"))
    return words


def cell_words(look, rng):
    """Phrases about the loose cells of the stroma; nothing where a sheet leaves them no room."""
    if look.sheet > 0.8:
        return []
    spindles = grade(look.spindles, (1.2, "few"), (4, "some"), ("", "many"))
    round_ = grade(look.lymphocytes, (1.2, "few"), (5, "some"), ("", "many"))
    return [f"{spindles} spindle nuclei in the stroma", f"{round_} " + pick(rng, "lymphocytes", "small round lymphocytes")]


def fibre_words(look, rng):
    """Phrases about the fibres of the stroma."""
    if look.sheet > 0.8:
        return []
    if look.fibres < 0.3:
        return [pick(rng, "smooth stroma", "even stroma")]
    way = "straight" if look.waviness < 0.4 else "wavy" if look.waviness > 0.9 else ""
    order = "parallel" if look.coherence > 0.8 else "tangled" if look.coherence < 0.45 else ""
    return [" ".join(f"{order} {way} {pick(rng, 'fibres', 'pink fibres')}".split())]


def stain_words(stain, rng):
    """A phrase about strength of the stain and brightness."""
    strength = np.sum(stain.hematoxylin) + np.sum(stain.eosin)
    dark = grade(strength, (3.2, "pale stain"), (4.2, ""), ("", "dark stain"))
    light = "dim light" if np.mean(stain.white) < 0.82 else ""
    return [phrase for phrase in (dark, light) if phrase]


def grade(value, *steps):
    """The word of the first step whose limit is above the value; the last step has no limit."""
    return next((word for limit, word in steps[:-1] if value < limit), steps[-1][1])


def pick(rng, *choices):
    """One of the choices, by the Generator `rng`."""
    return choices[rng.integers(len(choices))]


# ---------------------------------------------------------------------------------------------- the dataset

# Cases per split, and per class how many of them carry it and how many tiles it has there. A tail class keeps ten
# training tiles from three cases, and enough test cases for an interval.
CASES = {"train": 24, "val": 8, "test": 14}
SHARES = {  # label: {split: (cases, tiles)}
    "stroma": {"train": (16, 104), "val": (4, 12), "test": (9, 30)},
    "lymphoid": {"train": (15, 92), "val": (4, 12), "test": (9, 30)},
    "normal_gland": {"train": (16, 112), "val": (4, 12), "test": (9, 30)},
    "adenoma": {"train": (14, 84), "val": (4, 12), "test": (9, 30)},
    "fat": {"train": (13, 76), "val": (4, 12), "test": (9, 30)},
    "solid_tumour": {"train": (12, 64), "val": (4, 12), "test": (9, 30)},
    "mucinous": {"train": (3, 10), "val": (3, 9), "test": (9, 27)},
    "cribriform": {"train": (3, 10), "val": (3, 9), "test": (9, 27)},
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
        raise FileExistsError(f"{folder} holds toy data {note.read_text()}, not {json.dumps(meant)}; write to a new folder")
    if note.exists() and (folder / "tiles.csv").exists():
        return pd.read_csv(folder / "tiles.csv")

    folder.mkdir(parents=True, exist_ok=True)
    replace_text(note, json.dumps(meant))
    for name in CLASSES:
        (folder / name).mkdir(exist_ok=True)
        (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for row in plan(seed).itertuples():
        image, mask, truth = tile(row.label, row.case_id, row.index, px, seed)
        path = f"{row.label}/{row.case_id}_{row.index:02d}.png"
        Image.fromarray(image).save(folder / path, compress_level=4)
        Image.fromarray(mask).save(folder / "masks" / path)
        what = {"path": path, "label": row.label, "case_id": row.case_id, "split": row.split}
        rows.append(what | {"mask": f"masks/{path}", "mpp": MPP} | truth)
    replace_text(folder / "tiles.csv", pd.DataFrame(rows).to_csv(index=False))
    return pd.read_csv(folder / "tiles.csv")


def replace_text(path, text):
    """Write a text file so that a reader sees all of it or none."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


# ---------------------------------------------------------------------------------------------- measuring pixels


def measure(image):
    """What a tile holds, read from its pixels alone: the counterpart of the truth for generated tiles.

    Nuclei that overlap count as one: adenoma shows 72 of 156 on average, lymphoid 146 of 160 (15 tiles each).
    Compare a number between tiles, not with the truth.

    Args:
        image: [H, W, 3] uint8.

    Returns:
        dict of `nuclei_count`, `nuclei_size` (mean area, px^2), `lumen_area` (share of empty area of any kind),
        `lumen_count`, `fibre_orientation` (degrees in [0, 180), x axis towards +y), `fibre_coherence` in [0, 1].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"measure needs [H, W, 3] uint8, got {image.dtype} {image.shape}; convert with data.pixels")
    density = optical_density(image)
    empty = density.sum(-1) < empty_below(density.sum(-1))
    empty = ndimage.binary_erosion(empty, iterations=2, border_value=1)  # thin clefts go, what the border cuts stays
    empty = ndimage.binary_dilation(empty, iterations=2)
    count, size = nuclei(density[..., 0], empty)
    labels, _ = ndimage.label(empty)
    angle, coherence = orientation(density[..., 1], empty)
    return {
        "nuclei_count": count,
        "nuclei_size": size,
        "lumen_area": float(empty.mean()),
        "lumen_count": int((np.bincount(labels.ravel())[1:] >= 20).sum()),
        "fibre_orientation": angle,
        "fibre_coherence": coherence,
    }


def optical_density(image):
    """Optical density [H, W, 3] against the tile's own white, after a slight blur."""
    light = ndimage.gaussian_filter(image.astype(float), (0.7, 0.7, 0))
    white = np.percentile(light, 99.5, axis=(0, 1)).clip(60)
    return -np.log(light.clip(2) / white).clip(max=1)


def empty_below(density):
    """The density under which a pixel counts as empty: a fifth of the tile's median tissue density."""
    return max(0.12, 0.22 * float(np.median(density[density > 0.15]))) if (density > 0.15).any() else 0.12


def nuclei(red, empty):
    """Number and mean area (px^2) of nuclei: dark in red light, where eosin hardly absorbs, split at necks."""
    dark = ndimage.binary_opening((red > otsu(red[~empty])) & ~empty)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(dark), 1.0)
    peaks = (depth == ndimage.maximum_filter(depth, 5)) & (depth > 1.0)
    count = int(ndimage.label(peaks, np.ones((3, 3)))[1])
    return count, float(dark.sum() / count) if count else 0.0


def otsu(values):
    """Threshold that splits values [N] into two groups of least variance (Otsu, 1979)."""
    if len(values) == 0 or np.ptp(values) == 0:
        return np.inf
    counts, edges = np.histogram(values, 64)
    centres, weight = (edges[1:] + edges[:-1]) / 2, np.cumsum(counts)
    mean = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * weight / weight[-1] - mean) ** 2 / (weight * (weight[-1] - weight))
    return centres[np.nanargmax(between[:-1])]


def orientation(density, empty):
    """Main direction (degrees in [0, 180)) and coherence in [0, 1] of the texture, by the structure tensor."""
    gy, gx = (ndimage.gaussian_filter(density, 1.2, order=order) for order in ((1, 0), (0, 1)))
    inside = ~ndimage.binary_dilation(empty, iterations=3)
    if not inside.any():
        return 0.0, 0.0
    xx, yy, xy = ((gx * gx)[inside].mean(), (gy * gy)[inside].mean(), (gx * gy)[inside].mean())
    across = 0.5 * np.arctan2(2 * xy, xx - yy)
    return float(np.rad2deg(across + np.pi / 2) % 180), float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-9))
