"""What a panel says of a picture, and what happens when it shares a model, has none, or runs out of memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import squares
import torch
from blend import Blend
from test_widgets import GUIDANCE, RECIPE, STRENGTH, move, shown, tuner
from tiny import tiny_model

from histokit import runs
from histokit.generate import img2img
from histokit.show import widgets
from histokit.show.panel.slider_panel import Tuner
from histokit.tiles import data


class Reader:
    """PreviewScores that tell the mean grey of each picture, and count."""

    remark = "Nobody judges here."

    def __init__(self, broken=False):
        self.calls, self.broken = [], broken

    def __call__(self, images, jobs):
        self.calls.append(len(images))
        if self.broken:
            raise RuntimeError("no encoder <here>")
        greys = [float(image.mean()) for image in images]
        return [
            SimpleNamespace(good=grey > 150, said=f"grey {grey:.1f} <kept>", rows=[("grey", f"{grey:.1f}", "150 or more")])
            for grey in greys
        ]


def test_what_is_read_of_a_picture_stands_beneath_it_once_it_is_there(root):
    read = Reader()
    panel = tuner(root, readings=read)
    assert panel.reading.value == "" and not read.calls, "nothing is read where nobody looks"
    shown(panel)
    greys = [float(image.mean()) for image in panel.drawn.preview.images]
    assert f"grey {greys[0]:.1f} &lt;kept&gt;" in panel.reading.value and "Nobody judges here." in panel.reading.value
    panel.chooser.value = 2
    assert panel.worker.settle(chores=True) and f"grey {greys[2]:.1f}" in panel.reading.value
    assert read.calls == [3], "all sources are read at once"
    move(panel, strength=0.9)
    assert f"grey {panel.drawn.preview.images[2].mean():.1f}" in panel.reading.value and len(read.calls) == 2
    move(panel, strength=0.5)
    assert f"grey {greys[2]:.1f}" in panel.reading.value and len(read.calls) == 2, "what was read is remembered"


def test_a_reading_that_fails_is_said_and_the_panel_goes_on(root):
    panel = shown(tuner(root, readings=Reader(broken=True)))
    assert "No reading. no encoder &lt;here&gt;" in panel.reading.value
    move(panel, strength=0.9)
    assert panel.drawn.values["strength"] == 0.9 and "grey" not in panel.reading.value


def test_the_reading_of_another_picture_never_stays(root):
    panel = shown(tuner(root, readings=Reader()))
    panel.worker.chores = lambda wishes: None  # idle time never comes
    panel.sliders["strength"].value = 0.9
    assert panel.worker.settle() and panel.drawn.values["strength"] == 0.9
    assert "reading ..." in panel.reading.value and "grey" not in panel.reading.value


def test_a_point_that_cannot_be_drawn_says_so_and_is_not_tried_again(root):
    class Counting(Blend):
        tried = 0

        def sweep(self, strengths, **others):
            self.tried += strengths == [0.2]
            return super().sweep(strengths, **others)

    blend = Counting(steps=4)  # strength 0.2 is no step
    panel = shown(tuner(root, blend))
    assert "no step at all" in panel.row.children[0].children[0].value and "hk-none" in panel.row.children[0].children[0].value
    before = blend.tried
    move(panel, strength=0.75)
    move(panel, strength=0.5)
    assert blend.tried == before > 0


def test_another_seed_brings_its_own_sources(root):
    class Seeded(Blend):
        def __call__(self, *, seed, **settings):
            found = super().__call__(guidance_scale=2.0, **settings)
            order = np.roll(np.arange(3), int(seed))
            found.sources, found.images, found.jobs = (
                found.sources[order],
                found.images[order],
                self.jobs.iloc[order].reset_index(drop=True),
            )
            return found

        def sweep(self, strengths, job=0, **others):
            return np.concatenate([self(strength=strength, **others).images[[job]] for strength in strengths])

    run = SimpleNamespace(recipe="", class_name="fat", step="plain")
    sliders = {"strength": widgets.Limits(*STRENGTH), "seed": widgets.Limits(0, 0, 9, 1)}
    panel = shown(Tuner(Seeded(), run, sliders, patience=0))
    assert panel.chooser.options[0][0].endswith("tile-0.png")
    panel.chooser.value = 1
    move(panel, seed=1)
    assert panel.drawn.values == {"strength": 0.5, "seed": 1} and isinstance(panel.drawn.values["seed"], int)
    assert [name for name, _ in panel.chooser.options] == [
        "1 of 3: case_2/tile-2.png",
        "2 of 3: case_0/tile-0.png",
        "3 of 3: case_1/tile-1.png",
    ]
    assert panel.tile == 1 and "case_0/tile-0.png" in panel.left.value


class Scarce(Blend):
    """Runs out of memory at a high scale; gives memory back when asked."""

    can_rest, rested = True, 0

    def __call__(self, *, strength, guidance_scale, **more):
        if guidance_scale > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")
        return super().__call__(strength=strength, guidance_scale=guidance_scale, **more)

    def rest(self):
        self.rested += 1


def test_out_of_memory_is_said_gives_memory_back_and_the_next_picture_comes(root):
    panel = shown(tuner(root, Scarce()))
    before = panel.right.value
    move(panel, guidance_scale=11)
    assert "The memory does not suffice" in panel.status.value and "hk-bad" in panel.status.value
    assert panel.right.value == before and panel.previewer.rested == 1
    move(panel, guidance_scale=4)
    assert panel.drawn.values["guidance_scale"] == 4 and "10 steps" in panel.status.value
    assert (root / "params/study.yaml").read_text() == RECIPE


def test_the_button_gives_the_gpu_back_where_there_is_one(root):
    panel = shown(tuner(root, Scarce()))
    assert panel.free.layout.display == "" and tuner(root).free.layout.display == "none"
    panel.free.click()
    assert panel.worker.settle() and panel.previewer.rested == 1 and "is free" in panel.status.value
    move(panel, strength=0.9)
    assert panel.drawn.values["strength"] == 0.9, "a drawing takes it again"


def test_escape_cancels_as_the_button_does(root):
    panel = shown(tuner(root))
    panel.asked = object()
    panel.keys._handle_custom_msg({"key": "Escape"}, [])
    assert panel.asked is None and "Stopped" in panel.status.value


@pytest.fixture
def tiles():
    squares.dataset({"train": dict.fromkeys(squares.CLASSES, 6), "val": {}, "test": {}})
    return data.load(runs.start(experiment="exp", step="look"))


def test_two_panels_on_one_model_draw_what_each_draws_alone(tiles, root, monkeypatch):
    model, run = tiny_model(), SimpleNamespace(recipe="", class_name="blue", step="plain")
    jobs = img2img.job_table(model, tiles, {"blue": "blue gland"}, 5, strength=0.5, num_inference_steps=4)
    monkeypatch.setattr(img2img.previews, "kept", lambda name: None)  # everything is drawn
    sliders = {"strength": widgets.Limits(*STRENGTH), "guidance_scale": widgets.Limits(*GUIDANCE)}
    alone = [img2img.previewer(model, jobs, tiles)(strength=0.75, guidance_scale=scale).images for scale in (3.0, 6.0)]
    panels = [shown(Tuner(img2img.previewer(model, jobs, tiles), run, sliders, points=2, patience=0)) for _ in range(2)]
    for _ in range(3):  # both at once, again and again
        for panel, scale in zip(panels, (3.0, 6.0), strict=True):
            panel._go({"strength": 0.75, "guidance_scale": scale})
        assert all(panel.worker.settle() for panel in panels)
        for panel, expected in zip(panels, alone, strict=True):
            assert np.array_equal(panel.drawn.preview.images, expected)
        for panel in panels:
            panel._go({"strength": 0.5, "guidance_scale": 2.0})
    assert all(panel.worker.settle() for panel in panels)
