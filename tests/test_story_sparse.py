"""The story on data as it comes: classes of one case, without validation tiles, without test tiles, and of which nothing is kept."""

import json
import os
import re

import folders
import pandas as pd
import pytest
import test_story
from tiny import write_hub_layout

from histokit.core import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

RECIPE = """\
shared:
  dataset: params/datasets/set.yaml
  base_model: tiny
steps:
  - 00_dataset: {encoder: colour-texture}
  - judge: {run: 06_classifier, arms: {judge: {}}, seeds: 1, steps: 10, batch_size: 8, encoder: mini-ssl}
  - 02_lora: {class_name: all, joint_tokens: true, steps: 4, batch_size: 2, rank: 2, options: {validate_every: 4, sheet_every: 0}}
  - 03_img2img:
      {class_name: all, lora: 02_lora, policy: same_class, num_images: 6, num_inference_steps: 8, encoder: colour-texture}
  - 05_select: {class_name: all, source: 03_img2img, judge: judge, encoder: colour-texture}
  - 04_guided: {class_name: all, classifier: judge, num_images: 2, num_inference_steps: 3, updates: 1, confidence: 0.9}
  - blind: {run: 21_latent_classifier, noise: none, steps: 2, batch_size: 4}
  - 21_latent_classifier: {steps: 4, batch_size: 4, beside: blind}
  - pushed:
      {run: 04_guided, class_name: all, lora: "", method: latent, classifier: 21_latent_classifier, prompt: "", guidance_scale: 1.0,
      num_images: 2, num_inference_steps: 3}
  - 06_classifier:
      arms: {real: {}, oversampled: {sampler: balanced}, augmented: {sampler: balanced, synthetic: 05_select}}
      seeds: 2
      steps: 10
      batch_size: 8
      encoder: colour-texture
  - 08_fidelity: {source: 05_select, encoder: colour-texture}
  - 07_evaluate: {arms_of: 06_classifier, fidelity: 08_fidelity, resamples: 50}
"""
CASES = {  # class -> splits of its cases, two tiles each
    "common": ("train",) * 5 + ("val",) * 3 + ("test",) * 3,
    "other": ("train",) * 5 + ("val",) * 3 + ("test",) * 3,
    "single": ("train",),
    "unvalidated": ("train", "train", "test", "test"),
    "untested": ("train", "train", "val"),
    "scarce": ("train", "train", "val", "test"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    rows = []
    for label, splits in CASES.items():
        for case, split in enumerate(splits):
            for tile in range(2):
                name = f"{label}/{label[:3]}{case}_{tile}.png"
                folders.save(root / "data" / name, folders.texture(len(rows)))
                rows.append({"file": name, "label": label, "case": f"{label[:3]}{case}", "split": split})
    pd.DataFrame(rows).to_csv(root / "data" / "tiles.csv", index=False)
    roles = ", ".join(f"{name}: {{role: {'head' if name in ('common', 'other') else 'tail'}}}" for name in CASES)
    columns = "{file_name: file, label: label, case_id: case, split: split}"
    files.write_text(
        root / "params" / "datasets" / "set.yaml",
        f"root: data\ntable: tiles.csv\ncolumns: {columns}\nclasses: {{{roles}}}\ntile_px: 32\n",
    )
    write_hub_layout(root / "tiny")
    (root / "params" / "story.yaml").write_text(RECIPE)
    return root, test_story.tell(root)


def test_every_step_runs_through_and_the_verdict_names_what_it_cannot_be_about(told):
    root, text = told
    home = root / "outputs" / "story"
    assert all(files.read_json(path)["status"] == "done" for path in home.rglob("run.json"))
    sentence = files.read_json(home / "07_evaluate" / "results.json")["sentence"]
    assert sentence in text
    made = files.read_table(next((home / "05_select").rglob("manifest.csv")))
    kept = made["status"].eq("kept").groupby(made["label"]).sum()
    assert len(kept) == 4 and kept.eq(0).any() and "no synthetic tile of" in sentence, "or nothing is asked of a class without kept tiles"


def test_no_page_shows_a_number_that_is_none(told):
    root, _ = told
    for path in sorted((root / "outputs" / "story").rglob("*.ipynb")):
        pages = "".join(
            text
            for cell in json.loads(path.read_text())["cells"]
            for output in cell.get("outputs", [])
            for text in [*output.get("text", []), *output.get("data", {}).get("text/html", [])]
        )
        assert not re.search(r"\bnan\b ?%|\bnan\b points|\[nan", pages, re.IGNORECASE), f"{path.name} shows a number that is none"
        assert "Traceback" not in pages and "RuntimeWarning" not in pages, path.name


def test_the_report_of_such_data_can_be_built(told, monkeypatch):
    from histokit.show import report

    root, _ = told
    monkeypatch.setenv("HISTOKIT_ROOT", os.fspath(root))
    page = report.build("story")
    assert re.search(r"<td[^>]*>\s*single\s*</td>", page) and not re.search(r"\bnan\b ?%", page, re.IGNORECASE)
