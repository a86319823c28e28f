"""Settings of a training: one place for each, a wrong name is refused, and whoever resumes with another one is told."""

import subprocess
import sys
from dataclasses import replace

import pytest
import squares
from tiny import tiny_model

from histokit import runs
from histokit.diffusion import adapters
from histokit.tiles import data
from histokit.training import loop, lora, settings, textual_inversion

METHODS = {textual_inversion.Settings: textual_inversion.train, lora.Settings: lora.train}
OTHER = {  # a value that is not the default, for every setting that what is trained depends on
    "steps": 2, "batch_size": 3, "lr": 0.5, "n_vectors": 3, "group_terms": {"a": "dark"}, "balance": "none", "caption_dropout": 0.5,
    "timesteps": "structure",
    "min_snr_gamma": 0.0, "loss": "l1", "hold_out": 0.5, "start": "mean", "fixed_norm": True, "templates": ["a tile of {label}"],
    "mode": "full",
    "joint": True, "rank": 3, "alpha": 5, "targets": "attention+feedforward", "dora": True, "token_lr": 0.5, "prompt": "a tile of {label}",
    "schedule": "cosine", "warmup": 3, "accumulate": 2, "clip": 0.5, "ema": 0.9, "weight_decay": 0.5,
}  # fmt: skip


@pytest.fixture
def tiles():
    squares.dataset({split: {"blue": 2} for split in ("train", "val", "test")})
    return data.training(data.load(runs.start(experiment="exp", step="look")))


def test_no_two_parts_share_a_name_and_flat_settings_find_theirs():
    known = [name for part in settings.PARTS for name in settings.names(part)]
    for method in METHODS:
        every = known + settings.names(method)
        assert len(every) == len(set(every)) and len(every) >= 25
        own, training = method.of({"ema": 0.5, "keep": False, "take": 7, "lr": 0.25})
        assert (own.lr, training.updates.ema, training.sheets.keep, training.sheets.take) == (0.25, 0.5, False, 7)
    assert settings.Loop.of({}) == settings.Loop()


def test_a_fine_tuning_has_a_pace_and_a_recipe_may_set_another():
    _, usual = lora.Settings.of({"steps": 200})
    assert (usual.validation.validate_every, usual.sheets.sheet_every, usual.sheets.keep) == (20, 50, True)
    _, own = lora.Settings.of({"steps": 200, "validate_every": 3, "sheet_every": 0})
    assert (own.validation.validate_every, own.sheets.sheet_every) == (3, 0)


@pytest.mark.parametrize("train", METHODS.values())
def test_an_unknown_option_is_refused_with_the_nearest_before_the_model_is_touched(train, tiles):
    for name, near in (("chekpoint_every", "checkpoint_every"), ("batchsize", "batch_size")):
        with pytest.raises(ValueError, match=f"no setting '{name}'; did you mean {near}"):
            train(None, tiles, {"blue": "blue"}, seed=0, **{name: 5})
    with pytest.raises(ValueError, match="no setting 'emma'; did you mean ema"):
        loop.fit([], None, 1, 0, emma=0.9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "linear"}, "use constant, cosine or one_cycle"),
        ({"ema": 1.0}, "ema is a decay, from 0"),
        ({"clip": -1.0}, "clip is -1.0; expected 0 or more"),
        ({"accumulate": 0}, "accumulate is 0; expected 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; expected 1 or more"),
        ({"patience": -1}, "patience is -1; expected 0 or more"),
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"loss": "huber"}, "loss is 'huber'; use l2 or l1"),
        ({"caption_dropout": 20}, "caption_dropout is a share"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        lora.Settings.of(given)


@pytest.mark.parametrize("kind", [*METHODS, settings.Updates])
def test_every_setting_is_part_of_what_a_resumed_run_is_compared_by(kind):
    usual = kind().identity()
    for name in settings.names(kind):
        changed = replace(kind(), **{name: OTHER[name]}).identity()
        assert changed[name] != usual.get(name), name
    assert not {"hold_out", "warmup", "weight_decay"} & set(usual), "or nothing that was trained before they joined would go on"


@pytest.mark.parametrize("method", METHODS)
def test_whoever_resumes_with_another_setting_is_refused(method, tiles, tmp_path):
    model, usual = tiny_model(prediction_type="v_prediction"), {"steps": 1, "batch_size": 2, "n_vectors": 2, "sheet_every": 0}

    def train(**changes):
        adapters.unload(model)
        METHODS[method](model, tiles, {"blue": "blue tissue"}, seed=0, folder=tmp_path / "training", **usual | changes)

    train()
    for name in (*settings.names(method), *settings.names(settings.Updates)):
        with pytest.raises(ValueError, match="was trained with"):
            train(**{name: OTHER[name]})
    train()  # and what changes nothing is let through
    train(log_every=1, checkpoint_every=1)


def test_settings_are_read_without_torch():
    code = "import sys; from histokit.training import settings; print('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
