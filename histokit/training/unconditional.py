"""Networks of a diffusion model that sees tissue and no label: autoencoder, UNet without text, noise schedule.

HistoDiffusion (arXiv:2308.04020): the expensive part is trained once, on tiles that nobody labelled; a class comes in later, from a small
classifier in the same latents (`training.latent_classifier`). Rombach et al. (2022), arXiv:2112.10752, for the two networks.
"""

from dataclasses import dataclass, replace

import torch

from histokit.core import files
from histokit.diffusion import backbone, losses
from histokit.training import loop

VERSION = 2


@dataclass(frozen=True)
class Preset:
    """Sizes of the networks.

    Args:
        tile_px: side of the tiles.
        channels: of the latents.
        codec: channels of the autoencoder a level, finest first; each level but the last halves the map.
        codec_blocks: residual blocks a level of its encoder, one more in its decoder.
        widths: channels of the UNet a level, finest first.
        attention: levels of the UNet with self-attention.
        blocks: residual blocks a level.
        head_width: channels of an attention head.
        groups: of the normalisation.
        betas: first and last noise variance of the 1,000 steps, linear in their square roots.
    """

    tile_px: int
    channels: int
    codec: tuple
    codec_blocks: int
    widths: tuple
    attention: tuple
    blocks: int = 2
    head_width: int = 48
    groups: int = 32
    betas: tuple = (0.00085, 0.012)


PRESETS = {
    # as released; attention over the 4,096 places of the finest level is a third of its work, and `base` leaves it out
    "paper": Preset(256, 3, (128, 256, 512), 2, (192, 384, 384, 768, 768), (0, 1, 2, 3), betas=(0.0015, 0.0155)),
    "base": Preset(256, 3, (128, 256, 512), 2, (192, 384, 384, 768, 768), (1, 2, 3), betas=(0.0015, 0.0155)),
    "mini": Preset(128, 4, (32, 64, 128), 1, (64, 96, 128, 160), (1, 2, 3), blocks=1, head_width=32, groups=16),
}


def autoencoder(preset):
    """A KL autoencoder; tiles [B, 3, px, px] in [-1, 1] become latents [B, channels, px / f, px / f]."""
    from diffusers import AutoencoderKL

    n = len(preset.codec)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=preset.codec,
        layers_per_block=preset.codec_blocks, latent_channels=preset.channels, sample_size=preset.tile_px, norm_num_groups=preset.groups,
    )  # fmt: skip


def unet(preset):
    """A UNet2DModel for such latents, that hears the timestep in every block and nothing else."""
    from diffusers import UNet2DModel

    # a plain DownBlock2D or UpBlock2D would not read `downsample_type` and `upsample_type`
    down = ["AttnDownBlock2D" if level in preset.attention else "ResnetDownsampleBlock2D" for level in range(len(preset.widths))]
    up = ["AttnUpBlock2D" if level in preset.attention else "ResnetUpsampleBlock2D" for level in reversed(range(len(preset.widths)))]
    return UNet2DModel(
        sample_size=preset.tile_px // 2 ** (len(preset.codec) - 1), in_channels=preset.channels, out_channels=preset.channels,
        block_out_channels=preset.widths, layers_per_block=preset.blocks, down_block_types=tuple(down), up_block_types=tuple(up),
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", norm_num_groups=preset.groups,
        attn_norm_num_groups=preset.groups, attention_head_dim=preset.head_width,
    )  # fmt: skip


def schedule(preset):
    """DDIM on the preset's noise, which ends in a clean latent."""
    from diffusers import DDIMScheduler

    first, last = preset.betas
    return DDIMScheduler(
        beta_start=first, beta_end=last, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


def fresh_autoencoder(network, tile_px):
    """The autoencoder of a preset, with random weights, for tiles of `tile_px`."""
    return autoencoder(replace(_preset(network), tile_px=tile_px))


def _preset(network):
    if network not in PRESETS:
        raise ValueError(f"network {network!r} is unknown; use {', '.join(PRESETS)}")
    return PRESETS[network]


def fresh(network, model, seed):
    """UNet and noise schedule of a preset, with random weights, for the latents of `model`'s autoencoder.

    Args:
        network: name of one of `PRESETS`.
        model: backbone.Model with a vae; `tile_px` is set.

    Raises ValueError for an unknown name, or latents that the UNet cannot halve so often.
    """
    preset, px = _preset(network), model.tile_px // model.factor
    halvings = 2 ** (len(preset.widths) - 1)
    if px % halvings:
        raise ValueError(f"network {network} halves latents {len(preset.widths) - 1} times, and {px} px do not take that; use mini")
    fitting = replace(preset, channels=model.vae.config.latent_channels, tile_px=px * 2 ** (len(preset.codec) - 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(seed, "unconditional"))
        return unet(fitting), schedule(preset)


def player(model, lr, kind="l2"):
    """The UNet alone, on the denoising error of latents without a word; one that takes text hears the empty prompt.

    HistoDiffusion trains on the absolute error (`kind` l1), Ho et al. (2020), arXiv:2006.11239, on the squared one. Timesteps are drawn
    alike where the noise is predicted and, of a velocity, where the layout is decided, see `losses.timestep_draw`.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"loss {kind!r} is unknown; use l1 or l2")
    draw = losses.timestep_draw(model.scheduler, "structure" if model.scheduler.config.prediction_type == "v_prediction" else "uniform")

    def loss(batch, step, generator):
        z = batch["latents"].to(model.device)
        timesteps = draw(len(z), generator).to(model.device)
        noise = torch.randn(z.shape, generator=generator).to(model.device)
        how = {"min_snr_gamma": 0, "kind": kind}
        return losses.diffusion_loss(model.unet, model.scheduler, z, silence(model, len(z)), timesteps, noise, **how)

    return loop.Player("prior", [{"params": model.unet.parameters(), "lr": lr}], loss)


def silence(model, count):
    """What a UNet hears when nothing is said: embeddings [count, L, D] of the empty prompt, None for one without text."""
    return backbone.embed(model, [""]).expand(count, -1, -1).detach() if model.hears else None
