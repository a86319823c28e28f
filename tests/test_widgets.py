"""The tuner without a browser: what it draws, says and writes. tests/test_lab.py drives it in JupyterLab."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import stubs
from blend import Blend
from PIL import Image

from histokit import amend, pictures, widgets

RECIPE = "steps:\n  - plain: {strength: 0.5}  # for all\n"
STRENGTH, GUIDANCE = (0.5, 0, 1, 0.05), (2.0, 1, 12, 0.5)


def tuner(root, previewer=None, recipe="params/study.yaml", class_name="fat", **more):
    if recipe and not (root / recipe).exists():
        (root / recipe).write_text(RECIPE)
    run = SimpleNamespace(recipe=recipe, class_name=class_name, step="plain")
    sliders = {"strength": widgets.Limits(*STRENGTH), "guidance_scale": widgets.Limits(*GUIDANCE)}
    return widgets.Tuner(previewer or Blend(), run, sliders, **more)


def shown(panel):
    """The panel as a front end has it once it is on the page."""
    panel.plain = None
    panel.widget._view_count = 1
    return panel


def test_it_draws_once_at_the_starting_values_and_a_ladder_over_strength(root):
    blend = Blend()
    panel = tuner(root, blend)
    strengths = [call["strength"] for call in blend.calls]
    assert strengths == [0.5, 0.2, 0.4, 0.6, 0.8, 1.0] and {call["guidance_scale"] for call in blend.calls} == {2.0}
    assert [rung.true_steps for rung in panel.climbed["rungs"]] == ["4 steps", "8 steps", "12 steps", "16 steps", "20 steps"]
    data, width = panel.picture()
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.width == width == 8 + 7 * (128 + 8)  # source, start, five rungs
    assert len(blend.calls) == 6  # showing draws nothing again


def test_a_rung_equal_to_the_start_is_shown_once_and_one_without_a_step_is_left_out(root):
    panel = tuner(root, rungs=2)
    assert [rung.value for rung in panel.climbed["rungs"]] == [0.5, 1.0]
    assert panel.picture()[1] == 8 + 3 * (128 + 8)
    panel = tuner(root, Blend(steps=3))
    assert [rung.value for rung in panel.climbed["rungs"]] == [0.4, 0.6, 0.8, 1.0]


def test_the_plain_picture_holds_source_and_preview_pixel_for_pixel_at_128_px(root):
    tiles = [(np.full((128, 128, 3), value, np.uint8), "a", "b", False) for value in (10, 200)]
    sheet = np.asarray(Image.open(io.BytesIO(pictures.strip(tiles, "title")[0])))
    assert (sheet[24:152, 8:136] == 10).all() and (sheet[24:152, 144:272] == 200).all()


def test_a_move_draws_once_shows_the_true_steps_and_changes_nothing_else(root):
    blend = Blend()
    panel = shown(tuner(root, blend))
    before, ladder = panel.right.value, panel.row.value
    panel.sliders["strength"].value = 0.35000000000000003
    assert blend.calls[6:] == [{"strength": 0.35, "guidance_scale": 2.0}]
    assert "7 steps" in panel.status.value and "strength 0.35, guidance scale 2.0" in panel.right.value
    assert panel.right.value != before and panel.row.value == ladder and "hk-busy" not in panel.widget._dom_classes
    assert all(not slider.continuous_update for slider in panel.sliders.values())


def test_another_source_is_shown_without_drawing_and_the_ladder_says_it_is_older(root):
    blend = Blend()
    panel = shown(tuner(root, blend))
    panel.chooser.value = 2
    assert len(blend.calls) == 6 and "tile-2" in panel.left.value and "before the last change" in panel.title.value
    panel.again.click()
    assert len(blend.calls) == 11 and "before" not in panel.title.value and "source 3" in panel.title.value


def test_pictures_travel_only_to_a_front_end_that_shows_the_panel(root):
    panel = tuner(root)
    assert panel.right.value == panel.left.value == panel.row.value == "" and "while the kernel" in panel.status.value
    assert shown(panel).right.value.count("data:image/png;base64,") == 1 and panel.row.value.count("<img") == 5


def test_what_cannot_be_drawn_is_said_and_the_old_picture_stays(root):
    class Full(Blend):
        def __call__(self, *, strength, guidance_scale):
            if guidance_scale > 5:
                raise MemoryError("no room")
            return super().__call__(strength=strength, guidance_scale=guidance_scale)

    panel = shown(tuner(root, Full()))
    before = panel.right.value
    panel.sliders["guidance_scale"].value = 6
    assert "MemoryError: no room" in panel.status.value and "hk-bad" in panel.status.value and panel.right.value == before
    assert panel.write()[0] == "Nothing was written: there is no picture of strength 0.50, guidance scale 6.0."
    assert (root / "params/study.yaml").read_text() == RECIPE
    panel.sliders["guidance_scale"].value = 4
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
    assert panel.left.value == panel.row.value == "" and panel.right.value and 8 + (128 + 8) <= panel.picture()[1] < 8 + 2 * (128 + 8)


def test_a_value_outside_its_range_widens_the_range_instead_of_moving(root):
    run = SimpleNamespace(recipe="", class_name="fat", step="plain")
    sliders = {"strength": widgets.Limits(*STRENGTH), "guidance_scale": widgets.Limits(15, 1, 12, 0.5)}
    panel = widgets.Tuner(Blend(), run, sliders)
    assert panel.sliders["guidance_scale"].value == panel.sliders["guidance_scale"].max == 15


@pytest.mark.parametrize("limits", [(0.5, 1, 0, 0.1), (0.5, 0, 1, 0), (float("nan"), 0, 1, 0.1)])
def test_limits_that_make_no_slider_are_refused(limits):
    with pytest.raises(ValueError, match=r"strength takes \(value, min, max, step\)"):
        widgets.tuner(Blend(), None, strength=limits, guidance_scale=GUIDANCE)


def test_the_ladder_goes_over_a_slider():
    with pytest.raises(ValueError, match="no slider; there is: guidance_scale"):
        widgets.tuner(Blend(), None, guidance_scale=GUIDANCE)


def test_decimals_follow_the_step():
    assert [widgets._decimals(step) for step in (1, 5.0, 0.5, 0.05, 0.25, 1e-4, 1 / 3)] == [0, 0, 1, 2, 2, 4, 6]


def test_it_takes_the_previewer_of_img2img(root):
    import squares
    from tiny import tiny_model

    from histokit import data, img2img, runs

    squares.dataset({"train": dict.fromkeys(squares.CLASSES, 6), "val": {}, "test": {}})
    run = runs.start(experiment="exp", step="plain", class_name="blue")
    model, tiles = tiny_model(), data.load(run)
    jobs = img2img.job_table(model, tiles, {"blue": "blue gland"}, 5, strength=0.5, num_inference_steps=4)
    sliders = {"strength": widgets.Limits(*STRENGTH), "guidance_scale": widgets.Limits(*GUIDANCE)}
    panel = shown(widgets.Tuner(img2img.previewer(model, jobs, tiles), run, sliders))
    assert [rung.true_steps for rung in panel.climbed["rungs"]] == ["1 step", "2 steps", "3 steps", "4 steps"]  # none at 0.2
    assert panel.names == jobs["tile_id"].tolist()[:4] and "a histology image of blue gland" in panel.status.value
    panel.sliders["strength"].value = 0.75
    assert "3 steps" in panel.status.value
    panel.chooser.value = 3
    panel.again.click()
    alone = panel.climbed["rungs"][2].image.astype(int)  # strength 0.8, as many steps
    assert abs(alone - panel.drawn.preview.images[3]).max() <= 1
    invented = img2img.job_table(model, tiles, {"blue": "blue gland"}, 2, policy="none", num_inference_steps=2)
    panel = shown(widgets.Tuner(img2img.previewer(model, invented, tiles), run, sliders))
    assert panel.drawn.preview.true_steps == 2 and panel.left.value == panel.row.value == "" and panel.names[0] == "no source"


# ---- the button


def test_the_button_writes_what_is_shown_under_class_and_step(root):
    panel = shown(tuner(root, class_name="Müll: a"))
    panel.sliders["strength"].value = 0.35
    panel.button.click()
    assert (root / "params/study.yaml").read_text() == RECIPE + "classes:\n  'Müll: a': {plain: {strength: 0.35, guidance_scale: 2.0}}\n"
    assert "Written into params/study.yaml" in panel.said.value and "hk-plus" in panel.said.value
    assert "This notebook goes on with strength 0.50" in panel.said.value
    assert "says so already" in panel.write()[0]


def test_without_a_recipe_the_button_says_so(root):
    panel = tuner(root, recipe="")
    assert panel.button.disabled and panel.button.description == "No recipe" and "opened by hand" in panel._cannot_write()[1]


@pytest.mark.parametrize("name", ["", "all"])
def test_a_run_over_all_classes_has_no_value_per_class(root, name):
    panel = tuner(root, class_name=name)
    assert panel.button.disabled and "belong to the step plain" in panel._cannot_write()[1]


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

    monkeypatch.setattr(amend.files, "write_text", full)
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
    for part in (panel.head, panel.left, panel.right, panel.row, panel.title, panel.said, panel.status):
        assert "<img src=x" not in part.value
    assert "&lt;img src=x onerror" in panel.head.value and "&lt;img src=x" in panel.said.value


# ---- in a notebook


@pytest.mark.slow
def test_headless_the_executed_notebook_holds_a_plain_picture(root):
    import papermill

    start = "import blend\nfrom types import SimpleNamespace\nfrom histokit import widgets\n"
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
    assert "data:image" not in text and len(text) < 60_000  # the saved state of the panel holds no pictures
