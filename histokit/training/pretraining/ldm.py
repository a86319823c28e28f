"""A latent diffusion model from scratch: views of pictures, autoencoder, vocabulary, text-conditioned UNet.

This is how `mini`, the embedded miniature of Stable Diffusion, was made (`params/mini.yaml`), and how a model is
pre-trained on one's own tiles. Rombach et al. (2022), arXiv:2112.10752. Training itself is `loop.fit`, encoders are in
`representation`.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from histokit.core import files
from histokit.diffusion import backbone, losses
from histokit.tiles import augment
from histokit.training import loop

VERSION = 3
# The text's states, pooled by attention, are added to the embedding of the timestep, so that every block hears them at every noise level.
POOLED = {"addition_embed_type": "text", "addition_embed_type_num_heads": 8}


# ---------------------------------------------------------------------------------------------- pictures in


def view(image, px, rng, least=0.0, turn=True):
    """A random view [px, px, 3] uint8 of an image [H, W, 3]: crop, resize, one of the 8 symmetries of the square.

    The crop's side is uniform between the larger of px and `least` x the image's side, and that side; 1 takes the largest square.
    `turn=False` leaves it upright.
    """
    side = min(image.shape[:2])
    smallest = max(min(px, side), int(side * least))
    crop = int(rng.integers(smallest, side + 1)) if smallest < side else side
    top, left = (int(rng.integers(0, n - crop + 1)) for n in image.shape[:2])
    out = Image.fromarray(image[top : top + crop, left : left + crop])
    out = np.asarray(out.resize((px, px), Image.Resampling.BICUBIC, reducing_gap=2.0) if crop != px else out)
    return augment.pixel_symmetry(out, augment.TURN_FIRST[int(rng.integers(8))]) if turn else out


def picture_batches(images, weights, px, batch_size, seed, device="cpu", pieces=0, targets=None):
    """`batches(k)` of random views [B, 3, px, px] float in [-1, 1]; image i is drawn with probability weights[i].

    With `targets` [N] int also theirs, [B] int64.

    The first `pieces` batches hold a random quarter of each view, [B, 3, px / 2, px / 2]: what has no layout to learn learns as much of
    texture and stain from it, in less than a third of the time (measured on two cores, 64 of 128 px, batch of 4).
    """
    weights = np.asarray(weights, float) / np.sum(weights)

    def batches(k):
        rng = np.random.default_rng(files.seed(seed, "pictures", k))
        chosen = rng.choice(len(images), batch_size, p=weights)
        views = np.stack([view(images[i], px, rng) for i in chosen])
        if k < pieces:
            top, left = rng.integers(0, px // 2 + 1, 2)
            views = views[:, top : top + px // 2, left : left + px // 2]
        found = {"images": (torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)}
        return found if targets is None else found | {"targets": torch.as_tensor([targets[i] for i in chosen], device=device)}

    return batches


# ---------------------------------------------------------------------------------------------- autoencoder


def autoencoder(widths=(32, 64, 128), latent_channels=4, tile_px=128):
    """A KL autoencoder of down-sampling factor 2^(len(widths) - 1); tiles this small cannot hold nuclei at the usual 8."""
    from diffusers import AutoencoderKL

    n = len(widths)
    return AutoencoderKL(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=tile_px,
        mid_block_add_attention=False,
    )


def edges(images):
    """Horizontal and vertical differences of [B, C, H, W], what a blurred reconstruction loses first."""
    return images.diff(dim=-1), images.diff(dim=-2)


def hues(images, latents):
    """What the last latent channel's local means lack to four times red minus green, both on a 4 x 4 grid."""
    red, green, _ = F.adaptive_avg_pool2d(images, 4).unbind(1)
    return F.adaptive_avg_pool2d(latents, 4)[:, -1] - 4 * (red - green)


def autoencoder_player(vae, lr=2e-3, l1=0.5, edge=0.5, hue=0.5, kl=1e-3):
    """Squared + l1 x absolute + edge x absolute error of `edges` + hue x squared error of `hues` + kl x divergence from N(0, 1).

    Without `hue` the stain is learned last: after 2,600 steps pink still came back purple.
    """

    def loss(batch, step, generator):
        images = batch["images"]
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean.device)
        error = vae.decode(z).sample.float() - images
        blurred = sum(e.abs().mean() for e in edges(error))
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        stain = hues(images, mean).square().mean()
        total = error.square().mean() + l1 * error.abs().mean() + edge * blurred + hue * stain + kl * divergence
        return total, {"squared_error": error.square().mean(), "hue_error": stain}

    return loop.Player("autoencoder", [{"params": vae.parameters(), "lr": lr}], loss)


@torch.no_grad()
def reconstruct(vae, images, batch_size=16):
    """Round trip of images [B, 3, H, W] in [-1, 1] through the posterior mean, clamped to [-1, 1]."""
    parts = [vae.decode(vae.encode(x).latent_dist.mean).sample.float().clamp(-1, 1) for x in images.split(batch_size)]
    return torch.cat(parts)


def psnr(images, others):
    """Peak signal-to-noise ratio [B] in dB of images in [-1, 1] against others (peak 2); higher is better."""
    return 10 * torch.log10(4 / (images - others).square().mean(dim=(1, 2, 3)))


@torch.no_grad()
def measure_scaling(vae, images, batch_size=16):
    """1 / standard deviation of the latents of images [B, 3, H, W], so that the diffusion sees unit variance."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(batch_size)])
    return float(1 / z.std())


@torch.no_grad()
def centre(vae, mean, logvar):
    """Give every latent channel mean 0 and deviation 1, in the autoencoder (in place) and in latents it made; pictures stay the same.

    The shift and scale go into the 1 x 1 convolutions on both sides of the latents, so the scaling factor becomes 1. A channel whose
    mean is not 0 shows through the noise to SD's last timestep, while sampling starts from noise whose mean is 0: the stain of every
    sample is off. One factor for all channels, as SD has it, leaves that, and lets the loudest channel be learned first.

    Args:
        vae: AutoencoderKL with quant_conv and post_quant_conv.
        mean, logvar: [N, C, h, w] of its latents, unscaled.

    Returns:
        mean and logvar [N, C, h, w] float16 of the same views by the autoencoder as it is now.
    """
    shift, scale = mean.float().mean(dim=(0, 2, 3)), mean.float().std(dim=(0, 2, 3))
    inward, outward, n = vae.quant_conv, vae.post_quant_conv, len(scale)
    device, column = outward.weight.device, scale[:, None, None]
    outward.bias += outward.weight[:, :, 0, 0] @ shift.to(device)
    outward.weight *= column.to(device)
    inward.weight[:n] /= column[..., None].to(device)
    inward.bias[:n] = (inward.bias[:n] - shift.to(device)) / scale.to(device)
    inward.bias[n:] -= 2 * scale.log().to(device)
    vae.register_to_config(scaling_factor=1.0)
    return ((mean.float() - shift[:, None, None]) / column).half(), (logvar.float() - 2 * column.log()).half()


# ---------------------------------------------------------------------------------------------- words


def tokenizer(texts, folder, vocabulary=2000):
    """A CLIPTokenizer whose byte-pair vocabulary is learned from `texts`, written to and loaded from `folder`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        list(texts),
        trainers.BpeTrainer(vocab_size=vocabulary - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in merges]
    words = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    files.write_json(folder / "vocab.json", vocab)
    files.write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    fresh = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    fresh.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(vocabulary, eos, width=128, layers=4, heads=4):
    """A small CLIPTextModel with random weights; it is trained together with the UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=77, projection_dim=width, bos_token_id=eos - 1, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    return CLIPTextModel(config)


# ---------------------------------------------------------------------------------------------- diffusion


def unet(widths=(64, 96, 128, 160), layers=1, context=128, latent_px=32, heads=4):
    """A UNet2DConditionModel for latents [B, 4, latent_px, latent_px]: cross-attention at every level but the finest, and `POOLED`."""
    from diffusers import UNet2DConditionModel

    n = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=latent_px,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        cross_attention_dim=context,
        attention_head_dim=heads,  # diffusers' name; it has always been the number of heads
        norm_num_groups=16,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * n,
        up_block_types=("CrossAttnUpBlock2D",) * n + ("UpBlock2D",),
        **POOLED,
    )


def schedule():
    """The noise schedule of SD 1.x and 2.x (scaled linear, 1,000 steps) as a DDIM scheduler, ending in noise alone, for the velocity.

    SD's own schedule ends with 0.5 % of the variance a picture's, enough to tell the mean of a small latent by: a model learns to read
    it there, finds none where sampling starts, and draws tiles of one middling stain. Rescaled as in Lin et al. (2024),
    arXiv:2305.08891, algorithm 1, and sampled from the last timestep on. The levels in between, and so what a strength does, hardly move.

    Measured on mini: a UNet that predicts the noise was, after 1,800 steps, farther from the picture at timestep 990 than the mean
    picture is (squared error 1.09 of variance 1); one that predicts the velocity, after 1,000 steps, at 0.75.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


@torch.no_grad()
def view_latents(vae, images, copies, px, seed, least=0.0, batch_size=32, device="cpu"):
    """Latents of `copies[i]` random views of every image: mean and logvar [N, 4, h, w] float16 and source index [N]."""
    source = np.repeat(np.arange(len(images)), copies)
    means, logvars = [], []
    for start in range(0, len(source), batch_size):
        rows = range(start, min(start + batch_size, len(source)))
        views = np.stack([view(images[source[j]], px, np.random.default_rng(files.seed(seed, "view", j)), least) for j in rows])
        posterior = vae.encode((torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)).latent_dist
        means.append(posterior.mean.half().cpu())
        logvars.append(posterior.logvar.half().cpu())
    return torch.cat(means), torch.cat(logvars), source


def caption_batches(mean, logvar, source, captions, weights, scaling, batch_size, seed):
    """`batches(k)` of scaled latents [B, 4, h, w] and one caption each, drawn from captions[source]; a picture's views share its weight."""
    views = np.bincount(source, minlength=len(weights))
    weights = (np.asarray(weights, float) / views.clip(1))[source]
    weights = weights / weights.sum()

    def batches(k):
        rng = np.random.default_rng(files.seed(seed, "latents", k))
        rows = rng.choice(len(source), batch_size, p=weights)
        noise = torch.from_numpy(rng.standard_normal((batch_size, *mean.shape[1:]), dtype=np.float32))
        z = (mean[rows].float() + torch.exp(0.5 * logvar[rows].float()) * noise) * scaling
        texts = [captions[source[j]][int(rng.integers(len(captions[source[j]])))] for j in rows]
        return {"latents": z, "captions": texts}

    return batches


def diffusion_player(model, lr=6e-4, caption_dropout=0.1):
    """UNet and text encoder together on the denoising error; each caption is emptied with probability `caption_dropout`.

    Of a velocity, timesteps are drawn where the layout is decided, see `losses.timestep_draw`; of the noise, all alike.
    """
    draw = losses.timestep_draw(model.scheduler, "structure" if model.scheduler.config.prediction_type == "v_prediction" else "uniform")

    def loss(batch, step, generator):
        z = batch["latents"].to(model.device)
        drop = torch.rand(len(z), generator=generator) < caption_dropout
        timesteps = draw(len(z), generator).to(model.device)
        noise = torch.randn(z.shape, generator=generator).to(model.device)
        context = backbone.embed(model, ["" if d else c for d, c in zip(drop, batch["captions"], strict=True)])
        return losses.diffusion_loss(model.unet, model.scheduler, z, context, timesteps, noise, min_snr_gamma=0)

    params = [*model.unet.parameters(), *model.text_encoder.parameters()]
    return loop.Player("diffusion", [{"params": params, "lr": lr}], loss)
