"""A push by a classifier at every denoising step: against diffusers' own scheduler, and against what must be true of any guidance."""

import dataclasses
import json

import numpy as np
import pytest
import squares
import torch
from test_latent_classifier import network
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.diffusion import backbone, sampling
from histokit.generate import class_guided, guided, guides, latent_guidance, policies
from histokit.runs import notebooks
from histokit.show import plots
from histokit.tiles import data
from histokit.training import unconditional
from histokit.vision import latent_classifiers

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class Bright(torch.nn.Module):
    """Finds class k the likelier, the larger the mean of channel k."""

    def forward(self, z, t):
        return 30 * z.mean(dim=(2, 3))[:, :3]


def start(count=3):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def plain(z, t, i):
    return 0.9 * z + 0.01


def walk(model, settings, classifier=None, targets=(0, 1, 2), z=None, predict=plain, watch=None, **more):
    z = start() if z is None else z
    targets = torch.tensor(targets)
    steer = latent_guidance.steered(predict, classifier or Bright(), targets, model.scheduler, latent_guidance.Settings.of(settings), watch)
    return sampling.denoise(steer, z, model.scheduler, sampling.schedule(model.scheduler, STEPS), **more)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_is_that_of_the_paper(model, eta):
    from diffusers import DDIMScheduler

    net, z = network(), start()
    targets, scale = torch.tensor([2, 0, 1]), 7.0
    ours = walk(
        model, {"class_scale": scale}, net, targets.tolist(), eta=eta, generators=[torch.Generator().manual_seed(k) for k in range(3)]
    )
    stock = DDIMScheduler.from_config(model.scheduler.config)
    stock.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    for t in stock.timesteps:
        x = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x, t).log_softmax(1)[range(3), targets].sum(), x)
        eps = plain(z, t, 0) - scale * (1 - stock.alphas_cumprod[t]).sqrt() * slope
        some = eta if t != stock.timesteps[-1] else 0.0  # noise on the last step would stay in the picture
        noise = sampling.noise(generators, z.shape[1:]) if some else None
        z = stock.step(eps, t, z, eta=some, variance_noise=noise).prev_sample
    torch.testing.assert_close(ours, z, atol=2e-5, rtol=1e-4)


def test_scale_0_is_no_push_bit_for_bit(model):
    bare = sampling.denoise(plain, start(), model.scheduler, sampling.schedule(model.scheduler, STEPS))
    assert torch.equal(walk(model, {"class_scale": 0}), bare)
    assert torch.equal(walk(model, {"class_scale": 5, "interval": (0.0, 1e-6)}), bare), "outside of the interval nothing is asked"
    assert not torch.equal(walk(model, {"class_scale": 5}), bare)


@pytest.mark.parametrize("guide_on", ["zt", "z0"])
def test_a_larger_scale_makes_the_class_likelier(model, guide_on):
    sure = []
    for scale in (0.0, 0.2, 1.0):
        end = walk(model, {"class_scale": scale, "guide_on": guide_on})
        sure.append(float(Bright()(end, 0).log_softmax(1)[range(3), range(3)].mean()))
    assert sure[0] < sure[1] < sure[2]


def test_a_sample_is_what_it_is_without_the_others(model):
    net = network()
    together, alone = walk(model, {}, net), walk(model, {}, net, [1], z=start()[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_the_clean_latent_is_asked_without_noise_at_timestep_0(model):
    asked, z = [], start(1)  # a batch of one is asked whole, on however many cores

    class Net(Bright):
        def forward(self, z, t):
            asked.append((z.detach(), t))
            return super().forward(z, t)

    walk(model, {"guide_on": "z0", "cap": 0.1}, Net(), [0], z)
    t = sampling.schedule(model.scheduler, STEPS)[0]
    a = model.scheduler.alphas_cumprod[t]
    torch.testing.assert_close(asked[0][0], (z - (1 - a).sqrt() * plain(z, t, 0)) / a.sqrt())
    assert not any(t.any() for _, t in asked)


def test_the_cap_bounds_every_push_and_leaves_small_ones(model):
    def pushes(cap):
        found, before = [], []

        def predict(z, t, i):
            before.append(plain(z, t, i))
            return before[-1]

        settings = latent_guidance.Settings(class_scale=3.0, cap=cap)
        steer = latent_guidance.steered(
            predict, Bright(), torch.arange(3), model.scheduler, settings, lambda i, ratio, *_: found.append(ratio)
        )
        moved = steer(start(), torch.tensor(500), 0) - before[0]
        return moved.flatten(1).norm(dim=1) / before[0].flatten(1).norm(dim=1), found[0]

    free, said = pushes(0.0)
    torch.testing.assert_close(free, said)
    middle = float(free.sort().values[1])
    bound, said = pushes(middle)
    torch.testing.assert_close(bound, free.clamp(max=middle), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said, free)  # what is told is the length before the cap


def test_where_nothing_is_left_of_the_picture_nothing_is_pushed():
    from histokit.training.pretraining import ldm

    scheduler = ldm.schedule()  # ends in noise alone
    steer = latent_guidance.steered(plain, Bright(), torch.arange(3), scheduler, latent_guidance.Settings())
    assert torch.equal(steer(start(), torch.tensor(999), 0), plain(start(), 999, 0))
    assert not torch.equal(steer(start(), torch.tensor(800), 0), plain(start(), 800, 0))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"scale": 2}, "no setting 'scale'"),
        ({"guide_on": "x0"}, "zt .* or z0"),
        ({"interval": (0.5, 0.2)}, "two shares"),
        ({"class_scale": -1.0}, "class_scale is -1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"cap": float("nan")}, "cap is nan"),
        ({"eta": 1.5}, "eta is 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        latent_guidance.Settings.of(given)


# --- a set of tiles ------------------------------------------------------------------------------------------------------


@pytest.fixture
def guide(model, tmp_path):
    net = network()
    net.facts |= {"classes": squares.CLASSES, "key": "k"}
    net.save(tmp_path / "guide", space=model.latent_space)
    return latent_classifiers.load(tmp_path / "guide")


@pytest.fixture
def tiles():
    squares.dataset()
    return data.load(runs.start(experiment="exp", step="look"))


def table(model, tiles, count=5, names=("blue",)):
    how = {"policy": "none", "num_inference_steps": STEPS, "guidance_scale": 1.0}
    return policies.job_table(model, tiles, {name: name for name in names}, count, **how)


def made(model, guide, tiles, count=5, step="04_guided", names=("blue",), said=print, **settings):
    run = runs.start(experiment="exp", step=step, class_name="blue" if len(names) == 1 else "all")
    how = latent_guidance.Settings.of({"num_inference_steps": STEPS} | settings)
    return class_guided.render(model, guide, table(model, tiles, count, names), run, tiles, how, batch=2, say=said), run


def test_tiles_follow_from_their_jobs_alone_and_more_of_them_keep_the_first(model, guide, tiles):
    some, _ = made(model, guide, tiles, 3)
    more, again = made(model, guide, tiles, 5)
    assert len(more) == 5 and again.record["notes"]["images_reused"] == 3
    np.testing.assert_array_equal(data.pixels(some), data.pixels(more.head(3)))
    fresh, _ = made(model, guide, tiles, 5, "fresh")
    np.testing.assert_array_equal(data.pixels(fresh), data.pixels(more))
    assert more["method"].eq("class_guided").all() and more["label"].eq("blue").all()
    used = json.loads(more["settings"].iloc[0])
    assert used["class_scale"] == 4.0 and used["guide"] == latent_classifiers.identity(guide)
    assert set(json.loads(more["scores"].iloc[0])) == set(class_guided.SCORES)
    assert "push was" in class_guided.remarks(more, again)[0]


def test_without_a_push_a_tile_is_that_of_text_alone(model, guide, tiles):
    still, _ = made(model, guide, tiles, 3, class_scale=0)
    jobs = table(model, tiles, 3)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in jobs["seed"]]
    bare = sampling.sample(model, list(jobs["prompt"]), generators, guidance_scale=1.0, num_inference_steps=STEPS, batch=2)
    np.testing.assert_array_equal(data.pixels(still, 32), bare)


def test_what_was_seen_on_the_way_is_kept_with_the_tile(model, guide, tiles):
    rows, _ = made(model, guide, tiles, 2)
    seen = class_guided.walks(rows)
    assert seen["timestep"].tolist() == sampling.schedule(model.scheduler, STEPS).tolist() * 2
    assert seen["ratio"].gt(0).all() and seen["p"].between(0, 1).all() and seen["class"].eq("blue").all()
    images, walks = class_guided.tried(model, guide, table(model, tiles, 2), latent_guidance.Settings(num_inference_steps=STEPS), batch=2)
    np.testing.assert_array_equal(images, data.pixels(rows, 32))
    assert [w.p for w in walks] == [g["p"].tolist() for _, g in seen.groupby("tile_id", sort=False)]
    assert json.loads(rows["scores"].iloc[0])["guide"] == walks[0].end


def test_one_whose_push_is_not_finite_is_named_and_the_others_are_what_they_were(model, guide, tiles, monkeypatch):
    rows, _ = made(model, guide, tiles, 4)
    honest, count = latent_guidance.steered, []

    def breaks(predict, guide, targets, scheduler, settings, watch):
        class Guide:
            def __call__(self, z, t):
                count.append(1)
                wrong = torch.tensor([len(count) == 2 and k == 1 for k in range(len(z))])  # second step of the first batch, second image
                return torch.where(wrong[:, None], float("nan"), guide(z, t))

        return honest(predict, Guide(), targets, scheduler, settings, watch)

    monkeypatch.setattr(latent_guidance, "steered", breaks)
    monkeypatch.setattr(latent_guidance.parallel, "rows", lambda call, *batch: call(*batch))
    said = []
    found, run = made(model, guide, tiles, 4, "broken", said=said.append)
    assert len(found) == 3 and run.record["notes"]["failed"] == {
        f"{files.slug('blue')}-00001": f"latent or push not finite at step 2 of {STEPS}"
    }
    assert "00001" in said[0] and "class_scale" in said[0]
    keep = rows[~rows["tile_id"].str.endswith("00001")]
    np.testing.assert_array_equal(data.pixels(found), data.pixels(keep))


def test_a_scale_that_blows_the_latent_up_makes_no_tile(model, guide, tiles):
    said = []
    found, run = made(model, guide, tiles, 2, "wild", said=said.append, class_scale=1e38)
    assert not len(found) and len(said) == 2
    assert class_guided.remarks(found, run) == ["No tile was made."]


def test_the_panel_shows_what_will_be_written(model, guide, tiles):
    rows, _ = made(model, guide, tiles, 3)
    settings, jobs = latent_guidance.Settings(num_inference_steps=STEPS), table(model, tiles, 3)
    show = class_guided.Previewer(model, guide, jobs, settings, batch=2, table=lambda seed: table(model, tiles, 3))
    preview, steps = show(), []
    np.testing.assert_array_equal(preview.images, data.pixels(rows.head(2), 32))
    assert show.known(class_scale=1.0) is None
    changed = show(class_scale=1.0, on_step=lambda k, n, x0: steps.append(k))
    assert steps == [1, 2, 3, 4] and not np.array_equal(changed.images, preview.images) and show.known(class_scale=1.0) is not None
    with pytest.raises(ValueError, match="nothing to preview"):
        class_guided.Previewer(model, guide, jobs.head(0), settings)


def test_it_starts_from_noise_and_asks_for_known_classes(model, guide, tiles):
    run, settings = runs.start(experiment="exp", step="04_guided", class_name="blue"), latent_guidance.Settings()
    with pytest.raises(ValueError, match="policy: none"):
        class_guided.render(model, guide, policies.job_table(model, tiles, {"blue": "blue"}, 1), run, tiles, settings)
    with pytest.raises(ValueError, match="does not know the class 'pink'"):
        class_guided.render(model, guide, table(model, tiles, 1).assign(**{"class": "pink"}), run, tiles, settings)


def test_a_guide_of_another_base_is_refused(model, guide, tiles):
    run = runs.start(experiment="exp", step="21_latent_classifier")
    guide.save(run.folder)
    run.finish({})
    reader = runs.start(experiment="exp", step="04_guided", class_name="blue")
    assert class_guided.load_guide(reader, "21_latent_classifier", squares.CLASSES, model=model).classes == squares.CLASSES
    files.write_json(
        run.folder / "model.json", files.read_json(run.folder / "model.json") | {"space": model.latent_space | {"scaling": 1.0}}
    )
    with pytest.raises(ValueError, match="scale of the latents"):
        class_guided.load_guide(reader, "21_latent_classifier", squares.CLASSES, model=model)


def test_both_ways_of_the_notebook_answer_to_the_same_names(model, guide, tiles, repository):
    assert guides.way("pixel") is guided and guides.way("latent") is class_guided
    with pytest.raises(ValueError, match="pixel .* or latent"):
        guides.way("pictures")
    asked = {"class_scale": 3.0, "guidance_scale": 1.0, "num_inference_steps": STEPS, "candidates": 2, "updates": 1, "confidence": 0.5}
    settings = class_guided.settings_of(asked | {"interval": [0.0, 0.9], "lpips": "file"})
    assert settings == latent_guidance.Settings(3.0, 1.0, STEPS, interval=(0.0, 0.9))
    pixel = guided.settings_of(asked | {"loss_steps": 1, "updates": 2})
    assert pixel.updates == 2
    declared = set(notebooks.declared(repository / "notebooks" / "04_guided.ipynb"))
    for sliders in (class_guided.sliders(settings), guided.sliders(pixel)):
        assert set(sliders) <= declared, "the panel's button would write what no notebook declares"
    with pytest.raises(ValueError, match="arm of a 06_classifier"):
        class_guided.load_guide(None, "guide", [], arm="real")
    guide.facts |= {"noise": "uniform", "size": "mini", "curve": [{"accuracy": 0.9}, {"accuracy": 0.5}]}
    assert class_guided.described(guide, ["blue"]).iloc[0, 1:4].tolist() == ["0.90", "0.70", "0.33"]
    assert not class_guided.warnings(guide, settings) and not guided.warnings(None, pixel)
    guide.facts["noise"] = "none"
    assert "NEVER SEEN NOISE" in class_guided.warnings(guide, settings)[0]
    assert not class_guided.warnings(guide, dataclasses.replace(settings, guide_on="z0"))


def test_what_is_shown_of_a_set(model, guide, tiles):
    jobs, run = table(model, tiles, 3), runs.start(experiment="exp", step="04_guided", class_name="blue")
    settings = latent_guidance.Settings(3.0, num_inference_steps=STEPS)
    show = class_guided.Previewer(model, guide, jobs, settings, None, lambda seed: jobs, batch=2)
    frames, title, captions = class_guided.one_tile(show)
    assert len(frames) == len(captions) == 5 and title.startswith("blue") and captions[:2] == ["class_scale 0", "class_scale 1.5"]
    rows = class_guided.render(model, guide, jobs, run, tiles, settings, distance=None, batch=2)
    bare, now, said = class_guided.beside(model, guide, jobs, rows, settings)
    assert abs(frames[0].astype(int) - data.pixels(rows.head(1), 32).astype(int)).max() > 1
    assert abs(frames[0].astype(int) - bare[0].astype(int)).max() <= 1, "alone in a batch it is the same to a grey level"
    np.testing.assert_array_equal(now, data.pixels(rows, 32))
    assert said == [f"{json.loads(text)['guide']:.2f}" for text in rows["scores"]]
    axes = plots.push_by_step(class_guided.walks(rows))
    assert axes[0].get_xlim()[0] > axes[0].get_xlim()[1] and axes[0].lines[0].get_xdata().size == STEPS


def test_another_guide_makes_the_tiles_anew(model, guide, tiles, tmp_path):
    first = data.pixels(made(model, guide, tiles, 2)[0])
    other = network(seed=1)
    other.facts |= {"classes": squares.CLASSES}
    other.save(tmp_path / "other", space=model.latent_space)
    again, run = made(model, latent_classifiers.load(tmp_path / "other"), tiles, 2, class_scale=4.0)
    assert run.record["notes"]["images_reused"] == 0 and not np.array_equal(first, data.pixels(again))


def test_a_base_without_text_is_steered_from_table_to_tiles(tiles, tmp_path):
    from test_unconditional import TINY

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unconditional.autoencoder(TINY).save_pretrained(tmp_path / "prior" / "vae")
        unconditional.unet(TINY).save_pretrained(tmp_path / "prior" / "unet")
    unconditional.schedule(TINY).save_pretrained(tmp_path / "prior" / "scheduler")
    prior, net = backbone.load(str(tmp_path / "prior")), network(channels=3)
    net.facts["classes"] = squares.CLASSES
    net.save(tmp_path / "net", space=prior.latent_space)
    jobs = policies.job_table(prior, tiles, {"blue": "blue"}, 3, policy="none", prompt="", guidance_scale=1.0, num_inference_steps=STEPS)
    assert jobs["prompt"].eq("").all()
    run = runs.start(experiment="exp", step="04_guided", class_name="blue")
    rows = class_guided.render(prior, net, jobs, run, tiles, latent_guidance.Settings(num_inference_steps=STEPS), batch=2)
    assert len(rows) == 3 and rows["method"].eq("class_guided").all()
    with pytest.raises(ValueError, match="no {label}"):
        policies.job_table(prior, tiles, {"blue": "blue"}, 3, policy="same_class", prompt="")
