"""The loop against diffusers' own scheduler, and against what must be true of any sampler."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from histokit.diffusion import backbone, sampling
from histokit.training.pretraining import ldm


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def start(model, seeds=(0, 1)):
    shape = (4, model.latent_px, model.latent_px)
    return sampling.noise([torch.Generator().manual_seed(s) for s in seeds], shape)


def context(model, *prompts):
    with torch.no_grad():
        return backbone.embed(model, list(prompts))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "ends in noise"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_loop_is_ddim_of_diffusers(kind, strength):
    from diffusers import DDIMScheduler

    model = tiny_model(prediction_type="epsilon" if kind == "epsilon" else "v_prediction")
    if kind == "ends in noise":  # diffusers steps by the velocity itself there, ours by the noise in it
        model.scheduler = ldm.schedule()
    cond, uncond, z = context(model, "tissue", "gland"), context(model, ""), start(model)
    timesteps = sampling.schedule(model.scheduler, 10, strength)
    stock = DDIMScheduler.from_config(model.scheduler.config)
    stock.set_timesteps(10)
    assert torch.equal(timesteps, stock.timesteps[10 - len(timesteps) :])
    with torch.no_grad():
        ours = sampling.denoise(sampling.guided(model, cond, uncond, 3.0), z, model.scheduler, timesteps)
        theirs = z
        for t in timesteps:
            without, with_ = (model.unet(theirs, t, c).sample for c in (uncond.expand(2, -1, -1), cond))
            theirs = stock.step(without + 3.0 * (with_ - without), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=2e-3 if kind == "ends in noise" else 1e-5, rtol=1e-4)


def test_twenty_steps_of_stable_diffusion_are_the_published_ones():
    from diffusers import DDIMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    timesteps, z, seen = sampling.schedule(scheduler, 20), torch.ones(1, 4, 2, 2, dtype=torch.float64), {}
    assert timesteps.tolist() == list(range(951, 0, -50))
    nothing = lambda z, t, i: torch.zeros_like(z)  # noqa: E731  # without noise to take away, a step scales by the root of the levels
    sampling.denoise(nothing, z, scheduler, timesteps[-3:], on_step=lambda i, t, z, x0: seen.update({int(t): (z, x0)}))
    levels = {101: 0.89298, 51: 0.95052, 1: 0.99830, "end": 0.99915}
    for t, after in ((101, 51), (51, 1), (1, "end")):
        (moved, x0), first = seen[t], levels[101]
        torch.testing.assert_close(moved, z * (levels[after] / first) ** 0.5, rtol=1e-5, atol=0)
        torch.testing.assert_close(x0, z * first**-0.5, rtol=1e-5, atol=0)  # it belongs to the latent before the step


def test_ancestral_noise_has_the_variance_of_diffusers(model):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler.from_config(model.scheduler.config)
    stock.set_timesteps(10)
    z, eps = start(model), start(model, (2, 3))
    extra = start(model, (5, 6))
    timesteps = stock.timesteps[4:6]  # two steps, so that the first has a successor
    want = stock.step(eps, timesteps[0], z, eta=0.7, variance_noise=extra).prev_sample
    seen = []
    sampling.denoise(
        lambda *_: eps,
        z,
        model.scheduler,
        timesteps,
        eta=0.7,
        generators=[torch.Generator().manual_seed(s) for s in (5, 6)],
        on_step=lambda i, t, z, x0: seen.append(z),
    )
    torch.testing.assert_close(seen[0], want, atol=1e-5, rtol=1e-4)


def test_the_true_noise_leads_back_to_the_image_in_any_number_of_steps(model):
    x0, eps = start(model), start(model, (2, 3))
    for count in (1, 3, 7):
        timesteps = sampling.schedule(model.scheduler, count)
        z = model.scheduler.add_noise(x0, eps, timesteps[:1])
        back = sampling.denoise(lambda *_: eps, z, model.scheduler, timesteps)
        last = float(model.scheduler.final_alpha_cumprod)
        torch.testing.assert_close(back, last**0.5 * x0 + (1 - last) ** 0.5 * eps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "strength", "count"), [(30, 0.3, 9), (50, 0.5, 25), (4, 1.0, 4), (100, 0.29, 28), (3, 0.34, 1)])
def test_the_true_step_count_is_the_stock_one(model, steps, strength, count):
    assert len(sampling.schedule(model.scheduler, steps, strength)) == sampling.true_steps(steps, strength) == count


def test_no_step_at_all_is_refused_with_the_remedy(model):
    with pytest.raises(ValueError, match=r"num_inference_steps to at least 10, or strength to 0.2"):
        sampling.schedule(model.scheduler, 5, 0.1)
    with pytest.raises(ValueError, match="raise strength above 0"):
        sampling.schedule(model.scheduler, 5, 0.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        sampling.schedule(model.scheduler, 5, 1.2)
    with pytest.raises(ValueError, match="past the 1000 trained"):
        sampling.schedule(model.scheduler, 1000)


def test_the_schedule_does_not_write_into_the_scheduler(model):
    before = model.scheduler.timesteps.clone()
    sampling.schedule(model.scheduler, 7, 0.6)
    assert torch.equal(model.scheduler.timesteps, before) and model.scheduler.num_inference_steps is None


def test_scale_one_skips_the_unconditional_pass(model):
    cond, z, t = context(model, "tissue"), start(model, (0,)), torch.tensor(500)
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with torch.no_grad():
        one = sampling.guided(model, cond)(z, t, 0)
        assert calls == [1]
        near = sampling.guided(model, cond, context(model, ""), 1.0 + 1e-9)(z, t, 0)
    hook.remove()
    assert sum(calls) == 3  # in one call or, on several cores, in two
    torch.testing.assert_close(one, near, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="empty prompt"):
        sampling.guided(model, cond, None, 2.0)


def test_an_image_does_not_depend_on_its_neighbours_nor_visibly_on_its_slot(model):
    prompts = ["tissue", "gland", "necrosis"]
    cond = torch.cat([context(model, p) for p in prompts])
    uncond, z = context(model, ""), start(model, (0, 1, 2))
    timesteps = sampling.schedule(model.scheduler, 4)

    def run(order):
        with torch.no_grad():
            return sampling.denoise(sampling.guided(model, cond[order], uncond, 2.0), z[order], model.scheduler, timesteps)

    whole = run([0, 1, 2])
    assert torch.equal(run([0, 2, 1])[0], whole[0])
    assert torch.equal(run([1, 1, 2])[1], whole[1])
    torch.testing.assert_close(run([2, 0, 1])[1], whole[0], atol=1e-4, rtol=1e-4)  # two threads may round rows differently
    torch.testing.assert_close(run([0])[0], whole[0], atol=1e-4, rtol=1e-4)


def test_the_pull_of_a_prompt_is_how_far_it_moves_the_first_predictions(model):
    prompts, pulls = ["gland tissue", "", "necrosis"], []
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    sampling.sample(model, prompts, generators, num_inference_steps=5, guidance_scale=2.0, batch=2, pulls=pulls)
    assert len(pulls) == 3 and pulls[1] == pytest.approx(0, abs=1e-6) and pulls[0] > 0

    z, cond, uncond = start(model, (0,)), context(model, prompts[0]), context(model, "")
    timesteps, expected = sampling.schedule(model.scheduler, 5), []

    def predict(z, t, i):  # two separate passes
        with torch.no_grad():
            one, other = (model.unet(z, t, words).sample for words in (cond, uncond))
        expected.append((one - other).pow(2).mean().sqrt().item())
        return sampling.noise_predicted(model.scheduler, other + 2 * (one - other), z, t)

    sampling.denoise(predict, z, model.scheduler, timesteps)
    assert pulls[0] == pytest.approx(np.mean(expected[: sampling.FIRST]), rel=1e-3) and len(expected) == 5
    off = []
    sampling.sample(model, prompts, generators, num_inference_steps=2, guidance_scale=1.0, pulls=off)
    assert np.isnan(off).all() and len(off) == 3


def test_samples_are_padded_ordered_and_nearly_independent_of_the_batch_size(model):
    prompts = [f"{word} tissue" for word in ("gland", "necrosis", "tumour", "skin", "colon")]

    def made(chosen, batch):
        generators = [torch.Generator().manual_seed(k) for k in chosen]
        return sampling.sample(model, [prompts[k] for k in chosen], generators, num_inference_steps=3, batch=batch)

    whole = made(range(5), 2)
    assert whole.shape == (5, 32, 32, 3) and whole.dtype == np.uint8
    assert np.array_equal(made([4], 2)[0], whole[4]) and np.array_equal(made([2, 3], 2), whole[2:4])
    for batch in (1, 4):
        assert abs(made(range(5), batch).astype(int) - whole).max() <= 1


def test_strength_0_is_the_round_trip_and_strength_1_ignores_the_source(model):
    mean, _ = backbone.encode(model, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    sources = mean * model.scaling

    def made(strength, sources):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        return sampling.sample(model, ["gland"] * 2, generators, sources=sources, strength=strength, num_inference_steps=3, batch=2)

    assert np.array_equal(made(0, sources), backbone.decode(model, sources, 2))
    assert np.array_equal(made(1, sources), made(1, None))
    assert not np.array_equal(made(0.7, sources), made(0.7, sources.flip(0)))
    with pytest.raises(ValueError, match="needs a source"):
        made(0.5, None)
    with pytest.raises(ValueError, match="no denoising step"):
        made(0.2, sources)


def test_the_noise_of_an_image_follows_from_its_own_generator(model):
    assert torch.equal(start(model, (0, 1, 2))[1], start(model, (1,))[0])


def test_gradients_flow_through_the_whole_chain(model):
    cond, timesteps = context(model, "tissue"), sampling.schedule(model.scheduler, 3)
    z = start(model, (0,)).requires_grad_()
    out = sampling.denoise(sampling.guided(model, cond), z, model.scheduler, timesteps)
    assert torch.autograd.grad(out.square().sum(), z)[0].abs().sum() > 0


def test_eta_needs_generators(model):
    with pytest.raises(ValueError, match="one generator per image"):
        sampling.denoise(lambda *_: 0, start(model), model.scheduler, sampling.schedule(model.scheduler, 2), eta=1.0)


@pytest.mark.parametrize("n", [25, 61, 103, 121, 122, 1000])
def test_a_trailing_schedule_ends_in_the_picture_whatever_the_number_of_steps(n):
    # diffusers counts down in floats: for 61 steps and some sixty other numbers it goes one too far, to timestep -1
    timesteps = sampling.schedule(ldm.schedule(), n)
    assert len(timesteps) == n and timesteps[0] == 999 and timesteps[-1] >= 0
    assert (timesteps.diff() < 0).all()
    assert len(sampling.schedule(ldm.schedule(), n, 0.5)) == n // 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_of_order_two_it_is_the_multistep_solver_of_diffusers(kind):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    how = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ours = DDIMScheduler(**how, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", prediction_type=kind)
    theirs = DPMSolverMultistepScheduler(
        **how, timestep_spacing="trailing", prediction_type=kind, final_sigmas_type="zero", lower_order_final=True, euler_at_final=True
    )
    theirs.set_timesteps(9)
    timesteps = sampling.schedule(ours, 9)
    assert timesteps.tolist() == theirs.timesteps.tolist()
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def output(z, t):  # some smooth function of both
        return torch.tanh(0.7 * z + 0.3 * torch.sin(t.double() / 200)) - 0.1 * z.roll(1, -1)

    z = start.clone()
    for t in theirs.timesteps:
        z = theirs.step(output(z, t), t, z).prev_sample
    own = sampling.denoise(lambda z, t, i: sampling.noise_predicted(ours, output(z, t), z, t), start.clone(), ours, timesteps, order=2)
    torch.testing.assert_close(own, z.to(own), rtol=1e-4, atol=1e-4)


def test_of_order_two_half_as_many_steps_come_as_near():
    """Data of one Gaussian, whose exact predictions are known, so that the end of an exact walk is: error falls faster with order 2."""
    from diffusers import DDIMScheduler

    how = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": True}
    scheduler = DDIMScheduler(**how, clip_sample=False, timestep_spacing="trailing")
    scale = 1.0  # as wide as scaled latents are

    def predict(z, t, i):
        a = scheduler.alphas_cumprod[int(t)].double()
        return z * (1 - a).sqrt() / (a * scale**2 + 1 - a)

    start = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def ends(n, order):
        return sampling.denoise(predict, start.clone(), scheduler, sampling.schedule(scheduler, n), order=order)

    exact = ends(1000, 1)
    errors = {(n, order): float((ends(n, order) - exact).abs().max()) for n in (10, 20) for order in (1, 2)}
    assert errors[10, 2] < errors[20, 1] < errors[10, 1]
    with pytest.raises(ValueError, match="order 1, or 2 with eta 0"):
        sampling.denoise(predict, start, scheduler, sampling.schedule(scheduler, 3), order=2, eta=1.0, generators=[torch.Generator()])
