"""LPIPS diversity: how unlike each other the tiles of one class look to a network of photographs. Optional, its weights are the user's.

Zhang et al. (2018), arXiv:1801.03924: distances of normalised activations, weighted by people's judgements. The heads come with the package
`lpips`, the backbone is a file, because nothing is downloaded here. Higher is more diverse; only comparable at one tile size and one file.
"""

import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histokit.core import files
from histokit.tiles import data

VERSION = 1
PAIRS = 500  # of tiles of a class, seeded
LEAST = 10  # tiles a side
REPEATS = 0.5  # of the diversity of as many real tiles, below which a set repeats itself
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('alexnet-owt-7be5be79.pth', weights_only=True), 'alexnet.safetensors')\""
)
SHAPES = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}  # of the first convolution
SHOWN = "class synthetic real n lpips lpips_real".split()


def load(weights, device="cpu", slopes=False):
    """`distance(x, y)` -> LPIPS [B] of images [B, 3, H, W] in [-1, 1], at least 32 px.

    Args:
        weights: safetensors file of torchvision's AlexNet or VGG16, keys `features.0.weight` and so on.
        slopes: with gradients, and on `device`; else without, on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is neither; both say how to make one.
    """
    import lpips

    path = files.root() / weights
    if not path.is_file() or path.suffix != ".safetensors":
        raise FileNotFoundError(f"LPIPS weights {weights} are no safetensors file; torchvision's AlexNet becomes one by\n    {CONVERT}")
    given = {name.removeprefix("features."): value for name, value in files.read_tensors(path).items() if name.startswith("features.")}
    net = SHAPES.get(tuple(given["0.weight"].shape)) if "0.weight" in given else None
    if net is None:
        raise ValueError(f"{Path(weights).name} holds neither torchvision's AlexNet nor its VGG16; AlexNet comes by\n    {CONVERT}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # of how lpips asks it for a network
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # random until the next lines: it would be downloaded otherwise
    for name, held in model.net.named_parameters():  # slice2.3.weight is features.3.weight
        value = given.get(name.split(".", 1)[1])
        if value is None or value.shape != held.shape:
            raise ValueError(f"{Path(weights).name}: {name.split('.', 1)[1]} of {net} is missing or of another shape")
        held.data.copy_(value)
    model = model.eval().requires_grad_(False).to(device)

    def distance(x, y):
        with torch.set_grad_enabled(slopes and torch.is_grad_enabled()):
            found = model(x.to(device), y.to(device)).flatten()
        return found if slopes else found.cpu()

    return distance


def diversity(distance, pixels, most=PAIRS, seed=0, batch=32):
    """Mean LPIPS over unordered pairs of different tiles uint8 [N, H, W, 3], `most` of them; 0 where all are one picture, NaN below two."""
    pairs = list(combinations(range(len(pixels)), 2))
    if not pairs:
        return float("nan")
    chosen = np.array(pairs)[np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])]
    images = data.to_float(pixels)
    parts = [distance(images[i], images[j]) for i, j in (chosen[k : k + batch].T for k in range(0, len(chosen), batch))]
    return float(torch.cat(parts).mean())


def beside_real(weights, real, synthetic, classes, device="cpu", *, most=60, seed=0):
    """LPIPS diversity of each class beside that of as many held-out real ones, spread over their cases.

    Args:
        weights: see `load`; "" asks nothing.
        real, synthetic: manifests with paths. most: tiles a side.

    Returns:
        DataFrame with the columns SHOWN, NaN below ten tiles a side.
    """
    from histokit.tiles import splits

    if not weights:
        return pd.DataFrame(columns=SHOWN)
    distance, rows = load(weights, device), []
    held = real[real["split"].isin(["val", "test"])]
    for name in classes:
        ours, theirs = synthetic[synthetic["label"].eq(name)], held[held["label"].eq(name)]
        n = min(most, len(ours), len(theirs))
        row = dict.fromkeys(SHOWN, np.nan) | {"class": name, "synthetic": len(ours), "real": len(theirs), "n": n}
        if n >= LEAST:
            px = int(ours["tile_px"].iloc[0])
            sets = ours.sample(n, random_state=seed), splits.spread(theirs, n, seed)
            row["lpips"], row["lpips_real"] = (diversity(distance, data.pixels(tiles, px), seed=seed) for tiles in sets)
        rows.append(row)
    return pd.DataFrame(rows, columns=SHOWN)


def table(found):
    """The rows of `beside_real` for reading."""
    text = {name: [f"{value:.3f}" if value == value else "n too small to say" for value in found[name]] for name in ("lpips", "lpips_real")}
    return found[["class", "n"]].assign(**{"LPIPS diversity": text["lpips"], "of real tiles": text["lpips_real"]})


def remarks(found):
    """Classes whose synthetic tiles look much more alike than real ones do, in sentences."""
    for row in found.to_dict("records"):
        if row["lpips"] < REPEATS * row["lpips_real"]:
            beside = f"{row['lpips']:.3f}, of real tiles {row['lpips_real']:.3f}"
            yield f"{row['class']}: the synthetic tiles look alike: LPIPS diversity {beside}."
