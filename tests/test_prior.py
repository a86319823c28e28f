"""The prior of 20_pretrain: learned from tiles without labels, kept apart from what is tested on, and a base like any other afterwards."""

import numpy as np
import pandas as pd
import pytest
import torch
from folders import class_folders, described, save, texture
from tiny import tiny_model, write_hub_layout

from histokit.core import files, machine
from histokit.diffusion import backbone, losses, sampling
from histokit.engine import batch, replicates
from histokit.runs import recipe
from histokit.tiles import data
from histokit.training import checkpoints, data_parallel, loop, unconditional
from histokit.training.pretraining import corpus, decoder, latent_shards, pretrain, prior
from histokit.vision import latent_classifiers

RECIPE = """\
shared: {dataset: params/datasets/set.yaml, base_model: tiny, tile_px: 32}
steps:
  - 00_dataset: {encoder: colour-texture, labelled: 0.4, base_model: "", on_copies: keep}
  - prior:
      run: 20_pretrain
      part: prior
      init: tiny
      sources: {own: {step: 00_dataset, weight: 2}, scans: {folder: scans, case_pattern: '^(.+?)_'}}
      steps: 4
      batch_size: 2
      lr: 1e-3
  - scratch:
      {run: 20_pretrain, part: prior, autoencoder: tiny, network: mini, loss: l1, steps: 2, batch_size: 2, sources: {a: {step: 00_dataset}}}
  - together:
      {run: 20_pretrain, part: prior, init: tiny, sources: {own: {step: 00_dataset}}, steps: 3, batch_size: 4, lr: 1e-3, processes: 2}
  - 21_latent_classifier: {base_model: prior, steps: 2, batch_size: 4}
  - aux: {run: 06_classifier, arms: {aux: {}}, seeds: 1, steps: 10, batch_size: 4, encoder: mini-ssl}
  - adapted:
      run: 20_pretrain
      part: decoder
      init: prior
      sources: {own: {step: 00_dataset, labelled: true}}
      classifier: aux
      steps: 2
      batch_size: 2
  - codec:
      run: 20_pretrain
      part: autoencoder
      network: mini
      critic: {start: 0.5, width: 8}
      sources: {own: {step: 00_dataset}}
      steps: 4
      batch_size: 2
      lr: 1e-4
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory, repository):
    """A study of which two cases in five are labelled, and scans among which a test tile and a test case lie."""
    root = tmp_path_factory.mktemp("prior")
    class_folders(root / "tiles", cases=10, tiles=2)
    write_hub_layout(root / "tiny", text_width=32)
    for i in range(6):
        save(root / "scans" / f"new{i}_0.png", texture(1000 + i, 40))
    for name in ("00_dataset", "06_classifier", "20_pretrain", "21_latent_classifier"):
        files.write_bytes(root / "notebooks" / f"{name}.ipynb", (repository / "notebooks" / f"{name}.ipynb").read_bytes())
    files.write_text(root / "params" / "study.yaml", RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTOKIT_ROOT", str(root))
        described(root, "tiles", "case_pattern: '(?P<case_id>P[0-9]+)_'\n")
        read = recipe.read(root / "params" / "study.yaml")
        batch.run(read, only=["00_dataset"], say=lambda line: None)
        tiles = files.read_table(root / "outputs" / "study" / "00_dataset" / "manifest.csv")
        test = tiles[tiles["split"].eq("test")]
        copied, other = test.iloc[0], test[test["case_id"].ne(test["case_id"].iloc[0])].iloc[0]
        save(root / "scans" / "copy_0.bmp", data.decode.rgb(root / "tiles" / copied["file_name"])[0])  # the same pixels, another file
        save(root / "scans" / f"{other['case_id']}_9.png", texture(2000))  # another tile of a case that is tested on
        results = batch.run(read, workers=2, say=lambda line: None)
    assert {r.state for r in results.values()} <= {"done", "up to date"}, [r.text for r in results.values()]
    return root


@pytest.fixture
def out(study, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(study))
    return study / "outputs" / "study"


def test_labels_are_left_to_whole_cases_and_nobody_else_has_one(out):
    tiles = files.read_table(out / "00_dataset" / "manifest.csv")
    train = tiles[tiles["split"].eq("train")]
    assert train.groupby("case_id")["use"].nunique().eq(1).all()
    assert set(train.loc[train["use"].eq("unlabelled"), "label"]) == {"tissue"} and train["use"].eq("labelled").any()
    assert tiles.loc[tiles["split"].ne("train"), "use"].eq("labelled").all()


def test_it_learns_from_all_training_tiles_and_from_no_tile_or_case_that_is_kept_back(out):
    tiles = files.read_table(out / "00_dataset" / "manifest.csv")
    seen = files.read_table(out / "prior" / "trained_on.csv")
    assert set(seen.loc[seen["source"].eq("own"), "tile"]) == set(tiles.loc[tiles["split"].eq("train"), "file_name"])
    assert set(seen["label"]) == {""}
    scans = set(seen.loc[seen["source"].eq("scans"), "tile"])
    assert scans < {f"new{i}_0.png" for i in range(6)} and len(scans) == 5, "one case in fifty, at least one, is held out"
    held = files.read_table(out / "prior" / "logs" / "training" / "history.csv")
    assert held["val_own"].notna().any() and held["val_scans"].notna().any(), "validated on validation tiles, and on a case of the scans"
    said = "".join(str(cell.get("outputs")) for cell in files.read_json(out / "prior" / "20_pretrain.ipynb")["cells"])
    assert "1 tiles are left out, validation, test or withheld tiles" in said and "1 tiles are left out, of cases kept back here" in said


def test_it_is_a_base_like_any_other_of_the_same_latents(out, study):
    old, new = backbone.load(str(study / "tiny")), backbone.load(str(out / "prior"))
    assert old.latent_space["scaling"] == new.latent_space["scaling"] and new.hears
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = [model.predict(z, torch.tensor(500), unconditional.silence(model, 2)) for model in (old, new)]
    assert not torch.equal(*told) and new.identity["text_encoder"] == old.identity["text_encoder"]
    assert old.identity["vae"] == new.identity["vae"], "latents, adapters and classifiers of the one are those of the other"


def test_one_from_random_weights_has_its_own_scale_and_no_text(out, study):
    model = backbone.load(str(out / "scratch"))
    assert not model.hears and model.text_encoder is None and model.tile_px == 32
    facts = files.read_json(out / "scratch" / "results.json")
    assert facts["scaling_factor"] == pytest.approx(1 / facts["latent_deviation"]) == model.scaling and facts["hears_text"] is False
    manifest = files.read_table(out / "00_dataset" / "manifest.csv")
    rows = manifest[manifest["split"].eq("train")]
    tiles = np.stack([np.asarray(data.decode.rgb(study / "tiles" / name)[0]) for name in rows["file_name"]])
    mean, logvar = backbone.encode(model, data.to_float(tiles))
    z = backbone.latents(mean, logvar, model.scaling, torch.Generator().manual_seed(0))
    assert float(z.std()) == pytest.approx(1, abs=0.05)
    assert backbone.load(str(study / "tiny")).scaling == 0.5, "the base it was made from keeps its own"
    image = sampling.sample(model, [""], [torch.Generator().manual_seed(0)], guidance_scale=1.0, num_inference_steps=2)
    assert image.shape == (1, 32, 32, 3)


def test_two_processes_train_it_from_the_notebook(out, study, monkeypatch):
    """The launcher's two processes leave the weights that one has after the same micro-batches."""
    book = files.read_json(out / "together" / "20_pretrain.ipynb")
    assert not [o for cell in book["cells"] for o in cell.get("outputs", []) if o["output_type"] == "error"]
    record = files.read_json(out / "together" / "run.json")
    run = data_parallel.Joined(out / "together", "cpu")
    task, _ = data_parallel.prepared(run, record["parameters"], *data_parallel.corpora(run, record["parameters"]))
    threads = machine.threads()
    machine.use_threads(1)  # as each of two on two cores
    try:
        loop.fit(task.players, task.batches, 3, 0, accumulate=2, **task.settings)
    finally:
        machine.use_threads(threads)
    held = files.read_tensors(out / "together" / "logs" / "training" / checkpoints.LAST)
    for i, p in enumerate(task.players[0].params):
        torch.testing.assert_close(held[f"prior.{i}.ema"], p.detach(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 4"):
        data_parallel.prepared(run, record["parameters"] | {"processes": 3}, None, None)


def test_another_draw_of_the_labels_does_not_train_it_again(out, study):
    """The prior of -d1 is that of the study: it sees the same tiles, whoever has a label."""
    read = recipe.read(study / "params" / "study.yaml")
    drawn = next(part for part in replicates.study(read, draws=2) if part.experiment == "study-d1")
    results = batch.run(drawn, only=["00_dataset", "prior"], say=lambda line: None)
    assert results["prior", ""].state == "done"
    other = study / "outputs" / "study-d1"
    labels = [files.read_table(place / "00_dataset" / "manifest.csv")["use"].tolist() for place in (out, other)]
    assert labels[0] != labels[1] and backbone.load(str(other / "prior")).identity == backbone.load(str(out / "prior")).identity
    last = [place / "prior" / "logs" / "training" / checkpoints.LAST for place in (out, other)]
    assert last[0].stat().st_ino == last[1].stat().st_ino, "the same file: nothing was trained"


def test_a_decoder_is_adapted_to_the_labelled_tiles_while_a_classifier_watches(out):
    history = files.read_table(out / "adapted" / "logs" / "training" / "history.csv")
    assert history["class_error"].dropna().gt(0).all()
    tiles = files.read_table(out / "00_dataset" / "manifest.csv")
    named = tiles[tiles["split"].eq("train") & tiles["use"].eq("labelled")]
    seen = files.read_table(out / "adapted" / "trained_on.csv")
    assert set(seen.loc[seen["source"].eq("own") & seen["label"].ne(""), "tile"]) == set(named["file_name"])
    old, new = (backbone.load(str(out / step)) for step in ("prior", "adapted"))
    assert new.latent_space == old.latent_space and new.identity["decoder"] != old.identity["vae"]
    of_the_prior = latent_classifiers.load(out / "21_latent_classifier")
    latent_classifiers.refuse_stranger(of_the_prior, new.latent_space, ["a", "b"])


def test_an_autoencoder_hears_its_critic_from_the_middle_on(out):
    history = files.read_table(out / "codec" / "logs" / "training" / "history.csv")
    assert history["critic_weight"].dropna().gt(0).all() and history["told_apart"].notna().any()
    model = backbone.load(str(out / "codec"))
    assert model.vae.config.sample_size == 32 and model.factor == 4 and model.scaling != 0.18215


# --- its latents


@pytest.fixture
def cache(root):
    for i in range(11):
        save(root / "scans" / f"{i}.png", texture(i, 48))
    model = tiny_model()
    seen = corpus.gather({"scans": {"folder": "scans"}})
    return lambda draws=30, **options: latent_shards.LatentShards(model.vae, "tiny", seen, 32, draws, **options)


def test_latents_are_those_of_the_views_and_no_neighbour_or_order_changes_them(cache, monkeypatch):
    monkeypatch.setattr(latent_shards, "ROWS", 4)
    held = cache().fill()
    assert held.views == 3 and len(held) == 30 and len(list(held.folder.iterdir())) == 8
    mean, _ = held.rows([29, 3, 3])
    view = torch.from_numpy(held._view(29).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        alone = held.vae.encode(view).latent_dist
    torch.testing.assert_close(mean[0], alone.mean[0].half().float(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(mean[1], mean[2], rtol=0, atol=0)
    before = held.rows(range(30))[0]
    (held.folder / "000002.safetensors").unlink()
    torch.testing.assert_close(cache().fill().rows(range(30))[0], before, rtol=0, atol=0)


def test_no_more_views_are_encoded_than_are_drawn_and_no_more_pictures_than_fit(cache):
    assert cache(draws=4).views == 1 and cache(draws=10**6).views == latent_shards.MOST
    small = cache(budget_gb=6 * 4 * 4 * 8 * 8 / 1e9)
    assert len(small) == 6 and small.said == ["6 of 10 pictures are used: their latents fill 6.144e-06 GB. `latents_gb` gives them more."]


def test_each_source_lends_pictures_by_its_share_of_the_draws():
    table = pd.DataFrame({"source": ["few"] * 10 + ["many"] * 90, "weight": [0.5 / 10] * 10 + [0.5 / 90] * 90})
    table["pixels_sha256"] = [f"{(37 * i) % 100:02d}" for i in range(100)]
    rows = latent_shards._lent(table, 40)
    assert len(rows) == 40 and (rows < 10).sum() == 10, "of the few all, though their share would be 20"
    kept = table.iloc[rows]
    assert kept.loc[kept["source"].eq("many"), "pixels_sha256"].max() < table.drop(rows).loc[10:, "pixels_sha256"].min()


def test_every_view_comes_once_an_epoch_from_whatever_batch_one_begins(cache):
    held = cache().fill()
    numbers = []
    held.sample = lambda rows, scaling, rng: numbers.extend(rows)
    of = latent_shards.batches(held, 1.0, 5, seed=2)
    [of(k) for k in range(12)]
    assert sorted(numbers[:30]) == sorted(numbers[30:]) == list(range(30)) and numbers[:30] != numbers[30:]
    whole, numbers[:] = list(numbers), []
    [latent_shards.batches(held, 1.0, 5, seed=2)(k) for k in (7, 8)]
    assert numbers == whole[35:45]


def test_a_prior_that_was_killed_in_an_epoch_goes_on_to_the_same_bits(cache, tmp_path):
    held = cache().fill()

    def train(folder, until=99):
        model = tiny_model()
        model.unet.requires_grad_(True)
        of = latent_shards.batches(held, 0.5, 4, seed=0)

        def stopping(k):
            if k >= until:
                raise KeyboardInterrupt
            return of(k)

        loop.fit([unconditional.player(model, 1e-3)], stopping, 6, 0, folder=folder, ema=0.9999, checkpoint_every=2)
        return [p.detach().clone() for p in model.unet.parameters()]

    whole = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", until=5)
    for a, b in zip(whole, train(tmp_path / "b"), strict=True):
        assert torch.equal(a, b)


# --- what it learns, and what is refused


@pytest.mark.parametrize("kind, error", [("l1", torch.Tensor.abs), ("l2", torch.Tensor.square)])
def test_its_loss_is_the_error_of_the_noise_without_a_word(kind, error):
    model, z = tiny_model(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    model.unet.requires_grad_(True)
    found = unconditional.player(model, 1e-3, kind).loss({"latents": z}, 0, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    t = losses.timestep_draw(model.scheduler)(3, generator)
    noise = torch.randn(z.shape, generator=generator)
    with torch.no_grad():
        told = model.unet(model.scheduler.add_noise(z, noise, t), t, backbone.embed(model, [""]).expand(3, -1, -1)).sample
    torch.testing.assert_close(found.detach(), error(told - noise).mean(), rtol=1e-5, atol=1e-6)


def test_a_watched_decoder_takes_labelled_tiles_alone():
    table = pd.DataFrame({"label": ["a", "b", "a"]})
    assert decoder.targets(corpus.Corpus(table=table), ["b", "a"]) == [1, 0, 1]
    for label, said in (("", "a picture has no label"), ("c", "label 'c', which is none of a, b")):
        with pytest.raises(ValueError, match=said):
            decoder.targets(corpus.Corpus(table=table.assign(label=["a", "b", label])), ["a", "b"])


def test_what_cannot_be_trained_is_refused(tmp_path):
    write_hub_layout(tmp_path / "tiny")
    run = type("Run", (), {"seed": 0})
    how = {"tile_px": 32, "device": "cpu"}
    with pytest.raises(ValueError, match="knows the latents of that base's own autoencoder"):
        prior.model(run, network="", autoencoder=tmp_path / "tiny", init=tmp_path / "tiny", **how)
    for part, given, said in (
        ("prior", {"critic": {"start": 0.1}}, "part prior takes no `critic`, it is for autoencoder"),
        ("diffusion", {"network": "paper"}, "part diffusion takes no `network`, it is for autoencoder and prior"),
        ("encoder", {"loss": "l1"}, "part encoder takes no `loss`, it is for prior"),
        ("decoder", {"classifier": "aux", "pieces": 2}, "a classifier names whole tiles"),
    ):
        with pytest.raises(ValueError, match=said):
            pretrain.task(part, run, None, None, widths=[16], batch_size=2, lr=1e-3, **given, **how)
    for network, autoencoder, init in (("", None, None), ("mini", None, tmp_path / "tiny")):
        with pytest.raises(ValueError, match="give one of the two"):
            prior.model(run, network=network, autoencoder=autoencoder, init=init, **how)
    with pytest.raises(ValueError, match="name a step or a base that has one"):
        prior.model(run, network="mini", autoencoder=None, init=None, **how)
    with pytest.raises(ValueError, match="network paper halves latents 4 times, and 8 px do not take that; use mini"):
        prior.model(run, network="paper", autoencoder=tmp_path / "tiny", init=None, **how)
    with pytest.raises(ValueError, match="network 'huge' is unknown; use paper, base, mini"):
        prior.model(run, network="huge", autoencoder=tmp_path / "tiny", init=None, **how)
    with pytest.raises(ValueError, match="loss 'huber' is unknown; use l1 or l2"):
        unconditional.player(tiny_model(), 1e-3, "huber")
