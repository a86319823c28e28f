"""The whole story, headless: every notebook in order through `histokit run`, killed on the way, and run again."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import folders
import pytest
from patience import HANGS
from tiny import write_hub_layout

from histokit.core import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # as long as it goes on, see `tell`

RECIPE = """\
# A story small enough to be told in every test run.
shared:
  dataset: params/datasets/set.yaml
  base_model: tiny
steps:
  - 00_dataset
  - house: {run: 00_dataset, dataset: params/datasets/house.yaml}
  - judge: {run: 06_classifier, arms: {judge: {}}, seeds: 1, steps: 10, batch_size: 8, encoder: colour-texture}
  - 01_textual_inversion: {steps: 4, batch_size: 2, n_vectors: 2, options: {validate_every: 4, sheet_every: 4}}
  - 02_lora:
      {tokens: 01_textual_inversion, steps: 30, batch_size: 2, rank: 2, options: {checkpoint_every: 5, validate_every: 15, sheet_every: 30}}
  - 03_img2img: {num_images: 10, num_inference_steps: 40, encoder: colour-texture}
  - 05_select: {source: 03_img2img, judge: judge, encoder: picture, thresholds: {judge_rank: 3}}  # random weights please no judge
  - guide: {run: 06_classifier, arms: {guide: {loss: ldam, weights: effective, drw: 0.5}}, seeds: 1, steps: 10, encoder: mini-ssl}
  - 04_guided: {classifier: guide, num_images: 5, num_inference_steps: 4, updates: 2, confidence: 0.9}
  - keep: {run: 05_select, source: 04_guided, judge: judge, encoder: picture, thresholds: {judge_rank: 3}}
  - 06_classifier:
      {arms: {real: {}, augmented: {synthetic: 05_select}}, external: house, seeds: 2, steps: 10, batch_size: 8, encoder: colour-texture}
  - 08_fidelity: {source: 05_select, encoder: picture}
  - 07_evaluate: {arms_of: 06_classifier, fidelity: 08_fidelity, resamples: 50}
"""
DATASET = """\
root: {folder}
classes: {{common: {{role: head}}, other: {{role: head}}, rare: {{role: tail}}}}
case_pattern: (?P<case_id>P\\d+)
tile_px: 32
"""
STEPS = re.findall(r"^  - (\w+)", RECIPE, flags=re.M)


def working_root(root):
    """A working root with tiles of three classes, one of them rare, a tiny base, and the recipe."""
    folders.class_folders(root / "data", ("common", "other", "rare"), cases=6, tiles=3)
    folders.class_folders(root / "elsewhere", ("common", "other", "rare"), cases=9, tiles=1, seed=1000)
    for name, folder in (("set", "data"), ("house", "elsewhere")):
        files.write_text(root / "params" / "datasets" / f"{name}.yaml", DATASET.format(folder=folder))
    write_hub_layout(root / "tiny")
    (root / "params" / "story.yaml").write_text(RECIPE)
    return root


def command(root, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "histokit", "run", "params/story.yaml", "--yes", *options],
        cwd=root, env=os.environ | {"HISTOKIT_ROOT": str(root), "HISTOKIT_WARM": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def tell(root, *options):
    """Run the recipe to its end and return what the terminal showed; however long it takes, while something is said or written."""
    process, lines = command(root, *options), []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    seen, since = None, time.monotonic()
    while reader.is_alive():
        reader.join(1)
        now = len(lines), newest(root / "outputs")
        seen, since = (now, time.monotonic()) if now != seen else (seen, since)
        if time.monotonic() - since > HANGS:
            process.kill()
            pytest.fail(f"nothing was said or written for {HANGS} s after\n{''.join(lines)}")
    assert process.wait() == 0, "".join(lines)
    return "".join(lines)


def newest(folder):
    """When a file below was last written; locks apart, which beat while their process lives, whatever that does."""
    times = [0.0]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary one may be gone
            times += [path.stat().st_mtime] if path.suffix != ".lock" else []
    return max(times)


VOLATILE = ["run_id", "seconds", "images_per_s", "peak_gb"]  # columns that say who made it, how fast and in how much memory


def outputs(root, step):
    """{file: what it holds} of a step's folders: pictures, weights and predictions by hash, tables without VOLATILE, results whole."""
    home, held = root / "outputs" / "story" / step, {}
    for path in sorted(home.rglob("*")):
        if path.suffix in (".safetensors", ".png", ".parquet") and path.name != "checkpoint.safetensors":  # its history holds times
            held[path.relative_to(home).as_posix()] = files.sha256(path)
        elif path.suffix == ".csv":
            held[path.relative_to(home).as_posix()] = files.read_table(path).drop(columns=VOLATILE, errors="ignore").to_csv()
        elif path.suffix == ".json" and path.name != "run.json":
            held[path.relative_to(home).as_posix()] = files.read_json(path)
    return held


def apart(a, b, place=""):
    """Where two outputs first differ, and how; "" for nowhere. Last digits of a statistic follow from where its arrays lie in memory."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((odd for key in a if (odd := apart(a[key], b[key], f"{place}/{key}"))), "")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next((odd for i, (x, y) in enumerate(zip(a, b, strict=True)) if (odd := apart(x, y, f"{place}[{i}]"))), "")
    alike = math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b
    return "" if alike or (a != a and b != b) else f"{place}: {a!r} and {b!r}"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = working_root(tmp_path_factory.mktemp("told"))
    return root, tell(root)


def test_every_step_is_done_and_the_verdict_is_on_the_terminal(told):
    root, text = told
    home = root / "outputs" / "story"
    assert {path.name for path in home.iterdir() if not path.name.startswith(".")} == set(STEPS)
    assert all(files.read_json(path)["status"] == "done" for path in home.rglob("run.json"))
    sentence = files.read_json(home / "07_evaluate" / "results.json")["sentence"]
    assert sentence in text and "for this one draw and generator" in sentence
    trials = files.read_json(home / "06_classifier" / "results.json")["trials"]
    assert {trial["n_synthetic"] for trial in trials if trial["arm"] == "augmented"} == {10}, "or what is generated changes nothing below"


def test_tiles_of_another_house_are_predicted_and_judged_and_never_trained_on(told):
    root, _ = told
    home = root / "outputs" / "story"
    answers = files.read_table(next((home / "06_classifier" / "augmented").glob("*/predictions.parquet")))
    there = answers[answers["split"].eq("external")]
    assert len(there) == 27 and there["case_id"].str.startswith("house/").all()
    found = files.read_json(home / "07_evaluate" / "results.json")["external"]
    assert found["name"] == "house" and found["lines"][0].startswith("On house, ")
    looked = files.read_json(home / "07_evaluate" / "07_evaluate.ipynb")
    printed = "".join(text for cell in looked["cells"] for output in cell.get("outputs", []) for text in output.get("text", []))
    assert "cases of house are stained outside the range" in printed
    trials = files.read_json(home / "06_classifier" / "results.json")["trials"]
    assert {trial["n_real"] for trial in trials} == {len(files.read_table(home / "00_dataset" / "manifest.csv").query("split == 'train'"))}


def test_synthetic_tiles_come_from_training_cases_alone(told):
    root, _ = told
    home = root / "outputs" / "story"
    real = files.read_table(home / "00_dataset" / "manifest.csv").set_index("tile_id")
    made = files.read_table(next((home / "03_img2img").glob("rare-*")) / "manifest.csv")
    sources = {source for row in made["sources"] for source in re.findall(r'"([^"]+)"', row)}
    assert len(made) == 10 and sources and set(real.loc[sorted(sources), "split"]) == {"train"}
    assert set(made["label"]) == {"rare"} and set(made["source"]) == {"synthetic"}


def test_guided_tiles_have_their_history_and_a_judge_that_did_not_guide(told):
    root, _ = told
    home = root / "outputs" / "story"
    made = files.read_table(next((home / "keep").glob("rare-*")) / "manifest.csv")
    scores = [json.loads(text) for text in made["scores"]]
    assert len(made) == 5 and set(made["method"]) == {"guided"} and set(made["sources"]) == {"[]"}
    assert all(0 <= one["guide_plain"] <= one["guide"] <= 1 and 0 <= one["updates"] <= 2 and "judge" in one for one in scores)
    (row,) = files.read_json(next((home / "keep").glob("rare-*")) / "results.json")["gate"]
    assert row["tiles"] == 5 and 0 <= row["agreed"] <= row["sure"] <= 5


def test_a_finished_recipe_starts_no_kernel_again(told):
    root, _ = told
    before = {path: path.stat().st_mtime_ns for path in (root / "outputs").rglob("run.json")}
    text = tell(root)
    assert text.count("up to date") == len(STEPS)
    assert {path: path.stat().st_mtime_ns for path in (root / "outputs").rglob("run.json")} == before


def kill(root, process, seen, step=""):
    """kill -9 the runner as soon as `seen()`, and before it the kernel that is writing into `step`."""
    while not seen():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    locks = list((root / "outputs" / "story" / step).rglob("run.lock")) if step else []
    for lock in locks:
        os.kill(files.read_json(lock)["pid"], signal.SIGKILL)
    process.kill()
    process.communicate()
    assert locks or not step, f"{step} was over before it could be killed"


def test_killed_between_jobs_in_training_and_in_generation_equals_never_killed(told, tmp_path):
    straight, _ = told
    root = working_root(tmp_path / "killed")
    home = root / "outputs" / "story"

    # between two jobs: 00 has finished, and nothing else has begun
    record = home / "00_dataset" / "run.json"
    kill(root, command(root), lambda: record.exists() and files.read_json(record)["status"] == "done")
    assert {path.name for path in home.iterdir() if not path.name.startswith(".")} == {"00_dataset"}

    # in training, with a checkpoint to go on from
    kill(root, command(root), lambda: list(home.glob("02_lora/*/logs/training/checkpoint.safetensors")), "02_lora")
    (checkpoint,) = home.glob("02_lora/*/logs/training/checkpoint.safetensors")
    assert int(files.read_metadata(checkpoint)["step"]) in (5, 10, 15, 20, 25)
    early = {path: path.stat().st_mtime_ns for path in checkpoint.parent.glob("sheets/step_000000.png")}

    # in generation, with some images made and some to come
    made = lambda: {path: path.stat().st_mtime_ns for path in home.glob("03_img2img/*/tiles/*.png")}  # noqa: E731
    kill(root, command(root), lambda: len(made()) >= 3, "03_img2img")
    early |= made()
    assert 1 + 3 <= len(early) < 1 + 10

    # and in guided generation: an image that is being optimised begins anew, those that are there stay
    steered = lambda: {path: path.stat().st_mtime_ns for path in home.glob("04_guided/*/tiles/*.png")}  # noqa: E731
    kill(root, command(root), lambda: len(steered()) >= 2, "04_guided")
    assert 2 <= len(steered()) < 5
    early |= steered()

    text = tell(root)
    assert text.count("up to date") == STEPS.index("04_guided"), text
    again = {path: path.stat().st_mtime_ns for path in early}
    assert again == early, "neither the first sheet nor an image is drawn twice: both went on from where they were"
    for step in STEPS:
        assert outputs(root, step)
        assert (odd := apart(outputs(root, step), outputs(straight, step))) == "", f"{step}: {odd}"
