"""An autoencoder and the critic that tells its pictures from real ones: two players of the one loop.

Squared errors draw the mean of what a decoder is unsure of; a critic of patches makes it decide. Esser et al. (2021), arXiv:2012.09841,
section 3.1 and equation 7, as Rombach et al. (2022), arXiv:2112.10752, and HistoDiffusion (arXiv:2308.04020) train their autoencoders. All
sums are means here, so weights do not depend on the size of a tile.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from histokit.training import loop

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """Weights of the terms.

    Args:
        adversarial: of the critic's term, times the ratio of both gradients at the last layer of the decoder.
        start: share of the planned updates after which the critic learns and is heard; before, it would judge noise.
        perceptual: of the perceptual distance, where there is one.
        kl: of the divergence of the latents from N(0, 1), a mean over their values; 6.25e-8 is HistoDiffusion's 1e-6 of sums.
        width: channels of the critic's first layer.
    """

    adversarial: float = 0.5
    start: float = 0.3
    perceptual: float = 1.0
    kl: float = 6.25e-8
    width: int = 64

    def __post_init__(self):
        if not 0 <= self.start < 1:
            raise ValueError(f"critic start is {self.start!r}; expected a share of the updates, from 0 to below 1")
        if min(self.adversarial, self.perceptual, self.kl) < 0 or self.width < 8:
            raise ValueError(f"weights of the critic's losses are 0 or more, and its width 8 or more, got {self}")


class PatchCritic(nn.Module):
    """How real each patch of images [B, 3, H, W] in [-1, 1] looks: [B, 1, h, w], any number, higher is more real.

    The three-layer critic of Isola et al. (2017), arXiv:1611.07004, whose answer sees 70 px, with GroupNorm, so that no image knows its
    neighbours.
    """

    def __init__(self, width=64, layers=3):
        super().__init__()
        widths = [width * min(2**k, 8) for k in range(layers + 1)]
        steps = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(1, layers + 1):
            stride = 2 if k < layers else 1
            steps += [nn.Conv2d(widths[k - 1], widths[k], 4, stride, 1, bias=False), nn.GroupNorm(8, widths[k]), nn.LeakyReLU(0.2)]
        self.steps = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images):
        return self.steps(images)


def hinge(real, made):
    """Critic's loss: half of E max(0, 1 - real) + E max(0, 1 + made); 1 where it cannot tell, 0 where it is sure."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def balance(error, term, layer):
    """||d error / d layer|| / ||d term / d layer||, at most 1e4 and without gradient: neither outshouts the other; equation 7."""
    slopes = [torch.autograd.grad(one, layer, retain_graph=True)[0].norm() for one in (error, term)]
    return (slopes[0] / (slopes[1] + 1e-4)).clamp(0, 1e4).detach()


def settled(given):
    """Settings of a dict, in which `lpips` names the weights of a distance; ValueError for a name that is none of theirs."""
    known, given = {one.name for one in fields(Settings)}, {name: value for name, value in given.items() if name != "lpips"}
    if unknown := set(given) - known:
        raise ValueError(f"critic has no setting {sorted(unknown)[0]!r}; use {', '.join(sorted(known))}, and lpips, a file of weights")
    return Settings(**given)


def players(vae, critic, lr, steps, settings=None, distance=None):
    """The autoencoder and its critic.

    Args:
        vae: AutoencoderKL, all of it trained.
        critic: `PatchCritic`.
        steps: planned updates.
        settings: Settings, or None for the defaults.
        distance: `distance(x, y)` -> [B], a perceptual distance with gradients, such as LPIPS; None leaves the term out.

    Both see the same pictures: what the autoencoder made of a batch is kept for the critic, which comes after it.
    """
    how, made = settings or Settings(), []
    begin, last = round(how.start * steps), vae.decoder.conv_out.weight

    def rebuild(batch, step, generator):
        images = batch["images"]
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean.device)
        again = vae.decode(z).sample.float()
        error = (again - images).abs().mean()
        if distance is not None:
            error = error + how.perceptual * distance(again, images).mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        logs = {"squared_error": (again - images).square().mean()}
        total = error + how.kl * divergence
        if step >= begin and how.adversarial:
            made.append(again.detach())
            critic.requires_grad_(False)
            term = -critic(again).float().mean()
            critic.requires_grad_(True)
            weight = how.adversarial * balance(error, term, last)
            total = total + weight * term
            logs |= {"critic_weight": weight}
        return total, logs

    def judge(batch, step, generator):
        if step < begin or not how.adversarial:
            return sum(p.sum() for p in critic.parameters()) * 0.0
        again = made.pop(0)
        real, fake = critic(batch["images"]).float(), critic(again).float()
        told = torch.cat([real.mean((1, 2, 3)) > 0, fake.mean((1, 2, 3)) < 0]).float().mean()
        return hinge(real, fake), {"told_apart": told}

    options = {"lr": lr, "betas": (0.5, 0.9)}  # a critic changes what is best all the time: little momentum
    return [
        loop.Player("autoencoder", [{"params": vae.parameters(), **options}], rebuild),
        loop.Player("critic", [{"params": critic.parameters(), "weight_decay": 0.0, **options}], judge),
    ]
