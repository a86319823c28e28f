"""Jobs: a recipe spread over the classes of the data, and what each run on disk says about itself.

Reads `dataset.json` and `run.json` files; starts nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from histokit import files, runs
from histokit import recipe as recipes

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
    for them. Raises RecipeError for a class that the data does not have.
    """
    home = Path(root or files.root()) / "outputs" / recipe.experiment
    jobs, classes_of, problems = [], {}, []
    for step in recipe.steps.values():
        names, known = _classes(recipe, step, home, problems)
        classes_of[step.id] = names
        for name in names:
            part = "all" if step.pinned else files.slug(name) if name and known else ""
            above = tuple((p, c) for p in step.parents if p in classes_of for c in _matching(classes_of[p], name))
            parameters = recipes.parameters(recipe, step, name)
            jobs.append(Job(step.id, name, step.notebook, home / step.id / part, parameters, above, known))
    if problems:
        raise recipes.RecipeError("\n".join(dict.fromkeys(problems)))
    return jobs


def _matching(parent_classes, name):
    """Which runs of a parent a job reads: its own class, else the one run over all, else every one."""
    return [name] if name in parent_classes else list(parent_classes)


def _classes(recipe, step, home, problems):
    """Class names of one step and whether they are known yet."""
    if not step.per_class:
        return (["all"] if step.pinned else [""]), True
    classes, roles, frozen = _dataset(recipe, step, home, problems)
    asked = step.which if isinstance(step.which, list) else []
    named = [c for c, steps in recipe.classes.items() if step.id in steps]
    for name in [*named, *asked] if classes else []:
        if name not in classes:
            problems.append(f"{recipe.path}: {step.id}: class {name!r} is not in the data{recipes.nearest(name, classes)}")
    if asked:
        return asked, True
    if roles is None:
        kind = "rare" if step.which == "tail" else "all"
        return [UNKNOWN.format(kind=kind, dataset=step.dataset)], False
    chosen = [c for c in classes if step.which == "all" or roles.get(c) == "tail" or classes == ["tissue"]]
    if not chosen:
        problems.append(
            f"{recipe.path}: {step.id}: no class is rare in {frozen}; set roles, `tail_below:` or `budget:` in the dataset"
            f" description, or write `for: all` or `for: [names]` in the step"
        )
    return chosen, True


def _dataset(recipe, step, home, problems):
    """(classes, roles, dataset.json) of a step's data; before 00 has run, the description's classes and roles None."""
    frozen = home.parent / recipe.source / step.dataset / "dataset.json"
    if step.dataset and frozen.exists():
        dataset = files.read_json(frozen)
        return dataset["classes"], dataset["roles"], frozen
    if not step.dataset:
        return [], None, frozen
    from histokit import describe

    if step.dataset not in recipe.steps:  # a replicate, looked at before what it inherits from has run
        return [], None, frozen
    given = recipes.parameters(recipe, recipe.steps[step.dataset])
    try:
        return describe.describe(given["dataset"], given.get("data_root", ""), given.get("budget")).classes, None, frozen
    except (ValueError, OSError) as error:  # the folder is missing, the description wrong: said before anything starts
        problems.append(f"{recipe.path}: {step.dataset}: {error}")
        return [], None, frozen


def look(job):
    """The State of one job: done, stale and why, missing ..., from its run folder alone."""
    if not job.known:
        return State(job, "unknown", "", None)
    state, why = runs.check(job.folder, job.parameters, job.notebook)
    return State(job, state, why, wall_time(job.folder))


def wall_time(folder):
    """Seconds the run in this folder took, None when it never finished."""
    path = Path(folder) / "run.json"
    return files.read_json(path).get("wall_s") if path.exists() else None


def size(folder):
    """Bytes of a run folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def expected(job, root=None):
    """(seconds, bytes) a job will take, judged by the latest finished run of the same step; None where there is none.

    Runs of this experiment count before those of others, and the same class before its neighbours.
    """
    found = []
    home = Path(root or files.root()) / "outputs"
    for path in [*home.glob(f"*/{job.step}/run.json"), *home.glob(f"*/{job.step}/*/run.json")]:
        run = files.read_json(path)
        if run.get("status") == "done" and run.get("wall_s") is not None:
            near = (job.folder == path.parent, job.folder.is_relative_to(home / path.relative_to(home).parts[0]))
            found.append((near, path.stat().st_mtime, run["wall_s"], path.parent))
    if not found:
        return None, None
    _, _, seconds, folder = max(found, key=lambda f: f[:2])
    return seconds, size(folder)
