"""07_evaluate and 08_fidelity as a reader gets them: run headless on a planted experiment, the sentence, the figures."""

import json
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import planted
import pytest

from histokit.core import files
from histokit.show import arm_plots, distribution_plots, plots

matplotlib.use("Agg")


def execute(repository, root, name, **parameters):
    """Runs a notebook by papermill; returns results.json, everything the page printed, and the number of its pictures."""
    given = [text for name, value in parameters.items() for text in ("-p", name, str(value))]
    out = root / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", *given]
    quiet = {**os.environ, "HISTOKIT_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(repository / f"notebooks/{name}.ipynb"), str(out)], cwd=root, env=quiet, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", [])]
    printed = "\n".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream" and output["name"] == "stdout")
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return files.read_json(root / "outputs/planted" / name / "results.json"), printed, pictures


@pytest.mark.slow
def test_the_notebook_ends_in_its_sentence_and_writes_the_same(root, repository):
    arms = {"real": {}, "oversampled": {"Polyp": 0.5}, "augmented": {"Polyp": 1.5, "Serrated": 1.5}}
    planted.experiment(root, arms, [3, 9, 10, 9])
    looks, said, shown = execute(repository, root, "08_fidelity", experiment="planted", source="keep", encoder="colour-texture")
    assert shown == 3  # strips, map, closest pairs
    assert {row["class"] for row in looks["probe"]} == {row["class"] for row in looks["likeness"]} == {"Polyp", "Serrated"}
    assert {row["class"] for row in looks["frechet"]} == {"Polyp", "Serrated", "all rare classes"}
    assert all(row["reading"].startswith("n too small to say") for row in looks["frechet"])
    assert looks["structures"]["rows"] == [] and "No invented tissue here." in said
    found, printed, pictures = execute(
        repository, root, "07_evaluate", experiment="planted", fidelity="08_fidelity", resamples=200, demo=True
    )
    assert found["sentence"] in " ".join(printed.split()) and found["sentence"].endswith("demo size, not evidence.")
    assert "augmented finds the rare classes more often than real" in found["sentence"] and "helps" not in found["sentence"]
    assert found["arm"] == "augmented" and found["demo"] is True and found["interval"]["B"] == 200
    few = found["classes"]["Adeno, mucinous"]
    assert few.endswith("too few cases for an interval") and few in " ".join(printed.split())
    assert pictures == 4  # forest, two confusions, changed tiles
    assert "No curve: that takes a budget" in printed and found["worth"] == [] and found["main_arms"] == list(arms)
    assert {row["class"]: row["copies"] for row in found["fidelity"]["classes"]} == {
        name: gate["state"] for name, gate in looks["copies"]["gates"].items()
    }
    assert "These are other tiles" not in printed
    where = files.read_table(root / "outputs/planted/07_evaluate/stain_range.csv").set_index("group")
    assert where.loc[["inside", "outside"], "tiles"].astype(int).sum() == sum(
        f["tiles"] for n, f in found["differences"]["augmented"].items() if n in ("Polyp", "Serrated")
    )
    mcc = {row["arm"]: row["value"] for row in found["reported"] if row["metric"] == "MCC"}
    assert mcc["augmented"] > mcc["real"] and "a calibration error (ECE) is too high by chance" in " ".join(printed.split())
    folder = root / "outputs/planted/07_evaluate"
    table = files.read_table(folder / "differences.csv")
    assert set(table["arm"]) == {"oversampled", "augmented"} and len(files.read_table(folder / "levels.csv")) == 21
    parents = {parent["step"] for parent in files.read_json(folder / "run.json")["parents"]}
    assert parents == {"00_dataset", "06_classifier", "keep", "08_fidelity"}


@pytest.mark.slow
def test_the_notebook_runs_where_there_is_nothing_to_see(root, repository):
    planted.experiment(root, {"real": {}, "oversampled": {}}, [3, 3, 0, 0], seeds=1, made=0, has_cases=False)
    found, printed, pictures = execute(repository, root, "07_evaluate", experiment="planted", resamples=50)
    assert found["sentence"].startswith("No verdict: the rare classes cannot be evaluated (")
    assert "No page has looked at synthetic tiles." in printed and found["fidelity"]["classes"] == [] and pictures == 3


def rows(**changes):
    held = {"arm": "augmented", "baseline": "real", "tiles": 40, "cases": 9, "difference": 0.05, "low": -0.02, "high": 0.12}
    return [held | {"endpoint": e} | changes for e in ("Polyp", "Normal", "tail balanced accuracy", "head balanced accuracy", "macro-F1")]


def test_the_forest_has_rare_classes_first_and_the_head_cost_on_the_same_axis():
    ax = arm_plots.forest(
        pd.DataFrame(rows() + rows(arm="oversampled")), {"Normal": "head", "Polyp": "tail"}, ["real", "oversampled", "augmented"]
    )
    names = [label.get_text().partition("\n")[0] for label in ax.get_yticklabels()]
    assert names == ["Polyp", "tail balanced accuracy", "head balanced accuracy", "Normal"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["augmented", "oversampled"]


def test_of_many_arms_no_two_that_are_shown_share_a_colour():
    names = [f"arm {i}" for i in range(20)]
    shown = ["arm 1", "arm 2", "arm 11", "arm 12"]
    ax = arm_plots.forest(pd.DataFrame([row for name in shown for row in rows(arm=name)]), {"Normal": "head", "Polyp": "tail"}, names)
    assert len({line.get_color() for line in ax.lines if line.get_marker() == "o"}) == 4
    assert len({plots.nth_colour(k) for k in range(20)}) == 20


def test_a_difference_without_an_interval_is_a_hollow_dot():
    ax = arm_plots.forest(pd.DataFrame(rows(low=np.nan, high=np.nan)), {"Normal": "head", "Polyp": "tail"}, ["real", "augmented"])
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == 4 and all(dot.get_markerfacecolor() == "white" for dot in dots)


def test_a_confusion_difference_without_test_tiles_of_a_class_says_so():
    ax = arm_plots.confusion_difference(np.array([[0.1, -0.1], [np.nan, np.nan]]), ["Normal", "Polyp"])
    assert [text.get_text() for text in ax.texts] == ["+10.0", "-10.0", "no test tile"]


def test_strips_name_their_columns_once_and_every_tile_has_its_caption():
    axes = plots.strips(np.zeros((2, 4, 8, 8, 3), np.uint8), [["Polyp", "Polyp", "best", "near"], ["Polyp", "no source", "worst", "near"]])
    assert axes.shape == (2, 4) and axes[0, 2].get_title() == "synthetic\nbest" and axes[1, 1].get_title() == "no source"


def test_the_map_calls_itself_a_picture():
    places = np.random.default_rng(0).normal(size=(12, 2))
    ax = distribution_plots.umap_scatter(places, np.array(["Polyp", "Normal"] * 6), places[:0], np.array([]), ["Polyp"])
    assert "A picture, not a metric" in ax.get_title(loc="left")


@pytest.mark.slow
def test_the_notebook_values_synthetic_tiles_in_real_ones_and_reports_its_controls(root, repository):
    arms = {"real": {}, "augmented": {"Polyp": 0.7, "Serrated": 0.7}, "shuffled": {}}
    arms |= {f"real{n}": {"Polyp": shift, "Serrated": shift} for n, shift in ((30, 0.7), (90, 1.4))}
    specs = {"real": {}, "augmented": {"synthetic": "keep"}, "shuffled": {"synthetic": "keep", "labels": "shuffled"}}
    planted.experiment(root, arms, [9, 9, 12, 11], specs=specs | {f"real{n}": {"real_tiles": n} for n in (30, 90)})
    found, printed, pictures = execute(repository, root, "07_evaluate", experiment="planted", resamples=200)
    assert pictures == 6  # as above, without more arms than are main ones; and every arm, and the curves
    texts = [row["text"] for row in found["worth"]]
    assert len(texts) == 2 and all(" synthetic tiles of augmented" in text and text in " ".join(printed.split()) for text in texts)
    assert len(found["controls"]) == 1 and "shuffled, whose labels are wrong" in found["controls"][0]
    assert found["main_arms"] == ["real", "augmented"]
