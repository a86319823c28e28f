"""What a panel shows between two moves of its sliders, the memory of what it showed, and a draft of a half-drawn tile."""

import os
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from PIL import Image

from histokit.core import files
from histokit.tiles import data

ROOM_GB = 1.0


@dataclass
class Preview:
    """What a previewer shows: images and their sources uint8 [n, H, W, 3] (sources None for text-to-image), and the true step count."""

    images: np.ndarray
    sources: np.ndarray | None
    true_steps: int
    jobs: pd.DataFrame
    ended: dict = field(default_factory=dict)  # settings it really stands for, where it was ended early


def keep(name, images):
    """Put images uint8 [n, H, W, 3] into the cache of previews, one below the other."""
    path = files.cache("previews") / f"{name}.png"
    if not path.exists():
        files.write_png(path, np.concatenate(list(images)), {"n": str(len(images))})
        files.prune("previews", ROOM_GB, keep=[path])


def kept(name):
    """The images kept under this name, None where there are none."""
    path = files.cache("previews") / f"{name}.png"
    try:
        with Image.open(path) as image:
            found, n = np.array(image), int(image.info["n"])
        os.utime(path)
    except (OSError, KeyError, ValueError):  # not there, or half a file of an older version
        return None
    return found.reshape(n, -1, *found.shape[1:])


def fit_draft(latents, pixels):
    """What `draft` takes: the map [5, 3] (latent channels and one, to colours in [-1, 1]) that is best in least squares.

    Args:
        latents: [N, 4, h, w] of real tiles. pixels: uint8 [N, H, W, 3], the same tiles.
    """
    _, channels, h, w = latents.shape
    colours = torch.nn.functional.adaptive_avg_pool2d(data.to_float(pixels), (h, w))
    x = latents.detach().float().cpu().permute(0, 2, 3, 1).reshape(-1, channels)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    return torch.linalg.lstsq(x, colours.permute(0, 2, 3, 1).reshape(-1, 3), driver="gelsd").solution


def draft(fitted, x0):
    """uint8 [h, w, 3] of one clean latent [4, h, w] as it is predicted at a step, at no cost.

    A decoder takes as long as several denoising steps; one matrix of 5 x 3 numbers takes none, and shows where what will be.
    """
    x = x0.detach().float().cpu().permute(1, 2, 0)
    colours = torch.cat([x, torch.ones(*x.shape[:2], 1)], dim=2) @ fitted
    return np.ascontiguousarray(((colours.clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8).numpy())
