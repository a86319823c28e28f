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


def test_doctor_survives_what_it_checks_and_says_for_which_recipe_something_is_missing(root, monkeypatch, capsys):
    from histokit.vision import encoders

    def broken(name, device="cpu"):
        raise RuntimeError("Error(s) in loading state_dict") if name == "weights/odd" else FileNotFoundError("not here")

    monkeypatch.setattr(encoders, "load", broken)
    stubs.recipe(root, "steps:\n  - 06_classifier: {arms: {real: {encoder: weights/odd}}}\n", "mine")
    stubs.recipe(root, "shared: {dataset: params/datasets/to_come.yaml, base_model: owner/base}\nsteps: [03_img2img]\n", "template")
    assert doctor.report() == 1
    out = capsys.readouterr().out
    assert "missing    encoder weights/odd for params/mine.yaml" in out and "cannot be read (RuntimeError: Error(s)" in out
    assert "owner/base" not in out, "a recipe whose tiles nobody has described is nobody's need"


def test_a_folder_of_the_hubs_cache_is_its_snapshot_and_a_cut_download_is_refused(root):
    from histokit.diffusion import pretrained

    cache = root / "models--owner--base"
    one, other = (cache / "snapshots" / name for name in ("aaa", "bbb"))
    tiny.write_hub_layout(one)
    assert pretrained.locate(str(cache)) == one
    other.mkdir()
    with pytest.raises(FileNotFoundError, match="2 versions; name one of its snapshots"):
        pretrained.locate(str(cache))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")
    assert pretrained.locate(str(cache)) == other
    (cache / "blobs").mkdir()
    (cache / "blobs" / "12ab.incomplete").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="12ab.incomplete, a download that was cut off"):
        pretrained.locate(str(cache))
