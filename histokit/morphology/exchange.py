"""Captioned tiles as the original study lays them out, so that its tools and the trainers of diffusers read them.

FOLDER/metadata/ holds the tables, FOLDER/dataset_balanced/image/SPLIT/ the tiles with metadata.jsonl, which
`datasets.load_dataset("imagefolder", data_dir=...)` loads, captions in the column `text`. These are patients' tiles.
"""

import json
import os
import shutil
from pathlib import Path

import pandas as pd

from histokit.core import files
from histokit.morphology import clusters, prompt_table
from histokit.runs import places
from histokit.tiles import data

VERSION = 1
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def write(step, folder, classes=(), *, jsonl=False, accept_uncalibrated=False):
    """Write a finished 10_morphology_prompts into a new folder; returns the table of all tiles in it, of some classes or of all.

    Training tiles with their captions; validation and test tiles of the captioned classes with those of the nearest cluster that has a
    prompt of their class. The options are of made tiles, and refused.

    Raises FileExistsError where the folder is there, FileNotFoundError where the step is not finished or a tile is gone.
    """
    if jsonl or accept_uncalibrated:
        raise ValueError("--jsonl and --accept-uncalibrated are about made tiles, and these are captioned real ones")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a folder that does not")
    record = places.read(step)
    if record is None or record["status"] != "done" or not (step / prompt_table.TABLES[0]).is_file():
        raise FileNotFoundError(f"{step} is no finished step of 10_morphology_prompts")
    home = files.root() / "outputs" / record["experiment"]
    dataset = data.read_frozen(home / "00_dataset" / "dataset.json")
    manifest = next(home / "00_dataset" / name for name in ("manifest.csv", "manifest.parquet") if (home / "00_dataset" / name).is_file())
    tiles = data.located(files.read_table(manifest), dataset, home)
    captions, prompts = (files.read_table(step / name).astype({"prompt_id": int}) for name in prompt_table.TABLES)
    if lost := [name for name in classes if name not in set(prompts["label"])]:
        raise ValueError(f"no tile of {lost[0]!r} has a caption; there are some of {', '.join(dict.fromkeys(prompts['label']))}")
    if classes:
        prompts = prompts[prompts["label"].isin(list(classes))]
        captions = captions[captions["prompt_id"].isin(prompts["prompt_id"])]
    table = _table(clusters.load(step), tiles, captions, prompts, dataset)
    if table.empty:
        raise ValueError(f"no tile of {step} is in the manifest of 00 any more; run 10_morphology_prompts again")
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write(draft, table, captions, prompts, dataset)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return table


def _table(held, tiles, captions, prompts, dataset):
    """One row a tile, in the columns of the original, with those of ours that say where it comes from."""
    kept = "labelled" if tiles["use"].eq("labelled").any() else "unlabelled"
    own = tiles[tiles["label"].isin(prompts["label"]) & tiles["use"].eq(kept) & tiles["source"].eq("real")]
    own = own.merge(captions[["tile_id", "prompt_id", "text", "cluster", "weight"]], how="left", on="tile_id")
    later = own["split"].ne("train")
    if later.any():
        among = prompt_table.Called(captions, prompts).among()
        found = clusters.assign_tiles(held, own[later], among=among).cluster
        for i, cluster in zip(own.index[later], found, strict=True):
            offered = prompts[prompts["label"].eq(own.at[i, "label"])]
            row = offered[offered["cluster"].isin([cluster, -1])].iloc[0]
            own.loc[i, ["prompt_id", "text", "cluster", "weight"]] = [row["prompt_id"], row["text"], cluster, 1.0]
    own = own[own["text"].notna()]
    ids = own["label"].map(dataset.label_id)
    return pd.DataFrame(
        {"tile_id": own["tile_id"], "path": own["file_name"], "source_path": own["path"], "split": own["split"], "group_id": own["case_id"],
         "label": ids, "label_name": own["label"], "cluster": own["cluster"].astype(int), "prompt_idx": own["prompt_id"].astype(int),
         "text": own["text"], "weight": own["weight"], "source": "real", "sha256": own["sha256"]}
    ).reset_index(drop=True)  # fmt: skip


def _write(folder, table, captions, prompts, dataset):
    k = f"cluster_lbl_n{max(1, table['cluster'].max() + 1)}"
    named = table.rename(columns={"cluster": k}).assign(image=table["path"], target_name=table["label_name"])
    columns = ["path", "image", "label", "target_name", k, "text", "prompt_idx", "group_id", "split"]
    kept = named[table["weight"].gt(0)]
    tables = {"df_prompts": named, "df_subset": kept} | {f"df_{split}": kept[kept["split"].eq(split)] for split in SPLITS}
    for name, part in tables.items():
        files.write_table(folder / "metadata" / f"{name}.csv", part[columns])
    every = dict(zip(prompts["text"], prompts["prompt_id"].astype(int), strict=True))
    left = {text: i for text, i in every.items() if text in set(kept["text"])}
    files.write_json(folder / "metadata" / "text_2_promptidx.json", every)
    files.write_json(folder / "metadata" / "text_2_promptidx_valid_susbet.json", left)  # as the original spells it
    for split, name in SPLITS.items():
        rows, place = kept[kept["split"].eq(split)], folder / "dataset_balanced" / "image" / name
        lines = []
        for i, row in enumerate(rows.to_dict("records")):
            file = f"{i:06d}{Path(row['path']).suffix.lower()}"
            files.copy(Path(row["source_path"]), place / file)
            told = {"file_name": file, "path": row["path"], "label": int(row["label"]), "label_name": row["target_name"]}
            lines.append(json.dumps(told | {"text": row["text"], "prompt_idx": int(row["prompt_idx"])}, ensure_ascii=False))
        if lines:
            files.write_text(place / "metadata.jsonl", "\n".join(lines) + "\n")
    said = f"Licence: {dataset.licence or 'not stated; ask its owners'}."
    files.write_text(
        folder / "README.md", f"# {dataset.name}: captioned tiles\n\nThese are **real tiles of patients**; do not pass them on. {said}\n"
    )
