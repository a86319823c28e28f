"""The gallery in a real JupyterLab: decisions by keyboard beside a busy cell, what a reload and a lost kernel leave, blind mode."""

import io
import re

import numpy as np
import papermill
import pytest
import stubs
from lab import photograph, wait_until
from PIL import Image
from planted import experiment

from histokit import cli
from histokit.core import files, locks
from histokit.select import reviews


def add_review(experiment, sha256, verdict, reviewer="", note=""):
    return reviews.add_reviews(experiment, [{"sha256": sha256, "verdict": verdict, "reviewer": reviewer, "note": note}])


MADE = 15
START = """\
import json
from histokit import runs
from histokit.select import gallery
from histokit.tiles import data
run = runs.start(**runs.parameters(globals()))
named = lambda rows: rows.assign(label=rows["label"].replace("Polyp", "Polyp <b>x</b>"))
tiles, dataset, made = named(data.load(run)), data.dataset(run), named(data.load(run, step="keep"))
near = data.training(tiles)["tile_id"].iloc[0]
made["scores"] = [json.dumps(json.loads(text) | {"nearest_feature": near}) for text in made["scores"]]"""
SHOW = "gallery.show(run, made, tiles, dataset)"
BUSY = """\
import time
from histokit.core import files
(files.root() / "busy").touch()
while not (files.root() / "free").exists():
    time.sleep(0.01)"""


@pytest.fixture
def study(root):
    """A notebook over 15 synthetic tiles of each of two classes, one of which has a name that looks like HTML; its last cell is busy."""
    experiment(root, {"real": {}}, [4, 4, 6, 5], name="x", seeds=1, made=MADE)
    (root / "params" / "reviews").mkdir()
    stubs.notebook(root, "05_select", [], START, SHOW, BUSY)
    return root


def written(root):
    return files.read_table(root / "params" / "reviews" / "x.csv")


def opened(page, lab, cells):
    """The gallery of the notebook after its first cells have run."""
    page.goto(f"{lab}/lab/tree/notebooks/05_select.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # what is run before is lost
    run(page, cells)
    return waited(page)


def run(page, cells):
    page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
    for _ in range(cells):
        page.keyboard.press("Shift+Enter")


def waited(page):
    shown = page.locator(".hk-gallery")
    shown.locator(".hk-count").wait_for()
    shown.get_by_text("Your name").wait_for()
    page.wait_for_function("[...document.querySelectorAll('.hk-cell img')].every(image => image.naturalWidth)")
    return shown


def pressed(page, keys):
    for key in keys:
        page.keyboard.press(key)


def pixels(page):
    """The picture on the stage as the browser has it: (type, pixels)."""
    source = page.locator(".hk-big").get_attribute("src")
    kind, held = page.evaluate(
        "async at => { const r = await fetch(at), b = await r.blob(); return [b.type, [...new Uint8Array(await b.arrayBuffer())]] }", source
    )
    return kind, np.asarray(Image.open(io.BytesIO(bytes(held))).convert("RGB"))


@pytest.mark.slow
def test_verdicts_by_keyboard_appear_at_once_and_are_written_down(study, lab, page):
    shown = opened(page, lab, cells=3)
    page.keyboard.press("Shift+Enter")
    wait_until((study / "busy").exists)
    count, said = shown.locator(".hk-count"), shown.locator(".hk-said")
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    shown.locator(".hk-frame").click()
    photograph(page, "gallery-start")
    assert shown.locator(".hk-label").inner_text() == "Polyp <b>x</b>" and shown.locator(".hk-person").inner_text() == "not decided"

    # nothing is decided for nobody; a name is typed without deciding anything
    page.keyboard.press("a")
    assert said.inner_text().startswith("Type your name first") and count.inner_text() == f"tile 1 of {2 * MADE}, 0 decided"
    page.keyboard.type("Dr. Ada R. =1")
    assert count.inner_text() == f"tile 1 of {2 * MADE}, 0 decided" and shown.locator(".hk-rater").input_value() == "Dr. Ada R. =1"
    shown.locator(".hk-frame").click()

    # a cell is running and the reviews are held: decisions are shown, and not called saved
    with locks.alone(study / "params" / "reviews"):
        pressed(page, "raaraau")
        assert count.inner_text() == f"tile 6 of {2 * MADE}, 5 decided"
        assert [c for c in shown.locator(".hk-cell").evaluate_all("all => all.map(c => c.className)") if "keep" in c or "reject" in c] == [
            f"hk-cell hk-{what}" for what in ("reject", "keep", "keep", "reject", "keep")
        ]
        assert said.inner_text().startswith("not saved yet: 7") and not (study / "params" / "reviews" / "x.csv").exists()
        shown.get_by_text("the kernel is busy or gone").wait_for()
        photograph(page, "gallery-waiting")
    shown.get_by_text("saved in params/reviews/x.csv").wait_for()
    assert not (study / "free").exists(), "the cell is still running"
    table, keep = written(study), study / "outputs" / "x" / "keep"
    pictures = [keep / name for name in files.read_table(keep / "manifest.csv")["file_name"]]
    shas = [files.sha256(path) for path in pictures]
    assert table["verdict"].tolist() == ["reject", "keep", "keep", "reject", "keep", "keep", "withdrawn"]
    assert table["sha256"].tolist() == [*shas[:6], shas[5]] and set(table["reviewer"]) == {"Dr. Ada R. =1"}

    # a reason is a rejection; a second one joins it
    pressed(page, "25")
    assert shown.locator(".hk-reasons .hk-on").all_inner_texts() == ["2 artefact", "5 blur"]
    wait_until(lambda: written(study)["note"].iloc[-1] == "artefact, blur")

    # the notebook's own keys are quiet, Ctrl+S is the notebook's
    pressed(page, ["b", "x", "m", "d", "d"])
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells and page.locator(".jp-MarkdownCell").count() == 0
    page.keyboard.press("Control+s")
    wait_until(lambda: "widget-view" in (study / "notebooks" / "05_select.ipynb").read_text())

    # orders, the nearest real tile while N is held, all pixels
    first = shown.locator(".hk-big").get_attribute("src")
    shown.locator(".hk-sort").select_option("judge")
    assert (
        shown.locator(".hk-cell").first.get_attribute("data-id") == f"{MADE - 1:04d}"
        and shown.locator(".hk-big").get_attribute("src") == first
    )
    page.keyboard.down("n")
    assert "the nearest real tile" in shown.locator(".hk-why").inner_text() and shown.locator(".hk-big").get_attribute("src") != first
    page.keyboard.up("n")
    assert shown.locator(".hk-big").get_attribute("src") == first
    page.keyboard.press("z")
    wait_until(lambda: pixels(page)[0] == "image/png")
    with Image.open(pictures[5]) as picture:
        np.testing.assert_array_equal(pixels(page)[1], np.asarray(picture))
    photograph(page, "gallery-actual")
    (study / "free").touch()

    # a reload of the page finds everything again, also what another person wrote meanwhile
    add_review("x", shas[9], "keep", "<b>Ben</b>", "see slide 4")
    page.reload()
    shown = waited(page)
    assert shown.locator(".hk-count").inner_text() == f"tile 1 of {2 * MADE}, 7 decided"
    assert shown.locator(".hk-rater").input_value() == "Dr. Ada R. =1"
    shown.locator(".hk-cell").nth(9).click()
    assert shown.locator(".hk-person").inner_text() == "accepted by <b>Ben</b>: see slide 4"
    pressed(page, "ru")  # what somebody else said stands again, in the same words
    wait_until(lambda: written(study)["sha256"].tolist().count(shas[9]) == 3)
    assert reviews.standing("x")[shas[9]] == {"verdict": "keep", "reviewer": "<b>Ben</b>", "note": "see slide 4"}
    photograph(page, "gallery-again")


@pytest.mark.slow
def test_what_the_kernel_could_not_write_before_it_died_is_written_by_the_next_one(study, lab, page):
    shown = opened(page, lab, cells=3)
    shown.locator(".hk-rater").fill("Ada")
    shown.locator(".hk-frame").click()
    page.keyboard.press("a")
    shown.get_by_text("saved in").wait_for()
    with locks.alone(study / "params" / "reviews"):
        pressed(page, "rr")
        assert shown.locator(".hk-said").inner_text().startswith("not saved yet: 2")
        page.locator("[data-jp-item-name=restart] jp-button").click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        shown.locator(".hk-frame").click()
        page.keyboard.press("a")  # nobody hears it
        assert shown.locator(".hk-count").inner_text() == f"tile 5 of {2 * MADE}, 4 decided"
    assert len(written(study)) == 1
    run(page, 3)
    wait_until(lambda: len(written(study)) == 4)
    shown = waited(page)
    shown.get_by_text("saved in").wait_for()
    assert shown.locator(".hk-count").inner_text() == f"tile 1 of {2 * MADE}, 4 decided"
    assert written(study)["verdict"].tolist() == ["keep", "reject", "reject", "keep"]

    # a file that cannot be written is said, and tried again when asked
    held = study / "params" / "reviews" / "x.csv"
    text = held.read_text()
    held.write_text(text.replace("keep", "perhaps"))
    shown.locator(".hk-frame").click()
    pressed(page, ["ArrowRight"] * 4 + ["r"])
    shown.get_by_text("verdict 'perhaps' on tile").wait_for()
    assert shown.locator(".hk-said").inner_text().startswith("not saved yet: 1")
    photograph(page, "gallery-refused")
    held.write_text(text)
    shown.get_by_role("button", name="Try again").click()
    shown.get_by_text("saved in").wait_for()
    assert written(study)["verdict"].tolist() == ["keep", "reject", "reject", "keep", "reject"]


@pytest.mark.slow
def test_blind_nothing_tells_real_from_made_and_no_review_is_written(study, lab, page, capsys):
    shown = opened(page, lab, cells=3)
    shown.locator(".hk-rater").fill("Ada")
    shown.get_by_role("button", name="Blind").click()
    shown.get_by_text("Some of these are real").wait_for()
    shown = waited(page)
    (path,) = (study / "outputs" / "x" / ".galleries").glob("*.json")
    truth = files.read_json(path)["tiles"]
    kinds = [truth[i]["kind"] for i in shown.locator(".hk-cell").evaluate_all("all => all.map(c => c.dataset.id)")]
    assert kinds.count("synthetic") == 2 * MADE and kinds.count("real") > 10
    assert shown.locator(".hk-scores tr").count() == 0 and not shown.locator(".hk-side figure").first.is_visible()
    assert not shown.locator(".hk-sort").is_visible() and shown.locator(".hk-why").inner_text() == ""
    src = shown.locator(".hk-big").get_attribute("src")
    shown.locator(".hk-frame").click()
    page.keyboard.down("s")
    assert shown.locator(".hk-big").get_attribute("src") == src, "no source"
    page.keyboard.up("s")

    # the first ten are all taken for real; how that went is said when asked, or when all are judged
    pressed(page, "a" * 10)
    assert shown.locator(".hk-result").inner_text() == ""
    shown.get_by_role("button", name="How did I do?").click()
    shown.get_by_text(f"Ada told real from synthetic in {kinds[:10].count('real')} of 10 tiles").wait_for()
    photograph(page, "gallery-blind")

    # another person begins anew, and Ada goes on where she was
    shown.locator(".hk-rater").fill("Ben")
    shown.locator(".hk-rater").press("Tab")
    shown.get_by_text(re.compile(r"(?<!\d)0 decided")).wait_for()
    shown.locator(".hk-rater").fill("Ada")
    shown.locator(".hk-rater").press("Tab")
    shown.get_by_text("10 decided").wait_for()
    shown.locator(".hk-cell").nth(10).click()
    pressed(page, ["a" if kind == "real" else "r" for kind in kinds[10:]])
    right = kinds[:10].count("real") + len(kinds) - 10
    shown.get_by_text(f"Ada told real from synthetic in {right} of {len(kinds)} tiles").wait_for()

    # what `histokit import-verdicts` makes of it is the same
    (said,) = path.parent.glob(f"{path.stem}-*.json")
    assert cli.main(["import-verdicts", str(said)]) == 0
    assert shown.locator(".hk-result").inner_text() in capsys.readouterr().out
    assert not (study / "params" / "reviews" / "x.csv").exists()
    shown.get_by_role("button", name="Back to scores").click()
    shown.get_by_text("0 decided").wait_for()


def test_without_a_front_end_it_is_one_line_and_the_notebook_stays_small(study):
    (study / "free").touch()
    out = study / "out.ipynb"
    papermill.execute_notebook(study / "notebooks" / "05_select.ipynb", out, progress_bar=False)
    cells = files.read_json(out)["cells"]
    (shown,) = next(cell["outputs"] for cell in cells if "".join(cell["source"]) == SHOW)
    text = "".join(shown["data"]["text/plain"])
    assert text.startswith(f"{2 * MADE} tiles to look at") and "\n" not in text
    assert out.stat().st_size < 60_000 and "image/jpeg;" not in out.read_text()
