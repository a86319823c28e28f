"""Compared trainings of a segmenter: what each arm learns from, one (arm, seed) after the other, and what it then gets right.

Arms differ in their tiles alone. Every arm takes the same updates of the same number of tiles; `share` says how many of these come from
what stands beside the annotated tiles. `fit_segmenter` trains one.
"""

import json
import time

import numpy as np
import pandas as pd
import torch

from histokit.arms import comparison, fit_segmenter
from histokit.core import files, pictures
from histokit.metrics import segmentation
from histokit.tiles import data, masks, staining
from histokit.vision import segmenters

VERSION = 1
ARM = {
    "real": "annotated",  # annotated; all takes the masks that are held back as well, an upper bound; none
    "synthetic": "",  # step whose tiles and masks stand beside, a 30_style_layout or a 05_select of it
    "status": "kept",  # which of them: kept, rejected, quarantined, or all
    "per_class": 0,  # at most so many a class; 0 for all
    "recolour": "none",  # reinhard, macenko: annotated tiles in the stain of cases that have no mask
    "copies": 4,  # of each annotated tile in other stains, with recolour
    "pseudo": {},  # tiles without a mask, drawn by an earlier arm of the same seed: {"arm": "real", "confidence": 0.0}
    "share": 0.8,  # of the draws, that of what stands beside the annotated tiles
    "masks": "own",  # shuffled: every made tile gets the mask of another, a control that must not help
    "augment": "symmetries",  # none, symmetries, stain
}
CHOICES = {
    "real": ("annotated", "all", "none"),
    "status": ("kept", "rejected", "quarantined", "all"),
    "recolour": ("none", *staining.METHODS),
    "masks": ("own", "shuffled"),
    "augment": ("none", "symmetries", "stain"),
}
HELD = 2**31  # bytes of pixels and masks that an arm holds in memory; more is read batch by batch


def settle(arms):
    """{name: full settings} of arms as a recipe writes them; ValueError names a wrong key or value and the nearest right one."""
    settled = {}
    for name, arm in comparison.checked(arms, ARM, CHOICES):
        beside = [key for key in ("synthetic", "recolour", "pseudo") if arm[key] not in ("", "none", {})]
        if len(beside) > 1:
            raise ValueError(f"arm {name!r}: {' and '.join(beside)} both stand beside the annotated tiles; one alone can be compared")
        if arm["pseudo"]:
            pseudo = {"arm": "", "confidence": 0.0} | arm["pseudo"]
            if pseudo["arm"] not in settled or set(pseudo) != {"arm", "confidence"}:
                raise ValueError(
                    f"arm {name!r}: pseudo is {arm['pseudo']!r}; name an arm that stands before it, {{arm: real, confidence: 0.9}}"
                )
            arm["pseudo"] = pseudo
        if not beside:
            idle = next((key for key in ("status", "per_class", "share", "masks") if key in (arms[name] or {})), "")
            if idle:
                raise ValueError(f"arm {name!r}: {idle} does nothing where nothing stands beside the annotated tiles; leave it out")
            arm["share"] = 0.0
        if arm["real"] == "none":
            arm["share"] = 1.0 if beside else 0.0
        if not 0 <= arm["share"] <= 1 or (arm["real"] == "none" and not beside):
            raise ValueError(f"arm {name!r}: share is {arm['share']!r} and real {arm['real']!r}; there is nothing to learn from")
        settled[name] = arm
    return settled


class Tiles:
    """Pixels and layer ids of manifest rows, read once, or batch by batch where they are many.

    Args:
        rows: manifest rows. layers: masks.Layers. tile_px: side.
        ids: uint8 [N, px, px] where they are not those of the rows' own masks.
    """

    def __init__(self, rows, layers, tile_px, ids=None):
        self.rows, self.layers, self.tile_px, self.own = rows.reset_index(drop=True), layers, tile_px, ids
        self.held = None
        if len(rows) * tile_px**2 * 4 <= HELD:
            self.held = self._pixels(self.rows), masks.pixels(self.rows, layers, tile_px) if ids is None else ids

    def __len__(self):
        return len(self.rows)

    def _pixels(self, rows):
        return data.pixels(rows, self.tile_px) if len(rows) else np.empty((0, self.tile_px, self.tile_px, 3), np.uint8)

    def __call__(self, indices):
        """Pixels uint8 [B, px, px, 3] and ids uint8 [B, px, px]."""
        if self.held:
            return self.held[0][indices], self.held[1][indices]
        some = self.rows.iloc[indices]
        return self._pixels(some), masks.pixels(some, self.layers, self.tile_px) if self.own is None else self.own[indices]


def joined(real, beside):
    """`read(rows)` over two `Tiles`: numbers from 0 are of the first, from its length on of the second."""

    def read(rows):
        rows = np.asarray(rows)
        late = rows >= len(real)
        pixels = np.empty((len(rows), real.tile_px, real.tile_px, 3), np.uint8)
        ids = np.empty(pixels.shape[:3], np.uint8)
        for tiles, which, start in ((real, ~late, 0), (beside, late, len(real))):
            if which.any():
                pixels[which], ids[which] = tiles(rows[which] - start)
        return pixels, ids

    return read


def train(run, arms, tiles, dataset, *, seeds, network="small", weights="", how=None, say=print):
    """Train every (arm, seed) that is not there yet; returns one row each: arm, seed, n_real, n_beside, share, updates, val_dice, reused.

    A finished pair is never trained twice, also where the recipe around it changed. Each writes `<arm>/<seed>/`: segmenter.safetensors,
    segmenter.json, history.csv and scores.parquet, which `evaluate.segmentation` reads.

    Args:
        arms: from `settle`.
        tiles: manifest; dataset: data.Dataset.
        network, weights: see `segmenters.Segmenter`. how: fit_segmenter.Settings.
    """
    layers, how, rows = masks.Layers.of_dataset(dataset), how or fit_segmenter.Settings(), []
    held = masks.annotated(tiles, "val", "test")
    judged = Tiles(held, layers, dataset.tile_px)
    for name, arm in arms.items():
        trial = _Trial(run, name, arm, tiles, dataset, layers, judged, network, weights, how)
        for s in range(seeds):
            found = trial.finished(s)
            if found is None:
                say(f"{name}, seed {s}")
            rows.append({**(found or trial.train(s)), "reused": found is not None})
    return pd.DataFrame(rows)


def histories(run, arms, seeds):
    """What validation said while each (arm, seed) was trained: DataFrame arm, seed, step, val_dice."""
    parts = []
    for name in arms:
        for s in range(seeds):
            path = run.path(name, str(s), "history.csv")
            if path.is_file() and "val_dice" in (table := files.read_table(path)):
                parts.append(table[["step", "val_dice"]].dropna().assign(arm=name, seed=s))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["step", "val_dice", "arm", "seed"])


def hardest(run, arms, tiles, layers, tile_px, most=4):
    """Validation tiles that seed 0 of the first arm gets least of, as every arm sees them: DataFrame picture uint8 [H, W, 3], caption."""
    first = files.read_table(run.path(arms[0], "0", "scores.parquet"))
    own = first[first["split"].eq("val") & first["layer_id"].gt(0)].groupby("tile_id")[["tp", "fp", "fn"]].sum()
    own = own[own["tp"] + own["fn"] > 0]
    worst = segmentation.dice(own["tp"], own["fp"], own["fn"]).argsort(kind="stable")[:most]
    rows = tiles.set_index("tile_id", drop=False).loc[own.index[worst]].reset_index(drop=True)
    pixels, ids, shown = data.pixels(rows, tile_px), masks.pixels(rows, layers, tile_px), []
    for name in arms:
        seen = segmenters.load(run.path(name, "0", "segmenter.json").parent, run.device).ids(pixels)
        tp, fp, fn = (part[:, 1:].sum(1) for part in segmentation.counts(ids, seen, len(layers)))
        for i, picture in enumerate(pictures.outlined(pictures.outlined(pixels, ids), seen, (0, 230, 120))):
            caption = f"{rows['label'].iloc[i]}\n{name} {segmentation.dice(tp[i], fp[i], fn[i]):.2f}"
            shown.append({"tile": i, "picture": picture, "caption": caption})
    return pd.DataFrame(shown).sort_values("tile", kind="stable").reset_index(drop=True)


class _Trial:
    """One arm: its tiles, loaded when a seed is missing."""

    def __init__(self, run, name, arm, tiles, dataset, layers, judged, network, weights, how):
        self.run, self.name, self.arm, self.tiles, self.dataset, self.layers = run, name, arm, tiles, dataset, layers
        self.judged, self.network, self.weights, self.how, self.loaded = judged, network, weights, how, None
        every = arm["real"] == "all"
        self.real = masks.annotated(tiles, "train", every=every) if arm["real"] != "none" else tiles.head(0)
        self.beside, self.places = tiles.head(0), None
        if arm["synthetic"]:
            self.beside = self._made()
        elif arm["recolour"] != "none":
            donors = data.learnable(tiles)
            drawn = set(self.real["case_id"])
            cases = sorted(set(donors["case_id"]) - drawn) or sorted(set(donors["case_id"]))
            stained, places, worn = staining.restained(
                self.real, donors, arm["copies"], run.seed, name, cases=cases, method=arm["recolour"]
            )
            kept = [i for i, case in enumerate(worn) if case]
            self.beside, self.places = stained.iloc[kept].reset_index(drop=True), [places[i] for i in kept]
        elif arm["pseudo"]:
            real = tiles[tiles["split"].eq("train") & tiles["source"].eq("real") & tiles["use"].ne("withheld")]
            self.beside = real[~masks.has(real)].reset_index(drop=True)
        if arm["share"] and not len(self.beside):
            raise ValueError(
                f"arm {name!r}: nothing stands beside the annotated tiles ({arm}); is every case annotated, or all turned down?"
            )
        known = [[row.tile_id, row.sha256, row.mask] for part in (self.real, self.beside, judged.rows) for row in part.itertuples()]
        modules = (fit_segmenter, segmenters, segmentation, masks, data, staining)
        versions = [VERSION, *(module.VERSION for module in modules if hasattr(module, "VERSION"))]
        told = {key: value for key, value in arm.items() if key not in ("synthetic", "status", "per_class")}
        size = [dataset.layers, dataset.tile_px, dataset.fit, network, weights, files.plain(vars(how))]
        self.key = files.digest(versions, told, known, size, run.seed)

    def _made(self):
        rows = data.used(data.load(self.run, step=self.arm["synthetic"]), self.arm["status"], self.arm["per_class"])
        if len(rows) and rows["mask"].fillna("").eq("").any():
            raise ValueError(
                f"arm {self.name!r}: tiles of {self.arm['synthetic']} have no mask; name a 30_style_layout, or a 05_select of it"
            )
        kept = set(self.tiles.loc[self.tiles["split"].ne("train") | self.tiles["use"].eq("withheld"), "tile_id"])
        for row in rows.itertuples():
            if seen := kept & set(json.loads(row.sources)):
                raise ValueError(f"{row.tile_id} was made from {sorted(seen)[0]!r}, which is not for training; make such tiles again")
        return rows

    def _folder(self, s, arm=""):
        return self.run.path(arm or self.name, str(s), "segmenter.json").parent

    def _pair(self, s):
        beside = self._folder(s, self.arm["pseudo"]["arm"]) if self.arm["pseudo"] else None
        return files.digest(self.key, s, files.read_json(beside / "segmenter.json")["key"] if beside else "")

    def finished(self, s):
        """The row of a finished pair with the same key, here or in the run before; None otherwise."""
        key, folder = self._pair(s), self._folder(s)
        for place in [folder, *([self.run.previous / self.name / str(s)] if self.run.previous else [])]:
            path = place / "segmenter.json"
            if path.is_file() and (place / "scores.parquet").is_file() and files.read_json(path).get("key") == key:
                for one in sorted(place.iterdir(), key=lambda p: p.name == "segmenter.json"):
                    if place != folder and one.is_file():
                        files.link(one, folder / one.name)
                return self._row(files.read_json(path))
        return None

    def _load(self):
        if self.loaded is None:
            px = self.dataset.tile_px
            real = Tiles(self.real, self.layers, px)
            ids = None
            if self.places is not None:
                ids = (masks.pixels(self.real, self.layers, px) if len(self.real) else np.empty((0, px, px), np.uint8))[self.places]
            elif self.arm["masks"] == "shuffled" and len(self.beside):
                ids = masks.pixels(self.beside, self.layers, px)
                ids = ids[np.roll(files.shuffled(range(len(ids)), self.run.seed, "shuffled masks"), 1)]
            elif self.arm["pseudo"]:
                ids = np.zeros((len(self.beside), px, px), np.uint8)  # drawn anew for each seed
            self.loaded = real, Tiles(self.beside, self.layers, px, ids)
        return self.loaded

    def _pseudo(self, s, beside):
        """The tiles that the earlier arm is sure enough of, with what it sees on them."""
        teacher = segmenters.load(self._folder(s, self.arm["pseudo"]["arm"]), self.run.device)
        pixels = beside._pixels(beside.rows)
        ids, sure = teacher.ids(pixels), teacher.confidence(pixels)
        kept = np.flatnonzero(sure >= self.arm["pseudo"]["confidence"])
        if not len(kept):
            raise ValueError(
                f"arm {self.name!r}: {self.arm['pseudo']['arm']} is nowhere as sure as {self.arm['pseudo']['confidence']}; "
                f"its most is {sure.max():.2f}"
            )
        return Tiles(beside.rows.iloc[kept], self.layers, self.dataset.tile_px, ids[kept])

    def train(self, s):
        """Train one seed, look at val and test, save; returns its row."""
        begun, key, folder = time.perf_counter(), self._pair(s), self._folder(s)
        (folder / "segmenter.json").unlink(missing_ok=True)
        real, beside = self._load()
        if self.arm["pseudo"]:
            beside = self._pseudo(s, beside)
        seed = files.seed(self.run.seed, "segmenter", s)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # every arm of a seed starts from the same weights
            net = segmenters.Segmenter(self.network, self.layers.names, self.dataset.tile_px, self.weights).to(self.run.device)
        val = self.judged.rows["split"].eq("val").to_numpy()
        pixels, ids = self.judged(np.arange(len(val)))
        logs = self.run.path("logs", self.name, str(s), "history.csv").parent
        own = (pixels[val], ids[val], self.judged.rows.loc[val, "case_id"].to_numpy())
        how = (
            self.how
            if self.arm["augment"] == self.how.augment
            else self.how.__class__(**{**vars(self.how), "augment": self.arm["augment"]})
        )
        history = fit_segmenter.fit(
            net,
            joined(real, beside),
            len(real),
            len(beside),
            self.arm["share"],
            how,
            val=own,
            seed=seed,
            folder=logs,
            identity={"pair": key},
        )
        scores = self._scores(net.ids(pixels), ids, s)
        files.write_table(folder / "scores.parquet", scores)
        timing = ["seconds", "images_per_s", "peak_gb"]
        files.write_table(folder / "history.csv", history.drop(columns=timing, errors="ignore"))
        best = history["val_dice"].max() if "val_dice" in history else None
        facts = {"key": key, "arm": self.name, "seed": s, "settings": self.arm, "n_real": len(real), "n_beside": len(beside)}
        facts |= {"share": self.arm["share"], "updates": how.steps, "batch_size": how.batch_size, "val_dice": best}
        net.save(folder, **facts)
        for path in (*logs.rglob("checkpoint.safetensors"), *logs.rglob("best.safetensors")):
            path.unlink()
        return self._row(files.read_json(folder / "segmenter.json"), time.perf_counter() - begun)

    def _scores(self, seen, drawn, s):
        """One row a tile and layer: what was right, extra and lost."""
        tp, fp, fn = segmentation.counts(drawn, seen, len(self.layers))
        own = self.judged.rows[["tile_id", "case_id", "label", "split"]].assign(arm=self.name, seed=s, gen_seed=self.run.generator_seed)
        parts = [own.assign(layer=name, layer_id=k, tp=tp[:, k], fp=fp[:, k], fn=fn[:, k]) for k, name in enumerate(self.layers.names)]
        return pd.concat(parts, ignore_index=True)

    def _row(self, found, seconds=0.0):
        names = ("arm", "seed", "n_real", "n_beside", "share", "updates", "val_dice")
        return {name: found[name] for name in names} | {"seconds": seconds}
