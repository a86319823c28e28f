"""What can be asked of finished runs later: are their files still what they wrote, where does a tile come from, what did a patient touch?

Nothing here is changed or deleted, no kernel is started, torch is not imported. The records are run.json, the manifests, the cards of
adapters and classifiers; a tile is known by the sha256 of its file, because a name can be given twice and text inside a PNG is lost
when it is saved again.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from histokit.core import files
from histokit.runs import keys, places, selection_reasons

CARD = "adapter.json"
SHORT = 16  # hex digits of a sha256 that adapters keep of their training tiles


def runs_below(place):
    """Folders of all runs in `place`, a run folder or one above several; those set aside are left out."""
    found = []
    for top, folders, names in os.walk(place):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("tiles", "logs")]
        found += [Path(top)] * (places.RECORD in names)
    return sorted(found)


# --- verify ----------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """One thing in a run folder that is not as its record says."""

    run: str  # folder below the working root
    name: str  # file, input or parent
    what: str  # "changed", "missing", "added", "unfinished"


def verify(place):
    """Hashes every file of a run, or of all runs below a folder, again.

    Files that the run wrote, files it read and the runs it built on are compared with run.json: contents by sha256, a listed data set by
    names, sizes and times.

    Args:
        place: run folder, step, experiment, or `outputs`; below the working root, or below its outputs/ as `report` has it.

    Returns:
        Number of files hashed and the list of `Finding`; empty when everything is as it was written.

    Raises:
        FileNotFoundError when there is no run below `place`.
    """
    found, checked = [], 0
    folders = runs_below(files.root() / place) or runs_below(files.root() / "outputs" / place)
    if not folders:
        raise FileNotFoundError(f"{place} holds no run: no {places.RECORD} in it or below")
    for folder in folders:
        record, name = places.read(folder), places.relative(folder)
        if record is None or record["status"] != "done":
            found.append(Finding(name, places.RECORD, "unfinished" if record else "changed"))
            continue
        checked += len(record["outputs"])
        found += [Finding(name, *odd) for odd in dict.fromkeys((*_outputs(folder, record), *_inputs(record), *_parents(record)))]
    return checked, found


def _outputs(folder, record):
    if record["outputs_sha256"] != files.digest({name: facts["sha256"] for name, facts in record["outputs"].items()}):
        yield places.RECORD, "changed"
    for name, facts in record["outputs"].items():
        path = folder / name
        if not path.is_file():
            yield name, "missing"
        elif path.stat().st_size != facts["size"] or files.sha256(path, fresh=True) != facts["sha256"]:
            yield name, "changed"
    here = {path.relative_to(folder).as_posix() for path in places.output_files(folder)}
    yield from ((name, "added") for name in sorted(here - set(record["outputs"])))


def _inputs(record):
    for name, facts in record.get("inputs", {}).items():
        if not places.restored(name).exists():
            yield f"input {name}", "missing"
        elif not keys.same(places.restored(name), facts):
            yield f"input {name}", "changed"


def _parents(record):
    for request in record.get("parents", []):
        for name, sha in request["found"].items():
            parent = places.read(files.root() / name)
            if parent is None:
                yield f"parent {name}", "missing"
            elif parent.get("outputs_sha256") != sha:
                yield f"parent {name}", "changed"


# --- trace -----------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """Where a synthetic tile comes from, see `trace`."""

    row: dict  # of the manifest of the run that made it
    made_by: str  # that run's folder
    record: dict  # its run.json; empty when the folder is gone
    adapters: list = field(default_factory=list)  # (folder, card): what was loaded on top of the base
    sources: list = field(default_factory=list)  # (tile_id, case_id) of the real tiles it started from
    decisions: list = field(default_factory=list)  # (run folder, status, reason) of every selection it went through
    trained: list = field(default_factory=list)  # run folders and arms that learned from it


def trace(tile):
    """The chain of a synthetic tile: job, base, LoRA and token, training tiles, cases, and what was made of it.

    Args:
        tile: path of the picture (known by its contents, wherever it lies now), tile_id, or sha256 of its file, eight digits or more.

    Returns:
        list of `Trace`: one for each run that made it; the same picture can be made twice.

    Raises:
        FileNotFoundError when no manifest below outputs/ holds it.
    """
    sha = files.sha256(tile, fresh=True) if Path(tile).is_file() else ""
    made, later = {}, []
    for folder, record, rows in _synthetic():
        hit = rows["sha256"].eq(sha) if sha else rows["tile_id"].eq(tile) | (rows["sha256"].str.startswith(tile) & (len(tile) >= 8))
        for row in rows[hit].to_dict("records"):
            if row["run_id"] == record["run_id"]:
                made[(places.relative(folder), row["tile_id"])] = (row, record)
            else:
                later.append((folder, record, row))
    for _, record, row in later:  # selected, but its maker was deleted or redone
        if not any(row["run_id"] == known["run_id"] for known, _ in made.values()):
            made[(f"a run that is gone, {row['run_id']}", row["tile_id"])] = (row, {"experiment": record["experiment"], "class_name": ""})
    if not made:
        raise FileNotFoundError(f"no manifest below {places.relative(files.root() / 'outputs')}/ holds a synthetic tile {tile}")
    return [_trace(place, row, record, later) for (place, _), (row, record) in made.items()]


def _trace(place, row, record, later):
    out = Trace(row, place, record)
    out.adapters = [(folder, files.read_json(folder / CARD)) for folder in _parent_folders(record) if (folder / CARD).is_file()]
    cases = real_tiles(record["experiment"]).set_index("tile_id")["case_id"]
    out.sources = [(name, cases.get(name, "")) for name in json.loads(row["sources"] or "[]")]
    own = [(folder, at, held) for folder, at, held in later if held["run_id"] == row["run_id"] and held["sha256"] == row["sha256"]]
    out.decisions = [(places.relative(folder), held["status"], held["reason"]) for folder, _, held in own]
    status = {at["step"]: held["status"] for _, at, held in own} | {record.get("step", ""): row["status"]}
    for folder, card in _cards(record["experiment"], "model.json"):
        if status.get(card["settings"]["synthetic"]) == card["settings"]["status"]:
            out.trained.append(f"{places.relative(folder.parent.parent)}: arm {card['arm']}, seed {card['seed']}")
    return out


def _parent_folders(record):
    return [files.root() / name for request in record.get("parents", []) for name in request["found"]]


def _synthetic(experiment=""):
    """(folder, record, manifest) of every finished run whose manifest has synthetic tiles."""
    for folder in runs_below(files.root() / "outputs" / experiment):
        record, path = places.read(folder), manifest(folder)
        if record and path and record["status"] == "done":
            rows = files.read_table(path)
            if "source" in rows and rows["source"].eq("synthetic").any():
                yield folder, record, rows[rows["source"].eq("synthetic")]


def manifest(folder):
    """The manifest file of a run folder, or None."""
    return next((folder / name for name in ("manifest.csv", "manifest.parquet") if (folder / name).is_file()), None)


def selection(step):
    """Synthetic manifest rows of a finished 05_select, of one class or of all classes below, and the folders of these runs.

    Raises FileNotFoundError where there is none.
    """
    runs = [place for place in runs_below(step) if (places.read(place) or {}).get("status") == "done"]
    tables = [files.read_table(path) for place in runs if (path := manifest(place))]
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if "status" not in rows or not rows["source"].eq("synthetic").any():
        raise FileNotFoundError(f"{step} holds no finished selection of synthetic tiles; name the folder of a 05_select step")
    return rows[rows["source"].eq("synthetic")].reset_index(drop=True), runs


def real_tiles(experiment):
    """The manifest of an experiment's 00_dataset; no rows when it is gone."""
    place = places.find(experiment, "00_dataset", "")
    path = place and manifest(place)
    columns = ["tile_id", "file_name", "label", "split", "use", "case_id", "patient", "slide", "sha256"]
    return files.read_table(path) if path else pd.DataFrame(columns=columns, dtype=str)


def _cards(experiment, name):
    """(folder, contents) of every file of this name in finished runs of an experiment."""
    top = files.root() / "outputs" / experiment
    found = [path for folder in runs_below(top) for path in sorted((*folder.glob(name), *folder.glob(f"*/*/{name}")))]
    return [(path.parent, files.read_json(path)) for path in dict.fromkeys(found)]


def told(found):
    """A `Trace` as lines of text."""
    row, record, settings = found.row, found.record, json.loads(found.row["settings"] or "{}")
    how = ", ".join(f"{name} {settings[name]}" for name in ("strength", "guidance_scale", "true_steps", "policy") if name in settings)
    yield f"{row['tile_id']}  {row['label']}, sha256 {row['sha256']}"
    yield f"  made by    {found.made_by}, run {row['run_id']}" + (f", {record['finished']}" if "finished" in record else "")
    yield f"  as         {row['method']}, seed {row['seed']}, {how}"
    yield f"  prompt     {row['prompt']}"
    for name, case in found.sources:
        yield f"  source     {name}" + (f", case {case}" if case else ", of which no dataset is left")
    if base := record.get("parameters", {}).get("base_model"):
        yield f"  base       {base}"
    for folder, card in found.adapters:
        learned = card["training"]
        which = " and ".join(part for part, held in (("LoRA", card["lora"]), ("tokens", card["tokens"])) if held)
        yield f"  {which}: {places.relative(folder)}, learned from {len(learned['tiles'])} tiles of {len(learned['cases'])} cases: "
        yield f"             {', '.join(learned['cases'])}"
    for run, status, reason in found.decisions:
        yield f"  {status:10} {run}" + (f": {selection_reasons.said(reason)}" if reason else "")
    seeds = {}
    for run in found.trained:
        arm, _, seed = run.rpartition(", seed ")
        seeds.setdefault(arm, []).append(seed)
    for arm, each in seeds.items():
        yield f"  learned by {arm}, seed{'s' * (len(each) > 1)} {', '.join(each)}"


# --- withdrawal ------------------------------------------------------------------------------------------------------


def without_case(case, dataset=""):
    """Everything below outputs/ that a withdrawn case or patient touched, and how.

    Args:
        case: case_id or patient, as the dataset's manifest spells it.
        dataset: name of the dataset, where two use the same case ids; any by default.

    Returns:
        DataFrame run (folder), how, tiles (of the case, or made from it); no rows when it touched nothing.
    """
    rows, names = [], set()
    for top in sorted(path for path in (files.root() / "outputs").glob("*/") if not path.name.startswith(".")):
        held, tiles = places.find(top.name, "00_dataset", ""), real_tiles(top.name)
        own = tiles[tiles["case_id"].astype(str).eq(case) | tiles["patient"].astype(str).eq(case)]
        if len(own) and dataset in ("", files.read_json(held / "dataset.json").get("name")):
            rows += [(places.relative(held), f"lists them: {_counts(own['split'])}", len(own)), *_touched(top.name, own)]
            names |= set(own["tile_id"])
    for path in [*sorted((files.root() / "outputs").glob("*/*/trained_on.csv")), keys.PACKAGE / "mini" / "trained_on.csv"]:
        seen = int(files.read_table(path)["tile"].isin(names).sum())
        where = "the packaged base mini" if path.is_relative_to(keys.PACKAGE) else places.relative(path.parent)
        rows += [(where, "learned from them", seen)] if seen else []
    return pd.DataFrame(rows, columns=["run", "how", "tiles"]).drop_duplicates(ignore_index=True)


def _counts(split):
    return ", ".join(f"{n} {name or 'in no split'}" for name, n in split.fillna("").value_counts().items())


def _touched(experiment, own):
    """The rows of one experiment: adapters, synthetic tiles, classifiers, evaluations, older runs."""
    rows, taught, tainted = [], set(), set()
    for folder, card in _cards(experiment, CARD):
        seen = int(own["sha256"].astype(str).str[:SHORT].isin(card["training"]["tiles"]).sum())
        if seen or set(own["case_id"]) & set(card["training"]["cases"]):
            taught.add(folder)
            rows.append((places.relative(folder), "its tokens or LoRA learned from them", seen))
    synthetic = list(_synthetic(experiment))
    for folder, record, made in synthetic:
        here = made["run_id"].eq(record["run_id"])
        rendered = here & made["sources"].map(lambda text: bool(set(json.loads(text or "[]")) & set(own["tile_id"])))
        stained = here & ~rendered & made["settings"].map(lambda text: json.loads(text or "{}").get("stain", "") in set(own["case_id"]))
        if stained.any():
            rows.append((places.relative(folder), "tiles in their stain", int(stained.sum())))
        if rendered.any():
            rows.append((places.relative(folder), "tiles rendered from them", int(rendered.sum())))
        if taught & set(_parent_folders(record)) and here.any():
            rows.append((places.relative(folder), "tiles made with such tokens or LoRA", len(made)))
        if rows and rows[-1][0] == places.relative(folder):
            tainted.add(record["run_id"])
    for place, record, made in synthetic:
        chosen = made["run_id"].isin(tainted - {record["run_id"]})
        if chosen.any():
            rows.append((places.relative(place), "lists such tiles", int(chosen.sum())))
    learned = own["split"].eq("train") & own["use"].eq("labelled")
    for folder, card in _cards(experiment, "model.json"):
        run = places.relative(next(path for path in folder.parents if (path / places.RECORD).is_file()))
        uses = {"learned from them": learned, "was chosen on them": own["split"].eq("val"), "was tested on them": own["split"].eq("test")}
        rows += [(run, f"arm {card['arm']} {how}", int(which.sum())) for how, which in uses.items() if which.any()]
        if card["settings"]["synthetic"] and tainted:
            rows.append((run, f"arm {card['arm']} learned from such tiles", card["n_synthetic"]))
    for folder in runs_below(files.root() / "outputs" / experiment):  # sorted by step, but not by what builds on what
        listed = {files.root() / run for run, *_ in rows}  # without 00_dataset, which everything reads
        if folder not in listed and listed & set(_parent_folders(places.read(folder) or {})):
            rows.append((places.relative(folder), "builds on these", 0))
    if any((files.root() / "outputs" / experiment / ".old").glob("*")):
        rows.append((f"outputs/{experiment}/.old", "older runs of these steps", 0))
    return rows
