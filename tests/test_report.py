"""The page about a finished experiment: what it holds, that it holds nothing that can run, and what `--share` leaves out."""

import base64
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import squares

from histokit import cli, runs
from histokit.arms import predictions
from histokit.core import files
from histokit.evaluate import error_analysis, question, verdict
from histokit.fidelity import closest_pairs, copy_detection
from histokit.runs import places
from histokit.show import report, report_tables
from histokit.tiles import data

EVIL = '<img src=x onerror="alert(1)">'


def finished(root, names=("real", "augmented"), label="blue", looked=True):
    """Write 00 to 08 of an experiment; returns the folder of 07. `looked`: whether 07 names 08."""
    squares.dataset()
    zero = places.folder("exp", "00_dataset")
    files.write_json(zero / "preflight.json", {"warnings": ["blue: 3 test cases carry counts and a range"]})
    squares.synthetic({label: 4}, step="keep", class_name=label, method="img2img", prompt=EVIL)
    six = runs.start(experiment="exp", step="06_classifier", arms={"real": {}, "augmented": {"synthetic": "keep"}})
    six.parent("00_dataset"), six.parents("keep")
    tiles = data.load(six)
    test = tiles[tiles["split"].eq("test")].reset_index(drop=True)
    dataset = data.dataset(six)
    y = test["label"].map(dataset.label_id).to_numpy()
    for arm in names:
        for s in range(2):
            p = np.full((len(test), 3), 0.1)
            called = y if arm == "augmented" else np.where((y == 2) & (np.arange(len(y)) % 2 == 0), 0, y)
            p[np.arange(len(test)), called] = 0.8
            table = test[["tile_id", "case_id", "group", "split"]].assign(arm=arm, seed=s, gen_seed=0, y=y)
            table = pd.concat([table, pd.DataFrame(p, columns=[f"p_{c}" for c in dataset.classes])], axis=1)
            files.write_table(six.path(arm, str(s), "predictions.parquet"), table)
            files.write_json(six.path(arm, str(s), "model.json"), {"arm": arm, "seed": s})
    row = {"mode": "linear", "encoder": "mini-sup", "sampler": "natural", "loss": "cross_entropy", "augment": "none", "updates": 9}
    trials = [
        row | {"arm": arm, "synthetic": "keep" * (arm == "augmented"), "n_real": 15, "n_synthetic": 4, "n_recoloured": 0} for arm in names
    ]
    six.finish({"trials": trials, "counts": [], "val_recall": [], "remarks": []})

    seven = runs.start(experiment="exp", step="07_evaluate")
    seven.parent("00_dataset")
    specs = {"real": {}, "augmented": {"synthetic": "keep"}}
    answers = predictions.read(seven.parent("06_classifier"), dataset.classes, list(specs))
    made = data.load(seven, step="keep")
    m, parts = verdict.measure(answers, dataset, resamples=20), question.cast(specs, answers.arms)
    files.write_table(seven.path("differences.csv"), verdict.difference_table(verdict.differences(m, "real")))
    files.write_table(seven.path("confusion.csv"), error_analysis.confusions(answers))
    files.write_table(seven.path("tiles.csv"), error_analysis.changes(answers, dataset.roles, parts))
    none = copy_detection.Report(
        pd.DataFrame(columns=copy_detection.ROW),
        {"blue": copy_detection.memorisation.Gate("uncalibrated", [EVIL])},
        pd.DataFrame(),
        {"blue": []},
    )
    near = {"tile_id": made["tile_id"].head(3), "nearest": data.training(tiles)["tile_id"].iloc[0], "space": "mini-sup", "distance": 0.1}
    pairs = pd.DataFrame(near | {"class": "blue", "other_space": "outline", "other_distance": 0.2, "rank": 0, "pull": np.nan})
    eight = runs.start(experiment="exp", step="08_fidelity")
    eight.parent("00_dataset"), eight.parents("keep")
    files.write_table(eight.path("closest_pairs.csv"), pairs[closest_pairs.PAIR])
    told = {"probe": [{"class": "blue", "encoder": "mini-sup", "auroc": 0.97}], "signs_said": ["blue: the labels are doubtful"]}
    eight.finish(told | {"likeness": [], "copies": none.plain()})
    points = [
        ("blue", kind, arm, n, 0.5, 0.4, 0.6)
        for kind, arm, n in (("real", "real", 5), ("synthetic", "real", 0), ("synthetic", "augmented", 4))
    ]
    points = pd.DataFrame(points, columns=["class", "kind", "arm", "tiles", "value", "low", "high"])
    files.write_table(seven.path("tile_curves.csv"), points)
    stained = error_analysis.groups(answers, np.where(np.arange(len(y)) % 2, "inside", "outside"), dataset.tail)
    files.write_table(seven.path("stain_range.csv"), stained)
    abroad = {"lines": ["On another house, blue: found 1 of 2 with augmented."]}
    more = {"external": abroad, "worth": [{"text": f"blue: worth 3 [1 to 5] {EVIL}"}], "fidelity": {"step": "08_fidelity" * looked}}
    looks = {"plan": "a", "opened_before": 3, "plans": ["a", "b"], "recipes": [""]}
    seven.finish(verdict.conclude(m, parts, dataset, made, specs=specs) | more | {"looks": looks})
    return seven.folder


def text_of(page):
    return re.sub(r"<[^>]+>", " ", re.sub(r'src="data:[^"]+"', "", page))


def test_the_page_says_it_all_and_needs_no_network(root):
    place = finished(root)
    page = report.build("exp")
    results = files.read_json(place / "results.json")
    said = text_of(page)
    for wanted in (
        results["sentence"][:60],
        "blue: 3 test cases carry counts",
        "1 draw of the rare tiles",
        "opened 3 times before, with 2 plans",
        "newly found",
        "blue: worth 3 [1 to 5]",
        "inside",
        "the labels are doubtful",
        "On another house, blue",
        "and in the external tiles",
        "0.97",
    ):
        assert wanted in said.replace("&#39;", "'"), wanted
    assert 'alt="The closest pairs of a synthetic tile and a training tile"' in page
    assert "The same in all: mode linear, encoder mini-sup" in said and "synthetic tiles" in said
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    figures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(figures) >= 5 and all(base64.b64decode(figure).startswith(b"\x89PNG") for figure in figures)
    assert plt.get_fignums() == []


def test_what_05_turned_down_is_said_in_words_also_of_an_earlier_version(root):
    finished(root)
    keep = places.find("exp", "keep", "blue")
    rows = [{"status": "rejected", "why": why, "tiles": 3, "share": 0.5} for why in ("judge", "stained unlike real tiles")]
    files.write_json(keep / "results.json", {"acceptance": rows})
    said = text_of(report.build("exp"))
    assert "judge disagrees" in said and "stained unlike real tiles" in said


def test_a_verdict_without_a_look_at_the_tiles_says_that_nobody_asked_for_copies(root):
    finished(root, looked=False)
    said = text_of(report.build("exp"))
    assert "Nobody looked whether the synthetic tiles are copies" in said and "the labels are doubtful" not in said
    assert "Nobody looked" not in text_of(report.build("exp") if finished(root) else "")


def test_what_looks_like_html_is_shown_as_text(root):
    finished(root)
    page = report.build("exp")
    assert EVIL not in page and "&lt;img src=x onerror=" in page


def test_a_shared_page_holds_no_real_tile_and_no_name(root):
    finished(root)
    page = report.build("exp", share=True)
    whole = text_of(page)
    for secret in ("test/blue", "train-", "test-", str(root), "outputs/", 'recipe": ', "exp"):
        assert secret not in whole.replace("expected", "").replace("export", "").replace("explore", ""), secret
    assert "Left out to share this page" in whole and page.count("data:image") < report.build("exp").count("data:image")


def test_the_command_and_an_experiment_that_is_not_finished(root, capsys):
    finished(root)
    assert cli.main(["report", "exp"]) == 0 and (root / "outputs" / "exp" / "report.html").stat().st_size > 10_000
    assert cli.main(["report", "exp", "--share"]) == 0 and "report-share.html" in capsys.readouterr().out
    assert cli.main(["report", "other"]) == 2
    assert "no finished 07_evaluate in outputs/other" in capsys.readouterr().err


def test_a_record_number_in_name_picture_and_table_does_not_survive_sharing(root, monkeypatch):
    """Planted where hospitals leave it: file name, case, patient, slide, group, and EXIF and text of the picture."""
    from PIL import Image, PngImagePlugin

    number, plain = "MRN4711077", squares.row

    def row(folder, file_name, pixels, **facts):
        real = facts.get("source") == "real"
        found = plain(folder, f"{number}/{file_name}" if real else file_name, pixels, **facts)
        if not real:
            return found
        exif, text = Image.Exif(), PngImagePlugin.PngInfo()
        exif[0x010E] = text_value = number
        text.add_text("Patient", text_value)
        Image.fromarray(pixels).save(folder / found["file_name"], exif=exif, pnginfo=text)
        named = dict.fromkeys(("case_id", "patient", "slide", "group"), f"{number}-{facts['case_id']}")
        return found | named | {"sha256": files.sha256(folder / found["file_name"])}

    monkeypatch.setattr(squares, "row", row)
    place = finished(root)
    page = report.build("exp", share=True)
    raw = page.encode() + b"".join(base64.b64decode(found) for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", page))
    assert number.encode() not in raw, "the shared page"
    assert number in (place / "tiles.csv").read_text(), "or nothing was planted"


def test_a_class_made_rare_on_purpose_is_named_with_what_is_left():
    tiles = pd.DataFrame({"label": ["a"] * 6 + ["b"] * 2, "split": "train", "case_id": list("ppqqrr") + ["s", "s"]})
    tiles["use"] = ["labelled", "withheld", "labelled", "withheld", "withheld", "withheld", "labelled", "labelled"]
    assert report_tables.rare_on_purpose(tiles) == (
        "Made rare on purpose, to be able to check: a (a budget leaves 2 of 6 training tiles, of 2 cases)."
    )
    assert report_tables.rare_on_purpose(tiles.assign(use="labelled")) == ""
