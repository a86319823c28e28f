"""Tiles steered by a classifier: a job table in, one picture per row out, each with the history of its optimisation.

The table is that of `policies`, for text alone; `guidance` does the work. Nothing here judges a tile: 05_select does, with a classifier
that did not guide.
"""

import dataclasses
import functools
import json
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from histokit.core import files, machine, parallel, progress
from histokit.diffusion import backbone, sampling
from histokit.generate import guidance, guides, policies, previews, synthetic
from histokit.tiles import data
from histokit.vision import classifiers, encoders

VERSION = 2
STOPPED = "stopped by hand"
SCORES = ("guide", "guide_plain", "draws", "updates", "stop")  # what is known about a tile: see `score`


def settings_of(asked):
    """guides.Settings from the parameters of 04, a dict; what is no setting of this way is left out."""
    return guides.Settings.of({name: value for name, value in asked.items() if name not in ("class_scale", "lpips", "captions", "budget")})


def warnings(guide, settings):
    """What should be known before a tile is made, in sentences; nothing here."""
    return []


def load_guide(run, step, classes, arm="", model=None):
    """The classifier of a finished 06 step that is to guide, its first seed: guides.Pictures.

    Args:
        step: id of the 06 step, which becomes a parent of this run.
        classes: class names of the dataset.
        arm: its arm; empty when it has only one.

    Raises ValueError for an arm that is not there.
    """
    first = classifiers.trained(run.parent(step), step, arm, "guide")[0]
    return guides.Pictures(classifiers.load(first, run.device), classes, f"the guide {step}/{first.parent.name}")


def render(model, guide, jobs, run, tiles, settings, *, batch=None, distance=None, say=print):
    """Make every tile of the job table that is not there yet, and return the manifest rows of all of them.

    An interrupted run goes on where it was, image by image. One whose latents, loss or gradient are not finite is named and kept as it was
    before; where that was at once, it has no row. Out of memory, the batch is halved and what is missing is made with it.

    Args:
        model: backbone.Model, with the adapters of the job table.
        guide: guides.Pictures.
        jobs: `policies.job_table` of policy none.
        settings: guidance.Settings.
        batch: images that are optimised at once, by default `guidance.batch_size(model)`; job i has slot i % batch of one.
        distance: see `guidance.optimise`.
        say: called with a line when something went wrong.
    """
    if jobs["tile_id"].ne("").any():
        raise ValueError("guided generation starts from noise; make the job table with policy: none")
    for name in jobs["class"].unique():
        guide.label(name)
    batch, jobs = batch or guidance.batch_size(model), jobs.reset_index(drop=True)
    keys = [_key(model, guide, row, settings) for row in jobs.to_dict("records")]
    paths = [run.path("tiles", f"{job}.png") for job in jobs["job"]]
    lacking = lambda i: not all(synthetic.there(path, keys[i], run) for path in (paths[i], synthetic.twin(paths[i])))  # noqa: E731
    failed, clock = {}, time.perf_counter()
    todo = [i for i in range(len(jobs)) if lacking(i)]
    count, reused = len(todo), len(jobs) - len(todo)
    while todo:
        try:
            _make(model, guide, jobs, todo, run, paths, keys, settings, batch, distance, failed)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            torch.cuda.empty_cache()
            say(f"out of memory: going on with {batch} {'images' if batch > 1 else 'image'} at a time")
        todo = [i for i in todo if i not in failed and lacking(i)]
    for i, why in failed.items():
        say(f"{jobs['job'][i]}: {why}; there is no such tile")
    seconds = time.perf_counter() - clock
    run.note(images_made=count - len(failed), images_reused=reused, batch=batch, images_per_s=synthetic.speed(run, count, seconds))
    run.note(failed={jobs["job"][i]: why for i, why in failed.items()})
    there = [i for i in range(len(jobs)) if i not in failed]
    told = functools.partial(_told, settings, guide, batch)
    return synthetic.manifest(run, jobs.iloc[there].reset_index(drop=True), [paths[i] for i in there], tiles, model.tile_px, told)


def _make(model, guide, jobs, todo, run, paths, keys, settings, batch, distance, failed):
    """Make the jobs `todo`, each in the slot its number gives it; those that come to nothing go into `failed`."""
    queues, place = [[] for _ in range(batch * parallel.count(model.device, model.tile_px))], {}
    for i in todo:
        job = guidance.Job(jobs["prompt"][i], guide.label(jobs["class"][i]), int(jobs["seed"][i]), jobs["job"][i])
        queues[int(jobs["number"][i]) % len(queues)].append(job)
        place[job.name] = i
    show, clock = progress.Progress(len(todo)), time.perf_counter()
    with synthetic.Writer() as write:
        for done, result in enumerate(guidance.optimise(model, guide, queues, settings, batch=batch, distance=distance), start=1):
            i = place[result.job.name]
            if result.image is None:
                failed[i] = result.stop
            else:
                way = [float(f"{seen['confidence']:.4g}") for seen in result.path]
                first = float(f"{result.drawn[0]:.4g}") if result.drawn else way[0]
                told = {"guide": way[result.chosen], "guide_plain": first, "draws": len(result.drawn) or 1, "updates": result.chosen}
                told |= {"way": way, "drawn": [float(f"{p:.4g}") for p in result.drawn], "stop": result.stop}
                write(synthetic.twin(paths[i]), result.plain, keys[i], jobs.loc[i], guide=first)
                write(paths[i], result.image, keys[i], jobs.loc[i], **told)
            show({"step": done, "images_per_s": done / (time.perf_counter() - clock), "peak_gb": machine.peak_gb()}, None)


def _key(model, guide, row, settings):
    """What the pixels of one job follow from."""
    versions = [VERSION, *(module.VERSION for module in (guidance, guides, sampling, backbone, classifiers, encoders))]
    asked = [row["lora_sha"], row["token_sha"], row["prompt"], row["seed"], row["class"]]
    return files.digest("guided", versions, model.identity, asked, guide.identity, files.plain(dataclasses.asdict(settings)))


def _told(settings, guide, batch, row, path):
    found = synthetic.facts(path)
    scores = {name: found[name] for name in SCORES}
    used = files.plain(dataclasses.asdict(settings)) | {"policy": row.policy, "guide": guide.identity, "batch": batch}
    used |= policies.asked_of(row)
    return {"method": "guided", "settings": used, "scores": scores}


def score(row, name):
    """One of `SCORES` of a guided tile."""
    return json.loads(row["scores"])[name]


def remarks(rows, run):
    """Plain sentences on a finished set: how many reached what was asked, how many updates and how long a tile took."""
    if not len(rows):
        return ["No tile was made."]
    held = [json.loads(text) for text in rows["scores"]]
    asked, stops = json.loads(rows["settings"].iloc[0])["confidence"], [scores["stop"] for scores in held]
    draws, updates = (np.mean([scores[name] for scores in held]) for name in ("draws", "updates"))
    said = [
        f"{len(rows)} tiles, {draws:.1f} drawn and {updates:.1f} updates for each; the guide's probability rose from "
        f"{np.median([scores['guide_plain'] for scores in held]):.2f} to {np.median([scores['guide'] for scores in held]):.2f} (medians)."
    ]
    if asked:
        said.append(
            f"{stops.count('confidence')} of {len(rows)} reached {asked:g}; what ran out of draws and updates is there all the same."
        )
    broken = [stop for stop in stops if stop not in ("confidence", "updates")]
    said += [f"{len(broken)} ended early: {broken[0]}."] if broken else []
    if rate := run.record["notes"].get("images_per_s"):
        said.append(f"{1 / rate:.1f} s a tile.")
    return said


def described(guide, names):
    """What the guide is, and how well it knows each class that is asked for: a table for reading."""
    facts, settings = guide.classifier.facts, guide.classifier.facts["settings"]
    used = {key: settings.get(key) for key in ("sampler", "loss", "weights", "drw", "coarse", "mixture")}
    recipe = ", ".join(f"{key} {value}" for key, value in used.items() if value and value != "none")
    counts = dict(zip(facts["classes"], facts["class_counts"], strict=True))
    return pd.DataFrame(
        {
            "class": names,
            "training tiles of the guide": [counts[name] for name in names],
            "balanced accuracy on validation tiles": f"{facts['val_balanced_accuracy']:.2f}",
            "encoder": facts["encoder"],
            "trained with": recipe,
        }
    )


# --- what is shown ---------------------------------------------------------------------------------------------------


def paths(rows):
    """How sure the guide was of each picture, one row per picture: tile_id, class, update, confidence, chosen (bool).

    Where several were drawn, these come first, at -n to -1; what the updates began at is among them.
    """
    table = []
    for row in rows.to_dict("records"):
        found = synthetic.facts(row["path"])
        drawn, n = found["drawn"], len(found["drawn"])
        begun = int(np.argmax(drawn)) - n if drawn else 0  # where the way begins
        seen = {k - n: p for k, p in enumerate(drawn)} | {k or begun: p for k, p in enumerate(found["way"])}
        taken = found["updates"] or begun
        table += [
            {"tile_id": row["tile_id"], "class": row["label"], "update": k, "confidence": p, "chosen": k == taken} for k, p in seen.items()
        ]
    return pd.DataFrame(table, columns=["tile_id", "class", "update", "confidence", "chosen"])


def plain(rows):
    """The unguided twins of rows uint8 [N, H, W, 3]: the same seed, prompt and adapter, without an update."""
    return data.pixels(synthetic.twins(rows))


def beside(model, guide, jobs, made, settings):
    """Pictures of finished tiles without the guide and with it, uint8 [N, H, W, 3] each, and the guide's probability of either in words."""
    moved = [f"{score(row, 'guide_plain'):.2f} to {score(row, 'guide'):.2f}" for row in made.to_dict("records")]
    return plain(made), data.pixels(made), moved


def one_tile(show):
    """The way of the first tile of a `Previewer`: frames uint8 [n, H, W, 3], a title, and a caption for each."""
    found = show.way()
    captions = [f"{k}: {p:.2f}{' *' if k == found.chosen else ''}" for k, p in enumerate(found.confidence)]
    return (
        found.frames,
        f"{show.jobs['class'].iloc[0]}: each candidate and update, the guide's probability; * is kept ({found.stop})",
        captions,
    )


def sliders(settings):
    """{name: (value, least, most, step)} of what a panel may turn."""
    return {
        "guidance_scale": (settings.guidance_scale, 1, 12, 0.5),
        "confidence": (settings.confidence, 0, 1, 0.05),
        "updates": (settings.updates, 0, 40, 1),
    }


@dataclass
class Trajectory:
    """The pictures of one image, one per draw and update: frames uint8 [n, H, W, 3], confidence [n], and which was chosen."""

    frames: np.ndarray
    confidence: list
    chosen: int
    stop: str


def trajectory(model, guide, job, settings, *, distance=None, on_frame=None, on_step=None):
    """Every picture on the way of one job, a row of the table.

    Args:
        on_frame: called as `on_frame(update, frame, confidence)`; returning True stops there, and that picture is the chosen one.
        on_step: see `guidance.optimise`.
    """
    frames, sure = [], []

    class Stopped(Exception):
        pass

    def look(_, update, image, confidence):
        frames.append(data.to_uint8(image[None])[0])
        sure.append(confidence)
        if on_frame is not None and on_frame(update, frames[-1], confidence):
            raise Stopped

    asked = guidance.Job(job["prompt"], guide.label(job["class"]), int(job["seed"]), job["job"])
    try:
        (result,) = guidance.optimise(model, guide, [[asked]], settings, distance=distance, watch=look, on_step=on_step)
    except Stopped:
        return Trajectory(np.stack(frames), sure, len(frames) - 1, STOPPED)
    n = len(result.drawn)
    begins = (
        int(np.argmax(result.drawn)) if n == len(frames) else n
    )  # where `path` begins among the frames; after draws, the likeliest again
    return Trajectory(np.stack(frames), sure, begins + result.chosen, result.stop)


class Previewer:
    """`previewer(guidance_scale=.., confidence=.., updates=..)` -> previews.Preview of the first tile of a job table, alone in its batch.

    A way that was gone once is remembered.
    """

    can_end = True  # a way can be ended at any picture

    def __init__(self, model, guide, jobs, settings, distance=None, table=None):
        """table: `table(seed=..)` -> the job table of another run seed, for a slider of seeds; None where there is none."""
        if not len(jobs):
            raise ValueError("the job table is empty: nothing to preview")
        self.model, self.guide, self.settings, self.distance, self.table = model, guide, settings, distance, table
        self.jobs, self.rows, self.gone = jobs.head(1), {None: jobs.head(1)}, {}

    def _row(self, seed):
        """The first row of the job table of a run seed, as a table."""
        if seed not in self.rows:
            if self.table is None:
                raise ValueError("another seed is another job table: give the previewer a `table`")
            self.rows[seed] = self.table(seed=int(seed)).head(1)
        return self.rows[seed]

    def way(self, on_frame=None, on_step=None, seed=None, **changes):
        """The Trajectory under the settings of the table, but for `changes`."""
        settings, row = dataclasses.replace(self.settings, **changes), self._row(seed)
        number = int(row["seed"].iloc[0])
        if (number, settings) not in self.gone:
            how = {"distance": self.distance, "on_frame": on_frame, "on_step": on_step}
            found = trajectory(self.model, self.guide, row.iloc[0], settings, **how)
            if found.stop == STOPPED:  # the beginning of this way is the whole way with fewer updates
                settings = dataclasses.replace(settings, updates=len(found.frames) - 1)
                best = int(np.argmax(found.confidence)) if settings.keep == "best" else len(found.frames) - 1
                found = dataclasses.replace(found, chosen=best)
            self.gone[number, settings] = found
        return self.gone[number, settings]

    def __call__(self, on_step=None, seed=None, **changes):
        """on_step: called as `on_step(k, n, shown)`, n the steps of all pictures there may be, shown a picture uint8 [H, W, 3] or None.

        Where it returns True after a picture, that one is the last; the preview's `ended` then has the number of updates. Not while
        candidates are drawn.
        """
        if on_step is None:
            return self._shown(self.way(seed=seed, **changes), seed)
        settings, taken = dataclasses.replace(self.settings, **changes), [0]
        total = settings.steps * (settings.updates + (settings.candidates if settings.candidates > 1 else 0) + 1)

        def step(k, n, x0):
            taken[0] = min(taken[0] + 1, total)
            on_step(taken[0], total, None)

        def frame(k, image, p):
            return on_step(taken[0], total, image) is True and settings.candidates == 1

        return self._shown(self.way(on_step=step, on_frame=frame, seed=seed, **changes), seed)

    def known(self, seed=None, **changes):
        """The same, where this way was gone before; else None."""
        found = self.gone.get((int(self._row(seed)["seed"].iloc[0]), dataclasses.replace(self.settings, **changes)))
        return None if found is None else self._shown(found, seed)

    def _shown(self, found, seed):
        ended = {"updates": len(found.frames) - 1} if found.stop == STOPPED else {}
        return previews.Preview(found.frames[found.chosen][None], None, self.settings.num_inference_steps, self._row(seed), ended)

    @property
    def can_rest(self):
        """Whether `rest` gives memory back."""
        return self.model.device.type != "cpu"

    def rest(self):
        """Gives the memory of the accelerator back until something is drawn again."""
        self.model.rest()
