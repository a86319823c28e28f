"""Tiles of a class from a model that knows no class: a classifier of noisy latents steers each denoising step.

HistoDiffusion (arXiv:2308.04020). Unlike `guided`, which optimises the inputs of a whole chain against a classifier of pictures, this adds
one gradient of a small network to every step (`latent_guidance`), so a tile takes little longer than a plain one. A job table in, one
picture per row out; nothing here judges a tile.
"""

import dataclasses
import functools
import json
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from histokit.core import files, machine, progress
from histokit.diffusion import backbone, sampling
from histokit.generate import latent_guidance, policies, previews, synthetic
from histokit.generate.latent_guidance import Settings
from histokit.tiles import data
from histokit.vision import latent_classifiers

VERSION = 1

SCORES = ("guide", "push")  # of a tile: probability of its class by the classifier in the end, mean length of the push in that of the noise


@dataclass
class Walk:
    """What was seen on the way of one image: at each step asked the push over the noise and the probability of the class; the end."""

    timestep: list
    ratio: list
    p: list
    end: float = float("nan")  # probability of the class of the finished latent, at timestep 0
    broken: int = 0  # step, counted from 1, at which latent or push was not finite; 0 for none


OTHERS = ("candidates", "updates", "confidence", "lpips", "captions", "budget")  # parameters of 04 that are no settings of this way


def settings_of(asked):
    """Settings from the parameters of 04, a dict; those of other ways are left out."""
    return Settings.of({name: value for name, value in asked.items() if name not in OTHERS})


def warnings(guide, settings):
    """What should be known before a tile is made, in sentences."""
    if guide.facts["noise"] == "none" and settings.guide_on == "zt" and settings.class_scale:
        return [
            "THE CLASSIFIER HAS NEVER SEEN NOISE and is asked about noisy latents, as the released code of the paper does: what it says "
            "there means little. Train it with noise: uniform, or ask it about clean latents, options: {guide_on: z0, cap: 0.2}."
        ]
    return []


def load_guide(run, step, classes, arm="", model=None):
    """The classifier that a 21_latent_classifier step trained, for this model and data set; ValueError where it learned from others."""
    if arm:
        raise ValueError(f"guide_arm {arm!r} is an arm of a 06_classifier; a latent classifier has none, leave it out")
    found = latent_classifiers.load(run.parent(step), run.device)
    latent_classifiers.refuse_stranger(found, model.latent_space, classes, f"the latent classifier of {step}")
    return found


def render(model, guide, jobs, run, tiles, settings, *, batch=None, distance=None, say=print):
    """Make every tile of the job table that is not there yet, and return the manifest rows of all of them.

    An interrupted run goes on where it was. A tile whose latent or push was not finite is named with its step, and has no row.

    Args:
        model: backbone.Model, with the adapters of the job table.
        guide: latent_classifiers.LatentClassifier, from `load_guide`.
        jobs: `policies.job_table` of policy none.
        batch: images per batch, by default `sampling.batch_size(model)`; job i has slot i % batch.
        distance: not looked at; `guided` takes one.
        say: called with a line when something went wrong.
    """
    if jobs["tile_id"].ne("").any():
        raise ValueError("latent guidance starts from noise; make the job table with policy: none")
    for name in jobs["class"].unique():
        guide.label(name)
    batch, jobs = batch or sampling.batch_size(model), jobs.reset_index(drop=True)
    keys = [_key(model, guide, row, settings) for row in jobs.to_dict("records")]
    paths = [run.path("tiles", f"{job}.png") for job in jobs["job"]]
    missing = {i for i, (path, key) in enumerate(zip(paths, keys, strict=True)) if not synthetic.there(path, key, run)}
    failed, count, clock, show = {}, 0, time.perf_counter(), progress.Progress(len(missing))
    with synthetic.Writer() as write:
        for block in _blocks(jobs, batch):
            if missing.isdisjoint(block):
                continue
            images, walks = _make(model, guide, jobs.loc[block], settings, batch)
            write.settle()
            for i, image, walk in zip(block, images, walks, strict=True):
                if walk.broken:
                    failed[i] = f"latent or push not finite at step {walk.broken} of {settings.num_inference_steps}"
                elif i in missing:
                    write(paths[i], image, keys[i], jobs.loc[i], **dataclasses.asdict(walk))
            count += len(missing & set(block))
            show({"step": count, "images_per_s": count / (time.perf_counter() - clock), "peak_gb": machine.peak_gb()}, None)
    for i, why in failed.items():
        say(f"{jobs['job'][i]}: {why}; there is no such tile. Lower class_scale, or set a cap")
    seconds = time.perf_counter() - clock
    run.note(images_made=count - len(failed), images_reused=len(jobs) - len(missing), images_per_s=synthetic.speed(run, count, seconds))
    run.note(batch=batch, failed={jobs["job"][i]: why for i, why in failed.items()})
    there = [i for i in range(len(jobs)) if i not in failed]
    told = functools.partial(_told, settings, guide, batch)
    return synthetic.manifest(run, jobs.iloc[there].reset_index(drop=True), [paths[i] for i in there], tiles, model.tile_px, told)


def _blocks(jobs, batch):
    """Index labels of the jobs that share a batch: `number // batch` of a class, whatever else is to be made."""
    return [block.index.tolist() for _, block in jobs.groupby(["class", jobs["number"] // batch], sort=False)]


def _make(model, guide, jobs, settings, batch, on_step=None):
    """Images uint8 [n, H, W, 3] of the n jobs of one block, each in the slot its number gives it, and the Walk of each."""
    rows = jobs.to_dict("records")
    slots = [rows[0]] * batch  # a slot nobody needs repeats the first job
    for row in rows:
        slots[row["number"] % batch] = row
    last = max(row["number"] % batch for row in rows) + 1
    targets = torch.tensor([guide.label(row["class"]) for row in slots[:last]], device=model.device)
    walks, timesteps = [Walk([], [], []) for _ in range(batch)], sampling.schedule(model.scheduler, settings.num_inference_steps)

    def steer(predict, places):
        def watch(i, ratio, p, finite):
            for walk, r, sure, fine in zip(walks, ratio.tolist(), p.tolist(), finite.tolist(), strict=True):
                walk.timestep.append(int(timesteps[i]))
                walk.ratio.append(float(f"{r:.4g}"))
                walk.p.append(float(f"{sure:.4g}"))
                walk.broken = walk.broken or (0 if fine else i + 1)

        return latent_guidance.steered(predict, guide, targets[torch.tensor(places)], model.scheduler, settings, watch)

    def look(k, n, x0):
        for walk, fine in zip(walks, torch.isfinite(x0).flatten(1).all(dim=1).tolist(), strict=True):
            walk.broken = walk.broken or (0 if fine else k)
        if k == n:
            p = guide(x0[:last].float(), 0).softmax(dim=1).gather(1, targets[:, None])[:, 0]
            for walk, end in zip(walks, p.tolist(), strict=False):
                walk.end = float(f"{end:.4g}")
        if on_step is not None:
            on_step(k, n, x0)

    images = sampling.sample(
        model, [row["prompt"] for row in slots[:last]], [torch.Generator().manual_seed(int(row["seed"])) for row in slots[:last]],
        guidance_scale=settings.guidance_scale, num_inference_steps=settings.num_inference_steps, eta=settings.eta, batch=batch,
        steer=steer, on_step=look,
    )  # fmt: skip
    place = [row["number"] % batch for row in rows]
    return images[place], [walks[k] for k in place]


def _key(model, guide, row, settings):
    """What the pixels of one job follow from."""
    versions = [VERSION, *(module.VERSION for module in (latent_guidance, sampling, backbone, latent_classifiers))]
    asked = [row["lora_sha"], row["token_sha"], row["prompt"], row["seed"], row["class"]]
    known = latent_classifiers.identity(guide)  # also without a push: what it says in the end is kept with the tile
    return files.digest("class_guided", versions, model.identity, asked, known, files.plain(dataclasses.asdict(settings)))


def _told(settings, guide, batch, row, path):
    found = synthetic.facts(path)
    used = files.plain(dataclasses.asdict(settings)) | {"policy": row.policy, "guide": latent_classifiers.identity(guide), "batch": batch}
    used |= policies.asked_of(row)
    push = float(f"{np.mean(found['ratio']):.4g}") if found["ratio"] else 0.0
    return {"method": "class_guided", "settings": used, "scores": {"guide": found["end"], "push": push}}


def tried(model, guide, jobs, settings, *, batch=None):
    """Images uint8 [N, H, W, 3] of the N jobs and the Walk of each, under other settings; nothing is written."""
    batch, jobs = batch or sampling.batch_size(model), jobs.reset_index(drop=True)
    images, walks = [None] * len(jobs), [None] * len(jobs)
    for block in _blocks(jobs, batch):
        for i, image, walk in zip(block, *_make(model, guide, jobs.loc[block], settings, batch), strict=True):
            images[i], walks[i] = image, walk
    return np.stack(images), walks


def walks(rows):
    """What was seen on the way of finished tiles, one row per tile and step: tile_id, class, timestep, ratio, p."""
    table = []
    for row in rows.to_dict("records"):
        found = synthetic.facts(row["path"])
        steps = zip(found["timestep"], found["ratio"], found["p"], strict=True)
        table += [{"tile_id": row["tile_id"], "class": row["label"], "timestep": t, "ratio": r, "p": p} for t, r, p in steps]
    return pd.DataFrame(table, columns=["tile_id", "class", "timestep", "ratio", "p"])


def described(guide, names):
    """What the guide is, and how well it knows the classes: a table for reading."""
    facts, curve = guide.facts, pd.DataFrame(guide.facts["curve"])
    known = [f"{curve['accuracy'].iloc[0]:.2f}", f"{curve['accuracy'].mean():.2f}"] if len(curve) else ["not validated"] * 2
    rows = {"class": names, "accuracy with little noise": known[0], "over the whole schedule": known[1]}
    return pd.DataFrame(rows | {"chance": f"{1 / len(guide.classes):.2f}", "learned from noise": facts["noise"], "size": facts["size"]})


def beside(model, guide, jobs, made, settings):
    """Pictures of finished tiles without the push and with it, uint8 [N, H, W, 3] each, and the classifier's probability in words."""
    own = jobs[jobs["job"].isin([name.partition("/")[2] for name in made["tile_id"]])]
    bare, _ = tried(model, guide, own, dataclasses.replace(settings, class_scale=0.0))
    return bare, data.pixels(made, model.tile_px), [f"{json.loads(text)['guide']:.2f}" for text in made["scores"]]


def one_tile(show, scales=(0.0, 0.5, 1.0, 2.0, 4.0)):
    """The first tile of a `Previewer` under several scales, shares of its own: frames uint8 [n, H, W, 3], a title, a caption for each."""
    asked = [round((show.settings.class_scale or 4.0) * share, 2) for share in scales]
    how = [dataclasses.replace(show.settings, class_scale=scale) for scale in asked]
    frames = [tried(show.model, show.guide, show.jobs.head(1), one, batch=1)[0][0] for one in how]
    title = f"{show.jobs['class'].iloc[0]}: one tile, the push of the classifier stronger to the right"
    return np.stack(frames), title, [f"class_scale {scale:g}" for scale in asked]


def sliders(settings):
    """{name: (value, least, most, step)} of what a panel may turn."""
    return {
        "class_scale": (settings.class_scale, 0, 20, 0.5),
        "num_inference_steps": (settings.num_inference_steps, 5, 100, 5),
    }


def remarks(rows, run):
    """Plain sentences on a finished set: how sure the classifier is of its own tiles, how hard it pushed, how long a tile took."""
    if not len(rows):
        return ["No tile was made."]
    held, asked = [json.loads(text) for text in rows["scores"]], json.loads(rows["settings"].iloc[0])
    push, end = np.median([scores["push"] for scores in held]), np.median([scores["guide"] for scores in held])
    said = [
        f"{len(rows)} tiles; the push was {push:.0%} of the predicted noise and the classifier gives their class {end:.2f} in the end "
        "(medians). It steered, so that is no proof: 05_select asks another judge."
    ]
    if not asked["class_scale"]:
        said = [f"{len(rows)} tiles without a push (class_scale 0)."]
    if failed := run.record["notes"].get("failed"):
        said.append(f"{len(failed)} came to nothing: {next(iter(failed.values()))}.")
    if rate := run.record["notes"].get("images_per_s"):
        said.append(f"{1 / rate:.1f} s a tile.")
    return said


# --- previews --------------------------------------------------------------------------------------------------------


class Previewer:
    """`previewer(class_scale=.., eta=..)` -> previews.Preview of the first batch of a job table under other settings.

    The batch has the shape, seeds and neighbours it will have in `render`. What was drawn once is remembered.
    """

    def __init__(self, model, guide, jobs, settings, distance=None, table=None, batch=None):
        """table: `table(seed=..)` -> the job table of another run seed, for a slider of seeds; None where there is none."""
        if not len(jobs):
            raise ValueError("the job table is empty: nothing to preview")
        self.model, self.guide, self.settings, self.table = model, guide, settings, table
        self.batch, self.drawn = batch or sampling.batch_size(model), {}
        self.jobs = self._first(jobs)
        self.tables = {None: self.jobs}

    def _first(self, jobs):
        jobs = jobs.reset_index(drop=True)
        return jobs.loc[_blocks(jobs, batch=self.batch)[0]]

    def _rows(self, seed):
        if seed not in self.tables:
            if self.table is None:
                raise ValueError("another seed is another job table: give the previewer a `table`")
            self.tables[seed] = self._first(self.table(seed=int(seed)))
        return self.tables[seed]

    def __call__(self, on_step=None, seed=None, **changes):
        """on_step: as in `sampling.sample`."""
        rows, settings = self._rows(seed), dataclasses.replace(self.settings, **changes)
        key = int(rows["seed"].iloc[0]), settings
        if key not in self.drawn:
            self.drawn[key] = _make(self.model, self.guide, rows, settings, self.batch, on_step)[0]
        return previews.Preview(self.drawn[key], None, settings.num_inference_steps, rows)

    def known(self, seed=None, **changes):
        """The same, where these settings were drawn before; else None."""
        if seed is not None and seed not in self.tables:  # whether it is known would take a while to find out
            return None
        key = int(self._rows(seed)["seed"].iloc[0]), dataclasses.replace(self.settings, **changes)
        return self(seed=seed, **changes) if key in self.drawn else None

    @property
    def can_rest(self):
        """Whether `rest` gives memory back."""
        return self.model.device.type != "cpu"

    def rest(self):
        """Gives the memory of the accelerator back until something is drawn again."""
        self.model.rest()
