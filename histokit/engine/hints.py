"""What a dry run can say at once: refusals that need no calibration, which setting makes a long step shorter, what costs its fixed part."""

import shlex

from histokit.core import files
from histokit.engine import forecast
from histokit.runs import recipe as recipes

KNOBS = {  # parameters that a step's time goes by, the first the one to turn first, and how far
    "00_dataset": (("base_model", '""'),),
    "01_textual_inversion": (("steps", 0.5), ("batch_size", None)),
    "02_lora": (("steps", 0.5), ("batch_size", None)),
    "03_img2img": (("num_images", 0.5), ("num_inference_steps", None), ("strength", None)),
    "04_guided": (("num_images", 0.5), ("updates", None), ("num_inference_steps", None)),
    "06_classifier": (("seeds", 0.5), ("steps", None)),
    "20_pretrain": (("steps", 0.5), ("batch_size", None)),
    "21_latent_classifier": (("steps", 0.5), ("batch_size", None)),
}
LONG = 0.15  # share of the whole from which a step is named
SHORT = 600  # seconds of a whole run below which nothing needs to be shorter


def refusals(recipe, jobs_to_run):
    """(problems, remarks) of the datasets that are still to be read, from names and tables alone, before anything is measured.

    Problems stop 00 (a description or budget that cannot hold, a case in two splits); remarks name classes without a validation or test
    tile.
    """
    problems, remarks = [], []
    for job in jobs_to_run:
        if job.notebook.stem != "00_dataset":
            continue
        try:
            remarks += [f"{job.name}: {line}" for line in _looked_at(recipes.parameters(recipe, recipe.steps[job.step]))]
        except (OSError, ValueError) as error:
            problems.append(f"{job.name}: {error}")
    return problems, remarks


def _looked_at(given):
    if not (files.root() / given.get("dataset", "")).is_file():
        return
    from histokit.tiles import data, description, splits

    told = description.of_step(given)
    if told.procedural:
        return
    tiles = splits.assign(data.scan(told), told.split, given.get("seed", 0), strict=False)
    splits.check(tiles)
    tiles = splits.budget(tiles, told.budget, given.get("seed", 0), given.get("draw", 0))
    tiles = splits.keep_labels(tiles, given.get("labelled", 1.0), given.get("seed", 0), given.get("draw", 0))
    own = tiles[tiles["use"].eq("labelled")]
    roles = splits.roles(tiles, told.classes, told.roles, told.tail_below)
    if told.classes and "tail" not in roles.values():
        sizes = data.training(tiles)["label"].value_counts().reindex(told.classes, fill_value=0)
        yield (
            f"no class is rare: each has {sizes.min()} training tiles or more, and `tail_below` is {told.tail_below}: no step has a class "
            "to teach or to make; raise it, give a class `role: tail`, or make one rare by a budget"
        )
    for split, what in (("val", "validation"), ("test", "test")):
        held = set(own.loc[own["split"].eq(split), "label"])
        if lacking := [name for name in told.classes if name not in held]:
            yield f"no {what} tile of {', '.join(lacking)}" + (
                "; a judge cannot be checked on them" if split == "val" else "; no verdict can be about them"
            )


def shorter(recipe, found, jobs_to_run, guesses):
    """Lines on the longest steps: what their time goes by, and a -p that makes it shorter; none for a short run."""
    known = {job.id: guesses[job.id].seconds or 0.0 for job in jobs_to_run}
    total = sum(known.values())
    if total < SHORT:
        return
    steps = {}
    for job in jobs_to_run:
        steps.setdefault(job.step, []).append(job)
    for step, held in sorted(steps.items(), key=lambda item: -sum(known[job.id] for job in item[1])):
        seconds = sum(known[job.id] for job in held)
        knobs = KNOBS.get(held[0].notebook.stem)
        if seconds < LONG * total or not knobs:
            continue
        given = held[0].parameters
        shown = ", ".join(f"{name} {given[name]}" for name, _ in knobs if name in given)
        name, factor = knobs[0]
        value = factor if isinstance(factor, str) else max(1, int(given[name] * factor))
        changes = given[name] not in (value, str(value).strip('"'))
        tried = f"; -p {step}.{name}={value} makes it shorter" if changes else ""
        yield f"{step} takes {seconds / total:.0%} of it: {shown}{tried}{_fixed(recipe, found, held[0])}"


def _fixed(recipe, found, job):
    """What checks and sample sheets of a fine-tuning cost, where that is more than a third; "" else."""
    share = forecast.fixed_share(recipe, found, job) if job.notebook.stem in ("01_textual_inversion", "02_lora") else 0
    if share < 1 / 3:
        return ""
    options = {**(job.parameters.get("options") or {}), "sheet_every": 0}
    flow = ", ".join(f"{name}: {value}" for name, value in options.items())
    again = shlex.quote(f"{job.step}.options={{{flow}}}")
    return f" ({share:.0%} of that are checks and sample sheets, whatever the steps: -p {again} draws none)"
