"""Tokens and LoRA: what they leave untouched, what stock diffusers makes of the files, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from histokit.core import files
from histokit.diffusion import adapters, backbone, learned_tokens, sampling

A, B = "<hk-adenoma>", "<hk-adenocarcinoma>"
STEPS, SCALE = 4, 3.0


@pytest.fixture(autouse=True)
def one_core():
    """As stock diffusers computes, a layer at a time: these scrambled weights make much of how the parts of a batch round."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(cores)


def tiles(split="train", cases=("1", "2"), shas=("", "")):
    rows = [{"tile_id": f"{split}{i}", "case_id": c, "split": split, "sha256": s} for i, (c, s) in enumerate(zip(cases, shas, strict=True))]
    return pd.DataFrame(rows)


def scramble(params, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.data = torch.randn(p.shape, generator=generator) * scale


def trained(folder, *, model=None, vectors=3, rank=4, alpha=16, targets="attention", dora=False, names=(A, B), seed=0, **options):
    """An adapter folder with tokens and a LoRA of random, strong effect."""
    model = model or tiny_model()
    tokens = learned_tokens.add_tokens(model, dict.fromkeys(names, "histology tissue of gland"), vectors)
    scramble([tokens.parameter], 1.0, seed)
    params = adapters.add_lora(model, rank, alpha, targets, dora)
    scramble([p for p in params if p.ndim > 1], seed=seed)
    classes = {name.strip("<>"): name for name in names}
    adapters.save(folder, model, classes, options.pop("tiles", tiles()), tokens=tokens.vectors(), lora=True, **options)
    return model


def latent(model, seed=0):
    return sampling.noise([torch.Generator().manual_seed(seed)], (4, model.latent_px, model.latent_px))


def ours(model, prompt, strength=1.0, source=None):
    timesteps = sampling.schedule(model.scheduler, STEPS, strength)
    z = latent(model)
    if source is not None:
        z = model.scheduler.add_noise(source, z, timesteps[:1])
    with torch.no_grad():
        predict = sampling.guided(model, backbone.embed(model, [prompt]), backbone.embed(model, [""]), SCALE)
        return backbone.decode(model, sampling.denoise(predict, z, model.scheduler, timesteps), batch_size=1)[0]


def stock(folder, kind="StableDiffusionPipeline", **options):
    import diffusers

    base = tiny_model(**options)
    pipe = getattr(diffusers, kind)(
        vae=base.vae, unet=base.unet, text_encoder=base.text_encoder, tokenizer=base.tokenizer, scheduler=base.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion([load_file(path) for path in sorted((folder / "tokens").glob("*.safetensors"))])
    pipe.load_lora_weights(folder)
    return pipe


def apart(a, b):
    return abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize(
    ("targets", "dora"), [("attention", False), ("attention+feedforward", False), ("attention+conv", False), ("attention", True)]
)
def test_the_files_give_the_same_image_in_stock_diffusers(tmp_path, targets, dora):
    trained(tmp_path, targets=targets, dora=dora)
    model = adapters.load(tiny_model(), tmp_path)
    prompt = f"a histology image of {B} and {A} gland"
    image = ours(model, prompt)
    pipe = stock(tmp_path)
    made = pipe(prompt, num_inference_steps=STEPS, guidance_scale=SCALE, latents=latent(model), output_type="np").images[0]
    assert apart(image, (made * 255).round()) <= 1
    assert apart(image, ours(tiny_model(), prompt.replace(A, "").replace(B, ""))) > 20  # or nothing was tested


def test_the_files_give_the_same_img2img_in_stock_diffusers(tmp_path):
    trained(tmp_path)
    model = adapters.load(tiny_model(), tmp_path)
    source, prompt = latent(model, 7), f"a histology image of {A}"
    pipe = stock(tmp_path, "StableDiffusionImg2ImgPipeline")
    made = pipe(
        prompt, image=source, strength=0.5, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="np",
        generator=[torch.Generator().manual_seed(0)],
    ).images[0]  # fmt: skip
    assert apart(ours(model, prompt, 0.5, source), (made * 255).round()) <= 1


def test_v_prediction_too(tmp_path):
    trained(tmp_path, model=tiny_model(prediction_type="v_prediction"))
    model = adapters.load(tiny_model(prediction_type="v_prediction"), tmp_path)
    pipe = stock(tmp_path, prediction_type="v_prediction")
    made = pipe(A, num_inference_steps=STEPS, guidance_scale=SCALE, latents=latent(model), output_type="np").images[0]
    assert apart(ours(model, A), (made * 255).round()) <= 3  # scrambled weights make much of rounding, and processors round differently


def test_alpha_travels_with_the_file_and_matters(tmp_path):
    trained(tmp_path / "a", alpha=16)
    trained(tmp_path / "b", alpha=4)
    images = [ours(adapters.load(tiny_model(), tmp_path / name), A) for name in "ab"]
    assert apart(*images) > 5
    facts = json.loads(files.read_metadata(tmp_path / "a" / adapters.LORA)["lora_adapter_metadata"])
    assert (facts["unet.lora_alpha"], facts["unet.r"]) == (16, 4)


def test_multi_vector_tokens_survive_and_every_vector_matters(tmp_path):
    trained(tmp_path, vectors=3)
    model = adapters.load(tiny_model(), tmp_path)
    ids = backbone.token_ids(model, [f"tissue {A}"])[0]
    assert ids[2:5].tolist() == model.tokenizer.convert_tokens_to_ids([A, f"{A}_1", f"{A}_2"])
    before = ours(model, A)
    model.text_encoder.get_input_embeddings().blocks[0].data[2] += 3.0  # the last vector of the first token
    assert apart(before, ours(model, A)) > 0


def test_the_ids_are_those_stock_diffusers_uses(tmp_path):
    trained(tmp_path)
    model, pipe = adapters.load(tiny_model(), tmp_path), stock(tmp_path)
    prompt = f"a photo of {A}, melanoma {B}"
    text = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    theirs = [pipe.tokenizer.convert_ids_to_tokens(i) for i in pipe.tokenizer(text).input_ids]
    own = model.tokenizer.convert_ids_to_tokens(backbone.token_ids(model, [prompt])[0])
    assert own[: len(theirs)] == theirs


def test_the_table_below_the_new_rows_is_untouched_and_unload_restores_everything(tmp_path):
    model = tiny_model()
    table, tokenizer, keys = model.text_encoder.get_input_embeddings(), model.tokenizer, list(model.unet.state_dict())
    bits = table.weight.clone()
    before, embedding = ours(model, "gland tissue"), backbone.embed(model, ["gland tissue"])
    trained(tmp_path)
    adapters.load(model, tmp_path)
    assert torch.equal(backbone.embed(model, ["gland tissue"]), embedding)
    assert len(tokenizer) == len(tiny_model().tokenizer)
    adapters.unload(model)
    assert model.text_encoder.get_input_embeddings() is table and torch.equal(table.weight, bits)
    assert model.tokenizer is tokenizer and list(model.unet.state_dict()) == keys and not model.placeholders
    assert np.array_equal(ours(model, "gland tissue"), before)


def test_two_adapters_in_turn_do_not_contaminate_each_other(tmp_path):
    for seed, name in enumerate("ab"):
        trained(tmp_path / name, seed=seed)
    alone = [ours(adapters.load(tiny_model(), tmp_path / name), A) for name in "ab"]
    model = tiny_model()
    in_turn = []
    for name in "ab":
        in_turn.append(ours(adapters.load(model, tmp_path / name), A))
        adapters.unload(model)
    assert np.array_equal(alone, in_turn) and apart(*alone) > 5
    adapters.load(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"unload\(model\) first"):
        adapters.add_lora(model)


def test_a_fresh_lora_changes_nothing_and_the_seed_fixes_it():
    model = tiny_model()
    before = ours(model, "tissue")
    params = adapters.add_lora(model, rank=2, seed=3)
    assert np.array_equal(ours(model, "tissue"), before)
    again = adapters.add_lora(tiny_model(), rank=2, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


def test_lora_weights_are_float32_on_a_half_precision_unet():
    model = tiny_model()
    model.unet.to(torch.bfloat16)
    assert {p.dtype for p in adapters.add_lora(model, rank=2)} == {torch.float32}


@pytest.mark.parametrize(("targets", "dora"), [("attention", False), ("attention+conv", False), ("attention", True)])
def test_a_merged_lora_gives_the_same_noise_and_leaves_every_bit_as_it_was(tmp_path, targets, dora):
    model = trained(tmp_path, targets=targets, dora=dora)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    z, context = latent(model), backbone.embed(model, ["tissue"]).detach()

    def noise():
        with torch.no_grad():
            return model.unet(z, torch.tensor(500), context).sample

    beside = noise()
    with pytest.raises(KeyboardInterrupt), adapters.merged(model):
        torch.testing.assert_close(noise(), beside, rtol=1e-3, atol=1e-4)
        assert any(not torch.equal(before[name], value) for name, value in model.unet.state_dict().items()), "nothing was merged"
        raise KeyboardInterrupt
    after = model.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(noise(), beside)


def test_a_model_without_lora_or_with_a_large_unet_is_left_alone(tmp_path, monkeypatch):
    with adapters.merged(tiny_model()):
        pass
    model = trained(tmp_path)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    monkeypatch.setattr(adapters, "MOST_MERGED", 10)
    with adapters.merged(model):
        assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())


@pytest.mark.parametrize("name", ["<HK-BCC>", "mel", "<hk mel>", "<hk-mel>_1", "<>"])
def test_placeholders_that_clip_or_diffusers_would_misread_are_refused(name):
    with pytest.raises(ValueError, match="lower case, in brackets"):
        learned_tokens.add_tokens(tiny_model(), {name: "tissue"})


def test_class_names_become_distinct_safe_placeholders():
    names = ["BCC", "bcc", "Adenoma", "Adenocarcinoma", "High-grade IN", "Größe (µm), 50 %", "psoriasis", "psoriatic"]
    made = [learned_tokens.placeholder(name) for name in names]
    assert len(set(made)) == len(names)
    learned_tokens.add_tokens(tiny_model(), dict.fromkeys(made, "tissue"), 2)  # raises where an id is not the expected one


def test_a_token_that_is_there_already_is_refused():
    model = tiny_model()
    learned_tokens.add_tokens(model, {A: "tissue"})
    with pytest.raises(ValueError, match="already holds"):
        learned_tokens.add_tokens(model, {A: "tissue"})
    more = learned_tokens.add_tokens(model, {B: "tissue"}, 2)
    assert model.tokenizer.convert_tokens_to_ids(f"{B}_1") == len(tiny_model().tokenizer) + 2
    assert more.parameter.shape == (2, 32)


def test_the_initialiser_may_be_any_phrase():
    model = tiny_model()
    ids = model.tokenizer("mucinous gland tissue", add_special_tokens=False)["input_ids"]
    words = model.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(learned_tokens.initial_rows(model, "mucinous gland tissue", 3), words)
    assert torch.equal(learned_tokens.initial_rows(model, "mucinous gland tissue", 5), words[[0, 1, 2, 0, 1]])
    torch.testing.assert_close(learned_tokens.initial_rows(model, "mucinous gland tissue", 2), torch.stack([words[:2].mean(0), words[2]]))
    mean = learned_tokens.initial_rows(model, "mucinous gland tissue", 4, "mean")
    torch.testing.assert_close(mean, words.mean(0).expand(4, -1))
    with pytest.raises(ValueError, match="has no token"):
        learned_tokens.initial_rows(model, " ", 1)


def test_a_fixed_norm_trains_directions_only():
    model = tiny_model()
    tokens = learned_tokens.add_tokens(model, {A: "mucinous gland"}, 2, fixed_norm=True)
    lengths = tokens.vectors()[A].norm(dim=-1)
    scramble([tokens.parameter], 5.0)
    torch.testing.assert_close(tokens.vectors()[A].norm(dim=-1), lengths)


def test_another_base_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"vae, unet, text_encoder of 'tiny' differ"):
        adapters.load(tiny_model(seed=1), tmp_path)


def test_an_adapter_that_saw_the_test_set_is_refused(tmp_path):
    trained(tmp_path, tiles=tiles("train", ("7", "8"), ("ab" * 32, "cd" * 32)), dataset="ebhi")
    adapters.load(tiny_model(), tmp_path, tiles=tiles("test", ("9", "10")), dataset="ebhi")
    with pytest.raises(ValueError, match=r"learned from 1 tiles.*test here.*case '8'"):
        adapters.load(tiny_model(), tmp_path, tiles=tiles("test", ("9", "8")), dataset="ebhi")
    adapters.load(tiny_model(), tmp_path, tiles=tiles("test", ("9", "8")), dataset="other")  # their case 8 is another patient
    with pytest.raises(ValueError, match="flattered"):
        adapters.load(tiny_model(), tmp_path, tiles=tiles("test", ("9", "10"), ("", "cd" * 32)), dataset="other")
    adapters.load(tiny_model(), tmp_path, tiles=tiles("train", ("7", "8"), ("ab" * 32, "cd" * 32)), dataset="ebhi")
    trained(tmp_path, tiles=tiles("train", ("7", "8")).assign(patient=["p", ""]), dataset="ebhi")
    other_case = tiles("test", ("9", "10")).assign(patient=["", "p"])
    with pytest.raises(ValueError, match="case '10'"):
        adapters.load(tiny_model(), tmp_path, tiles=other_case, dataset="ebhi")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="name a finished step"):
        adapters.load(tiny_model(), tmp_path)


def test_tokens_that_contradict_each_other_are_refused_and_equal_ones_taken_once(tmp_path):
    model = tiny_model()
    tokens = learned_tokens.add_tokens(model, {A: "gland"}, 2)
    adapters.save(tmp_path / "01", model, {"adenoma": A}, tiles(), tokens=tokens.vectors())
    adapters.save(tmp_path / "02", model, {"adenoma": A}, tiles(), tokens=tokens.vectors())
    loaded = adapters.load(tiny_model(), tmp_path / "01", tmp_path / "02")
    assert adapters.words(loaded, "adenoma", "an adenoma") == A and adapters.words(loaded, "polyp", "a polyp") == "a polyp"
    scramble([tokens.parameter])
    adapters.save(tmp_path / "02", model, {"adenoma": A}, tiles(), tokens=tokens.vectors())
    with pytest.raises(ValueError, match="load only the later one"):
        adapters.load(tiny_model(), tmp_path / "01", tmp_path / "02")


def test_a_lora_that_does_not_fit_is_refused(tmp_path):
    trained(tmp_path)
    path = tmp_path / adapters.LORA
    state = load_file(path)
    files.write_tensors(path, {key: state[key] for key in sorted(state)[1:]}, files.read_metadata(path))
    with pytest.raises(ValueError, match="1 weights missing or unknown"):
        adapters.load(tiny_model(), tmp_path)
    files.write_tensors(path, state, {"format": "pt"})
    with pytest.raises(ValueError, match="neither rank nor alpha"):
        adapters.load(tiny_model(), tmp_path)


def test_the_shas_of_an_image_are_those_of_what_shaped_it(tmp_path):
    trained(tmp_path)
    model = adapters.load(tiny_model(), tmp_path)
    lora, none = adapters.shas(model, "a tissue")
    assert lora == files.sha256(tmp_path / adapters.LORA) and none == ""
    assert adapters.shas(model, f"a {A}")[1] == files.sha256(tmp_path / "tokens" / "hk-adenoma.safetensors")
    assert len({adapters.shas(model, text)[1] for text in (A, B, f"{A} {B}")}) == 3
    assert adapters.shas(tiny_model(), A) == ("", "")
