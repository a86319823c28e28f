"""Which made tiles show their class, said by a network that has seen thousands of true toy tiles: of mini's samples, and of an experiment.

    histokit run params/demo.yaml                                  # or another recipe on toy; its part is skipped without it
    python -m pytest tests/benchmarks/bench_truth.py -s -o python_files='bench_*.py' --timeout=0

HISTOKIT_EXPERIMENT names the experiment (demo), HISTOKIT_BASE the base whose samples are drawn (mini), HISTOKIT_BENCH_TILES the
samples of each class (16). The network is trained once, in five minutes.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from histokit import toy
from histokit.core import files
from histokit.diffusion import backbone, sampling
from histokit.metrics import stats
from histokit.runs import places
from histokit.tiles import data
from histokit.toy import words

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_truth

ROOT = Path(__file__).resolve().parents[2]  # where the recipe was run, not the empty root of a test
EXPERIMENT, BASE = os.environ.get("HISTOKIT_EXPERIMENT", "demo"), os.environ.get("HISTOKIT_BASE", "mini")
TILES, GUIDANCE = int(os.environ.get("HISTOKIT_BENCH_TILES", 16)), (1.0, 2.0)


@pytest.fixture
def network(monkeypatch):
    """The independent network, cached beside the outputs of the clone; right nearly always on toy's own test split."""
    monkeypatch.setenv("HISTOKIT_ROOT", str(ROOT))
    net = toy_truth.network(files.cache("toy-truth"))
    plan = toy.plan().query("split == 'test'").groupby("label").head(18).rename(columns={"index": "number"})
    pixels = np.stack([toy.tile(row.label, row.case_id, row.number)[0] for row in plan.itertuples()])
    right = toy_truth.answers(net, pixels) == plan["label"].to_numpy()
    balanced = pd.Series(right).groupby(plan["label"].to_numpy()).mean().mean()
    print(f"\nthe network on {len(plan)} tiles of toy's test split: balanced accuracy {balanced:.3f}")
    assert balanced > 0.95, "a judge that errs is none"
    return net


def share(shown):
    """`0.83 [0.66 to 0.93] of 30`: a share with its 95 % interval of Wilson."""
    low, high = stats.wilson(int(np.sum(shown)), len(shown))
    return f"{np.mean(shown):.2f} [{low:.2f} to {high:.2f}] of {len(shown)}"


def test_samples_of_the_base_show_the_head_classes_they_are_asked_for(network):
    model = backbone.load(BASE)
    heads = [name for name, facts in toy.CLASSES.items() if facts["role"] == "head"]
    jobs = [(name, i) for name in heads for i in range(TILES)]
    prompts = [words.caption(name, toy.generator(5, "prompt", name, i)) for name, i in jobs]
    for guidance in GUIDANCE:
        generators = [torch.Generator().manual_seed(files.seed("bench truth", *job)) for job in jobs]
        pixels = sampling.sample(model, prompts, generators, guidance_scale=guidance, num_inference_steps=20)
        shown = toy_truth.answers(network, pixels) == np.array([name for name, _ in jobs])
        each = {name: f"{shown[i * TILES : (i + 1) * TILES].mean():.2f}" for i, name in enumerate(heads)}
        print(f"{BASE}, guidance {guidance}: {share(shown)} samples show their class; {each}")


def test_made_tiles_of_an_experiment_show_their_class(network):
    found = sorted(places.find_all(EXPERIMENT, "05_select").items()) if (ROOT / "outputs" / EXPERIMENT).is_dir() else []
    if not found:
        pytest.skip(f"no finished 05_select in outputs/{EXPERIMENT}; run its recipe first")
    home = ROOT / "outputs" / EXPERIMENT
    dataset = data.read_frozen(home / "00_dataset" / "dataset.json")
    for name, folder in found:
        made = data.located(files.read_table(folder / "manifest.csv"), dataset, home)
        strength = made["settings"].map(lambda text: json.loads(text).get("strength", 1.0))
        shown = pd.Series(toy_truth.answers(network, data.pixels(made)) == made["label"], made.index)
        for (label, value), rows in made.groupby([made["label"], strength]):
            kept = rows["status"].eq("kept")
            line = f"{name}, {label}, strength {value}: {share(shown[rows.index])} made"
            print(line + (f", {share(shown[rows.index[kept]])} kept show their class" if kept.any() else ", none was kept"))
