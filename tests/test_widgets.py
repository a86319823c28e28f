"""The tuner without a browser: what it draws, says and writes. tests/test_lab.py drives it in JupyterLab."""

import io
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import stubs
from blend import Blend
from patience import HANGS
from PIL import Image

from histokit.core import pictures
from histokit.generate import previews
from histokit.runs import recipe_edit
from histokit.show import widgets
from histokit.show.panel import preview_worker
from histokit.show.panel.panel_html import decimals
from histokit.show.panel.slider_panel import Tuner

RECIPE = "steps:\n  - plain: {strength: 0.5}  # for all\n"
STRENGTH, GUIDANCE = (0.5, 0, 1, 0.05), (2.0, 1, 12, 0.5)


def tuner(root, previewer=None, recipe="params/study.yaml", class_name="fat", **more):
    if recipe and not (root / recipe).exists():
        (root / recipe).write_text(RECIPE)
    run = SimpleNamespace(recipe=recipe, class_name=class_name, step="plain")
    sliders = {"strength": widgets.Limits(*STRENGTH), "guidance_scale": widgets.Limits(*GUIDANCE)}
    return Tuner(previewer or Blend(), run, sliders, **{"across": "guidance_scale", "patience": 0, **more})


def shown(tuned, chores=True):
    """The panel as a front end has it once it is on the page, its sweep drawn."""
    tuned.plain = None
    tuned.widget._view_count = 1
    assert tuned.worker.settle(chores=chores)
    return tuned


def move(tuned, **values):
    """Move sliders, and wait for the picture."""
    for name, value in values.items():
        tuned.sliders[name].value = value
    assert tuned.worker.settle(chores=True)


def test_it_draws_once_at_the_starting_values_and_a_sweep_over_strength(root):
    blend = Blend()
    panel = tuner(root, blend)
    strengths = [call["strength"] for call in blend.calls]
    assert strengths == [0.5, 0.2, 0.4, 0.6, 0.8, 1.0] and {call["guidance_scale"] for call in blend.calls} == {2.0}
    assert [point.true_steps for point in panel.points_at_start] == ["4 steps", "8 steps", "12 steps", "16 steps", "20 steps"]
    data, width = panel.picture()
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.width == width == 8 + 7 * (128 + 8)  # source, start, five points
    assert len(blend.calls) == 6  # showing draws nothing again


def test_a_point_equal_to_the_start_is_shown_once_and_one_without_a_step_is_left_out(root):
    panel = tuner(root, points=2)
    assert [point.values["strength"] for point in panel.points_at_start] == [0.5, 1.0]
    assert panel.picture()[1] == 8 + 3 * (128 + 8)
    panel = tuner(root, Blend(steps=3))
    assert [point.values["strength"] for point in panel.points_at_start] == [0.4, 0.6, 0.8, 1.0]


def test_the_plain_picture_holds_source_and_preview_pixel_for_pixel_at_128_px(root):
    tiles = [(np.full((128, 128, 3), value, np.uint8), "a", "b", False) for value in (10, 200)]
    sheet = np.asarray(Image.open(io.BytesIO(pictures.strip(tiles, "title")[0])))
    assert (sheet[24:152, 8:136] == 10).all() and (sheet[24:152, 144:272] == 200).all()


def test_a_move_draws_once_shows_the_true_steps_and_changes_nothing_else(root):
    blend = Blend()
    panel = shown(tuner(root, blend))
    before, drawn = panel.right.value, len(blend.calls)
    move(panel, strength=0.35000000000000003)
    assert blend.calls[drawn:] == [{"strength": 0.35, "guidance_scale": 2.0}]  # and every point is there already
    assert "7 steps" in panel.status.value and "strength 0.35, guidance scale 2.0" in panel.right.value
    assert panel.right.value != before and "hk-busy" not in panel.widget._dom_classes and panel.stop.disabled


def test_another_source_is_shown_without_drawing_it_and_gets_a_sweep_of_its_own(root):
    blend = Blend()
    panel = shown(tuner(root, blend))
    drawn = len(blend.calls)
    panel.chooser.value = 2
    assert "tile-2" in panel.left.value and "source 3" in panel.title.value and "<b>source 1</b>" in panel.others.value
    assert panel.worker.settle(chores=True) and len(blend.calls) == drawn + 15


# ---- the sweep in idle time


def test_idle_time_fills_the_sweep_the_row_at_hand_first_and_in_it_the_cheapest(root):
    blend = Blend()
    panel = shown(tuner(root, blend, recipe=""))
    later = blend.calls[6:]
    assert [call["strength"] for call in later] == [0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0]
    assert {call["guidance_scale"] for call in later} == {1.5, 7.0} and len(panel.row.children) == 15
    move(panel, guidance_scale=3.0)
    rows = [call["guidance_scale"] for call in blend.calls[16:]]
    assert rows == [3.0] * 6 + [7.5] * 5, "the picture, the row at hand, then the other; that at 2.0 is there already"


def test_a_point_takes_the_sliders_there(root):
    panel = shown(tuner(root, recipe=""))
    cell = panel.row.children[9]
    assert cell.children[1].description == "1.00 / 1.5" and "<img" in cell.children[0].value
    cell.children[1].click()
    assert panel.worker.settle()
    assert (panel.sliders["strength"].value, panel.sliders["guidance_scale"].value) == (1.0, 1.5)
    assert panel.drawn.values == {"strength": 1.0, "guidance_scale": 1.5}


def test_a_pinned_picture_stays_and_brings_its_settings_back(root):
    panel = shown(tuner(root, recipe=""))
    for strength in (0.3, 0.4, 0.5, 0.6, 0.7):
        move(panel, strength=strength)
        panel.pin.click()
    panel.pin.click()  # once is enough
    labels = [cell.children[1].description for cell in panel.pins.children]
    assert labels == ["0.40 / 2.0", "0.50 / 2.0", "0.60 / 2.0", "0.70 / 2.0"]
    panel.pins.children[0].children[1].click()
    assert panel.worker.settle() and panel.drawn.values["strength"] == 0.4


# ---- one thread that draws


class Gate:
    """Lets steps of a drawing through one by one."""

    def __init__(self):
        self.free, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.open = True

    def __call__(self, k, n):
        if not self.open:
            self.begun.release()
            assert self.free.acquire(timeout=HANGS)


def gated(root, **more):
    """A panel whose sweep is there, and the gate of its next drawings."""
    gate = Gate()
    blend = Blend(gate=gate)
    panel = shown(tuner(root, blend, **more))
    gate.open = False
    return panel, blend, gate


def test_ten_quick_moves_are_two_drawings_the_first_and_the_last(root):
    panel, blend, gate = gated(root)
    drawn = len(blend.calls)
    panel.sliders["strength"].value = 0.25
    assert gate.begun.acquire(timeout=HANGS)  # the first is at its first step
    for strength in (0.3, 0.35, 0.45, 0.55, 0.65, 0.7, 0.75, 0.85, 0.9):
        panel.sliders["strength"].value = strength
    gate.open = True
    gate.free.release()
    assert panel.worker.settle()
    assert [call["strength"] for call in blend.calls[drawn:]] == [0.25, 0.9] and panel.drawn.values["strength"] == 0.9
    assert "18 steps" in panel.status.value


def test_moves_within_the_patience_are_one_drawing(root):
    panel = shown(tuner(root, blend := Blend(), patience=30.0))
    drawn = len(blend.calls)
    for strength in (0.3, 0.35, 0.45):
        panel.sliders["strength"].value = strength
    assert len(blend.calls) == drawn and panel.asked is not None
    panel.worker.patience = 0
    panel.sliders["strength"].value = 0.55
    assert panel.worker.settle() and [call["strength"] for call in blend.calls[drawn:]] == [0.55]


def test_a_move_dims_the_old_picture_and_counts_the_steps(root):
    panel, _, gate = gated(root)
    panel.sliders["strength"].value = 0.25
    assert "hk-busy" in panel.widget._dom_classes and not panel.stop.disabled and "drawing strength 0.25" in panel.status.value
    for k in range(1, 3):
        assert gate.begun.acquire(timeout=HANGS)
        assert k == 1 or f"step {k - 1} of 5, " in panel.status.value
        gate.free.release()
    gate.open = True
    gate.free.release()
    assert panel.worker.settle() and "5 steps, " in panel.status.value


def test_cancel_ends_the_drawing_at_its_next_step_and_keeps_the_old_picture(root):
    panel, blend, gate = gated(root)
    before, drawn = panel.right.value, len(blend.calls)
    panel.sliders["strength"].value = 0.95
    assert gate.begun.acquire(timeout=HANGS)
    panel.stop.click()
    assert "Stopped; back at strength 0.50" in panel.status.value and "hk-busy" not in panel.widget._dom_classes
    gate.free.release()  # one step, and no more is asked for
    assert panel.worker.settle() and not gate.begun.acquire(blocking=False)
    assert panel.right.value == before and len(blend.calls) == drawn + 1
    assert panel.sliders["strength"].value == 0.5 and panel.write()[0].startswith("Written"), "what is seen is what is written"


def test_a_drawing_goes_before_the_sweep_which_is_taken_up_again(root):
    gate = Gate()
    blend = Blend(gate=gate)
    panel = tuner(root, blend)
    gate.open = False
    panel.plain = None
    panel.widget._view_count = 1
    assert gate.begun.acquire(timeout=HANGS)  # the sweep is at the first step of a point
    panel.sliders["strength"].value = 0.25
    gate.open = True
    gate.free.release()
    assert panel.worker.settle(chores=True)
    order = [(call["strength"], call["guidance_scale"]) for call in blend.calls[6:]]
    assert order[1] == (0.25, 2.0) and order[2] == order[0] and len(order) == 1 + 1 + 10
    assert all("<img" in cell.children[0].value for cell in panel.row.children)


def test_a_way_is_ended_at_the_picture_that_pleases(root):
    class Way(Blend):
        can_end = True

        def __call__(self, *, updates, on_step=None):
            taken = 0
            for taken in range(1, int(updates) + 1):
                if on_step is not None:
                    self.gate(taken, updates)
                    if on_step(taken, updates, np.full((8, 8, 3), taken, np.uint8)):
                        break
            ended = {"updates": taken} if taken < updates else {}
            return SimpleNamespace(images=self.tiles, sources=None, true_steps=taken, jobs=self.jobs, ended=ended)

    run, gate = SimpleNamespace(recipe="", class_name="fat", step="04"), Gate()
    panel = shown(Tuner(Way(gate=gate), run, {"updates": widgets.Limits(10, 0, 40, 1)}, over="", patience=0))
    gate.open = False
    panel.sliders["updates"].value = 20
    for k in range(3):
        assert gate.begun.acquire(timeout=HANGS)
        assert k == 0 or "on the way" in panel.right.value
        if k == 2:
            panel.enough.click()
        gate.free.release()
    assert panel.worker.settle() and panel.drawn.values == {"updates": 3} and panel.sliders["updates"].value == 3
    assert panel.enough.disabled and "updates 3" in panel.right.value and tuner(root).enough.layout.display == "none"


def test_what_was_drawn_before_comes_at_once(root):
    class Remembering(Blend):
        def known(self, **values):
            return super().__call__(**values) if values in self.calls else None

    panel = shown(tuner(root, blend := Remembering(), patience=30.0))
    drawn = list(blend.calls)
    panel.sliders["strength"].value = 0.4  # a point, which Blend counts as drawn
    assert panel.drawn.values["strength"] == 0.4 and panel.asked is None and "drawn before" in panel.status.value
    assert blend.calls[: len(drawn)] == drawn


def test_every_third_step_shows_a_draft(root):
    class Drafting(Blend):
        def draft(self, x0):
            return np.stack([np.full((8, 8, 3), 9, np.uint8)] * 3)

        def __call__(self, *, on_step=None, **settings):
            look = None if on_step is None else lambda k, n, x0: on_step(k, n, "latents")
            return super().__call__(on_step=look, **settings)

    gate, seen = Gate(), []
    panel = shown(tuner(root, Drafting(gate=gate)))
    panel.right.observe(lambda change: seen.append("draft, step" in change["new"]), "value")
    move(panel, strength=0.5, guidance_scale=3.0)
    assert seen == [True, True, True, False]  # of ten steps, and the picture


def test_colours_of_a_draft_are_those_of_the_tiles():
    import torch

    generator = torch.Generator().manual_seed(0)
    latents, mix = torch.randn(2, 4, 6, 6, generator=generator), torch.tensor([[0.2, 0, 0], [0, 0.2, 0], [0, 0, 0.2], [0.1, 0.1, 0.1]])
    colours = torch.einsum("nchw,cd->ndhw", latents, mix).clamp(-1, 1)
    tiles = ((colours / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    found = previews.draft(previews.fit_draft(latents, tiles), latents[1])
    assert found.shape == (6, 6, 3) and np.abs(found.astype(int) - tiles[1, ::4, ::4]).max() <= 2


def test_an_error_in_showing_does_not_end_the_thread():
    shop, said = preview_worker.PreviewWorker(patience=0), []
    shop.ask(preview_worker.Wish(lambda on_step: 1, lambda found: 1 / 0, said.append))
    assert shop.settle() and isinstance(said[0], ZeroDivisionError)
    shop.ask(preview_worker.Wish(lambda on_step: 2, said.append))
    assert shop.settle() and said[1] == 2


def test_pictures_travel_only_to_a_front_end_that_shows_the_panel(root):
    panel = tuner(root)
    assert (
        panel.right.value == panel.left.value == panel.others.value == ""
        and not panel.row.children
        and "while the kernel" in panel.status.value
    )
    assert shown(panel).right.value.count("data:image/png;base64,") == 2  # the preview, and the source to wipe to
    assert sum("<img" in cell.children[0].value for cell in panel.row.children) == 15


def test_what_cannot_be_drawn_is_said_and_the_old_picture_stays(root):
    class Full(Blend):
        def __call__(self, *, strength, guidance_scale, **more):
            if guidance_scale > 10:
                raise MemoryError("no room")
            return super().__call__(strength=strength, guidance_scale=guidance_scale, **more)

    panel = shown(tuner(root, Full()))
    before = panel.right.value
    move(panel, guidance_scale=11)
    assert "MemoryError: no room" in panel.status.value and "hk-bad" in panel.status.value and panel.right.value == before
    assert panel.write()[0] == "Nothing was written: there is no picture of strength 0.50, guidance scale 11.0."
    assert (root / "params/study.yaml").read_text() == RECIPE
    move(panel, guidance_scale=4)
    assert "10 steps" in panel.status.value and panel.right.value != before


def test_settings_that_cannot_start_raise_as_the_run_would(root):
    with pytest.raises(ValueError, match="no denoising step"):
        tuner(root, Blend(steps=1))


def test_text_to_image_has_no_source_to_show(root):
    class Invented(Blend):
        def __call__(self, **settings):
            found = super().__call__(**settings)
            found.sources, found.jobs = None, found.jobs.assign(tile_id="")
            return found

    panel = shown(tuner(root, Invented()))
    assert (
        panel.left.value == panel.others.value == ""
        and not panel.row.children
        and panel.right.value
        and 8 + (128 + 8) <= panel.picture()[1] < 8 + 2 * (128 + 8)
    )


def test_a_value_outside_its_range_widens_the_range_instead_of_moving(root):
    run = SimpleNamespace(recipe="", class_name="fat", step="plain")
    scale = widgets.widened("guidance_scale", widgets.Limits(15, 1, 12, 0.5))
    panel = Tuner(Blend(), run, {"strength": widgets.Limits(*STRENGTH), "guidance_scale": scale})
    assert panel.sliders["guidance_scale"].value == panel.sliders["guidance_scale"].max == 15


@pytest.mark.parametrize("limits", [(0.5, 1, 0, 0.1), (0.5, 0, 1, 0), (float("nan"), 0, 1, 0.1)])
def test_limits_that_make_no_slider_are_refused(limits):
    with pytest.raises(ValueError, match=r"strength takes \(value, min, max, step\)"):
        widgets.tuner(Blend(), None, strength=limits, guidance_scale=GUIDANCE)


def test_the_sweep_goes_over_a_slider():
    with pytest.raises(ValueError, match="no slider; there is: guidance_scale"):
        widgets.tuner(Blend(), None, guidance_scale=GUIDANCE)


def test_decimals_follow_the_step():
    assert [decimals(step) for step in (1, 5.0, 0.5, 0.05, 0.25, 1e-4, 1 / 3)] == [0, 0, 1, 2, 2, 4, 6]


def test_it_takes_the_previewer_of_img2img(root):
    import squares
    from tiny import tiny_model

    from histokit import runs
    from histokit.generate import img2img
    from histokit.tiles import data

    squares.dataset({"train": dict.fromkeys(squares.CLASSES, 6), "val": {}, "test": {}})
    run = runs.start(experiment="exp", step="plain", class_name="blue")
    model, tiles = tiny_model(), data.load(run)
    jobs = img2img.job_table(model, tiles, {"blue": "blue gland"}, 5, strength=0.5, num_inference_steps=4)
    sliders = {"strength": widgets.Limits(*STRENGTH), "guidance_scale": widgets.Limits(*GUIDANCE)}
    panel = shown(Tuner(img2img.previewer(model, jobs, tiles), run, sliders, across="guidance_scale", patience=0))
    assert [point.true_steps for point in panel.points_at_start] == ["1 step", "2 steps", "3 steps", "4 steps"]  # none at 0.2
    assert panel.names == jobs["tile_id"].tolist()[:4] and "a histology image of blue gland" in panel.status.value
    move(panel, strength=0.75)
    assert "3 steps" in panel.status.value
    panel.chooser.value = 3
    assert panel.worker.settle(chores=True)
    alone = panel.sweep.point({"strength": 0.8, "guidance_scale": 2.0}, panel._job()).image.astype(int)  # as many steps
    assert abs(alone - panel.drawn.preview.images[3]).max() <= 1
    invented = img2img.job_table(model, tiles, {"blue": "blue gland"}, 2, policy="none", num_inference_steps=2)
    panel = shown(Tuner(img2img.previewer(model, invented, tiles), run, sliders, patience=0))
    assert panel.drawn.preview.true_steps == 2 and panel.left.value == "" and not panel.row.children and panel.names[0] == "no source"


# ---- the button


def test_the_button_writes_what_is_shown_under_class_and_step(root):
    panel = shown(tuner(root, class_name="Müll: a"))
    move(panel, strength=0.35)
    panel.button.click()
    assert (root / "params/study.yaml").read_text() == RECIPE + "classes:\n  'Müll: a': {plain: {strength: 0.35, guidance_scale: 2.0}}\n"
    assert "Written into params/study.yaml" in panel.said.value and "hk-plus" in panel.said.value
    assert "This notebook goes on with strength 0.50" in panel.said.value
    assert "says so already" in panel.write()[0]


def test_what_was_written_can_be_undone_but_not_what_was_edited_since(root):
    panel, path = shown(tuner(root)), root / "params/study.yaml"
    move(panel, strength=0.35)
    assert panel.back.layout.display == "none"
    panel.button.click()
    assert panel.back.layout.display == ""
    panel.back.click()
    assert path.read_text() == RECIPE and "is as it was before" in panel.said.value and panel.back.layout.display == "none"
    panel.button.click()
    by_hand = path.read_text() + "# by hand\n"
    path.write_text(by_hand)
    panel.back.click()
    assert path.read_text() == by_hand and "was edited since then; nothing was undone" in panel.said.value


def test_without_a_recipe_the_button_says_so(root):
    panel = tuner(root, recipe="")
    assert panel.button.disabled and panel.button.description == "No recipe" and "opened by hand" in panel.writer.refused()[1]


@pytest.mark.parametrize("name", ["", "all"])
def test_a_run_over_all_classes_writes_into_its_step(root, name):
    panel = shown(tuner(root, class_name=name))
    move(panel, strength=0.35)
    assert panel.write()[0].startswith("Written into params/study.yaml") and panel.writer.place() == "params/study.yaml, plain"
    text = (root / "params/study.yaml").read_text()
    assert text == RECIPE.replace("{strength: 0.5}", "{strength: 0.35, guidance_scale: 2.0}")
    assert panel.write()[0] == "params/study.yaml says so already: strength 0.35, guidance scale 2.0 for all classes."
    panel.writer.undo()
    assert (root / "params/study.yaml").read_text() == RECIPE


def test_a_read_only_recipe_gets_the_lines_to_add_by_hand(root):
    panel = shown(tuner(root))
    (root / "params/study.yaml").chmod(0o444)
    sentence, lines = panel.write()
    assert "read-only; nothing was written. To add by hand:" in sentence
    assert lines == "classes:\n  fat: {plain: {strength: 0.5, guidance_scale: 2.0}}\n"
    assert (root / "params/study.yaml").read_text() == RECIPE


def test_a_disk_that_refuses_is_a_sentence_too(root, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device; nothing was written there", str(path))

    monkeypatch.setattr(recipe_edit.files, "write_text", full)
    sentence, lines = tuner(root).write()
    assert sentence == "params/study.yaml: No space left on device; nothing was written there. To add by hand:" and "fat" in lines


def test_a_recipe_edited_meanwhile_loses_nothing(root):
    path = root / "params/study.yaml"
    panel = shown(tuner(root))
    by_hand = RECIPE + "classes:\n  fat: {plain: {strength: 0.1}}  # by hand\n"
    path.write_text(by_hand)
    panel.button.click()
    assert "now says strength: 0.1" in panel.said.value and "Press again" in panel.said.value and path.read_text() == by_hand
    panel.button.click()
    assert path.read_text() == by_hand.replace("strength: 0.1", "strength: 0.5, guidance_scale: 2.0")


@pytest.mark.parametrize("text, said", [(None, "No such file"), ("steps: [plain\n", "not YAML"), ("steps: [other]\n", "no step")])
def test_a_recipe_that_broke_meanwhile_is_named(root, text, said):
    panel = tuner(root)
    path = root / "params/study.yaml"
    path.unlink() if text is None else path.write_text(text)
    assert said in panel.write()[0]
    assert path.exists() == (text is not None) and (text is None or path.read_text() == text)


def test_a_class_name_that_looks_like_html_is_text(root):
    name = "<img src=x onerror=alert(1)>"
    panel = shown(tuner(root, class_name=name))
    panel.button.click()
    for part in (panel.head, panel.left, panel.right, panel.others, panel.title, panel.said, panel.status):
        assert "<img src=x" not in part.value
    assert "&lt;img src=x onerror" in panel.head.value and "&lt;img src=x" in panel.said.value


# ---- in a notebook


@pytest.mark.slow
def test_headless_the_executed_notebook_holds_a_plain_picture(root):
    import papermill

    start = "import blend\nfrom types import SimpleNamespace\nfrom histokit.show import widgets\n"
    start += "run = SimpleNamespace(recipe='', class_name='<b>fat</b>', step='plain')"
    panel = "widgets.tuner(blend.Blend(), run, strength=(strength, 0, 1, 0.05), guidance_scale=(2.0, 1, 12, 0.5))"
    path = stubs.notebook(root, "03_img2img", ["strength: float = 0.5  # share"], start, panel, "print('strength', strength)")
    done = papermill.execute_notebook(
        path, root / "done.ipynb", {"strength": 0.3}, kernel_name="python3", cwd=stubs.__file__.rpartition("/")[0]
    )
    outputs = done.cells[-2].outputs
    picture = outputs[0]["data"]["image/png"]
    assert picture.startswith("iVBOR") and outputs[0]["data"]["text/plain"] == "<b>fat</b>: strength 0.30, guidance scale 2.0, 6 steps"
    assert "text/html" not in outputs[0]["data"]  # nothing that a viewer would have to trust
    assert "application/vnd.jupyter.widget-view+json" in outputs[1]["data"]
    assert done.cells[-1].outputs[0]["text"] == "strength 0.3\n"
    text = json.dumps(done.metadata.get("widgets", {}))
    assert "data:image" not in text and len(text) < 70_000  # the saved state of the panel holds no pictures
