"""`histokit doctor`: what is there, what is missing and where to put it, and a picture."""

import numpy as np
import pytest
import stubs
import tiny
from PIL import Image

from histokit.core import machine
from histokit.engine import doctor


def test_doctor_names_weights_of_recipes_that_are_missing_and_where_to_put_them(root, capsys):
    stubs.recipe(root, "steps:\n  - 03_img2img: {base_model: weights/sd15}\n  - 06_classifier: {arms: {real: {encoder: weights/uni}}}\n")
    doctor.report()
    out = capsys.readouterr().out
    assert "missing    base model weights/sd15" in out and f"at {root / 'weights/sd15'}" in out
    assert "missing    encoder weights/uni" in out
    assert "versions   histokit" in out and "memory" in out and "kernel     python3 runs this Python" in out


def test_a_base_that_a_recipe_trains_itself_is_not_missing(root):
    steps = (
        "steps:\n  - decoder: {run: 20_pretrain, part: decoder}\n  - 03_img2img: {base_model: decoder}\n  - 02_lora: {base_model: other}\n"
    )
    path = stubs.recipe(root, steps)
    assert ("other", "base model") in list(doctor._named(path)) and ("decoder", "base model") not in list(doctor._named(path))


def test_doctor_says_when_a_gpu_stands_idle(monkeypatch, capsys):
    monkeypatch.setattr(machine, "notice", lambda: "The driver sees a GPU, but torch cannot use it")
    monkeypatch.setattr(doctor, "weights", list)
    assert doctor.report() == 0
    assert "notice     The driver sees a GPU" in capsys.readouterr().out


def test_doctor_says_when_others_keep_the_cores_busy(monkeypatch):
    said = {}
    for busy in (False, True):
        monkeypatch.setattr(machine, "busy", lambda busy=busy: busy)
        said[busy] = dict(doctor.facts())["processor"]
    assert said[True].startswith(said[False]) and "takes longer" in said[True] and "takes longer" not in said[False]


def test_a_base_model_draws_a_sample(root, capsys):
    tiny.write_hub_layout(root / "base")
    doctor.report(str(root / "base"))
    assert "tiles of 32 px" in capsys.readouterr().out
    assert np.asarray(Image.open(root / "outputs/doctor.png")).shape in ((32, 128, 3), (32, 32, 3))  # fewer on a slow machine


def test_a_base_model_that_is_missing_is_refused_with_its_place(root):
    with pytest.raises(FileNotFoundError, match="put a diffusers folder"):
        doctor.sample("weights/none", root / "x.png")


def test_only_the_base_that_is_asked_for_may_be_fetched(root, monkeypatch, capsys):
    from huggingface_hub import constants

    asked = {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "weights", lambda: asked.setdefault("others", constants.HF_HUB_OFFLINE) and [])
    monkeypatch.setattr(doctor, "sample", lambda base, path: str(asked.setdefault(base, constants.HF_HUB_OFFLINE)))
    doctor.report("owner/base")
    assert asked == {"others": True, "owner/base": False}
