"""Checkpoints beside each other: what is said beneath them, and the click that takes one."""

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import squares
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.show import checkpoint_sheets
from histokit.tiles import data
from histokit.training import checkpoints, finetuning, textual_inversion

QUICK = {"steps": 4, "batch_size": 4, "n_vectors": 2, "lr": 0.1, "sheet_every": 2, "seed": 0}


@pytest.fixture
def tiles():
    squares.dataset()
    return data.training(data.load(runs.start(experiment="exp", step="look")))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Sheets of one denoising step."""
    monkeypatch.setattr(finetuning, "sheet", functools.partial(finetuning.sheet, num_inference_steps=1))


def history(steps=(2, 4), **attrs):
    rows = pd.DataFrame({"step": [1, *steps], "lr": 0.1, "loss_tokens": [3.0, 2.0, 1.0][: len(steps) + 1]})
    rows.attrs = {"best_step": None, "step": steps[-1], **attrs}
    return rows


def drawn(folder, samples):
    """Sheets of one prompt: {step: four tiles}."""
    for step, four in samples.items():
        framed = np.pad(np.stack(four), ((0, 0), (0, finetuning.GAP), (0, finetuning.GAP), (0, 0)), constant_values=255)
        files.write_png(checkpoints.sheet_path(folder, step), np.concatenate(list(framed), axis=1))
    return folder


def test_a_sheet_is_cut_back_into_the_samples_it_was_made_of(tmp_path):
    model = tiny_model()
    sheet = finetuning.sheet(model, ["a gland", "a stroma"], 0)(0)
    assert np.array_equal(sheet, finetuning.sheet(model, ["a gland", "a stroma"], 0)(9)), "the same at the same weights"
    samples = finetuning.cut(sheet)
    assert samples.shape == (2, 4, 32, 32, 3)
    again = np.pad(samples, ((0, 0), (0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
    assert np.array_equal(np.concatenate([np.concatenate(list(row), axis=1) for row in again]), sheet)


def test_copies_have_copy_distance_0_and_a_model_that_repeats_its_tiles_is_named(tmp_path, tiles):
    learned = tiles[tiles["label"].eq("blue")]
    copies = [*data.pixels(learned)[:3], np.flip(data.pixels(learned)[3], axis=1)]  # a turned copy is a copy
    foreign = list(data.pixels(tiles[tiles["label"].eq("red")])[:4])
    folder = drawn(tmp_path, {0: foreign, 2: foreign, 4: copies})
    table = checkpoint_sheets.compare(folder, history(), learned, tiles, encoder="colour-texture")
    assert table["step"].tolist() == [0, 2, 4] and table["taken"].tolist() == [False, False, True]
    assert table["distance"].iloc[2] == pytest.approx(0, abs=1e-3) and table["distance"].iloc[1] > 0.5
    assert table["loss"].tolist()[1:] == [2.5, 2.0] and table["held_out"].isna().all(), "the mean of what was logged up to there"
    real = table.attrs["real"]
    assert len(real) == 5 and (real > table["nearest"].iloc[2]).all() and len(table.attrs["copies"]) == 5
    assert "At step 4 half of the samples are nearer" in checkpoint_sheets.sentence(table)
    table = checkpoint_sheets.compare(drawn(tmp_path, {4: foreign}), history(), learned, tiles, encoder="colour-texture")
    assert "half of the samples" not in checkpoint_sheets.sentence(table)
    one_case = learned[learned["case_id"].eq(learned["case_id"].iloc[0])]
    assert "of one case" in checkpoint_sheets.sentence(
        checkpoint_sheets.compare(folder, history(), one_case, tiles, encoder="colour-texture")
    )


def test_a_training_is_compared_and_the_step_taken_is_framed(tmp_path, tiles):
    folder, model = tmp_path / "training", tiny_model()
    learned = tiles[tiles["label"].isin(["blue", "red"])]
    _, _, seen = textual_inversion.train(model, learned, {"blue": "blue", "red": "red"}, folder=folder, take=2, **QUICK)
    table = checkpoint_sheets.compare(folder, seen, learned, tiles, encoder="colour-texture")
    assert table["step"].tolist() == [0, 2, 4] and table["kept"].all() and table.loc[table["taken"], "step"].tolist() == [2]
    shown, label, column = checkpoint_sheets.picture(table, folder, ["blue", "red"], "Two")
    framed = {x for x in range(shown.width) if shown.getpixel((x, 44 + 8)) == (217, 138, 41)}
    assert framed and all(label + column - 4 <= x <= label + 2 * column for x in framed)


def test_a_checkpoint_of_a_class_gives_bit_for_bit_the_tokens_a_shorter_training_had(tmp_path, tiles):
    learned = tiles[tiles["label"].eq("blue")]

    def train(folder, **more):
        return textual_inversion.train(tiny_model(), learned, {"blue": "blue"}, folder=folder, **{**QUICK, **more})[1].parameter

    chosen = train(tmp_path / "a", take=2)
    assert (chosen == train(tmp_path / "b", steps=2)).all() and not (chosen == train(tmp_path / "c")).all()


# --- the click

ALL = "steps:\n  - 00_dataset\n  - learn: {run: 02_lora, class_name: all}  # together\n"


def chooser(root, class_name="fat", recipe="params/study.yaml", **facts):
    (root / "params/study.yaml").write_text(ALL)
    folder = drawn(root / "training", {step: [squares.tile("red", step)] * 4 for step in (0, 2, 4)})
    table = pd.DataFrame(
        {"step": [0, 2, 4], "held_out": np.nan, "loss": 1.0, "distance": 0.5, "nearest": 0.4, "kept": True, "taken": False}
    )
    table = table.assign(**facts)
    table.attrs = {"real": np.array([0.5, 0.6]), "copies": np.array([0.1]), "usual": 4}
    return checkpoint_sheets.Chooser(table, folder, ["fat"], SimpleNamespace(recipe=recipe, class_name=class_name, step="learn"), 0)


def test_a_click_writes_the_step_of_a_class_and_can_be_undone(root):
    made = chooser(root)
    assert [button.disabled for button in made.buttons] == [True, False, False], "there is nothing to take before the first update"
    made.buttons[1].click()
    assert (root / "params/study.yaml").read_text() == ALL + "classes:\n  fat: {learn: {checkpoint: 2}}\n"
    assert "Written into params/study.yaml" in made.said.value and "+  fat: {learn: {checkpoint: 2}}" in made.said.value
    made.buttons[2].click()
    assert "checkpoint: 0" in (root / "params/study.yaml").read_text(), "the step that is taken anyway goes by 0"
    made.back.click()
    assert "checkpoint: 2" in (root / "params/study.yaml").read_text()


def test_a_click_in_the_one_run_of_all_classes_writes_into_its_step(root):
    made = chooser(root, class_name="all")
    made.buttons[1].click()
    assert (root / "params/study.yaml").read_text() == ALL.replace("class_name: all}", "class_name: all, checkpoint: 2}")
    made.buttons[1].click()
    assert "says so already" in made.said.value


def test_without_a_recipe_or_weights_there_is_nothing_to_click(root):
    made = chooser(root, recipe="")
    assert all(button.disabled for button in made.buttons) and "opened by hand" in made.said.value
    made = chooser(root, kept=[True, False, False])
    assert [button.disabled for button in made.buttons] == [True, True, False], "what is taken anyway needs no kept weights"


# --- another choice of step is another key, and still no training


def trained(root, checkpoint, seed=0):
    """What 01 does, on a tiny model: (run, step taken, whether anything was trained)."""
    run = runs.start(experiment="exp", step="learn", class_name="blue", checkpoint=checkpoint, seed=seed)
    tiles = data.training(data.load(run)).query("label == 'blue'")
    folder = checkpoints.take_over(run)
    there = (folder / "checkpoint.safetensors").exists()
    _, tokens, seen = textual_inversion.train(
        tiny_model(), tiles, {"blue": "blue"}, folder=folder, take=checkpoint, **QUICK | {"seed": seed}
    )
    files.write_tensors(run.path("tokens.safetensors"), {"rows": tokens.parameter}, {})
    run.finish({"step": seen.attrs["step"]})
    return run, seen.attrs["step"], not there


def test_another_choice_of_step_takes_the_training_over_and_another_seed_does_not(root):
    squares.dataset()
    first, step, anew = trained(root, 0)
    assert (step, anew) == (4, True)
    chosen, step, anew = trained(root, 2)
    assert (step, anew) == (2, False)
    assert first.record["outputs_sha256"] != chosen.record["outputs_sha256"]
    again, step, anew = trained(root, 0)
    assert (step, anew) == (4, False) and again.record["outputs_sha256"] == first.record["outputs_sha256"]
    assert trained(root, 2, seed=1)[2], "another seed is another training"
    assert not trained(root, 0, seed=1)[2]


def test_a_run_that_ended_before_anything_was_trained_is_not_taken_over(root, capsys):
    squares.dataset()
    run = runs.start(experiment="exp", step="learn", class_name="blue", checkpoint=0, seed=0)
    assert checkpoints.take_over(run) == run.path("logs", "training")
    data.load(run)
    run._lock.release()
    assert trained(root, 2)[2] and "goes on from" not in capsys.readouterr().out


def test_a_training_on_other_tiles_is_not_taken_over(root):
    squares.dataset()
    trained(root, 0)
    squares.dataset({split: dict.fromkeys(squares.CLASSES, 7) for split in ("train", "val", "test")})
    assert trained(root, 2)[2]
