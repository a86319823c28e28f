"""Samples of a base while and after it is trained: drawn from noise alone, shown, and held against real tiles."""

import numpy as np
import torch

from histokit.core import files
from histokit.diffusion import backbone, sampling
from histokit.metrics import distributions
from histokit.training.pretraining import held_out, ldm
from histokit.vision import encoders

VERSION = 2
GUIDANCE = 2.0  # what 03 takes; a model that hears its words is over-guided at the 4 that one deaf to them needed


def sheet(model, prompts, per_prompt, seed):
    """One column a prompt, `per_prompt` images each at fixed seeds."""
    images = sample(model, [p for _ in range(per_prompt) for p in prompts], seed)
    return held_out.tiled(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, len(prompts))


def sample(model, prompts, seed, guidance=GUIDANCE):
    """One image uint8 [N, H, W, 3] a prompt from pure noise at fixed seeds, by the sampler of every later notebook."""
    generators = [torch.Generator().manual_seed(files.seed(seed, "sample", i)) for i in range(len(prompts))]
    return sampling.sample(model, prompts, generators, guidance_scale=guidance, num_inference_steps=20)


def fidelity(folder, held, count, seed=0, device="cpu", spaces=("colour-texture", "mini-ssl")):
    """How far `count` samples are from held-out tiles, beside what the autoencoder alone loses and what an untrained UNet draws.

    Where `held` has tiles of a dataset, drawn pictures are left out of it. KID x 1000 in each of `spaces`, at guidance `GUIDANCE`, prompts
    as often as held-out labels (without captions, at none). Colour-texture is not learned and sees the slightest blur, so the
    autoencoder bounds it from below; of layout it sees nothing: noise, decoded, is grain of about the right stain and was nearer to real
    tiles (37) than they to their own round trip (114). mini-ssl sees content.

    Returns:
        Dict of samples, psnr_db and psnr_tiles (round trip of the held-out tiles), and `kid`: space -> samples, autoencoder (held-out
        tiles after their round trip), untrained (100 samples), floor (real tiles of other cases), n tiles a side, and nearer: how many
        times nearer to the floor the samples are than those of the untrained UNet; a sample below the floor counts as on it.
    """
    real = ~held.table["source"].isin(["toy", "looks"])
    held = held.part(real) if real.any() else held
    model = backbone.load(str(folder), device)
    rng = np.random.default_rng(files.seed(seed, "fidelity"))
    prompts = [held.captions[i][0] for i in rng.choice(len(held.images), count)]
    guidance = GUIDANCE if any(prompts) else 1.0  # of tiles without a word the model says nothing to be guided by
    real, rows = held_out.whole_tiles(held, model.tile_px, 10_000)
    again = ldm.reconstruct(model.vae, real.to(device)).cpu()
    drawn = {"samples": sample(model, prompts, seed, guidance), "autoencoder": _pixels(again)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(seed, "untrained"))
        model.unet = type(model.unet).from_config(model.unet.config).to(device).eval()
    drawn["untrained"] = sample(model, prompts[:100], seed, guidance)  # so far off that more would say the same
    psnr = ldm.psnr(again, real)
    facts = {"samples": count, "psnr_db": float(psnr.mean()), "psnr_tiles": len(psnr), "kid": {}}
    for space in spaces:
        encoder = encoders.load(space, device)
        of_real = encoder(_pixels(real)).numpy()
        found = {}
        for name, images in drawn.items():
            kid, floor, n = distributions.kid_beside_floor(of_real, encoder(images).numpy(), held.table["case"].iloc[rows].tolist())
            found |= {name: float(1000 * kid.mean())} | ({"floor": float(1000 * floor.mean()), "n": n} if name == "samples" else {})
        excess = max(found["samples"] - found["floor"], 0.0)
        facts["kid"][space] = found | {"nearer": (found["untrained"] - found["floor"]) / excess if excess else float("inf")}
    return facts


def _pixels(images):
    """Images [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3]."""
    return ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
