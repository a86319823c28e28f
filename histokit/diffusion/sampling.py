"""The one denoising loop, and the functions that return what it runs on.

`denoise` walks from noise to a latent by asking `predict(z, t, i) -> eps` at each step. Classifier-free guidance,
classifier guidance, offsets and style conditions are functions that return such a `predict`; there is no pipeline
to subclass. `sample` puts the parts together: previews, sample sheets and finished sets all come out of it.
Nothing here loads a model or reads a file.
"""

import math

import numpy as np
import torch

from histokit.core import parallel
from histokit.diffusion import adapters, backbone

VERSION = 3
FIRST = 3  # steps over which `pull` is averaged


def schedule(scheduler, num_inference_steps, strength=1.0):
    """Timesteps [n] int64, noisiest first, of which `strength` keeps the last n = int(num_inference_steps * strength).

    The count is that of the stock img2img pipeline: 30 steps at strength 0.3 are 9. Zero steps raise ValueError.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is a share of the noise schedule, from 0 to 1; got {strength}")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    count = true_steps(num_inference_steps, strength)
    if count == 0:
        least = -(-1 // strength) if strength else None
        remedy = (
            f"num_inference_steps to at least {least:.0f}, or strength to {1 / num_inference_steps:.3g}" if least else "strength above 0"
        )
        raise ValueError(f"{num_inference_steps} steps at strength {strength} are no denoising step at all; raise {remedy}")
    fresh = type(scheduler).from_config(scheduler.config)  # set_timesteps writes into its scheduler
    fresh.set_timesteps(num_inference_steps)
    # trailing spacing counts down in floats and for some numbers of steps (61, 103, 121 ...) goes one too far, to -1
    timesteps = fresh.timesteps.cpu()[num_inference_steps - count : num_inference_steps]
    if timesteps[0] >= scheduler.config.num_train_timesteps:
        raise ValueError(f"{num_inference_steps} steps reach past the {scheduler.config.num_train_timesteps} trained ones; use fewer")
    return timesteps


def true_steps(num_inference_steps, strength=1.0):
    """How many denoising steps are really taken: int(num_inference_steps * strength), as the stock pipeline counts."""
    return min(int(num_inference_steps * strength), num_inference_steps)


def noise(generators, shape, device="cpu"):
    """Standard normal [B, *shape] float32, image i from its own CPU generator, so that no image depends on the batch."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def level(scheduler, t):
    """The share of a picture's variance at timestep t, alphas_cumprod, at least 2^-24: noise alone says nothing of x0 by way of eps.

    Only schedules rescaled to end in noise alone get there (Lin et al. 2024, arXiv:2305.08891); the velocity keeps x0 exact to 1e-3.
    """
    return max(float(scheduler.alphas_cumprod[int(t)]), 2.0**-24)


def noise_predicted(scheduler, output, z, t):
    """The noise eps [B, 4, h, w] in what a UNet returned at timestep t: eps itself, or from a velocity.

    v = sqrt(a) eps - sqrt(1 - a) x0, hence eps = sqrt(a) v + sqrt(1 - a) z; Salimans & Ho (2022), arXiv:2202.00512, appendix D.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        a = level(scheduler, t)
        return a**0.5 * output + (1 - a) ** 0.5 * z
    raise ValueError(f"the scheduler says prediction_type {kind!r}; epsilon and v_prediction are known")


def guided(model, cond, uncond=None, guidance_scale=1.0, watch=None):
    """`predict` with classifier-free guidance: uncond + scale (cond - uncond); Ho & Salimans (2022), arXiv:2207.12598, eq. 6.

    Args:
        model: backbone.Model with a unet and a scheduler.
        cond: [B, L, D] text embeddings, one per image.
        uncond: [1 or B, L, D] embedding of the empty prompt; unused at scale 1, where the second pass is skipped.
        guidance_scale: 1 turns guidance off.
        watch: called as `watch(i, pull)` where there is guidance, with `pull` [B]: how far the prompt moves the UNet's output, root mean
            square. Prompts whose training pictures are memorised pull harder; Wen et al. (2024), arXiv:2407.21720, section 4.
    """
    if guidance_scale != 1 and uncond is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs the embedding of the empty prompt, got uncond=None")
    context = cond if guidance_scale == 1 else torch.cat([uncond.expand(len(cond), -1, -1), cond])

    def predict(z, t, i):
        with model.autocast():
            x = z if guidance_scale == 1 else torch.cat([z, z])
            output = parallel.rows(model.predict, x, t, context).to(z.dtype)  # [B or 2B, 4, h, w]
        if guidance_scale != 1:
            without, with_ = output.chunk(2)
            output = without + guidance_scale * (with_ - without)
            if watch is not None:
                watch(i, (with_ - without).detach().square().mean(dim=(1, 2, 3)).sqrt())
        return noise_predicted(model.scheduler, output, z, t)

    return predict


def denoise(predict, z, scheduler, timesteps, *, eta=0.0, generators=None, on_step=None, until=None, order=1):
    """Latents [B, 4, h, w] after DDIM steps at `timesteps`; Song et al. (2021), arXiv:2010.02502, equation 12.

    Of order 2 it is DPM-Solver++ (2M), Lu et al. (2022), arXiv:2211.01095, algorithm 2: each step but the first and the last also follows
    how the clean latent moved since the step before, and half as many steps come as far.

    Args:
        predict: `predict(z, t, i) -> eps` [B, 4, h, w], t a 0-dim int64 tensor, i the index into `timesteps`.
        z: [B, 4, h, w] float, already at the noise level of timesteps[0].
        timesteps: [n] int64, descending, as `schedule` returns them.
        eta: 0 is deterministic, 1 is ancestral; above 0 each image draws from its own of `generators`, but at the schedule's last step.
        on_step: called as `on_step(i, t, z, x0)` after each step, to look on; x0 [B, 4, h, w] is the clean latent predicted at it.
        order: 1, or 2 without `eta`.
        until: timestep whose noise level the last step goes to, where more steps follow later; None goes to the end of the schedule.

    Differentiable in z and in all that `predict` reads; run it under `torch.no_grad()` to sample.
    """
    if eta and generators is None:
        raise ValueError(f"eta {eta} draws noise at every step and needs one generator per image")
    if order not in (1, 2) or (order == 2 and eta):
        raise ValueError(f"order is {order} and eta {eta}; use order 1, or 2 with eta 0")
    levels = [level(scheduler, t) for t in timesteps]
    levels.append(float(scheduler.final_alpha_cumprod) if until is None else level(scheduler, until))
    gain = [math.log(a / (1 - a)) / 2 if a < 1 else math.inf for a in levels]  # half the logarithm of the signal-to-noise ratio
    before = None
    for i, t in enumerate(timesteps):
        a, a_next = levels[i], levels[i + 1]
        t = t.to(z.device)
        eps = predict(z, t, i)
        x0 = clean = (z - (1 - a) ** 0.5 * eps) / a**0.5
        if order == 2 and 0 < i < len(timesteps) - 1:
            x0 = x0 + (gain[i + 1] - gain[i]) / (gain[i] - gain[i - 1]) / 2 * (x0 - before)
            eps = (z - a**0.5 * x0) / (1 - a) ** 0.5
        before = clean
        last = until is None and i == len(timesteps) - 1  # the end of the schedule may lie a little above no noise; what is added stays
        sigma = 0.0 if last else eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        z = a_next**0.5 * x0 + (1 - a_next - sigma**2) ** 0.5 * eps
        if sigma:
            z = z + sigma * noise(generators, z.shape[1:], z.device)
        if on_step is not None:
            on_step(i, t, z, clean)
    return z


def batch_size(model):
    """Images per batch where nobody asks for another number: 4 on a CPU, 16 on a GPU."""
    return 16 if model.device.type == "cuda" else 4


@torch.no_grad()
def sample(
    model, prompts, generators, *,
    sources=None, strength=1.0, guidance_scale=2.0, num_inference_steps=25, eta=0.0, batch=None, pulls=None, steer=None, on_step=None,
):  # fmt: skip
    """Images uint8 [N, H, W, 3] of N prompts, from noise or from the latents of real tiles.

    SDEdit, Meng et al. (2022), arXiv:2108.01073: a source is noised to `strength` of the schedule and denoised again. Strength 1
    starts from noise alone, so that nothing of the source is left; strength 0 is its round trip through the autoencoder.
    Batches have one fixed shape, the last is padded: an image follows from its prompt, generator, source and slot (its index
    modulo `batch`), bit for bit on a CPU; in another slot or batch size it differs by a grey level at most.

    Args:
        prompts: list of N str.
        generators: list of N CPU generators, one per image.
        sources: [N, 4, h, w] scaled latents, or None for text-to-image.
        eta: see `denoise`; the noise of each step comes from the image's own generator.
        batch: images per batch, by default `batch_size(model)`.
        steer: `steer(predict, places)` -> the `predict` that is walked by; places [batch] are the numbers of the images in their slots, the
            last one's again where a slot is empty.
        pulls: a list that receives one number per image, the mean `watch` of `guided` over the first steps taken; NaN without guidance.
        on_step: called as `on_step(k, n, x0)` after step k of n of a batch; x0 [batch, 4, h, w], padding included. What it raises ends
            the sampling.

    The model is locked while a batch is made, so that a panel and a cell do not use it at once.
    """
    model.need("vae", "unet", "scheduler", *(("text_encoder", "tokenizer") if model.hears else ()))
    if not model.hears and guidance_scale != 1:
        raise ValueError(f"guidance_scale {guidance_scale} weighs a prompt, and base model {model.name!r} was trained without text; use 1")
    batch = batch or batch_size(model)
    if sources is None and strength != 1:
        raise ValueError(f"strength {strength} needs a source; without one every image starts from noise, strength 1")
    timesteps = schedule(model.scheduler, num_inference_steps, strength) if strength != 0 else torch.empty(0, dtype=torch.int64)
    shape = (model.unet.config.in_channels, model.latent_px, model.latent_px)
    context = {prompt: backbone.embed(model, [prompt])[0] for prompt in dict.fromkeys(prompts)}  # one at a time: no neighbours
    uncond = backbone.embed(model, [""])
    images = []
    look = None if on_step is None else lambda i, t, z, x0: on_step(i + 1, len(timesteps), x0)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        if strength == 0:
            z = sources[rows].to(model.device)
        else:
            z = noise(generators[rows], shape, model.device)
            if strength != 1:
                z = model.scheduler.add_noise(sources[rows].to(z), z, timesteps[:1].to(z.device))
        n = len(z)
        cond = torch.stack([context[prompt] for prompt in prompts[rows]])
        z, cond = (torch.cat([x, x[-1:].expand(batch - n, *x.shape[1:])]) for x in (z, cond))
        seen = []
        watch = None if pulls is None else lambda i, pull, seen=seen: seen.append(pull) if i < FIRST else None
        predict = guided(model, cond, uncond, guidance_scale, watch)
        if steer is not None:
            predict = steer(predict, [min(start + k, start + n - 1) for k in range(batch)])
        own = [*generators[rows], *(torch.Generator() for _ in range(batch - n))]  # an empty slot must not draw from its neighbour's
        with model.alone(), adapters.merged(model):
            z = denoise(predict, z, model.scheduler, timesteps, eta=eta, generators=own, on_step=look)
        if pulls is not None:
            pulls += (torch.stack(seen).mean(dim=0) if seen else torch.full((batch,), torch.nan)).tolist()[:n]
        images.append(backbone.decode(model, z, min(batch, 4))[:n])  # the decoder's activations are the largest
    return np.concatenate(images)


# --- a layout in a style ---------------------------------------------------------------------------------------------


def styled(found, scheduler, layout, v, *, style_scale=1.0, layout_scale=1.0, rescale=0.0):
    """`predict` for `denoise`: e00 + l (el0 - e00) + s (els - el0), the passes of a step in one call.

    e00 hears neither, el0 the layout, els layout and style. At layout scale 1 this is classifier-free guidance on the style alone, at both
    1 the conditional prediction, in one pass. Three passes need a model that has learned without layouts (`layout_drop`).

    Args:
        found: conditioning.StyleLayout.
        layout: [B, K, h, w], v: [B, dim].
        rescale: phi of Lin et al. (2024), arXiv:2305.08891, section 3.4: the share by which the deviation of the guided prediction is
            brought to that of the conditional one; 0 is textbook guidance.
    """
    if layout_scale != 1 and not found.config.layout_drop:
        raise ValueError(f"layout_scale {layout_scale} weighs the layout, and this model never learned without one; train with layout_drop")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale is a share, from 0 to 1; got {rescale}")
    null, count = found.null.expand(len(v), -1), 1 + (style_scale != 1 or layout_scale != 1) + (layout_scale != 1)
    layouts = torch.cat([torch.zeros_like(layout), layout, layout][-count:])
    styles = torch.cat([null, null, v][-count:])

    def predict(z, t, i):
        x, times = torch.cat([z] * count), t.expand(count * len(z))
        output = parallel.rows(found, x, times, layouts, styles).to(z.dtype)
        *without, both = output.chunk(count)
        if without:
            guided = without[-1] + style_scale * (both - without[-1])
            if layout_scale != 1:
                guided = guided + (layout_scale - 1) * (without[1] - without[0])
            if rescale:
                spread = lambda e: e.flatten(1).std(dim=1)[:, None, None, None]  # noqa: E731
                guided = rescale * guided * spread(both) / spread(guided) + (1 - rescale) * guided
            both = guided
        return noise_predicted(scheduler, both, z, t)

    return predict


@torch.no_grad()
def sample_styled(
    found, model, layout, v, generators, *, style_scale=1.0, layout_scale=1.0, rescale=0.0, num_inference_steps=20, order=2, eta=0.0,
    batch=None, on_step=None,
):  # fmt: skip
    """Images uint8 [N, H, W, 3] of N layouts in N styles, each from its own generator.

    Batches have one fixed shape, the last is padded, so that an image follows from its layout, style, generator and slot alone.

    Args:
        found: conditioning.StyleLayout, eval; model: backbone.Model whose autoencoder decodes.
        layout: [N, K, h, w], v: [N, dim].
        order, eta: see `denoise`; 2 takes half the steps of 1.
        on_step: called as `on_step(k, n, x0)` after step k of n of a batch.
    """
    batch, scheduler = batch or batch_size(model), found.scheduler
    timesteps = schedule(scheduler, num_inference_steps)
    look = None if on_step is None else lambda i, t, z, x0: on_step(i + 1, len(timesteps), x0)
    images = []
    for start in range(0, len(v), batch):
        rows = slice(start, start + batch)
        z = noise(generators[rows], (found.unet.config.out_channels, model.latent_px, model.latent_px), model.device)
        n = len(z)
        z, how, style = (torch.cat([x, x[-1:].expand(batch - n, *x.shape[1:])]) for x in (z, layout[rows], v[rows]))
        own = [*generators[rows], *(torch.Generator() for _ in range(batch - n))]
        predict = styled(
            found, scheduler, how.to(z.device), style.to(z.device), style_scale=style_scale, layout_scale=layout_scale, rescale=rescale
        )
        with model.alone(), model.autocast():
            z = denoise(predict, z, scheduler, timesteps, eta=eta, generators=own, on_step=look, order=order)
        images.append(backbone.decode(model, z, min(batch, 4))[:n])
    return np.concatenate(images)
