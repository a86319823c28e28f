"""Training the compared arms: equal optimiser updates, several seeds, nothing trained twice.

Every arm gets the same number of updates of the same batch size, so that more tiles never mean more training. Weights are
chosen on real validation tiles; test tiles are predicted here and judged in 07_evaluate.
"""

import itertools
import time

import numpy as np
import pandas as pd
import torch

from histokit.arms import ceilings, fit_classifier, longtail, pseudo_labels
from histokit.core import files
from histokit.diffusion import backbone, codecs
from histokit.tiles import augment, contamination, data, decode, staining
from histokit.training import loop
from histokit.vision import classifiers, encoders, features

VERSION = 3
HELD = 2**30  # bytes of tiles that a network trained end to end keeps in memory


def train(run, arms, sets, tiles, *, seeds, steps, batch_size, lr=0.0, base_model="", external=None, say=lambda text: None):
    """Train every (arm, seed) that is not finished, write its predictions on val and test, and return one row for each.

    `<run>/<arm>/<seed>/` gets predictions.parquet, history.csv, model.safetensors and, last, model.json. A pair whose inputs and
    settings are those of an earlier run is taken from there. Seed s starts every arm from the same weights and random numbers.

    Args:
        arms, sets: from `settle` and `assemble`.
        tiles: manifest of 00_dataset.
        lr: 0 for the mode's own (`classifiers.MODES`).
        base_model: whose autoencoder `real_through: vae` uses.
        external: rows of `comparison.external`, predicted as test tiles are.
        say: called with one line per arm.
    """
    if min(seeds, steps, batch_size) < 1:
        raise ValueError(f"seeds, steps and batch_size must be at least 1, got {seeds}, {steps}, {batch_size}")
    dataset = data.dataset(run)
    real = tiles[tiles["use"].eq("labelled") & tiles["source"].eq("real")]
    held_out = real[real["split"].isin(["val", "test"])].reset_index(drop=True)
    if external is not None and len(external):
        held_out = pd.concat([held_out, external], ignore_index=True)
    codec = None
    rows = []
    for name, arm in arms.items():
        arm = arm | {"encoder": features.of_step(run, arm["encoder"])}
        if place := features.source(arm["encoder"]):
            run.input(place)
        if place := features.weights(arm["encoder"]):
            contamination.refuse(place, tiles, f"encoder {arm['encoder']!r}")
            if external is not None and len(external):
                contamination.refuse(place, external.assign(split="test"), f"encoder {arm['encoder']!r}")
        coded = "vae" in (arm["real_through"], arm["through"])
        if coded and codec is None:
            codec = codecs.load(base_model, run.device, dataset.tile_px, tiles)
        fixed = held_out, dataset, codec if coded else None
        if arm["pseudo"]:
            named = [pseudo_labels.added(run, name, arm["pseudo"], s, sets[name], tiles, dataset.classes) for s in range(seeds)]
            say(named[0][1])
            each = [_Trial(run, name, arm, part, *fixed) for part, _ in named]
        else:
            each = [_Trial(run, name, arm, sets[name], *fixed)] * seeds
        rows += [one.finished(s, steps, batch_size, lr) or one.train(s, steps, batch_size, lr) for s, one in enumerate(each)]
        val = [row["val_balanced_accuracy"] for row in rows[-seeds:]]
        spread = f"{np.mean(val):.3f} ({min(val):.3f} to {max(val):.3f})"
        say(f"{name}: {seeds} x {rows[-1]['updates']} updates, balanced accuracy on val {spread}")
    table = pd.DataFrame(rows)
    check_equal_updates(table)
    return table


def check_equal_updates(table):
    """Raise RuntimeError unless all trained arms had the same updates and saw the same number of images."""
    trained = table[table["updates"].gt(0)]
    if trained[["updates", "images_seen"]].drop_duplicates().shape[0] > 1:
        seen = ", ".join(
            f"{row.arm}: {row.updates} x {row.images_seen // row.updates}" for row in trained.drop_duplicates("arm").itertuples()
        )
        raise RuntimeError(f"arms were not trained alike (updates x batch: {seen}); a difference between them would mean nothing")


def histories(run, arms, seeds):
    """The checks during training of every pair, one DataFrame with arm and seed; untrained arms have none."""
    found = [(name, s, run.path(name, str(s), "history.csv")) for name in arms for s in range(seeds)]
    tables = [files.read_table(path).assign(arm=name, seed=s) for name, s, path in found if path.is_file()]
    empty = pd.DataFrame(columns=["step", "loss", "val_balanced_accuracy", "arm", "seed"])
    return pd.concat(tables, ignore_index=True) if tables else empty


def val_recall(run, arms, seeds, classes):
    """Recall of each class on validation tiles, one row per arm, seed and class that has any: arm, seed, label, recall, tiles."""
    rows = []
    for name, s in ((name, s) for name in arms for s in range(seeds)):
        table = files.read_table(run.path(name, str(s), "predictions.parquet"))
        val = table[table["split"].eq("val")]
        called = val[[f"p_{c}" for c in classes]].to_numpy().argmax(axis=1)
        for y, part in (called == val["y"]).groupby(val["y"]):
            rows.append({"arm": name, "seed": s, "label": classes[y], "recall": part.mean(), "tiles": len(part)})
    return pd.DataFrame(rows, columns=["arm", "seed", "label", "recall", "tiles"])


def _after(first, second):
    """One history of two stages of training, steps counted on."""
    ended = int(first["step"].max())
    joined = pd.concat([first, second.assign(step=second["step"] + ended)], ignore_index=True)
    joined.attrs.update(best_step=ended + second.attrs["best_step"], updates=first.attrs["updates"] + second.attrs["updates"])
    return joined


class _Trial:
    """One arm: its tiles, targets and features, loaded once for all seeds and only if a seed is missing."""

    def __init__(self, run, name, arm, tiles, held_out, dataset, codec):
        self.run, self.name, self.arm, self.codec = run, name, arm, codec
        self.tiles, self.held_out, self.dataset = tiles, held_out, dataset
        self.numbers = {
            f"n_{source}": int(tiles["source"].eq(source).sum()) for source in ("real", "synthetic", staining.SOURCE, pseudo_labels.SOURCE)
        }
        self.n_real = self.numbers["n_real"]
        self.targets = torch.tensor([dataset.label_id(label) for label in tiles["label"]])
        self.y = torch.tensor([dataset.label_id(label) for label in held_out["label"]], dtype=torch.int64)
        self.is_val = np.array(held_out["split"].eq("val"))
        self.encoder = self._encoder(0)
        self.cached = None
        rows = [tiles[["sha256", "file_name", "label"]].values.tolist(), held_out[["sha256", "tile_id", "label", "split"]].values.tolist()]
        said_by_rows = ("synthetic", "status", "per_class", "recolour", "real_tiles", "from")
        settings = {key: value for key, value in arm.items() if key not in said_by_rows}
        if settings["synthetic_share"] == 1:
            del settings["synthetic_share"]  # it joined later, and what was trained without it is still what it was
        if settings["through"] == "none":
            del settings["through"]  # so did this
        if not settings["pseudo"]:
            del settings["pseudo"]  # and this
        modules = (classifiers, fit_classifier, longtail, features, encoders, augment, loop, decode, data, backbone)
        versions = [VERSION, *(module.VERSION for module in modules)]
        size = [dataset.classes, dataset.roles, dataset.tile_px, dataset.fit, codec.identity if codec else None]
        self.key = files.digest(versions, settings, self.encoder.identity, rows, size, run.seed)

    def _encoder(self, s):
        full = self.arm["mode"] == "full"
        return features.load(self.arm["encoder"], self.run.device, frozen=not full, seed=files.seed(self.run.seed, "network", s))

    def finished(self, s, steps, batch_size, lr):
        """model.json of a finished pair with the same key, here or in the run before; None otherwise."""
        key = self._pair_key(s, steps, batch_size, lr)
        folder = self.run.path(self.name, str(s), "model.json").parent
        earlier = [self.run.previous / self.name / str(s)] if self.run.previous else []
        for place in [folder, *earlier]:
            if (place / "model.json").is_file() and (found := files.read_json(place / "model.json"))["key"] == key:
                for path in sorted(place.iterdir(), key=lambda p: p.name == "model.json"):  # model.json last
                    if place != folder and path.is_file():
                        files.link(path, folder / path.name)
                return self._row(found, reused=True)
        return None

    def _pair_key(self, s, steps, batch_size, lr):
        return files.digest(self.key, s, steps, batch_size, lr or classifiers.MODES[self.arm["mode"]])

    def train(self, s, steps, batch_size, lr):
        """Train one seed, predict val and test, save; returns its row."""
        start, key, lr = time.perf_counter(), self._pair_key(s, steps, batch_size, lr), lr or classifiers.MODES[self.arm["mode"]]
        folder = self.run.path(self.name, str(s), "model.json").parent
        (folder / "model.json").unlink(missing_ok=True)
        seed, n_classes = files.seed(self.run.seed, "classifier", s), len(self.dataset.classes)
        encoder = self._encoder(s) if self.arm["mode"] == "full" else self.encoder
        size = {"tile_px": self.dataset.tile_px, "fit": self.dataset.fit}
        model = classifiers.Classifier(encoder, self.dataset.classes, self.arm["mode"], **size, seed=seed)

        targets, generator = self._labels(s), torch.Generator().manual_seed(seed)
        counts = longtail.class_counts(targets, n_classes)
        shares = longtail.class_shares(counts, self.arm["sampler"])
        updates = 0 if self.arm["mode"] in ("knn", "prototype") else steps
        objective = self._objective(counts, shares)
        logs = self.run.path("logs", self.name, str(s), "history.csv").parent
        if updates:
            how = {"lr": lr, "seed": seed, "folder": logs, "identity": {"pair": key}}
            history = self._fit(model, targets, updates, batch_size, objective, generator, how)
        else:
            self._remember(model, targets, shares)
        model.facts["scale"] = objective.scale
        logits = self._held_out_logits(model)

        val_y = self.y[self.is_val]
        model.facts["temperature"] = fit_classifier.fit_temperature(logits[self.is_val], val_y)
        self._write_predictions(folder, s, classifiers.probabilities(logits / model.temperature))
        facts = {
            "key": key,
            "arm": self.name,
            "seed": s,
            "settings": self.arm,
            "run_seed": self.run.seed,
            "lr": lr,
            "batch_size": batch_size,
        }
        facts |= {"updates": updates, "images_seen": updates * batch_size, "best_step": history.attrs["best_step"] if updates else 0}
        facts |= self.numbers | {"class_counts": counts.tolist()}
        facts |= {"val_balanced_accuracy": fit_classifier.balanced_accuracy(logits[self.is_val], val_y)}
        if updates:
            timing = ["seconds", "images_per_s", "peak_gb"]  # left out: what is hashed must not depend on the machine's mood
            files.write_table(folder / "history.csv", history.drop(columns=timing, errors="ignore"))
        model.save(folder, **facts)
        for path in (*logs.rglob("checkpoint.safetensors"), *logs.rglob("best.safetensors")):  # model.safetensors holds the result
            path.unlink()
        return self._row(files.read_json(folder / "model.json"), seconds=time.perf_counter() - start)

    def _objective(self, counts, shares):
        """The longtail.Objective of this arm."""
        tail = torch.tensor([self.dataset.roles.get(name) == "tail" for name in self.dataset.classes])
        return longtail.Objective(counts, shares, tail, **{name: self.arm[name] for name in longtail.SETTINGS})

    def _fit(self, model, targets, updates, batch_size, objective, generator, how):
        """Train `model` as the arm says, in one stage or two; returns the history.

        how: {lr, seed, folder (of logs), identity}.
        """
        n_classes, history = len(self.dataset.classes), None
        chosen = {"lr": how["lr"], "select_by": self.arm["select_by"], "patience": self.arm["patience"]}
        limit = torch.tensor(self.tiles["source"].eq("synthetic").tolist(), dtype=torch.bool), self.arm["synthetic_share"]
        for stage, (count, sampler) in enumerate(self._stages(updates)):
            batches = longtail.draws(targets, n_classes, count, batch_size, generator, sampler, *limit)
            given = {"mixture": None, "only_last": stage > 0, **chosen}
            if self.arm["mixture"] != "none":
                mixture = self.arm["mixture"], objective.options["alpha"]
                given["mixture"] = longtail.mixtures(batches, targets, n_classes, generator, *mixture, *limit)
            if stage:
                self._new_head(model, how["seed"])
            if self.arm["mode"] == "full":
                own = {"seed": how["seed"], "folder": how["folder"], "identity": how["identity"]}
                own |= {"seed": files.seed(how["seed"], stage), "folder": how["folder"] / "crt"} if stage else {}
                part = self._fit_full(model, targets, batches, objective, **given, **own)
            else:
                part = self._fit_frozen(model, targets, batches, objective, generator=generator, **given)
            history = part if history is None else _after(history, part)
        if self.arm["decouple"] == "tau_norm":
            with torch.no_grad():
                model.last.weight.copy_(longtail.tau_normalised(model.last.weight, objective.options["tau_norm"]))
                model.last.bias.zero_()
        return history

    def _stages(self, updates):
        """(updates, sampler) of each part of the training; cRT trains a new head on balanced batches in the last part."""
        if self.arm["decouple"] != "crt":
            return [(updates, self.arm["sampler"])]
        last = round(updates * (longtail.OPTIONS | self.arm["options"])["crt"])
        return [(updates - last, self.arm["sampler"]), (last, "balanced")]

    def _new_head(self, model, seed):
        """The last layer drawn anew, for classifier re-training (cRT); Kang et al. (2020), arXiv:1910.09217, section 4."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(files.seed(seed, "new head"))
            model.last.reset_parameters()

    def _remember(self, model, targets, shares):
        """Nearest neighbours and prototypes learn nothing, they keep what they are shown."""
        feats, device = self._features()[0], model.encoder.device
        flat = torch.from_numpy(np.array(feats)).flatten(0, 1)
        model.head.fit(flat.to(device), targets.repeat_interleave(feats.shape[1]).to(device), shares)

    def _fit_frozen(self, model, targets, batches, objective, only_last, **how):
        feats, held_out = self._features()
        if not only_last:
            model.head.standardise(torch.from_numpy(np.array(feats[: self.n_real or len(feats), 0])))
        val = (held_out[self.is_val], self.y[self.is_val]) if self.is_val.any() else None
        only = list(model.last.parameters()) if only_last else None
        return fit_classifier.fit_head(model.head, feats, targets, batches, objective, val=val, only=only, **how)

    def _fit_full(self, model, targets, batches, objective, **how):
        held = self.held_out[self.is_val].reset_index(drop=True)
        val = (self._kept(held, data.pixels), self.y[self.is_val]) if len(held) else None
        augment = {"turns": self.arm["augment"] != "none", "jitter": self.arm["augment"] == "stain"}
        return fit_classifier.fit_full(model, self._reader(), targets, batches, objective, val=val, **augment, **how)

    def _held_out_logits(self, model):
        """Logits [N, C] on the CPU of the tiles kept out, scaled as they are used, before any temperature."""
        if self.arm["mode"] == "full":
            return model.eval().logits_of(self.held_out)
        with torch.no_grad():
            return model.eval().from_features(torch.from_numpy(np.array(self._features()[1]))).cpu()

    def _labels(self, s):
        if self.arm["labels"] == "own":
            return self.targets
        generator = torch.Generator().manual_seed(files.seed(self.run.seed, "shuffled labels", s))
        made = longtail.misplaced(self.targets[self.n_real :], len(self.dataset.classes), generator)
        return torch.cat([self.targets[: self.n_real], made])

    def _features(self):
        if self.cached is None:
            how, coded = {"augment": self.arm["augment"]}, self._coded(self.tiles)
            ends = [0, *(np.flatnonzero(np.diff(coded)) + 1), len(coded)]  # what goes through the codec lies together
            parts = [
                features.embed(self.encoder, self.tiles.iloc[a:b], self.run, codec=self.codec if coded[a] else None, **how)
                for a, b in itertools.pairwise(ends)
            ]
            parts = [part if part.ndim == 3 else part[:, None] for part in parts if len(part)]
            own = ~self.held_out["split"].eq("external")  # tiles from elsewhere may be fitted in another way
            asked = [features.embed(self.encoder, rows, self.run) for rows in (self.held_out[own], self.held_out[~own]) if len(rows)]
            self.cached = features.stacked(parts), features.stacked(asked) if len(asked) > 1 else asked[0]
        return self.cached

    def _coded(self, tiles):
        """Which tiles [N] pass through the autoencoder before the classifier sees them."""
        asked = {"real": self.arm["real_through"] == "vae", "given": self.arm["through"] == "vae"}
        given = tiles[ceilings.GIVEN].eq(True).to_numpy(bool) if ceilings.GIVEN in tiles else np.zeros(len(tiles), bool)
        return tiles["source"].isin(["real", pseudo_labels.SOURCE]).to_numpy() & (given & asked["given"] | asked["real"])

    def _reader(self):
        """`read(indices)` -> uint8 tiles of this arm."""

        def pixels(tiles):
            out = data.pixels(tiles)
            coded = self._coded(tiles)
            if coded.any():
                out[coded] = self.codec(data.pixels(tiles[coded], self.codec.reads_px))
            return out

        return self._kept(self.tiles, pixels)

    def _kept(self, tiles, pixels):
        """`read(indices)` -> uint8 tiles; held in memory up to `HELD` bytes, else read from disk batch by batch."""
        if len(tiles) * self.dataset.tile_px**2 * 3 > HELD:
            return lambda rows: pixels(tiles.iloc[np.asarray(rows)])
        held = pixels(tiles)
        return lambda rows: held[np.asarray(rows)]

    def _write_predictions(self, folder, s, probabilities):
        table = self.held_out[["tile_id", "case_id", "group", "split"]].assign(
            arm=self.name, seed=s, gen_seed=self.run.generator_seed, y=self.y.numpy()
        )
        columns = {f"p_{name}": probabilities[:, i] for i, name in enumerate(self.dataset.classes)}
        files.write_table(folder / "predictions.parquet", pd.concat([table, pd.DataFrame(columns, index=table.index)], axis=1))

    def _row(self, found, seconds=0.0, reused=False):
        settings = {key: self.arm[key] for key in ("mode", "encoder", "sampler", "loss", "augment", "synthetic")}
        results = ("updates", "images_seen", "best_step", "temperature", "val_balanced_accuracy")
        row = {"arm": found["arm"], "seed": found["seed"], **settings, **self.numbers, **{key: found[key] for key in results}}
        row = {key: float("nan") if value is None else value for key, value in row.items()}
        return {**row, "seconds": seconds, "reused": reused}
