"""The prior of 20_pretrain: a diffusion model taught what tissue looks like by tiles that nobody labelled.

What a class is comes in later, from a small classifier in the same latents (21_latent_classifier). Networks, loss and source are in
`training.unconditional`, latents on disk in `latent_shards`.
"""

import torch

from histokit.core import files, machine
from histokit.diffusion import backbone
from histokit.training import unconditional
from histokit.training.pretraining import held_out, latent_shards, sample_quality

VERSION = 1
OFF = 0.05  # by which the deviation of scaled latents may differ from 1 before it is said of a base that goes on
SD_SCALE = 0.18215  # what diffusers takes where an autoencoder's settings say nothing
SHOWN = 16  # samples of a sheet


def model(run, *, network, autoencoder, init, tile_px, device):
    """What is trained: the base of `init` whose UNet goes on from its weights, or a new UNet on the latents of `autoencoder`."""
    if bool(network) == bool(init):
        raise ValueError(
            "part prior goes on from the base named in `init`, or starts one of the sizes of `network` on the latents of `autoencoder`; "
            "give one of the two"
        )
    if init and autoencoder:
        raise ValueError("a prior that goes on from `init` knows the latents of that base's own autoencoder; leave `autoencoder` out")
    if network and not autoencoder:
        raise ValueError("a prior from random weights learns the latents of an autoencoder; name a step or a base that has one")
    found = backbone.load(str(init or autoencoder), device).need("vae")
    found.tile_px = tile_px
    if network:
        found.tokenizer = found.text_encoder = None
        found.unet, found.scheduler = unconditional.fresh(network, found, run.seed)
    found.need("unet", "scheduler").unet.register_to_config(sample_size=found.latent_px)  # what its size is read from
    found.unet.requires_grad_(True).train().to(device)
    return found


def latents(run, found, corpus, draws, budget_gb, fit, say=print):
    """The corpus' latents on disk; sets the scale of a model that is trained from random weights.

    SD's own scale holds for SD's pictures. The factor is 1 over the deviation of these latents, over `latent_shards.CALIBRATION` views or
    more, and goes into the autoencoder's settings, so that whoever loads it has the same.

    Args:
        fit: whether the scale is to be measured; a model that goes on keeps the one that its UNet knows.
    """
    cache = latent_shards.LatentShards(found.vae, found.identity["vae"], corpus, found.tile_px, draws, run.seed, budget_gb)
    for line in cache.said:
        say(line)
    say(f"{len(cache):,} latents, {cache.views} views of a picture; what is not there yet is encoded")
    first, processes = machine.place()
    if processes > 1 and first:
        torch.distributed.barrier()  # the first process encodes, the others read
    cache.fill()
    if processes > 1 and not first:
        torch.distributed.barrier()
    deviation, count = cache.deviation()
    if fit:
        found.vae.register_to_config(scaling_factor=1 / deviation)
    elif abs(deviation * found.scaling - 1) > OFF:
        say(f"Scaled latents of these tiles deviate by {deviation * found.scaling:.2f}, where 1 is what the base was trained for.")
    return cache, {"latent_deviation": deviation, "scaling_factor": found.scaling, "calibrated_on": count}


def sheet(found, seed):
    """`sheet(step)` for `loop.fit`: samples at fixed seeds, without a word, by the sampler of every later notebook."""

    def drawn(step):
        images = sample_quality.sample(found, [""] * SHOWN, seed, guidance=1.0)
        return held_out.tiled(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, SHOWN // 2)

    return drawn


def finish(run, found, origin, save):
    """Writes the prior as a base that `backbone.load` reads; `origin` is the folder its other parts come from."""
    save(found.unet.eval().requires_grad_(False), run.path("unet"))
    found.scheduler.save_pretrained(run.path("scheduler"))
    for name in ("vae", *(("text_encoder", "tokenizer") if found.hears else ())):
        for path in (origin / name).iterdir():
            files.link(path, run.path(name, path.name))
    config = run.path("vae", "config.json")
    settings = files.read_json(config)
    if settings.get("scaling_factor", SD_SCALE) != found.scaling:  # else it is the same autoencoder, to the byte
        config.unlink()  # a link: what it leads to stays as it is
        files.write_json(config, settings | {"scaling_factor": found.scaling})
    return {"unet_parameters": sum(p.numel() for p in found.unet.parameters()), "hears_text": found.hears}
