"""A base without text: the sizes that the paper's has, read from a folder, sampled, steered, and asked for no word."""

import shutil

import numpy as np
import pytest
import torch
from test_latent_classifier import network
from tiny import tiny_model

from histokit.diffusion import backbone, losses, sampling
from histokit.generate import latent_guidance
from histokit.training import unconditional

TINY = unconditional.Preset(32, 3, (8, 16, 16), 1, (16, 32), (1,), blocks=1, head_width=8, groups=4)


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_the_preset_of_the_paper_has_its_parameters():
    with torch.device("meta"):
        assert count(unconditional.autoencoder(unconditional.PRESETS["paper"])) == 55_312_063
        assert count(unconditional.unet(unconditional.PRESETS["paper"])) == 294_963_459
        assert count(unconditional.unet(unconditional.PRESETS["base"])) == pytest.approx(294.2e6, abs=0.05e6)
        assert count(unconditional.unet(unconditional.PRESETS["mini"])) < 11e6


def test_its_noise_is_the_closed_form_and_fifty_steps_go_from_981_to_1():
    scheduler = unconditional.schedule(unconditional.PRESETS["paper"])
    betas = np.linspace(0.0015**0.5, 0.0155**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(6.69e-4, rel=1e-2) and scheduler.final_alpha_cumprod == 1
    steps = sampling.schedule(scheduler, 50)
    assert steps[0] == 981 and steps[-1] == 1 and len(steps) == 50
    for n in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500):
        assert len(sampling.schedule(scheduler, n)) == n


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("prior")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, unet = unconditional.autoencoder(TINY), unconditional.unet(TINY)
    vae.save_pretrained(place / "vae")
    unet.save_pretrained(place / "unet")
    unconditional.schedule(TINY).save_pretrained(place / "scheduler")
    return place


def drawn(model, count=3, prompts=None, **options):
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    how = {"guidance_scale": 1.0, "num_inference_steps": 3, "batch": 2, **options}
    return sampling.sample(model, prompts or [""] * count, generators, **how)


def test_a_base_without_text_is_read_and_sampled(folder):
    model = backbone.load(str(folder))
    assert not model.hears and model.tile_px == 32 and model.latent_space["shape"] == [3, 8] and tiny_model().hears
    images = drawn(model)
    assert images.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(drawn(model, 2), images[:2])
    with pytest.raises(ValueError, match="without text and cannot follow the prompt 'fat'"):
        drawn(model, prompts=["", "fat", ""])
    with pytest.raises(ValueError, match="guidance_scale 2.0 weighs a prompt"):
        drawn(model, guidance_scale=2.0)


def test_a_latent_classifier_steers_it(folder):
    model = backbone.load(str(folder))
    net = network(channels=3)
    settings, targets = latent_guidance.Settings(class_scale=3.0), torch.tensor([0, 1, 2])

    def steer(predict, places):
        return latent_guidance.steered(predict, net, targets[torch.tensor(places)], model.scheduler, settings)

    assert not np.array_equal(drawn(model, steer=steer), drawn(model))


def test_each_image_draws_the_noise_of_its_steps_from_its_own_generator(folder):
    model = backbone.load(str(folder))
    whole = drawn(model, 3, eta=1.0)
    np.testing.assert_array_equal(drawn(model, 2, eta=1.0), whole[:2])
    assert not np.array_equal(whole, drawn(model, 3))


def test_its_error_is_that_of_the_noise(folder):
    model = backbone.load(str(folder))
    z, noise, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([10, 600])
    with torch.no_grad():
        ours = losses.diffusion_errors(model.unet, model.scheduler, z, None, t, noise, "l1")
        a = model.scheduler.alphas_cumprod[t][:, None, None, None]
        by_hand = (model.unet(a.sqrt() * z + (1 - a).sqrt() * noise, t).sample - noise).abs().mean((1, 2, 3))
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-4)


def test_parts_of_two_bases_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mixed")
    tiny_model().vae.save_pretrained(tmp_path / "mixed" / "vae")
    with pytest.raises(ValueError, match="takes latents of 3 channels .* makes 4"):
        backbone.load(str(tmp_path / "mixed"))
