"""What a dry run says before it measures, and which setting it names for a step that takes long."""

import pytest
import stubs
from folders import FolderRun, class_folders, described

from histokit import cli
from histokit.core import files
from histokit.engine import forecast, hints, jobs
from histokit.runs import recipe
from histokit.tiles import audit, data, splits

STEPS = """shared: {dataset: params/datasets/set.yaml, base_model: "", encoder: colour-texture}
steps:
  - 00_dataset
  - 02_lora: {class_name: all, steps: 200, batch_size: 4, base_model: mini}
  - 03_img2img: {lora: 02_lora, num_images: 40, base_model: mini}
"""


@pytest.fixture
def study(root, repository):
    """A recipe of the real notebooks on two classes of two and of six cases."""
    (root / "notebooks").symlink_to(repository / "notebooks")
    class_folders(class_folders(root / "tiles", ("b",), cases=6), ("a",), cases=2, seed=99)
    path = root / "params" / "study.yaml"

    def of(text=""):
        described(root, "tiles", "case_pattern: (?P<case_id>P\\d+)\n" + text)
        path.write_text(STEPS)
        return path

    return of


def test_a_budget_that_cannot_hold_is_said_before_anything_is_measured(study, capsys, measured):
    assert cli.main(["run", str(study("budget: {b: {tiles: 90}}\n")), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "WILL STOP 00_dataset: budget of 'b' asks for 90 training tiles; it has" in out and "02_lora" in out
    assert not measured


def test_a_class_without_validation_or_test_tile_is_said_at_once(study, capsys):
    cli.main(["run", str(study()), "--dry-run"])
    assert "00_dataset: no validation tile of a" in capsys.readouterr().out


def test_a_data_set_without_a_rare_class_is_told_so(study, capsys):
    cli.main(["run", str(study("tail_below: 2\n")), "--dry-run"])
    assert "00_dataset: no class is rare: each has " in capsys.readouterr().out
    cli.main(["run", str(study("tail_below: 50\n")), "--dry-run"])
    assert "no class is rare" not in capsys.readouterr().out


def test_the_longest_step_is_named_with_what_makes_it_shorter(study):
    found = recipe.read(study())
    every = jobs.expand(found)
    guesses = {job.id: forecast.Guess(7000.0 if job.step == "03_img2img" else 500.0, 0, 0) for job in every}
    lines = list(hints.shorter(found, every, every, guesses))
    assert len(lines) == 1 and lines[0].startswith("03_img2img takes 88% of it: num_images 40, num_inference_steps")
    assert "-p 03_img2img.num_images=20 makes it shorter" in lines[0]
    assert recipe.read(study(), ["03_img2img.num_images=20"]), "what is printed can be pasted"
    short = {id: forecast.Guess(20.0, 0, 0) for id in guesses}
    assert not list(hints.shorter(found, every, every, short))


def test_checks_and_sheets_are_named_where_they_cost_more_than_the_steps(study, monkeypatch):
    found = recipe.read(study(), ["02_lora.steps=8"])
    every = jobs.expand(found)
    rates = forecast.speed.Rates(start=0, read=0, see={}, head=0, train=1, denoise=1, code=0, lora_bytes=1, latent_bytes=1)
    monkeypatch.setattr(forecast.speed, "rates", lambda *a, **k: rates)
    job = next(job for job in every if job.step == "02_lora")
    share = forecast.fixed_share(found, every, job)
    units = forecast.work(job, every, forecast.counts(found, job))
    assert share == pytest.approx(1 - 8 * 4 / (units["train"] + units["denoise"] + units["seconds"])) and share > 0.5
    guesses = {one.id: forecast.Guess(9000.0 if one is job else 1.0, 0, 0) for one in every}
    assert "are checks and sample sheets" in next(hints.shorter(found, every, every, guesses))


def test_a_step_below_a_changed_one_is_stale_in_status(root, capsys):
    stubs.chain(root)
    path = str(root / "params/study.yaml")
    assert cli.main(["run", path]) == 0 and cli.main(["status", path]) == 0
    assert "stale" not in capsys.readouterr().out.rpartition("\n\n")[2]
    cli.main(["status", path, "-p", "00_dataset.seed=7"])
    out = capsys.readouterr().out
    assert "a step above it will be done again" in out.splitlines()[1] and out.endswith("6 stale\n")


def test_moved_tiles_are_the_same_data(root):
    """The folder's place is no part of dataset.json, so what comes after 00 stays as it is."""
    written = {}
    for place in ("here", "there"):
        held = described(root, class_folders(root / place, cases=6))
        tiles, *_ = audit.read(data.scan(held), held.root)
        run = FolderRun(root, f"exp {place}")
        frozen = data.freeze(run, splits.assign(tiles, held.split, 0), held)
        assert frozen["path"].str.startswith(str(root / place)).all()
        written[place] = (run.home / "00_dataset" / "dataset.json").read_bytes()
        assert data.read_frozen(run.home / "00_dataset" / "dataset.json").root == place
    assert written["here"] == written["there"]
    old = root / "old.json"
    files.write_json(old, files.read_json(run.home / "00_dataset" / "dataset.json") | {"root": "elsewhere"})
    assert data.read_frozen(old).root == "elsewhere", "as earlier versions wrote it"
