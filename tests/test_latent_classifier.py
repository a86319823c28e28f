"""A classifier of noisy latents: the size that the paper's has, no image that knows another, and training with noise against without."""

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.diffusion import latents, sampling
from histokit.show import plots
from histokit.tiles import data
from histokit.training import latent_classifier
from histokit.vision import latent_classifiers


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def network(classes=3, seed=0, channels=4, **changes):
    how = latent_classifiers.PRESETS["mini"] | {"widths": (16, 32), "groups": 4, "head_width": 16} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = latent_classifiers.LatentClassifier([f"c{i}" for i in range(classes)], channels, 8, **how)
        for parameter in net.parameters():  # also of blocks that begin as nothing
            torch.nn.init.normal_(parameter, std=0.3) if not parameter.any() else None
    return net.requires_grad_(False).eval()


def test_the_preset_of_the_paper_has_its_parameters():
    with torch.device("meta"):
        net = latent_classifiers.LatentClassifier(list("abcdefghi"), 3, 64, **latent_classifiers.PRESETS["paper"])
    assert sum(p.numel() for p in net.parameters()) == 51_453_961


def test_no_image_knows_its_neighbours():
    net, z, t = network(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500, 900])
    x = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x, t).log_softmax(1)[1, 2], x)
    assert slope[1].any() and not slope[[0, 2]].any()
    torch.testing.assert_close(net(z, t)[1:2], net(z[1:2], t[1:2]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net(z, t)[1], net(z, torch.tensor(20))[1]), "the timestep is not heard"


def test_widths_that_halve_a_map_unevenly_are_refused():
    with pytest.raises(ValueError, match="even"):
        latent_classifiers.LatentClassifier(["a"], 4, 6, widths=(8, 8, 8), groups=4)


def test_what_was_saved_is_loaded_and_only_for_its_own_latents_and_classes(tmp_path, model):
    net, other = network(), network(seed=1)
    net.save(tmp_path, space=model.latent_space)
    other.save(tmp_path / "other", space=model.latent_space)
    assert latent_classifiers.identity(other) != latent_classifiers.identity(net), "of other weights"
    again, z = latent_classifiers.load(tmp_path), torch.randn(2, 4, 8, 8)
    assert torch.equal(again(z, 300), net(z, 300)) and latent_classifiers.identity(again) == latent_classifiers.identity(net)
    latent_classifiers.refuse_stranger(again, model.latent_space, ["c2", "c1", "c0", "other"])
    for key, value, words in (
        ("vae", "another", "autoencoder"), ("scaling", 0.18, "scale"), ("schedule", "x", "noise schedule"), ("shape", [3, 8], "shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            latent_classifiers.refuse_stranger(again, model.latent_space | {key: value}, again.classes)
    with pytest.raises(ValueError, match="other classes.*c2"):
        latent_classifiers.refuse_stranger(again, model.latent_space, ["c0", "c1"])
    with pytest.raises(ValueError, match="does not know the class 'x'"):
        again.label("x")
    with pytest.raises(FileNotFoundError, match="no latent classifier was finished"):
        latent_classifiers.load(tmp_path / "nowhere")
    files.write_json(tmp_path / "picture" / "model.json", {"mode": "linear", "classes": []})
    with pytest.raises(ValueError, match="a linear.*name a step of 21_latent_classifier"):
        latent_classifiers.load(tmp_path / "picture")


class Threshold(torch.nn.Module):
    """Tells the sign of the mean of a latent."""

    def forward(self, z, t):
        mean = 20 * z.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_accuracy_falls_with_the_noise_to_chance(model):
    z = torch.cat([torch.full((20, 4, 8, 8), -0.2), torch.full((20, 4, 8, 8), 0.2)])
    found = latent_classifier.accuracy_by_noise(Threshold(), z, torch.arange(40) // 20, model.scheduler, draws=4)
    assert found["accuracy"].iloc[0] == 1 and found["accuracy"].iloc[-1] == pytest.approx(0.5, abs=0.2)
    assert found["high"].iloc[-1] == 1000 and (found["low"].iloc[1:].to_numpy() == found["high"].iloc[:-1].to_numpy()).all()
    again = latent_classifier.accuracy_by_noise(Threshold(), z, torch.arange(40) // 20, model.scheduler, draws=4)
    pd.testing.assert_frame_equal(found, again)
    few = torch.cat([z[:20], z[20:22]])  # a mean of the classes, not of the tiles
    blind = torch.nn.Module()
    blind.forward = lambda z, t: torch.tensor([1.0, 0.0]).expand(len(z), 2)
    assert latent_classifier.accuracy_by_noise(blind, few, torch.tensor([0] * 20 + [1] * 2), model.scheduler)["accuracy"].eq(0.5).all()


def test_batches_follow_from_their_number_and_draw_classes_alike():
    class Cache:
        def sample(self, rows, generator):
            return torch.tensor(rows)[:, None] + torch.randn(len(rows), 1, generator=generator)

    targets = torch.tensor([0] * 90 + [1] * 10)
    balanced, natural = (latent_classifier.batches(Cache(), targets, 400, 0, sampler) for sampler in ("balanced", "natural"))
    assert torch.equal(balanced(3)["latents"], balanced(3)["latents"]) and not torch.equal(balanced(3)["latents"], balanced(4)["latents"])
    assert balanced(0)["targets"].float().mean() == pytest.approx(0.5, abs=0.1)
    assert natural(0)["targets"].float().mean() == pytest.approx(0.1, abs=0.05)
    with pytest.raises(ValueError, match="balanced or natural"):
        latent_classifier.batches(Cache(), targets, 4, 0, "even")


BRIGHT, GRAIN = 0.3, (0.02, 0.15, 0.6)


class Painted:
    """Latents of tiles without an autoencoder: each class has a brighter channel of its own, and a grain that no noise leaves."""

    def __init__(self, model, tiles, symmetries=8):
        kinds = torch.tensor([squares.CLASSES.index(name) for name in tiles["label"]])
        self.scaling, self.mean = model.scaling, torch.zeros(len(tiles), 4, 8, 8)
        self.mean[range(len(tiles)), kinds] = BRIGHT / model.scaling
        self.logvar = 2 * torch.log(torch.tensor(GRAIN) / model.scaling)[kinds][:, None, None, None].expand_as(self.mean)

    def batch(self, rows, symmetries):
        return self.mean[list(rows)], self.logvar[list(rows)]

    def sample(self, rows, generator):
        mean, logvar = self.batch(rows, [0] * len(rows))
        return (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)) * self.scaling


@pytest.fixture
def tiles(monkeypatch):
    monkeypatch.setattr(latents, "Latents", Painted)
    small = {"widths": (16, 32), "blocks": 1, "attention_px": (4,), "head_width": 16, "groups": 4}
    monkeypatch.setitem(latent_classifiers.PRESETS, "mini", small)
    squares.dataset({"train": dict.fromkeys(squares.CLASSES, 8), "val": dict.fromkeys(squares.CLASSES, 4)})
    return data.load(runs.start(experiment="exp", step="look"))


def fit(model, tiles, **options):
    parts = [tiles[tiles["split"].eq(split)] for split in ("train", "val")]
    how = {"steps": 80, "batch_size": 24, "lr": 3e-3, "ema": 0.9} | options
    return latent_classifier.fit(model, *parts, squares.CLASSES, **how)


def test_one_that_learned_from_noise_sees_through_it_and_one_that_did_not_does_not(model, tiles, tmp_path):
    aware, history, curve = fit(model, tiles)
    blind, _, clean = fit(model, tiles, noise="none")
    assert curve["accuracy"].iloc[0] > 0.9 and clean["accuracy"].iloc[0] > 0.9, "without noise both know the classes"
    assert curve["accuracy"].iloc[3] > clean["accuracy"].iloc[3] + 0.2, "at a third of the schedule the grain is gone"
    assert curve["accuracy"].iloc[[0, 4, 9]].is_monotonic_decreasing
    assert history["val_accuracy"].max() > clean["accuracy"].mean()
    assert files.plain(aware.facts["curve"]) == files.plain(curve.to_dict("records"))
    aware.save(tmp_path / "aware")
    again, z = latent_classifiers.load(tmp_path / "aware"), torch.randn(2, 4, 8, 8)
    assert torch.equal(again(z, 100), aware(z, 100)) and again.facts["size"] == "mini"
    blind.save(tmp_path / "blind")
    assert aware.facts["space"] == model.latent_space and blind.facts["noise"] == "none"
    assert latent_classifiers.identity(aware) != latent_classifiers.identity(blind)


def test_the_training_with_noise_is_that_of_the_scheduler(model):
    seen, z = [], torch.randn(4, 4, 8, 8)

    def net(x, t):
        seen.append((x, t))
        return torch.zeros(len(x), 3)

    batch = {"latents": z, "targets": torch.tensor([0, 1, 2, 0])}
    value, logs = latent_classifier.loss(net, model.scheduler)(batch, 0, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(1000, (4,), generator=generator)
    a = model.scheduler.alphas_cumprod[t][:, None, None, None]
    torch.testing.assert_close(seen[0][0], a.sqrt() * z + (1 - a).sqrt() * torch.randn(z.shape, generator=generator))
    assert torch.equal(seen[0][1], t) and float(value) == pytest.approx(np.log(3)) and float(logs["accuracy"]) == 0.5
    latent_classifier.loss(net, model.scheduler, "none")(batch, 0, torch.Generator())
    assert torch.equal(seen[1][0], z) and not seen[1][1].any()
    prior = torch.tensor([0.8, 0.1, 0.1])
    value, _ = latent_classifier.loss(net, model.scheduler, prior=prior)(batch, 0, torch.Generator())
    assert float(value) == pytest.approx(-np.log([0.8, 0.1, 0.1, 0.8]).mean())
    with pytest.raises(ValueError, match="uniform or none"):
        latent_classifier.loss(net, model.scheduler, "some")


def test_a_killed_training_goes_on_to_the_same_bits(model, tiles, tmp_path, monkeypatch):
    whole, *_ = fit(model, tiles, steps=6, folder=tmp_path / "whole", checkpoint_every=2, validate_every=3)

    class Killed(Exception):
        pass

    real = latent_classifier.batches

    def batches(*given):
        drawn = real(*given)

        def batch(k):
            if k == 5:
                raise Killed
            return drawn(k)

        return batch

    monkeypatch.setattr(latent_classifier, "batches", batches)
    with pytest.raises(Killed):
        fit(model, tiles, steps=6, folder=tmp_path / "cut", checkpoint_every=2, validate_every=3)
    monkeypatch.setattr(latent_classifier, "batches", real)
    again, *_ = fit(model, tiles, steps=6, folder=tmp_path / "cut", checkpoint_every=2, validate_every=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_cannot_be_learned_is_refused(model, tiles):
    some = tiles[tiles["label"].ne("green")]
    with pytest.raises(ValueError, match="no labelled training tile of green"):
        fit(model, some)
    with pytest.raises(ValueError, match="paper, base, mini"):
        fit(model, tiles, network="large")


def test_without_validation_tiles_the_last_weights_are_taken(model, tiles):
    net, history, curve = fit(model, tiles[tiles["split"].eq("train")], steps=3)
    assert curve.empty and history.attrs["step"] == 3 and net.facts["curve"] == []


def test_the_levels_of_noise_are_those_of_the_walk(model):
    assert model.latent_space["shape"] == [4, 8] and model.latent_space["scaling"] == 0.5
    other = tiny_model()
    other.scheduler = type(other.scheduler).from_config({**other.scheduler.config, "beta_end": 0.02})
    assert other.latent_space["schedule"] != model.latent_space["schedule"]
    assert sampling.level(model.scheduler, 0) == pytest.approx(float(model.scheduler.alphas_cumprod[0]))


def test_a_tile_is_also_learned_in_the_stains_of_cases_without_a_label(root):
    rng = np.random.default_rng(0)
    stains = {"a": (200, 90, 150), "b": (120, 60, 160), "c": (150, 70, 90), "white": (250, 250, 250)}
    rows = []
    for case, colour in stains.items():
        shade = rng.uniform(0.3, 1, (32, 32, 1)) if case != "white" else np.ones((32, 32, 1))
        tint = np.where((rng.random((32, 32, 1)) < 0.4) & (case != "white"), [[[1.0, 0.7, 1.2]]], [[[1.0, 1.0, 1.0]]])
        path = files.write_png(
            root / f"{case}.png", (255 - (255 - np.array(colour) * np.minimum(tint, 1)) * shade).clip(0, 255).astype(np.uint8)
        )
        facts = {
            "tile_id": case,
            "label": "x" if case in "a white" else "tissue",
            "case_id": case,
            "path": str(path),
            "sha256": files.sha256(path),
        }
        rows.append(
            facts | {"tile_px": 32, "fit": "resize", "mpp": 0.5, "width": 32, "height": 32, "mask": "", "profile": True, "source": "real"}
        )
    every = pd.DataFrame(rows)
    learn = every[every["label"].eq("x")]
    found = latent_classifier.restained(learn, every, 5, 0)
    assert found["tile_id"].tolist() == ["a", "white", "a", "a"], (
        "in the stain of b and of c, once each; white has none to give or to change"
    )
    pixels = data.pixels(found[found["tile_id"].eq("a")]).astype(float)
    assert set(found["label"]) == {"x"} and found["path"].nunique() == 4
    means = pixels.mean(axis=(1, 2))
    assert np.abs(means[1:] - means[0]).max(axis=1).min() > 5, "another stain"
    grey = pixels.mean(axis=3).reshape(3, -1)
    assert np.corrcoef(grey)[0].min() > 0.9, "the same picture"
    assert latent_classifier.restained(learn, every, 0, 0) is learn


def test_what_is_shown_of_it(model, tiles):
    learn, held = (tiles[tiles["split"].eq(split)] for split in ("train", "val"))
    found = latent_classifier.counts(learn, held, [*squares.CLASSES, "pink"])
    assert found.iloc[:, 1:].to_numpy().tolist() == [[8, 4, 4, 2]] * 3 + [[0, 0, 0, 0]]
    curve = pd.DataFrame({"low": range(0, 1000, 100), "high": range(100, 1100, 100), "accuracy": np.linspace(0.9, 0.3, 10), "error": 0.5})
    said = " ".join(latent_classifier.remarks(curve, squares.CLASSES))
    assert "0.90" in said and "interval: [0.0, 0.7]" in said
    dips = curve.assign(accuracy=[0.3, 0.9, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.3, 0.3])
    assert "interval: [0.0, 0.8]" in latent_classifier.remarks(dips, squares.CLASSES)[1], "only the noisy end can be left out"
    assert len(latent_classifier.remarks(dips.assign(accuracy=[0.3] + [0.9] * 9), squares.CLASSES)) == 1
    assert "AT ANY LEVEL" in latent_classifier.remarks(curve.assign(accuracy=0.35), squares.CLASSES)[1]
    assert len(latent_classifier.remarks(curve.assign(accuracy=0.9), squares.CLASSES)) == 1
    assert "No validation tile" in latent_classifier.remarks(curve.head(0), squares.CLASSES)[0]
    ax = plots.accuracy_by_noise({"aware": curve, "blind": curve.assign(accuracy=0.4)}, 3)
    assert [line.get_label() for line in ax.lines] == ["aware", "blind", "chance, 3 classes"]


def test_the_curve_of_an_earlier_step_is_found():
    run = runs.start(experiment="exp", step="blind")
    files.write_json(run.path("model.json"), {"noise": "none", "curve": [{"low": 0, "high": 100, "accuracy": 0.5}]})
    run.finish({})
    reader = runs.start(experiment="exp", step="21_latent_classifier")
    assert latent_classifier.curves(reader, "blind")["blind (noise: none)"]["accuracy"].tolist() == [0.5]
    assert latent_classifier.curves(reader, "") == {}
    runs.start(experiment="exp", step="other").finish({})
    with pytest.raises(ValueError, match="'other' is no step of 21"):
        latent_classifier.curves(reader, "other")
    assert [parent["step"] for parent in reader.record["parents"]] == ["blind", "other"]
