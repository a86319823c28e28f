"""How long the command itself takes: to say what it can do, to see that a recipe is finished, and to make the demo."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from histokit.core import machine
from histokit.engine import forecast, jobs, speed
from histokit.runs import places
from histokit.runs import recipe as recipes

MEASURE = speed.measure_all  # which no test may
ROOT = Path(__file__).resolve().parents[2]  # where `make demo` was run, not the empty root of a test
HISTOKIT = [sys.executable, "-m", "histokit"]
PYTHON = [sys.executable, "-c", "pass"]


def run(command, **how):
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"HISTOKIT_ROOT": str(ROOT)}, capture_output=True, text=True, **how)


def best(*commands, times=5):
    """Shortest seconds of each command, taken in turns; its output is dropped."""
    found = [[] for _ in commands]
    for _ in range(times):
        for command, seconds in zip(commands, found, strict=True):
            start = time.perf_counter()
            run(command, check=True)
            seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in found]


def test_help():
    python, help = best(PYTHON, [*HISTOKIT, "--help"])
    print(f"\nhistokit --help: {help:.2f} s (limit 0.7), {help / python:.1f} x a bare Python ({python:.2f} s)", flush=True)
    assert help <= 0.7


@pytest.fixture
def demo():
    """The demo's run records; skipped where it is not finished."""
    status = run([*HISTOKIT, "status", "params/demo.yaml"])
    if " stale" in status.stdout or " missing" in status.stdout or "done" not in status.stdout:
        pytest.skip("the demo is not finished here; `make demo` first")
    return [places.read(path.parent) for path in sorted((ROOT / "outputs" / "demo").glob(f"*/**/{places.RECORD}"))]


def test_a_finished_recipe_again(demo):
    python, again = best(PYTHON, [*HISTOKIT, "run", "params/demo.yaml", "--yes"], times=3)
    print(f"\nfinished demo again: {again:.2f} s (limit 5), {again / python:.1f} x a bare Python ({python:.2f} s)", flush=True)
    assert again <= 5


def test_the_demo_as_it_was_made(demo):
    """Sum over its runs, whose notebooks started one after the other; kernel starts are not in it."""
    seconds = sum(record["wall_s"] for record in demo)
    threads = {record["threads"] for record in demo}
    print(f"\ndemo: {seconds / 60:.1f} min in {len(demo)} runs on {threads} threads (limit 10 on two cores)", flush=True)
    assert seconds <= 600


def test_a_dry_run_foretells_the_demo(demo, monkeypatch):
    """Its calibration now against what each run took then, kernel starts on neither side."""
    monkeypatch.setenv("HISTOKIT_ROOT", str(ROOT))
    recipe = recipes.read(ROOT / "params" / "demo.yaml")
    found = jobs.expand(recipe)
    start = time.perf_counter()
    rates = MEASURE("mini", 8, ["mini-ssl", "mini-sup"], machine.device(), speed.SECONDS)
    took = time.perf_counter() - start
    units = speed.once([forecast.work(job, found, forecast.counts(recipe, job)) for job in found])
    said = {job.name: speed.cost(unit, rates)[0] - rates.start for job, unit in zip(found, units, strict=True)}
    real = {f"{r['step']}/{r['class_name']}".rstrip("/"): r["wall_s"] for r in demo}
    each = ", ".join(f"{name} {said[name]:.0f} for {real.get(name, 0):.0f}" for name in said)
    ratio = sum(said.values()) / sum(real.values())
    print(f"\ndry run: foretells {ratio:.2f} of the demo's seconds ({each}), from a calibration of {took:.0f} s", flush=True)
    assert 1 / 3 <= ratio <= 3 and took <= 2 * speed.SECONDS
