"""Held-out pictures of a corpus: what every part of a pre-training is validated on, and the sheets it is looked at by."""

from pathlib import Path

import numpy as np
import torch

from histokit.core import files
from histokit.diffusion import backbone, losses
from histokit.training.pretraining import ldm

VERSION = 2
PER_SOURCE = 48  # pictures of each source that one validation looks at


def whole(corpus, tile_px, rows):
    """Pictures `rows` of a corpus, whole and upright: [N, 3, px, px] in [-1, 1]."""
    upright = np.random.default_rng(0)
    views = [ldm.view(corpus.images[i], tile_px, upright, least=1, turn=False) for i in rows]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 127.5 - 1


def spread(count, limit):
    """Up to `limit` evenly spread indices below `count`."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int))


def whole_tiles(corpus, tile_px, limit):
    """`whole` pictures of up to `limit` evenly spread rows, and the rows."""
    rows = spread(len(corpus.images), limit)
    return whole(corpus, tile_px, rows), rows


class BySource:
    """A few pictures of each source, and what is measured on them, source by source.

    Attributes:
        images: [N, 3, px, px] in [-1, 1]; `rows`: [N], their indices in the corpus; `names`: [N], their sources.
        share: {source: its share of the draws}.
    """

    def __init__(self, corpus, tile_px, per_source=PER_SOURCE):
        names = np.array([Path(name).stem for name in corpus.table["source"]])
        self.share = {name: float(np.sum(corpus.weights[names == name])) for name in dict.fromkeys(names.tolist())}
        own = [np.flatnonzero(names == name) for name in self.share]
        self.rows = np.concatenate([part[spread(len(part), per_source)] for part in own])
        self.names, self.images = names[self.rows], whole(corpus, tile_px, self.rows)

    def mean(self, values):
        """Mean of values [N], sources weighted as they are drawn, and {"val_<source>": mean of its own}: what `loop.fit` takes."""
        of = {name: float(values[torch.from_numpy(self.names == name)].mean()) for name in self.share}
        return sum(self.share[name] * of[name] for name in of), {f"val_{name}": value for name, value in of.items()}


def denoising_error(model, held, context, seed):
    """`validate()` for `loop.fit`: squared denoising error of held-out pictures, noise and timesteps fixed, source by source.

    Args:
        held: corpus.Corpus.
        context: `context(rows)` -> embeddings [B, L, D] of pictures `rows` [B] of the corpus, or None for a UNet without text.
    """
    few = BySource(held, model.tile_px)
    z = torch.cat([backbone.encode(model, x)[0] for x in few.images.split(16)]) * model.scaling
    timesteps, noise = losses.fixed_noise(len(z), z.shape[1:], model.scheduler, seed)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(files.seed(seed, "levels")))
    timesteps, noise = timesteps[order].to(z.device), noise.to(z.device)  # or each source would meet a share of the schedule

    def validate():
        errors = [
            losses.diffusion_errors(model.unet, model.scheduler, z[part], context(few.rows[part.numpy()]), timesteps[part], noise[part])
            for part in torch.arange(len(z)).split(32)
        ]
        return few.mean(torch.cat(errors).cpu())

    return validate


def tiled(images, columns):
    """Images [N, 3, H, W] in [-1, 1] as one uint8 picture of `columns` columns; the last row is filled with white."""
    count = -(-len(images) // columns) * columns
    images = torch.cat([images, torch.ones(count - len(images), *images.shape[1:])])
    rows = [torch.cat(list(images[i : i + columns]), dim=-1) for i in range(0, count, columns)]
    return ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
