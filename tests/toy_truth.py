"""Which class a tile shows, said by a network that has seen thousands of freshly drawn toy tiles of all eight classes.

For developers alone: no notebook asks it, since on real tissue nobody has it. It is trained once and cached; on toy's own test
split it must be right nearly always, or it says nothing.
"""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from histokit import toy
from histokit.core import files
from histokit.toy import dataset

NAMES = list(toy.CLASSES)
CASES, TILES, EPOCHS, BATCH, RATE, SEED = 84, 420, 12, 48, 3e-3, 20_000  # tiles a class; the seed is no experiment's


def _draw(job):
    name, i = job
    return toy.tile(name, f"truth {i % CASES}", i, 128, SEED)[0]


def tiles(count=TILES):
    """Freshly drawn tiles uint8 [8 x count, 128, 128, 3] of all classes and their class [8 x count]."""
    jobs = [(name, i) for name in NAMES for i in range(count)]
    with ProcessPoolExecutor() as pool:
        images = np.stack(list(pool.map(_draw, jobs, chunksize=32)))
    return images, np.repeat(np.arange(len(NAMES)), count)


class Network(nn.Sequential):
    """Six convolutions and a linear answer; nothing of it is shared with the kit's encoders. Takes [B, 3, H, W] in [0, 1]."""

    def __init__(self):
        widths = (3, 24, 32, 64, 96, 128, 160)
        layers = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(a, b, 3, 2 if i < 5 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(NAMES)))


def seen(images, generator):
    """Views of images [B, 3, H, W] in [0, 1]: a symmetry, other light, blur (mix 0 to 1 of a 3 x 3 mean), noise (sd 0 to 0.06)."""
    n, draw = len(images), lambda *shape: torch.rand(shape, generator=generator)
    k = int(draw(1) * 8)
    images = torch.rot90(images.flip(-1) if k > 3 else images, k % 4, (-2, -1))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    images = torch.lerp(images, blurred, draw(n, 1, 1, 1))
    light = images.clamp_min(1 / 255) ** (0.8 + 0.4 * draw(n, 3, 1, 1)) * (0.9 + 0.2 * draw(n, 1, 1, 1))
    return (light + 0.06 * draw(n, 1, 1, 1) * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def network(cache):
    """The trained network in eval mode, from `cache` (a folder) where it is there already."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path, net = Path(cache) / f"toy-truth-{dataset.PIXELS}-{code}.safetensors", Network()
    if not path.exists():
        _train(net)
        files.write_tensors(path, net.state_dict())
    net.load_state_dict(files.read_tensors(path))
    return net.eval()


def _train(net):
    pixels, classes = tiles()
    images, classes = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(classes)
    generator, steps = torch.Generator().manual_seed(SEED), EPOCHS * (len(images) // BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps)
    net.train()
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[(step * BATCH) % (len(images) // BATCH * BATCH) :][:BATCH]
        loss = F.cross_entropy(net(seen(images[rows].float() / 255, generator)), classes[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.inference_mode()
def answers(net, pixels):
    """The class [N] (str) that the network sees in tiles uint8 [N, H, W, 3]."""
    parts = [
        net(torch.from_numpy(np.ascontiguousarray(p)).permute(0, 3, 1, 2).float() / 255)
        for p in np.array_split(pixels, -(-len(pixels) // 64))
    ]
    return np.array(NAMES)[torch.cat(parts).argmax(1).numpy()]
