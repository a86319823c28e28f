"""20_pretrain by hand and headless: its four parts, from invented pictures to a base and an encoder that the other pages load."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from histokit import runs
from histokit.core import files
from histokit.diffusion import backbone, pretrained, sampling
from histokit.engine import batch
from histokit.runs import recipe
from histokit.training import lineage
from histokit.training.pretraining import corpus, decoder, held_out, ldm, package_mini, pretrain, sample_quality
from histokit.vision import encoders

RECIPE = """\
shared:
  sources: {toy: {classes: [stroma, fat], tiles: 4, weight: 0.7}, looks: {tiles: 4, weight: 0.3}}
steps:
  - autoencoder: {run: 20_pretrain, part: autoencoder, widths: [16, 16, 16], steps: 4, batch_size: 2}
  - longer: {run: 20_pretrain, part: autoencoder, init: autoencoder, widths: [16, 16, 16], steps: 1, batch_size: 2, lr: 1e-12}
  - decoder: {run: 20_pretrain, part: decoder, init: autoencoder, steps: 2, batch_size: 2, pieces: 1}
  - diffusion: {run: 20_pretrain, part: diffusion, autoencoder: autoencoder, widths: [16, 32], steps: 4, batch_size: 2, lr: 1e-3}
  - further: {run: 20_pretrain, part: diffusion, init: diffusion, steps: 1, batch_size: 2, lr: 1e-12}
  - sup: {run: 20_pretrain, part: encoder, objective: supervised, widths: [32], steps: 4, batch_size: 2, lr: 1e-3}
  - adapted_ssl: {run: 20_pretrain, part: encoder, objective: contrastive, init: mini, steps: 1, batch_size: 2, lr: 1e-12}
"""
STEPS = ("autoencoder", "longer", "decoder", "diffusion", "further", "sup", "adapted_ssl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, repository):
    """A working root in which the three parts were trained for four steps each, by the notebook itself."""
    root = tmp_path_factory.mktemp("pretrain")
    files.write_bytes(root / "notebooks" / "20_pretrain.ipynb", (repository / "notebooks" / "20_pretrain.ipynb").read_bytes())
    files.write_text(root / "params" / "base.yaml", RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTOKIT_ROOT", str(root))
        results = batch.run(recipe.read(root / "params" / "base.yaml"), workers=2, say=lambda line: None)
    assert {id[0]: r.state for id, r in results.items()} == dict.fromkeys(STEPS, "done")
    return root / "outputs" / "base"


def test_the_base_it_made_draws_pictures(trained):
    model = backbone.load(str(trained / "diffusion"))
    assert model.tile_px == 128 and model.factor == 4 and model.scheduler.config.prediction_type == "v_prediction"
    image = sampling.sample(model, ["stroma"], [torch.Generator().manual_seed(0)], num_inference_steps=2)
    assert image.shape == (1, 128, 128, 3) and image.std() > 0


@pytest.mark.parametrize("step", ["autoencoder", "diffusion"])
def test_its_latents_have_unit_deviation_by_the_factor_it_wrote(trained, step):
    model = backbone.load(str(trained / step))
    seen = corpus.gather({"toy": {"classes": ["stroma", "fat"], "tiles": 4}, "looks": {"tiles": 4}})
    views, _ = held_out.whole_tiles(seen, 128, 100)
    latents = backbone.encode(model, views)[0] * model.scaling
    assert float(latents.std()) == pytest.approx(1, abs=0.05)  # measured on other views


@pytest.mark.parametrize("first, second, parts", [("autoencoder", "longer", ("vae",)), ("diffusion", "further", ("unet", "text_encoder"))])
def test_a_part_goes_on_from_another(trained, first, second, parts):
    first, second = backbone.load(str(trained / first)), backbone.load(str(trained / second))
    assert not any("_name_or_path" in path.read_text() for path in trained.glob("*/*/config.json")), "a path of the machine it was made on"
    for part in parts:
        old, new = (getattr(model, part).state_dict() for model in (first, second))
        assert all(torch.equal(old[name], new[name]) for name in old), "at a learning rate of nothing it stays what it was"
    if first.tokenizer:
        assert first.identity["tokenizer"] == second.identity["tokenizer"] and first.identity["vae"] == second.identity["vae"]


def test_a_new_decoder_leaves_latents_and_the_rest_of_the_base_as_they_are(trained):
    old, new = (files.read_tensors(next((trained / step / "vae").glob("*.safetensors"))) for step in ("autoencoder", "decoder"))
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"decoder", "post_quant_conv"}
    before, after = (backbone.load(str(trained / step)) for step in ("autoencoder", "decoder"))
    assert after.identity["vae"] == before.identity["vae"] and after.identity["decoder"] != before.identity["vae"]
    assert "decoder" not in before.identity, "adapters and latents of the one are those of the other, pictures are not"
    facts = files.read_json(trained / "decoder" / "results.json")
    assert set(facts["contrast"]) == set(facts["contrast_before"]) == set(facts["psnr_of"]) == {"toy", "looks"}


def test_a_decoder_needs_a_base(trained):
    with pytest.raises(ValueError, match="part decoder goes on from a base"):
        pretrain.task("decoder", None, None, None, tile_px=128, widths=[16], batch_size=2, lr=1e-3)


def test_every_source_has_its_say_in_a_validation_as_it_is_drawn():
    seen = corpus.gather({"toy": {"classes": ["fat"], "tiles": 6, "weight": 3}, "looks": {"tiles": 5, "weight": 1}})
    few = held_out.BySource(seen, 64, per_source=4)
    assert few.images.shape == (8, 3, 64, 64) and few.names.tolist() == ["toy"] * 4 + ["looks"] * 4
    mean, of = few.mean(torch.tensor([1.0] * 4 + [5.0] * 4))
    assert mean == pytest.approx(0.75 * 1 + 0.25 * 5) and of == {"val_toy": 1.0, "val_looks": 5.0}


def test_settings_of_another_part_are_refused(trained):
    settings = {"tile_px": 128, "widths": [16], "batch_size": 1, "lr": 1}
    with pytest.raises(ValueError, match="has no ssl.safetensors, the encoder of objective contrastive"):
        run = SimpleNamespace(seed=0)
        pretrain.task("encoder", run, None, None, objective="contrastive", init=trained / "autoencoder", **settings)
    with pytest.raises(ValueError, match="part diffusion takes no `pieces`, it is for autoencoder and decoder"):
        pretrain.task("diffusion", None, None, None, autoencoder=trained / "autoencoder", pieces=3, **settings)
    with pytest.raises(ValueError, match="name a step or a base that has one"):
        pretrain.task("diffusion", None, None, None, **settings)


def test_an_origin_is_a_step_a_base_or_a_folder(trained, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(trained.parent.parent))
    run = type("Run", (), {"experiment": "base", "parent": lambda self, step: trained / step, "base": runs.Run.base})()
    assert lineage.origin(run, "") is None
    assert lineage.origin(run, "diffusion") == trained / "diffusion"
    assert lineage.origin(run, "mini") == pretrained.MINI and run.base("mini") == "mini" and run.base("") == ""
    assert run.base("diffusion") == "outputs/base/diffusion", "below the root, as an adapter's card names it"
    assert lineage.origin(run, "outputs/base/diffusion") == trained / "diffusion"


def test_an_encoder_goes_on_from_minis(trained):
    old, new = (encoders.load(name) for name in ("mini-ssl", f"cnn@{trained / 'adapted_ssl' / 'ssl.safetensors'}"))
    for a, b in zip(old.net.parameters(), new.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    seen = set(files.read_table(trained / "adapted_ssl" / "trained_on.csv")["pixels_sha256"])
    assert seen > set(files.read_table(pretrained.MINI / "trained_on.csv")["pixels_sha256"]), "what mini has seen counts as seen"


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


def test_packaging_keeps_a_part_that_was_not_trained_anew(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    home, target = tmp_path / "outputs" / "base", tmp_path / "mini"
    shutil.copytree(trained, home)
    shutil.rmtree(home / "autoencoder")
    space = {"samples": 30.0, "autoencoder": 25.0, "untrained": 900.0, "floor": 20.0, "n": 80}
    fidelity = {"psnr_db": 22.5, "psnr_tiles": 12, "samples": 500, "kid": {"colour-texture": space}}
    files.write_json(home / "diffusion" / "results.json", files.read_json(home / "diffusion" / "results.json") | fidelity)
    with pytest.raises(FileNotFoundError, match="autoencoder"):
        package_mini.package("base", target)
    made = {"updates": 7, "batch_size": 2, "finished": "2026-11-21", "on": "elsewhere"}
    kept = {"ssl": made | {"nearest_neighbour_agreement": 0.71}, "autoencoder": made}
    files.write_json(target / "mini.json", kept)
    files.write_table(target / "trained_on.csv", files.read_table(trained / "sup" / "trained_on.csv"))
    packaged = package_mini.package("base", target)
    assert packaged["ssl"] == kept["ssl"] and packaged["autoencoder"] == made and packaged["sup"]["updates"] == 4
    card = (target / "model_card.md").read_text()
    assert "12 pictures: 4 of looks, 8 of toy" in card and "71% (ssl)" in card and "ssl 7 of batch 2" in card
    assert "30 in colour-texture (autoencoder alone 25, untrained UNet 900, real tiles of other cases 20, 80 a side)" in card
    assert (target / "sup.safetensors").read_bytes() == (trained / "sup" / "sup.safetensors").read_bytes()
    assert backbone.load(str(target)).tile_px == 128
    assert lineage.updates(target, "diffusion") == 4, "what goes on from the package counts on from there"
    other = files.read_table(trained / "sup" / "trained_on.csv").head(1).assign(pixels_sha256="f" * 64)
    files.write_table(target / "trained_on.csv", other)
    package_mini.package("base", target)
    assert len(files.read_table(target / "trained_on.csv")) == 13, "what a part saw before it was packaged stays on the list"


def test_what_a_part_went_on_from_has_seen_counts_as_seen(trained, tmp_path):
    own = corpus.gather({"looks": {"tiles": 2}}, seed=9)
    assert len(lineage.learned(own)) == len(lineage.learned(own, None, tmp_path)) == 2
    both = lineage.learned(own, trained / "diffusion", trained / "diffusion")
    assert len(both) == 14 and set(both["pixels_sha256"]) >= set(
        files.read_table(trained / "diffusion" / "trained_on.csv")["pixels_sha256"]
    )


def test_updates_are_counted_through_what_a_part_went_on_from(trained, tmp_path):
    assert [files.read_json(trained / step / "results.json")["updates"] for step in ("autoencoder", "longer", "further")] == [4, 5, 5]
    assert lineage.updates(None, "diffusion") == lineage.updates(tmp_path, "diffusion") == 0


def test_drawn_sources_hold_out_other_pictures():
    sources = {"toy": {"classes": ["stroma"], "tiles": 40}, "looks": {"tiles": 10}}
    seen, held = corpus.gather(sources), corpus.gather(sources, split="val")
    assert len(held.images) == corpus.HELD_DRAWN + 10, "few of each class; of looks four times as many, where there are so many"
    assert not set(seen.table.pixels_sha256) & set(held.table.pixels_sha256)


def test_fidelity_stands_between_its_floor_and_the_untrained(monkeypatch, tmp_path):
    """A model that returns held-out pictures is at the floor; the untrained one far away, a blurring autoencoder in between."""
    monkeypatch.setattr(corpus, "HELD_DRAWN", 40)
    held = corpus.gather({"toy": {"classes": ["stroma"], "tiles": 40}}, split="val")
    held.table["case"] = [str(i) for i in range(len(held.table))]
    others = corpus.gather({"toy": {"classes": ["stroma"], "tiles": 40}}, seed=5)
    good, _ = held_out.whole_tiles(others, 128, 40)
    good = sample_quality._pixels(good)
    drawn = iter([good, 255 - good])
    monkeypatch.setattr(sample_quality, "sample", lambda model, prompts, seed, guidance: next(drawn))
    blur = lambda vae, images: torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)  # noqa: E731
    monkeypatch.setattr(ldm, "reconstruct", blur)
    model = type("Model", (), {"tile_px": 128, "unet": ldm.unet((16, 16), latent_px=32), "vae": None})()
    monkeypatch.setattr(backbone, "load", lambda folder, device: model)
    facts = sample_quality.fidelity(tmp_path, held, 40)
    assert facts["samples"] == 40 and facts["psnr_tiles"] == 40 and facts["psnr_db"] < 40
    for kid in facts["kid"].values():
        assert kid["n"] == 20 and abs(kid["samples"] - kid["floor"]) < 0.1 * kid["untrained"] and kid["nearer"] > 10
    assert facts["kid"]["colour-texture"]["autoencoder"] > 3 * facts["kid"]["colour-texture"]["samples"]


def test_a_dataset_lends_so_many_tiles_a_class_and_no_more_than_memory_holds(root, monkeypatch):
    for name in "ab":
        for i in range(12):
            path = root / "tiles" / name / f"P{i}_0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(path)
    files.write_text(root / "d.yaml", "root: tiles\nclasses: {a: {}, b: {}}\ntile_px: 32\ncase_pattern: '(?P<case_id>P[0-9]+)_'\n")
    few, more = (corpus.gather({"d.yaml": {"tiles": n}}) for n in (2, 4))
    assert [part.labels.count("d.yaml: a") for part in (few, more)] == [2, 4]
    assert set(few.table["tile"]) < set(more.table["tile"])
    monkeypatch.setattr(corpus.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * (40 * 40 * 3 + corpus.PER_TILE)))
    with pytest.raises(ValueError, match=r"source 'd.yaml': \d+ tiles need .* set tiles, at most so many a class, to 1 or fewer"):
        corpus.gather({"d.yaml": {}})
    assert len(corpus.gather({"d.yaml": {"tiles": 1}}).images) == 2


def test_a_decoder_is_asked_for_texture_and_not_for_grain():
    """Grain of a sensor cannot be decoded; asked for it, a decoder draws rings into empty fat."""
    rng = torch.Generator().manual_seed(0)
    flat, noise = torch.full((1, 3, 32, 32), 0.8), torch.randn(1, 3, 32, 32, generator=rng)
    lost = {}
    for name, size in (("grain", 0.01), ("texture", 0.2)):
        real = flat + size * noise
        lost[name] = float((decoder.fine_contrast(flat, decoder.GRAIN) - decoder.fine_contrast(real, decoder.GRAIN)).abs().mean()) / size
        seen = float((decoder.fine_contrast(flat) - decoder.fine_contrast(real)).abs().mean()) / size
        assert seen > 0.5, "the measure of what is left sees both"
    assert lost["grain"] < 0.25 * lost["texture"]
