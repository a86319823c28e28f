"""The whole story, headless: every notebook in order through `histokit run`, killed on the way, and run again."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from histokit import files
from tests import folders
from tests.tiny import write_hub_layout

RECIPE = """\
# A story small enough to be told in every test run.
shared:
  dataset: params/datasets/set.yaml
  base_model: tiny
steps:
  - 00_dataset
  - judge: {run: 06_classifier, arms: {judge: {}}, seeds: 1, steps: 10, batch_size: 8, encoder: colour-texture}
  - 01_textual_inversion: {steps: 4, batch_size: 2, n_vectors: 2}
  - 02_lora: {tokens: 01_textual_inversion, steps: 30, batch_size: 2, rank: 2}
  - 03_img2img: {num_images: 10, num_inference_steps: 4, encoder: colour-texture}
  - 05_select: {source: 03_img2img, judge: judge, encoder: picture}
  - 06_classifier: {arms: {real: {}, augmented: {synthetic: 05_select}}, seeds: 2, steps: 10, batch_size: 8, encoder: colour-texture}
  - 07_evaluate: {arms_of: 06_classifier, encoder: picture, resamples: 50}
"""
DATASET = """\
root: data
classes: {common: {role: head}, other: {role: head}, rare: {role: tail}}
case_pattern: (?P<case_id>P\\d+)
tile_px: 32
"""
STEPS = re.findall(r"^  - (\w+)", RECIPE, flags=re.M)


def working_root(root):
    """A working root with tiles of three classes, one of them rare, a tiny base, and the recipe."""
    folders.class_folders(root / "data", ("common", "other", "rare"), cases=6, tiles=3)
    files.write_text(root / "params" / "datasets" / "set.yaml", DATASET)
    write_hub_layout(root / "tiny")
    (root / "params" / "story.yaml").write_text(RECIPE)
    return root


def command(root, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "histokit", "run", "params/story.yaml", "--yes", *options],
        cwd=root, env=os.environ | {"HISTOKIT_ROOT": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def tell(root, *options):
    """Run the recipe to its end and return what the terminal showed."""
    process = command(root, *options)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def outputs(root, step):
    """{file: sha256} of a step's folders, without what holds times."""
    home = root / "outputs" / "story" / step
    kept = [*home.rglob("*.safetensors"), *home.rglob("*.png"), *home.rglob("predictions.parquet"), *home.rglob("manifest.csv")]
    kept = [path for path in kept if path.name != "checkpoint.safetensors" and "run_id" not in path.read_bytes()[:400].decode("latin1")]
    return {path.relative_to(home).as_posix(): files.sha256(path) for path in sorted(kept)}


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


def test_synthetic_tiles_come_from_training_cases_alone(told):
    root, _ = told
    home = root / "outputs" / "story"
    real = files.read_table(home / "00_dataset" / "manifest.csv").set_index("tile_id")
    made = files.read_table(next((home / "03_img2img").glob("rare-*")) / "manifest.csv")
    sources = {source for row in made["sources"] for source in re.findall(r'"([^"]+)"', row)}
    assert len(made) == 10 and sources and set(real.loc[sorted(sources), "split"]) == {"train"}
    assert set(made["label"]) == {"rare"} and set(made["source"]) == {"synthetic"}


def test_a_finished_recipe_starts_no_kernel_again(told):
    root, _ = told
    before = {path: path.stat().st_mtime_ns for path in (root / "outputs").rglob("run.json")}
    start = time.perf_counter()
    text = tell(root)
    assert text.count("up to date") == len(STEPS)
    assert {path: path.stat().st_mtime_ns for path in (root / "outputs").rglob("run.json")} == before
    assert time.perf_counter() - start < 30, "a recipe that is done is answered from its files"


def kill(root, process, step, seen):
    """kill -9 the runner and the kernel of a step as soon as `seen()`."""
    lock = None
    while not seen():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    for lock in (root / "outputs" / "story" / step).rglob("run.lock"):
        os.kill(files.read_json(lock)["pid"], signal.SIGKILL)
    process.kill()
    process.communicate()
    assert lock is not None, f"{step} was over before it could be killed"


def test_killed_in_training_in_generation_and_between_jobs_equals_never_killed(told, tmp_path):
    straight, _ = told
    root = working_root(tmp_path / "killed")
    home = root / "outputs" / "story"
    kill(
        root,
        command(root),
        "02_lora",
        lambda: list((home / "02_lora").rglob("history.csv")) or list((home / "02_lora").rglob("sheets/*.png")),
    )
    kill(root, command(root), "03_img2img", lambda: len(list((home / "03_img2img").rglob("*.png"))) >= 3)
    process = command(root, "--only", "03_img2img")
    process.communicate()
    text = tell(root)
    assert text.count("up to date") >= 5, text
    for step in STEPS:
        assert outputs(root, step) == outputs(straight, step), step
