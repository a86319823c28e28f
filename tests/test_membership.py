"""Membership inference: the walk by a second definition, the AUROC beside scikit-learn's, an adapter that learned tiles by heart."""

import json

import numpy as np
import pytest
import squares
import torch
from sklearn.metrics import roc_auc_score
from tiny import tiny_model, write_hub_layout

from histokit import runs
from histokit.core import files
from histokit.diffusion import adapters, backbone, sampling
from histokit.fidelity import membership
from histokit.tiles import data
from histokit.training import lora


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_the_walk_is_that_of_the_paper(model):
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = backbone.embed(model, ["gland"]).expand(3, -1, -1)
    with torch.no_grad():
        found = membership.instability(sampling.guided(model, cond), z, model.scheduler, step=20, walk=40)
        abar = model.scheduler.alphas_cumprod.double()
        eps = lambda x, t: model.unet(x.float(), torch.tensor(t), cond).sample.double()  # noqa: E731

        def phi(x, t, to, noise):  # equations 6 and 7: the same map, onward and back
            x0 = (x - (1 - abar[t]).sqrt() * noise) / abar[t].sqrt()
            return abar[to].sqrt() * x0 + (1 - abar[to]).sqrt() * noise

        x = z.double()
        x = phi(x, 0, 20, eps(x, 0))
        x = phi(x, 20, 40, eps(x, 20))
        on = phi(x, 40, 60, eps(x, 40))
        back = phi(on, 60, 40, eps(on, 60))
    np.testing.assert_allclose(found, (back - x).pow(2).mean(dim=(1, 2, 3)), rtol=1e-3)


def test_a_model_that_says_the_same_everywhere_misses_nothing(model):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert membership.instability(lambda z, t, i: noise, z, model.scheduler).max() < 1e-9


def test_the_denoiser_that_knows_its_training_tiles_alone_is_found_out(model):
    """The optimal denoiser of a finite training set, which is memory and nothing else, against tiles it never saw."""
    z = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8
    known = z[:8]

    def predict(x, t, i):
        a = sampling.level(model.scheduler, t)
        weight = (-(x[:, None] - a**0.5 * known[None]).square().sum(dim=(2, 3, 4)) / (2 * (1 - a))).softmax(dim=1)
        return (x - a**0.5 * torch.einsum("nk,kchw->nchw", weight, known)) / (1 - a) ** 0.5

    found = membership.instability(predict, z, model.scheduler)
    assert membership.told_apart(found[:8], found[8:]) == 1 and found[:8].max() < 0.1 * found[8:].min()


def test_the_auroc_is_that_of_scikit_learn_and_symmetric():
    rng = np.random.default_rng(0)
    member, other = rng.integers(0, 9, 30), rng.integers(2, 12, 50)
    truth = np.r_[np.ones(30), np.zeros(50)]
    assert membership.told_apart(member, other) == pytest.approx(roc_auc_score(truth, -np.r_[member, other]))
    assert membership.told_apart(member, other) + membership.told_apart(other, member) == pytest.approx(1)
    assert np.isnan(membership.caught(member, other))
    many = np.arange(200.0)
    assert membership.caught([-1, 0, 500], many) == pytest.approx(2 / 3) and membership.caught(many, many) <= 0.01


def test_only_what_the_adapter_adds_counts_and_cases_are_drawn_anew():
    rng = np.random.default_rng(0)
    member, cases = np.arange(80) < 30, np.arange(80) // 5
    without = rng.normal(size=80) - member  # training and held-out tiles differ already without the adapter
    same = membership.compare(without, without, member, cases, resamples=200)
    assert same["auroc"] == same["base_auroc"] > 0.6 and same["gain_low"] == same["gain"] == same["gain_high"] == 0
    known = membership.compare(without - 3 * member, without, member, cases, resamples=200)
    assert known["auroc"] > 0.95 and known["gain_low"] > 0 and known["low"] <= known["auroc"] <= known["high"]
    alone = membership.compare(without, without, member, np.where(member, 0, cases), resamples=200)
    assert np.isnan(alone["low"]) and alone["auroc"] == same["auroc"], "one case is no interval"
    wide = membership.compare(without, without, member, np.arange(80) // 15, resamples=400)
    narrow = membership.compare(without, without, member, np.arange(80), resamples=400)
    assert narrow["high"] - narrow["low"] > 0 and wide["high"] > wide["low"]


def learned(root, steps):
    """A study of patterned tiles, and a LoRA that has seen its twelve blue training tiles `steps` times."""
    write_hub_layout(root / "tiny")
    squares.dataset({"train": {"blue": 12, "red": 4}, "val": {"blue": 24}, "test": {"red": 4}})
    run = runs.start(experiment="exp", step="02_lora", class_name="all")
    tiles, dataset = data.load(run), data.dataset(run)
    base = backbone.load(str(root / "tiny"), "cpu")
    train = data.training(tiles, "blue")
    classes, *_ = lora.train(
        base,
        train,
        {"blue": "blue gland"},
        seed=0,
        steps=steps,
        rank=8,
        lr=5e-3,
        batch_size=4,
        hold_out=0,
        targets="attention+feedforward",
        sheet_every=10**6,
    )
    adapters.save(run.folder, base, classes, train, dataset=dataset.name, lora=True, settings={"prompt": "an image of {label}"})
    run.finish({})
    return run.folder, tiles, dataset


def test_an_adapter_is_asked_and_few_tiles_are_not_judged(root):
    folder, tiles, dataset = learned(root, steps=3)
    found = membership.ask(str(root / "tiny"), [folder], tiles, dataset, "cpu", resamples=50)
    (row,) = found.to_dict("records")
    assert (row["class"], row["training"], row["held_out"]) == ("blue", 12, 24) and 0 <= row["low"] <= row["auroc"] <= row["high"] <= 1
    assert np.isnan(row["tpr_at_1_fpr"])
    files.dumps(json.loads(found.to_json(orient="records")))
    (said,) = membership.remarks(found)
    assert said.startswith("blue: ") and "private" not in said and "12 training and 24 held-out tiles" in said
    assert "n too small to say" in membership.table(found).iloc[0]["found at 1 % false alarms"]
    few = membership.ask(str(root / "tiny"), [folder], tiles, dataset, "cpu", most=5)
    assert np.isnan(few["auroc"]).all() and "n too small to say" in next(membership.remarks(few))
