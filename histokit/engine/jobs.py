"""Jobs: a recipe spread over the classes of the data, and what each run on disk says about itself.

Reads `dataset.json` and `run.json` files; starts nothing.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from histokit import runs
from histokit.core import files
from histokit.runs import places
from histokit.runs import recipe as recipes

UNKNOWN = "<{kind} classes, known after {dataset}>"


@dataclass(frozen=True)
class Job:
    step: str
    class_name: str  # "" when the notebook runs once; "all" when pinned
    notebook: Path
    folder: Path
    parameters: dict
    parents: tuple  # of (step, class_name)
    known: bool = True  # False: stands for classes that are known after the dataset step
    sure: bool = True  # False: whether there is such a job follows from a run of the dataset step that is still to come
    leftovers: tuple = ()  # run folders of the recipe's steps that none of its jobs has: set aside before a run, and not counted here

    @property
    def id(self):
        return (self.step, self.class_name)

    @property
    def name(self):
        return f"{self.step}/{self.class_name}" if self.class_name else self.step

    @property
    def stem(self):
        """A file name of its own among the jobs of a recipe."""
        return f"{self.step}-{self.folder.name}" if self.class_name else self.step


@dataclass
class State:
    """One job as found on disk."""

    job: Job
    state: str  # done | stale | missing | running | interrupted | failed | unknown
    why: str
    seconds: float | None  # wall time of its last finished run


def expand(recipe, root=None):
    """The jobs of a recipe in order, each class of a per-class step its own.

    Classes and roles come from the dataset step's `dataset.json`; until it is written, one job with `known=False` stands
    for them. When that step is stale its roles are the best guess there is, but nothing is refused or left over by them.
    Raises RecipeError for a class that the data does not have.
    """
    home = Path(root or files.root()) / "outputs" / recipe.experiment
    problems, data = [], {}
    found = {step.id: _classes(recipe, step, home, problems, data) for step in recipe.steps.values()}
    if problems:
        raise recipes.RecipeError("\n".join(dict.fromkeys(problems)))
    jobs, classes_of, leftovers = [], {}, []
    for step in recipe.steps.values():
        names, known, sure = found[step.id]
        classes_of[step.id] = names
        for name in names:
            above = tuple((p, c) for p in step.parents if p in classes_of for c in _matching(classes_of[p], name))
            parameters = recipes.parameters(recipe, step, name)
            jobs.append(Job(step.id, name, step.notebook, home / step.id / _part(step, name, known), parameters, above, known, sure))
        if sure:
            leftovers += places.leftovers(home / step.id, [_part(step, name, known) for name in names])
    return [replace(job, leftovers=tuple(leftovers)) for job in jobs]


def _part(step, name, known):
    """Name of a job's folder below its step; "" is the step's own."""
    return "all" if step.pinned else files.slug(name) if name and known else ""


def _matching(parent_classes, name):
    """Which runs of a parent a job reads: its own class, else the one run over all, else every one."""
    return [name] if name in parent_classes else list(parent_classes)


def _classes(recipe, step, home, problems, data):
    """Class names of one step, whether they are known yet, and whether a run of the dataset step can no longer change them."""
    if not step.per_class:
        return (["all"] if step.pinned else [""]), True, True
    if step.dataset not in data:
        data[step.dataset] = _dataset(recipe, step, home, problems)
    classes, roles, frozen, fresh = data[step.dataset]
    asked = step.which if isinstance(step.which, list) else []
    named = [c for c, steps in recipe.classes.items() if step.id in steps]
    for name in [*named, *asked] if classes else []:
        if name not in classes:
            problems.append(f"{recipe.path}: {step.id}: class {name!r} is not in the data{recipes.nearest(name, classes)}")
    if asked:
        return asked, True, True
    chosen = [c for c in classes if step.which == "all" or roles.get(c) == "tail" or classes == ["tissue"]] if roles is not None else []
    if not chosen and not fresh:
        kind = "rare" if step.which == "tail" else "all"
        return [UNKNOWN.format(kind=kind, dataset=step.dataset)], False, False
    if not chosen:
        problems.append(
            f"{recipe.path}: {step.id}: no class is rare in {frozen}; set roles, `tail_below:` or `budget:` in the dataset"
            f" description, or write `for: all` or `for: [names]` in the step"
        )
    return chosen, True, fresh


def _dataset(recipe, step, home, problems):
    """(classes, roles, dataset.json, fresh) of a step's data; fresh: as a finished run of 00 froze them, and 00 would not change them.

    Else the description's classes, with its roles above the earlier ones; roles None where 00 has never finished.
    """
    whose = recipe if step.dataset in recipe.steps else recipe.inherits
    if not step.dataset or not whose:
        return [], None, "", False
    frozen, source = home.parent / recipe.source / step.dataset / "dataset.json", whose.steps[step.dataset]
    given = recipes.parameters(whose, source)
    state, _ = runs.check(frozen.parent, given, source.notebook)
    held = files.read_json(frozen) if state in ("done", "stale") and frozen.exists() else None
    if held and state == "done":
        return held["classes"], held["roles"], frozen, True
    from histokit.tiles import description

    try:
        told = description.of_step(given)
    except (ValueError, OSError) as error:
        if held:  # the data is not at hand, but what was made from it is
            return held["classes"], held["roles"], frozen, False
        problems.append(f"{recipe.path}: {step.dataset}: {error}")  # said before anything starts
        return [], None, frozen, False
    return told.classes, held and held["roles"] | told.roles, frozen, False


def look(job):
    """The State of one job: done, stale and why, missing ..., from its run folder and those it reads."""
    if not job.known:
        return State(job, "unknown", "", None)
    with places.without(job.leftovers):
        state, why = runs.check(job.folder, job.parameters, job.notebook)
    return State(job, state, why, wall_time(job.folder))


def leftovers(found):
    """{run folder: its name among jobs, such as 02_lora/fat} of what a run of these jobs sets aside first."""
    names = {}
    for folder in found[0].leftovers if found else ():
        _, step, *part = folder.relative_to(files.root() / "outputs").parts
        names[folder] = "/".join([step, *(places.read(folder).get("class_name") or name for name in part)])
    return names


def wall_time(folder):
    """Seconds the run in this folder took, None when it never finished."""
    path = Path(folder) / "run.json"
    return files.read_json(path).get("wall_s") if path.exists() else None


def expected(job, root=None):
    """(seconds, bytes, files) of the latest finished run of this step with the same parameters, seeds apart; None where there is none.

    Runs of this experiment count before those of others, and the same class before its neighbours.
    """
    found = []
    home = Path(root or files.root()) / "outputs"
    for path in [*home.glob(f"*/{job.step}/run.json"), *home.glob(f"*/{job.step}/*/run.json")]:
        run = files.read_json(path)
        if run.get("status") == "done" and run.get("wall_s") is not None and _work(run.get("parameters", {})) == _work(job.parameters):
            near = (job.folder == path.parent, job.folder.is_relative_to(home / path.relative_to(home).parts[0]))
            found.append((near, path.stat().st_mtime, run["wall_s"], path.parent))
    if not found:
        return None
    _, _, seconds, folder = max(found, key=lambda f: f[:2])
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return seconds, sum(sizes), len(sizes)


def _work(parameters):
    """The parameters that say how much there is to do."""
    apart = ("experiment", "step", "recipe", "class_name", "seed", "draw")
    return {name: value for name, value in files.plain(parameters).items() if name not in apart}
