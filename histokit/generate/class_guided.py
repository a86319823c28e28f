"""Tiles of a class from a model that knows no class: a classifier of noisy latents steers each denoising step.

Dhariwal & Nichol (2021), arXiv:2105.05233, algorithm 2, in the latent space of HistoDiffusion (arXiv:2308.04020). Unlike `guided`, which
optimises the inputs of a whole chain against a classifier of pictures, this adds one gradient of a small network to every step, so a tile
takes little longer than a plain one. A job table in, one picture per row out; nothing here judges a tile.
"""

import dataclasses
import functools
import json
import time
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch

from histokit.core import files, machine, parallel, progress
from histokit.diffusion import backbone, sampling
from histokit.generate import previews, synthetic
from histokit.vision import latent_classifiers

VERSION = 1
LEAST = 1e-4  # share of a picture's variance at a step below which a push on the noise would move the picture a hundredfold
GUIDES = ("zt", "z0")


@dataclass(frozen=True)
class Settings:
    """How a sample is steered.

    Args:
        class_scale: weight of the classifier's gradient; 0 is plain sampling, bit for bit.
        guidance_scale: classifier-free guidance weight of the prompt, 1 for none.
        num_inference_steps, eta: of DDIM.
        interval: shares of the noise schedule between which the classifier is asked, (0, 1) for all of it.
        cap: largest length of the push in that of the predicted noise, sample by sample; 0 for none.
        guide_on: `zt` asks about the noisy latent at its timestep; `z0` about the clean latent predicted from it at timestep 0, for a
            classifier that was trained without noise. Its slope carries 1 / sqrt(alphas_cumprod): set a cap or an interval.
    """

    class_scale: float = 4.0
    guidance_scale: float = 1.0
    num_inference_steps: int = 25
    eta: float = 0.0
    interval: tuple = (0.0, 1.0)
    cap: float = 0.0
    guide_on: str = "zt"

    def __post_init__(self):
        object.__setattr__(self, "interval", tuple(self.interval))
        if self.guide_on not in GUIDES:
            raise ValueError(f"guide_on is {self.guide_on!r}; use zt (the noisy latent) or z0 (the clean one predicted from it)")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"interval is {list(self.interval)}; expected two shares of the noise schedule, as [0.0, 0.8]")
        for name, least in (("class_scale", 0), ("cap", 0), ("eta", 0), ("num_inference_steps", 1), ("guidance_scale", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")

    @classmethod
    def of(cls, given):
        """Settings from a dict; ValueError for a name that is none."""
        known = [one.name for one in fields(cls)]
        strange = [name for name in given if name not in known]
        if strange:
            raise ValueError(f"latent guidance has no setting {strange[0]!r}; expected some of {', '.join(known)}")
        return cls(**given)


def steered(predict, classifier, targets, scheduler, settings, watch=None):
    """`predict` with the classifier's push: eps - scale sqrt(1 - a) grad log p(target | z_t); Dhariwal & Nichol (2021), algorithm 2.

    The gradient of each sample is its own, since the classifier normalises by group. A sample whose push is not finite goes on without it.

    Args:
        predict: see `sampling.denoise`.
        classifier: `latent_classifiers.LatentClassifier`.
        targets: [B] int64.
        watch: called as `watch(i, ratio, p, finite)` after each step at which the classifier is asked: [B] length of the push over that of
            the noise before the cap, [B] probability of the target, [B] bool.
    """
    low, high = (share * scheduler.config.num_train_timesteps for share in settings.interval)

    def push(z, t, eps, a):
        with torch.enable_grad():
            x = z.detach().float().requires_grad_()
            if settings.guide_on == "zt":
                asked, at = x, t
            else:
                asked, at = (x - (1 - a) ** 0.5 * eps.detach().float()) / a**0.5, torch.zeros_like(t)
            log_p = parallel.rows(lambda x, y: classifier(x, at).log_softmax(dim=1).gather(1, y[:, None])[:, 0], asked, targets)
            (slope,) = torch.autograd.grad(log_p.sum(), x)
        return (settings.class_scale * (1 - a) ** 0.5 * slope).to(eps), log_p.detach().exp()

    def of(z, t, i):
        eps, a = predict(z, t, i), sampling.level(scheduler, t)
        if not settings.class_scale or not low <= float(t) <= high or a < LEAST:
            return eps
        by, p = push(z, t, eps, a)
        ratio = by.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)
        finite = torch.isfinite(ratio) & torch.isfinite(p) & torch.isfinite(by).flatten(1).all(dim=1)
        if watch is not None:
            watch(i, ratio, p, finite)
        if settings.cap:
            by = by * (settings.cap / ratio.clamp(min=settings.cap))[:, None, None, None]
        return eps - torch.where(finite[:, None, None, None], by, 0.0)

    return of


# --- a set of tiles --------------------------------------------------------------------------------------------------

SCORES = ("guide", "push")  # of a tile: probability of its class by the classifier in the end, mean length of the push in that of the noise


@dataclass
class Walk:
    """What was seen on the way of one image: at each step asked the push over the noise and the probability of the class; the end."""

    timestep: list
    ratio: list
    p: list
    end: float = float("nan")  # probability of the class of the finished latent, at timestep 0
    broken: int = 0  # step, counted from 1, at which latent or push was not finite; 0 for none


def load_guide(run, step, model, classes):
    """The classifier that a 21_latent_classifier step trained, for this model and data set; ValueError where it learned from others."""
    found = latent_classifiers.load(run.parent(step), run.device)
    latent_classifiers.refuse_stranger(found, model.latent_space, classes, f"the latent classifier of {step}")
    return found


def render(model, guide, jobs, run, tiles, settings, *, batch=None, say=print):
    """Make every tile of the job table that is not there yet, and return the manifest rows of all of them.

    An interrupted run goes on where it was. A tile whose latent or push was not finite is named with its step, and has no row.

    Args:
        model: backbone.Model, with the adapters of the job table.
        guide: latent_classifiers.LatentClassifier, from `load_guide`.
        jobs: `policies.job_table` of policy none.
        batch: images per batch, by default `sampling.batch_size(model)`; job i has slot i % batch.
        say: called with a line when something went wrong.
    """
    if jobs["tile_id"].ne("").any():
        raise ValueError("latent guidance starts from noise; make the job table with policy: none")
    for name in jobs["class"].unique():
        guide.label(name)
    batch, jobs = batch or sampling.batch_size(model), jobs.reset_index(drop=True)
    keys = [_key(model, guide, row, settings, batch) for row in jobs.to_dict("records")]
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
            for k, walk in enumerate(walks):
                walk.timestep.append(int(timesteps[i]))
                walk.ratio.append(float(f"{float(ratio[k]):.4g}"))
                walk.p.append(float(f"{float(p[k]):.4g}"))
                walk.broken = walk.broken or (0 if finite[k] else i + 1)

        return steered(predict, guide, targets[torch.tensor(places)], model.scheduler, settings, watch)

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


def _key(model, guide, row, settings, batch):
    """What the pixels of one job follow from."""
    versions = [VERSION, *(module.VERSION for module in (sampling, backbone, latent_classifiers))]
    asked = [row["lora_sha"], row["token_sha"], row["prompt"], row["seed"], row["class"]]
    known = latent_classifiers.identity(guide) if settings.class_scale else ""
    return files.digest("class_guided", versions, model.identity, asked, known, files.plain(dataclasses.asdict(settings)))


def _told(settings, guide, batch, row, path):
    found = synthetic.facts(path)
    used = files.plain(dataclasses.asdict(settings)) | {"policy": row.policy, "guide": latent_classifiers.identity(guide), "batch": batch}
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

    def __init__(self, model, guide, jobs, settings, batch=None, table=None):
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
        if (seed, settings) not in self.drawn:
            self.drawn[seed, settings] = _make(self.model, self.guide, rows, settings, self.batch, on_step)[0]
        return previews.Preview(self.drawn[seed, settings], None, settings.num_inference_steps, rows)

    def known(self, seed=None, **changes):
        """The same, where these settings were drawn before; else None."""
        return self(seed=seed, **changes) if (seed, dataclasses.replace(self.settings, **changes)) in self.drawn else None

    @property
    def can_rest(self):
        """Whether `rest` gives memory back."""
        return self.model.device.type != "cpu"

    def rest(self):
        """Gives the memory of the accelerator back until something is drawn again."""
        self.model.rest()
