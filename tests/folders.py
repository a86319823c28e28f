"""Small folders of tiles for the data tests, and a run that only knows its folder."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from histokit.tiles import data


def texture(seed, px=32):
    """Random smooth RGB tile [px, px, 3] uint8: different seeds do not correlate."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (px // 4, px // 4, 3), np.uint8))
    return np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC))


def save(path, image, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def encoded(image, kind="PNG", **options):
    """Bytes of a PIL image or an array."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def class_folders(root, classes=("a", "b"), cases=6, tiles=3, px=32, above="", seed=0):
    """root/[above/]CLASS/CASE_TILE.png; returns root."""
    for name in classes:
        for case in range(cases):
            for tile in range(tiles):
                seed += 1
                save(Path(root) / above / name / f"P{case:02d}_{tile}.png", texture(seed, px))
    return Path(root)


def described(root, folder, text="", classes="{a: {}, b: {}}", px=32):
    """Description of `folder` from a YAML file in root/params/datasets."""
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"root: {folder}\nclasses: {classes}\ntile_px: {px}\n{text}", encoding="utf-8")
    return data.describe(path)


class FolderRun:
    """As much of a Run as `data` uses: every step is one folder below the experiment."""

    def __init__(self, root, experiment="exp"):
        self.experiment, self.home = experiment, root / "outputs" / experiment

    def path(self, *names):
        path = self.home.joinpath("00_dataset", *names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def parent(self, step, class_name=None):
        return self.home / step / (class_name or "")

    def base(self, name):
        return name

    def parents(self, step):
        return {"": self.home / step}
