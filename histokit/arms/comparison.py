"""What is compared: arms that differ in the tiles they are trained on, or in how training treats them.

Reads arms as a recipe writes them, finds the tiles of each, and says what a reader of the result must know.
`trials` trains them.
"""

import difflib
import json
import re

import pandas as pd

from histokit.arms import ceilings, fit_classifier, longtail, pseudo_labels
from histokit.tiles import data, decode, staining
from histokit.vision import classifiers, features

VERSION = 4
ARM = {
    "synthetic": "",  # step whose tiles are added, "" for none
    "status": "kept",  # which of them: kept, rejected, quarantined, or all
    "per_class": 0,  # at most so many per class, the same ones in every larger dose; 0 for all
    "synthetic_share": 1.0,  # of the draws of a class, the share that synthetic tiles have at most
    "replace": False,  # true: synthetic tiles take the place of the real ones of their class
    "recolour": "none",  # reinhard, macenko: adds `per_class` real tiles of each rare class, in the stain of other cases
    "pseudo": {},  # adds tiles without a label, named by an earlier arm: {"arm": "oversampled", "precision": 0.9, "per_class": 100}
    "real_tiles": 0,  # so many real training tiles of each class that a budget made rare, 0 for the budget's: the curve of real tiles
    "from": "any",  # whose those beyond it are: same_cases or new_cases; what a generator that knew them perfectly could bring
    "through": "none",  # vae: those beyond it pass through the autoencoder: what its codec leaves of that
    "labels": "own",  # shuffled: every synthetic tile gets a label not its own, a control that must not help
    "real_through": "none",  # vae: real training tiles pass through the autoencoder, so its traces tell no class
    "sampler": "natural",
    "augment": "symmetries",  # none, symmetries (8 flips and rotations), stain (with jittered stains too)
    "loss": "cross_entropy",  # focal, ldam, logit_adjustment
    "weights": "none",  # of the classes in the loss: balanced, effective
    "drw": 0.0,  # share of the updates after which they set in
    "coarse": 0.0,  # weight of the term that tells rare classes from common ones
    "mixture": "none",  # mixup, balanced
    "decouple": "none",  # crt, tau_norm: the last layer apart from what is below it
    "options": {},  # numbers behind these, see `longtail.OPTIONS`
    "select_by": "balanced_accuracy",  # validation score of the weights that are kept: likelihood, head_minus_missed
    "patience": 0,  # checks without a better one, of 20 (10 in mode full), after which training ends; 0 for never
    "mode": "",  # "" for the notebook's
    "encoder": "",  # "" for the notebook's
}
MADE = ("status", "per_class", "synthetic_share", "labels", "replace")  # nothing of it acts without synthetic tiles
TRAINING = (*longtail.SETTINGS, "mixture", "decouple", "select_by", "patience", "synthetic_share")  # and of this where nothing is trained
CHOICES = {
    "status": ("kept", "rejected", "quarantined", "all"),
    "labels": ("own", "shuffled"),
    "recolour": ("none", *staining.METHODS),
    "real_through": ("none", "vae"),
    "from": ceilings.WHOSE,
    "through": ("none", "vae"),
    "sampler": tuple(longtail.SAMPLERS),
    "augment": tuple(features.VIEWS),
    "loss": tuple(longtail.LOSSES),
    "weights": longtail.WEIGHTS,
    "mixture": longtail.MIXTURES,
    "decouple": longtail.DECOUPLE,
    "select_by": fit_classifier.SELECT,
    "mode": tuple(classifiers.MODES),
}


def checked(arms, known, choices):
    """(name, settings over their defaults) of each arm; ValueError names a wrong name, key or value and the nearest right one.

    Args:
        known: {setting: default}. choices: {setting: values it may have}, "" where the default is.
    """
    if not arms:
        raise ValueError("no arm to train: give arms such as {real: {}, augmented: {synthetic: 05_select}}")
    for name, given in arms.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "logs":
            raise ValueError(f"arm {name!r} becomes a folder name: letters, digits, dot, dash and underscore only, and not logs")
        for key in given or {}:
            if key not in known:
                raise ValueError(f"arm {name!r} has no setting {key!r}; {_nearest(key, known)}")
        arm = {**known, **(given or {})}
        for key, values in choices.items():
            if arm[key] not in values and arm[key] != known[key]:
                raise ValueError(f"arm {name!r}: {key} is {arm[key]!r}; {_nearest(str(arm[key]), values)}")
        yield name, arm


def settle(arms, mode="linear", encoder="mini-sup"):
    """{name: full settings} of arms as a recipe writes them; ValueError names a wrong key or value and the nearest right one."""
    settled = {}
    for name, arm in checked(arms, ARM, CHOICES):
        arm["mode"], arm["encoder"] = arm["mode"] or mode, arm["encoder"] or encoder
        if not isinstance(arm["replace"], bool):
            raise ValueError(f"arm {name!r}: replace is {arm['replace']!r}; expected true or false")
        for key, none in {"per_class": "0 for all", "real_tiles": "0 for the budget's", "patience": "0 for never"}.items():
            if isinstance(arm[key], bool) or not isinstance(arm[key], int) or arm[key] < 0:
                raise ValueError(f"arm {name!r}: {key} is {arm[key]!r}; expected a whole number, {none}")
        if arm["pseudo"]:
            if arm["synthetic"] or arm["recolour"] != "none":
                raise ValueError(f"arm {name!r}: pseudo names real tiles, so it stands without synthetic or recoloured ones")
            arm["pseudo"] = pseudo_labels.settle(name, arm["pseudo"], settled)
        recoloured = arm["recolour"] != "none"
        if recoloured and (arm["synthetic"] or not arm["per_class"]):
            why = "adds real tiles, so it stands without synthetic ones" if arm["synthetic"] else "needs per_class, how many tiles to add"
            raise ValueError(f"arm {name!r}: recolour {why}")
        idle = [key for key in MADE if not arm["synthetic"] and arm[key] != ARM[key]]
        idle = [key for key in idle if not (recoloured and key == "per_class")]
        idle += [key for key in ("from", "through") if not arm["real_tiles"] and arm[key] != ARM[key]]
        idle += [key for key in TRAINING if arm["mode"] in ("knn", "prototype") and arm[key] != ARM[key]]
        idle += ["sampler"] if arm["mode"] == "prototype" and arm["sampler"] != ARM["sampler"] else []
        if idle:
            why = f"mode {arm['mode']}" if arm["synthetic"] or idle[0] not in MADE else "an arm without synthetic tiles"
            why = "an arm without real_tiles" if idle[0] in ("from", "through") else why
            raise ValueError(f"arm {name!r}: {idle[0]} does nothing in {why}; leave it out")
        _check_share(name, arm)
        try:
            longtail.check(**{key: arm[key] for key in (*longtail.SETTINGS, "mixture", "decouple", "mode")})
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from None
        settled[name] = arm
    return settled


def _check_share(name, arm):
    share = arm["synthetic_share"]
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"arm {name!r}: synthetic_share is {share!r}; expected more than 0 and at most 1, a share of the draws of a class")
    if share < 1 and arm["sampler"] == "natural" and arm["decouple"] != "crt" and arm["mixture"] != "balanced":
        raise ValueError(f"arm {name!r}: synthetic_share acts where classes are drawn; set sampler: balanced or square_root with it")


def _nearest(name, options):
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(options)}"


def assemble(run, tiles, arms):
    """{arm: training manifest}: the real training tiles, then those that are added to them.

    Args:
        run: the current Run; the steps named in the arms become its parents.
        tiles: manifest of 00_dataset, from `data.load`.
        arms: from `settle`.

    Raises ValueError for a synthetic class the dataset does not have, a tile that is there twice, one made from a tile that is kept
    from training, or more real tiles than there are.
    """
    kept = tiles["split"].isin(["val", "test"]) | tiles["use"].eq("withheld")
    dataset, held_out = data.dataset(run), set(tiles.loc[kept, "tile_id"])
    draw = ceilings.Drawn(run, dataset) if dataset.procedural == "toy" else None
    sets, painted = {}, {}
    for name, arm in arms.items():
        real, made = ceilings.real_tiles(tiles, arm["real_tiles"], arm["from"], draw), tiles.iloc[:0]
        if arm["synthetic"]:
            made = data.used(data.load(run, step=arm["synthetic"]), arm["status"], arm["per_class"])
            _check_origin(made, held_out, set(dataset.classes), arm["synthetic"])
            real = real[~real["label"].isin(made["label"])] if arm["replace"] else real
        elif arm["recolour"] != "none":
            most = max(other["per_class"] for other in arms.values() if other["recolour"] == arm["recolour"])
            if arm["recolour"] not in painted:
                painted[arm["recolour"]] = staining.tiles(run, data.training(tiles), dataset.tail, arm["recolour"], most)
            made = painted[arm["recolour"]].groupby("label", sort=False).head(arm["per_class"])
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


def external(run, step, tiles):
    """Labelled tiles from elsewhere, another 00_dataset of the recipe, as rows of split `external`; no rows for step "".

    All its splits are taken: nothing is trained or chosen on any of them. Cases get the step's name, since two houses number theirs alike.

    Raises ValueError for a class that this dataset does not have, and for a tile that is in both.
    """
    if not step:
        return tiles.iloc[:0]
    held, rows = data.dataset(run), data.load(run, step=step, dataset_step=step)
    rows = rows[rows["use"].eq("labelled") & rows["source"].eq("real")].reset_index(drop=True)
    if strange := sorted(set(rows["label"]) - set(held.classes)):
        raise ValueError(
            f"{step} has the class {strange[0]!r}, which this dataset does not have; leave it out of that description or rename it"
        )
    both = rows[rows["sha256"].isin(set(tiles["sha256"]) - {""})]
    if len(both):
        raise ValueError(
            f"{step}: {both['file_name'].iloc[0]!r} is a tile of this dataset too ({len(both)} such); it is not from elsewhere"
        )
    named = {column: step + "/" + rows[column] for column in ("tile_id", "case_id")}
    return rows.assign(split="external", tile_px=held.tile_px, **named)


def counts(sets, classes):
    """Training tiles per arm and class: DataFrame arm, label, real, synthetic, recoloured."""
    rows = []
    for arm, tiles in sets.items():
        table = tiles.groupby(["label", "source"]).size()
        sources = ("real", "synthetic", staining.SOURCE)
        rows += [{"arm": arm, "label": c, **{s: int(table.get((c, s), 0)) for s in sources}} for c in classes]
    return pd.DataFrame(rows)


def remarks(arms, sets, tiles):
    """Plain sentences on what a reader of the result must know; empty when there is nothing to say."""
    said, coded = [], {}
    for name, arm in arms.items():
        if arm["synthetic"] and not sets[name]["source"].eq("synthetic").any():
            said.append(f"Arm {name}: {arm['synthetic']} has no {arm['status']} tile, so it was trained on real tiles alone.")
        if arm["recolour"] != "none":
            made = sets[name][sets[name]["source"].eq(staining.SOURCE)]["label"].value_counts()
            if few := [f"{c} ({n})" for c, n in made.items() if n < arm["per_class"]]:
                said.append(
                    f"Arm {name}: some cases show too little tissue to know their stain, so fewer were recoloured: {', '.join(few)}."
                )
        real = sets[name]["source"].eq("real")
        if "path" in sets[name] and not real.all():
            for line in decode.codec_remarks(sets[name][real], sets[name][~real]):
                coded.setdefault(line, []).append(name)
        borrowed = _unchecked(sets[name])
        if borrowed:
            said.append(
                f"Arm {name}: {borrowed} synthetic tiles were made from tiles of another class, and no judge has looked at their labels; "
                "name a 05_select step."
            )
    said += [f"Arm{'s' * (len(names) > 1)} {', '.join(names)}: {line}" for line, names in coded.items()]
    if not len(pseudo_labels.loose(tiles)) and (named := [name for name, arm in arms.items() if arm["pseudo"]]):
        said.append(f"Arm {', '.join(named)}: no training tile is without a label, so there is none to name.")
    if named := [name for name, arm in arms.items() if arm["pseudo"] and len(pseudo_labels.loose(tiles))]:
        said.append(f"Arm {', '.join(named)}: the tiles that it names come on top of those shown here, seed by seed (n_pseudo below).")
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


def described(arms, baseline=""):
    """{arm: in what it differs from the baseline, or from a plain arm, in a few words}; "" for one that does not."""
    words = {
        "synthetic": "{}",
        "per_class": "{} a class",
        "synthetic_share": "at most {:.0%} of a class's draws synthetic",
        "labels": "labels {}",
        "replace": "in the place of real tiles",
        "recolour": "recoloured, {}",
        "pseudo": "and unlabelled tiles named by {0[arm]}",
        "real_tiles": "{} real tiles",
        "from": "of {}",
        "through": "those through the {}",
    }
    plain, told = ARM | (arms.get(baseline) or {}), {}
    for name, spec in arms.items():
        spec = ARM | (spec or {})
        told[name] = ", ".join(words.get(key, f"{key} {{}}").format(spec[key]) for key in spec if spec[key] != plain.get(key))
    return told


def _unchecked(rows):
    """How many synthetic tiles have their label from words alone and no score of a judge."""
    made = rows[rows["source"].eq("synthetic")]
    if not len(made) or "settings" not in made:
        return 0
    origin = made["settings"].map(lambda text: json.loads(text or "{}").get("source_class", "") if isinstance(text, str) else "")
    scored = made["scores"].astype(str).str.contains('"judge"') if "scores" in made else False
    return int((origin.ne("") & origin.ne(made["label"]) & ~scored).sum())
