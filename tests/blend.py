"""A stand-in for img2img.previewer: no model, the same noise every time, strength blends the tile into it."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd


class Blend:
    """previewer(strength=, guidance_scale=) over `n` made-up tiles; `calls` lists the settings of every picture begun.

    gate: called before every step as gate(k, n); a test that wants to look at a half-drawn picture blocks there.
    """

    def __init__(self, n=3, px=64, steps=20, gate=None):
        y, x = np.mgrid[:px, :px] / px
        rings = [np.sin((5 + 2 * i) * np.hypot(x - 0.5, y - 0.4 - 0.1 * i) * 3) for i in range(n)]
        self.tiles = np.stack([np.where((ring > 0)[..., None], (225, 185, 205), (150, 80, 140)) for ring in rings]).astype(np.uint8)
        self.noise = np.random.default_rng(0).normal(160, 60, (px, px, 3))
        self.jobs = pd.DataFrame({"tile_id": [f"case_{i}/tile-{i}.png" for i in range(n)], "prompt": "an image of <hk-x>"})
        self.most, self.calls, self.gate = steps, [], gate

    def steps(self, strength, **_):
        return int(self.most * strength)

    def __call__(self, *, strength, guidance_scale, on_step=None):
        self.calls.append({"strength": strength, "guidance_scale": guidance_scale})
        if isinstance(self.gate, FileGate):
            self.gate.begin(self.calls[-1])
        steps = self.steps(strength)
        if strength and not steps:
            raise ValueError(f"{self.most} steps at strength {strength} are no denoising step at all")
        for k in range(1, steps + 1) if on_step else ():
            if self.gate is not None:
                self.gate(k, steps)
            on_step(k, steps, None)
        images = (1 - strength) * self.tiles + strength * (self.noise + 4 * guidance_scale)
        return SimpleNamespace(images=np.uint8(images.clip(0, 255)), sources=self.tiles, true_steps=steps, jobs=self.jobs)

    def sweep(self, strengths, job=0, **others):
        return np.concatenate([self(strength=strength, **others).images[[job]] for strength in strengths])


class FileGate:
    """A gate that is closed while a file is there, and a list of what was begun in another: for a test outside this process."""

    def __init__(self, folder):
        self.closed, self.log = Path(folder) / "closed", Path(folder) / "begun.txt"

    def __call__(self, k, n):
        while self.closed.exists():
            time.sleep(0.01)

    def begin(self, settings):
        with open(self.log, "a") as file:
            print(settings["strength"], file=file)
