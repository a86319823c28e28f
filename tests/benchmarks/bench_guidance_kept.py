"""What a guided tile costs that an independent judge keeps: ways to steer mini, against the plain second definition, in one run.

    histokit run params/logex_mini.yaml                            # its guide, judge and adapter; the bench is skipped without them
    python -m pytest tests/benchmarks/bench_guidance_kept.py -s -o python_files='bench_*.py' --timeout=0

Updates and the stop are the paper's; its loss stands still where a class is improbable, hence log_conf, and the learning rate is one at
which twenty updates convince the guide. Every way makes the same seeds, in a process and on two threads of its own; the second definition
does all updates of each, and the picture the guide likes best is taken. Kept is what 05_select would keep, its judge asked.
HISTOKIT_BENCH_TILES is the number of tiles of each class; with 12, the whole takes 35 minutes on two cores.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from histokit.diffusion import adapters, backbone
from histokit.generate import guidance, guided, guides, policies
from histokit.runs import places, recipe
from histokit.show.panel import preview_scores
from histokit.tiles import data

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain_guidance

ROOT = Path(__file__).resolve().parents[2]  # where the recipe was run, not the empty root of a test
RECIPE, TILES, AGAIN = "params/logex_mini.yaml", int(os.environ.get("HISTOKIT_BENCH_TILES", 12)), 2000
HOW = {"guidance_scale": 3.0, "num_inference_steps": 10, "updates": 20, "confidence": 0.4, "loss": "log_conf", "lr": 0.1}
WAYS = {  # what each changes in it
    "plain second definition": None,
    "early stop": {},
    "last 5 of 10 steps": {"confidence": 0.0, "last_steps": 5},
    "3 updates": {"updates": 3, "confidence": 0.0},
    "8 drawn, early stop": {"candidates": 8},
    "plain samples": {"updates": 0, "confidence": 0.0},
}


def finished():
    """What stands for the Run of 04_guided: the finished steps of the recipe that it reads; None where one is missing."""
    read = recipe.read(ROOT / RECIPE)
    run = SimpleNamespace(experiment=read.experiment, recipe=RECIPE, step="04_guided", class_name="", device=torch.device("cpu"))
    run.parent = lambda step, class_name="": places.find(run.experiment, step, class_name)
    run.parents = lambda step: places.find_all(run.experiment, step)
    run.asked = recipe.parameters(read, read.steps["04_guided"])
    return run if all(run.parents(step) for step in ("00_dataset", "guide", "judge", "02_lora")) else None


def make(way):
    """{seconds, for all tiles; kept, one truth value for each} of one way."""
    run = finished()
    tiles, dataset, asked = data.load(run), data.dataset(run), run.asked
    guide = guided.load_guide(run, asked["classifier"], dataset.classes)
    model = backbone.load("mini", run.device, tiles=tiles)
    adapters.load(model, run.parent("02_lora", "all"), tiles=tiles, dataset=dataset.name)
    terms = {name: dataset.terms[name] for name in dataset.tail}
    how = {name: HOW[name] for name in ("guidance_scale", "num_inference_steps")}
    table = policies.job_table(model, tiles, terms, TILES, policy="none", prompt=asked["prompt"], seed=asked["seed"], **how)
    rows = enumerate(zip(table["prompt"], table["class"], table["seed"], strict=True))
    jobs = [guidance.Job(prompt, guide.label(name), int(seed), i) for i, (prompt, name, seed) in rows]
    start = time.perf_counter()
    images = plainly(model, guide, jobs) if WAYS[way] is None else ours(model, guide, jobs, WAYS[way])
    seconds = time.perf_counter() - start
    said = preview_scores.Readings(run, tiles, guide).table([images[job.name] for job in jobs], table)
    assert said["judge"].notna().all(), "the judge of the recipe was not asked"
    return {"seconds": seconds, "kept": said["status"].eq("kept").tolist()}


def ours(model, guide, jobs, changes):
    batch = guidance.batch_size(model)
    queues = [jobs[k :: 2 * batch] for k in range(2 * batch)]  # a batch on each core
    found = guidance.optimise(model, guide, queues, guides.Settings.of(HOW | changes), batch=batch)
    return {result.job.name: result.image for result in found}


def plainly(model, guide, jobs):
    """The same of the second definition, which never stops early; of its pictures the one the guide finds likeliest."""
    images = {}
    for job in jobs:
        pictures, path, _ = plain_guidance.optimise(model, guide, job.prompt, job.target, job.seed, **HOW | {"confidence": 0})
        images[job.name] = ((pictures[int(np.argmax(path))] / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return images


def side(way):
    env = {**os.environ, "HISTOKIT_ROOT": str(ROOT), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, __file__, way], cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def dearer(one, other):
    """How many times as long a kept tile of `one` takes, with a 95 % interval over the seeds, redrawn for both alike."""
    draws = np.random.default_rng(0).integers(len(one["kept"]), size=(AGAIN, len(one["kept"])))
    kept, others = (np.array(found["kept"], float) for found in (one, other))
    with np.errstate(divide="ignore", invalid="ignore"):
        times = one["seconds"] / other["seconds"] * others[draws].sum(axis=1) / kept[draws].sum(axis=1)
        return one["seconds"] / other["seconds"] * others.sum() / kept.sum(), np.nanquantile(times, [0.025, 0.975])


def test_what_a_kept_tile_costs(monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(ROOT))
    if finished() is None:
        pytest.skip(f"`histokit run {RECIPE}` first; its guide, judge and adapter are not there")
    found = {way: side(way) for way in WAYS}
    plain = found["plain second definition"]
    print(f"\nguided tiles of {RECIPE}, {TILES} of each class; x: times cheaper than the plain second definition (bar 3 for a kept one)")
    for way, one in found.items():
        n, kept = len(one["kept"]), sum(one["kept"])
        cheaper, (low, high) = dearer(plain, one)
        print(
            f"{way:26s} {one['seconds'] / n:6.1f} s a tile, {plain['seconds'] / one['seconds']:5.1f} x; {kept:2d} of {n} kept, "
            f"{one['seconds'] / kept if kept else float('inf'):6.1f} s a kept one, {cheaper:5.1f} x [{low:.1f} to {high:.1f}]",
            flush=True,
        )
    assert dearer(plain, found["8 drawn, early stop"])[0] >= 3  # early stop by itself falls short of it, truncation more so


if __name__ == "__main__":
    print(json.dumps(make(sys.argv[1])))
