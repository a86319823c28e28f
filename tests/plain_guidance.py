"""Guided generation as its description reads, one image at a time: full autograd, diffusers' own scheduler, no trick at all.

The second definition that `histokit.generate.guidance` is held against, for its numbers and, in the benchmarks, for its speed.
"""

import torch
from diffusers import DDIMScheduler

from histokit.diffusion import backbone


def optimise(
    model, classifier, prompt, target, seed, *,
    guidance_scale=3.0, num_inference_steps=20, updates=20, confidence=0.4, loss_steps=3, lr=0.01, latent_lr=1e-3, first=0, loss="conf",
):  # fmt: skip
    """The pictures of one image, [k + 1] float [3, H, W] in [-1, 1], the probability of each, and the final latents.

    first: step from which on things are optimised; what is before it is sampled once. loss: conf or log_conf.
    """
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    timesteps, dtype = scheduler.timesteps[:num_inference_steps], model.dtype
    with torch.no_grad():
        cond, uncond = backbone.embed(model, [prompt]), backbone.embed(model, [""])
        z = torch.randn(4, model.latent_px, model.latent_px, generator=torch.Generator().manual_seed(seed)).to(dtype)[None]
        for t in timesteps[:first]:
            z = scheduler.step(_noise(model, z, t, cond, uncond, guidance_scale), t, z).prev_sample
    steps = len(timesteps) - first
    start, length = z.clone().requires_grad_(), z.norm()
    dc, du = (torch.zeros(steps, *cond.shape[1:], dtype=dtype, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.Adam([{"params": [start], "lr": latent_lr}, {"params": [dc, du], "lr": lr}])
    weights = [(j + 1) / sum(range(1, loss_steps + 1)) for j in range(loss_steps)]

    pictures, path, finals = [], [], []
    for update in range(updates + 1):
        z, predicted = start, []
        for i, t in enumerate(timesteps[first:]):
            out = scheduler.step(_noise(model, z, t, cond + dc[i], uncond + du[i], guidance_scale), t, z)
            z = out.prev_sample
            predicted.append(out.pred_original_sample)
        weighted, lost, views = 0.0, 0.0, [*predicted[steps - loss_steps : -1], z]
        for weight, view in zip(weights, views, strict=True):
            image = model.vae.decode(view / model.scaling).sample
            shown = image + (image.clamp(-1, 1) - image).detach()
            log_probability = classifier(shown).log_softmax(dim=1)[0, target]
            probability = log_probability.exp()
            weighted = weighted + weight * probability
            lost = lost - weight * (probability if loss == "conf" else log_probability)
        pictures.append(image[0].detach().clamp(-1, 1))
        path.append(float(probability.detach()))
        finals.append(z[0].detach())
        if update == updates or (confidence and weighted >= confidence):
            break
        optimiser.zero_grad()
        lost.backward()
        optimiser.step()
        with torch.no_grad():
            start *= length / start.norm()
    return pictures, path, finals


def _noise(model, z, t, cond, uncond, scale):
    without, with_ = model.unet(torch.cat([z, z]), t, torch.cat([uncond, cond])).sample.chunk(2)
    return without + scale * (with_ - without)
