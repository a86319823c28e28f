"""Bases load from every layout people have, in float32, with a name for what is wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, write_hub_layout

from histokit.core import files
from histokit.diffusion import backbone, sampling


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def embedding_of(model, text="a histology image of tissue"):
    with torch.no_grad():
        return backbone.embed(model, [text])


def test_a_plain_folder_loads_bit_for_bit(tmp_path):
    made = write_hub_layout(tmp_path, variant="")
    got = backbone.load(tmp_path)
    for part in ("vae", "unet", "text_encoder"):
        for name, value in getattr(made, part).state_dict().items():
            assert torch.equal(value, getattr(got, part).state_dict()[name]), (part, name)
    assert torch.equal(embedding_of(made), embedding_of(got))
    assert (got.tile_px, got.factor, got.latent_px, got.scaling) == (32, 4, 8, 0.5)


@pytest.mark.parametrize("old_keys", [False, True])
def test_fp16_files_are_trained_in_float32(tmp_path, old_keys):
    made = write_hub_layout(tmp_path, variant="fp16", old_keys=old_keys)
    got = backbone.load(tmp_path)
    for part in ("vae", "unet", "text_encoder"):
        module = getattr(got, part)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in module.parameters()) and not module.training
    torch.testing.assert_close(embedding_of(made), embedding_of(got), atol=0.02, rtol=0)
    assert not torch.equal(embedding_of(tiny_model(seed=1)), embedding_of(got))


def test_old_text_model_keys_give_the_same_embeddings_as_new_ones(tmp_path):
    write_hub_layout(tmp_path / "new", variant="")
    write_hub_layout(tmp_path / "old", variant="", old_keys=True)
    keys = load_file(tmp_path / "old" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys) and "text_model.embeddings.position_ids" in keys
    assert torch.equal(embedding_of(backbone.load(tmp_path / "new")), embedding_of(backbone.load(tmp_path / "old")))


def test_sd2_text_width_and_v_prediction_are_kept(tmp_path):
    write_hub_layout(tmp_path, prediction_type="v_prediction", text_width=1024)
    got = backbone.load(tmp_path)
    assert embedding_of(got).shape == (1, 77, 1024)
    assert got.scheduler.config.prediction_type == "v_prediction"
    assert type(got.scheduler).__name__ == "DDIMScheduler"
    assert (got.scheduler.config.clip_sample, got.scheduler.config.steps_offset) == (False, 1)


def test_a_schedule_that_ends_in_noise_needs_the_velocity(tmp_path):
    for kind in ("v_prediction", "epsilon"):
        write_hub_layout(tmp_path / kind, prediction_type=kind)
        path = tmp_path / kind / "scheduler" / "scheduler_config.json"
        files.write_json(path, files.read_json(path) | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    assert float(backbone.load(tmp_path / "v_prediction").scheduler.alphas_cumprod[-1]) == 0
    with pytest.raises(ValueError, match="rescale_betas_zero_snr without v_prediction"):
        backbone.load(tmp_path / "epsilon")


def test_plain_weights_are_preferred_over_fp16_ones(tmp_path):
    made = write_hub_layout(tmp_path, variant="both")
    assert torch.equal(embedding_of(made), embedding_of(backbone.load(tmp_path)))


def test_identity_follows_the_weights_and_not_the_folder(tmp_path):
    write_hub_layout(tmp_path / "a")
    write_hub_layout(tmp_path / "b", safety_checker=False)
    a, b = backbone.load(tmp_path / "a").identity, backbone.load(tmp_path / "b").identity
    assert a == b and set(a) == {"vae", "unet", "text_encoder", "tokenizer", "scheduler"}
    path = tmp_path / "b" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    c = backbone.load(tmp_path / "b").identity
    assert c["unet"] != a["unet"] and {**c, "unet": a["unet"]} == a


def test_a_base_may_be_only_an_autoencoder(tmp_path):
    made = write_hub_layout(tmp_path / "whole", variant="")
    made.vae.save_pretrained(tmp_path / "part" / "vae")
    got = backbone.load(tmp_path / "part")
    assert got.unet is None and got.tile_px == 32
    with pytest.raises(ValueError, match="has no unet, text_encoder"):
        got.need("vae", "unet", "text_encoder")


def test_a_missing_base_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match=r"put a diffusers folder .* at .*models/sd15"):
        backbone.load("models/sd15")
    with pytest.raises(FileNotFoundError, match="not found"):
        backbone.load("/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="none of the subfolders"):
        backbone.load("empty")
    (tmp_path / "v1-5.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="single file"):
        backbone.load("v1-5.safetensors")


def test_a_hub_id_asks_the_hub_and_offline_says_so(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    write_hub_layout(tmp_path / "snapshot", variant="both")
    listed = [str(p.relative_to(tmp_path / "snapshot")) for p in (tmp_path / "snapshot").rglob("*") if p.is_file()]
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    backbone.load("someone/sd-tiny")
    wanted = asked["allow_patterns"]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in wanted and "unet/diffusion_pytorch_model.safetensors" not in wanted
    assert not any("safety_checker" in path or path.endswith(".bin") for path in wanted)

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    backbone.load("someone/sd-tiny")
    assert asked["local_files_only"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="put a diffusers folder"):
        backbone.load("someone/sd-tiny")


def test_pickled_weights_are_refused(tmp_path):
    write_hub_layout(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"\.bin.*not read"):
        backbone.load(tmp_path)


def test_incomplete_weights_are_refused(tmp_path):
    write_hub_layout(tmp_path)
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = tmp_path / part / f"{name}.fp16.safetensors"
        weights = load_file(path)
        lost = sorted(weights)[3]
        save_file({key: value for key, value in weights.items() if key != lost}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights"):
            backbone.load(tmp_path)
        save_file(weights, path, metadata={"format": "pt"})


def test_other_kinds_of_base_are_refused(tmp_path):
    write_hub_layout(tmp_path)
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(ValueError, match="inpainting"):
        backbone.load(tmp_path)
    path.write_text(json.dumps({**config, "addition_embed_type": "text_time"}))
    with pytest.raises(ValueError, match="SDXL"):
        backbone.load(tmp_path)


def test_decoding_does_not_depend_on_the_neighbours(model):
    z = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = backbone.decode(model, z, batch_size=4)
    assert whole.shape == (6, 32, 32, 3) and whole.dtype == np.uint8
    assert np.array_equal(backbone.decode(model, z[4:5], batch_size=4)[0], whole[4])
    assert abs(backbone.decode(model, z.flip(0), batch_size=4)[::-1].astype(int) - whole).max() <= 1
    assert abs(backbone.decode(model, z, batch_size=1).astype(int) - whole).max() <= 1
    assert backbone.decode(model, z[:0]).shape == (0, 32, 32, 3)


def test_latents_are_the_scaled_mean_or_a_sample_of_the_posterior(model):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, logvar = backbone.encode(model, images)
    assert mean.shape == logvar.shape == (2, 4, 8, 8)
    assert torch.equal(backbone.latents(mean, logvar, 0.5), mean * 0.5)
    draws = torch.stack([backbone.latents(mean, logvar, 0.5, torch.Generator().manual_seed(i)) for i in range(400)])
    torch.testing.assert_close(draws.std(0), 0.5 * (logvar / 2).exp(), rtol=0.25, atol=0.01)


def test_a_prompt_that_is_too_long_is_refused_not_cut(model):
    with pytest.raises(ValueError, match=r"reads 77; shorten it"):
        backbone.embed(model, ["xyzzy " * 40])
    with pytest.raises(TypeError, match="list of prompts"):
        backbone.embed(model, "a tissue")


def test_the_padding_and_ids_are_those_of_the_tokenizer(model):
    ids = backbone.token_ids(model, ["a histology image", ""])
    stock = model.tokenizer(["a histology image", ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, stock)
    assert ids[0, 1:4].tolist() == [model.tokenizer.convert_tokens_to_ids(w) for w in ("a</w>", "histology</w>", "image</w>")]


@pytest.mark.parametrize("supported, expected", [(True, torch.bfloat16), (False, None)])
def test_arithmetic_is_bfloat16_only_on_a_gpu_that_has_it(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert backbone.Model(device=torch.device("cuda")).arithmetic is expected
    assert backbone.Model().arithmetic is None, "the same bits on every processor"


class Moved(torch.nn.Linear):
    """A part that writes down where it is sent instead of going there."""

    def __init__(self, log):
        super().__init__(1, 1)
        self.log = log

    def to(self, device):
        self.log.append(str(device))
        return self


def test_a_model_rests_on_the_cpu_and_returns_when_it_is_used():
    log = []
    model = backbone.Model(unet=Moved(log), device=torch.device("meta"))
    assert model.rest() and log == ["cpu"]
    with model.alone() as used:
        assert used is model and log == ["cpu", "meta"]
    with model.alone():
        assert log == ["cpu", "meta"], "it is there already"
    assert not backbone.Model(unet=Moved(log)).rest() and len(log) == 2, "on a CPU there is nothing to give back"


@pytest.mark.gpu
def test_a_resting_model_leaves_the_gpu_and_draws_the_same_afterwards():
    model = backbone.load("mini", torch.device("cuda"))
    draw = lambda: sampling.sample(model, ["mucin"], [torch.Generator().manual_seed(0)], num_inference_steps=2)  # noqa: E731
    before, full = draw(), torch.cuda.memory_allocated()
    assert model.rest() and torch.cuda.memory_allocated() < full / 10
    assert (draw() == before).all()


def test_a_tokenizer_that_does_not_fit_its_text_encoder_is_refused(tmp_path):
    write_hub_layout(tmp_path / "base")
    config = files.read_json(tmp_path / "base" / "text_encoder" / "config.json")
    words = len(backbone.load(str(tmp_path / "base")).tokenizer)
    for path in (tmp_path / "base" / "tokenizer").iterdir():
        if path.name in ("tokenizer.json", "vocab.json", "merges.txt"):
            path.unlink()
    with pytest.raises(ValueError, match=rf"its tokenizer has \d+ words and its text encoder {words}"):
        backbone.load(str(tmp_path / "base"))
    assert words == config["vocab_size"]
