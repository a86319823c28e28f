"""Tiles without labels at work: shards beside memory, an update beside its arithmetic, guided sampling beside unguided, memory by tiles.

Every line is a ratio of two things timed in turns in one run, medians of the rounds; memory is that of a process of its own.
"""

import io
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
import torch
from bench_generator import BASE, clock, in_turns
from PIL import Image

from histokit import toy
from histokit.core import machine
from histokit.diffusion import backbone, sampling
from histokit.generate import latent_guidance
from histokit.training import loop, unconditional
from histokit.training.pretraining import corpus, decoder, latent_shards, ldm, pictures
from histokit.vision import latent_classifiers


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    (tmp_path / "params").mkdir()
    return tmp_path


def shard(path, images, count, quality=90):
    """`count` JPEG members of these images, one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = []
    for image in images:
        held = io.BytesIO()
        Image.fromarray(image).save(held, "JPEG", quality=quality)
        encoded.append(held.getvalue())
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            member, data = tarfile.TarInfo(f"{i:07d}.jpg"), encoded[i % len(encoded)]
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def drawn(count):
    return [toy.tile("stroma", f"bench {i}", i)[0] for i in range(count)]


def test_shards_feed_a_training_as_memory_does(root, steps=6, batch_size=4):
    """Updates of the decoder of mini on views of 64 tiles: from a tar shard, and from the same tiles in memory."""
    shard(root / "tars" / "a.tar", drawn(64), 64)
    found = pictures.Shards(root / "tars")
    model = backbone.load(BASE, machine.device())
    weights = np.full(64, 1 / 64)
    sources = {"shards": found, "memory": [found[i] for i in range(64)]}

    def train(images):
        player = decoder.player(model.vae, 1e-6)
        loop.fit([player], ldm.picture_batches(images, weights, model.tile_px, batch_size, 0, model.device), steps, 0)

    took = in_turns(**{name: (lambda images=images: train(images)) for name, images in sources.items()})
    print(f"\ntraining from shards: {took['memory'] / took['shards']:.3f} of the speed of memory (bar 0.95)")


def test_an_update_costs_its_arithmetic(root, steps=6, batch_size=8):
    """Updates of a prior from latents on disk, beside forward, backward and optimiser alone."""
    shard(root / "tars" / "a.tar", drawn(32), 32)
    model = backbone.load(BASE, machine.device())
    model.unet.requires_grad_(True).train()
    cache = latent_shards.LatentShards(model.vae, model.identity["vae"], corpus.gather({"a": {"shards": "tars"}}), model.tile_px, 64).fill()
    batches = latent_shards.batches(cache, model.scaling, batch_size, 0)
    player = unconditional.player(model, 1e-9)
    fixed, optimiser = batches(0), torch.optim.AdamW(player.params, lr=1e-9)

    def plain():
        for step in range(steps):
            with (
                torch.autocast(model.device.type, machine.bfloat16(model.device)) if machine.bfloat16(model.device) else torch.enable_grad()
            ):
                value = player.loss(fixed, step, torch.Generator().manual_seed(step))
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    took = in_turns(plain=plain, loop=lambda: loop.fit([player], batches, steps, 0, autocast=machine.bfloat16(model.device)))
    print(f"\nupdate of a prior: {took['loop'] / took['plain']:.3f} of forward + backward + optimiser (bar 1.05; clipping is in it)")


def test_guided_sampling_beside_unguided(count=8, steps=20):
    model = backbone.load(BASE, machine.device())
    channels, px = model.latent_space["shape"]
    net = latent_classifiers.LatentClassifier(["a", "b"], channels, px, **latent_classifiers.PRESETS["mini"]).to(model.device).eval()
    net.requires_grad_(False)
    settings = latent_guidance.Settings(class_scale=8.0)

    def draw(**options):
        generators = [torch.Generator().manual_seed(k) for k in range(count)]
        return sampling.sample(model, [""] * count, generators, guidance_scale=1.0, num_inference_steps=steps, **options)

    def steer(predict, places):
        targets = torch.zeros(len(places), dtype=torch.int64, device=model.device)
        return latent_guidance.steered(predict, net, targets, model.scheduler, settings)

    took = in_turns(plain=draw, guided=lambda: draw(steer=steer))
    print(
        f"\nguided by latents: {took['guided'] / took['plain']:.3f} of unguided (bar 1.25), {count} tiles, {steps} steps, decoding included"
    )


def test_memory_does_not_grow_with_the_tiles(root, few=20_000, many=200_000):
    """Peak memory of reading 2,000 random tiles of a corpus, gathered from shards; the survey of every tile is in it."""
    images = [np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8) for i in range(8)]
    peaks, seconds = {}, {}
    for count in (few, many):
        shard(root / f"tars{count}" / "a.tar", images, count)
        script = f"""
            import numpy as np
            from histokit.training.pretraining import corpus, pictures
            seen = corpus.gather({{"a": {{"shards": "tars{count}"}}}})
            order = pictures.order(seen.weights, np.zeros(len(seen.images), int), 0, 0)
            for i in order[:2000]:
                seen.images[i]
            peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss would be the parent's
            print(int(peak.split()[1]) / 1024)
        """
        held = []

        def work(script=script, held=held):
            held.append(subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True).stdout)

        seconds[count] = clock(work)
        peaks[count] = float(held[0])
    said = (f"{peaks[count]:.0f} MB with {count:,} tiles ({seconds[count]:.0f} s)" for count in (few, many))
    print("\nmemory:", ", ".join(said))
