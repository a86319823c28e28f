"""Representation learning: an encoder from two views of every picture, contrastive or with labels.

This is how `mini-ssl` and `mini-sup` were made. What is a view, `ldm` says; training itself is `loop.fit`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from histokit.core import files
from histokit.training import loop
from histokit.training.pretraining import ldm

VERSION = 2


def jitter(images, rng, strength=0.2):
    """Stain jitter of views [B, px, px, 3] uint8: each colour's optical density times U(1 - s, 1 + s), plus U(-s, s) / 4."""
    density = -np.log((images.astype(np.float32) + 1) / 256)
    gain = rng.uniform(1 - strength, 1 + strength, (len(images), 1, 1, 3)).astype(np.float32)
    shift = rng.uniform(-strength / 4, strength / 4, (len(images), 1, 1, 3)).astype(np.float32)
    return np.clip(256 * np.exp(-(density * gain + shift)) - 1, 0, 255).astype(np.uint8)


def degrade(images, rng, noise=0.06):
    """Views [B, px, px, 3] uint8 as a softer lens and a noisier sensor would show them.

    A mix, U(0, 1), with the 3 x 3 mean, and noise of deviation U(0, `noise`) of the range: what a codec takes from a tile and what a
    sampler leaves on it must not be what an encoder knows a class by.
    """
    soft = ndimage.uniform_filter(images.astype(np.float32), (0, 3, 3, 0), mode="reflect")
    mix = rng.uniform(0, 1, (len(images), 1, 1, 1)).astype(np.float32)
    grain = rng.standard_normal(images.shape, dtype=np.float32) * rng.uniform(0, 255 * noise, (len(images), 1, 1, 1)).astype(np.float32)
    return np.clip(images + mix * (soft - images) + grain, 0, 255).astype(np.uint8)


def view_pairs(images, weights, px, batch_size, seed, labels=None, device="cpu"):
    """`batches(k)` of two independent views of each chosen image, jittered in stain and degraded, and its label where there are any."""
    weights = np.asarray(weights, float) / np.sum(weights)

    def batches(k):
        rng = np.random.default_rng(files.seed(seed, "pairs", k))
        chosen = rng.choice(len(images), batch_size, replace=False, p=weights)
        pair = [degrade(jitter(np.stack([ldm.view(images[i], px, rng) for i in chosen]), rng), rng) for _ in range(2)]
        out = {
            name: (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 127.5 - 1).to(device) for name, v in zip(("a", "b"), pair, strict=True)
        }
        return out | ({} if labels is None else {"labels": torch.as_tensor([labels[i] for i in chosen])})

    return batches


def contrastive_player(encoder, projector, lr=1e-3, temperature=0.2):
    """Each view finds its partner among the others' (NT-Xent, Chen et al. 2020, arXiv:2002.05709, equation 1)."""

    def loss(batch, step, generator):
        z = F.normalize(projector(encoder(torch.cat([batch["a"], batch["b"]]))).float(), dim=-1)  # [2B, D]
        logits = z @ z.T / temperature
        logits.fill_diagonal_(float("-inf"))
        n = len(batch["a"])
        partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(z.device)
        return F.cross_entropy(logits, partner), {"matched": (logits.argmax(-1) == partner).float().mean()}

    return loop.Player("ssl", [{"params": [*encoder.parameters(), *projector.parameters()], "lr": lr}], loss, encoder.buffers())


def supervised_player(encoder, head, lr=1e-3, smoothing=0.1):
    """Cross-entropy on the labels of both views."""

    def loss(batch, step, generator):
        logits = head(encoder(torch.cat([batch["a"], batch["b"]])))
        labels = batch["labels"].to(logits.device).repeat(2)
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), {
            "accuracy": (logits.argmax(-1) == labels).float().mean()
        }

    return loop.Player("sup", [{"params": [*encoder.parameters(), *head.parameters()], "lr": lr}], loss, encoder.buffers())
