"""What a verdict is about: which arms are compared, which part each plays, where their predictions lie.

Taken from the recipe before anything is measured, so that no arm is chosen by its result.
"""

from dataclasses import dataclass, field

from histokit.arms import predictions
from histokit.core import files
from histokit.evaluate import test_set_log, verdict, wording
from histokit.evaluate.verdict import HEAD, LEVEL, TAIL
from histokit.fidelity import shortcuts
from histokit.runs import places
from histokit.tiles import data

VERSION = 1


@dataclass(frozen=True)
class Question:
    """See `ask`."""

    specs: dict  # arm -> its settings in the recipe
    external: str  # step of the tiles of another house, "" for none
    parts: object  # Roles
    folders: dict  # (draw, generator) -> folder of the finished classifier step

    def answers(self, classes, split="test"):
        """`predictions.Predictions` of all arms and replicates on the tiles of a split."""
        return predictions.read(self.folders, classes, list(self.specs), split=split)

    def made(self, run):
        """The synthetic tiles the judged arm was trained on, as rows of a manifest; none where it takes none."""
        if not self.parts.synthetic:
            return data.load(run).head(0)
        return data.used(data.load(run, step=self.parts.synthetic), self.parts.status, self.parts.per_class)

    def counts(self):
        """What each arm of each replicate was trained on: the rows of `comparison.counts`."""
        return [row for folder in self.folders.values() for row in files.read_json(folder / "results.json")["counts"]]

    def plan(self, resamples):
        """What the comparison set out to do, see `plan`."""
        return plan(self.parts, self.specs, resamples)

    def elsewhere(self, run, tiles, dataset, *, resamples=2000, seed=0):
        """How the same classifiers do on the tiles of another house; an empty `Abroad` where the recipe names none.

        They never saw a tile from there and were not chosen on one. To open those tiles is a look of its own.
        """
        if not self.external:
            return Abroad()
        other = data.load(run, step=self.external, dataset_step=self.external)
        name = data.dataset(run, self.external).name
        look = test_set_log.open_test(run, name, other.assign(split="test"), self.plan(resamples))
        measured = verdict.measure(self.answers(dataset.classes, "external"), dataset, resamples=resamples, seed=seed)
        found = {e: verdict.difference(measured, self.parts.judged, self.parts.baseline, e) for e in measured.endpoints}
        shown = [TAIL, HEAD, *dataset.tail]
        lines = [f"On {name}, {wording.line(found[e])}." for e in shown if found[e].outcome != "absent"]
        lines = lines or [f"{name} has no test tile of any class."]
        remarks = [*look.remarks(name), *shortcuts.elsewhere(tiles, other, name, seed)]
        return Abroad(name, lines, remarks, {e: verdict.plain(d) for e, d in found.items()}, measured)

    def title(self, answers):
        """One line: who is held against whom, over how many tiles, cases and runs."""
        n = f"{len(answers.y)} test tiles, {len(set(answers.case_id))} cases, {len(answers.runs)} runs of each arm"
        return f"{self.parts.judged} against {self.parts.baseline}: {n}"


@dataclass(frozen=True)
class Abroad:
    """The judged arm on tiles from another source, beside the baseline."""

    name: str = ""
    lines: tuple = ()
    remarks: tuple = ()  # how often these tiles were opened, how they differ in codec and stain
    differences: dict = field(default_factory=dict)  # endpoint -> wording.Difference, plain
    measured: object = None  # verdict.Measured

    @property
    def plain(self):
        """As results.json holds it."""
        return {"name": self.name, "lines": self.lines, "differences": self.differences} if self.name else {"lines": []}


def ask(run, step, baseline="", judged="", draws=1, generators=1):
    """The Question that the arms of a finished classifier step answer.

    Args:
        run: whose parents it becomes.
        step: id of the 06_classifier.
        baseline, judged: see `cast`.
        draws, generators: replicates to set against chance, see `replicates.study`.
    """
    replicates = folders(run, step, draws, generators)
    asked = places.read(replicates[0, 0])["parameters"]
    specs = asked["arms"]
    return Question(specs, asked.get("external", ""), cast(specs, list(specs), baseline, judged), replicates)


@dataclass(frozen=True)
class Roles:
    """Which arm plays which part."""

    baseline: str
    judged: str
    rivals: list  # the other arms without synthetic tiles, trained on no more real ones than the baseline
    generated: bool  # the judged arm trains on synthetic tiles
    synthetic: str  # step it takes them from
    status: str  # which of them
    per_class: int = 0  # and how many of each class, 0 for all


def cast(specs, arms, baseline="", judged=""):
    """Who is compared with whom, from the `arms` parameter of the classifier step.

    The baseline defaults to the first arm; the judged arm to the first that trains on synthetic tiles with their own labels, else the
    last. It is chosen by the recipe, never by its result.

    Args:
        specs: {arm: {synthetic, labels, status, ...}}.
        arms: names found in the predictions.

    Raises:
        ValueError: an arm of that name does not exist, or there is one arm only.
    """
    if len(arms) < 2:
        raise ValueError(f"one arm only ({', '.join(arms)}): a verdict compares two; add an arm to the classifier step")
    for name in filter(None, (baseline, judged)):
        if name not in arms:
            raise ValueError(f"no arm {name!r}; the classifier step has {', '.join(arms)}")
    specs = {arm: specs.get(arm) or {} for arm in arms}
    made = [arm for arm in arms if specs[arm].get("synthetic")]
    baseline = baseline or next(arm for arm in arms if arm != judged)
    fit = [arm for arm in made if specs[arm].get("labels", "own") == "own" and arm != baseline]
    judged = judged or (fit or [arm for arm in arms if arm != baseline][-1:])[0]
    if judged == baseline:
        raise ValueError(f"arm {judged!r} is both judged and the baseline; name another for one of them")
    given = [arm for arm in arms if (specs[arm].get("real_tiles") or 0) != (specs[baseline].get("real_tiles") or 0)]  # a ceiling, no rival
    rivals = [arm for arm in arms if arm not in (*made, *given, baseline, judged)] if judged in made else []
    spec = specs[judged]
    return Roles(baseline, judged, rivals, judged in made, spec.get("synthetic", ""), spec.get("status", "kept"), spec.get("per_class", 0))


def plan(parts, specs, resamples):
    """What a comparison set out to do, as the ledger keeps it: everything that could be turned until a result pleases.

    Every arm has the same search budget on validation tiles: one configuration, the one the recipe gives it, and the check that keeps
    its best weights.
    """
    arms = {name: spec or {} for name, spec in specs.items()}
    figures = {"endpoint": TAIL, "head": HEAD, "head margin": wording.MARGIN, "level": LEVEL, "resamples": resamples}
    return {"judged": parts.judged, "baseline": parts.baseline, **figures, "configurations of each arm": 1, "arms": arms}


def folders(run, step, draws=1, generators=1):
    """{(draw, generator): folder of the finished `step`} of the experiment and its replicates, see `replicates.study`."""
    replicates = [(d, g) for d in range(draws) for g in range(generators)]
    return {(d, g): run.parent(step, experiment=places.replicate(run.experiment, d, g) if d or g else "") for d, g in replicates}
