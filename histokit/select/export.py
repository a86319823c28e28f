"""Kept synthetic tiles as a folder that others can load: pictures, metadata.csv, a card; and only what the copy gate lets out.

The layout is the Hugging Face imagefolder, `datasets.load_dataset("imagefolder", data_dir=FOLDER)`. Names of patients' tiles, cases and
folders stay behind; `provenance.trace` finds them again from a picture, where the runs are.
"""

import json
import os
import shutil
from pathlib import Path

import pandas as pd

from histokit import __version__
from histokit.core import files
from histokit.runs import places, provenance
from histokit.tiles import data

METADATA = ["file_name", "label", "synthetic", "method", "prompt", "seed", "mpp", "sha256", "run_id"]
FRONT = "---\npretty_name: {name}\nlicense: other\nlicense_name: see-below\ntags: [histopathology, synthetic]\n---\n"


def export(step, folder, *, accept_uncalibrated=False, classes=(), jsonl=False):
    """Write the kept tiles of a selection into a new folder.

    Args:
        step: folder of a finished 05_select: of one class, or above those of all classes.
        folder: new; an existing one is refused.
        accept_uncalibrated: also classes for which the copy detector could not be calibrated; the card then says so.
        classes: keep to these.
        jsonl: metadata.jsonl in the place of metadata.csv, rows {file_name, path, label (id), label_name, text, prompt_idx}, as trainers of
            diffusion models read captions.

    Returns:
        DataFrame as in metadata.csv.

    Raises:
        FileNotFoundError: no finished selection there, or no 08_fidelity that looked at these tiles for copies.
        ValueError: a class that the gate blocks or could not judge, or a file that is not the one that was judged.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a folder that does not")
    rows, runs = provenance.selection(step)
    rows = rows[rows["status"].eq("kept")]
    rows = rows[rows["label"].isin(classes)] if classes else rows
    if rows.empty:
        raise ValueError(f"{step} kept no tile of {', '.join(classes) or 'any class'}: there is nothing to export")
    record = places.read(runs[0])
    gates, judged_by = _gates(record["experiment"], {places.read(place)["outputs_sha256"] for place in runs})
    _check(rows, gates, accept_uncalibrated)
    dataset = data.read_frozen(files.root() / "outputs" / record["experiment"] / "00_dataset" / "dataset.json")
    draft = folder.with_name(f"{folder.name}.part")  # a folder of the final name is whole, or not there
    shutil.rmtree(draft, ignore_errors=True)
    try:
        table = _write(rows, draft, record["experiment"])
        if jsonl:
            _as_lines(draft, table, rows, dataset)
        files.write_text(draft / "README.md", _card(table, gates, judged_by, dataset, record, accept_uncalibrated))
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return table


def _gates(experiment, selections):
    """({class: gate of 08}, folder of that 08): the one that read these selections."""
    for place in provenance.runs_below(files.root() / "outputs" / experiment):
        record = places.read(place)
        if record and record["status"] == "done" and (place / "results.json").is_file():
            held = files.read_json(place / "results.json")
            read = {sha for request in record["parents"] for sha in request["found"].values()}
            if isinstance(held, dict) and "copies" in held and selections <= read:
                return held["copies"]["gates"], place
    raise FileNotFoundError(
        f"no finished 08_fidelity of {experiment} has looked at these tiles for copies; run it (again), and nothing leaves before it has"
    )


def _check(rows, gates, accept_uncalibrated):
    for name in rows["label"].unique():
        gate = gates.get(name, {"state": "uncalibrated", "reasons": ["08_fidelity did not look at this class"]})
        why = "; ".join(gate["reasons"])
        if gate["state"] == "blocked":
            raise ValueError(f"{name} is blocked from export: {why}. Leave it out with --classes, or make its tiles anew")
        if gate["state"] == "uncalibrated" and not accept_uncalibrated:
            raise ValueError(
                f"{name}: copies cannot be told from chance ({why}); look at the closest pairs in 08_fidelity, then export with "
                "--accept-uncalibrated, which the card will say"
            )


def _write(rows, folder, experiment):
    top, out = files.root() / "outputs" / experiment, []
    numbers = rows.groupby("label").cumcount()
    for row, number in zip(rows.to_dict("records"), numbers, strict=True):
        source = files.inside(top / row["root"], row["file_name"])
        if files.sha256(source, fresh=True) != row["sha256"]:
            raise ValueError(f"{source} is not the picture that was judged; `histokit verify` names all such files")
        name = f"{files.slug(row['label'])}/{number:05d}.png"
        files.copy(source, files.inside(folder, name))  # the same bytes: `histokit trace` knows the picture by them
        out.append(
            {"file_name": name, "synthetic": 1} | {key: row.get(key, "") for key in METADATA if key not in ("file_name", "synthetic")}
        )
    table = pd.DataFrame(out)[METADATA]
    files.write_table(folder / "metadata.csv", table)
    return table


def _as_lines(folder, table, rows, dataset):
    """metadata.jsonl in the place of metadata.csv."""
    ids = [json.loads(text or "{}").get("prompt_id", -1) for text in rows["settings"]]
    lines = [
        json.dumps(
            {"file_name": row["file_name"], "path": row["file_name"], "label": dataset.label_id(row["label"]), "label_name": row["label"],
             "text": row["prompt"], "prompt_idx": i, "seed": int(row["seed"]), "sha256": row["sha256"]}, ensure_ascii=False,
        )
        for row, i in zip(table.to_dict("records"), ids, strict=True)
    ]  # fmt: skip
    files.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    (folder / "metadata.csv").unlink()


def _card(table, gates, judged_by, dataset, record, accepted):
    """README.md of the folder: what it is, where it comes from, what is known about copies, what it is not for."""
    records = [places.read(place) or {} for place in provenance.runs_below(files.root() / "outputs" / record["experiment"])]
    base = next((r["parameters"].get("base_model") for r in records if r.get("run_id") in set(table["run_id"])), None)
    base = Path(base).name if base else "unknown"  # no folder of ours
    state = {name: gates.get(name, {}).get("state", "uncalibrated") for name in table["label"].unique()}
    counts = "\n".join(f"| {name} | {n} | {state[name]} |" for name, n in table["label"].value_counts().items())
    why = {name: "; ".join(gates[name]["reasons"]) for name in state if name in gates}
    reasons = [f"- {name}: {text}." for name, text in why.items() if text]
    unsure = accepted and set(state.values()) != {"pass"}
    stamp = "\n**Exported although the copy detector could not be calibrated for every class.**\n" if unsure else ""
    return f"""{FRONT.format(name=f"{dataset.name}, synthetic tiles")}
# {dataset.name}: {len(table)} synthetic tiles

Every picture here is synthetic: made by histokit {__version__} with base model `{base}`, from training tiles of {dataset.name}.
No real tile is included. For research, **never for diagnosis**, and never counted as patients.

| class | tiles | copies of training tiles |
|---|---|---|
{counts}
{stamp}
"pass" means that one detector, checked on planted copies, found no more copies than among held-out real tiles of other cases. It is not a
promise of privacy. {"" if reasons else "Nothing was found that needs a remark."}
{chr(10).join(reasons)}

- Training data: {dataset.name}, licence: {dataset.licence or "not stated; ask its owners before you pass these tiles on"}
- Base model: `{base}`; its licence and that of every encoder that guided or filtered tiles bind what was made with them.
- Judged by run {places.read(judged_by)["run_id"]} of 08_fidelity; made by {", ".join(sorted(set(table["run_id"])))}.
- `metadata.csv`: one row a picture, with its label, prompt, seed and sha256; each PNG says `histokit:provenance`.

    from datasets import load_dataset
    tiles = load_dataset("imagefolder", data_dir="THIS FOLDER")
"""
