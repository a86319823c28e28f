"""Morphology prompts at work: clusters of many tiles, features from the cache, an update of the whole denoiser beside its arithmetic."""

import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import torch
from bench_generator import BASE, in_turns

from histokit import toy
from histokit.core import files, machine
from histokit.diffusion import adapters, backbone, latents
from histokit.training import finetuning, loop
from histokit.vision import features

CLUSTERS = """
import resource, time
import numpy as np
from histokit.morphology import clusters

rng = np.random.default_rng(0)
centres = rng.normal(0, 1, (33, 384)).astype(np.float32)
feats = np.empty((200_000, 384), np.float32)
for start in range(0, len(feats), 10_000):
    feats[start : start + 10_000] = centres[rng.integers(0, 33, 10_000)] + rng.normal(0, 1.5, (10_000, 384))
labels = ["a", "b"] * 100_000
from sklearn.cluster import KMeans
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clock = time.perf_counter()
held = clusters.fit(feats, labels, 33)
fitted = time.perf_counter()
held.assign(feats, labels)
print(fitted - clock, time.perf_counter() - fitted, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, before / 2**20)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    (tmp_path / "params").mkdir()
    return tmp_path


def test_two_hundred_thousand_tiles_are_clustered():
    """Fit (33 clusters, ten starts) and assignment of 200,000 x 384 features, in a process of its own."""
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(CLUSTERS)], capture_output=True, text=True, check=True).stdout
    fit, assign, peak, before = map(float, said.split())
    print(f"\n200,000 x 384 in 33 clusters: fit {fit:.1f} s, assignment {assign:.1f} s (bar 60 s in all), {peak:.2f} GiB at most (bar 2;")
    print(f"{before:.2f} GiB are the features and the libraries)")


def test_features_of_many_tiles_come_from_the_cache(root):
    """20,000 tiles whose features are known: twenty contents, each under a thousand names, and as many keys."""
    rows, encoder = [], features.load("mini-ssl")
    for i in range(20_000):
        rows.append({"tile_id": str(i), "path": "none.png", "sha256": files.digest(i), "mpp": 0.5, "tile_px": 128, "fit": "resize"})
    tiles = pd.DataFrame(rows)
    folder = files.cache("features")
    keys = [features._key(row, "resize") for row in tiles.itertuples()]
    made_of = [features.VERSION, features.decode.VERSION, encoder.identity, 128, "resize", "none", features.augmentation.VERSION, None]
    place = folder / files.digest(*made_of)[:24]
    rng = np.random.default_rng(0)
    for start in range(0, len(keys), 4096):
        part = keys[start : start + 4096]
        raw = np.stack([np.frombuffer(bytes.fromhex(key), np.uint8) for key in part])
        held = {
            "keys": torch.from_numpy(raw),
            "features": torch.from_numpy(rng.normal(size=(len(part), 1, encoder.dim)).astype(np.float32)),
        }
        files.write_tensors(place / f"{start}.safetensors", held, {})
    clock = time.perf_counter()
    found = features.embed(encoder, tiles)
    print(f"\n20,000 features from the cache: {time.perf_counter() - clock:.2f} s (bar 5)")
    assert found.shape == (20_000, encoder.dim)


def test_an_update_of_the_whole_denoiser_costs_its_arithmetic(root, steps=6, batch_size=8):
    """Updates of mode full on captioned tiles, beside forward, backward and optimiser alone."""
    model, rows = backbone.load(BASE, machine.device()), []
    for i in range(24):
        path = files.write_png(root / f"{i}.png", toy.tile("stroma", f"bench {i}", i)[0])
        rows.append(
            {
                "tile_id": str(i),
                "path": str(path),
                "sha256": files.sha256(path),
                "label": "stroma",
                "mpp": 0.5,
                "fit": "resize",
                "tile_px": 128,
            }
        )
    tiles = pd.DataFrame(rows)
    params = adapters.all_weights(model)
    for p in params:
        p.requires_grad_(True)
    cache, texts = latents.Latents(model, tiles), [[f"a tile, type {i % 3}"] for i in range(24)]
    error = finetuning.loss(model, latents.Prompts(model))
    batches = finetuning.batches(cache, texts, np.full(24, 1 / 24), batch_size, 0)
    player, fixed = loop.Player("full", [{"params": params, "lr": 1e-9}], error), batches(0)
    optimiser = torch.optim.AdamW(params, lr=1e-9)

    def plain():
        for step in range(steps):
            error(fixed, step, torch.Generator().manual_seed(step)).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    took = in_turns(plain=plain, loop=lambda: loop.fit([player], batches, steps, 0))
    print(f"\nan update of the whole denoiser: {took['loop'] / took['plain']:.3f} of forward, backward and optimiser alone (bar 1.05)")
