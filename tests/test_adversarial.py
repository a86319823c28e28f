"""An autoencoder and its critic: what each is taught, when they begin, and that a killed run goes on to the same bits."""

import numpy as np
import pytest
import torch
from test_unconditional import TINY

from histokit.training import adversarial, loop, unconditional


def pair(settings=None, steps=10, distance=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, critic = unconditional.autoencoder(TINY), adversarial.PatchCritic(8, 2)
    return vae, critic, adversarial.players(vae, critic, 1e-3, steps, settings, distance)


def batches(k):
    return {"images": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(k)) * 2 - 1}


def losses(players, step, k=0):
    found = [player.loss(batches(k), step, torch.Generator().manual_seed(7)) for player in players]
    return [one if isinstance(one, tuple) else (one, {}) for one in found]


def test_hinge_is_one_for_a_critic_that_cannot_tell_and_zero_for_one_that_is_sure():
    assert float(adversarial.hinge(torch.zeros(4), torch.zeros(4))) == 1
    assert float(adversarial.hinge(torch.full((4,), 1.5), torch.full((4,), -2.0))) == 0
    assert float(adversarial.hinge(torch.tensor([0.5]), torch.tensor([-0.5]))) == 0.5


def test_no_patch_of_an_image_knows_another_image():
    critic = adversarial.PatchCritic(8, 2).eval()
    images = batches(0)["images"]
    torch.testing.assert_close(critic(images)[:1], critic(images[:1]), rtol=1e-5, atol=1e-6)
    assert critic(images).shape == (2, 1, 6, 6)


def test_neither_gradient_outshouts_the_other():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adversarial.balance((3 * layer).sum(), (0.5 * layer).sum(), layer)
    assert float(weight) == pytest.approx(6, rel=1e-3) and not weight.requires_grad
    assert float(adversarial.balance((3 * layer).sum(), (0 * layer).sum(), layer)) == 1e4


def test_before_its_start_the_critic_says_nothing_and_learns_nothing():
    vae, critic, players = pair(adversarial.Settings(start=0.5))
    before = [p.detach().clone() for p in critic.parameters()]
    loop.fit(players, batches, 5, 0, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    (total, logs), (silent, _) = losses(players, 4)
    images = batches(0)["images"]
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
    again = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    torch.testing.assert_close(total, (again - images).abs().mean() + 6.25e-8 * kl)
    assert float(silent.detach()) == 0 and "critic_weight" not in logs


def test_afterwards_it_learns_to_tell_and_the_autoencoder_hears_it():
    vae, critic, players = pair(adversarial.Settings(start=0.0), steps=40)
    history = loop.fit(players, batches, 40, 0, log_every=1)
    assert history["told_apart"].iloc[-5:].mean() > 0.9 and history["loss_critic"].iloc[-1] < history["loss_critic"].iloc[0]
    assert all(p.requires_grad for p in critic.parameters())
    (total, logs), _ = losses(players, 39)
    images = batches(0)["images"]
    posterior = vae.encode(images).latent_dist
    again = vae.decode(
        posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
    ).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    torch.testing.assert_close(total, (again - images).abs().mean() + 6.25e-8 * kl - logs["critic_weight"] * critic(again).mean())
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in critic.parameters()), "what the autoencoder learns moves no critic"


def test_a_perceptual_distance_is_a_term_of_the_error():
    far = lambda x, y: (x - y).square().sum((1, 2, 3))  # noqa: E731
    with_it, without = (losses(pair(adversarial.Settings(start=0.9), distance=one)[2], 0)[0] for one in (far, None))
    expected = 32 * 32 * 3 * without[1]["squared_error"]
    torch.testing.assert_close(with_it[0] - without[0], expected, rtol=1e-4, atol=1e-4)


def test_a_killed_pair_goes_on_to_the_same_bits(tmp_path):
    def train(folder, until=99):
        vae, critic, players = pair(adversarial.Settings(start=0.3), steps=8)

        def stopping(k):
            if k >= until:
                raise KeyboardInterrupt
            return batches(k)

        loop.fit(players, stopping, 8, 0, folder=folder, ema=0.995, checkpoint_every=3, accumulate=2)
        return [p.detach().clone() for p in (*vae.parameters(), *critic.parameters())]

    whole = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", until=13)
    assert all(torch.equal(a, b) for a, b in zip(whole, train(tmp_path / "b"), strict=True))


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="critic start is 1.0"):
        adversarial.settled({"start": 1.0})
    with pytest.raises(ValueError, match="weights of the critic's losses"):
        adversarial.settled({"kl": -1})
    with pytest.raises(ValueError, match="critic has no setting 'weight'; use adversarial, kl, perceptual, start, width"):
        adversarial.settled({"weight": 1})
    assert np.isclose(adversarial.settled({"kl": 1e-6}).kl, 1e-6)
