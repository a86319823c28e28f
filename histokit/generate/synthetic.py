"""Tiles that a model makes: the files that are there already, and the manifest rows of all of them.

Each picture carries the key of its job, what its pixels follow from. So an interrupted run goes on where it was, and asking for 200 images
after 100 makes 100. What is made, and from what, is the business of `img2img` and `guided`.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histokit.core import files
from histokit.runs import places
from histokit.tiles import data

KEY, FACTS = "histokit", "histokit:provenance"  # text chunks of a PNG


def there(path, key, run):
    """Whether the picture with this key is at `path`; one of a shard, or of the run that was set aside before, is linked there."""
    if path.is_file() and _text(path).get(KEY) == key:
        return True
    for folder in _before(run.folder, run.previous):
        old = folder / path.relative_to(run.folder)
        if old.is_file() and _text(old).get(KEY) == key:
            files.link(old, path)
            return True
    return False


def _before(folder, previous):
    """Run folders that may hold what this one is to make."""
    return [*places.shards(folder), *([previous, *places.shards(previous)] if previous else [])]


def facts(path):
    """What was written into a picture when it was made."""
    return json.loads(_text(path).get(FACTS, "{}"))


def _text(path):
    try:
        with Image.open(path) as image:
            return dict(image.info)
    except OSError:
        return {}


class Writer:
    """Writes pictures in a thread while the next ones are made; leaving the `with` waits for the last."""

    def __enter__(self):
        self.pool, self.pending = ThreadPoolExecutor(1), []
        return self

    def __exit__(self, *error):
        try:
            self.settle()
        finally:
            self.pool.shutdown()

    def settle(self):
        """Waits for what is being written; raises what went wrong."""
        pending, self.pending = self.pending, []
        for one in pending:
            one.result()

    def __call__(self, path, image, key, row, **told):
        """Write the picture of a job: `told` goes into its provenance, beside class, number and seed."""
        known = {"synthetic": True, "class": row["class"], "index": int(row["number"]), "seed": int(row["seed"]), **told}
        text = {KEY: key, FACTS: json.dumps(known), "prompt": row["prompt"]}
        self.pending.append(self.pool.submit(files.write_png, path, image, text))


def speed(run, count, seconds):
    """Images per second of this run; of the one before it where nothing was left to make, None where nobody knows."""
    earlier = places.read(run.previous) if run.previous else None
    return count / seconds if count else (earlier or {}).get("notes", {}).get("images_per_s")


COLUMNS = [
    "tile_id", "root", "file_name", "label", "split", "use", "case_id", "patient", "slide", "group", "mpp", "width", "height", "sha256",
    "mask", "source", "method", "sources", "prompt", "seed", "settings", "lora_sha", "token_sha", "scores", "status", "reason", "run_id",
    "path", "tile_px", "fit",
]  # fmt: skip


def manifest(run, jobs, paths, tiles, tile_px, told):
    """One manifest row per job, in the order of the jobs.

    Args:
        jobs: rows of `policies.job_table`.
        paths: their pictures.
        tiles: manifest the table was made from; micrometres per pixel come from the source tile, or from the class's real tiles.
        told: `told(row, path)` -> {method, settings (dict), scores (dict)} of one job (a namedtuple).
    """
    place = run.folder.relative_to(files.root() / "outputs" / run.experiment / run.step)
    real, rows = data.training(tiles), []
    scale = {name: _um_per_px(real[real["label"].eq(name)].head(100), tile_px) for name in jobs["class"].unique()}
    own = {"root": run.step, "split": "", "use": "labelled", "case_id": "", "patient": "", "slide": "", "width": tile_px, "height": tile_px}
    own |= {"mask": "", "source": "synthetic", "status": "kept", "reason": "", "run_id": run.run_id, "tile_px": tile_px, "fit": "resize"}
    for (index, job), row, path in zip(jobs.iterrows(), jobs.itertuples(), paths, strict=True):
        source, said = job["tile_id"], told(row, path)
        rows.append(
            {
                **own,
                "tile_id": f"{run.step}/{job['job']}",
                "file_name": (place / path.relative_to(run.folder)).as_posix(),
                "label": jobs.at[index, "class"],
                "group": job["target_group"],
                "mpp": _um_per_px(real[real["tile_id"].eq(source)], tile_px) if source else scale[job["class"]],
                "sha256": files.sha256(path),
                "method": said["method"],
                "sources": json.dumps([source] if source else []),
                "prompt": job["prompt"],
                "seed": job["seed"],
                "settings": json.dumps(said["settings"]),
                "lora_sha": job["lora_sha"],
                "token_sha": job["token_sha"],
                "scores": json.dumps(said["scores"]),
                "path": str(path),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _um_per_px(rows, tile_px):
    """Median micrometres per pixel of rows on tiles of this size; NaN where no row knows its own."""
    known = [data.um_per_px(row, tile_px) for _, row in rows[rows["mpp"].notna()].iterrows()]
    return float(np.median(known)) if known else float("nan")


# --- unguided twins of guided tiles --------------------------------------------------------------------------------------


def twin(path):
    """Where the unguided picture of the same seed lies."""
    return path.parent.parent / "plain" / path.name


def twins(rows):
    """Manifest rows of the unguided twins of rows."""
    return rows.assign(path=[str(twin(Path(path))) for path in rows["path"]], sha256="")
