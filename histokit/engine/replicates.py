"""The same recipe for other draws of the rare tiles and other generator seeds, so that a verdict can hold their luck.

Recipes in, recipes out; `batch` runs them. `places` knows how a replicate finds what it has not made itself.
"""

from dataclasses import replace

from histokit.runs import places
from histokit.runs import recipe as recipes

LOOKS = ("08_fidelity",)  # looks at the tiles of the first draw; the verdict reads nothing else of it
COMMON = ("00_dataset", "06_classifier", "10_morphology_prompts", "20_pretrain")  # no generator seed changes these


def study(recipe, draws=1, generators=1):
    """The recipes to run, in order, so that 07 can set `draws` draws of the rare tiles and `generators` generator seeds against chance.

    Each replicate is an experiment of its own. <experiment>-d1 keeps other tiles of the budgeted classes, or other labels, and does
    everything again; <experiment>-g1 gives another seed to the steps that synthetic tiles come from, trains the arms that use them, and
    reads the rest from the experiment without -g1. Last comes what compares: the steps that declare `draws` and `generators`.

    Raises:
        RecipeError: nothing to draw or nothing generated.
    """
    if min(draws, generators) < 1:
        raise recipes.RecipeError(f"--draws and --generator-seeds must be at least 1, got {draws} and {generators}")
    if draws == generators == 1:
        return [recipe]
    judges = [id for id, step in recipe.steps.items() if {"draws", "generators"} <= set(step.declared)]
    made = _generated(recipe)
    if generators > 1 and not made:
        raise recipes.RecipeError(
            f"{recipe.path}: --generator-seeds needs an arm with synthetic tiles; every arm here trains on real ones alone"
        )
    if draws > 1:
        _check_draws(recipe)
    rest = _keep(recipe, [id for id in recipe.steps if id not in judges])
    runs = [_replicate(rest, made, d, g) for d in range(draws) for g in range(generators)]
    last = _keep(recipe, judges)
    return [*runs, _given(last, {id: {"draws": draws, "generators": generators} for id in judges})] if judges else runs


def _replicate(recipe, made, draw, generator):
    datasets = _datasets(recipe)
    told = {id: {"draw": draw} for id in datasets} if draw else {}
    whole = _keep(recipe, [id for id, step in recipe.steps.items() if not draw or step.notebook.stem not in LOOKS])
    source = replace(_given(whole, told), experiment=places.replicate(recipe.experiment, draw))
    if not generator:
        return source
    arms = {id: {arm: spec for arm, spec in _arms(recipe, id).items() if (spec or {}).get("synthetic")} for id in recipe.steps}
    seeds = {id: {"seed": recipes.parameters(recipe, recipe.steps[id])["seed"] + generator} for id in made}
    found = _keep(source, [*made, *(id for id, some in arms.items() if some)])
    found = replace(found, experiment=places.replicate(recipe.experiment, draw, generator), inherits=source)
    return _given(found, seeds | {id: {"arms": some} for id, some in arms.items() if some})


def _arms(recipe, id):
    return recipes.parameters(recipe, recipe.steps[id]).get("arms", {}) if "arms" in recipe.steps[id].declared else {}


def _generated(recipe):
    """Ids of the steps that synthetic tiles of an arm come from, in order."""
    wanted = {spec["synthetic"] for id in recipe.steps for spec in _arms(recipe, id).values() if (spec or {}).get("synthetic")}
    for id in reversed(recipe.steps):
        if id in wanted:
            wanted |= set(recipe.steps[id].parents)
    return [id for id, step in recipe.steps.items() if id in wanted and step.notebook.stem not in COMMON and "seed" in step.declared]


def _check_draws(recipe):
    from histokit.tiles import description

    for id in _datasets(recipe):
        said = recipes.parameters(recipe, recipe.steps[id])
        if not description.of_step(said).budget and said.get("labelled", 1.0) == 1 and not said.get("annotated"):
            raise recipes.RecipeError(
                f"{recipe.path}: --draws needs a `budget` ({id} or the description) or `labelled` below 1: otherwise every tile is in use "
                "with its label, and there is nothing to draw anew"
            )


def _datasets(recipe):
    """Ids of the steps whose tiles are trained on; tiles from elsewhere, only looked at, are drawn once."""
    used = {step.dataset for step in recipe.steps.values()}
    return [id for id, step in recipe.steps.items() if step.notebook.stem == "00_dataset" and id in used]


def _keep(recipe, ids):
    """The recipe with some of its steps; what they read was made by another."""
    classes = {c: {id: values for id, values in steps.items() if id in ids} for c, steps in recipe.classes.items()}
    steps = {id: step for id, step in recipe.steps.items() if id in ids}
    return replace(recipe, steps=steps, classes={c: steps for c, steps in classes.items() if steps})


def _given(recipe, told):
    """The recipe with values {step id: {name: value}} that win over everything said before."""
    given = dict(recipe.given)
    for id, values in told.items():
        given[id, True] = given.get((id, True), {}) | values
    return replace(recipe, given=given)
