"""Guided generation at Stable Diffusion 1.5's size on a GPU, random weights, 512 px, bfloat16, against the plain second definition.

    make bench                                                     # with a GPU, whole, about ten minutes
    python -m pytest tests/benchmarks/bench_guidance_gpu.py -s     # this alone

The plain side works as the paper did: one image, float32, the UNet's own block checkpointing. Without a GPU all of it is skipped;
HISTOKIT_BENCH_SMALL=1 runs it on the CPU at toy size, to check the bench and to measure nothing.
"""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from bench_generator import clock
from bench_gpu import SMALL, flops, model, peak, rate  # noqa: F401  (fixtures)

from histokit.generate import guidance, guides
from histokit.vision import classifiers, encoders

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain_guidance

pytestmark = [] if SMALL else [pytest.mark.gpu]
STEPS, FEW, MANY = (4, 1, 1) if SMALL else (20, 4, 20)  # denoising steps; updates of the sweep, and of the pair that is compared
CLASSES, PROMPT, CAP = ["a", "b", "c"], "a histology image of a gland", 22  # GiB
HOW = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "lr": 0.01, "latent_lr": 1e-3}


@pytest.fixture(scope="module")
def classifier(model):  # noqa: F811
    """A ResNet-50 of random weights, as the paper's guide but for what it knows."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None)
    net.fc = torch.nn.Identity()
    eye = encoders.Encoder("resnet50", net.eval().to(model.device), 2048, {"resnet50": "random"}, size=256, device=model.device)
    found = classifiers.Classifier(eye, CLASSES, tile_px=model.tile_px, fit="resize").to(model.device)
    torch.nn.init.normal_(found.head.out.weight, std=0.3)
    return found


def ours(model, classifier, images, updates, **changes):  # noqa: F811
    """Seconds an image, peak GiB, and the final confidences."""
    guide, found = guides.Pictures(classifier, CLASSES), []
    settings = guides.Settings.of(HOW | {"confidence": 0.0, "updates": updates} | changes)
    queues = [[guidance.Job(PROMPT, 1, seed)] for seed in range(images)]
    peak(model)
    seconds = clock(lambda: found.extend(guidance.optimise(model, guide, queues, settings)))
    return seconds / images, peak(model), [result.path[-1]["confidence"] for result in found]


def plain(model, classifier, updates, autocast):  # noqa: F811
    """The same for one image of the plain definition."""
    model.unet.enable_gradient_checkpointing()
    model.unet.train()  # nothing in it drops or counts; block checkpointing asks for the mode
    found = []

    def looks(image):
        with torch.autocast(model.device.type, enabled=False):
            return classifier(image.float())

    def work():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            found.append(plain_guidance.optimise(model, looks, PROMPT, 1, 0, confidence=0.0, updates=updates, **HOW)[1])

    peak(model)
    seconds, memory = clock(work), peak(model)
    model.unet.disable_gradient_checkpointing()
    model.unet.eval()
    return seconds, memory, found[0][-1:]


def test_against_the_plain_definition(model, classifier, batch=1 if SMALL else 8):  # noqa: F811
    ours(model, classifier, batch, 1)  # warm
    fast, slow, half = ours(model, classifier, batch, MANY), plain(model, classifier, MANY, False), plain(model, classifier, MANY, True)
    faster, smaller = slow[0] / fast[0], fast[1] / batch / slow[1]
    print(
        f"\nguided generation, {model.name}, {model.tile_px} px, {STEPS} steps, {MANY} updates, bf16, batch {batch}: "
        f"{3600 / fast[0]:.0f} images an hour, {faster:.1f} x the plain one in float32 (bar 10), {half[0] / fast[0]:.1f} x in bf16; "
        f"{fast[1] / batch:.1f} GiB an image, {smaller:.2f} of the plain one's {slow[1]:.1f} (bar 0.25; weights are in both); "
        f"last confidences {min(fast[2]):.3f} to {max(fast[2]):.3f}, plain {slow[2][0]:.3f}",
        flush=True,
    )
    if not SMALL:
        assert faster >= 10 and smaller <= 0.25


@pytest.mark.parametrize("batch", [1] if SMALL else [1, 2, 4, 8, 16])
def test_batch_sizes(model, classifier, rate, batch):  # noqa: F811
    work = flops(lambda: ours(model, classifier, batch, FEW))
    seconds, memory, _ = ours(model, classifier, batch, FEW)
    print(
        f"\nguided generation, {FEW} updates, batch {batch}: {3600 / seconds:.0f} images an hour, peak {memory:.1f} GiB, "
        f"{work / (seconds * batch) / rate:.0%} of the card's {rate / 1e12:.0f} TFLOP/s",
        flush=True,
    )


@pytest.mark.parametrize("changes", [{"last_steps": 3}, {"checkpoint": False}, {"compile": True}], ids=str)
def test_variants(model, classifier, changes, batch=1 if SMALL else 4):  # noqa: F811
    if SMALL and "compile" in changes:
        pytest.skip("compiling takes minutes on a CPU and measures nothing there")
    whole = ours(model, classifier, batch, FEW)
    ours(model, classifier, batch, FEW, **changes)  # warm: compiling is paid once a run
    seconds, memory, _ = ours(model, classifier, batch, FEW, **changes)
    print(f"\nguided generation, {FEW} updates, batch {batch}, {changes}: {whole[0] / seconds:.2f} x, peak {memory:.1f} GiB", flush=True)


def test_on_a_card_of_22_gib(model, classifier, batch=1 if SMALL else 4):  # noqa: F811
    if not SMALL:
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * 2**30 / torch.cuda.get_device_properties(0).total_memory))
    try:
        seconds, memory, _ = ours(model, classifier, batch, FEW)
    finally:
        if not SMALL:
            torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"\nguided generation under {CAP} GiB, batch {batch}: {3600 / seconds:.0f} images an hour, peak {memory:.1f} GiB", flush=True)
