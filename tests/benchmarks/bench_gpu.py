"""Stable Diffusion 1.5's size on a GPU, random weights, 512 px, bfloat16: LoRA steps and sampling at batch 1 and 16.

LoRA is timed in turns with the loop of diffusers' own LoRA example: base in bfloat16, pictures and prompts encoded at every step. The
card's own rate is that of a large matrix product. Without a GPU all of it is skipped; HISTOKIT_BENCH_SMALL=1 runs it on the CPU at toy
size, to check the bench and to measure nothing.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from bench_generator import clock, in_turns
from torch.utils.flop_counter import FlopCounterMode

from histokit.core import machine
from histokit.diffusion import adapters, backbone, losses, sampling
from histokit.training import finetuning, loop
from histokit.training.pretraining import ldm

SMALL = bool(os.environ.get("HISTOKIT_BENCH_SMALL"))
pytestmark = [] if SMALL else [pytest.mark.gpu]
PX, STEPS, RANK = (128, 1, 4) if SMALL else (512, 8, 16)


@pytest.fixture(scope="module")
def model():
    """The parts of SD 1.5 by its published settings, weights at random; words by mini's tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    device = machine.device()
    widths, layers, text = ((32, 32, 32, 32), 1, 32) if SMALL else ((320, 640, 1280, 1280), 2, 768)
    pixels = (32,) * 4 if SMALL else (128, 256, 512, 512)
    tokenizer = backbone.load("mini/").tokenizer
    torch.manual_seed(0)
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=PX // 8, block_out_channels=widths, layers_per_block=layers, cross_attention_dim=text, attention_head_dim=8
        ),
        "vae": AutoencoderKL(
            sample_size=PX,
            block_out_channels=pixels,
            layers_per_block=layers,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.18215,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=text, intermediate_size=4 * text, num_attention_heads=text // 32 if SMALL else 12,
                num_hidden_layers=2 if SMALL else 12, eos_token_id=tokenizer.eos_token_id,
            )
        ),
    }  # fmt: skip
    for part in parts.values():
        part.requires_grad_(False).eval().to(device)
    return backbone.Model(
        **parts,
        tokenizer=tokenizer,
        scheduler=ldm.schedule(),
        name="toy size, no measurement" if SMALL else "SD 1.5 with random weights",
        tile_px=PX,
        device=torch.device(device),
    )


@pytest.fixture(scope="module")
def rate(model):
    """bfloat16 multiply-adds of the card per second x 2, measured on a matrix product of 8,192."""
    n = 512 if SMALL else 8192
    a = torch.randn(n, n, device=model.device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    return 10 * 2 * n**3 / clock(lambda: [a @ a for _ in range(10)])


def peak(model):
    """Peak GiB since the last call."""
    if model.device.type != "cuda":
        return float("nan")
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def flops(work):
    """Floating-point operations of work(), counted by torch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def params(model):
    """What LoRA trains; taken out again afterwards."""
    found = adapters.add_lora(model, rank=RANK)
    for p in found:
        p.requires_grad_(True)
    yield found
    adapters.unload(model)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_lora_step(model, params, rate, batch_size):
    z = torch.randn(batch_size, 4, PX // 8, PX // 8, device=model.device)
    pictures = torch.rand(batch_size, 3, PX, PX, device=model.device) * 2 - 1
    captions = [f"a histology image of class {i}" for i in range(batch_size)]
    context = backbone.embed(model, captions).detach()
    autocast = torch.bfloat16
    loss = finetuning.loss(model, lambda texts: context)
    player = loop.Player("lora", [{"params": params, "lr": 1e-4}], loss)
    fit = lambda: loop.fit([player], lambda k: {"latents": z, "captions": captions}, STEPS, 0, autocast=autocast)  # noqa: E731

    optimiser = torch.optim.AdamW(params, lr=1e-4)

    def example():
        """The loop of diffusers' LoRA example, without its data loader, which would only slow it."""
        for part in ("vae", "text_encoder"):
            getattr(model, part).to(torch.bfloat16)
        for p in model.unet.parameters():
            if not p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
        for _ in range(STEPS):
            with torch.autocast(model.device.type, torch.bfloat16):
                latent = model.vae.encode(pictures.to(torch.bfloat16)).latent_dist.sample() * model.scaling
                tokens = model.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
                words = model.text_encoder(tokens.to(model.device))[0]
                noise, at = torch.randn_like(latent), torch.randint(1000, (batch_size,), device=model.device)
                out = model.unet(model.scheduler.add_noise(latent, noise, at), at, words).sample
                error = F.mse_loss(out.float(), noise.float())
            error.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            error.item()  # it reports its loss at every step
        for part in (model.vae, model.text_encoder, model.unet):
            part.float()

    def forward_backward():
        at = torch.full((batch_size,), 500, device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            losses.diffusion_loss(model.unet, model.scheduler, z, context, at, torch.randn_like(z)).backward()

    peaks = {}

    def measured(name, work):
        def run():
            peak(model)
            work()
            peaks[name] = peak(model)

        return run

    work = flops(forward_backward)
    seconds = in_turns(histokit=measured("histokit", fit), example=measured("example", example))
    speed = {name: STEPS * batch_size / s for name, s in seconds.items()}
    print(
        f"\nLoRA, {model.name}, {PX} px, bf16, batch {batch_size}: {speed['histokit']:.1f} images/s, peak {peaks['histokit']:.1f} GiB, "
        f"{work * STEPS / seconds['histokit'] / rate:.0%} of the card's {rate / 1e12:.0f} TFLOP/s; diffusers' example loop "
        f"{speed['example']:.1f} images/s, peak {peaks['example']:.1f} GiB: {speed['histokit'] / speed['example']:.2f} x",
        flush=True,
    )


@pytest.mark.parametrize("batch_size", [1, 16])
def test_sampling(model, rate, batch_size, num_inference_steps=2 if SMALL else 25):
    prompts = ["a histology image of a gland"] * batch_size
    context = backbone.embed(model, prompts * 2).detach()
    z = torch.randn(2 * batch_size, 4, PX // 8, PX // 8, device=model.device)

    def whole():
        generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
        sampling.sample(model, prompts, generators, num_inference_steps=num_inference_steps, guidance_scale=7.5, batch=batch_size)

    @torch.no_grad()
    def bare():
        for _ in range(num_inference_steps):
            with model.autocast():
                model.unet(z, 500, context)
        with model.autocast():
            for part in z[:batch_size].split(4):
                model.vae.decode(part)

    work = flops(bare)
    peak(model)
    seconds = in_turns(whole=whole, bare=bare)
    what = f"{model.name}, {PX} px, {num_inference_steps} steps, batch {batch_size}"
    print(
        f"\nsampling, {what}: {batch_size / seconds['whole']:.2f} images/s, {seconds['whole'] / seconds['bare']:.2f} x the bare calls, "
        f"{work / seconds['whole'] / rate:.0%} of the card's rate, peak {peak(model):.1f} GiB",
        flush=True,
    )
