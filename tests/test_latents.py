"""The latent cache: what it is keyed by, its symmetries, and what it does without room."""

import numpy as np
import pytest
import squares
import torch
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.diffusion import backbone, latents
from histokit.tiles import data


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def tiles(root):
    squares.dataset()
    return data.training(data.load(runs.start(experiment="exp", step="look"))).head(4)


def turned(image, k):
    """Symmetry k as the cache numbers them, drawn by hand: k % 4 quarter turns, then mirrored for k >= 4."""
    image = torch.rot90(image, k % 4, dims=(-2, -1))
    return image.flip(-1) if k >= 4 else image


def stored():
    return {path: path.stat().st_mtime_ns for path in files.cache("latents").rglob("*.safetensors")}


def test_latents_are_those_of_the_turned_tile(model, tiles):
    cache = latents.Latents(model, tiles)
    mean, logvar = cache.batch([2, 2, 0], [0, 5, 7])
    images = data.to_float(data.pixels(tiles.iloc[[2, 2, 0]], model.tile_px))
    views = torch.stack([turned(image, k) for image, k in zip(images, (0, 5, 7), strict=True)])
    wanted = backbone.encode(model, views)
    torch.testing.assert_close(mean, wanted[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, wanted[1], atol=1e-5, rtol=1e-4)


def test_what_is_there_is_not_encoded_again(model, tiles, monkeypatch):
    latents.Latents(model, tiles)
    before = stored()
    monkeypatch.setattr(backbone, "encode", lambda *args: pytest.fail("encoded again"))
    latents.Latents(model, tiles)
    after = stored()
    assert set(after) == set(before) and all(after[path] > before[path] for path in before)  # touched: the last to be pruned


def encoded(monkeypatch):
    """Images of every later call of the autoencoder."""
    seen, encode = [], backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda model, images: seen.append(images) or encode(model, images))
    return seen


def test_a_tile_is_encoded_alone_so_its_latents_follow_from_it_and_not_from_who_filled_the_cache(model, tiles, monkeypatch):
    seen = encoded(monkeypatch)
    latents.Latents(model, tiles.iloc[[3, 1]])
    latents.Latents(model, tiles)
    alone = [torch.stack([turned(image, k) for k in range(8)]) for image in data.to_float(data.pixels(tiles, model.tile_px))]
    assert len(seen) == 4 and all(torch.equal(images, alone[i]) for images, i in zip(seen, (3, 1, 0, 2), strict=True))


def test_latents_of_another_number_of_threads_are_not_taken(model, tiles, monkeypatch):
    """Two threads split the sums of the autoencoder otherwise than one, and the last bits of a latent differ."""
    cores = torch.get_num_threads()
    latents.Latents(model, tiles)
    seen = encoded(monkeypatch)
    try:
        torch.set_num_threads(cores + 1)
        latents.Latents(model, tiles)
    finally:
        torch.set_num_threads(cores)
    assert len(seen) == 4
    latents.Latents(model, tiles)
    assert len(seen) == 4


def test_another_cut_of_the_same_file_is_another_latent(model, tiles):
    whole = latents.Latents(model, tiles).batch([0], [0])[0]
    corner = latents.Latents(model, tiles.assign(fit="crop=32")).batch([0], [0])[0]
    assert not torch.allclose(whole, corner)
    finer = tiles.assign(fit="resample_to_mpp=0.5x32")
    assert not torch.allclose(*(latents.Latents(model, finer.assign(mpp=mpp)).batch([0], [0])[0] for mpp in (0.5, 0.25)))
    assert torch.equal(whole, latents.Latents(model, tiles.assign(mpp=0.1)).batch([0], [0])[0])  # a scale nobody asks for
    assert len(stored()) == 4 * 4


def test_without_room_nothing_is_written_and_the_numbers_are_the_same(model, tiles):
    kept = latents.Latents(model, tiles)
    again = latents.Latents(model, tiles, budget_gb=0)
    before = len(stored())
    for ours, theirs in zip(kept.batch([1, 3], [6, 2]), again.batch([1, 3], [6, 2]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not again.stored and len(stored()) == before


def test_a_file_that_another_job_pruned_is_made_again(model, tiles):
    cache = latents.Latents(model, tiles)
    before = cache.batch([1], [3])
    cache.paths[1].unlink()
    assert all(torch.equal(a, b) for a, b in zip(cache.batch([1], [3]), before, strict=True))


def test_prompts_are_embedded_once_and_the_least_used_go_first(model, monkeypatch, root):
    prompts = latents.Prompts(model)
    first = prompts(["a gland", "stroma"])
    monkeypatch.setattr(backbone, "embed", lambda *args: pytest.fail("embedded again"))
    assert torch.equal(latents.Prompts(model)(["a gland", "stroma"]), first)
    assert np.isfinite(first.numpy()).all() and first.shape[0] == 2
