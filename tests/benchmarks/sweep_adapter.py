"""Which adapter teaches a base a class it has never seen: one LoRA per setting on toy, tiles of both rare classes by strength, and the
share that an independent network knows by their class. For developers; the network is never asked by a notebook.

    histokit run params/demo.yaml --only 00_dataset
    python tests/benchmarks/sweep_adapter.py BASE attention,lr=5e-4 attention+conv,lr=1e-3,timesteps=structure,steps=200 ...

The first word of a setting is `targets`; the rest are options of 02_lora. HISTOKIT_BENCH_TILES tiles a class (12), at the strengths of
HISTOKIT_BENCH_STRENGTHS (0.3,0.45,0.6,0.8). A line a setting is added to outputs/sweep/results.jsonl; one that is there is not made again.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HISTOKIT_ROOT", str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import toy_truth  # noqa: E402

from histokit import runs  # noqa: E402
from histokit.core import files  # noqa: E402
from histokit.diffusion import adapters, backbone  # noqa: E402
from histokit.generate import img2img  # noqa: E402
from histokit.tiles import data  # noqa: E402
from histokit.training import lora  # noqa: E402

TILES = int(os.environ.get("HISTOKIT_BENCH_TILES", 12))
STRENGTHS = [float(s) for s in os.environ.get("HISTOKIT_BENCH_STRENGTHS", "0.3,0.45,0.6,0.8").split(",")]
PLAIN = {"steps": 110, "batch_size": 8, "rank": 16, "joint": True, "sheet_every": 0, "prompt": "a histology image of {label}"}


def options(text):
    """{option: value} of a setting as the command line spells it."""
    targets, *rest = text.split(",")
    return PLAIN | {"targets": targets} | {name: number(value) for name, _, value in (part.partition("=") for part in rest)}


def number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def measure(base, given, net, manifest, dataset):
    """A row: the setting, seconds of training, and for each strength the share of tiles of each rare class that show it."""
    names = dataset.tail
    terms, tiles = {name: dataset.terms[name] for name in names}, data.training(manifest).query("label in @names")
    own = dict(given)
    stains = own.pop("stains", "own")
    model, start = backbone.load(base, tiles=manifest), time.process_time()
    classes, words, history = lora.train(model, tiles, terms, seed=0, **own)
    row = {
        "base": base,
        "tiles": TILES,
        "strengths": STRENGTHS,
        **given,
        "cpu_s": round(time.process_time() - start),
        "loss": round(float(history["loss_lora"].iloc[-1]), 4),
    }
    kept = files.root() / "outputs" / "sweep" / files.digest(base, given)[:12]
    adapters.save(kept, model, classes, tiles, dataset=dataset.name, tokens=words.vectors() if words else {}, lora=True, settings={})
    model = backbone.load(base, tiles=manifest)
    adapters.load(model, kept, tiles=manifest, dataset=dataset.name)
    for strength in STRENGTHS:
        run = runs.start(experiment="sweep", step=f"look_{files.digest(base, given)[:8]}_{strength}", n=TILES)
        how = {"policy": "same_class", "strength": strength, "head": dataset.head, "stains": stains}
        jobs = img2img.job_table(model, manifest, terms, TILES, **how)
        made = img2img.render(model, jobs, run, manifest)
        shown = toy_truth.answers(net, data.pixels(made)) == made["label"].to_numpy()
        for name in names:
            row[f"{name} {strength}"] = round(float(np.mean(shown[made["label"].eq(name).to_numpy()])), 3)
        run.finish(data.without_memory(made))
        print(json.dumps(row), flush=True)
    return row


def main(base, *settings):
    look = runs.start(experiment=os.environ.get("HISTOKIT_EXPERIMENT", "demo"), step="sweep_look")
    manifest, dataset = data.load(look), data.dataset(look)
    net = toy_truth.network(files.cache("toy-truth"))
    log = files.root() / "outputs" / "sweep" / "results.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    for text in settings:
        given = options(text)
        asked = given | {"base": base, "tiles": TILES, "strengths": STRENGTHS}
        if any({name: row.get(name) for name in asked} == asked for row in known):
            continue
        row = measure(base, given, net, manifest, dataset)
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
