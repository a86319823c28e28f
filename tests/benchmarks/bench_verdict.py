"""What a verdict costs: distances between sets, resamples of cases and seeds, and all arms on features that are already cached."""

import resource
import time

import numpy as np
import pandas as pd
import planted
import pytest

from histokit import runs
from histokit.arms import comparison, predictions, trials
from histokit.core import files
from histokit.evaluate import question, verdict
from histokit.metrics import distributions, stats
from histokit.tiles import data
from histokit.vision import features


def clock(work):
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def peak():
    """GiB of memory this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def test_frechet_distance_of_few_tiles(n=50, d=2048):
    x, y = (np.random.default_rng(s).normal(size=(n, d)) for s in (0, 1))
    distributions.frechet(x, y)
    ours, value = clock(lambda: distributions.frechet(x, y))
    covariances = [np.cov(z, rowvar=False) for z in (x, y)]
    plain, product = clock(lambda: np.linalg.eigvals(covariances[0] @ covariances[1]))
    second = ((x.mean(0) - y.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances) - 2 * np.sqrt(product.real.clip(0)).sum()
    print(f"\nFrechet distance, D {d}, N {n}: {ours:.3f} s (limit 0.3), {plain / ours:.0f} x faster than eigenvalues of D x D", flush=True)
    assert ours <= 0.3 and value == pytest.approx(second, rel=1e-4)


def test_density_and_coverage_of_20_000_tiles(n=20_000, d=768):
    real, made = (np.random.default_rng(s).normal(size=(n, d)).astype(np.float32) for s in (0, 1))
    before = peak()
    seconds, found = clock(lambda: distributions.precision_recall_density_coverage(real, made))
    floor, _ = clock(lambda: [real[:2000].astype(np.float64) @ made.T.astype(np.float64) for _ in range(1)])
    ratio = seconds / (3 * floor * n / 2000)  # real-real, made-made, real-made
    print(f"\nprecision, recall, density, coverage of {n} x {n} x {d}: {seconds:.0f} s, {ratio:.1f} x the three products alone, ", end="")
    print(f"peak {peak():.2f} GiB (limit 4), {before:.2f} before; coverage {found['coverage']:.3f}", flush=True)
    assert peak() <= 4 and found["coverage"] == pytest.approx(1 - 2.0**-5, abs=0.02)


def test_resamples_of_cases_and_seeds(tiles=1000, seeds=10, resamples=2000):
    rows = planted.tiles([60, 60, 50, 40], per_case=5).head(tiles)
    read = planted.predicted(rows, {"real": {}, "augmented": {"Polyp": 0.5}}, seeds=seeds)
    seconds, m = clock(lambda: verdict.measure(read, planted.dataset(), resamples=resamples))
    y, called, case = read.y, read.called[1], read.case

    def one(rng):  # a plain resample, tile by tile, of which there would be 2,000 for each arm
        chosen = np.concatenate([np.flatnonzero(case == c) for c in rng.choice(np.unique(case), len(np.unique(case)))])
        return [(called[s][chosen] == y[chosen])[y[chosen] == c].mean() for s in rng.integers(seeds, size=seeds) for c in range(4)]

    plain, _ = clock(lambda: [one(np.random.default_rng(s)) for s in range(5)])
    plain *= 2 * resamples / 5
    what = f"{resamples} resamples, {len(rows)} tiles, {seeds} seeds, 2 arms"
    print(f"\n{what}: {seconds:.1f} s (limit 10), {plain / seconds:.0f} x faster than tile by tile", flush=True)
    assert seconds <= 10 and stats.redrawn(read.runs) and m.resamples == resamples


def test_a_quick_verdict(tmp_path, monkeypatch, tiles=2000, arms=12, seeds=6):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    held, rng = planted.dataset(), np.random.default_rng(0)
    each = {"train": [11, 50, 10, 3], "val": [20, 20, 10, 10], "test": [60, 60, 25, 20]}
    rows = pd.concat([planted.tiles(cases, 7, split) for split, cases in each.items()], ignore_index=True)
    rows = planted._manifest(rows.assign(source="real", root="data", use="labelled"))
    for row in rows.itertuples():
        files.write_png(tmp_path / "tiles" / row.file_name, planted.picture(row.label, row.case_id, rng))
    run = runs.start(experiment="quick", step="00_dataset", dataset="")
    files.write_json(run.path("dataset.json"), vars(held))
    run.finish(rows)
    specs = {f"arm{i}": {"sampler": ("natural", "balanced")[i % 2], "augment": ("symmetries", "none", "stain")[i % 3]} for i in range(arms)}
    run = runs.start(experiment="quick", step="06_classifier", arms=specs, seeds=seeds)
    table, settled = data.load(run), comparison.settle(specs)
    sets = comparison.assemble(run, table, settled)
    encoder = features.load("mini-sup")
    for augment in features.VIEWS:
        features.embed(encoder, table, run, augment=augment)

    def judged():
        trials.train(run, settled, sets, table, seeds=seeds, steps=500, batch_size=64)
        read = predictions.read(run.folder, held.classes, list(specs))
        return verdict.conclude(verdict.measure(read, held), question.cast(specs, read.arms), held)

    seconds, found = clock(judged)
    what = f"quick verdict: {len(rows)} tiles, {arms} arms, {seeds} seeds, features cached"
    print(f"\n{what}: {seconds:.0f} s (limit 300), peak {peak():.2f} GiB", flush=True)
    assert seconds <= 300 and found["sentence"] and abs(len(rows) - tiles) < 300
