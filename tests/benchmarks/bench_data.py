"""The data row at full size: a manifest of 130,000 tiles without pixels, and near copies among 20,000 thumbnails.

Times are seconds of one core, so that a busy machine counts the same. Each stands beside one that no code could beat in this
run: listing the folder, one bare matrix product.
"""

import os
import resource
import time

import numpy as np
from scipy import fft

from histokit.core import files
from histokit.tiles import audit, data, near_duplicates, splits


def clock(work):
    """Seconds of the processor and result of work()."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def peak():
    """GiB this process has held at most; other benches of the same process count too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(what, seconds, limit, floor, of):
    print(f"\n{what}: {seconds:.2f} s (limit {limit}), {seconds / floor:.1f} x {of} ({floor:.2f} s), peak {peak():.2f} GiB", flush=True)
    assert seconds <= limit


def test_a_manifest_of_130_000_tiles(tmp_path, monkeypatch, n=130_000, classes=16):
    """Scan, split, audit and reload empty files in class folders, read by name only."""
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    before = peak()
    root, names = tmp_path / "tiles", [f"class {c:02d}" for c in range(classes)]
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(c, n, classes):
            open(root / name / f"P{i % 997:03d}_{i}.png", "wb").close()
    path = tmp_path / "bench.yaml"
    labels = "".join(f"  {name}: {{}}\n" for name in names)
    path.write_text(f"root: {root}\nclasses:\n{labels}tile_px: 96\ncase_pattern: '(?P<case_id>P[0-9]+)_'\n")
    floor, _ = clock(lambda: sum(entry.is_file() for name in names for entry in os.scandir(root / name)))

    def everything():
        described = data.describe(path)
        tiles = splits.assign(data.scan(described), described.split, seed=0)
        return tiles, audit.table(tiles, described), audit.reach(tiles, names, dict.fromkeys(names, "head"))

    seconds, (tiles, *_) = clock(everything)
    assert len(tiles) == n
    show(f"scan, split and audit of {n:,} tiles without pixels", seconds, 10, floor, "listing the folder")
    files.write_table(tmp_path / "manifest.parquet", tiles)
    held = data.Dataset("bench", names, {}, dict.fromkeys(names, "head"), 96, "resize", None, str(root), True, {})
    seconds, _ = clock(lambda: data.located(files.read_table(tmp_path / "manifest.parquet"), held, tmp_path))
    show("load that manifest, every path checked", seconds, 10, floor, "listing the folder")
    assert peak() - before < 2


def test_near_copies_among_20_000_tiles(n=20_000, planted=200):
    """Thumbnails of tissue-like noise (1/f), with planted flips."""
    before = peak()
    rng = np.random.default_rng(0)
    steps = np.arange(near_duplicates.SIDE)
    fall = 1 / (1 + np.hypot(steps[:, None], steps))
    thumbnails = np.empty((n, near_duplicates.SIDE, near_duplicates.SIDE), np.uint8)
    for start in range(0, n, 1000):
        waves = rng.normal(size=(min(1000, n - start), near_duplicates.SIDE, near_duplicates.SIDE)) * fall
        waves[:, 0, 0] = 0
        field = fft.idctn(waves, axes=(1, 2), norm="ortho")
        thumbnails[start : start + 1000] = (128 + 30 * field / field.std(axis=(1, 2), keepdims=True)).clip(0, 255)
    thumbnails[-planted:] = thumbnails[:planted, ::-1]
    square = rng.normal(size=(n, near_duplicates.LOW**2)).astype(np.float32)
    floor, _ = clock(lambda: [square[i : i + 2048] @ square[i:].T for i in range(0, n, 2048)])
    seconds, (i, *_) = clock(lambda: near_duplicates.pairs(near_duplicates.signatures(thumbnails)))
    assert len(i) == planted
    show(f"near copies of {n:,} tiles, 8 symmetries, {planted} planted and found", seconds, 300, floor, "one matrix product")
    assert peak() - before < 4
