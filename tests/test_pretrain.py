"""20_pretrain by hand and headless: its three parts, from invented pictures to a base and an encoder that the other pages load."""

import shutil

import pytest
import torch

from histokit import backbone, batch, corpus, encoders, files, ldm, package_mini, pretrain, recipe, sampling

RECIPE = """\
shared:
  sources: {toy: {classes: [stroma, fat], tiles: 4, weight: 0.7}, looks: {tiles: 4, weight: 0.3}}
steps:
  - autoencoder: {run: 20_pretrain, part: autoencoder, widths: [16, 16, 16], steps: 4, batch_size: 2}
  - longer: {run: 20_pretrain, part: autoencoder, init: autoencoder, widths: [16, 16, 16], steps: 1, batch_size: 2, lr: 1e-12}
  - diffusion: {run: 20_pretrain, part: diffusion, autoencoder: autoencoder, widths: [16, 32], steps: 4, batch_size: 2, lr: 1e-3}
  - further: {run: 20_pretrain, part: diffusion, init: diffusion, steps: 1, batch_size: 2, lr: 1e-12}
  - sup: {run: 20_pretrain, part: encoder, objective: supervised, widths: [32], steps: 4, batch_size: 2, lr: 1e-3}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, repository):
    """A working root in which the three parts were trained for four steps each, by the notebook itself."""
    root = tmp_path_factory.mktemp("pretrain")
    files.write_bytes(root / "notebooks" / "20_pretrain.ipynb", (repository / "notebooks" / "20_pretrain.ipynb").read_bytes())
    files.write_text(root / "params" / "base.yaml", RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTOKIT_ROOT", str(root))
        results = batch.run(recipe.read(root / "params" / "base.yaml"), workers=2, say=lambda line: None)
    assert {id[0]: r.state for id, r in results.items()} == dict.fromkeys(("autoencoder", "longer", "diffusion", "further", "sup"), "done")
    return root / "outputs" / "base"


def test_the_base_it_made_draws_pictures(trained):
    model = backbone.load(str(trained / "diffusion"))
    assert model.tile_px == 128 and model.factor == 4 and model.scheduler.config.prediction_type == "v_prediction"
    image = sampling.sample(model, ["stroma"], [torch.Generator().manual_seed(0)], num_inference_steps=2)
    assert image.shape == (1, 128, 128, 3) and image.std() > 0


def test_its_latents_have_unit_deviation_by_the_factor_it_wrote(trained):
    model = backbone.load(str(trained / "diffusion"))
    seen = corpus.gather({"toy": {"classes": ["stroma", "fat"], "tiles": 4}, "looks": {"tiles": 4}})
    views, _ = pretrain.whole_tiles(seen, 128, 100)
    latents = backbone.encode(model, views)[0] * model.scaling
    assert float(latents.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("first, second, parts", [("autoencoder", "longer", ("vae",)), ("diffusion", "further", ("unet", "text_encoder"))])
def test_a_part_goes_on_from_another(trained, first, second, parts):
    first, second = backbone.load(str(trained / first)), backbone.load(str(trained / second))
    for part in parts:
        old, new = (getattr(model, part).state_dict() for model in (first, second))
        assert all(torch.equal(old[name], new[name]) for name in old), "at a learning rate of nothing it stays what it was"
    if first.tokenizer:
        assert first.identity["tokenizer"] == second.identity["tokenizer"] and first.identity["vae"] == second.identity["vae"]


def test_going_on_needs_the_same_latents(trained):
    with pytest.raises(ValueError, match="learned other latents than those of mini"):
        pretrain._go_on(backbone.load("mini"), backbone.load(str(trained / "diffusion")))
    with pytest.raises(ValueError, match="an encoder starts from random weights"):
        pretrain.task("encoder", None, None, None, tile_px=128, widths=[16], batch_size=1, lr=1, init=trained / "autoencoder")


def test_the_encoder_it_made_is_loaded_by_its_file(trained):
    name = f"cnn@{trained / 'sup' / 'sup.safetensors'}"
    encoder = encoders.load(name)
    assert encoder.dim == 32 and encoder.size == 128 and encoders.source(name) == trained / "sup" / "sup.safetensors"
    assert encoder.identity["encoder"] == "cnn"
    with pytest.raises(ValueError, match="names no file"):
        encoders.load("cnn@")


def test_what_it_saw_is_listed_and_its_numbers_kept(trained):
    assert len(files.read_table(trained / "sup" / "trained_on.csv")) == 12
    facts = files.read_json(trained / "autoencoder" / "results.json")
    assert facts["psnr_tiles"] == 12 and 0 < facts["psnr_db"] < 60
    assert files.read_json(trained / "sup" / "results.json")["classes"] == ["toy: fat", "toy: stroma"]


def test_packaging_keeps_an_encoder_that_was_not_trained_anew(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    home, target = tmp_path / "outputs" / "base", tmp_path / "mini"
    shutil.copytree(trained, home)
    facts = files.read_json(home / "diffusion" / "results.json")
    kid = {"kid": 30.0, "kid_floor": 20.0, "kid_untrained": 900.0, "kid_n": 80, "samples": 500}
    files.write_json(home / "diffusion" / "results.json", facts | kid)
    with pytest.raises(FileNotFoundError, match="ssl"):
        package_mini.package("base", target)
    kept = {"ssl": {"nearest_neighbour_agreement": 0.71, "steps": 7, "batch_size": 2, "finished": "2026-11-21", "on": "elsewhere"}}
    files.write_json(target / "mini.json", kept)
    files.write_table(target / "trained_on.csv", files.read_table(trained / "sup" / "trained_on.csv"))
    packaged = package_mini.package("base", target)
    assert packaged["ssl"] == kept["ssl"] and packaged["sup"]["steps"] == 4
    assert package_mini.updates(home, files.read_json(home / "longer" / "run.json")) == 4 + 1
    card = (target / "model_card.md").read_text()
    assert "12 pictures: 4 of looks, 8 of toy" in card and "71% (ssl)" in card and "ssl 7 steps of batch 2" in card
    assert (target / "sup.safetensors").read_bytes() == (trained / "sup" / "sup.safetensors").read_bytes()
    assert backbone.load(str(target)).tile_px == 128
    files.write_table(target / "trained_on.csv", files.read_table(trained / "sup" / "trained_on.csv").head(11))
    with pytest.raises(ValueError, match="different pictures"):
        package_mini.package("base", target)


def test_drawn_sources_hold_out_other_pictures():
    sources = {"toy": {"classes": ["stroma"], "tiles": 40}, "looks": {"tiles": 10}}
    seen, held = corpus.gather(sources), corpus.gather(sources, split="val")
    assert len(held.images) == 4 + 4
    assert not set(seen.table().pixels_sha256) & set(held.table().pixels_sha256)


def test_fidelity_stands_between_its_floor_and_the_untrained(monkeypatch, tmp_path):
    """A model that returns held-out pictures is at the floor; the untrained one far away."""
    held = corpus.gather({"toy": {"classes": ["stroma"], "tiles": 400}}, split="val")
    held.cases = [str(i) for i in range(len(held.cases))]
    others = corpus.gather({"toy": {"classes": ["stroma"], "tiles": 40}}, seed=5)
    good, _ = pretrain.whole_tiles(others, 128, 40)
    good = ((good.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    drawn = iter([good, 255 - good])
    monkeypatch.setattr(pretrain, "sample", lambda model, prompts, seed: next(drawn))
    model = type("Model", (), {"tile_px": 128, "unet": ldm.unet((16, 16), latent_px=32)})()
    monkeypatch.setattr(backbone, "load", lambda folder, device: model)
    facts = pretrain.fidelity(tmp_path, held, 40)
    assert facts["kid_untrained"] > facts["kid"] and abs(facts["kid"] - facts["kid_floor"]) < 0.1 * facts["kid_untrained"]
    assert facts["nearer"] > 10 and facts["samples"] == 40
