"""What 05_select would say of pictures that no step has written yet: the numbers beneath the preview of a panel.

The judge, the encoder and the thresholds are those of the first 05_select of the recipe that reads this step. Nothing is recorded and
nothing depends on it: a panel changes no key.
"""

import functools
import json
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.runs import places, recipe, selection_reasons
from histokit.select import scoring, screening, selection
from histokit.tiles import data
from histokit.vision import classifiers, features

SELECT, ENCODER = "05_select", "mini-ssl"
Reading = namedtuple("Reading", "good said rows")  # would it be kept, in words; (name, value, what is asked) of each number


class PreviewScores:
    """`readings(images, jobs)` -> a Reading of each picture, for `widgets.tuner`.

    Args:
        run: runs.Run of the notebook with the panel.
        tiles: manifest of 00_dataset.
        guide: guides.Pictures that steers the pictures, or None; it is no judge of them.

    `remark` says who judges, or why nobody does.
    """

    def __init__(self, run, tiles, guide=None):
        self.run, self.tiles, self.guide, self.known = run, tiles, guide, {}

    @functools.cached_property
    def asked(self):
        """(parameters of the step that will judge, {} where there is none; why the recipe cannot say)."""
        return _selection(self.run)

    @functools.cached_property
    def judge(self):
        """(the classifiers that judge, why there are none). Loaded when somebody looks."""
        found, trouble = self.asked
        step = found.get("judge")
        if not step:
            return [], trouble or "No 05_select of the recipe reads this step, so there is no judge to ask."
        folder = places.find(self.run.experiment, step, "")
        if folder is None:
            return [], f"The judge, {step}, is not trained yet."
        panel = [classifiers.load(one, self.run.device) for one in classifiers.trained(folder, step, found.get("judge_arm", ""))]
        if self.guide is not None and self.guide.identity in map(classifiers.identity, panel):
            return [], f"{step} steers these pictures, so it cannot judge them."
        if any(judge.facts["n_synthetic"] for judge in panel):
            return [], f"{step} was trained on synthetic tiles, so it cannot judge them."
        return panel, ""

    @property
    def remark(self):
        return self.judge[1]

    def __call__(self, images, jobs):
        return [self._said(row) for row in self.table(images, jobs).itertuples()]

    def _said(self, row):
        rows = [] if np.isnan(row.judge) else [("judge", f"{row.judge:.2f}", f"{row.judge_least:.2f} or more" if row.judge_least else "")]
        rows.append(("like the nearest training tile", f"{row.nearest:.3f}", f"a copy from {row.copy:.3f} on; it is {row.nearest_tile}"))
        rows += [] if np.isnan(row.source) else [("like its source", f"{row.source:.3f}", "")]
        rows.append(("stain, in deviations", f"{row.stain:.1f}", f"at most {row.stain_most:.1f}" if np.isfinite(row.stain_most) else ""))
        step = self.asked[0].get("step", SELECT)
        if row.status == "kept":
            return Reading(True, f"would be kept by {step}{'' if self.judge[0] else ', as far as can be said without a judge'}", rows)
        return Reading(False, f"would not be kept by {step}: {selection_reasons.said(row.reason)}", rows)

    def table(self, images, jobs):
        """What 05 measures of pictures, a row each.

        Args:
            images: uint8 [n, H, W, 3]. jobs: their rows of `policies.job_table`.

        Returns:
            DataFrame status, reason (of `selection.decide`, among these pictures alone), judge (probability of the class, NaN without
            one), first (whether the class is the judge's first answer), judge_least (what 05 asks), nearest (likeness to the nearest
            training tile in [-1, 1], 1 for a copy), nearest_tile, copy (likeness from which on it is one), source (likeness to the
            source, NaN without one), stain (deviations from real tiles) and stain_most.
        """
        asked, panel, parts = self.asked[0], self.judge[0], []
        training, encoder = data.training(self.tiles), features.load(asked.get("encoder") or ENCODER, self.run.device)
        centroids = asked.get("centroids") or "unit"
        with tempfile.TemporaryDirectory() as folder:
            rows = self._rows(images, jobs, Path(folder))
            for name, own in rows.groupby("label", sort=False):
                usual, cuts = self._real(name, training, encoder)
                scores = screening.scored(own.reset_index(drop=True), self.tiles, name, panel, encoder, centroids, usual)
                decided, cut = selection.decide(scores, cuts, name), dict(zip(cuts["name"], cuts["cut"], strict=True))
                part = decided.assign(judge=scores["judge"], first=scores["judge_rank"].eq(1), judge_least=cut["judge_p"])
                part = part.assign(nearest=scores["similarity_feature"], nearest_tile=scores["nearest_feature"], copy=cut["copy"])
                part = part.assign(source=self._sources(own, training, encoder), stain=scores["stain"], stain_most=cut["stain"])
                parts.append(part.set_index(own.index))
        return pd.concat(parts).sort_index()

    def _rows(self, images, jobs, folder):
        """Manifest rows of pictures, each in a file of its own, to be read as 05 reads tiles."""
        paths = [folder / f"{i}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            files.write_png(path, image)
        rows = pd.DataFrame({"path": [str(path) for path in paths], "sha256": [files.sha256(path) for path in paths]})
        rows = rows.assign(
            tile_id=[f"picture {i + 1}" for i in rows.index], label=jobs["class"].to_list(), made_from=jobs["tile_id"].to_list()
        )
        rows["sources"] = [json.dumps([tile] if tile else []) for tile in rows["made_from"]]
        return rows.assign(source="synthetic", mpp=np.nan, tile_px=int(self.tiles["tile_px"].iloc[0]), fit=self.tiles["fit"].iloc[0])

    def _real(self, name, training, encoder):
        """(what is usual of real tiles, cuts) of one class, found once."""
        if "" not in self.known:
            self.known[""] = screening.typical(training)
        if name not in self.known:
            real = screening.of_real(self.tiles, name, self.judge[0], encoder, self.known[""])
            self.known[name] = selection.calibrate(self.asked[0].get("thresholds") or {}, real)
        return self.known[""], self.known[name]

    def _sources(self, rows, training, encoder):
        """Likeness [B] of each picture to the tile it was made from, over the eight flips and rotations; NaN for none."""
        at = training["tile_id"].reset_index(drop=True)
        place = {tile: i for i, tile in at[at.isin(rows["made_from"])].items()}
        if not place:
            return np.full(len(rows), np.nan)
        views, real = screening.spaces(rows, training, encoder)["feature"]
        alike = [
            float(scoring.nearest_similarity(views[[i]], real[[place[tile]]])[0]) if tile in place else np.nan
            for i, tile in enumerate(rows["made_from"])
        ]
        return np.array(alike)


def _selection(run):
    """Parameters of the step that will judge this run's pictures, {} where there is none; and why the recipe cannot say."""
    if not run.recipe:
        return {}, ""
    try:
        read = recipe.read(files.root() / run.recipe)
    except (ValueError, OSError) as error:
        return {}, f"{run.recipe} cannot be read, so there is no judge to ask: {str(error).splitlines()[0]}"
    for step in read.steps.values():
        found = recipe.parameters(read, step, run.class_name)
        if step.notebook.stem == SELECT and found.get("source") == run.step:
            return found, ""
    return {}, ""
