"""What is compared: arms that differ in the tiles they are trained on, or in how training treats them.

Reads arms as a recipe writes them, finds the tiles of each, and says what a reader of the result must know.
`trials` trains them.
"""

import difflib
import json
import re

import pandas as pd

from histokit import classifiers, data, features, longtail

VERSION = 2
ARM = {
    "synthetic": "",  # step whose tiles are added, "" for none
    "status": "kept",  # which of them: kept, rejected, quarantined, or all
    "per_class": 0,  # at most so many per class, the same ones in every larger dose; 0 for all
    "labels": "own",  # shuffled: every synthetic tile gets a label not its own, a control that must not help
    "real_through": "none",  # vae: real training tiles pass through the autoencoder, so its traces tell no class
    "sampler": "natural",
    "augment": "symmetries",  # none, symmetries (8 flips and rotations), stain (with jittered stains too)
    "loss": "cross_entropy",
    "mode": "",  # "" for the notebook's
    "encoder": "",  # "" for the notebook's
}
CHOICES = {
    "status": ("kept", "rejected", "quarantined", "all"),
    "labels": ("own", "shuffled"),
    "real_through": ("none", "vae"),
    "sampler": tuple(longtail.SAMPLERS),
    "augment": tuple(features.VIEWS),
    "loss": tuple(longtail.LOSSES),
    "mode": tuple(classifiers.MODES),
}


def settle(arms, mode="linear", encoder="mini-sup"):
    """{name: full settings} of arms as a recipe writes them; ValueError names a wrong key or value and the nearest right one."""
    if not arms:
        raise ValueError("no arm to train: give arms such as {real: {}, augmented: {synthetic: 05_select}}")
    settled = {}
    for name, given in arms.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "logs":
            raise ValueError(f"arm {name!r} becomes a folder name: letters, digits, dot, dash and underscore only, and not logs")
        for key in given or {}:
            if key not in ARM:
                raise ValueError(f"arm {name!r} has no setting {key!r}; {_nearest(key, ARM)}")
        arm = {**ARM, **(given or {})}
        arm["mode"], arm["encoder"] = arm["mode"] or mode, arm["encoder"] or encoder
        for key, choices in CHOICES.items():
            if arm[key] not in choices:
                raise ValueError(f"arm {name!r}: {key} is {arm[key]!r}; {_nearest(str(arm[key]), choices)}")
        if isinstance(arm["per_class"], bool) or not isinstance(arm["per_class"], int) or arm["per_class"] < 0:
            raise ValueError(f"arm {name!r}: per_class is {arm['per_class']!r}; expected a whole number, 0 for all")
        idle = [key for key in ("status", "per_class", "labels") if not arm["synthetic"] and arm[key] != ARM[key]]
        idle += ["loss"] if arm["mode"] in ("knn", "prototype") and arm["loss"] != ARM["loss"] else []
        idle += ["sampler"] if arm["mode"] == "prototype" and arm["sampler"] != ARM["sampler"] else []
        if idle:
            why = f"mode {arm['mode']}" if idle[0] in ("loss", "sampler") else "an arm without synthetic tiles"
            raise ValueError(f"arm {name!r}: {idle[0]} does nothing in {why}; leave it out")
        settled[name] = arm
    return settled


def _nearest(name, options):
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(options)}"


def assemble(run, tiles, arms):
    """{arm: training manifest}: the real training tiles, then the synthetic ones of its step.

    Args:
        run: the current Run; the steps named in the arms become its parents.
        tiles: manifest of 00_dataset, from `data.load`.
        arms: from `settle`.

    Raises ValueError for a synthetic class the dataset does not have, a tile that is there twice, or one made from a tile that is kept
    from training.
    """
    kept = tiles["split"].isin(["val", "test"]) | tiles["use"].eq("withheld")
    real, held_out = data.training(tiles), set(tiles.loc[kept, "tile_id"])
    sets = {}
    for name, arm in arms.items():
        if not arm["synthetic"]:
            sets[name] = real.reset_index(drop=True)
            continue
        made = data.used(data.load(run, step=arm["synthetic"]), arm["status"], arm["per_class"])
        _check_origin(made, held_out, set(data.dataset(run).classes), arm["synthetic"])
        sets[name] = pd.concat([real, made], ignore_index=True) if len(made) else real.reset_index(drop=True)
    return sets


def _check_origin(made, held_out, classes, step):
    strange = sorted(set(made["label"]) - classes)
    if strange:
        raise ValueError(
            f"{step} holds tiles of class {strange[0]!r}, which the dataset does not have; expected {', '.join(sorted(classes))}"
        )
    for tile_id, sources in zip(made["tile_id"], made.get("sources", []), strict=False):
        seen = sorted(set(map(str, json.loads(sources or "[]"))) & held_out) if isinstance(sources, str) else []
        if seen:
            raise ValueError(
                f"{step}: {tile_id} was made from {seen[0]!r}, a validation, test or withheld tile; make them again from training tiles"
            )
    twice = made.loc[made["tile_id"].duplicated(), "tile_id"]
    if len(twice):
        raise ValueError(f"{step} lists {twice.iloc[0]} twice ({len(twice)} such); run that step again")


def counts(sets, classes):
    """Training tiles per arm and class: DataFrame arm, label, real, synthetic."""
    rows = []
    for arm, tiles in sets.items():
        table = tiles.groupby(["label", "source"]).size()
        rows += [{"arm": arm, "label": c, **{s: int(table.get((c, s), 0)) for s in ("real", "synthetic")}} for c in classes]
    return pd.DataFrame(rows)


def remarks(arms, sets, tiles):
    """Plain sentences on what a reader of the result must know; empty when there is nothing to say."""
    said = []
    for name, arm in arms.items():
        if arm["synthetic"] and not sets[name]["source"].eq("synthetic").any():
            said.append(f"Arm {name}: {arm['synthetic']} has no {arm['status']} tile, so it was trained on real tiles alone.")
        borrowed = _unchecked(sets[name])
        if borrowed:
            said.append(
                f"Arm {name}: {borrowed} synthetic tiles were made from tiles of another class, and no judge has looked at their labels; "
                "name a 05_select step."
            )
    idle = [name for name, arm in arms.items() if arm["mode"] in ("knn", "prototype")]
    if idle:
        said.append(f"Not trained, so outside the comparison at equal updates: {', '.join(idle)}.")
    val = tiles[tiles["split"].eq("val") & tiles["use"].eq("labelled")]
    missing = sorted(set(tiles.loc[tiles["use"].eq("labelled"), "label"]) - set(val["label"]))
    if not len(val):
        said.append("There is no validation tile: the last weights were kept, and probabilities are not calibrated.")
    elif missing:
        said.append(f"No validation tile of {', '.join(missing)}: these classes had no say in which weights were kept.")
    return said


def _unchecked(rows):
    """How many synthetic tiles have their label from words alone and no score of a judge."""
    made = rows[rows["source"].eq("synthetic")]
    if not len(made) or "settings" not in made:
        return 0
    origin = made["settings"].map(lambda text: json.loads(text or "{}").get("source_class", "") if isinstance(text, str) else "")
    scored = made["scores"].astype(str).str.contains('"judge"') if "scores" in made else False
    return int((origin.ne("") & origin.ne(made["label"]) & ~scored).sum())
