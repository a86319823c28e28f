"""How long jobs take, how much disk they fill and how many files they write, said before any of them has run.

The parameters of a job say how many training steps, denoising passes and features it takes; `speed` says what one of each costs on
this machine. A guess to plan a night by, not a promise; a finished run of the same parameters knows better and is asked first.
"""

import contextlib
import functools
from collections import Counter
from dataclasses import dataclass

from histokit.core import files
from histokit.engine import jobs, segmentation_work, speed
from histokit.runs import workload
from histokit.training import settings

FIGURES = 6.0  # seconds that drawing and statistics of a page take
PUSH = 0.3  # of a denoising pass, a latent classifier's gradient
SHOWN = 17  # tiles that 04 draws by latents to show: one under five pushes, the panel's four, eight without a push
LATENT_STEP = 0.2  # of a training step of a LoRA of mini, one of mini's latent classifier
LATENT_SIZE = {"mini": 1.7e6, "base": 25e6, "paper": 51e6}  # parameters
VERDICT = 25.0  # the same of 07: resamples
HOUSEKEEPING = 6  # files of a run folder beside what it is for


@dataclass(frozen=True)
class Counts:
    """Real tiles of a dataset: to train on, `held` (val and test), of rare classes, their names; `loose`: training tiles with no label."""

    train: int
    held: int
    tail_train: int
    tail: tuple
    classes: int
    tile_px: int
    loose: int = 0


# --- work ------------------------------------------------------------------------------------------------------------


def work(job, found, counts):
    """Counter of what a job takes, in the units of `speed.Rates`; None for a notebook that is not known here.

    Tuples are views of tiles through an encoder: ("see", encoder), and ("real", encoder) and the like that are seen once and kept.

    Args:
        job: jobs.Job.
        found: all jobs of the recipe.
        counts: of its dataset.
    """
    rule = RULES.get(job.notebook.stem)
    if rule is None or counts is None:
        return None
    try:
        units = rule(job.parameters, counts, job, found)
    except KeyError:  # somebody's own notebook of that name
        return None
    if units is None:
        return None
    units["start"] += 1
    units["files"] += HOUSEKEEPING
    return Counter({name: number * (1 if job.known else max(1, len(counts.tail))) for name, number in units.items()})


def _dataset(p, c, job, found):
    n = c.train + c.held
    units = Counter({"read": 2 * n, "seconds": FIGURES, "bytes": 600 * n + 2e6})
    if p["base_model"]:
        val = min(c.held // 3, 60 * c.classes)
        units += Counter({"code": 2 * val, ("see", p["encoder"]): val + min(c.train, 240 * c.classes) + val})
        spare = workload.HEADROOM * len(c.tail)  # of the same cases and of new ones, as they are and through the autoencoder
        units += Counter({"code": 4 * spare, ("see", p["encoder"]): 4 * spare + min(c.train, 60 * c.classes)})
    return units


def _adapter(p, c, job, found):
    steps = p["steps"]
    every = settings.pace(steps) | (p.get("options") or {})
    classes = (c.classes if p.get("captions") else len(c.tail)) if job.class_name == "all" else 1
    checks, drawn = (steps / every[name] if every[name] else 0 for name in ("validate_every", "sheet_every"))
    sheets = drawn * settings.SHEET_SAMPLES * classes
    latents = 8 * c.tail_train * classes / max(1, len(c.tail))
    units = Counter({"train": steps * p["batch_size"] + (checks + drawn) * settings.HELD_OUT_DRAWS / 3, "seconds": FIGURES})
    units["denoise"] = sheets * settings.SHEET_STEPS * 2
    lora = 3 * p.get("rank", 0) / 16  # what is kept, and a checkpoint with two moments
    return units + Counter({"code": latents + sheets, "latents": latents, "loras": lora, "bytes": 1e5 * sheets, "files": 6})


def _morphology(p, c, job, found):
    """The tiles through an encoder, once and kept; k-means of a few hundred tiles many times."""
    n = c.tail_train if p["classes"] == "tail" else c.train
    return Counter({("real", _eye(p["encoder"], found)): n, "read": 2 * n, "seconds": 3 * FIGURES, "bytes": 1e6})


def _images(p, c, job, found):
    def passes(strength, guidance_scale):
        return int(p["num_inference_steps"] * strength) * (1 if guidance_scale == 1 else 2)

    n, asked = p["num_images"], (p["strength"], p["guidance_scale"])
    few = [passes(*pair) * min(n, workload.TRIED) for pair in workload.tried_pairs(p.get("tried") or {}, *asked)]
    looked = len(few) * min(n, workload.TRIED)
    units = {"denoise": n * passes(*asked) + sum(few), "code": 2 * (n + looked), "read": n}
    units |= {("see", eye): 9 * looked for eye in ("mini-ssl", "mini-sup") if looked}  # as 05 looks: eight views, and the judge
    return Counter(units | {"seconds": FIGURES, "bytes": 2 * n * c.tile_px**2, "files": n})


def _guided(p, c, job, found):
    """As if no image were sure enough before its last update: a step costs a pass to draw it, one to draw it again, one back.

    Candidates cost a pass for a step and are as many as there may be.
    """
    n, options = p["num_images"], p.get("options") or {}
    if p.get("method") == "latent":
        drawn = n + SHOWN
        passes = drawn * p["num_inference_steps"] * ((1 if p["guidance_scale"] == 1 else 2) + PUSH)
        return Counter({"denoise": passes, "code": drawn, "read": n, "seconds": FIGURES, "bytes": 2 * n * c.tile_px**2, "files": n})
    pictures, both = n * (p["updates"] + 1 if p["updates"] else 0), 1 if p["guidance_scale"] == 1 else 2
    steps = options.get("last_steps") or p["num_inference_steps"]
    looks = 2 * pictures * options.get("loss_steps", 3)
    eye = next((other.parameters["encoder"] for other in found if other.step == p["classifier"]), "mini-sup")
    drawn = n * (p["candidates"] if p["candidates"] > 1 or not pictures else 0)
    passes = 3 * pictures * steps + n * (p["num_inference_steps"] - steps) + drawn * steps
    units = Counter({"denoise": both * passes, "code": looks + drawn, ("see", eye): looks + drawn})
    return units + Counter({"read": 2 * n, "seconds": FIGURES, "bytes": 4 * n * c.tile_px**2, "files": 2 * n})


def _made(step, found, c, class_name=""):
    """Synthetic tiles that a step holds, of one class or of all."""
    total = 0
    for job in found:
        if job.step == step and (not class_name or not job.known or job.class_name in (class_name, "all")):
            if job.notebook.stem == "05_select":
                total += _made(job.parameters["source"], found, c, job.class_name if job.known else "")
            else:
                total += job.parameters.get("num_images", 0) * (1 if job.known or class_name else max(1, len(c.tail)))
    return total


def _selection(p, c, job, found):
    made = _made(p["source"], found, c, job.class_name if job.known else c.tail[0] if c.tail else "")
    eye = _eye(p["encoder"], found)
    seen = Counter({("see", eye): 8 * made + c.tail_train / max(1, len(c.tail)), ("real", eye): c.train + c.loose})
    return seen + Counter({"read": 2 * made, "seconds": FIGURES, "bytes": 2000 * made + 1e6})


def _eye(name, found):
    """The encoder that is tried in the place of `name`: one that a step of the recipe trains is as large as mini's."""
    return "mini-ssl" if any(name == job.step for job in found) else name


def _classifiers(p, c, job, found):
    units = Counter({"seconds": FIGURES, "bytes": 1e6})
    for arm in p["arms"].values():
        encoder, mode = _eye(arm.get("encoder") or p["encoder"], found), arm.get("mode") or p["mode"]
        added = _made(arm["synthetic"], found, c) if arm.get("synthetic") else 0
        painted = arm.get("per_class", 0) * len(c.tail) if arm.get("recolour", "none") != "none" else 0
        updates = p["seeds"] * (p["steps"] if mode in ("linear", "full") else 0)
        if mode == "full":
            units[("see", encoder)] += 3 * updates * p["batch_size"] + p["seeds"] * 10 * c.held / 3
        else:
            units["head"] += updates
            units[("see", encoder)] += 8 * painted
            units[("made", encoder, arm.get("synthetic", ""))] = 8 * added
            units[("real", encoder)] = max(units[("real", encoder)], 8 * c.train + c.held)
        if arm.get("real_through", "none") != "none":
            units[("coded", encoder)] = 8 * c.train
            units["code"] = 2 * c.train
        units["read"] += painted
        units["bytes"] += p["seeds"] * c.held * (100 + 8 * c.classes) + 2 * painted * c.tile_px**2
        units["files"] += p["seeds"] * 5 + painted
    return units


def _pretrain(p, c, job, found):
    """Of a prior alone: views are encoded once, a step trains a whole UNet. What the other parts take is known after their first run."""
    if p["part"] != "prior" or p["network"]:
        return None
    from histokit.training.pretraining import latent_shards

    draws, n = p["steps"] * p["batch_size"], c.train + c.loose
    views = n * max(1, min(latent_shards.MOST, draws // max(1, n)))
    looked = p["steps"] / max(50, min(250, p["steps"] // 5)) * min(48, c.held / 3) / 3  # validations, without a backward pass
    sheets = 6 * 16  # five sheets and the one before the first update
    units = Counter({"train": draws + looked, "denoise": 20 * sheets, "code": views + sheets, "read": 2 * n + views, "seconds": FIGURES})
    return units + Counter({"latents": views, "bytes": 1e8, "files": 12})


def _latent_classifier(p, c, job, found):
    seen, val, size = p["steps"] * p["batch_size"], c.held // 3, LATENT_SIZE.get(p["network"], LATENT_SIZE["base"])
    looked = (10 + 4) * 10 * val / 3  # ten validations of ten bins, and the curve; without a backward pass
    learned = c.train * (1 + p["restained"])
    units = Counter({"code": 8 * learned + val, "latents": 8 * learned + val, "read": 3 * learned * bool(p["restained"])})
    units["train"] = LATENT_STEP * size / LATENT_SIZE["mini"] * (seen + looked)
    return units + Counter({"read": c.train + val, "seconds": FIGURES, "bytes": 24 * size, "files": 6})  # weights, average, two moments


def _verdict(p, c, job, found):
    return Counter({"seconds": VERDICT, "bytes": 4e6, "files": 12})


def _fidelity(p, c, job, found):
    made, held = _made(p["source"], found, c), c.held * len(c.tail) / max(1, c.classes)
    planted = workload.PLANTED * len(workload.COPIES) if made else 0
    views = 9 * made + 8 * held + 8 * planted + min(c.train + c.held, 3000)
    code = 2 * workload.PLANTED if p["base_model"] and made else 0
    return Counter({("see", p["encoder"]): views, "code": code, "read": made, "seconds": FIGURES, "bytes": 2e6, "files": 4})


RULES = {
    "00_dataset": _dataset,
    "01_textual_inversion": _adapter,
    "02_lora": _adapter,
    "03_img2img": _images,
    "04_guided": _guided,
    "05_select": _selection,
    "06_classifier": _classifiers,
    "07_evaluate": _verdict,
    "08_fidelity": _fidelity,
    "10_morphology_prompts": _morphology,
    "20_pretrain": _pretrain,
    "21_latent_classifier": _latent_classifier,
    "30_style_layout": segmentation_work.style_layout,
    "31_segmentation": segmentation_work.segmenters,
}


# --- how many tiles, and how long ------------------------------------------------------------------------------------


def counts(recipe, job, root=None):
    """Counts of the dataset a job reads, from its manifest, else from a look at the folder; None where there is neither."""
    id, given = _dataset_step(recipe, job)
    try:  # the last part of a study with replicates is a verdict alone: its tiles are where all steps look for them
        return _frozen((root or files.root()) / "outputs" / recipe.source / (id or "00_dataset"))
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return _described(given)


def _dataset_step(recipe, job):
    """Id and parameters of the step whose tiles a job reads, ("", {}) where it reads none."""
    from histokit.runs import recipe as recipes

    id = recipe.steps[job.step].dataset or (job.step if job.notebook.stem == "00_dataset" else "")
    whose = recipe if id in recipe.steps else recipe.inherits
    return (id, recipes.parameters(whose, whose.steps[id])) if id and whose else ("", {})


def _rare(recipe, job):
    """How many classes the description calls rare, without a look at the tiles."""
    from histokit.tiles import description

    _, given = _dataset_step(recipe, job)
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = description.of_step(given)
        return len({*told.budget, *(name for name, role in told.roles.items() if role == "tail")})
    return 0


def _frozen(home):
    from histokit.tiles import data

    held = data.read_frozen(home / "dataset.json")
    every = files.read_table(next(iter(sorted(home.glob("manifest.*"))), home / "manifest.csv"))
    tiles, loose = every[every["use"].eq("labelled")], int((every["use"].eq("unlabelled") & every["split"].eq("train")).sum())
    train = tiles.loc[tiles["split"].eq("train"), "label"].value_counts().to_dict()
    return _counts(train, int(tiles["split"].isin(["val", "test"]).sum()), held.roles, held.tile_px, loose)


def _described(given):
    """Before 00 has run: six tiles in ten for training, and of a class made rare what its budget leaves; of toy, as it plans."""
    from histokit import toy
    from histokit.tiles import data, description

    told = description.of_step(given)
    tiles = toy.plan() if told.procedural else data.scan(told)
    every = tiles["label"].value_counts()
    known = tiles.loc[tiles["split"].eq("train"), "label"].value_counts() if told.procedural else (0.6 * every).astype(int)
    whole = {name: min(int(n), told.budget.get(name, {}).get("tiles", n)) for name, n in known.items()}
    train = {name: max(1, int(n * given.get("labelled", 1.0))) for name, n in whole.items()}
    guess = {name: "tail" if n < told.tail_below else "head" for name, n in train.items()}
    held = len(tiles) - known.sum() if told.procedural else 0.4 * every.sum()
    return _counts(train, int(held), guess | told.roles, told.tile_px or 256, sum(whole.values()) - sum(train.values()))


def _counts(train, held, roles, tile_px, loose=0):
    tail = tuple(name for name, role in roles.items() if role == "tail")
    return Counts(int(sum(train.values())), held, int(sum(train.get(name, 0) for name in tail)), tail, len(roles), int(tile_px), loose)


@dataclass(frozen=True)
class Guess:
    """What a job will take: seconds (None where nothing is known), bytes, files."""

    seconds: float | None
    bytes: int
    files: int


def _asked(found):
    """Parameters of the jobs whose time is guessed; a base that a step trains is as fast as what it goes on from."""
    starts = {job.step: job.parameters.get("init", "") for job in found}
    asked = []
    for p in (job.parameters for job in found if job.notebook.stem in RULES):
        arms = {name: {**(arm or {}), "encoder": _eye((arm or {}).get("encoder", ""), found)} for name, arm in p.get("arms", {}).items()}
        own = {"encoder": _eye(p["encoder"], found)} if p.get("encoder") else {}
        asked.append(p | {"base_model": starts.get(p.get("base_model"), p.get("base_model"))} | ({"arms": arms} if arms else {}) | own)
    return asked


def fixed_share(recipe, found, job):
    """Share of a fine-tuning's time in [0, 1] that its checks and sheets take whatever its steps; 0 where nothing was measured."""
    rates, size = speed.rates(_asked(found), measure=False), counts(recipe, job)
    units = work(job, found, size) if rates and size else None
    if not units:
        return 0.0
    steps = Counter({"train": job.parameters["steps"] * job.parameters["batch_size"] * (1 if job.known else max(1, len(size.tail)))})
    whole, plain = speed.cost(units, rates)[0], speed.cost(units - steps, rates)[0]
    return plain / whole if whole and plain else 0.0


def expect(recipe, found, todo, *, measure=True, say=print):
    """({job id: Guess} of every job, why some are unknown or "").

    Args:
        found: jobs.Job of the recipe.
        todo: ids of those that will run; nothing is measured for the others.
        measure: False takes an earlier calibration or none.
    """
    unknown, guesses, reads = Guess(None, 0, 0), {}, {job.id: _dataset_step(recipe, job)[0] for job in found}
    of = functools.cache(lambda step: counts(recipe, next(job for job in found if reads[job.id] == step)))  # one look for all its jobs
    for job in found:
        earlier = jobs.expected(job)
        times = 1 if job.known or not earlier else max(1, _rare(recipe, job))
        guesses[job.id] = Guess(*(times * part for part in earlier)) if earlier else unknown
    asked = [job for job in found if job.id in todo and guesses[job.id] is unknown and job.notebook.stem in RULES]
    parameters = _asked(found)
    if not asked or not (measure or speed.rates(parameters, measure=False)):
        return guesses, ""
    units = speed.once([work(job, found, of(reads[job.id])) for job in found])
    if not any(unit for job, unit in zip(found, units, strict=True) if job in asked):
        return guesses, ""
    known = speed.rates(parameters, say=say)
    for job, unit in zip(found, units, strict=True):
        if job in asked and unit:
            guesses[job.id] = Guess(*speed.cost(unit, known))
    return guesses, known.lacking
