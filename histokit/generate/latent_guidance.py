"""The push of a classifier of noisy latents on each denoising step: what `class_guided` makes tiles with.

Dhariwal & Nichol (2021), arXiv:2105.05233, algorithm 2, in the latent space of HistoDiffusion (arXiv:2308.04020). Functions that return a
`predict` for `sampling.denoise`; nothing here opens a file.
"""

from dataclasses import dataclass, fields

import torch

from histokit.core import parallel
from histokit.diffusion import sampling

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
        if self.eta > 1:
            raise ValueError(f"eta is {self.eta}; expected 0 (no noise is added) to 1 (as much as the step takes away)")

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
