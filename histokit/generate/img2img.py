"""New tiles from real ones: a job table first, then one image per row of it.

SDEdit, Meng et al. (2022), arXiv:2108.01073; from majority to minority, Wang et al. (2024), arXiv:2406.18375. The table is made in
`policies`; here its rows become images, previews and manifest rows. Nothing here judges an image: 05_select does.
"""

import functools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histokit.core import files, machine, progress
from histokit.diffusion import backbone, latents, sampling
from histokit.generate import policies, previews, synthetic
from histokit.generate.policies import POLICIES, SETTINGS, job_table
from histokit.tiles import data, decode, staining

__all__ = [
    "POLICIES", "SETTINGS", "Previewer", "export_json", "import_json", "job_table", "previewer", "render", "tried",
]  # fmt: skip

VERSION = 2
PULL = "prompt_pull"  # name of the score that `sampling.sample` calls pulls

# --- images ----------------------------------------------------------------------------------------------------------


class Sources:
    """Latents and pixels of the real tiles that jobs start from, each encoded once and alone."""

    def __init__(self, model, jobs, tiles):
        worn = [pair for pair in dict.fromkeys(zip(jobs["tile_id"], jobs["stain"], strict=True)) if pair[0]]
        wanted = list(dict.fromkeys(tile for tile, _ in worn))
        rows = tiles[tiles["tile_id"].isin(wanted)].drop_duplicates("tile_id").set_index("tile_id", drop=False)
        lost = [tile for tile in wanted if tile not in rows.index]
        if lost:
            raise ValueError(f"source tile {lost[0]!r} is not in the manifest ({len(lost)} such); make the job table from this manifest")
        leaks = rows[~rows["tile_id"].isin(data.training(tiles)["tile_id"])]
        if len(leaks):
            first = leaks.iloc[0]
            raise ValueError(
                f"source tile {first['tile_id']!r} is a {first['source']} tile of {first['split'] or 'no split'}, {first['use']}; "
                f"only real labelled training tiles may be re-rendered ({len(leaks)} such)"
            )
        self.model, self.place = model, {pair: i for i, pair in enumerate(worn)}
        self.rows = self._worn(rows, worn, tiles, jobs)
        self.cache = latents.Latents(model, self.rows, symmetries=1, batch_size=1) if worn else None

    def _worn(self, rows, worn, tiles, jobs):
        """Manifest rows of the pictures that jobs start from: the tiles themselves, or in the stain of another case."""
        if not any(stain for _, stain in worn):
            return rows.loc[[tile for tile, _ in worn]]
        restain = staining.Restainer(data.training(tiles), max(jobs["stain_method"]))  # one of a table, "" where a job keeps its own
        px = self.model.tile_px
        return pd.DataFrame([restain.written(rows.loc[tile], stain, px) if stain else dict(rows.loc[tile]) for tile, stain in worn])

    def of(self, jobs):
        """Places in `rows` of what the jobs (namedtuples) start from; none for text-to-image."""
        return [self.place[job.tile_id, job.stain] for job in jobs if job.tile_id]

    def latents(self, jobs):
        """Scaled latents [B, 4, h, w], None for text-to-image."""
        places = self.of(jobs)
        return self.cache.batch(places, [0] * len(places))[0] * self.model.scaling if places else None

    def pixels(self, jobs):
        """uint8 [B, H, W, 3] at the model's tile size, None for text-to-image."""
        places = self.of(jobs)
        return data.pixels(self.rows.iloc[places], self.model.tile_px) if places else None


def _blocks(jobs, batch):
    """Index labels of the jobs that share a batch: `number // batch`, whatever else is to be made.

    With two threads or more a matrix product may round differently from row to row, so not only the shape of a batch is fixed but
    also the slot of each job in it; only then does resuming change no bit.
    """
    cell = ["class", *SETTINGS, jobs["number"] // batch, jobs["tile_id"].eq("")]
    return [block.index.tolist() for _, block in jobs.groupby(cell, sort=False)]


def _make(model, sources, block, batch, on_step=None, **settings):
    """Images uint8 [n, H, W, 3] of the n jobs of one block, each in the slot its number gives it, and how hard each prompt pulled [n]."""
    rows = list(block.itertuples())
    slots = [rows[0]] * batch  # a slot nobody needs repeats the first job
    for row in rows:
        slots[row.number % batch] = row
    last, pulls = max(row.number % batch for row in rows) + 1, []
    images = sampling.sample(
        model,
        [row.prompt for row in slots[:last]],
        [torch.Generator().manual_seed(row.seed) for row in slots[:last]],
        sources=sources.latents(slots[:last]),
        batch=batch,
        pulls=pulls,
        on_step=on_step,
        **_settings(rows[0], settings),
    )
    slot = [row.number % batch for row in rows]
    return images[slot], np.asarray(pulls)[slot]


def _settings(row, changes):
    """Settings of one job with `changes`; text-to-image has no source and so always the whole schedule."""
    used = {name: getattr(row, name) for name in SETTINGS} | changes
    return used if row.tile_id else used | {"strength": 1.0}


def render(model, jobs, run, tiles, *, batch=None):
    """Make every image of the job table that is not there yet, and return the manifest rows of all of them.

    An image is there when its file in this run folder, or in the one set aside before it (`run.previous`, linked), carries the
    key of its job: settings, prompt, seed, source and weights. So an interrupted run goes on where it was, and asking
    for 200 images after 100 makes 100.

    Args:
        model: backbone.Model, with the adapters of the job table.
        jobs: see `job_table`.
        run: runs.Run to write into.
        tiles: the manifest the job table was made from.
        batch: images per batch, by default `sampling.batch_size(model)`.
    """
    batch = batch or sampling.batch_size(model)
    jobs = jobs.reset_index(drop=True)
    sources = Sources(model, jobs, tiles)
    keys = [_key(model, row, sources) for row in jobs.itertuples()]
    paths = [run.path("tiles", f"{job}.png") for job in jobs["job"]]
    missing = {i for i, (path, key) in enumerate(zip(paths, keys, strict=True)) if not synthetic.there(path, key, run)}
    count, clock = 0, time.perf_counter()
    show = progress.Progress(len(missing))
    with synthetic.Writer() as write:
        for block in _blocks(jobs, batch):
            if missing.isdisjoint(block):
                continue
            images, pulls = _make(model, sources, jobs.loc[block], batch)
            write.settle()
            for i, image, pull in zip(block, images, pulls, strict=True):
                if i in missing:
                    write(paths[i], image, keys[i], jobs.loc[i], **({} if np.isnan(pull) else {PULL: float(f"{pull:.4g}")}))
            count += len(write.pending)
            rate = count / (time.perf_counter() - clock)
            show({"step": count, "images_per_s": rate, "peak_gb": machine.peak_gb()}, None)
    seconds = time.perf_counter() - clock
    run.note(images_made=count, images_reused=len(jobs) - count, batch=batch, images_per_s=synthetic.speed(run, count, seconds))
    return synthetic.manifest(run, jobs, paths, tiles, model.tile_px, functools.partial(_told, batch))


def tried(model, jobs, tiles, *, batch=None, **settings):
    """Images uint8 [N, H, W, 3] of the N jobs under other `settings` (strength, guidance_scale, ...); nothing is written."""
    batch, jobs = batch or sampling.batch_size(model), jobs.reset_index(drop=True)
    sources, images = Sources(model, jobs, tiles), [None] * len(jobs)
    for block in _blocks(jobs, batch):
        for i, image in zip(block, _make(model, sources, jobs.loc[block], batch, **settings)[0], strict=True):
            images[i] = image
    return np.stack(images)


def _key(model, row, sources):
    """What the pixels of one job follow from."""
    source = ""
    if row.tile_id:
        tile = sources.rows.iloc[sources.place[row.tile_id, row.stain]]
        source = [tile["sha256"] or files.sha256(tile["path"]), data.shown(tile)]
    settings = [getattr(row, name) for name in SETTINGS]
    versions = [VERSION, *(module.VERSION for module in (sampling, backbone, latents, decode, data))]
    return files.digest("img2img", versions, model.identity, row.lora_sha, row.token_sha, row.prompt, row.seed, settings, source)


def _told(batch, row, path):
    """What the manifest says of one job: how it was made, and how hard its prompt pulled where there was guidance."""
    names = (*SETTINGS, "true_steps", "policy", "stain", "stain_method", "source_class", "source_group", "target_group")
    pull = {name: value for name, value in synthetic.facts(path).items() if name == PULL}
    settings = {name: getattr(row, name) for name in names} | {"batch": batch} | policies.asked_of(row)
    return {"method": "img2img" if row.tile_id else "text2img", "settings": settings, "scores": pull}


# --- previews --------------------------------------------------------------------------------------------------------


class _Set:
    """A job table, its blocks, and the tiles it starts from."""

    def __init__(self, model, jobs, tiles, batch):
        self.jobs = jobs.reset_index(drop=True)
        self.blocks, self.sources = _blocks(self.jobs, batch), Sources(model, self.jobs, tiles)

    def rows(self, block):
        return self.jobs.loc[self.blocks[block]]


class Previewer:
    """`previewer(strength=.., guidance_scale=..)` -> previews.Preview of the first batch of a job table under other settings.

    The batch has the shape, seeds and neighbours it will have in `render`, so with the same settings its tiles are the same, bit for bit
    on a CPU. What was drawn once is kept on disk, by what its pixels follow from.
    """

    def __init__(self, model, jobs, tiles, batch=None, table=None):
        self.model, self.tiles, self.batch, self.table = model, tiles, batch or sampling.batch_size(model), table
        if not len(jobs):
            raise ValueError("the job table is empty: nothing to preview")
        self.first, self.sets, self.fitted = _Set(model, jobs, tiles, self.batch), {}, None
        self.jobs = self.first.jobs

    def _of(self, seed):
        """The set of a run seed; that of the job table where none is named."""
        if seed is None:
            return self.first
        if self.table is None:
            raise ValueError("another seed is another job table: give the previewer a `table`")
        if seed not in self.sets:
            self.sets[seed] = _Set(self.model, self.table(seed=int(seed)), self.tiles, self.batch)
        return self.sets[seed]

    def __call__(self, block=0, on_step=None, seed=None, **settings):
        """on_step: as in `sampling.sample`. seed: run seed; another one has other noise, and may start from other tiles."""
        held = self._of(seed)
        if (found := self.known(block, seed, **settings)) is not None:
            return found
        rows = held.rows(block)
        images, _ = _make(self.model, held.sources, rows, self.batch, on_step, **settings)
        previews.keep(self._kept(held, rows, self.batch, settings), images)
        return self._shown(held, block, images, settings)

    def known(self, block=0, seed=None, **settings):
        """The same, where these settings were drawn before; else None. Takes a few milliseconds."""
        if seed is not None and seed not in self.sets:  # whether it is known would take a while to find out
            return None
        held = self._of(seed)
        images = previews.kept(self._kept(held, held.rows(block), self.batch, settings))
        return None if images is None else self._shown(held, block, images, settings)

    def draft(self, x0, block=0):
        """What a batch looks like at a step, x0 from `on_step`: uint8 [n, h, w, 3]; None without a source to learn colours from."""
        rows, sources = self.first.rows(block), self.first.sources
        if self.fitted is None:
            latents = sources.latents(list(rows.itertuples()))
            if latents is None:
                return None
            self.fitted = previews.fit_draft(latents, sources.pixels(list(rows.itertuples())))
        return np.stack([previews.draft(self.fitted, x0[number % self.batch]) for number in rows["number"]])

    def _shown(self, held, block, images, settings):
        rows = held.rows(block)
        return previews.Preview(
            images, held.sources.pixels(list(rows.itertuples())), self.steps(block, **settings), rows.assign(**settings)
        )

    def _kept(self, held, rows, batch, settings):
        """Name of the file that holds these rows under these settings."""
        used = rows.assign(**settings)
        used.loc[used["tile_id"].eq(""), "strength"] = 1.0
        keys = [(row.number % batch, _key(self.model, row, held.sources)) for row in used.itertuples()]
        return files.digest("preview", batch, keys)

    def steps(self, block=0, seed=None, **settings):
        """Denoising steps really taken under these settings."""
        used = _settings(next(self.first.rows(block).itertuples()), settings)
        return sampling.true_steps(int(used["num_inference_steps"]), float(used["strength"]))

    def sweep(self, strengths, job=0, on_step=None, seed=None, **settings):
        """Images [n, H, W, 3] of job `job` at each of `strengths`, alone in their batch: within a grey level of the finished ones."""
        held, found = self._of(seed), []
        row = held.jobs.loc[[job]].assign(number=0)
        for strength in strengths:
            name = self._kept(held, row, 1, {"strength": strength, **settings})
            image = previews.kept(name)
            if image is None:
                image = _make(self.model, held.sources, row, 1, on_step, strength=strength, **settings)[0]
                previews.keep(name, image)
            found.append(image)
        return np.concatenate(found)

    @property
    def can_rest(self):
        """Whether `rest` gives memory back."""
        return self.model.device.type != "cpu"

    def rest(self):
        """Gives the memory of the accelerator back until something is drawn again."""
        self.model.rest()


def previewer(model, jobs, tiles, batch=None, table=None):
    """A `Previewer` of the job table, for `widgets.tuner`.

    Args:
        table: `table(seed=..)` -> the job table of another run seed, for a slider of seeds; None where there is none.
    """
    return Previewer(model, jobs, tiles, batch, table)


# --- exchange --------------------------------------------------------------------------------------------------------


def export_json(path, manifest, group="skin_type"):
    """Write a list of {image_path, label, <group>, prompt}, the format of the original study; image_path stays relative."""
    pairs = {"file_name": "image_path", "label": "label", "group": group, "prompt": "prompt"}
    return files.write_json(path, [{new: str(row[old]) for old, new in pairs.items()} for row in manifest[list(pairs)].to_dict("records")])


def import_json(path, group="skin_type"):
    """DataFrame file_name, label, group, prompt from such a list; ValueError names the entry that lacks a field."""
    wanted = {"image_path": "file_name", "label": "label", group: "group", "prompt": "prompt"}
    entries = files.read_json(path)
    for i, entry in enumerate(entries):
        lost = [name for name in wanted if name not in entry]
        if lost:
            raise ValueError(f"{Path(path).name}, entry {i}: no {', '.join(lost)}; expected {', '.join(wanted)}")
    return pd.DataFrame([{new: str(entry[old]) for old, new in wanted.items()} for entry in entries], columns=list(wanted.values()))
