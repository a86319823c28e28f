"""Textual inversion: what is trained, what is not, and what the batches are made of."""

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from ordered import Ordered
from tiny import tiny_model

from histokit import runs
from histokit.diffusion import backbone, latents, learned_tokens, prompting
from histokit.tiles import data
from histokit.training import finetuning, textual_inversion

QUICK = {"steps": 3, "batch_size": 4, "lr": 0.05, "n_vectors": 2, "sheet_every": 0, "seed": 0}


@pytest.fixture
def tiles():
    squares.dataset()
    return data.training(data.load(runs.start(experiment="exp", step="look")))


def state(model):
    table = model.text_encoder.get_input_embeddings()
    held = {f"text.{k}": v for k, v in model.text_encoder.state_dict().items() if "token_embedding" not in k}
    held |= {f"unet.{k}": v for k, v in model.unet.state_dict().items()} | {f"vae.{k}": v for k, v in model.vae.state_dict().items()}
    return {k: v.clone() for k, v in held.items()}, getattr(table, "table", table).weight.clone()


def test_only_the_new_rows_change(tiles):
    model = tiny_model()
    before, table = state(model)
    with Ordered():
        classes, tokens, history = textual_inversion.train(model, tiles, {"blue": "blue tissue", "red": "red tissue"}, **QUICK)
    after, table_after = state(model)
    assert torch.equal(table, table_after) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = learned_tokens.initial_rows(tiny_model(), "blue tissue", 2)
    moved = (tokens.vectors()[classes["blue"]] - fresh).abs().amax(dim=1)
    assert (moved > 0.01).all() and len(history) and not tokens.parameter.requires_grad
    assert not any(p.requires_grad for p in [*model.unet.parameters(), *model.text_encoder.parameters()])


def test_training_lowers_the_loss_it_trains():
    model = tiny_model()
    tokens = learned_tokens.add_tokens(model, {"<hk-a>": "gland"}, 2)
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = finetuning.loss(model, lambda prompts: backbone.embed(model, prompts), min_snr_gamma=0)
    batch = {"latents": z, "captions": ["a <hk-a>"] * 4}
    tokens.parameter.requires_grad_(True)
    optimiser = torch.optim.Adam([tokens.parameter], lr=0.1)
    losses = []
    for _ in range(30):
        value = loss(batch, 0, torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]


def test_two_runs_with_one_seed_are_the_same_and_a_killed_one_goes_on(tiles, tmp_path, monkeypatch):
    def train(folder, **options):
        model = tiny_model()
        return textual_inversion.train(
            model, tiles, {"blue": "blue"}, folder=folder, checkpoint_every=2, **{**QUICK, "steps": 5} | options
        )[1].parameter

    whole = train(tmp_path / "a")
    assert torch.equal(whole, train(tmp_path / "b"))
    assert not torch.equal(whole, train(tmp_path / "c", seed=1))
    draw = finetuning.draw

    def dies(*args, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(finetuning, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "d")
    monkeypatch.setattr(finetuning, "draw", draw)
    assert torch.equal(whole, train(tmp_path / "d"))
    with pytest.raises(ValueError, match="was trained with lr"):
        train(tmp_path / "d", lr=0.01)


def test_sample_sheets_come_from_the_sampler_of_later_inference(tiles, tmp_path):
    from PIL import Image

    model = tiny_model()
    classes, _, _ = textual_inversion.train(model, tiles, {"blue": "blue"}, folder=tmp_path, **QUICK | {"sheet_every": 3})
    last = np.asarray(Image.open(tmp_path / "sheets" / "step_000003.png"))
    assert last.shape == (36, 4 * 36, 3)
    again = finetuning.sheet(model, [f"a histology image of {classes['blue']}"], 0)(3)
    assert np.array_equal(last, again)


def test_a_class_without_training_tiles_is_named(tiles):
    with pytest.raises(ValueError, match="no training tile of pink"):
        textual_inversion.train(tiny_model(), tiles, {"pink": "pink"}, **QUICK)


# --- what inversion and LoRA share


def rows(counts, groups=("",)):
    out = []
    for label, n in counts.items():
        out += [{"label": label, "case_id": f"{label}{i // 2}", "group": groups[i % len(groups)] if i else groups[0]} for i in range(n)]
    return pd.DataFrame(out)


def test_classes_and_groups_are_drawn_equally_often_in_every_batch():
    table = rows({"a": 90, "b": 10}, ("x", "y", "y"))
    weight, stratum = finetuning.weights(table), finetuning.strata(table)
    assert np.isclose(weight[table["label"].eq("a")].sum(), 0.5) and np.isclose(weight.sum(), 1)
    assert np.isclose(weight[table["label"].eq("b") & table["group"].eq("x")].sum(), 0.25)
    seen = np.zeros(100)
    for k in range(200):
        chosen = finetuning.draw(weight, 8, torch.Generator().manual_seed(k), stratum)
        assert table.iloc[chosen]["label"].value_counts().to_dict() == {"a": 4, "b": 4}
        seen += np.bincount(chosen, minlength=100)
    assert (seen > 0).all()  # and every tile has its turn
    assert np.allclose(finetuning.weights(table, "none"), 0.01)


def test_validation_tiles_are_cut_by_case_and_small_classes_keep_all():
    table = rows({"big": 60, "small": 19})
    learn, held = finetuning.hold_out(table, 0.125, seed=0)
    assert set(held["label"]) == {"big"} and 7 <= len(held) <= 9
    assert not set(learn["case_id"]) & set(held["case_id"]) and len(learn) + len(held) == len(table)
    alone = rows({"big": 60}).assign(case_id="1")
    assert len(finetuning.hold_out(alone)[1]) == 0


def test_the_held_out_loss_is_the_same_at_every_call_and_moves_with_the_model(tiles):
    model = tiny_model()
    cache = latents.Latents(model, tiles, symmetries=1)

    def validation(seed=0):
        captions = [[f"a {label} tile"] for label in tiles["label"]]
        return finetuning.validation(model, lambda prompts: backbone.embed(model, prompts), cache, captions, seed, draws=len(tiles) + 1)

    with torch.no_grad():
        validate = validation()
        loss = validate()
        torch.manual_seed(99)  # nor does it hang on the global numbers
        assert validate() == loss and validation()() == loss, "a resumed run goes on with the same noise"
        assert validation(seed=1)() != loss
        model.unet.conv_out.bias[0] += 0.1
        assert validate() != loss
        model.unet.conv_out.bias[0] -= 0.1
        assert validate() == pytest.approx(loss, rel=1e-6)


def test_the_held_out_loss_picks_the_best_step(tiles, tmp_path):
    many = pd.concat([tiles] * 8, ignore_index=True)  # enough tiles for a validation part
    model = tiny_model()
    _, _, history = textual_inversion.train(model, many, {"blue": "blue"}, folder=tmp_path, **QUICK | {"steps": 4}, validate_every=2)
    assert history["val"].notna().sum() == 2
    assert history.attrs["best_step"] == history.loc[history["val"].idxmin(), "step"]


def test_captions_fill_in_label_and_group():
    assert prompting.caption("a tile of {label}, {group}", "<hk-a>", "dark skin") == "a tile of <hk-a>, dark skin"
    assert prompting.caption("a tile of {label}, {group}", "<hk-a>") == "a tile of <hk-a>"
    with pytest.raises(ValueError, match=r"no \{label\}"):
        prompting.caption("a tile", "<hk-a>")


def test_a_share_of_the_captions_is_dropped():
    model = tiny_model()
    seen = []

    def embed(prompts):
        seen.extend(prompts)
        return backbone.embed(model, prompts)

    loss = finetuning.loss(model, embed, caption_dropout=0.5)
    for k in range(8):
        with torch.no_grad():
            loss({"latents": torch.zeros(4, 4, 8, 8), "captions": list("abcd")}, k, torch.Generator().manual_seed(k))
    assert seen.count("") == 8 or 4 <= seen.count("") <= 8
    assert 8 <= sum(text != "" for text in seen) <= 24
