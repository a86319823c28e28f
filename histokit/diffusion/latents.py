"""Latents and text embeddings on disk, so that training touches neither the autoencoder nor the text encoder.

Keyed by content: the tile's bytes, how it was resized, and the weights that encoded it. One small safetensors file
a tile, memory-mapped on reading, so memory stays flat however many tiles there are. Nothing here trains or denoises.
"""

import os

import numpy as np
import torch

from histokit.core import files, machine
from histokit.diffusion import backbone
from histokit.tiles import augment, data, decode

VERSION = 2
SYMMETRIES = len(augment.TURN_FIRST)


class Latents:
    """Mean and log variance of every tile's latents under the 8 symmetries, unscaled, float32 as encoded.

    Args:
        model: `backbone.Model` with a vae; its weights and `tile_px` are part of the key.
        tiles: manifest rows (see `data.load`), in the order in which `batch` numbers them.
        budget_gb: disk the whole latent cache may take; least recently used tiles go first. Where the tiles do not fit,
            nothing is written and `batch` encodes anew each time.
        symmetries: how many of the 8 are used, from 1 (the tile as it is) to 8.

    A tile is encoded alone, and its key knows device and threads: what is read is, to the bit, what this run would have encoded
    itself, whichever run left it there and among whatever other tiles.
    """

    def __init__(self, model, tiles, *, budget_gb=20.0, symmetries=SYMMETRIES, batch_size=8):
        if not 1 <= symmetries <= SYMMETRIES:
            raise ValueError(f"symmetries must be 1 to {SYMMETRIES}, got {symmetries}")
        self.model, self.tiles, self.symmetries = model.need("vae"), tiles.reset_index(drop=True), symmetries
        side = model.tile_px // model.factor
        self.shape = (model.vae.config.latent_channels, side, side)
        size = len(tiles) * symmetries * 2 * int(np.prod(self.shape)) * 4 / 1e9
        self.stored = size <= budget_gb
        if self.stored:
            self.folder = files.cache("latents")
            self.paths = [self._path(row) for row in self.tiles.itertuples()]
            self._fill(batch_size)
            files.prune("latents", budget_gb, keep=self.paths)

    def __len__(self):
        return len(self.tiles)

    def batch(self, rows, symmetries):
        """Mean and log variance [B, 4, h, w] of tile `rows[i]` under symmetry `symmetries[i]`, numbered as in `augment.TURN_FIRST`."""
        if not self.stored:
            images = [_lying(self._images([row])[0], int(k)) for row, k in zip(rows, symmetries, strict=True)]
            return backbone.encode(self.model, torch.stack(images))
        gone = [row for row in dict.fromkeys(map(int, rows)) if not self.paths[row].exists()]
        if gone:  # another job needed the room
            self._encode(gone)
        pairs = [self._read(self.paths[row], int(k)) for row, k in zip(rows, symmetries, strict=True)]
        return tuple(torch.stack(part).to(self.model.device) for part in zip(*pairs, strict=True))

    def sample(self, rows, generator):
        """Scaled latents [B, 4, h, w] of random symmetries of `rows`; every random number comes from `generator` (CPU)."""
        mean, logvar = self.batch(rows, torch.randint(self.symmetries, (len(rows),), generator=generator))
        return backbone.latents(mean, logvar, self.model.scaling, generator)

    def _images(self, rows):
        return data.to_float(data.pixels(self.tiles.iloc[list(rows)], self.model.tile_px))

    def _path(self, row):
        device = self.model.device.type
        arithmetic = [device, machine.threads()] if device == "cpu" else [device]  # threads split a sum, and so round it, otherwise
        made_of = [VERSION, decode.VERSION, self.model.identity["vae"], self.model.tile_px, self.symmetries, arithmetic]
        key = files.digest("latents", row.sha256 or files.sha256(row.path), data.shown(row), made_of)
        return self.folder / key[:2] / f"{key}.safetensors"

    def _fill(self, batch_size):
        missing = []
        for i, path in enumerate(self.paths):
            if path.exists():
                os.utime(path)  # what was used least recently is pruned first
            else:
                missing.append(i)
        for start in range(0, len(missing), batch_size):
            self._encode(missing[start : start + batch_size])

    def _encode(self, rows):
        images = self._images(rows)
        views = torch.stack([_lying(images, k) for k in range(self.symmetries)], dim=1)  # [b, K, 3, H, W]
        encoded = [backbone.encode(self.model, view) for view in views]  # tile by tile: neighbours change no bit
        for row, (mean, logvar) in zip(rows, encoded, strict=True):
            files.write_tensors(self.paths[row], {"mean": mean.float().cpu(), "logvar": logvar.float().cpu()}, {})

    @staticmethod
    def _read(path, k):
        from safetensors import safe_open

        with safe_open(path, "pt") as stored:
            return stored.get_slice("mean")[k], stored.get_slice("logvar")[k]


def _lying(images, k):
    """Images [..., H, W] in the k-th symmetry of this cache, turned first and flipped then."""
    return augment.symmetry(images, augment.TURN_FIRST[k])


class Prompts:
    """Text embeddings [L, D] of prompts, encoded once; for a text encoder that is not being trained.

    Kept on disk by the identity of tokenizer, text encoder and learned tokens, so a recipe encodes a prompt once.
    """

    def __init__(self, model):
        self.model = model.need("tokenizer", "text_encoder")
        rows = backbone.fingerprint(model.text_encoder.get_input_embeddings()) if model.placeholders else ""
        self.key = (model.identity["tokenizer"], model.identity["text_encoder"], model.placeholders, rows, str(model.dtype))
        self.known = {}
        files.prune("prompts", 1.0)

    def __call__(self, prompts):
        """Embeddings [B, L, D] of a list of prompts."""
        return torch.stack([self._one(prompt) for prompt in prompts])

    def _one(self, prompt):
        if prompt not in self.known:
            key = files.digest("prompt", prompt, self.key)
            path = files.cache("prompts") / key[:2] / f"{key}.safetensors"
            if not path.exists():
                with torch.no_grad():
                    embedding = backbone.embed(self.model, [prompt])[0]
                files.write_tensors(path, {"embedding": embedding.cpu().contiguous()}, {"prompt": prompt})
            os.utime(path)
            self.known[prompt] = files.read_tensors(path)["embedding"].to(self.model.device)
        return self.known[prompt]
