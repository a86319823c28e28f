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


# ---------------------------------------------------------------- captions, and all of the UNet


def captioned(tiles, **texts):
    """Captions of a table: the class alone, but for the first tile of each class, which has a word of its own."""
    table = tiles[["tile_id", "label"]].assign(text="a tile of " + tiles["label"], weight=1.0, cluster=0)
    first = table.groupby("label").head(1).index
    table.loc[first, "cluster"] = 1
    table.loc[first, "text"] += texts.get("first", ", type one")
    return table.reset_index(drop=True)


def test_captions_say_what_tiles_are_called_and_how_often_they_are_drawn(tiles, monkeypatch):
    drawn = []
    batches = finetuning.batches

    def spy(*args):
        batch = batches(*args)
        return lambda k: drawn.append(batch(k)) or drawn[-1]

    monkeypatch.setattr(finetuning, "batches", spy)
    table = captioned(tiles)
    table["weight"] = table["text"].str.contains("type").map({True: 3.0, False: 1.0})
    table.loc[table["label"].eq("red") & table["weight"].eq(1), "weight"] = 0
    classes, words, history = lora.train(tiny_model(), tiles, TERMS, captions=table, joint=True, **QUICK | {"steps": 40})
    said = [text for batch in drawn for text in batch["captions"]]
    shares = {text: said.count(text) / len(said) for text in set(said)}
    expected = table.groupby("text")["weight"].sum() / table.loc[table["label"].isin(TERMS), "weight"].sum()
    assert "a tile of red" not in shares and set(shares) == {"a tile of red, type one", "a tile of blue, type one", "a tile of blue"}
    assert all(abs(share - expected[text]) < 0.05 for text, share in shares.items())
    assert words is None and set(classes.values()) == {""}  # captions say it all, so no class gets a token
    assert history.attrs["rows"][0].startswith("a tile of blue")


def test_words_of_captions_that_are_new_are_learned_one_vector_each(tiles):
    table = captioned(tiles, first=", <hk-form-0>")
    model = tiny_model()
    start = learned_tokens.initial_rows(model, "zero", 1)
    _, words, _ = lora.train(
        model,
        tiles,
        TERMS,
        captions=table,
        new_words={"<hk-form-0>": {"start": "zero", "vectors": 1}},
        token_lr=0.05,
        **QUICK | {"steps": 8},
    )
    assert list(words.counts) == ["<hk-form-0>"] and words.vectors()["<hk-form-0>"].shape == (1, 32)
    assert not torch.equal(words.vectors()["<hk-form-0>"], start.cpu())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda table: table.assign(tile_id="other"), "none of 10 training tiles has a caption"),
        (lambda table: table.assign(weight=0.0), "none of 10 training tiles has a caption"),
        (lambda table: table.assign(text=" "), "is empty"),
    ],
)
def test_captions_that_are_none_are_refused(tiles, change, expected):
    with pytest.raises(ValueError, match=expected):
        lora.train(tiny_model(), tiles, TERMS, captions=change(captioned(tiles)), **QUICK)


def test_captions_and_tokens_of_classes_do_not_go_together(tiles):
    with pytest.raises(ValueError, match="leave `tokens` out"):
        lora.train(tiny_model(), tiles, TERMS, captions=captioned(tiles), tokens={"blue": ("<hk-blue>", torch.zeros(1, 32))}, **QUICK)


def test_full_trains_every_weight_of_the_unet_and_nothing_else(tiles, tmp_path):
    model = tiny_model()
    before = {
        part: {name: value.clone() for name, value in getattr(model, part).state_dict().items()} for part in ("unet", "vae", "text_encoder")
    }
    classes, _, history = lora.train(model, tiles, TERMS, mode="full", **QUICK)
    after = model.unet.state_dict()
    moved = [not torch.equal(before["unet"][name], after[name]) for name in after]
    assert sum(moved) > 0.95 * len(moved) and history["loss_full"].notna().all()
    for part in ("vae", "text_encoder"):
        assert all(torch.equal(value, before[part][name]) for name, value in getattr(model, part).state_dict().items())
    adapters.save(tmp_path / "02", model, classes, tiles, unet=True)
    again = adapters.load(tiny_model(), tmp_path / "02")
    assert all(torch.equal(value.half(), again.unet.state_dict()[name].half()) for name, value in after.items())
    lora_sha, _ = adapters.shas(again, "a tile")
    assert len(lora_sha) == 64
    with pytest.raises(ValueError, match="load the base again"):
        adapters.unload(again)
    with pytest.raises(ValueError, match="another adapter already"):
        adapters.load(again, tmp_path / "02")
    with pytest.raises(ValueError, match="was trained on base"):
        adapters.load(tiny_model(seed=1), tmp_path / "02")


def test_a_killed_full_run_ends_as_an_uninterrupted_one(tiles, tmp_path, monkeypatch):
    def train(folder):
        model = tiny_model()
        lora.train(model, tiles, TERMS, mode="full", folder=folder, checkpoint_every=2, ema=0.9, **{**QUICK, "steps": 5})
        return model.unet.state_dict()

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


def test_the_two_arms_of_a_comparison_draw_the_same_tiles_noise_and_steps(tiles, monkeypatch):
    """Captions differ and nothing else: the same latents, in the same places of the same batches, under the same noise."""
    seen = []
    loss = finetuning.losses.diffusion_loss

    def spy(unet, scheduler, z, context, timesteps, noise, **options):
        seen.append((z.clone(), timesteps.clone(), noise.clone()))
        return loss(unet, scheduler, z, context, timesteps, noise, **options)

    monkeypatch.setattr(finetuning.losses, "diffusion_loss", spy)
    for first in (", type one", ""):
        lora.train(tiny_model(), tiles, TERMS, captions=captioned(tiles, first=first), **QUICK)
    half = len(seen) // 2
    assert half and all(torch.equal(a, b) for one, two in zip(seen[:half], seen[half:], strict=True) for a, b in zip(one, two, strict=True))
