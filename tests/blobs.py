"""Dark blobs on coloured ground: the ground's colour is the style of a case, the blobs are the layout. And an exact autoencoder."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from histokit import runs
from histokit.core import files
from histokit.diffusion import backbone
from histokit.tiles import data, masks

PX = 32
LAYERS = masks.Layers.of({"ground": 0, "blob": 255})


class PixelVae(nn.Module):
    """Latents are the means of 4 x 4 pixels, three colours; decoding repeats them. Nothing to learn, nothing lost on coarse pictures."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=[1, 1, 1], latent_channels=3, scaling_factor=1.0, sample_size=PX)

    def encode(self, images):
        mean = nn.functional.avg_pool2d(images, 4)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -30.0)))

    def decode(self, z):
        return SimpleNamespace(sample=z.repeat_interleave(4, 2).repeat_interleave(4, 3).clamp(-1, 1))


def model():
    """backbone.Model of that autoencoder and a plain schedule, without a denoiser of its own."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=True)
    return backbone.Model(vae=PixelVae(), scheduler=scheduler, name="pixels", identity={"vae": "pixels"}, tile_px=PX)


def tile(colour, rng):
    """Picture uint8 [PX, PX, 3] and mask [PX, PX] of 0 and 255."""
    mask = np.zeros((PX, PX), np.uint8)
    for _ in range(2):
        top, left = rng.integers(0, PX - 12, 2) // 4 * 4
        mask[top : top + 12, left : left + 12] = 255
    picture = np.where(mask[..., None] > 0, np.array(colour) * 0.35, np.array(colour))
    return (picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8), mask


def study(root, cases=14, tiles=5, annotated=6, seed=0):
    """Manifest, as `data.load` gives it, of cases in colours of their own; the last three are for test, three for validation."""
    rng, rows = np.random.default_rng(seed), []
    for case in range(cases):
        colour = rng.uniform(70, 230, 3)
        split = "test" if case >= cases - 3 else "val" if case >= cases - 6 else "train"
        for k in range(tiles):
            picture, mask = tile(colour, rng)
            name = f"{'ab'[case % 2]}/{case:02d}_{k}.png"
            for folder, pixels in (("", picture), ("masks/", mask)):
                path = root / "tiles" / f"{folder}{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            rows.append({"file_name": name, "label": "ab"[case % 2], "case_id": f"{case:02d}", "split": split, "mask": f"masks/{name}"})
    table = pd.DataFrame(rows).assign(
        tile_id=lambda t: t["file_name"],
        root="data",
        use="labelled",
        source="real",
        patient="",
        slide="",
        group="",
        width=PX,
        height=PX,
        mpp=1.0,
    )
    table["sha256"] = [files.sha256(root / "tiles" / name) for name in table["file_name"]]
    kept = sorted(table.loc[table["split"].eq("train"), "case_id"].unique())[:annotated]
    table["annotated"] = table["split"].ne("train") | table["case_id"].isin(kept)
    held = data.Dataset(
        "blobs", ["a", "b"], {"a": "a", "b": "b"}, {"a": "head", "b": "tail"}, PX, "resize", None, str(root / "tiles"), True, {},
        layers={"ground": 0, "blob": 255},
    )  # fmt: skip
    return data.located(table, held, root / "outputs" / "exp")


def finished(root, experiment="exp", **how):
    """A finished 00_dataset of `study`; returns its manifest."""
    tiles = study(root, **how)
    run = runs.start(experiment=experiment, step="00_dataset")
    held = data.Dataset(
        "blobs", ["a", "b"], {"a": "a", "b": "b"}, {"a": "head", "b": "tail"}, PX, "resize", None, str(root / "tiles"), True, {},
        layers={"ground": 0, "blob": 255},
    )  # fmt: skip
    files.write_json(run.path("dataset.json"), dataclasses.asdict(held))
    run.finish(data.without_memory(tiles))
    return tiles


def made(tiles, step="made", experiment="exp", n=12, right=True):
    """A finished step of made tiles with masks, in colours of their own; with `right` false each has the mask of none."""
    rng, run, rows = np.random.default_rng(7), runs.start(experiment=experiment, step=step), []
    for i in range(n):
        picture, mask = tile(rng.uniform(70, 230, 3), rng)
        mask = mask if right else tile((0, 0, 0), rng)[1]
        for folder, pixels in (("tiles", picture), ("masks", mask // 255)):
            files.write_png(run.path(folder, f"{i}.png"), pixels)
        rows.append({"tile_id": f"{step}/{i}", "file_name": f"tiles/{i}.png", "mask": f"masks/{i}.png", "label": "ab"[i % 2]})
    told = {"root": step, "split": "", "use": "labelled", "case_id": "", "source": "synthetic", "status": "kept", "width": PX, "height": PX}
    source = tiles.loc[tiles["split"].eq("train"), "tile_id"].iloc[0]
    table = pd.DataFrame(rows).assign(**told, sources=json.dumps([source]), mpp=1.0, group="", patient="", slide="")
    table["sha256"] = [files.sha256(run.folder / name) for name in table["file_name"]]
    run.finish(table)
