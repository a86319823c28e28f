"""What steers a generation: a classifier as the denoising sees it, losses that say what it should see, and the settings of it all.

A guide maps pictures, or latents, to logits, with gradients; losses are functions on logits. How the inputs of the denoising follow them is
in `guidance`.
"""

from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from histokit.vision import classifiers, encoders

VERSION = 1


# --- guides ----------------------------------------------------------------------------------------------------------


class Pictures:
    """A classifier of tiles, asked about pictures that are still being made: its own transform, in the autograd graph.

    Args:
        classifier: classifiers.Classifier; frozen here.
        classes: class names of the dataset, which must be the classifier's, in the same order.
        name: what messages call it.

    Raises ValueError for another class list, and for a classifier through which no gradient passes.
    """

    space = "pixel"

    def __init__(self, classifier, classes, name="the guide"):
        if list(classifier.classes) != list(classes):
            strange = sorted(set(classifier.classes) ^ set(classes)) or ["the same names in another order"]
            raise ValueError(f"{name} was trained on other classes than this dataset has: {', '.join(strange)}; train it on this one")
        self.classifier, self.classes = classifier.requires_grad_(False).eval(), list(classes)
        self.identity = classifiers.identity(classifier)
        self.side = self.classifier.transform["tile_px"] or self.classifier.transform["size"]  # px of what it looks at
        self._check(name)

    def _check(self, name):
        side, generator = self.side or 64, torch.Generator().manual_seed(0)
        dtype = next(value.dtype for value in self.classifier.head.state_dict().values() if value.is_floating_point())
        images = torch.empty(1, 3, side, side, dtype=dtype).uniform_(-0.9, 0.9, generator=generator).requires_grad_()
        with torch.enable_grad():
            try:
                (slope,) = torch.autograd.grad(self(images).square().sum(), images, allow_unused=True)
            except RuntimeError:  # a step of the transform knows no gradient
                slope = None
        if slope is None or not slope.any():
            encoder, mode = self.classifier.encoder.name, self.classifier.mode
            raise ValueError(f"no gradient passes through {name} (encoder {encoder}, mode {mode}), so it cannot steer; use a network")

    def __call__(self, images):
        """Calibrated logits [B, C] of images [B, 3, H, W] near [-1, 1]; what is out of range is clipped, and keeps its gradient."""
        images = encoders.clamp_through(images, -1.0, 1.0)
        if self.side and images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
            images = encoders.clamp_through(images, -1.0, 1.0)
        return self.classifier(images)

    def label(self, name):
        """Label id of a class; ValueError where the classifier does not know it."""
        if name not in self.classes:
            raise ValueError(f"the guide does not know the class {name!r}; expected one of {', '.join(self.classes)}")
        return self.classes.index(name)


def cutouts(images, n, generators, *, side, power=0.3, noise=0.0):
    """n random crops of each of images [B, 3, H, W], brought to side x side: [B * n, 3, side, side], the crops of an image together.

    Crops are u^power (H - side) + side wide, u uniform, so most of them are large; as in DiG-IN, arXiv:2311.17833. With `noise`, normal
    noise of that deviation is added to each.

    Args:
        generators: one CPU generator per image.
    """
    whole = images.shape[-1]
    least, out = min(side, whole), []
    for image, generator in zip(images, generators, strict=True):
        for u, x, y in torch.rand(n, 3, generator=generator).tolist():
            wide = int(u**power * (whole - least) + least)
            left, top = int(x * (whole - wide + 1)), int(y * (whole - wide + 1))
            crop = image[None, :, top : top + wide, left : left + wide]
            crop = F.adaptive_avg_pool2d(crop, side) if wide != side else crop
            out.append(crop + noise * torch.randn(crop.shape, generator=generator).to(crop) if noise else crop)
    return torch.cat(out)


# --- losses ----------------------------------------------------------------------------------------------------------
# Of logits [B, C] and targets [B] int64 -> [B]; lower is more of what is asked for. `others`: label ids of look-alikes, () for all others.


def confidence(logits, targets):
    """Probability [B] of the target."""
    return logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]


def conf(logits, targets, others=()):
    """Minus the probability of the target: the loss of LoGex."""
    return -confidence(logits, targets)


def log_conf(logits, targets, others=()):
    """Cross-entropy: unlike `conf` its slope does not vanish where the target is still improbable."""
    return F.cross_entropy(logits, targets, reduction="none")


def neg_conf(logits, targets, others=()):
    """The probability of the target: away from it."""
    return confidence(logits, targets)


def neg_log_conf(logits, targets, others=()):
    """The logarithm of the probability of the target: away from it."""
    return -log_conf(logits, targets)


def neg_entropy(logits, targets, others=()):
    """Cross-entropy to equal probabilities: towards uncertainty about everything; the target plays no part."""
    return -logits.log_softmax(dim=1).mean(dim=1)


def conf_boundary(logits, targets, others=()):
    """Minus twice the smaller of the probabilities of the target and of its likeliest look-alike: towards the border between them."""
    p = logits.softmax(dim=1)
    return -2 * torch.minimum(p.gather(1, targets[:, None])[:, 0], _rival(p, targets, others))


def margin(logits, targets, others=()):
    """Logit of the likeliest look-alike minus that of the target, at least -5: away from the classes it is mistaken for."""
    return (_rival(logits, targets, others) - logits.gather(1, targets[:, None])[:, 0]).clamp(min=-5.0)


def _rival(scores, targets, others):
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    allowed[:, list(others) or slice(None)] = True
    allowed[torch.arange(len(targets)), targets] = False
    return scores.masked_fill(~allowed, -torch.inf).amax(dim=1)


LOSSES = {
    "conf": conf,
    "log_conf": log_conf,
    "neg_conf": neg_conf,
    "neg_log_conf": neg_log_conf,
    "neg_entropy": neg_entropy,
    "conf_boundary": conf_boundary,
    "margin": margin,
}
TOWARDS = ("conf", "log_conf", "margin")  # losses under which the target becomes more probable


# --- settings --------------------------------------------------------------------------------------------------------

VARIABLES = ("latent", "cond", "uncond")


@dataclass(frozen=True)
class Settings:
    """How one image is optimised; every setting acts, or is refused.

    Args:
        guidance_scale: classifier-free guidance weight.
        num_inference_steps: denoising steps.
        candidates: plain samples drawn at most, of which the one the guide finds likeliest goes on, or is finished if it is sure enough;
            with updates 0 this is best-of-N, and an update costs as much as two to three draws.
        updates: optimiser updates at most; 0 leaves the plain sample.
        confidence: probability of the target, weighted over the predictions looked at, at which an image is finished; 0 never stops.
        keep: `best`, the picture of the highest probability among all, or `last`.
        loss: a name of `LOSSES`; `look_alikes`: class names for `margin` and `conf_boundary`, () for all others.
        loss_steps: the last so many predictions are looked at: the clean latents predicted before the last step, and the result itself.
        loss_schedule: their weights, `linear` (1, 2, 3 ... over the sum) or `uniform`.
        optimise: some of `latent`, `cond`, `uncond`.
        lr, latent_lr: of Adam, for the offsets and for the latent, whose norm is kept.
        offsets: `per_step` or `shared` by all steps; `offset_rank`: of their matrices [L, D], 0 for full.
        last_steps: optimise the last so many steps only, from the latent the plain chain reaches there, which is then the one that is
            optimised; 0 for all. An update costs that share, and the beginning is sampled once.
        cutouts, cutout_noise: crops of each picture that the loss is averaged over, and noise on them; 0 shows the guide the whole picture.
        pixel_weight, latent_weight, lpips_weight: of the mean squared difference from the plain sample in pixels in [-1, 1] and in
            latents, and of LPIPS.
        checkpoint: recompute each step in the backward pass, so that memory does not grow with the number of steps.
        compile: compile the UNet, which takes minutes once; for hundreds of images on a GPU. On a CPU it gained nothing and is refused.
    """

    guidance_scale: float = 3.0
    num_inference_steps: int = 20
    candidates: int = 1
    updates: int = 20
    confidence: float = 0.4
    keep: str = "best"
    loss: str = "conf"
    look_alikes: tuple = ()
    loss_steps: int = 3
    loss_schedule: str = "linear"
    optimise: tuple = VARIABLES
    lr: float = 0.01
    latent_lr: float = 1e-3
    offsets: str = "per_step"
    offset_rank: int = 0
    last_steps: int = 0
    cutouts: int = 0
    cutout_noise: float = 0.0
    pixel_weight: float = 0.0
    latent_weight: float = 0.0
    lpips_weight: float = 0.0
    checkpoint: bool = True
    compile: bool = False

    def __post_init__(self):
        for name in ("look_alikes", "optimise"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_choices()
        self._check_ranges()
        self._check_idle()

    def _check_choices(self):
        choices = {"keep": ("best", "last"), "loss": tuple(LOSSES), "loss_schedule": ("linear", "uniform")}
        for name, known in (choices | {"offsets": ("per_step", "shared")}).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        strange = [name for name in self.optimise if name not in VARIABLES]
        if strange or not self.optimise:
            raise ValueError(f"optimise is {list(self.optimise)}; expected some of {', '.join(VARIABLES)}")

    def _check_ranges(self):
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence is a probability, from 0 (never stop early) to 1; got {self.confidence}")
        for name in ("updates", "offset_rank", "last_steps", "cutouts", "cutout_noise", "pixel_weight", "latent_weight", "lpips_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("lr", "latent_lr", "num_inference_steps", "loss_steps", "candidates"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.last_steps > self.num_inference_steps or self.loss_steps > (self.last_steps or self.num_inference_steps):
            raise ValueError(
                f"loss_steps {self.loss_steps}, last_steps {self.last_steps}: no more than the {self.num_inference_steps} steps there are, "
                "and no prediction before the steps that are optimised"
            )

    def _check_idle(self):
        towards, rivals = self.loss in TOWARDS, self.loss in ("margin", "conf_boundary")
        still = self.optimise == ("latent",) and "only the latent is optimised"
        idle = {
            "confidence": self.confidence and not towards and f"loss {self.loss} does not make the target likelier",
            "candidates": self.candidates > 1 and self.last_steps and "they are whole samples, and only the last steps are optimised",
            "look_alikes": self.look_alikes and not rivals and f"loss {self.loss} knows none",
            "cutout_noise": self.cutout_noise and not self.cutouts and "there are no cutouts",
            "offset_rank": self.offset_rank and still,
            "offsets": self.offsets == "shared" and still,
            "optimise": self.optimise == ("uncond",) and self.guidance_scale == 1 and "at guidance_scale 1 the empty prompt is not asked",
        }
        for name, why in idle.items():
            if why:
                raise ValueError(f"{name} does nothing here: {why}; leave it out")

    @classmethod
    def of(cls, given):
        """Settings from a dict; ValueError for a name that is none."""
        known = [one.name for one in fields(cls)]
        strange = [name for name in given if name not in known]
        if strange:
            raise ValueError(f"guided generation has no setting {strange[0]!r}; expected some of {', '.join(known)}")
        return cls(**given)

    @property
    def steps(self):
        """Denoising steps that are optimised."""
        return self.last_steps or self.num_inference_steps

    @property
    def acting(self):
        """The variables that are optimised; at guidance_scale 1 there is no empty prompt to offset."""
        return tuple(name for name in self.optimise if name != "uncond" or self.guidance_scale != 1)

    def weights(self):
        """Weights [loss_steps] of the predictions, the last one last; they sum to 1."""
        raw = torch.arange(1, self.loss_steps + 1.0) if self.loss_schedule == "linear" else torch.ones(self.loss_steps)
        return raw / raw.sum()


def way(method):
    """The module that steers by `pixel` (a classifier of pictures) or `latent` (one of noisy latents); both answer to the same names."""
    from histokit.generate import class_guided, guided

    ways = {"pixel": guided, "latent": class_guided}
    if method not in ways:
        raise ValueError(f"method is {method!r}; use pixel (a classifier of pictures, of 06) or latent (one of noisy latents, of 21)")
    return ways[method]
