"""What a panel shows between two moves of its sliders, and the memory of what it showed."""

import os
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from PIL import Image

from histokit import files

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
