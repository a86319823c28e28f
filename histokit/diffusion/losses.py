"""Denoising losses: what a diffusion model is trained and judged by, given latents, noise and timesteps."""

import torch

from histokit.core import files, parallel

VERSION = 1
TIMESTEPS = ("uniform", "structure")


def min_snr_weight(alphas_cumprod, timesteps, gamma, prediction_type="epsilon"):
    """Loss weight [B] of each timestep: min(SNR, gamma) / SNR, or / (SNR + 1) for v-prediction; gamma 0 gives ones.

    Hang et al. (2023), arXiv:2303.09556, equation 5 and its v-prediction form.
    """
    if not gamma:
        return torch.ones(len(timesteps), device=timesteps.device)
    a = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def structure_weight(alphas_cumprod, timesteps, gamma=5.0):
    """Weight [B] of a velocity error: (min(SNR, gamma) + 1) / (SNR + 1); 1 where noise hides all but the layout, small where little is.

    Min-SNR's own weight of a velocity, min(SNR, gamma) / (SNR + 1), fades where SNR is low, and there glands are laid out.
    """
    a = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = a / (1 - a)
    return (snr.clamp(max=gamma) + 1) / (snr + 1)


def timestep_draw(scheduler, kind="uniform"):
    """`draw(count, generator)` -> timesteps [count] to train on: `uniform`, or in proportion to `structure_weight`.

    Drawn so, the loss expects what that weight would give it, and no update is spent on timesteps that count little. A batch's
    timesteps are then spread evenly over their distribution, in random order: less noise in the gradient for nothing.
    """
    total = scheduler.config.num_train_timesteps
    if kind not in TIMESTEPS:
        raise ValueError(f"timesteps {kind!r} is unknown; use {' or '.join(TIMESTEPS)}")
    if kind == "structure" and scheduler.config.prediction_type != "v_prediction":
        raise ValueError(
            "timesteps: structure weighs the error of a velocity, and this base predicts the noise, whose error fades where the layout is "
            "decided; leave timesteps: uniform"
        )
    if kind == "uniform":
        return lambda count, generator: torch.randint(total, (count,), generator=generator)
    share = structure_weight(scheduler.alphas_cumprod.cpu(), torch.arange(total)).double()
    reached = share.cumsum(0) / share.sum()

    def draw(count, generator):
        even = (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator).double()) / count
        return torch.searchsorted(reached, even, right=True).clamp(max=total - 1)

    return draw


def diffusion_loss(unet, scheduler, latents, context, timesteps, noise, *, min_snr_gamma=5.0, weight=None, kind="l2"):
    """Mean denoising error of latents [B, 4, h, w] at timesteps [B] under context [B, L, D]; lower is better.

    The target is the noise, or the velocity where the scheduler says `v_prediction` (Ho et al. 2020, equation 14;
    Salimans & Ho 2022). `kind`: `l2` or `l1`. Weighted by min-SNR, or by `weight` [B].
    """
    error = diffusion_errors(unet, scheduler, latents, context, timesteps, noise, kind)
    if weight is None:
        weight = min_snr_weight(scheduler.alphas_cumprod, timesteps, min_snr_gamma, scheduler.config.prediction_type)
    return (error * weight).mean()


def diffusion_errors(unet, scheduler, latents, context, timesteps, noise, kind="l2"):
    """Denoising error [B] of each latent, unweighted; see `diffusion_loss`. A context of None is for a UNet without text."""
    asked = () if context is None else (context,)
    return conditional_errors(lambda *batch: unet(*batch).sample, scheduler, latents, timesteps, noise, asked, unet.parameters(), kind)


def conditional_errors(predict, scheduler, latents, timesteps, noise, conditions, parameters, kind="l2"):
    """Denoising error [B] of `predict(noisy, timesteps, *conditions)`, row by row on the cores there are, see `parallel.rows`.

    Args:
        conditions: tensors [B, ...]; parameters: of `predict`.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v else noise
    output = parallel.rows(predict, noisy, timesteps, *conditions, parameters=parameters)
    error = output.float() - target
    return (error.abs() if kind == "l1" else error.square()).mean(dim=(1, 2, 3))


def fixed_noise(count, shape, scheduler, seed):
    """Timesteps [count] spread evenly over the schedule and noise [count, *shape], the same at every validation."""
    total = scheduler.config.num_train_timesteps
    timesteps = ((torch.arange(count) + 0.5) / count * total).long()
    return timesteps, torch.randn(count, *shape, generator=torch.Generator().manual_seed(files.seed(seed, "validation")))
