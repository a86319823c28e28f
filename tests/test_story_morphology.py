"""Morphology prompts, headless: clusters, captions, both arms, made tiles asked where they fall, shards, tiles without labels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import folders
import pandas as pd
import pytest
import test_story
from tiny import write_hub_layout

from histokit import cli
from histokit.core import files
from histokit.runs import places

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

RECIPE = """\
shared:
  dataset: params/datasets/set.yaml
  base_model: tiny
steps:
  - 00_dataset: {base_model: "", encoder: colour-texture}
  - judge: {run: 06_classifier, arms: {judge: {}}, seeds: 1, steps: 10, batch_size: 8, encoder: mini-ssl}
  - 10_morphology_prompts: {encoder: colour-texture, scope: per_label, k: 2, junk: false, options: {least: 2}}
  - class_alone:
      {run: 10_morphology_prompts, clusters: 10_morphology_prompts, prompt: "a tile of {label}", junk: false, options: {least: 2}}
  - new_words: {run: 10_morphology_prompts, clusters: 10_morphology_prompts, words: learned, junk: false, options: {least: 2}}
  - enriched:
      {run: 02_lora, class_name: all, captions: 10_morphology_prompts, mode: full, steps: 4, batch_size: 2, options: {sheet_every: 4}}
  - label_only: {run: 02_lora, class_name: all, captions: class_alone, mode: full, steps: 4, batch_size: 2, options: {sheet_every: 4}}
  - learned: {run: 02_lora, class_name: all, captions: new_words, steps: 4, batch_size: 2, rank: 2, options: {sheet_every: 4}}
  - from_enriched:
      {run: 03_img2img, class_name: all, lora: enriched, captions: 10_morphology_prompts, policy: none, num_images: 6,
      num_inference_steps: 3}
  - from_label:
      {run: 03_img2img, class_name: all, lora: label_only, captions: class_alone, policy: none, num_images: 6, num_inference_steps: 3}
  - from_learned:
      {run: 03_img2img, for: [rare], lora: learned, captions: new_words, policy: same_class, num_images: 4, num_inference_steps: 4}
  - missed:
      {run: 03_img2img, for: [rare], lora: enriched, captions: 10_morphology_prompts, policy: none, num_images: 4, num_inference_steps: 2,
      options: {budget: {recall_of: judge}}}
  - keep:
      {run: 05_select, class_name: all, source: from_enriched, judge: judge, encoder: picture, clusters: 10_morphology_prompts,
      thresholds: {judge_rank: 3, cluster: 1}}
  - 08_fidelity: {source: from_enriched, encoder: picture, clusters: 10_morphology_prompts, beside: {label only: from_label}}
"""
UNLABELLED = """\
shared:
  dataset: params/datasets/loose.yaml
  base_model: tiny
steps:
  - 00_dataset: {base_model: "", encoder: colour-texture}
  - 10_morphology_prompts: {encoder: colour-texture, k: 3, junk: false, options: {least: 2}}
  - 02_lora: {class_name: all, captions: 10_morphology_prompts, steps: 2, batch_size: 2, rank: 2}
  - 03_img2img: {class_name: all, captions: 10_morphology_prompts, policy: none, num_images: 3, num_inference_steps: 2}
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("morphology")
    folders.class_folders(root / "data", ("common", "other", "rare"), cases=6, tiles=3)
    folders.class_folders(root / "loose", ("x",), cases=10, tiles=4)
    files.write_text(root / "params" / "datasets" / "set.yaml", test_story.DATASET.format(folder="data"))
    files.write_text(
        root / "params" / "datasets" / "loose.yaml", "root: loose\nunlabelled: x\ncase_pattern: (?P<case_id>P\\d+)\ntile_px: 32\n"
    )
    write_hub_layout(root / "tiny")
    (root / "params" / "story.yaml").write_text(RECIPE)
    test_story.tell(root)
    return root


@pytest.fixture
def at(told, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(told))
    return told / "outputs" / "story"


def table(at, step, name):
    found = files.read_table(at / step / f"{name}.csv")
    return found.astype({"prompt_id": int}) if "prompt_id" in found else found


def test_captions_are_of_training_tiles_and_both_arms_learn_from_the_same(at):
    split = table(at, "00_dataset", "manifest").set_index("tile_id")["split"]
    arms = [table(at, step, "captions") for step in ("10_morphology_prompts", "class_alone")]
    assert set(arms[0]["tile_id"].map(split)) == {"train"} and arms[0]["tile_id"].tolist() == arms[1]["tile_id"].tolist()
    assert arms[0]["cluster"].tolist() == arms[1]["cluster"].tolist()
    prompts = table(at, "10_morphology_prompts", "prompts")
    assert prompts["tiles"].sum() == len(arms[0]) and prompts["tiles"].ge(2).all() and len(prompts) > 3
    assert len(table(at, "class_alone", "prompts")) == 3
    cards = [files.read_json(at / step / "all" / "adapter.json") for step in ("enriched", "label_only")]
    assert cards[0]["training"] == cards[1]["training"] and cards[0]["unet"] is True


def test_clusters_answer_for_training_tiles_what_was_written_down(at):
    from histokit.morphology import clusters
    from histokit.tiles import data

    tiles = data.located(table(at, "00_dataset", "manifest"), data.read_frozen(at / "00_dataset" / "dataset.json"), at)
    held, written = clusters.load(at / "10_morphology_prompts"), table(at, "10_morphology_prompts", "captions")
    tiles = tiles.set_index("tile_id", drop=False).loc[written["tile_id"]]
    found = pd.DataFrame(
        {"label": tiles["label"].tolist(), "found": clusters.assign_tiles(held, tiles).cluster, "written": written["cluster"]}
    )
    large = found.groupby(["label", "found"])["found"].transform("size").ge(2)  # smaller ones count for a neighbour
    assert found[large]["found"].tolist() == found[large]["written"].tolist() and large.sum() >= 0.8 * len(found)


def test_a_whole_unet_loads_in_stock_diffusers(at):
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel.from_pretrained(at / "enriched" / "all", subfolder="unet")
    base = UNet2DConditionModel.from_pretrained(at.parent.parent / "tiny", subfolder="unet", variant="fp16")
    moved = [(a.float() - b.float()).abs().max() > 1e-4 for a, b in zip(net.parameters(), base.parameters(), strict=True)]
    assert sum(map(bool, moved)) > 0.9 * len(moved)


def test_learned_words_come_with_the_adapter_and_into_the_prompts(at):
    words = {path.stem for path in (at / "learned" / "all" / "tokens").glob("*.safetensors")}
    prompts = table(at, "new_words", "prompts")
    assert words == {text.rpartition(" ")[2].strip("<>") for text in prompts["text"]} and len(words) >= 4
    made = files.read_table(next((at / "from_learned").glob("*/manifest.csv")))
    assert made["token_sha"].ne("").all() and set(made["prompt"]) <= set(prompts["text"])


def test_each_prompt_is_asked_for_equally_often_and_sources_have_it(at):
    prompts = table(at, "10_morphology_prompts", "prompts")
    made = files.read_table(at / "from_enriched" / "all" / "manifest.csv")
    counts = made.groupby(["label", "prompt"]).size()
    rare = prompts[prompts["label"].eq("rare")]  # captions are of all classes, and "all" means the rare ones
    assert (
        set(made["label"]) == {"rare"}
        and set(made["prompt"]) == set(rare["text"])
        and (counts.groupby("label").max() - counts.groupby("label").min()).max() <= 1
    )
    ids = [json.loads(text)["prompt_id"] for text in made["settings"]]
    assert made["prompt"].tolist() == prompts.set_index("prompt_id").loc[ids, "text"].tolist()
    learned = files.read_table(next((at / "from_learned").glob("*/manifest.csv")))
    own = table(at, "new_words", "captions").set_index("tile_id")["text"]
    assert [own[json.loads(sources)[0]] for sources in learned["sources"]] == learned["prompt"].tolist()


def test_a_tile_that_falls_elsewhere_is_turned_down_for_it(at):
    kept = files.read_table(at / "keep" / "all" / "manifest.csv")
    scores = pd.DataFrame([json.loads(text) for text in kept["scores"]])
    other = scores["cluster_asked"].ne(scores["cluster"])
    assert other.any() and scores["cluster_asked"].ge(0).all()
    assert kept["reason"].str.contains('"cluster"').tolist() == other.tolist()


def test_mode_collapse_is_told_beside_the_other_arm_and_real_tiles(at):
    found = pd.DataFrame(files.read_json(at / "08_fidelity" / "results.json")["clusters"])
    assert set(found["source"]) == {"real", "from_enriched", "label only"} and found["clusters"].between(0, 1).all()
    assert found.groupby("class")["tiles"].nunique().eq(1).all()


def started(told, notebook, given, shard):
    """A worker at a job, and where its answer will lie."""
    name = str(told / f"{notebook.stem}-{shard.replace('/', 'of')}")
    job = {"notebook": str(notebook), "target": f"{name}.ipynb", "answer": f"{name}.json", "root": str(told)}
    process = subprocess.Popen(
        [sys.executable, "-m", "histokit.engine.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=told, text=True, env=os.environ | {"HISTOKIT_ROOT": str(told), "HISTOKIT_NOTEBOOK": str(notebook)},
    )  # fmt: skip
    process.stdin.write(json.dumps(job | {"parameters": given | {"shard": shard}}) + "\n")
    process.stdin.flush()
    return process, f"{name}.json"


def ended(process, answer):
    """The answer of a worker; its stdin stays open until then: closed, a job ends."""
    said = process.stdout.read()
    assert process.wait() == 0, said
    return files.read_json(answer)


def test_two_processes_make_the_files_of_one(told, at, repository):
    """Shards run side by side, then one run gathers them: pictures, manifest and key as if it had made all itself."""
    home = told / "outputs" / "story-g1"  # a replicate: finds what it does not make in story
    given = files.read_json(at / "from_enriched" / "all" / "run.json")["parameters"] | {"experiment": "story-g1"}
    notebook = repository / "notebooks" / "03_img2img.ipynb"
    both = [started(told, notebook, given, shard) for shard in ("0/2", "1/2")]
    assert [ended(*one) for one in both] == [{}, {}]
    place = home / "from_enriched" / "all"
    parts = [files.read_table(place / "shards" / k / "manifest.csv") for k in "01"]
    assert not set(parts[0]["tile_id"]) & set(parts[1]["tile_id"]) and min(map(len, parts)) > 0
    assert ended(*started(told, notebook, given, "0/1")) == {}
    whole = files.read_table(at / "from_enriched" / "all" / "manifest.csv")
    gathered = files.read_table(place / "manifest.csv")
    assert gathered.drop(columns="run_id").equals(whole.drop(columns="run_id"))
    assert not (place / "shards").exists() and places.read(place)["notes"]["images_made"] == 0
    assert places.read(place)["key"] == places.read(at / "from_enriched" / "all")["key"]


def test_shards_of_the_clusters_embed_and_the_whole_run_does_the_rest(told, at, repository):
    given = files.read_json(at / "10_morphology_prompts" / "run.json")["parameters"] | {"experiment": "story-g2"}
    notebook, place = repository / "notebooks" / "10_morphology_prompts.ipynb", told / "outputs" / "story-g2" / "10_morphology_prompts"
    both = [started(told, notebook, given, shard) for shard in ("0/2", "1/2")]
    assert [ended(*one)["error"] for one in both] == ["Finished", "Finished"]
    parts = [place / "shards" / k for k in "01"]
    assert all(places.read(part)["status"] == "done" and not (part / "captions.csv").exists() for part in parts)
    embedded = [files.read_json(part / "results.json")["embedded"] for part in parts]
    assert min(embedded) > 0 and sum(embedded) == len(table(at, "10_morphology_prompts", "captions"))
    assert ended(*started(told, notebook, given, "0/1")) == {}
    for name in ("captions.csv", "prompts.csv", "new_words.json"):
        assert (place / name).read_bytes() == (at / "10_morphology_prompts" / name).read_bytes()
    assert places.read(place)["key"] == places.read(at / "10_morphology_prompts")["key"]


def test_the_layout_of_the_original_loads_with_datasets(told, at, capsys):
    from datasets import load_dataset

    cli.main(["export", str(at / "10_morphology_prompts"), "-o", "captioned"])
    assert "patients" in capsys.readouterr().out
    folder = told / "captioned"
    loaded = load_dataset("imagefolder", data_dir=str(folder / "dataset_balanced" / "image"), cache_dir=str(told / ".hf"))
    prompts = table(at, "10_morphology_prompts", "prompts")
    assert {"text", "label", "label_name", "prompt_idx"} <= set(loaded["train"].column_names)
    assert set(loaded["train"]["text"]) <= set(prompts["text"])
    lines = files.read_table(folder / "metadata" / "df_train.csv")
    assert len(lines) == len(loaded["train"]) == len(table(at, "10_morphology_prompts", "captions"))
    ids = files.read_json(folder / "metadata" / "text_2_promptidx.json")
    assert ids == dict(zip(prompts["text"], prompts["prompt_id"], strict=True))
    held = files.read_table(folder / "metadata" / "df_prompts.csv")
    assert set(held["split"]) == {"train", "val", "test"} and held.groupby("group_id")["split"].nunique().eq(1).all()
    assert cli.main(["export", str(at / "10_morphology_prompts"), "-o", "captioned"]) != 0  # a folder that is there stays


def test_tiles_without_labels_go_the_whole_way(told, at):
    (told / "params" / "story.yaml").write_text(UNLABELLED)
    try:
        test_story.tell(told, "-p", "experiment=loose")
    finally:
        (told / "params" / "story.yaml").write_text(RECIPE)
    home = told / "outputs" / "loose"
    prompts = files.read_table(home / "10_morphology_prompts" / "prompts.csv")
    assert set(prompts["label"]) == {"tissue"} and len(prompts) == 3
    made = files.read_table(home / "03_img2img" / "all" / "manifest.csv")
    assert set(made["label"]) == {"tissue"} and made["prompt"].tolist() == sorted(prompts["text"])
    assert Path(home / "02_lora" / "all" / "adapter.json").is_file()
