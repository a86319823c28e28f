"""Latents of many pictures on disk, in shards: encoded once, read a row at a time, so that memory stays flat however many there are.

For the pre-training of a diffusion model. Few tiles under all 8 symmetries, of which one tile more changes nothing, are in
`diffusion.latents`.
"""

from functools import lru_cache

import numpy as np
import torch

from histokit.core import files, machine, progress
from histokit.training.pretraining import ldm, pictures

VERSION = 1
ROWS = 512  # views of a shard
BUDGET_GB = 20.0
MOST = 8  # views of a picture
LEAST = 0.75  # side of a view over that of its picture, at least
CALIBRATION = 1000  # views that the deviation of the latents is measured on, at least


class LatentShards:
    """Mean and log variance of `views` random views of each picture, unscaled, float16; view v of picture i is row v * N + i.

    Args:
        vae: AutoencoderKL on its device.
        identity: hash of its weights; latents of another autoencoder are never read.
        corpus: `corpus.Corpus`.
        draws: how often the training will ask for a latent; no more views are encoded than that.
        budget_gb: disk that these latents may take. Where one view of each picture does not fit, each source lends as many of its pictures
            as it is drawn, chosen by their hashes; `said` tells.
    """

    def __init__(self, vae, identity, corpus, px, draws, seed=0, budget_gb=BUDGET_GB):
        self.vae, self.px, self.seed = vae, px, files.seed(seed, "views")
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape = (vae.config.latent_channels, px // factor, px // factor)
        room = int(budget_gb * 1e9 / (4 * np.prod(self.shape)))
        self.table, self.images, self.said = corpus.table, corpus.images, []
        if room < len(self.images):
            rows = _lent(self.table, room)
            told = f"{len(rows):,} of {len(self.images):,} pictures are used: their latents fill {budget_gb:g} GB"
            self.said = [f"{told}. `latents_gb` gives them more."]
            self.images, self.table = pictures.Some(self.images, rows), self.table.iloc[rows].reset_index(drop=True)
            self.table["weight"] *= corpus.table.groupby("source")["weight"].sum()[self.table["source"]].to_numpy() / (
                self.table.groupby("source")["weight"].transform("sum").to_numpy()
            )  # a source keeps its share of the draws
        self.views = int(np.clip(min(draws // max(1, len(self.images)), room // max(1, len(self.images))), 1, MOST))
        self.device = next(vae.parameters()).device
        arithmetic = [self.device.type, machine.threads()] if self.device.type == "cpu" else [self.device.type]
        made_of = [VERSION, ldm.VERSION, identity, px, LEAST, ROWS, self.seed, arithmetic]
        self.folder = files.cache("latent_shards") / files.digest(made_of, self.table["pixels_sha256"].tolist(), self.views)
        self._slices = lru_cache(maxsize=256)(self._open)

    def __len__(self):
        return self.views * len(self.images)

    def fill(self, batch_size=16):
        """Encodes what is missing, shard by shard, and shows how far it is; one that is there is whole."""
        shards = -(-len(self) // ROWS)
        missing = [shard for shard in range(shards) if not self._path(shard).is_file()]
        show, clock = progress.Progress(len(missing) * ROWS), progress.Clock([])
        for count, shard in enumerate(missing, start=1):
            self._encode(shard, batch_size)
            show({"step": count * ROWS, **clock.tick(ROWS)}, None)
        if missing:
            show.end(f"{len(missing) * ROWS:,} latents encoded")
        files.prune("latent_shards", 2 * BUDGET_GB, keep=[self._path(shard) for shard in range(shards)])
        return self

    def rows(self, numbers):
        """Mean and log variance [B, C, h, w] float32 on the CPU of rows by number."""
        pairs = [[of[number % ROWS] for of in self._slices(number // ROWS)] for number in map(int, numbers)]
        return tuple(torch.stack(part).float() for part in zip(*pairs, strict=True))

    def sample(self, numbers, scaling, rng):
        """Scaled latents [B, C, h, w] of rows by number; their noise comes from `rng`, a numpy generator."""
        mean, logvar = self.rows(numbers)
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        return (mean + torch.exp(0.5 * logvar) * noise) * scaling

    def deviation(self):
        """(standard deviation of the unscaled latents, how many views it was measured on): `CALIBRATION` or all there are."""
        numbers = np.unique(np.linspace(0, len(self) - 1, min(len(self), CALIBRATION)).astype(int))
        mean, logvar = self.rows(numbers)
        return float((mean.double().var() + logvar.double().exp().mean()).sqrt()), len(numbers)

    def _path(self, shard):
        return self.folder / f"{shard:06d}.safetensors"

    def _open(self, shard):
        from safetensors import safe_open

        if not self._path(shard).is_file():  # another job needed the room
            self._encode(shard, 16)
        opened = safe_open(self._path(shard), "pt")
        return [opened.get_slice(name) for name in ("mean", "logvar")]

    @torch.no_grad()
    def _encode(self, shard, batch_size):
        numbers, means, logvars = range(shard * ROWS, min(len(self), (shard + 1) * ROWS)), [], []
        for start in range(0, len(numbers), batch_size):
            views = [self._view(number) for number in numbers[start : start + batch_size]]
            batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = self.vae.encode(batch.to(self.device)).latent_dist
            means.append(posterior.mean.half().cpu())
            logvars.append(posterior.logvar.half().cpu())
        files.write_tensors(self._path(shard), {"mean": torch.cat(means), "logvar": torch.cat(logvars)})

    def _view(self, number):
        rng = np.random.default_rng(files.seed(self.seed, number))
        return ldm.view(self.images[number % len(self.images)], self.px, rng, least=LEAST)


def _lent(table, room):
    """Rows of `room` pictures at most: of each source its share of the draws, or all it has where that is less, by hash."""
    share, size = table.groupby("source")["weight"].sum(), table.groupby("source").size()
    lent, left = dict.fromkeys(size.index, 0), room
    for name in size.index[np.argsort((size / share).to_numpy(), kind="stable")]:  # the one with fewest for its share first
        rest = share[[other for other in size.index if not lent[other]]].sum()
        lent[name] = min(int(size[name]), int(left * share[name] / rest))
        left -= lent[name]
    order = table.sort_values("pixels_sha256", kind="stable").groupby("source").cumcount().reindex(table.index)
    return np.flatnonzero(order < table["source"].map(lent))


def batches(cache, scaling, batch_size, seed):
    """`batches(k)` of scaled latents {"latents": [B, C, h, w]}: every row once an epoch in an order of its own, see `pictures.order`."""
    of_pictures = cache.table["weight"].to_numpy(float), cache.table["source"].factorize()[0]
    weights, sources = (np.tile(values, cache.views) for values in of_pictures)
    order = lru_cache(maxsize=2)(lambda epoch: pictures.order(weights, sources, seed, epoch))

    def batch(k):
        places = range(k * batch_size, (k + 1) * batch_size)
        numbers = [order(place // len(cache))[place % len(cache)] for place in places]
        return {"latents": cache.sample(numbers, scaling, np.random.default_rng(files.seed(seed, "posterior", k)))}

    return batch
