"""The first panel of 03_img2img in a real JupyterLab: a headless browser moves a slider and presses the button.

Once in a notebook of one cell whose drawing is free, to try everything the panel does, and once in the real notebook on a tiny
base, opened and started as a user would: `histokit open`.
"""

import base64
import json
import re

import folders
import pytest
import stubs
from lab import photograph, serving, wait_until
from tiny import write_hub_layout

from histokit import cli
from histokit.core import files
from histokit.runs import recipe as recipes

pytestmark = [pytest.mark.slow]
RECIPE = """\
# A study of one step.
steps:
  - plain: {run: 03_img2img, strength: 0.5}   # the same for all
classes:
  Müll <b>x</b>: {plain: {strength: 0.5}}   # looked at on Monday

# the end
"""


REAL = """\
# A study of one step, without an adapter.
shared: {dataset: params/datasets/set.yaml, seed: 3}
steps:
  - 00_dataset: {base_model: ""}
  - plain: {run: 03_img2img, base_model: tiny, lora: "", strength: 0.5, num_inference_steps: 20, num_images: 4, encoder: colour-texture}
# the end
"""


def notebook(root, recipe="params/study.yaml"):
    lines = ["class_name: str = 'Müll <b>x</b>'  # class", "strength: float = 0.5  # share", "guidance_scale: float = 2.0  # weight"]
    start = "import blend\nfrom histokit import runs\nfrom histokit.show import widgets\n\nrun = runs.start(**runs.parameters(globals()))"
    gate = f"gate=blend.FileGate({str(root)!r})"
    panel = (
        f"widgets.tuner(blend.Blend(steps=10, {gate}), run, strength=(strength, 0, 1, 0.05), guidance_scale=(guidance_scale, 1, 12, 0.5))"
    )
    path = stubs.notebook(root, "03_img2img", lines, start, panel)
    text = (
        path.read_text().replace("step: str = '03_img2img'", "step: str = 'plain'").replace("recipe: str = ''", f"recipe: str = '{recipe}'")
    )
    path.write_text(text)
    return path


def picture(page):
    """PNG bytes of the preview on the page."""
    source = page.locator(".hk-preview img:first-child").get_attribute("src")
    return base64.b64decode(source.partition("base64,")[2])


def wait_for_another(page, old):
    page.wait_for_function(
        "old => { const i = document.querySelector('.hk-preview img:first-child'); return i && i.src != old }",
        arg="data:image/png;base64," + base64.b64encode(old).decode(),
    )


def filled(page):
    """Waits until idle time has drawn every point of the sweep."""
    page.wait_for_function("document.querySelectorAll('.hk-tuner .hk-blank').length == 0")


def test_a_slider_moves_the_preview_and_the_button_writes_the_recipe(root, lab, page):
    recipe = stubs.recipe(root, RECIPE)
    notebook(root)
    page.goto(f"{lab}/lab/tree/notebooks/03_img2img.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # what is run before is lost
    page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
    for _ in range(3):
        page.keyboard.press("Shift+Enter")
    panel = page.locator(".hk-tuner")
    panel.locator(".hk-preview img:first-child").wait_for()

    # the panel stands where the plain picture was, which folds away; the class name is text
    assert panel.locator(".hk-head").inner_text() == "Müll <b>x</b>"
    assert page.locator(".jp-OutputArea details summary").inner_text().startswith("Müll <b>x</b> at the start: strength 0.50")
    assert page.locator(".jp-OutputArea b", has_text=re.compile("^x$")).count() == 0
    filled(page)
    panel.scroll_into_view_if_needed()
    photograph(page, "start")
    handle, begun, closed = panel.locator(".noUi-handle").first, root / "begun.txt", root / "closed"

    # ten moves while the first is being drawn: it and the last one are drawn, nothing between
    first, before = picture(page), len(begun.read_text().split())
    closed.touch()
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.locator(".hk-tuner.hk-busy").wait_for()
    wait_until(lambda: len(begun.read_text().split()) == before + 1)
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    panel.get_by_text("drawing strength 1.00").wait_for()
    assert picture(page) == first, "the old picture stays until there is another"
    closed.unlink()
    panel.get_by_text("strength 1.00, guidance scale 2.0").first.wait_for()
    panel.get_by_text("10 steps, ").first.wait_for()
    assert begun.read_text().split()[before:] == ["0.55", "1.0"] and picture(page) != first

    # Cancel: the drawing ends at its next step, the picture stays
    shown, before = picture(page), len(begun.read_text().split())
    closed.touch()
    handle.press("ArrowLeft")
    wait_until(lambda: len(begun.read_text().split()) == before + 1)
    panel.get_by_role("button", name="Cancel").click()
    panel.get_by_text("Stopped; back at strength 1.00").wait_for()
    closed.unlink()
    assert picture(page) == shown

    # a point takes the sliders there
    panel.get_by_role("button", name="0.60 / 2.0").click()
    panel.get_by_text("strength 0.60, guidance scale 2.0").first.wait_for()
    panel.get_by_text("6 steps, ").first.wait_for()
    assert picture(page)[:8] == b"\x89PNG\r\n\x1a\n" and len({first, shown, picture(page)}) == 3
    assert len(begun.read_text().split()) == before + 2, "the drawing that was stopped was not gone on with"

    # Escape does what Cancel does, and the focus stays in the panel
    shown, before = picture(page), len(begun.read_text().split())
    closed.touch()
    handle.press("ArrowLeft")
    wait_until(lambda: len(begun.read_text().split()) == before + 1)
    page.keyboard.press("Escape")
    panel.get_by_text("Stopped; back at strength 0.60").wait_for()
    closed.unlink()
    assert picture(page) == shown and handle.evaluate("e => e == document.activeElement")

    # the pointer wipes from the preview to its source
    box = panel.locator(".hk-preview img:first-child").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 20)
    covered = panel.locator(".hk-preview img:nth-child(2)")
    page.wait_for_function(
        "e => getComputedStyle(e).clipPath.startsWith('inset(0px calc(25%') || getComputedStyle(e).clipPath.startsWith('inset(0px 25')",
        arg=covered.element_handle(),
    )
    photograph(page, "wiped")
    page.mouse.move(0, 0)

    # another source tile: another pair, and a sweep of its own
    pair = picture(page)
    panel.locator("select").select_option(index=1)
    wait_for_another(page, pair)
    panel.get_by_text("source 2", exact=False).first.wait_for()
    filled(page)

    # a picture that is pinned stays in sight
    panel.get_by_role("button", name="Pin").click()
    panel.get_by_role("button", name="0.60 / 2.0").nth(1).wait_for()

    # the button writes what is shown, and no other character
    panel.get_by_role("button", name="Write into recipe").click()
    panel.get_by_text("Written into params/study.yaml").wait_for()
    photograph(page, "written")
    expected = "{plain: {strength: 0.6, guidance_scale: 2.0}}   # looked at on Monday"
    assert recipe.read_text() == RECIPE.replace("{plain: {strength: 0.5}}   # looked at on Monday", expected)
    panel.get_by_role("button", name="Undo").click()
    panel.get_by_text("is as it was before").wait_for()
    assert recipe.read_text() == RECIPE
    panel.get_by_role("button", name="Write into recipe").click()
    panel.get_by_text("Written into params/study.yaml").wait_for()

    # an edit by hand meanwhile is shown, kept, and replaced only when asked again
    by_hand = recipe.read_text().replace("strength: 0.6", "strength: 0.15").replace("# the end", "# nearly the end")
    recipe.write_text(by_hand)
    panel.get_by_role("button", name="Write into recipe").click()
    panel.get_by_text("now says strength: 0.15").wait_for()
    assert recipe.read_text() == by_hand

    panel.get_by_role("button", name="Write into recipe").click()
    panel.get_by_text("Written into params/study.yaml").wait_for()
    assert recipe.read_text() == by_hand.replace("0.15", "0.6")

    # where nothing can be drawn the panel says so, keeps the picture, and the button writes nothing
    shown = picture(page)
    handle.press("Home")
    wait_for_another(page, shown)  # strength 0 is the source
    source, text = picture(page), recipe.read_text()
    handle.press("ArrowRight")
    panel.get_by_text("Nothing drawn for strength 0.05").wait_for()
    panel.get_by_role("button", name="Write into recipe").click()
    panel.get_by_text("Nothing was written").wait_for()
    assert picture(page) == source and recipe.read_text() == text
    photograph(page, "refused")

    # without its kernel the panel says that it is dead
    page.get_by_title("Restart the kernel", exact=False).first.click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".hk-tuner.jupyter-widgets-disconnected").wait_for()
    assert "kernel of this panel is gone" in panel.evaluate("e => getComputedStyle(e, '::before').content")
    photograph(page, "restarted")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # a server does not end well while a kernel begins


def test_the_real_notebook_opened_from_its_recipe_writes_the_slider_into_it(root, page):
    folders.class_folders(root / "data", ("common", "rare"), cases=6, tiles=3)
    classes = "{common: {role: head}, rare: {role: tail}}"
    files.write_text(
        root / "params" / "datasets" / "set.yaml", f"root: data\nclasses: {classes}\ncase_pattern: (?P<case_id>P\\d+)\ntile_px: 32\n"
    )
    write_hub_layout(root / "tiny")
    recipe = stubs.recipe(root, REAL)
    assert cli.main(["run", str(recipe), "--only", "00_dataset"]) == 0

    with serving(root, "histokit", "open", str(recipe), "plain", "--no-browser") as address:
        copy = root / "outputs" / "study" / ".open" / f"plain-{files.slug('rare')}.ipynb"
        page.goto(f"{address}/lab/tree/{copy.relative_to(root)}?reset")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # what is run before is lost
        page.locator(".jp-Notebook .jp-Cell").first.click()
        cells = [cell.get("id") for cell in files.read_json(copy)["cells"]]
        for _ in range(cells.index("tuner") + 1):
            page.keyboard.press("Shift+Enter")
        panel = page.locator(".hk-tuner")
        panel.locator(".hk-preview img:first-child").wait_for()

        panel.scroll_into_view_if_needed()
        assert panel.locator(".hk-head").inner_text() == "rare"
        first = picture(page)
        panel.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        wait_for_another(page, first)
        panel.get_by_text("strength 0.55, guidance scale 2.0, inference steps 20").first.wait_for()
        panel.get_by_text("11 steps, ").first.wait_for()
        filled(page)
        photograph(page, "real")

        panel.get_by_role("button", name="Write into recipe").click()
        panel.get_by_text("Written into params/study.yaml").wait_for()

    assert (
        recipe.read_text() == REAL + "classes:\n  rare: {plain: {strength: 0.55, guidance_scale: 2.0, num_inference_steps: 20, seed: 3}}\n"
    )
    found = recipes.read(recipe)
    assert recipes.parameters(found, found.steps["plain"], "rare")["strength"] == 0.55


def test_the_notebook_of_the_test_is_what_a_runner_would_run(root):
    from histokit.runs import notebooks

    assert set(notebooks.declared(notebook(root))) >= {"experiment", "step", "recipe", "seed", "class_name", "strength"}
    assert json.loads(notebook(root).read_text())["metadata"]["kernelspec"]["name"] == "python3"  # or Lab asks for a kernel
