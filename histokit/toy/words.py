"""Captions of `toy`: plain words for a class, and for what is in a `tissue.Look`, so that a text model has something to learn.

Every choice is drawn by a numpy Generator; the words of the tail classes are here and never reach the base.
"""

import numpy as np


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
    crowd = pick(rng, "crowded", "close") if look.gap < 8 else pick(rng, "scattered", "distant") if look.gap > 22 else ""
    if look.gland in ("single", "solid"):
        inside = {"single": "one round lumen", "solid": pick(rng, "no lumen", "cells")}[look.gland]
        full = "solid" if look.gland == "solid" else "cell filled"
        return [" ".join(f"{crowd} {size} {full} glands with {inside}".split()), nuclear_words(look)]
    shape = "round" if look.gland == "round" else "long"
    lumen = grade(look.lumen, (0.09, "narrow lumen"), (0.32, "open lumen"), ("", "wide lumen"))
    rows = "rows of nuclei" if look.layers > 1.5 else "one row of nuclei"
    glands = " ".join(f"{crowd} {size} {shape} glands with {lumen} and {rows}".split())
    pale = ["pale vacuoles in the glands"] if look.goblet > 0.5 else []
    return [glands, *pale, nuclear_words(look)]


def sheet_words(look, rng):
    """Phrases about solid epithelium and nests."""
    if look.nests > 0.5:
        return [f"{pick(rng, 'round nests of cells', 'cell nests')} with {nuclear_words(look)}"]
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
    """Phrases about fat, pools and dead tissue."""
    words = ["pale oedema"] * (look.oedema > 0.05) + [pick(rng, "blood", "a pool of blood")] * (look.blood > 0.05)
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
