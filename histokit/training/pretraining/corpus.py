"""What a base model is pre-trained on: pictures, words and the list of what was seen.

Sources are datasets (their training tiles only), tiles that nobody labelled, freshly drawn `toy` classes, and random other looks. The list
of picture hashes travels with the weights, so that anyone can check which tiles a model has never seen.
"""

import json
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from histokit import toy
from histokit.core import files
from histokit.runs import places
from histokit.tiles import data, decode, splits
from histokit.tiles.contamination import pixels_hash
from histokit.toy import dataset, words
from histokit.training.pretraining import pictures

VERSION = 4
DRAWN_PX = 128  # side of a drawn picture: the scale of its class is part of what is learned
CACHE_GB = 4  # of drawn pictures
HELD_DRAWN = 16  # drawn pictures of a class that are held out, four times as many looks
HELD_LOOSE = 400  # pictures of a folder or of shards that are held out at most, one in fifty
PER_TILE = 2**18  # bytes of latents of a real tile in 20_pretrain, eight views of it, beside its pixels
TEMPLATES = ("{}", "an H&E tile of {}", "a histology image of {}", "H&E stained {}", "a microscopy tile showing {}")
COLUMNS = ["source", "label", "tile", "pixels_sha256", "case", "weight"]
SETTINGS = {  # of a source, by the key that says what it is; a name that is a description, toy or looks needs none
    "step": {"step", "weight", "labelled"},
    "folder": {"folder", "weight", "case_pattern", "unreadable"},
    "shards": {"shards", "weight", "case_pattern", "unreadable"},
    "": {"classes", "tiles", "weight"},
}


@dataclass
class Corpus:
    """Pictures uint8 [H, W, 3] of any size, the captions each may carry, and a row for each.

    Attributes:
        images: sequence of pictures, read when they are asked for where they are many.
        captions: one tuple of texts a picture.
        table: DataFrame source, label ("" where there is none), tile, pixels_sha256, case (a drawn picture is its own) and weight, the
            share of the draws; they sum to 1.
        left_out: sentences on tiles that are kept back from training and were found among the sources.
    """

    images: object = ()
    captions: list = field(default_factory=list)
    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    left_out: list = field(default_factory=list)

    @property
    def weights(self):
        return self.table["weight"].to_numpy(float)

    @property
    def labels(self):
        """ "source: class" of each, for the supervised encoder; "" where there is none."""
        said = self.table["source"] + ": " + self.table["label"]
        return said.where(self.table["label"].ne(""), "").tolist()

    @property
    def cases(self):
        return self.table["case"].tolist()

    def listed(self):
        """What was trained on, one row a picture: source, label, tile, pixels_sha256."""
        return self.table[COLUMNS[:4]]

    def texts(self):
        return [text for captions in self.captions for text in captions]

    def part(self, keep):
        """The pictures of which `keep` [N] is true, as a corpus of its own: weights sum to 1 again."""
        rows = np.flatnonzero(keep)
        table = self.table.iloc[rows].reset_index(drop=True)
        table["weight"] /= table["weight"].sum()
        return replace(self, images=pictures.Some(self.images, rows), captions=[self.captions[i] for i in rows], table=table)


def gather(sources, roots=None, seed=0, split="train", run=None):
    """The corpus of `sources`, a dict of name -> settings.

    Args:
        sources: what to learn from, by a name and its settings. Each may have a `weight`.
            A dataset description (path of a YAML file), with `classes` (default all) and `tiles` (at most so many a class); `toy` with
            `classes` and `tiles` (a class); `looks` with `tiles`: all held in memory.
            Any name with `step`: the training tiles of that 00_dataset, labelled or not, and no label; with `labelled: true` those that
            have one, with it.
            Any name with `folder` or `shards` (see `pictures`), `unreadable: stop | leave_out`, and `case_pattern`, a regular expression
            whose first group is the case: tiles without labels, as many as there are.
        roots: name of a description's file, without its suffix -> folder of its tiles, in place of its root.
        split: `train`, or `val` for held-out tiles of the datasets, one in fifty of the tiles without labels, and newly drawn pictures.
        run: current Run, whose 00_dataset says what is kept back from training. Its tiles are left out of every source, pixel by pixel;
            a recompressed one, or its neighbour, is known by its case, so by `case_pattern`. Needed for `step`.

    Raises:
        ValueError: an unknown setting, a toy class whose role is tail, more tiles than memory holds, or what `pictures` refuses.
    """
    held, parts, out = split != "train", [], Corpus()
    kept_back = _kept_back(run, held)
    kept_hashes = _kept_hashes(kept_back)
    for name, settings in sources.items():
        kind = next((key for key in SETTINGS if key and key in settings), "")
        if unknown := set(settings) - SETTINGS[kind]:
            raise ValueError(f"source {name!r}: unknown setting {sorted(unknown)[0]!r}; use {', '.join(sorted(SETTINGS[kind]))}")
        if kind == "step":
            part = _of_step(name, settings["step"], run, split, settings.get("labelled", False))
        elif kind:
            part = _loose(name, kind, settings, held, kept_back, run)
        elif name in ("toy", "looks"):
            part = _drawn(name, settings, seed, held)
        else:
            part = _tiles(name, settings, roots or {}, split)
        part.table["weight"] = 1.0
        part = _without(name, part, kept_hashes)
        part.table["weight"] = settings.get("weight", 1.0) / max(1, len(part.table))
        parts.append(part)
    out.images = pictures.Joined(part.images for part in parts)
    out.captions = [captions for part in parts for captions in part.captions]
    out.table = pd.concat([part.table for part in parts], ignore_index=True)[COLUMNS]
    out.table["weight"] /= out.table["weight"].sum()
    out.left_out = [line for part in parts for line in part.left_out]
    if not len(out.images):
        what = "to validate on: give the study validation cases, or a source of two cases or more" if held else "to learn from"
        raise ValueError(f"the sources {', '.join(sources)} hold no picture {what}")
    return out


def _in_memory(name, found):
    """The Corpus of (image, captions, label, case, tile) rows."""
    images, captions, labels, cases, tiles = (list(column) for column in zip(*found, strict=True)) if found else ([],) * 5
    hashes = [pixels_hash(image) for image in images]
    table = pd.DataFrame({"source": name, "label": labels, "tile": tiles, "pixels_sha256": hashes, "case": cases})
    return Corpus(images, captions, table.astype("str"))


# ---------------------------------------------------------------------------------------------- tiles that nobody labelled


def _kept_back(run, held):
    """Rows of the tiles that this experiment's 00_dataset keeps from training or, of `held`, from validation; none without one."""
    if run is None or places.find(run.experiment, "00_dataset", "") is None:
        return pd.DataFrame(columns=["path", "case_id", "sha256", "profile"])
    tiles = data.load(run)
    apart = tiles["split"].isin(["test"] if held else ["val", "test"]) | tiles["use"].eq("withheld")
    return tiles[apart & tiles["source"].eq("real")]


def _of_step(name, step, run, split, labelled):
    """Training tiles of a 00_dataset without their labels, or the labelled ones with them; of `val` its validation tiles."""
    if run is None:
        raise ValueError(f"source {name!r} reads the step {step}, and there is no run to read it in")
    tiles = data.load(run, step=step, dataset_step=step)
    real = data.learnable(tiles)
    if labelled:
        real = real[real["use"].eq("labelled")]
    val = tiles[tiles["split"].eq("val") & tiles["use"].ne("withheld") & tiles["source"].eq("real")]
    if not len(val):  # a study without validation cases lends some of its training cases
        apart = real["case_id"].isin(_held_cases(real["case_id"]))
        real, val = real[~apart], real[apart]
    rows = (val if split == "val" else real).reset_index(drop=True)
    table = pd.DataFrame({"source": name, "label": rows["label"] if labelled else "", "tile": rows["file_name"], "case": rows["case_id"]})
    table["pixels_sha256"] = _pixel_hashes(rows)
    return Corpus(_Rows(rows), [("",)] * len(rows), table.astype("str"))


class _Rows:
    """Pictures of manifest rows as they are on disk, or in the way their dataset says where it resamples them."""

    def __init__(self, rows):
        self.paths, self.profiles = rows["path"].tolist(), rows["profile"].tolist()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return np.asarray(decode.rgb(self.paths[i], profile=self.profiles[i])[0])


def _without(name, part, kept_hashes):
    """A part of the corpus without pictures that are kept back from training, byte for byte of their pixels, and a sentence on them."""
    known = part.table["pixels_sha256"].isin(kept_hashes)
    if known.any():
        first = part.table["tile"][known].iloc[0]
        said = f"{name}: {known.sum():,} tiles are left out, validation, test or withheld tiles of this experiment (first: {first!r})."
        part = replace(part.part(~known), left_out=[*part.left_out, said])
    return part


def _loose(name, kind, settings, held, kept_back, run):
    """Pictures of a folder or of shards, without those of cases that `kept_back` holds."""
    place = files.root() / Path(settings[kind]).expanduser()
    found = pictures.Folder(place) if kind == "folder" else pictures.Shards(place)
    if run is not None:
        run.listing(place, ("*.tar",) if kind == "shards" else tuple(f"*{suffix}" for suffix in decode.SUFFIXES))
    table = pictures.survey(found, settings.get("unreadable", "stop"))
    names = found.names.iloc[table["row"]].reset_index(drop=True)
    case = _cases(name, names, settings.get("case_pattern", ""))
    same = case.isin(set(kept_back["case_id"].astype("str"))) if settings.get("case_pattern") else pd.Series(False, index=case.index)
    said = f"{name}: {same.sum():,} tiles are left out, of cases kept back here (first: {names[same].iloc[0]!r})." if same.any() else ""
    apart = case.isin(_held_cases(case[~same]))
    rows = np.flatnonzero(~same & (apart if held else ~apart))
    rest = pd.DataFrame({"source": name, "label": "", "tile": names.iloc[rows], "case": case.iloc[rows]})
    rest["pixels_sha256"] = table["pixels_sha256"].iloc[rows]
    if not len(rows) and not held:
        raise ValueError(f"source {name!r}: no tile of {place} is left to learn from. {said}")
    told = [said] if said and not held else []
    return Corpus(pictures.Some(found, table["row"].iloc[rows]), [("",)] * len(rows), rest.reset_index(drop=True), told)


def _held_cases(case):
    """One case in fifty, chosen by hash: one at least where there are two, and no more than `HELD_LOOSE` pictures have beyond the first."""
    sizes = case.value_counts()
    order = sorted(sizes.index, key=lambda one: files.digest("held out", one))[: max(1, len(sizes) // 50) if len(sizes) > 1 else 0]
    return [one for one, total in zip(order, np.cumsum(sizes[order]), strict=True) if total <= HELD_LOOSE or one == order[0]]


def _cases(name, names, pattern):
    """The case of each file name: the first group of `pattern`; without one, each its own."""
    if not pattern:
        return names
    if re.compile(pattern).groups < 1:
        raise ValueError(f"source {name!r}: case_pattern {pattern!r} has no group; put the part that names the case in brackets")
    case = names.str.extract(pattern, expand=False)
    case = case if isinstance(case, pd.Series) else case[0]
    if case.isna().any():
        raise ValueError(f"source {name!r}: case_pattern {pattern!r} finds no case in {names[case.isna()].iloc[0]!r}")
    return case


def _pixel_hashes(rows):
    """sha256 of the pixels of manifest rows as they are read here, remembered by the contents of their files."""
    path = files.cache("surveys") / f"{files.digest(VERSION, decode.VERSION, rows['sha256'].tolist(), rows['profile'].tolist())}.json"
    if not path.is_file():
        found = _Rows(rows)
        with ThreadPoolExecutor(8) as pool:
            files.write_json(path, list(pool.map(lambda i: pixels_hash(found[i]), range(len(found)))))
    return files.read_json(path)


def _kept_hashes(rows):
    """sha256 of the pixels of manifest rows, by their colour profile and as they are stored: another may read them the other way."""
    return {sha for honour in (True, False) for sha in _pixel_hashes(rows.assign(profile=honour))} if len(rows) else set()


# ---------------------------------------------------------------------------------------------- labelled and invented tiles


def _tiles(name, settings, roots, split):
    """The Corpus of a dataset's labelled tiles in one split, at the size they have on disk."""
    described = data.describe(name, root=roots.get(Path(name).stem, ""))
    manifest = splits.assign(data.scan(described), described.split, seed=0)
    rows = manifest[manifest["split"].eq(split) & manifest["use"].eq("labelled")]
    rows = rows[rows["label"].isin(settings.get("classes", described.classes))]
    captions = {c: tuple(t.format(described.terms[c]) for t in TEMPLATES) for c in described.classes}
    if settings.get("tiles"):  # by hash, so that more tiles hold the fewer
        order = rows["file_name"].map(files.digest).sort_values(kind="stable").index
        rows = rows.loc[order].groupby("label", sort=False).head(settings["tiles"]).sort_index()
    _check_room(name, rows, described.root)
    honour = described.colour_profile == "convert"
    images = [np.asarray(decode.rgb(described.root / file, profile=honour)[0]) for file in rows["file_name"]]
    facts = zip(images, rows.itertuples(), strict=True)
    return _in_memory(name, [(image, captions[row.label], row.label, row.case_id, row.file_name) for image, row in facts])


def _check_room(name, rows, root):
    """Raise ValueError where the tiles, as large as the first of them, would take more than three quarters of the free memory."""
    if not len(rows):
        return
    need = len(rows) * (np.asarray(decode.rgb(root / rows["file_name"].iloc[0])[0]).nbytes + PER_TILE)
    free = psutil.virtual_memory().available
    if need > 0.75 * free:
        raise ValueError(
            f"source {name!r}: {len(rows):,} tiles need {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free; "
            f"set tiles, at most so many a class, to {int(len(rows) * 0.7 * free / need / max(1, rows['label'].nunique())):,} or fewer"
        )


def _drawn(name, settings, seed, held):
    """The Corpus of freshly drawn pictures: toy's head classes, each tile a case of its own, or random other looks.

    Drawn once, and kept in outputs/.cache. `held`: few, and others.
    """
    tiles = settings.get("tiles", 1000 if name == "looks" else 100)
    if held:
        tiles, seed = min(tiles, HELD_DRAWN * (4 if name == "looks" else 1)), files.seed(seed, "held")
    if name == "looks":
        jobs = [("", i, seed) for i in range(tiles)]
    else:
        classes = settings.get("classes", [c for c, facts in toy.CLASSES.items() if facts["role"] == "head"])
        tail = [c for c in classes if toy.CLASSES[c]["role"] == "tail"]
        if tail:
            raise ValueError(f"toy class {tail[0]!r} is made rare by the demo; a base that has seen it proves nothing")
        jobs = [(c, i, seed) for c in classes for i in range(tiles)]
    path = files.cache("drawn") / f"{files.digest(VERSION, dataset.PIXELS, DRAWN_PX, jobs)}.safetensors"
    if not path.is_file():
        with ProcessPoolExecutor() as pool:
            images, *told = zip(*pool.map(_draw, jobs, chunksize=16), strict=True)
        files.write_tensors(path, {"images": torch.from_numpy(np.stack(images))}, {"told": json.dumps(list(zip(*told, strict=True)))})
        files.prune("drawn", CACHE_GB, keep=[path])
    images, told = files.read_tensors(path)["images"].numpy(), json.loads(files.read_metadata(path)["told"])
    return _in_memory(name, [(image, tuple(captions), *rest) for image, (captions, *rest) in zip(images, told, strict=True)])


def _draw(job):
    label, i, seed = job
    if not label:
        image, caption, _ = toy.random_look(i, DRAWN_PX, seed)
        return image, (caption,), "", f"look {i}", f"look {i} seed {seed}"
    case = f"pretrain {i}"  # as many stains as tiles
    image = toy.tile(label, case, i, DRAWN_PX, seed)[0]
    rng = toy.generator(seed, "captions", label, i)
    return image, tuple(dict.fromkeys(words.caption(label, rng) for _ in range(4))), label, case, f"{label} {case} {i} seed {seed}"
