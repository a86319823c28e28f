"""One image of guided generation: what is optimised of it, the candidates that are drawn first, its best picture so far.

A slot is asked for its latent and its offsets, told what became of them (`see`), and moved towards the next picture (`go_on`) until it has
`ended`. Nothing here runs a model: `guidance` does, for the slots of a batch together, and its VERSION counts for both.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from histokit.core import files
from histokit.diffusion import sampling


@dataclass(frozen=True)
class Job:
    """One image to make: its prompt, its target's label id, its seed, and a name for messages."""

    prompt: str
    target: int
    seed: int
    name: str = ""


@dataclass
class Result:
    """What became of one job. `path` holds one dict per update: confidence (of the final picture), weighted, loss.

    Where several plain samples were drawn, `drawn` holds the confidence of each, and `path` begins at the likeliest; `plain` is the first.
    """

    job: Job
    image: np.ndarray | None = None  # uint8 [H, W, 3]; None where the first picture was not finite already
    plain: np.ndarray | None = None  # uint8 [H, W, 3], the sample without guidance
    path: list = field(default_factory=list)
    drawn: list = field(default_factory=list)
    chosen: int = 0  # number of updates behind `image`
    stop: str = ""  # confidence, updates, or what was not finite and where

    @property
    def updates(self):
        return max(0, len(self.path) - 1)


class Slot:
    """The image that is being made: its variables, their optimiser, its best picture so far.

    Args:
        job: Job.
        start: start latent [4, h, w]; where only the last steps are optimised, what the plain steps before them made of it.
        generator: the image's own, for the factors of its offsets.
        shape: (L, D) of an embedded prompt.
        settings: Settings.
    """

    def __init__(self, job, start, generator, shape, settings):
        self.job, self.settings = job, settings
        self.path, self.best, self.plain = [], None, None
        self.drawn, self.likeliest, self.drawing = [], None, settings.candidates > 1
        n, (length, width), rank = settings.steps if settings.offsets == "per_step" else 1, shape, settings.offset_rank
        self.latent, self.norm, self.offsets = start.clone().requires_grad_("latent" in settings.acting), start.norm(), {}
        for name in settings.acting:
            if name == "latent":
                continue
            if rank:  # as in LoRA: one factor random, the other zero, so that the offset starts at zero
                left, right = torch.zeros(n, length, rank), torch.randn(n, rank, width, generator=generator) / rank**0.5
                self.offsets[name] = [left.to(start).requires_grad_(), right.to(start).requires_grad_()]
            else:
                self.offsets[name] = [torch.zeros(n, length, width).to(start).requires_grad_()]
        groups = [{"params": [self.latent], "lr": settings.latent_lr}] if "latent" in settings.acting else []
        groups += [{"params": held, "lr": settings.lr} for held in self.offsets.values()]
        self.optimiser = torch.optim.Adam(groups)

    def offset(self, name):
        """Offset [steps, L, D] to the embedding `name`, cond or uncond, one of those that are optimised."""
        held = self.offsets[name]
        whole = held[0] if len(held) == 1 else held[0] @ held[1]
        return whole.expand(self.settings.steps, -1, -1)

    def still(self):
        """Makes this image one that is never changed: it stands where there is none left to make."""
        for tensor in (self.latent, *(part for held in self.offsets.values() for part in held)):
            tensor.requires_grad_(False)
        return self

    @property
    def learns(self):
        """Whether an update may follow the next picture."""
        return not self.drawing and len(self.path) < self.settings.updates

    def see(self, z, confidence, weighted, loss):
        """Take note of the picture at hand, final latent z [4, h, w]."""
        seen = {"confidence": confidence, "weighted": weighted, "loss": loss}
        if self.plain is None:
            self.plain = z
        if self.drawing:
            self.drawn.append(confidence)
            if confidence == max(self.drawn):
                self.path, self.best, self.likeliest = [seen], (0, z), self.latent.detach().clone()
            return
        self.path.append(seen)
        if self.best is None or self.settings.keep == "last" or confidence > self.path[self.best[0]]["confidence"]:
            self.best = len(self.path) - 1, z

    def ended(self):
        """Why this image is finished, "" if it is not."""
        if self.settings.confidence and self.path[-1]["weighted"] >= self.settings.confidence:
            return "confidence"
        if self.drawing:
            return "updates" if len(self.drawn) == self.settings.candidates and not self.settings.updates else ""
        return "updates" if len(self.path) > self.settings.updates else ""

    def go_on(self):
        """Towards the next picture; returns why there is none, "" if there is."""
        if self.drawing:
            self.draw()
            return ""
        slopes = [p.grad for group in self.optimiser.param_groups for p in group["params"]]
        if not all(torch.isfinite(slope).all() for slope in slopes):
            return f"gradient not finite at update {len(self.path)}"
        self.update()
        return ""

    def draw(self):
        """Go on from the next candidate, after the last one from the likeliest."""
        self.drawing = len(self.drawn) < self.settings.candidates
        start = self._candidate() if self.drawing else self.likeliest
        self.path = self.path if self.drawing else []
        with torch.no_grad():
            self.latent.copy_(start)
        self.norm = start.norm()
        self.optimiser.zero_grad(set_to_none=True)  # what a neighbour's backward pass left

    def _candidate(self):
        """The next start latent [4, h, w] that is tried; the first is the image's own."""
        generator = torch.Generator().manual_seed(files.seed(self.job.seed, "candidate", len(self.drawn)))
        return sampling.noise([generator], self.latent.shape, self.latent.device)[0].to(self.latent.dtype)

    def update(self):
        """One step of Adam; the latent keeps its length."""
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.latent.requires_grad:
                self.latent *= self.norm / self.latent.norm()
