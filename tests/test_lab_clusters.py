"""Clusters are named in a real JupyterLab: a person types, saves, is refused, and finds the names again."""

import pytest
import stubs
from lab import photograph, wait_until

from histokit.core import files
from histokit.morphology import cluster_names

pytestmark = [pytest.mark.slow]
CELL = """\
import numpy as np
from histokit.morphology import captions, clusters
from histokit.show.panel import cluster_naming

rng = np.random.default_rng(0)
feats = np.concatenate([np.eye(3, 8)[i] * 6 + rng.normal(0, 0.4, (n, 8)) for i, n in enumerate((30, 20, 10))])
pixels = np.concatenate([np.full((n, 48, 48, 3), c, np.uint8) for n, c in zip((30, 20, 10), (200, 90, 230))])
held = clusters.fit(feats, ["a"] * 60, 3, pca=4)
shown = clusters.examples(held, feats, ["a"] * 60)
cluster_naming.ClusterNaming("exp", held, shown, pixels[shown["row"]], captions.words(held, "number_words")).show()
"""


def test_names_are_typed_saved_refused_and_found_again(root, lab, page):
    stubs.notebook(root, "names", [], CELL)
    page.goto(f"{lab}/lab/tree/notebooks/names.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
    for _ in range(2):
        page.keyboard.press("Shift+Enter")
    fields, save = page.locator(".hk-cluster-name input"), page.locator(".hk-save-names")
    save.wait_for()
    assert fields.count() == 3 and [fields.nth(i).get_attribute("placeholder") for i in range(3)] == ["zero", "one", "two"]
    assert page.locator(".jp-OutputArea img").count() == 3

    fields.nth(0).fill("thick walls")
    fields.nth(2).fill("<b>pale</b>")
    save.click()
    page.get_by_text("Not saved: '<b>pale</b>' holds signs").wait_for()
    assert not cluster_names.file_of("exp").exists(), "all or none"

    fields.nth(2).fill("pale")
    save.click()
    page.get_by_text("Saved 2 in params/cluster_names/exp.csv").wait_for()
    photograph(page, "names")
    table = files.read_table(cluster_names.file_of("exp"))
    assert table["name"].tolist() == ["thick walls", "pale"] and table["cluster"].astype(int).tolist() == [0, 2]
    save.click()
    page.get_by_text("Nothing has changed.").wait_for()

    fields.nth(2).fill("")  # taken back
    save.click()
    wait_until(lambda: len(files.read_table(cluster_names.file_of("exp"))) == 3)
    page.keyboard.press("Escape")
    page.locator(".jp-Notebook .jp-InputArea-editor").nth(1).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("document.querySelectorAll('.hk-cluster-name input')[0]?.value == 'thick walls'")
    assert [page.locator(".hk-cluster-name input").nth(i).input_value() for i in range(3)] == ["thick walls", "", ""]
