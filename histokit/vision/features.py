"""Features of tiles, computed once per content.

The cache is keyed by what a feature depends on: the bytes of the tile, the way it was resized and turned, and the
encoder's identity. A second reader waits for nothing, and 130,000 tiles stay within flat memory.
"""

import os
import tempfile

import numpy as np
import torch

from histokit.core import files
from histokit.tiles import augment as augmentation
from histokit.tiles import data, decode
from histokit.vision.encoders import Encoder, SmallCNN, load, source, weights

__all__ = ["VIEWS", "Encoder", "SmallCNN", "embed", "load", "of_step", "source", "stacked", "weights"]

VERSION = 2
IN_MEMORY = 2**29  # bytes above which features live in a file
BUDGET_GB = 20.0  # disk that the cache may take; what was used least recently goes first
VIEWS = {"none": 1, "symmetries": 8, "stain": 8}  # how many views of a tile an augmentation has


def embed(encoder, tiles, run=None, *, tile_px=None, fit=None, augment="none", codec=None):
    """Features of tiles, from the cache where it has them.

    Args:
        encoder: `Encoder`.
        tiles: manifest rows as `data.load` returns them; `sha256` is taken from the file where it is empty.
        run: where tiles have no columns tile_px and fit, its dataset gives them.
        augment: "none", "symmetries" (the 8 flips and rotations) or "stain" (the same, each with its own fixed stain jitter).
        codec: optional function on uint8 [B, H, W, 3] with a dict `identity`, such as a VAE round trip, applied first; where it has
            `reads_px`, tiles are read that wide.

    Returns:
        float32 [N, dim] for "none", else [N, 8, dim]; above half a gigabyte it lives in a file.
    """
    if augment not in VIEWS:
        raise ValueError(f"augment is {augment!r}; expected one of {', '.join(VIEWS)}")
    if tile_px is None and "tile_px" in tiles and len(tiles):
        tile_px, fit = int(tiles["tile_px"].iloc[0]), tiles["fit"].iloc[0]
    elif tile_px is None and run is not None:
        dataset = data.dataset(run)
        tile_px, fit = dataset.tile_px, dataset.fit
    read_px = getattr(codec, "reads_px", tile_px)
    made_of = [VERSION, decode.VERSION, encoder.identity, tile_px, fit, augment, augmentation.VERSION, codec.identity if codec else None]
    folder = files.cache("features") / files.digest(*made_of)[:24]
    keys = [_key(row, fit) for row in tiles.itertuples()]
    known = _index(folder)
    missing = {key: position for position, key in enumerate(keys) if key not in known}
    if missing:
        _compute(folder, missing, lambda rows: data.pixels(tiles.iloc[rows], read_px, fit), encoder, augment, codec)
        files.prune("features", BUDGET_GB, keep=list(folder.glob("*.safetensors")))
        known = _index(folder)
    out = _gather(known, keys, (len(keys), VIEWS[augment], encoder.dim))
    return out[:, 0] if augment == "none" else out


def of_step(run, name):
    """The encoder's name where `name` is a finished 20_pretrain step of this experiment: `cnn@` and its file; else the name itself.

    Raises ValueError for a step that trained no encoder.
    """
    place = run.base(name)
    if place == name:
        return name
    found = sorted((files.root() / place).glob("s[su][lp].safetensors"))
    if not found:
        raise ValueError(f"encoder {name!r} is a step that trained no encoder; name one with part: encoder")
    return f"cnn@{place}/{found[0].name}"


class Frozen:
    """`frozen(rows)` -> features [N, D] float of manifest rows, by an encoder that learns nothing; from the cache where it has them."""

    def __init__(self, name, device):
        self.encoder = load(name, device)
        self.identity, self.dim = files.digest(self.encoder.identity)[:16], self.encoder.dim

    def __call__(self, rows):
        return np.asarray(embed(self.encoder, rows))


def frozen(name, run):
    """The Frozen of this name, a record of its weights in the run's inputs; None for ""."""
    if not name:
        return None
    if place := source(name):
        run.input(place)
    return Frozen(name, run.device)


def scaling(feats):
    """The map of features [..., D] that gives these [N, D] mean 0 and deviation 1; a few strong ones make all tiles look alike."""
    mean, std = np.mean(feats, axis=0), np.std(feats, axis=0)
    weight = np.divide(1, std, out=np.zeros_like(std), where=std > 0.01 * np.median(std) + 1e-9)  # one that never changes says nothing
    return lambda feats: (feats - mean) * weight


def _key(row, fit):
    sha = row.sha256 if isinstance(row.sha256, str) and len(row.sha256) == 64 else files.sha256(row.path)
    ignored = [] if getattr(row, "profile", True) else ["profile ignored"]
    scale = [str(row.mpp)] if str(fit).startswith("resample") else []
    return files.digest(sha, *scale, *ignored) if scale or ignored else sha


def _index(folder):
    """{key: (shard, row)} of everything cached in a folder; a shard that cannot be read is dropped, to be made again."""
    from safetensors import SafetensorError, safe_open

    known = {}
    for shard in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(shard, "np") as held:
                keys = held.get_tensor("keys")
        except (OSError, SafetensorError):
            shard.unlink(missing_ok=True)
            continue
        known.update({key.tobytes().hex(): (shard, row) for row, key in enumerate(keys)})
    return known


def _compute(folder, missing, read, encoder, augment, codec):
    views = VIEWS[augment]
    per_shard = max(64, min(4096, 2**26 // (views * encoder.dim * 4)))  # at most 64 MB a shard; an interrupted run loses one
    per_batch = 16 if encoder.device == "cpu" else 128
    keys, rows = list(missing), list(missing.values())
    for start in range(0, len(keys), per_shard):
        shard_keys, parts = keys[start : start + per_shard], []
        for i in range(start, start + len(shard_keys), per_batch):
            stop = min(i + per_batch, start + len(shard_keys))
            pixels = read(rows[i:stop])
            pixels = codec(pixels) if codec else pixels
            parts.append(torch.stack([_view(encoder, pixels, keys[i:stop], augment, k, per_batch) for k in range(views)], dim=1))
        raw = np.stack([np.frombuffer(bytes.fromhex(key), np.uint8) for key in shard_keys])
        tensors = {"keys": torch.from_numpy(raw), "features": torch.cat(parts)}
        files.write_tensors(folder / f"{files.digest(shard_keys)[:24]}.safetensors", tensors, {"encoder": encoder.name, "augment": augment})


def _view(encoder, pixels, keys, augment, k, per_batch):
    """Features [n, dim] of view k, always computed `per_batch` at a time, so that its neighbours never change a tile's bits."""
    images = torch.as_tensor(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    if augment == "stain":
        seeds = [torch.Generator().manual_seed(files.seed("stain", key, k)) for key in keys]
        images = torch.cat([augmentation.stain_jitter(image[None] / 255, g) for image, g in zip(images, seeds, strict=True)])
        images = (images * 255).round().to(torch.uint8)
    images = augmentation.symmetry(images, k)
    padded = torch.cat([images, images[-1:].expand(per_batch - len(images), *images.shape[1:])])
    return encoder(padded.permute(0, 2, 3, 1).numpy())[: len(images)]


def stacked(parts):
    """Feature arrays one below the other, as large ones are kept: in a file."""
    out, start = _room((sum(map(len, parts)), *parts[0].shape[1:])), 0
    for part in parts:
        out[start : start + len(part)] = part
        start += len(part)
    return out


def _room(shape):
    if np.prod(shape) * 4 <= IN_MEMORY:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=files.cache("features")) as scratch:
        return np.memmap(scratch, np.float32, "w+", shape=shape)


def _gather(known, keys, shape):
    from safetensors import safe_open

    out = _room(shape)
    wanted = {}
    for position, key in enumerate(keys):
        shard, row = known[key]
        wanted.setdefault(shard, []).append((position, row))
    for shard, pairs in wanted.items():
        os.utime(shard)  # what was used least recently is pruned first
        positions, rows = np.array(pairs).T
        with safe_open(shard, "pt") as held:
            out[positions] = held.get_tensor("features")[torch.from_numpy(rows)].numpy()
    return out
