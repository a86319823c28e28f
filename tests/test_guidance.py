"""Guided generation against a slow second definition of itself, and against what must be true of any.

Everything runs on the tiny model, most of it in float64 where rounding cannot hide a mistake.
"""

import dataclasses
import math
import threading

import numpy as np
import plain_guidance
import pytest
import torch
from tiny import tiny_model

from histokit.core import files
from histokit.diffusion import backbone, sampling
from histokit.generate import guidance, guided_slot, guides
from histokit.vision import classifiers, features

CLASSES = ["gland", "necrosis", "stroma"]
QUICK = {"num_inference_steps": 4, "updates": 2, "confidence": 0.0, "loss": "log_conf", "lr": 0.1, "latent_lr": 0.05, "loss_steps": 2}


class Eye(torch.nn.Module):
    """A small random network; what matters of it is that gradients pass."""

    def __init__(self, dim=12):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 16, 5, 2), torch.nn.Linear(16, dim)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x)).mean(dim=(2, 3)))


def classifier(classes=CLASSES, tile_px=32, seed=0, sure=1.0, **given):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = features.Encoder("eye", Eye(), 12, {"eye": seed}, **given)
        found = classifiers.Classifier(encoder, classes, "linear", tile_px=tile_px, fit="resize")
        torch.nn.init.normal_(found.head.out.weight, std=sure)
        some = torch.rand(64, 1, 1, 1) * torch.randn(64, 3, 32, 32) + torch.randn(64, 3, 1, 1) / 4
        with torch.no_grad():
            found.head.standardise(encoder.features(some.clamp(-1, 1)))
    return found


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def double():
    held = tiny_model()
    for part in (held.vae, held.unet, held.text_encoder):
        part.double()
    held.dtype = torch.float64
    return held


def exact():
    found = classifier()
    found.encoder.net.double()
    return guides.Pictures(found.double(), CLASSES)


def jobs(*seeds, target=1, prompt="necrosis"):
    return [guidance.Job(prompt, target, seed, f"image {seed}") for seed in seeds]


def run(model, guide, queues, watch=None, distance=None, **settings):
    given = guidance.Settings.of(QUICK | settings)
    return {result.job.name: result for result in guidance.optimise(model, guide, queues, given, watch=watch, distance=distance)}


def same(one, other):
    return one.path == other.path and one.stop == other.stop and np.array_equal(one.image, other.image)


# --- the second definition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 1.0}, {"last_steps": 3}, {"loss_steps": 1}, {"loss": "log_conf"}, {"checkpoint": False}]
)
def test_a_batch_agrees_with_one_image_at_a_time_written_without_tricks(double, settings):
    settings = {"loss": "conf", "lr": 0.05, "latent_lr": 0.02, "updates": 3, **settings}
    guide, queues = exact(), [jobs(3, 5), jobs(4)]
    found = run(double, guide, queues, **settings)
    assert len(found) == 3
    for job in (*queues[0], *queues[1]):
        how = {"guidance_scale": 3.0, "loss_steps": 2, **settings}
        how = {key: how[key] for key in ("guidance_scale", "loss", "loss_steps", "lr", "latent_lr", "updates")}
        first = 4 - settings.get("last_steps", 4)
        pictures, path, _ = plain_guidance.optimise(
            double, guide.classifier, job.prompt, job.target, job.seed, num_inference_steps=4, confidence=0.0, first=first, **how
        )
        ours = found[job.name]
        assert [seen["confidence"] for seen in ours.path] == pytest.approx(path, abs=1e-8) and len(path) == 4
        assert np.ptp(path) > 1e-3, "the probability must move for this test to say anything"
        best = int(np.argmax(path))
        assert ours.chosen == best and ours.stop == "updates"
        byte = ((pictures[best] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.abs(ours.image.astype(int) - byte).max() <= 1


def test_early_stopping_agrees_with_it_too(double):
    guide = exact()
    _, free, _ = plain_guidance.optimise(double, guide.classifier, "necrosis", 1, 3, num_inference_steps=4, updates=6, confidence=0, lr=0.1)
    middle = (free[0] + free[-1]) / 2
    assert free[-1] - free[0] > 1e-3
    how = {"updates": 6, "confidence": middle, "lr": 0.1}
    _, path, _ = plain_guidance.optimise(double, guide.classifier, "necrosis", 1, 3, num_inference_steps=4, loss_steps=1, **how)
    (ours,) = run(double, guide, [jobs(3)], loss="conf", loss_steps=1, latent_lr=1e-3, **how).values()
    assert [seen["confidence"] for seen in ours.path] == pytest.approx(path, abs=1e-8) and 1 < len(path) < 7
    assert ours.stop == "confidence" and ours.chosen == len(path) - 1, "the picture that was sure enough is the one that is kept"
    assert ours.path[-1]["confidence"] >= middle > max(seen["confidence"] for seen in ours.path[:-1])


# --- without updates, with recomputation -----------------------------------------------------------------------------


@pytest.mark.parametrize("last_steps", [0, 2])
def test_zero_updates_return_the_plain_sample(model, last_steps):
    guide, seeds = guides.Pictures(classifier(), CLASSES), [1, 2, 3, 4]
    found = run(model, guide, [jobs(seed) for seed in seeds], updates=0, last_steps=last_steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    how = {"guidance_scale": 3.0, "num_inference_steps": 4, "batch": 4}
    plain = sampling.sample(model, ["necrosis"] * 4, generators, **how)
    for result, image in zip(found.values(), plain, strict=True):
        assert np.abs(result.image.astype(int) - image).max() <= 1 and len(result.path) == 1 and result.stop == "updates"
        assert result.image is result.plain


def test_the_first_picture_is_the_plain_sample_whatever_follows(model):
    guide = guides.Pictures(classifier(), CLASSES)
    moved, still = (run(model, guide, [jobs(7)], updates=n)["image 7"] for n in (3, 0))
    assert np.array_equal(moved.plain, still.image) and not np.array_equal(moved.image, moved.plain)


def test_recomputing_each_step_changes_no_gradient_and_keeps_memory_flat(double):
    guide = exact()
    kept, again = (run(double, guide, [jobs(1), jobs(2)], checkpoint=flag) for flag in (False, True))
    for name in kept:
        for one, other in zip(kept[name].path, again[name].path, strict=True):
            assert one == pytest.approx(other, abs=1e-12)

    def held(steps, checkpoint):
        """Bytes that the forward pass of one batch keeps for its backward pass."""
        settings = guidance.Settings.of(QUICK | {"num_inference_steps": steps, "checkpoint": checkpoint})
        batch, seen = guidance._Batch(double, guide, [jobs(1)], settings, None, None), {}
        batch.slots = [batch._next(0)]

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in double.unet.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z, views, _ = batch._chain()
        assert z.requires_grad and len(views) == 2
        return sum(size for place, size in seen.items() if place not in own)

    flat, growing = held(12, True) / held(4, True), held(12, False) / held(4, False)
    assert growing > 2.5, "without recomputation every step keeps its activations"
    assert held(12, True) < 0.05 * held(12, False) and flat < 3.1  # what is left are the latents between the steps


# --- slots -----------------------------------------------------------------------------------------------------------


def test_no_image_depends_on_its_neighbours_or_on_when_they_finish(model):
    guide = guides.Pictures(classifier(), CLASSES)
    alone = run(model, guide, [jobs(1, 2), [], []])
    among = run(model, guide, [jobs(1, 2), jobs(11, target=0), jobs(12, 13, 14, target=2, prompt="stroma")])
    assert len(alone) == 2 and len(among) == 6
    assert all(same(alone[name], among[name]) for name in alone)


def test_a_finished_image_leaves_and_the_next_of_its_slot_comes_in(model):
    guide, order = guides.Pictures(classifier(), CLASSES), []
    start = run(model, guide, [jobs(seed) for seed in range(6)], updates=0)
    sure = sorted(start.values(), key=lambda result: -result.path[0]["weighted"])
    third, fourth = (result.path[0]["weighted"] for result in sure[2:4])
    limit = (third + fourth) / 2  # between two, as a value in another slot differs by rounding
    assert third - fourth > 1e-5
    given = guidance.Settings.of(QUICK | {"confidence": limit, "updates": 3, "lr": 1e-9, "latent_lr": 1e-9})
    quick, slow = [result.job for result in sure[:3]], [result.job for result in sure[3:]]
    seen = []
    for result in guidance.optimise(model, guide, [quick, slow], given, watch=lambda job, k, image, p: seen.append((job.name, k))):
        order.append((result.job.name, result.stop, result.updates))
    assert [stop for _, stop, _ in order] == ["confidence"] * 3 + ["updates"] * 3
    assert [updates for _, _, updates in order] == [0, 0, 0, 3, 3, 3]
    assert seen[:4] == [(quick[0].name, 0), (slow[0].name, 0), (quick[1].name, 0), (slow[0].name, 1)]
    assert len(seen) == 3 + 3 * 4


def test_every_image_is_made_once_and_the_length_of_its_latent_is_kept(model, monkeypatch):
    guide, lengths = guides.Pictures(classifier(), CLASSES), []
    update = guided_slot.Slot.update
    monkeypatch.setattr(guided_slot.Slot, "update", lambda slot: (update(slot), lengths.append((slot.latent.norm() / slot.norm).item())))
    found = run(model, guide, [jobs(1, 4, 7), jobs(2), jobs(3, 6)])
    assert sorted(found) == [f"image {i}" for i in (1, 2, 3, 4, 6, 7)]
    assert len(lengths) == 12 and lengths == pytest.approx([1.0] * 12, abs=1e-6)
    assert all(len(result.path) == 3 and result.stop == "updates" for result in found.values())


def test_the_plain_beginning_is_sampled_once_where_only_the_last_steps_are_optimised(model, monkeypatch):
    guide, asked, guided = guides.Pictures(classifier(), CLASSES), [], sampling.guided

    def counted(*args):
        predict = guided(*args)
        return lambda z, t, i: (asked.append(int(t)), predict(z, t, i))[1]

    monkeypatch.setattr(sampling, "guided", counted)
    run(model, guide, [jobs(1)], last_steps=2, loss_steps=1, updates=5, checkpoint=False)
    assert [asked.count(t) for t in sampling.schedule(model.scheduler, 4).tolist()] == [1, 1, 6, 6]


# --- several candidates ----------------------------------------------------------------------------------------------


def candidate(job, n):
    return dataclasses.replace(job, seed=files.seed(job.seed, "candidate", n) if n else job.seed, name=f"candidate {n}")


def test_of_several_candidates_the_likeliest_is_taken(model):
    guide, (job,) = guides.Pictures(classifier(), CLASSES), jobs(4)
    each = [run(model, guide, [[candidate(job, n)]], updates=0)[f"candidate {n}"] for n in range(4)]
    sure = [result.path[0]["confidence"] for result in each]
    assert np.argmax(sure) > 0, "the first must not be the likeliest for this test to say anything"
    (found,) = run(model, guide, [[job]], updates=0, candidates=4).values()
    assert found.drawn == sure and found.chosen == 0 and found.stop == "updates" and found.path[0]["confidence"] == max(sure)
    assert np.array_equal(found.image, each[int(np.argmax(sure))].image) and np.array_equal(found.plain, each[0].image)


def test_updates_begin_at_the_likeliest_candidate(model):
    guide, (job,) = guides.Pictures(classifier(), CLASSES), jobs(4)
    (found,) = run(model, guide, [[job]], candidates=4).values()
    (begun,) = run(model, guide, [[candidate(job, int(np.argmax(found.drawn)))]]).values()
    assert len(found.drawn) == 4 and found.path == begun.path and np.array_equal(found.image, begun.image)


def test_drawing_ends_at_the_first_candidate_that_is_sure_enough(model):
    guide, (job,) = guides.Pictures(classifier(), CLASSES), jobs(4)
    (free,) = run(model, guide, [[job]], updates=0, candidates=6).values()
    rising = [p for k, p in enumerate(free.drawn) if p == max(free.drawn[: k + 1])]
    assert len(rising) > 1
    limit = (rising[-2] + rising[-1]) / 2
    (found,) = run(model, guide, [[job]], updates=3, candidates=6, confidence=limit).values()
    assert found.drawn == free.drawn[: free.drawn.index(rising[-1]) + 1] and found.stop == "confidence"
    assert np.array_equal(found.image, free.image) and len(found.path) == 1


def test_an_image_that_is_drawn_and_one_that_is_updated_do_not_touch_each_other(model):
    guide = guides.Pictures(classifier(), CLASSES)
    first, second = jobs(1, 2), jobs(3, 4, 5)
    firsts = sorted(p for result in run(model, guide, [first, second], candidates=3, updates=0).values() for p in result.drawn[:1])
    limit = (firsts[2] + firsts[3]) / 2  # two of the five are sure enough at once
    among = run(model, guide, [first, second], candidates=3, confidence=limit)
    assert len({len(result.drawn) for result in among.values()}) > 1, "they must differ in their number of draws"
    for queue, queues in ((first, [first, []]), (second, [[], second])):
        alone = run(model, guide, queues, candidates=3, confidence=limit)
        assert all(same(alone[job.name], among[job.name]) and alone[job.name].drawn == among[job.name].drawn for job in queue)


# --- batches side by side --------------------------------------------------------------------------------------------


def test_batches_side_by_side_make_the_images_of_one_after_the_other(model):
    guide, queues = guides.Pictures(classifier(), CLASSES), [jobs(1, 5), jobs(2), jobs(3), [], []]
    given, cores = guidance.Settings.of(QUICK), torch.get_num_threads()
    beside = {result.job.name: result for result in guidance.optimise(model, guide, queues, given, batch=2)}
    assert torch.get_num_threads() == cores
    torch.set_num_threads(1)  # as each of them had; two round otherwise
    try:
        after = run(model, guide, queues[:2]) | run(model, guide, [*queues[2:4]])
    finally:
        torch.set_num_threads(cores)
    assert len(beside) == 4 and all(same(beside[name], after[name]) for name in after)


def test_what_goes_wrong_in_one_of_them_is_raised_and_the_others_end(model):
    class Failing(guides.Pictures):
        def __call__(self, images):
            if threading.current_thread() is not threading.main_thread() and self.calls.append(1) is None and len(self.calls) > 3:
                raise RuntimeError("the guide broke")
            return super().__call__(images)

    guide = Failing(classifier(), CLASSES)
    guide.calls = []
    with pytest.raises(RuntimeError, match="the guide broke"):
        list(guidance.optimise(model, guide, [jobs(1, 2), jobs(3, 4)], guidance.Settings.of(QUICK), batch=1))
    assert not any("_work" in thread.name for thread in threading.enumerate())


def test_leaving_off_ends_what_runs_side_by_side(model):
    guide = guides.Pictures(classifier(), CLASSES)
    made = guidance.optimise(model, guide, [jobs(*range(50)), jobs(*range(50, 100))], guidance.Settings.of(QUICK | {"updates": 0}), batch=1)
    next(made)
    made.close()
    assert not any("_work" in thread.name for thread in threading.enumerate())


# --- it does what it is for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["conf", "log_conf", "margin"])
def test_the_guide_becomes_surer_of_the_class_that_was_asked_for(model, loss):
    guide = guides.Pictures(classifier(), CLASSES)
    for target in range(3):
        (result,) = run(model, guide, [jobs(5, target=target)], loss=loss, updates=8).values()
        path = [seen["confidence"] for seen in result.path]
        assert path[result.chosen] == max(path) and path[-1] > path[0]


def test_away_from_a_class_towards_uncertainty_and_to_the_border_between_two(model):
    guide = guides.Pictures(classifier(), CLASSES)
    for loss in ("neg_conf", "neg_log_conf", "neg_entropy", "conf_boundary"):
        (result,) = run(model, guide, [jobs(5)], loss=loss, updates=6, keep="last").values()
        losses = [seen["loss"] for seen in result.path]
        assert losses[-1] < losses[0] and result.chosen == 6, loss


def test_a_guide_of_latents_needs_no_picture_until_the_end(model, monkeypatch):
    class Sum:
        space, classes, label = "latent", CLASSES, guides.Pictures.label

        def __call__(self, z):
            return torch.stack([z.mean(dim=(1, 2, 3)) * s for s in (1.0, 4.0, -4.0)], dim=1)

    decoded, decode = [], model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda z: decoded.append(len(z)) or decode(z))
    found = run(model, Sum(), [jobs(1), jobs(2)], updates=4)
    for result in found.values():
        path = [seen["confidence"] for seen in result.path]
        assert path[-1] > path[0] and result.image.shape == (32, 32, 3)
    assert decoded == [1] * 4, "the plain and the chosen one of each"


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance_scale": 2.0}, {"num_inference_steps": 5}, {"updates": 1}, {"confidence": 1e-6}, {"loss": "conf"}, {"loss": "margin"},
        {"loss": "margin", "look_alikes": ("stroma",)}, {"loss_steps": 1}, {"loss_schedule": "uniform"}, {"optimise": ("latent",)},
        {"optimise": ("cond",)}, {"optimise": ("uncond",)}, {"lr": 0.2}, {"latent_lr": 0.1}, {"offsets": "shared"}, {"offset_rank": 2},
        {"last_steps": 3}, {"cutouts": 2}, {"cutouts": 2, "cutout_noise": 0.1}, {"pixel_weight": 9.0}, {"latent_weight": 9.0},
        {"lpips_weight": 9.0}, {"loss": "neg_conf", "keep": "last"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_acts(model, changed):
    guide = guides.Pictures(classifier(tile_px=24), CLASSES)
    needs = {"look_alikes": {"loss": "margin"}, "cutout_noise": {"cutouts": 2}, "keep": {"loss": "neg_conf"}}
    base = next((given for name, given in needs.items() if name in changed), {})
    distance = lambda x, y: (x - y).abs().mean(dim=(1, 2, 3))  # noqa: E731
    (before,), (after,) = (run(model, guide, [jobs(9)], distance=distance, **given).values() for given in (base, changed))
    told = [[seen["confidence"] for seen in result.path] + [result.chosen] for result in (before, after)]
    assert len(told[0]) != len(told[1]) or not np.allclose(*told, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 1.2}, "confidence is a probability, from 0"),
        ({"loss": "hope"}, "loss is 'hope'; expected one of conf"),
        ({"loss_schedule": "late"}, "loss_schedule is 'late'"),
        ({"optimise": ("prompt",)}, r"optimise is \['prompt'\]"),
        ({"optimise": ()}, r"optimise is \[\]"),
        ({"updates": -1}, "updates is -1; expected 0 or more"),
        ({"lr": 0}, "lr is 0; expected more than 0"),
        ({"candidates": 3, "last_steps": 2, "loss_steps": 1}, "candidates does nothing here: they are whole samples"),
        ({"candidates": 0}, "candidates is 0; expected more than 0"),
        ({"last_steps": 30}, "no more than the 20 steps there are"),
        ({"last_steps": 2, "loss_steps": 3}, "no prediction before the steps that are optimised"),
        ({"loss": "neg_conf"}, "confidence does nothing here: loss neg_conf does not make the target likelier"),
        ({"look_alikes": ("gland",)}, "look_alikes does nothing here"),
        ({"cutout_noise": 0.1}, "there are no cutouts"),
        ({"optimise": ("latent",), "offset_rank": 4}, "only the latent is optimised"),
        ({"optimise": ("uncond",), "guidance_scale": 1}, "the empty prompt is not asked"),
        ({"strenght": 1}, "guided generation has no setting 'strenght'"),
    ],
)
def test_a_setting_that_is_wrong_or_does_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        guidance.Settings.of(settings)


def test_weights_of_the_predictions_are_the_published_ones():
    assert guidance.Settings().weights().tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert guidance.Settings(loss_schedule="uniform").weights().tolist() == pytest.approx([1 / 3] * 3)


def test_without_guidance_the_empty_prompt_has_no_offset(model):
    assert guidance.Settings(guidance_scale=1.0).acting == ("latent", "cond")
    guide = guides.Pictures(classifier(), CLASSES)
    with_, without = (run(model, guide, [jobs(2)], guidance_scale=1.0, optimise=names) for names in (guides.VARIABLES, ("latent", "cond")))
    assert same(with_["image 2"], without["image 2"])


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_image_that_is_not_finite_is_named_and_the_others_go_on(model, monkeypatch):
    guide, embed = guides.Pictures(classifier(), CLASSES), backbone.embed
    monkeypatch.setattr(backbone, "embed", lambda m, prompts: embed(m, prompts) * (math.nan if prompts == ["bad"] else 1))
    queues = [[*jobs(1, prompt="bad"), *jobs(2)], jobs(3)]
    found, clean = run(model, guide, queues), run(model, guide, [[*jobs(9), *jobs(2)], jobs(3)])
    bad = found.pop("image 1")
    assert bad.stop == "latent not finite at update 0, step 1 of 4" and bad.image is None and bad.path == []
    assert all(same(found[name], clean[name]) for name in ("image 2", "image 3"))


def test_a_loss_that_is_not_finite_ends_its_image_with_the_best_so_far(model):
    inner, calls = classifier(), []

    class Failing(guides.Pictures):
        def __call__(self, images):
            calls.append(len(images))  # once when it is checked, then one picture at a time, of the two images in turn
            return super().__call__(images) * (math.nan if len(calls) == 6 else 1.0)

    found = run(model, Failing(inner, CLASSES), [jobs(1), jobs(2)], updates=2, loss_steps=1)
    assert found["image 1"].stop == "loss not finite at update 2" and found["image 1"].image is not None
    assert len(found["image 1"].path) == 2 and found["image 2"].stop == "updates"


def test_a_gradient_that_is_not_finite_is_not_taken(model):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.slope = slope
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * ctx.slope, None

    class Cliff(guides.Pictures):
        def _check(self, name):
            pass

        def __call__(self, images):
            slope = (math.inf, 1.0)[len(asked) % 2]  # one picture at a time, of the two images in turn
            asked.append(slope)
            return super().__call__(Steep.apply(images, slope))

    asked = []
    found = run(model, Cliff(classifier(), CLASSES), [jobs(1), jobs(2)])
    assert found["image 1"].stop == "gradient not finite at update 1" and np.array_equal(found["image 1"].image, found["image 1"].plain)
    assert found["image 2"].stop == "updates"


def test_a_scheduler_that_keeps_state_is_refused(model):
    from diffusers import PNDMScheduler

    other = dataclasses.replace(model, scheduler=PNDMScheduler.from_config(model.scheduler.config))
    with pytest.raises(ValueError, match="PNDMScheduler"):
        run(other, guides.Pictures(classifier(), CLASSES), [jobs(1)])
    with pytest.raises(ValueError, match="look_alikes names only 'necrosis', the class asked for"):
        run(model, guides.Pictures(classifier(), CLASSES), [jobs(1)], loss="margin", look_alikes=("necrosis",))
    with pytest.raises(ValueError, match="compile gains nothing on a CPU"):
        run(model, guides.Pictures(classifier(), CLASSES), [jobs(1)], compile=True)
    with pytest.raises(ValueError, match="lpips_weight needs LPIPS weights"):
        run(model, guides.Pictures(classifier(), CLASSES), [jobs(1)], lpips_weight=1.0)


# --- guides ----------------------------------------------------------------------------------------------------------


def test_a_guide_of_other_classes_or_without_gradients_is_refused():
    with pytest.raises(ValueError, match="other classes than this dataset has: fat, gland"):
        guides.Pictures(classifier(["fat", "necrosis", "stroma"]), CLASSES)
    with pytest.raises(ValueError, match="the same names in another order"):
        guides.Pictures(classifier(CLASSES[::-1]), CLASSES)
    blind = classifiers.Classifier(features.load("picture"), CLASSES, tile_px=32)
    with pytest.raises(ValueError, match=r"no gradient passes through the guide \(encoder picture"):
        guides.Pictures(blind, CLASSES)
    with pytest.raises(ValueError, match="the guide does not know the class 'fat'; expected one of gland, necrosis, stroma"):
        guides.Pictures(classifier(), CLASSES).label("fat")


def test_saturated_pixels_are_clipped_and_keep_their_gradient():
    guide = guides.Pictures(classifier(), CLASSES)
    images = torch.full((1, 3, 32, 32), 1.4).requires_grad_()
    inside = torch.full((1, 3, 32, 32), 1.0).requires_grad_()
    torch.testing.assert_close(guide(images), guide(inside))
    slopes = [torch.autograd.grad(guide(x)[0, 1], x)[0] for x in (images, inside)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().max() > 0


def test_a_guide_sees_what_its_classifier_sees_of_the_saved_tile(model):
    held = classifier(tile_px=24)
    guide = guides.Pictures(held, CLASSES)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = ((images / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    from PIL import Image

    from histokit.tiles import decode

    small = np.stack([decode.fitted(Image.fromarray(tile), 24, "resize", None, "") for tile in pixels])
    with torch.no_grad():
        ours = guide(images).softmax(dim=1)
    np.testing.assert_allclose(ours, held.predict(small), atol=0.03)


def test_losses_are_what_they_say():
    logits, targets = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 3.0]]), torch.tensor([0, 1])
    p = logits.softmax(dim=1)
    picked = p[[0, 1], [0, 1]]
    torch.testing.assert_close(guides.conf(logits, targets), -picked)
    torch.testing.assert_close(guides.neg_conf(logits, targets), picked)
    torch.testing.assert_close(guides.log_conf(logits, targets), -picked.log())
    torch.testing.assert_close(guides.neg_log_conf(logits, targets), picked.log())
    torch.testing.assert_close(guides.margin(logits, targets), torch.tensor([-2.0, 2.0]))
    torch.testing.assert_close(guides.margin(logits, targets, [2]), torch.tensor([-3.0, 2.0]))
    torch.testing.assert_close(guides.margin(logits, targets, [0, 1]), torch.tensor([-2.0, -0.5]))
    torch.testing.assert_close(guides.conf_boundary(logits, targets), -2 * torch.stack([p[0, 1], p[1, 1]]))
    equal = torch.zeros(1, 3)
    assert guides.neg_entropy(equal, targets[:1]).item() == pytest.approx(math.log(3)), "least where all are equally probable"
    assert (guides.neg_entropy(logits, targets) > math.log(3)).all()


def test_cutouts_are_crops_brought_to_one_size_and_follow_from_their_generator():
    images = torch.arange(2 * 3 * 40 * 40.0).view(2, 3, 40, 40)
    fresh = lambda: [torch.Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    crops = guides.cutouts(images, 5, fresh(), side=16)
    assert crops.shape == (10, 3, 16, 16) and torch.equal(crops, guides.cutouts(images, 5, fresh(), side=16))
    assert crops[:5].max() < crops[5:].min(), "the crops of an image stay together"
    whole = guides.cutouts(images, 3, fresh(), side=16, power=0.0)  # u^0: always the whole picture
    torch.testing.assert_close(whole[0], torch.nn.functional.adaptive_avg_pool2d(images[0], 16))
    noisy = guides.cutouts(images, 200, fresh(), side=16, power=0.0, noise=0.5)
    assert (noisy[:200] - whole[0]).std().item() == pytest.approx(0.5, rel=0.02)
    small = guides.cutouts(images[:, :, :16, :16], 2, fresh(), side=16)
    torch.testing.assert_close(small[0], images[0, :, :16, :16])
