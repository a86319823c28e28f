"""LoRA alone and together with tokens: what is trained, in what precision, and what clipping bounds."""

import pytest
import squares
import torch
from ordered import Ordered
from tiny import tiny_model

from histokit import runs
from histokit.diffusion import adapters, backbone, learned_tokens
from histokit.tiles import data
from histokit.training import finetuning, lora

QUICK = {"steps": 3, "batch_size": 4, "rank": 2, "lr": 0.01, "n_vectors": 2, "sheet_every": 0, "seed": 0}
TERMS = {"blue": "blue tissue", "red": "red tissue"}


@pytest.fixture
def tiles():
    squares.dataset()
    return data.training(data.load(runs.start(experiment="exp", step="look")))


def base_weights(model):
    return {name: value.clone() for name, value in model.unet.state_dict().items() if "lora_" not in name}


def plain(name):
    return name.replace(".base_layer", "")


def test_only_the_lora_changes_and_the_base_stays_bit_for_bit(tiles):
    model = tiny_model()
    before = base_weights(model)
    classes, words, history = lora.train(model, tiles, TERMS, **QUICK)
    after = {plain(name): value for name, value in base_weights(model).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(value.abs().max() > 0 for name, value in adapters.lora_tensors(model).items() if "lora_B" in name)
    assert classes == {"blue": "", "red": ""} and words is None and len(history)
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_tokens_are_trained_jointly_or_stay_as_they_were(tiles, tmp_path):
    source = tiny_model()
    name = learned_tokens.placeholder("blue")
    old = learned_tokens.add_tokens(source, {name: "blue tissue"}, 3).vectors()
    adapters.save(tmp_path / "01", source, {"blue": name}, tiles, tokens=old)
    given = adapters.read_tokens(tiny_model(), tmp_path / "01")

    frozen, words, _ = lora.train(tiny_model(), tiles, TERMS, tokens=given, **QUICK)
    assert frozen == {"blue": name, "red": ""} and torch.equal(words.vectors()[name], old[name])

    joint, words, _ = lora.train(tiny_model(), tiles, TERMS, tokens=given, joint=True, token_lr=0.05, **QUICK)
    rows = words.vectors()
    assert joint == {"blue": name, "red": learned_tokens.placeholder("red")}
    assert rows[name].shape == (3, 32) and rows[joint["red"]].shape == (2, 32)
    assert not torch.equal(rows[name], old[name])


@pytest.mark.parametrize("joint", [False, True])
def test_nothing_is_added_up_in_whatever_order_the_threads_arrive(tiles, joint):
    """Captions that come twice in a batch share an embedding, and a token its row, so their gradients are sums."""
    with Ordered():
        lora.train(tiny_model(), tiles, TERMS, joint=joint, **QUICK)


def test_a_finished_folder_gives_the_trained_model_back(tiles, tmp_path):
    model = tiny_model()
    classes, words, _ = lora.train(model, tiles, TERMS, joint=True, targets="attention+feedforward", alpha=4, **QUICK)
    adapters.save(tmp_path / "02", model, classes, tiles, tokens=words.vectors(), lora=True)
    again = adapters.load(tiny_model(), tmp_path / "02")
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    with torch.no_grad():
        outputs = [m.unet(z, t, backbone.embed(m, [f"a {classes['red']}"])).sample for m in (model, again)]
    assert torch.equal(*outputs)


def test_clipping_bounds_the_gradient_of_every_trained_tensor(tiles, monkeypatch):
    from histokit.training import loop

    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(params, most):
        params = list(params)
        total = clip(params, most)
        seen.append((len(params), float(torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm()), float(total)))
        return total

    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", spy)
    lora.train(tiny_model(), tiles, TERMS, joint=True, clip=1e-4, **QUICK)
    assert len(seen) == QUICK["steps"]  # or nothing was clipped, and nothing below is said
    assert all(count > 30 for count, _, _ in seen)  # LoRA pairs and the token rows
    assert all(after <= 1.01e-4 < before for _, after, before in seen)


def test_a_killed_joint_run_ends_as_an_uninterrupted_one(tiles, tmp_path, monkeypatch):
    def train(folder):
        model = tiny_model()
        _, words, _ = lora.train(model, tiles, TERMS, joint=True, folder=folder, checkpoint_every=2, **{**QUICK, "steps": 5})
        return {**adapters.lora_tensors(model), "rows": words.parameter}

    whole, draw = train(tmp_path / "a"), finetuning.draw

    def dies(*args, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(finetuning, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b")
    monkeypatch.setattr(finetuning, "draw", draw)
    again = train(tmp_path / "b")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_one_class_alone_and_v_prediction_work_too(tiles):
    model = tiny_model(prediction_type="v_prediction")
    classes, _, history = lora.train(model, tiles, {"blue": "blue"}, dora=True, **QUICK)
    assert list(classes) == ["blue"] and history["loss_lora"].notna().all()


def test_unknown_targets_and_classes_are_named(tiles):
    with pytest.raises(ValueError, match=r"use attention, attention\+feedforward, attention\+conv"):
        lora.train(tiny_model(), tiles, TERMS, **QUICK | {"targets": "all"})
    with pytest.raises(ValueError, match="no training tile of pink"):
        lora.train(tiny_model(), tiles, {"pink": "pink"}, **QUICK)
