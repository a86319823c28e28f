"""Does a made tile fall where it was asked to, and are all forms of a class there? Asked of tiles whose form is planted."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import squares

from histokit import runs
from histokit.core import files
from histokit.metrics import distributions
from histokit.morphology import captions, cluster_fidelity, clusters, prompt_table
from histokit.show import cluster_plots
from histokit.tiles import data
from histokit.vision import encoders, features

PX = squares.PX


def pale(seed):
    return squares.tile("blue", seed) // 2 + 128


def form(kind, seed):
    """A blue tile of one of two forms: dark, or pale."""
    return pale(seed) if kind else squares.tile("blue", seed)


@pytest.fixture
def study(root):
    """Blue tiles of two forms, four dark and four pale, clustered and captioned; the finished step is 10_morphology_prompts."""
    squares.dataset({"train": {"red": 4, "blue": 8}, "val": {"red": 2, "blue": 2}, "test": {"red": 1, "blue": 1}}, classes=["red", "blue"])
    from PIL import Image

    for i in range(8):
        Image.fromarray(form(i % 2, 500 + i)).save(root / "tiles" / f"train/blue/{i}.png")
    manifest = root / "outputs" / "exp" / "00_dataset" / "manifest.csv"
    table = files.read_table(manifest)
    table["sha256"] = [files.sha256(root / "tiles" / name) for name in table["file_name"]]
    files.write_table(manifest, table)
    run = runs.start(experiment="exp", step="10_morphology_prompts")
    tiles = data.training(data.load(run))
    encoder = encoders.load("colour-texture")
    feats, labels = features.embed(encoder, tiles), tiles["label"].tolist()
    held = clusters.fit(feats, labels, {"blue": 2, "red": 1}, scope="per_label", least=2, facts=clusters.encoder_facts(encoder))
    found = held.assign(feats, labels).cluster
    called = captions.words(held, "letters")
    prompts, ids = captions.prompts(labels, found, lambda label, k: called[label, k], {"red": "red", "blue": "blue"}, "{label} {cluster}")
    clusters.save(run.path(), held)
    files.write_table(run.path("prompts.csv"), prompts)
    files.write_table(run.path("captions.csv"), captions.table(tiles, found, ids, prompts).assign(weight=1.0))
    files.write_json(run.path("new_words.json"), {})
    run.finish({})
    blue = prompts[prompts["label"].eq("blue")].set_index("cluster")["text"]
    return pd.Series(found, index=tiles["tile_id"]), blue


def made(texts, kinds, step="made"):
    """A finished step of blue tiles under these prompts, of these forms."""
    squares.synthetic({"blue": len(kinds)}, step=step, pixels={"blue": [form(kind, 900 + i) for i, kind in enumerate(kinds)]})
    path = files.root() / "outputs" / "exp" / step / "manifest.csv"
    files.write_table(path, files.read_table(path).assign(prompt=texts))
    return data.load(runs.start(experiment="exp", step="look"), step=step)


def test_a_tile_of_the_form_that_was_asked_for_is_a_hit(study):
    found, blue = study
    dark, light = found["train/blue/0.png"], found["train/blue/1.png"]
    assert dark != light
    rows = made([blue[dark], blue[dark], blue[light], blue[light], "another prompt"], [0, 1, 1, 1, 0])
    run = runs.start(experiment="exp", step="05_select")
    placed = cluster_fidelity.placed(run, "10_morphology_prompts", rows)
    assert placed["asked"].tolist() == [dark, dark, light, light, -1]
    assert placed["cluster"].tolist() == [dark, light, light, light, dark]
    assert placed["hit"].tolist()[:4] == [1, 0, 1, 1] and np.isnan(placed["hit"].iloc[4])
    table = prompt_table.Called.read(run, "10_morphology_prompts").table
    row = cluster_fidelity.fidelity(placed, table, data.load(run)).iloc[0]
    assert row["tiles"] == 4 and row["hit"] == 0.75 and row["by chance"] == pytest.approx(0.5)
    assert row["low"] < 0.75 < row["high"]
    crosses = cluster_fidelity.crosses(placed, "blue")
    assert crosses.loc[dark].to_dict() == {0: 1, 1: 1} and crosses.loc[light, light] == 2
    assert cluster_plots.crosses({"blue": crosses})[0].get_xlabel() == "falls into"


def test_one_form_over_and_over_is_told_beside_real_tiles(study):
    found, blue = study
    both, one = made(blue[found["train/blue/0.png"]], [0, 1, 0, 1, 0, 1], "both"), made(blue.iloc[0], [0] * 6, "one")
    run = runs.start(experiment="exp", step="08_fidelity")
    reached = cluster_fidelity.collapse(run, "10_morphology_prompts", data.load(run), {"both": both, "one": one})
    table = reached.set_index("source")
    assert table["tiles"].eq(6).all() and set(reached["class"]) == {"blue"}  # red has no made tile
    assert table.loc["one", "clusters"] == 0.5 and table.loc["one", "real_mass"] == 0.5
    assert table.loc["both", "clusters"] == 1 and table.loc["real", "clusters"] == 1
    assert table.loc["one", "vendi"] < table.loc["both", "vendi"]
    held = clusters.load(run.parent("10_morphology_prompts", ""))
    feats = held.space(features.embed(encoders.load("colour-texture"), one))
    assert table.loc["one", "vendi"] == pytest.approx(distributions.vendi(feats))  # all of six are drawn each time
    (said,) = cluster_fidelity.remarks(reached)
    assert said.startswith("blue: 6 tiles of one reach 50% of its clusters, as many real ones 100%")
    axes = cluster_plots.mode_collapse(reached)
    assert [len(ax.patches) for ax in axes] == [3, 3]


def test_real_tiles_passed_off_as_made_are_all_hits_where_small_forms_count_for_larger_ones(root):
    """A global clustering whose small cells of a class have no prompt: tiles that follow their prompts score 1, not less than chance."""
    squares.dataset({"train": {"red": 10, "blue": 10}, "val": {"red": 2, "blue": 2}}, classes=["red", "blue"])
    run = runs.start(experiment="exp", step="10_morphology_prompts")
    tiles = data.training(data.load(run))
    encoder = encoders.load("colour-texture")
    feats, labels = features.embed(encoder, tiles), tiles["label"].tolist()
    held = clusters.fit(feats, labels, 8, least=1, facts=clusters.encoder_facts(encoder))
    raw = held.assign(feats, labels).cluster
    counted = captions.gathered(held, raw, feats, labels, least=4)
    assert (raw != counted).any()
    prompts, ids = captions.prompts(labels, counted, lambda label, k: str(k), {"red": "red", "blue": "blue"}, "{label} {cluster}")
    clusters.save(run.path(), held)
    files.write_table(run.path("prompts.csv"), prompts)
    files.write_table(run.path("captions.csv"), captions.table(tiles, counted, ids, prompts).assign(weight=1.0))
    files.write_json(run.path("new_words.json"), {})
    run.finish({})
    look = runs.start(experiment="exp", step="08_fidelity")
    text = dict(zip(prompts["prompt_id"], prompts["text"], strict=True))
    passed_off = tiles.assign(prompt=[text[i] for i in ids], root="data")
    placed = cluster_fidelity.placed(look, "10_morphology_prompts", passed_off)
    assert placed["hit"].eq(1).all() and placed["cluster"].tolist() == counted.tolist()


def test_tiles_made_by_captions_of_other_clusters_are_asked_nothing(study):
    _, blue = study
    rows = made([blue.iloc[0]] * 3, [0, 0, 0])
    record = files.root() / "outputs" / "exp" / "made" / "run.json"
    run = runs.start(experiment="exp", step="05_select")
    assert cluster_fidelity.placed(run, "10_morphology_prompts", rows)["asked"].ge(0).all()
    other = runs.start(experiment="exp", step="other_prompts")
    held = clusters.load(run.parent("10_morphology_prompts", ""))
    moved = {key: centroids + 1 for key, centroids in held.centroids.items()}
    clusters.save(other.path(), dataclasses.replace(held, centroids=moved))
    other.finish({})
    told = files.read_json(record)
    for given, asked in (({"captions": "10_morphology_prompts"}, True), ({"captions": "other_prompts"}, False)):
        files.write_json(record, told | {"parameters": told["parameters"] | given})
        placed = cluster_fidelity.placed(run, "10_morphology_prompts", rows)
        assert placed["asked"].ge(0).all() == asked and placed["hit"].notna().all() == asked


def test_without_a_step_nothing_is_asked(study):
    run = runs.start(experiment="exp", step="08_fidelity")
    assert cluster_fidelity.collapse(run, "", data.load(run), {}).empty


def test_a_budget_and_captions_of_a_finished_step(study):
    _, blue = study
    run = runs.start(experiment="exp", step="03_img2img", class_name="blue")
    called = prompt_table.Called.read(run, "10_morphology_prompts")
    assert called.classes(["blue"], "blue") == ["blue"] and set(called.classes([], "all")) == {"red", "blue"}
    assert called.classes(["red"], "all", rare=["red", "green"]) == ["red"]
    with pytest.raises(ValueError, match="no tile of 'green' has a caption"):
        called.classes(["green"], "green")
    settings = prompt_table.applied(run, "10_morphology_prompts", {"budget": {blue.iloc[0]: 3, blue.iloc[1]: 1}, "fill_to": 5})
    shares = settings["prompts"].set_index("text")["share"]
    assert shares[blue.iloc[0]] == 0.75 and settings["fill_to"] == 5 and "budget" not in settings
    assert prompt_table.applied(run, "", {"fill_to": 5}) == {"fill_to": 5}
    with pytest.raises(ValueError, match="give `captions`"):
        prompt_table.applied(run, "", {"budget": "equal"})
    with pytest.raises(FileNotFoundError, match="10_morphology_prompts"):
        prompt_table.Called.read(run, "00_dataset")
