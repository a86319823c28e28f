"""The generator at work: LoRA training beside the ceiling its arithmetic allows, sampling beside the bare network calls.

Every line is a ratio of two things timed in turns in one run, medians of the rounds, so that a noisy machine hits both. The base is
`mini` on the CPU or the GPU at hand; `HISTOKIT_BENCH_BASE` names another.
"""

import contextlib
import os
import time
from statistics import median

import numpy as np
import pytest
import torch

from histokit import toy
from histokit.core import machine, parallel
from histokit.diffusion import adapters, backbone, latents, losses, sampling
from histokit.training import finetuning, loop

ROUNDS = 5
BASE = os.environ.get("HISTOKIT_BENCH_BASE", "mini")


def clock(work):
    """Seconds of the wall for work(), with a GPU waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(**works):
    """Median seconds of each work over ROUNDS rounds, after one round to warm up."""
    rounds = [{name: clock(work) for name, work in works.items()} for _ in range(ROUNDS + 1)][1:]
    return {name: median(r[name] for r in rounds) for name in works}


@pytest.fixture(scope="module")
def model():
    return backbone.load(BASE, machine.device())


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Twenty tiles of toy on disk, as manifest rows."""
    folder = tmp_path_factory.mktemp("toy")
    table = toy.write(folder, px=128).groupby("label").head(10).head(20)
    where = [str(folder / name) for name in table["path"]]
    return table.assign(path=where, tile_id=table["path"], sha256="", tile_px=128, fit="resize", source="real")


def test_lora_steps_from_caches(model, tiles, steps=12, batch_size=8):
    """Training from cached latents and prompts against forward and backward alone, and against encoding every time."""
    params = adapters.add_lora(model, rank=16)
    for p in params:
        p.requires_grad_(True)
    cache, prompts = latents.Latents(model, tiles), latents.Prompts(model)
    texts = [[f"a histology image of {label}"] for label in tiles["label"]]
    batches = finetuning.batches(cache, texts, finetuning.weights(tiles), batch_size, 0, finetuning.strata(tiles))
    loss = finetuning.loss(model, prompts)
    fixed, generator = batches(0), torch.Generator()
    context = prompts(fixed["captions"])

    def ceiling():
        for _ in range(steps):
            noise, at = torch.randn_like(fixed["latents"]), torch.full((batch_size,), 500, device=model.device)
            with model.autocast():
                losses.diffusion_loss(model.unet, model.scheduler, fixed["latents"], context, at, noise).backward()
            for p in params:
                p.grad = None

    def cached():
        loop.fit([loop.Player("lora", [{"params": params, "lr": 1e-4}], loss)], batches, steps, 0)

    def uncached():
        def anew(k):
            batch = batches(k)
            rows = np.random.default_rng(k).integers(len(tiles), size=batch_size)
            mean, logvar = backbone.encode(model, cache._images(rows))
            return batch | {"latents": backbone.latents(mean, logvar, model.scaling, generator)}

        with_text = finetuning.loss(model, lambda p: backbone.embed(model, p))
        loop.fit([loop.Player("lora", [{"params": params, "lr": 1e-4}], with_text)], anew, steps, 0)

    seconds = in_turns(ceiling=ceiling, cached=cached, uncached=uncached)
    adapters.unload(model)
    speed = {name: steps * batch_size / s for name, s in seconds.items()}
    share = speed["cached"] / speed["ceiling"]
    print(
        f"\nLoRA on {BASE}, batch {batch_size}: {speed['cached']:.1f} images/s from caches, {share:.0%} of forward and backward alone "
        f"({speed['ceiling']:.1f}), {speed['cached'] / speed['uncached']:.2f} x the uncached loop ({speed['uncached']:.1f}), "
        f"peak {machine.peak_gb():.2f} GB",
        flush=True,
    )
    assert share >= 0.9


def test_sampling_beside_the_bare_calls(model, num_inference_steps=10, guidance_scale=2.0):
    """Text to image against the same UNet and decoder calls without anything around them."""
    batch = sampling.batch_size(model)
    images = 2 * batch
    prompts = ["a histology image of fibrous stroma"] * images

    def whole():
        generators = [torch.Generator().manual_seed(i) for i in range(images)]
        sampling.sample(model, prompts, generators, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    shape = (model.unet.config.in_channels, model.latent_px, model.latent_px)
    context = backbone.embed(model, prompts[:1]).detach().expand(2 * batch, -1, -1)
    z = torch.randn(2 * batch, *shape, device=model.device)

    @torch.no_grad()
    def bare():
        for _ in range(images // batch):
            for _ in range(num_inference_steps):
                with model.autocast():
                    model.unet(z, 500, context)
            model.vae.decode(z[:batch])

    seconds = in_turns(bare=bare, whole=whole)
    ratio = seconds["whole"] / seconds["bare"]
    rate, floor = images / seconds["whole"], images / seconds["bare"]
    what = f"{num_inference_steps} steps, guidance {guidance_scale}, batch {batch}"
    print(
        f"\nsampling on {BASE}, {what}: {rate:.2f} images/s, {ratio:.2f} x the bare UNet and decoder calls "
        f"({floor:.2f} images/s), peak {machine.peak_gb():.2f} GB",
        flush=True,
    )
    assert ratio <= 1.1


def test_rows_side_by_side_and_a_merged_lora(model, batch=8):
    """A training step and a sampling step with the rows of a batch on cores of their own, beside threads inside each layer."""
    params = adapters.add_lora(model, rank=16, targets="attention+conv")
    for p in params:
        p.requires_grad_(True)
    z, context = torch.randn(batch, model.unet.config.in_channels, model.latent_px, model.latent_px), backbone.embed(model, ["tissue"])
    z, context = z.to(model.device), context.detach().expand(batch, -1, -1)
    at = torch.full((batch,), 500, device=model.device)

    def train(rows):
        def step():
            with pytest.MonkeyPatch.context() as patch, model.autocast():
                patch.setattr(parallel, "rows", rows)
                losses.diffusion_loss(model.unet, model.scheduler, z, context, at, z).backward()
            for p in params:
                p.grad = None

        return step

    def draw(rows, merged):
        @torch.no_grad()
        def step():
            with pytest.MonkeyPatch.context() as patch, merged(model):
                patch.setattr(parallel, "rows", rows)
                predict = sampling.guided(model, context)
                for _ in range(5):
                    predict(z, at[0], 0)

        return step

    def whole(call, *given, parameters=()):
        return call(*given)

    beside = contextlib.nullcontext
    steps = {"train": train(whole), "train_rows": train(parallel.rows)}
    steps |= {"draw": draw(whole, beside), "draw_rows": draw(parallel.rows, beside), "draw_merged": draw(parallel.rows, adapters.merged)}
    seconds = in_turns(**steps)
    adapters.unload(model)
    print(
        f"\nrows of {batch} side by side on {BASE}, {torch.get_num_threads()} cores: a LoRA step takes "
        f"{seconds['train_rows'] / seconds['train']:.2f} of its time, a sampling step {seconds['draw_rows'] / seconds['draw']:.2f}, and "
        f"{seconds['draw_merged'] / seconds['draw']:.2f} with the LoRA merged",
        flush=True,
    )
    assert max(seconds["train_rows"] / seconds["train"], seconds["draw_merged"] / seconds["draw"]) <= 1.1
