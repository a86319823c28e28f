"""Pre-training from scratch: views, losses, vocabulary, and what a corpus may hold."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from histokit import toy
from histokit.diffusion import backbone, losses, sampling
from histokit.training import loop
from histokit.training.pretraining import corpus, decoder, ldm, representation
from histokit.vision import encoders


def picture(side=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_a_view_at_full_size_is_the_symmetry_that_was_drawn():
    image = picture(16)
    drawn = np.random.default_rng(3)
    view, k = ldm.view(image, 16, np.random.default_rng(3)), [int(drawn.integers(n)) for n in (1, 1, 8)][-1]
    turned = np.rot90(image, k % 4)
    assert np.array_equal(view, turned[:, ::-1] if k >= 4 else turned), "turned first and mirrored then, by the number that was drawn"
    assert np.array_equal(ldm.view(image, 16, np.random.default_rng(3), turn=False), image)


def test_batches_follow_from_seed_and_number_alone():
    images = [picture(seed=i) for i in range(5)]
    one = ldm.picture_batches(images, [1] * 5, 16, 4, seed=0)
    two = ldm.picture_batches(images, [1] * 5, 16, 4, seed=0)
    two(0)
    assert torch.equal(one(7)["images"], two(7)["images"])
    assert not torch.equal(one(7)["images"], one(8)["images"])
    assert not torch.equal(one(7)["images"], ldm.picture_batches(images, [1] * 5, 16, 4, seed=1)(7)["images"])


def test_the_first_batches_hold_pieces_of_the_views_that_would_have_been_seen():
    images = [picture(seed=i) for i in range(5)]
    whole, pieces = (ldm.picture_batches(images, [1] * 5, 16, 4, seed=0, pieces=n) for n in (0, 3))
    assert torch.equal(whole(3)["images"], pieces(3)["images"])
    view, piece = whole(2)["images"], pieces(2)["images"]
    assert piece.shape == (4, 3, 8, 8)
    corners = [(y, x) for y in range(9) for x in range(9) if torch.equal(view[:, :, y : y + 8, x : x + 8], piece)]
    assert len(corners) == 1
    assert len({pieces(k)["images"].shape for k in range(3)}) == 1


def test_pictures_are_drawn_by_weight():
    images = [np.full((16, 16, 3), value, np.uint8) for value in (0, 255)]
    batches = ldm.picture_batches(images, [3, 1], 16, 16, seed=0)
    white = np.mean([float((batches(k)["images"] > 0).float().mean()) for k in range(60)])
    assert white == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 960))


def test_psnr_is_twenty_decibels_at_a_tenth_of_the_peak():
    images = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(ldm.psnr(images, images + 0.2), torch.full((2,), 20.0))


def test_an_autoencoder_learns_its_pictures():
    torch.manual_seed(0)
    vae = ldm.autoencoder((16, 16), tile_px=8)
    flat = np.repeat(np.array([40, 120, 200], np.uint8), 8 * 8 * 3).reshape(3, 8, 8, 3)
    player = ldm.autoencoder_player(vae, lr=1e-2)
    history = loop.fit([player], ldm.picture_batches(list(flat), [1] * 3, 8, 4, 0), 60, 0, log_every=10, schedule="one_cycle")
    assert history.squared_error.iloc[-1] < 0.3 * history.squared_error.iloc[0]


def test_the_last_latent_is_asked_for_the_local_hue():
    """A tile pink on its left: the error is zero where the last latent follows red minus green, and grows with what it lacks."""
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0, :, :8] = 0.5
    latents = torch.randn(1, 4, 8, 8)
    latents[:, 3] = 0
    latents[:, 3, :, :4] = 2
    assert float(ldm.hues(images, latents).abs().max()) < 1e-6
    latents[:, 3] += 0.25
    assert float(ldm.hues(images, latents).mean()) == pytest.approx(0.25)


def test_scaled_latents_have_unit_deviation():
    model = tiny_model()
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    scaling = ldm.measure_scaling(model.vae, images)
    mean, _ = backbone.encode(model, images)
    assert float((mean * scaling).std()) == pytest.approx(1, rel=1e-4)


def test_centring_changes_latents_and_no_picture():
    model = tiny_model()
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    before = ldm.reconstruct(model.vae, images)
    noise = torch.randn(8, 4, 8, 8)
    raw = model.vae.encode(images).latent_dist
    drawn = model.vae.decode(raw.mean + noise * raw.std).sample
    mean, logvar = ldm.centre(model.vae, raw.mean, raw.logvar)
    torch.testing.assert_close(ldm.reconstruct(model.vae, images), before, atol=1e-5, rtol=0)
    after = model.vae.encode(images).latent_dist
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.vae.decode(after.mean + noise * after.std).sample, drawn, atol=1e-4, rtol=0)
    torch.testing.assert_close(mean.float(), after.mean, atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(logvar.float(), after.logvar, atol=1e-2, rtol=1e-3)
    assert model.scaling == 1


def test_the_vocabulary_survives_its_folder_and_spells_unseen_words(tmp_path):
    texts = ["an H&E tile of colorectal adenocarcinoma", "low-grade neoplasia, pale stain"] * 3
    made = ldm.tokenizer(texts, tmp_path)
    from transformers import CLIPTokenizer

    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*texts, "Größe <unseen> 40x"]:
        assert made(text).input_ids == again(text).input_ids
    assert len(made) <= 2000
    assert len(made.tokenize("adenocarcinoma")) == 1
    ids = made("colorectal").input_ids
    assert ids[0] == made.bos_token_id and ids[-1] == made.eos_token_id == made.pad_token_id
    assert "unseen" in made.decode(made("an unseen tile").input_ids)


def test_caption_dropout_empties_captions(monkeypatch):
    model = tiny_model()
    for part in (model.unet, model.text_encoder):
        part.requires_grad_(True)
    asked = []
    embed = backbone.embed
    monkeypatch.setattr(backbone, "embed", lambda m, prompts: (asked.extend(prompts), embed(m, prompts))[1])
    player = ldm.diffusion_player(model, caption_dropout=0.5)
    batch = {"latents": torch.randn(4, 4, 8, 8), "captions": ["colon"] * 4}
    for step in range(10):
        player.loss(batch, step, torch.Generator().manual_seed(step))
    assert 8 <= asked.count("") <= 32 and asked.count("colon") == 40 - asked.count("")


def test_contrast_is_lowest_when_partners_agree():
    """With unit features the loss has a closed form: partner at cosine 1, all others at 0."""
    n, temperature = 4, 0.2
    player = representation.contrastive_player(torch.nn.Identity(), torch.nn.Linear(n, n), temperature=temperature)
    with torch.no_grad():
        player.params[0].copy_(torch.eye(n))
        player.params[1].zero_()
    loss, logs = player.loss({"a": torch.eye(n), "b": torch.eye(n)}, 0, None)
    expected = -np.log(np.exp(1 / temperature) / (np.exp(1 / temperature) + 2 * n - 2))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5) and float(logs["matched"]) == 1


def test_stain_jitter_keeps_white_nearly_white_and_zero_strength_keeps_all():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.abs(representation.jitter(images, rng, 0.0).astype(int) - images).max() <= 1
    assert representation.jitter(np.full((5, 4, 4, 3), 255, np.uint8), rng, 0.2).min() >= 240


def test_a_corpus_refuses_what_the_demo_makes_rare():
    tail = next(name for name, facts in toy.CLASSES.items() if facts["role"] == "tail")
    with pytest.raises(ValueError, match=tail):
        corpus.gather({"toy": {"classes": [tail], "tiles": 1}})
    with pytest.raises(ValueError, match="unknown setting 'tile'"):
        corpus.gather({"toy": {"tile": 1}})


def test_a_corpus_weighs_its_sources_and_lists_what_it_saw():
    held = corpus.gather({"toy": {"classes": ["stroma", "fat"], "tiles": 3, "weight": 0.75}, "looks": {"tiles": 2, "weight": 0.25}})
    assert len(held.images) == 8 and sum(held.weights) == pytest.approx(1)
    assert sum(held.weights[:6]) == pytest.approx(0.75)
    table = held.table
    assert table.label.tolist() == ["stroma"] * 3 + ["fat"] * 3 + ["", ""]
    assert table.pixels_sha256.is_unique
    assert table.pixels_sha256[0] == corpus.pixels_hash(held.images[0])
    assert not held.captions[6][0].startswith("stroma")


def test_a_small_encoder_takes_any_size():
    encoder = encoders.SmallCNN(16).eval()
    assert encoder(torch.zeros(2, 3, 64, 96)).shape == (2, 16)


def test_layout_weighs_full_and_what_is_hardly_hidden_little():
    levels = ldm.schedule().alphas_cumprod
    weight = losses.structure_weight(levels, torch.tensor([990, 500, 10]))
    snr = levels / (1 - levels)
    assert float(weight[0]) == 1 and float(weight[2]) == pytest.approx(6 / (float(snr[10]) + 1))
    assert float(weight[1]) == 1, "below SNR 5 nothing is taken away"


def test_structure_is_for_bases_that_predict_a_velocity():
    assert losses.timestep_draw(tiny_model(prediction_type="v_prediction").scheduler, "structure")(4, torch.Generator()).shape == (4,)
    with pytest.raises(ValueError, match="this base predicts the noise"):
        losses.timestep_draw(tiny_model().scheduler, "structure")
    with pytest.raises(ValueError, match="timesteps 'late' is unknown"):
        losses.timestep_draw(tiny_model().scheduler, "late")


def test_the_schedule_is_that_of_stable_diffusion_but_ends_in_noise():
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    ours = ldm.schedule()
    assert float(ours.alphas_cumprod[-1]) == 0 and float(stock[-1]) > 0.004
    # Lin et al. (2024), algorithm 1: the root of the signal's share, moved to end at 0 and stretched to begin where it did
    root = stock.sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(ours.alphas_cumprod, expected, atol=1e-5, rtol=0)
    assert sampling.schedule(ours, 20)[0] == 999


def test_timesteps_are_spread_evenly_in_proportion_to_their_weight(monkeypatch):
    model = tiny_model()
    model.scheduler = ldm.schedule()
    for part in (model.unet, model.text_encoder):
        part.requires_grad_(True)
    seen = []
    monkeypatch.setattr(losses, "diffusion_loss", lambda u, s, z, c, timesteps, n, **kw: seen.append(timesteps))
    player = ldm.diffusion_player(model)
    for step in range(500):
        player.loss({"latents": torch.randn(8, 4, 8, 8), "captions": [""] * 8}, step, torch.Generator().manual_seed(step))
    drawn = torch.stack(seen)
    weight = losses.structure_weight(model.scheduler.alphas_cumprod, torch.arange(1000))
    reached = (weight.cumsum(0) / weight.sum())[drawn].sort(1).values
    lower = torch.arange(8) / 8
    assert ((reached > lower - 2e-3) & (reached < lower + 1 / 8 + 2e-3)).all(), "one timestep in each eighth"
    share = torch.bincount(drawn.flatten() // 100, minlength=10) / drawn.numel()
    torch.testing.assert_close(share, weight.view(10, 100).sum(1) / weight.sum(), atol=0.02, rtol=0)
    assert drawn.max() > 990, "the last timestep is where sampling starts"


def test_a_picture_is_drawn_by_its_weight_however_many_views_it_has():
    source = np.array([0] * 8 + [1])  # eight views of a real tile, one of a drawn picture
    mean, logvar = torch.arange(9.0)[:, None, None, None], torch.full((9, 1, 1, 1), -60.0)
    batches = ldm.caption_batches(mean, logvar, source, [("real",), ("drawn",)], [0.5, 0.5], 1.0, 4000, seed=0)
    drawn = batches(0)
    assert np.mean([text == "drawn" for text in drawn["captions"]]) == pytest.approx(0.5, abs=0.03)
    assert drawn["latents"].round().unique().tolist() == list(range(9)), "and every view comes up"


def test_fine_contrast_sees_a_blur_that_squared_errors_forgive():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    soft = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    real, blurred, flat = (decoder.fine_contrast(x) for x in (images, soft, torch.zeros_like(images)))
    assert real.shape == (2, 3, 8, 8) and float(flat.max()) < 0.004
    assert float((blurred / real).max()) < 0.6
    torch.testing.assert_close(decoder.fine_contrast(images.flip(-1)).flip(-1), real)


def test_views_are_degraded_within_bounds_and_never_brightened():
    rng = np.random.default_rng(0)
    images = rng.integers(60, 200, (40, 32, 32, 3)).astype(np.uint8)
    clean = representation.degrade(images, np.random.default_rng(1), noise=0)
    noisy = representation.degrade(images, np.random.default_rng(1))
    ratio = clean.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3))
    assert 0.3 < ratio.min() < 0.45 and 0.9 < ratio.max() <= 1.0, "from a 3 x 3 mean to nothing at all"
    assert np.abs(clean.mean((1, 2, 3)) - images.mean((1, 2, 3))).max() < 1
    assert (noisy.astype(int) - clean).std(axis=(1, 2, 3)).max() < 0.07 * 255


def test_a_decoder_is_not_the_better_for_being_soft():
    """Of a texture that is known in part, the known part alone has more decibels than the same at the texture's full contrast."""
    known, unknown = (0.4 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    images, soft, sharp = 0.8 * known + 0.6 * unknown, 0.8 * known, known
    assert (ldm.psnr(soft, images) > ldm.psnr(sharp, images)).all()
    assert (decoder.errors(sharp, images) < decoder.errors(soft, images)).all()
    assert float(decoder.errors(images, images).abs().max()) == 0
