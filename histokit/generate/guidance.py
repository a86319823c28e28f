"""Guided generation: the inputs of the denoising are optimised until a classifier sees the class.

LoGex (Mueller & Hein 2024, arXiv:2409.01317) with the optimisation of DiG-IN (Augustin et al. 2024, arXiv:2311.17833): the start latent and
small offsets to the embeddings of the prompt and of the empty prompt at every step follow the gradient of a loss on what the classifier
makes of the last predictions. Before that, several plain samples may be drawn, of which the likeliest is the one to go on with. Batches
have one fixed shape and every image keeps its slot; a finished one makes room for the next of its slot, and no image depends on its
neighbours.

Arrays in, arrays out: `guided_slot` holds the state of one image, `guides` classifiers and losses; `guided` turns jobs into files.
"""

import collections
import contextlib
import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute

from histokit.core import files, parallel
from histokit.diffusion import adapters, backbone, sampling
from histokit.generate import guides
from histokit.generate.guided_slot import Job, Result, Slot
from histokit.generate.guides import Settings
from histokit.vision import encoders

__all__ = ["Job", "Result", "Settings", "optimise"]

VERSION = 2  # and of `guided_slot`
STATELESS = ("DDIMScheduler",)  # whose steps `sampling.denoise` takes


def batch_size(model):
    """Images per batch where nobody asks for another number: 3 on a CPU, whose cores take a batch each, 16 on a GPU."""
    return 16 if model.device.type == "cuda" else 3


def optimise(model, guide, queues, settings, *, batch=None, distance=None, watch=None, on_step=None):
    """Make the images of all queues, and yield a Result for each as it is finished.

    Args:
        model: backbone.Model, with its adapters.
        guide: `guides.Pictures`, or anything with `space` ("pixel" or "latent") that maps pictures or latents to logits.
        queues: lists of Job, one for each slot; the images of a slot follow each other in it.
        settings: Settings.
        batch: slots that share a batch, by default all; several batches go side by side, see `parallel`.
        distance: `distance(x, y)` -> [B] of images in [-1, 1], with gradients, for lpips_weight.
        watch: called as `watch(job, update, image, confidence)` with every picture, image float [3, H, W] in [-1, 1]; pixel guides only.
        on_step: called as `on_step(k, n, x0)` after step k of n of each chain; what it raises ends the work.

    Yields:
        Result, in the order they finish.
    """
    model.need("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    if type(model.scheduler).__name__ not in STATELESS:
        raise ValueError(
            f"the scheduler is a {type(model.scheduler).__name__}; guided generation runs on {', '.join(STATELESS)}, without state"
        )
    if settings.cutouts and getattr(guide, "side", 0) >= model.tile_px:
        raise ValueError(f"cutouts do nothing here: the guide looks at {guide.side} px, and pictures have {model.tile_px}; leave them out")
    if settings.compile and model.device.type == "cpu":
        raise ValueError("compile gains nothing on a CPU and takes minutes; leave it out")
    if settings.lpips_weight and distance is None:
        raise ValueError("lpips_weight needs LPIPS weights, a file; name it, or leave the weight out")
    if settings.compile:
        model = dataclasses.replace(model, unet=torch.compile(model.unet, dynamic=False))
    batch = batch or len(queues)
    shares = [queues[start : start + batch] for start in range(0, len(queues), batch)]
    full = [share + [[]] * (batch - len(share)) for share in shares if any(share)]  # one shape, whatever there is to make
    with model.alone(), adapters.merged(model):  # a panel waits meanwhile
        own = dataclasses.replace(model, lock=contextlib.nullcontext())  # the batches are threads of one user
        yield from parallel.merged([_Batch(own, guide, share, settings, distance, watch, on_step).run() for share in full])


class _Scored(NamedTuple):
    """What the guide made of the pictures of a batch; `slopes` are the gradients of the losses by the predictions, [B, 4, h, w] each."""

    confidence: torch.Tensor  # [B], of the final picture
    weighted: torch.Tensor  # [B], over the predictions looked at
    loss: torch.Tensor  # [B]
    slopes: list
    images: torch.Tensor | None  # [B, 3, H, W] near [-1, 1]; None for a guide of latents


class _Batch:
    def __init__(self, model, guide, queues, settings, distance, watch, on_step=None):
        self.model, self.guide, self.settings, self.distance = model, guide, settings, distance
        self.watch, self.on_step = watch, on_step
        self.queues = [collections.deque(queue) for queue in queues]
        self.ready = [collections.deque() for _ in queues]  # (job, latent, generator) of images whose plain beginning is sampled
        self.timesteps = sampling.schedule(model.scheduler, settings.num_inference_steps)
        self.begin = len(self.timesteps) - settings.steps  # steps before those that are optimised
        self.context, self.uncond, self.spare = {}, backbone.embed(model, [""])[0], None
        self.others = [guide.label(name) for name in settings.look_alikes]
        if any(set(self.others) == {job.target} for queue in queues for job in queue):
            raise ValueError(f"look_alikes names only {settings.look_alikes[0]!r}, the class asked for; name those it is mistaken for")
        self.weights = settings.weights().tolist()
        small = model.device.type == "cuda" and model.tile_px <= 256
        self.chunk = 2 if small else 1  # pictures decoded at a time: the decoder's activations are the largest

    def run(self):
        places = range(len(self.queues))
        self.slots = [self._next(k) for k in places]
        while any(slot is not None for slot in self.slots):
            learns = [slot is not None and slot.learns for slot in self.slots]
            with torch.set_grad_enabled(any(learns)):
                z, views, finite = self._chain()
            scored = self._score(views, learns)
            ended = {k: self._see(k, z, scored, finite) for k in places if self.slots[k] is not None}
            if any(learns[k] and not why for k, why in ended.items()):
                torch.autograd.backward(views, scored.slopes)
            ended |= {k: self.slots[k].go_on() for k, why in ended.items() if not why}
            del z, views, scored  # before the next images' plain beginning is sampled
            for k, why in ended.items():
                if why:
                    yield self._result(self.slots[k], why)
                    self.slots[k] = self._next(k)

    # ---- which image comes next

    def _next(self, k):
        """The next image of slot k, None where its queue is empty."""
        if not self.ready[k] and self.queues[k]:
            self._prepare()
        return Slot(*self.ready[k].popleft(), self.uncond.shape, self.settings) if self.ready[k] else None

    @torch.no_grad()
    def _prepare(self):
        """Start latents of the next image of every slot; where only the last steps are optimised, what the plain chain makes of them."""
        jobs = [queue.popleft() if queue else None for queue in self.queues]
        some = next(job for job in jobs if job is not None)
        generators = [torch.Generator().manual_seed((job or some).seed) for job in jobs]
        shape = (self.model.unet.config.in_channels, self.model.latent_px, self.model.latent_px)
        z = sampling.noise(generators, shape, self.model.device).to(self.model.dtype)
        if self.begin:
            cond = torch.stack([self._cond((job or some).prompt) for job in jobs])
            predict = sampling.guided(self.model, cond, self.uncond[None], self.settings.guidance_scale)
            z = sampling.denoise(predict, z, self.model.scheduler, self.timesteps[: self.begin], until=self.timesteps[self.begin])
        for k, job in enumerate(jobs):
            if job is not None:
                self.ready[k].append((job, z[k], generators[k]))
        if self.spare is None:
            self.spare = Slot(some, z[jobs.index(some)], torch.Generator(), self.uncond.shape, self.settings).still()

    def _cond(self, prompt):
        if prompt not in self.context:  # one at a time: no neighbours
            self.context[prompt] = backbone.embed(self.model, [prompt])[0]
        return self.context[prompt]

    # ---- from the variables to pictures

    def _chain(self):
        """The final latents [B, 4, h, w], a list of the predictions that are looked at, and which were finite after each step [n, B]."""
        settings, filled = self.settings, [slot or self.spare for slot in self.slots]
        cond = torch.stack([self._cond(slot.job.prompt) for slot in filled])
        uncond = self.uncond.expand(len(filled), -1, -1)
        moved = {name: torch.stack([slot.offset(name) for slot in filled]) for name in settings.acting if name != "latent"}  # [B, n, L, D]

        def noise(z, t, i, c, u):
            return sampling.guided(self.model, c, u, settings.guidance_scale)(z, t, i)

        def predict(z, t, i):
            c, u = (base + moved[name][:, i] if name in moved else base for name, base in (("cond", cond), ("uncond", uncond)))
            if settings.checkpoint and torch.is_grad_enabled():  # the other kind hooks every tensor, which costs as much as a small UNet
                return recompute(noise, z, t, i, c, u, use_reentrant=True, preserve_rng_state=False)
            return noise(z, t, i, c, u)

        views, finite = [], []

        def look(i, t, z, x0):
            if self.on_step is not None:
                self.on_step(i + 1, settings.steps, x0.detach())
            finite.append(torch.isfinite(z.detach()).flatten(1).all(dim=1))
            if settings.steps - settings.loss_steps <= i < settings.steps - 1:
                views.append(x0)

        z = torch.stack([slot.latent for slot in filled])
        z = sampling.denoise(predict, z, self.model.scheduler, self.timesteps[self.begin :], on_step=look)
        return z, [*views, z], torch.stack(finite)

    # ---- from pictures to slopes

    def _score(self, views, learns):
        """What the guide makes of each prediction. Pictures are decoded a few at a time, each with its own backward pass."""
        found = {name: torch.zeros(len(self.slots), dtype=torch.float64) for name in ("confidence", "weighted", "loss")}
        slopes, images = [], []
        for j, (view, weight) in enumerate(zip(views, self.weights, strict=True)):
            last, slope = j == len(views) - 1, torch.zeros_like(view)
            for start in range(0, len(view), self.chunk):
                rows = range(start, min(start + self.chunk, len(view)))
                shares = self._shares(rows, weight, last).to(view)
                if not shares.any():
                    continue
                learning = any(learns[rows.start : rows.stop])
                x = view[rows.start : rows.stop].detach().requires_grad_(learning)
                with torch.set_grad_enabled(learning):
                    image = self._decode(x) if self.guide.space == "pixel" else None
                    p, loss = self._judge(rows, j, x if image is None else image)
                    loss = shares * loss + (self._held_back(rows, x, image) if last else 0.0)
                if learning:
                    (slope[rows.start : rows.stop],) = torch.autograd.grad(loss.sum(), x)
                for name, value in (("weighted", shares * p), ("loss", loss), *([("confidence", p)] if last else [])):
                    found[name][rows.start : rows.stop] += value.detach().double().cpu()
                if last and image is not None:
                    images.append(image.detach())
            slopes.append(slope)
        return _Scored(**found, slopes=slopes, images=torch.cat(images) if images else None)

    def _shares(self, rows, weight, last):
        """Weights [b] of a prediction in the loss of some slots; while an image is being drawn, the picture itself is all that counts."""
        drawing = [self.slots[k] is not None and self.slots[k].drawing for k in rows]
        return torch.tensor([float(last) if alone else weight for alone in drawing])

    def _decode(self, x):
        """Pictures [b, 3, H, W] near [-1, 1], in the autoencoder's own precision."""
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model.vae.decode(x.to(self.model.dtype) / self.model.scaling).sample

    def _judge(self, rows, j, shown):
        """Probability of the target [b] as things are, and the loss [b], over cutouts where there are any."""
        settings, slots = self.settings, [self.slots[k] or self.spare for k in rows]
        targets, loss = torch.tensor([slot.job.target for slot in slots], device=shown.device), guides.LOSSES[settings.loss]
        if not settings.cutouts:
            logits = self.guide(shown)
            return guides.confidence(logits.detach(), targets), loss(logits, targets, self.others)
        with torch.no_grad():
            p = guides.confidence(self.guide(shown), targets)
        seeds = [files.seed(slot.job.seed, "cutouts", len(slot.path), j) for slot in slots]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        crops = guides.cutouts(shown, settings.cutouts, generators, side=self.guide.side, noise=settings.cutout_noise)
        losses = loss(self.guide(crops), targets.repeat_interleave(settings.cutouts), self.others)
        return p, losses.view(len(slots), settings.cutouts).mean(dim=1)

    def _held_back(self, rows, x, image):
        """The regularisers [b]: how far a picture has moved from the plain sample."""
        settings, total = self.settings, torch.zeros(len(rows), device=x.device)
        if not (settings.pixel_weight or settings.latent_weight or settings.lpips_weight):
            return total
        slots = [self.slots[k] or self.spare for k in rows]
        plain = torch.stack([x[i].detach() if slot.plain is None else slot.plain for i, slot in enumerate(slots)])
        if settings.latent_weight:
            total = total + settings.latent_weight * (x - plain).square().mean(dim=(1, 2, 3))
        if settings.pixel_weight or settings.lpips_weight:
            with torch.no_grad():
                before = self._decode(plain).clamp(-1, 1)
            now = encoders.clamp_through(image if image is not None else self._decode(x), -1.0, 1.0)
            total = total + settings.pixel_weight * (now - before).square().mean(dim=(1, 2, 3))
            if settings.lpips_weight:
                total = total + settings.lpips_weight * self.distance(now, before)
        return total

    # ---- what is noted, and what is made of it

    def _see(self, k, z, scored, finite):
        """Take note of the picture in slot k; returns why its image is finished, "" if it is not."""
        slot = self.slots[k]
        if not finite[:, k].all():
            step = int((~finite[:, k]).nonzero()[0]) + self.begin + 1
            return f"latent not finite at update {len(slot.path)}, step {step} of {self.settings.num_inference_steps}"
        numbers = [float(values[k]) for values in (scored.confidence, scored.weighted, scored.loss)]
        if not np.isfinite(numbers).all():
            return f"loss not finite at update {len(slot.path)}"
        slot.see(z[k].detach(), *numbers)
        if self.watch is not None and scored.images is not None:
            self.watch(slot.job, len(slot.path) - 1, scored.images[k], numbers[0])
        return slot.ended()

    def _result(self, slot, why):
        if slot.best is None:
            return Result(slot.job, stop=why, drawn=slot.drawn)
        chosen, z = slot.best
        plain = backbone.decode(self.model, slot.plain[None], 1)[0]
        image = plain if z is slot.plain else backbone.decode(self.model, z[None], 1)[0]
        return Result(slot.job, image, plain, slot.path, slot.drawn, chosen, why)
