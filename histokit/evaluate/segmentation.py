"""From what every segmenter got right on test tiles to a verdict per patient.

The unit is the patient: its tiles are summed first, and a patient without any foreground has no score and is counted. Patients, draws of
the annotated patients (or generator seeds) and segmenter seeds are resampled together (`metrics.stats`), the same for every arm. A spread
falls as well when all get equally bad, so it never stands without mean and minimum.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.evaluate import wording
from histokit.metrics import segmentation, stats

VERSION = 1
LEVEL = 0.95
MEAN = "mean Dice of patients"
FIGURES = ("mean", "tenth", "sd")  # of the patients' Dice: mean, tenth percentile, deviation


@dataclass(frozen=True)
class Scores:
    """What every arm got right, of the same patients in the same runs.

    Args:
        arms: names [A]. layers: names of the foreground layers [L].
        runs: [R, 3] int, draw of the annotated patients, generator seed, segmenter seed.
        patients: [P], those with any foreground. labels: [P] the class each has most tiles of. without: how many have no foreground.
        counts: [A, R, P, L, 3] int64, pixels right, extra and lost.
        tiles: test tiles. hashes: {"arm/seed": sha256 of the file}.
    """

    arms: list
    layers: list
    runs: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    without: int
    counts: np.ndarray
    tiles: int
    hashes: dict

    def of(self, arm, measure=segmentation.dice):
        """A measure of each run and patient, mean over the foreground layers that the patient has, [R, P]."""
        found = self.by_layer(arm, measure)
        with np.errstate(all="ignore"):
            return np.nanmean(found, axis=-1)

    def by_layer(self, arm, measure=segmentation.dice):
        """The same for each layer, [R, P, L]; NaN where a patient has none of it."""
        tp, fp, fn = np.moveaxis(self.counts[self.arms.index(arm)], -1, 0)
        return np.where(tp + fn > 0, measure(tp, fp, fn), np.nan)

    @property
    def seeds(self):
        return sorted(set(self.runs[:, 2].tolist()))


def read(folders, arms=(), split="test"):
    """The Scores on test tiles below the folders of finished 31_segmentation steps.

    Args:
        folders: one folder, or {(draw, generator): folder}; each holds `<arm>/<seed>/scores.parquet`. An arm that generator 0 of a draw
            alone has, for want of made tiles, stands for every generator of that draw.
        arms: names in the order to show them; others found follow.

    Raises FileNotFoundError where there are none, ValueError where arms were judged on other tiles.
    """
    folders = folders if isinstance(folders, dict) else {(0, 0): folders}
    tables, hashes = {}, {}
    for (draw, generator), folder in folders.items():
        own = {}
        for path in sorted(Path(folder).glob("*/*/scores.parquet")):
            table = files.read_table(path)
            own[path.parts[-3], int(path.parts[-2])] = table[table["split"].eq(split)].sort_values(
                ["layer_id", "tile_id"], ignore_index=True
            )
            where = "" if (draw, generator) == (0, 0) else f"{Path(folder).parent.name}/"
            hashes[f"{where}{path.parts[-3]}/{path.parts[-2]}"] = files.sha256(path)
        mine = {arm for arm, _ in own}
        shared = {(a, s): t for (d, g, a, s), t in tables.items() if (d, g) == (draw, 0) and a not in mine} if generator else {}
        tables |= {(draw, generator, *key): table for key, table in (own | shared).items()}
    found = list(dict.fromkeys(arm for _, _, arm, _ in tables))
    if missing := [arm for arm in arms if arm not in found]:
        raise FileNotFoundError(
            f"{next(iter(folders.values()))} holds no scores.parquet of arm {missing[0]!r} (found: {', '.join(found) or 'nothing'})"
        )
    if not tables:
        raise FileNotFoundError(f"{next(iter(folders.values()))} holds no scores.parquet; run that step again")
    order = [*arms, *(arm for arm in found if arm not in arms)]
    runs = sorted(set.intersection(*({(d, g, s) for d, g, a, s in tables if a == arm} for arm in order)))
    if not runs:
        raise ValueError(f"{next(iter(folders.values()))}: no segmenter seed is common to all arms ({', '.join(order)})")
    return _scores(tables, order, runs, hashes)


def _scores(tables, order, runs, hashes):
    first = tables[(*runs[0][:2], order[0], runs[0][2])]
    names = list(dict.fromkeys(first["layer"]))
    for (d, g, arm, s), table in tables.items():
        if len(table) != len(first) or (table[["tile_id", "layer"]] != first[["tile_id", "layer"]]).any(axis=None):
            raise ValueError(f"{arm}/{s} of draw {d}, generator {g} was judged on other test tiles than {order[0]}; run that step again")
    layers = first[first["layer_id"].gt(0)].sort_values("layer_id")["layer"].drop_duplicates().tolist()
    patients, place = np.unique(first["case_id"].astype(str), return_inverse=True)
    label = first.drop_duplicates("tile_id").groupby("case_id")["label"].agg(lambda own: own.value_counts().index[0])
    counts = np.zeros((len(order), len(runs), len(patients), len(layers), 3), np.int64)
    which = first["layer"].map({name: k for k, name in enumerate(layers)})
    kept = which.notna().to_numpy()
    at = place[kept], which[kept].astype(int).to_numpy()
    for a, arm in enumerate(order):
        for r, (d, g, s) in enumerate(runs):
            np.add.at(counts[a, r], at, tables[d, g, arm, s].loc[kept, ["tp", "fp", "fn"]].to_numpy(np.int64))
    has = (counts[0, 0, :, :, 0] + counts[0, 0, :, :, 2]).sum(-1) > 0
    labels = np.array([label[name] for name in patients])
    return Scores(
        order, layers, np.array(runs), patients[has], labels[has], int((~has).sum()), counts[:, :, has], len(first) // len(names), hashes
    )


# --- a verdict -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Figures of every arm as they are and under the same resamples; {arm: [E]}, {arm: [B, E]}, {arm: [J, E]}."""

    scores: Scores
    value: dict
    drawn: dict
    left: dict
    block: np.ndarray
    resamples: int


def figures(dice, patients=None, runs=None):
    """Mean, tenth percentile and deviation of the patients' Dice [R, P], each averaged over runs, [3].

    Args:
        patients, runs: how often each counts; once by default.
    """
    patients = np.ones(dice.shape[1]) if patients is None else patients
    runs = np.ones(dice.shape[0]) if runs is None else runs
    share = patients / patients.sum()
    mean = dice @ share
    order = np.argsort(dice, axis=1)
    reached = np.cumsum(share[order], axis=1)
    tenth = np.take_along_axis(np.take_along_axis(dice, order, 1), (reached >= 0.1 - 1e-12).argmax(1)[:, None], 1)[:, 0]
    correction = patients.sum() / max(patients.sum() - 1, 1e-9)
    sd = np.sqrt(np.maximum(((dice - mean[:, None]) ** 2) @ share * correction, 0))
    return (np.stack([mean, tenth, sd], 1) * (runs / runs.sum())[:, None]).sum(0)


def measure(scores, *, resamples=2000, seed=0):
    """`Measured` of all arms."""
    strata = np.unique(scores.labels, return_inverse=True)[1]
    weights, (without, block) = stats.resample(strata, scores.runs, resamples, seed), stats.leave_out(strata, scores.runs, seed=seed)
    value, drawn, left = {}, {}, {}
    for arm in scores.arms:
        dice = scores.of(arm)
        value[arm] = figures(dice)
        drawn[arm], left[arm] = (
            np.stack([figures(dice, p, r) for p, r in zip(w.cases, w.runs, strict=True)]) if len(w.cases) else np.empty((0, 3))
            for w in (weights, without)
        )
    return Measured(scores, value, drawn, left, block, resamples)


def difference(m, arm, baseline, figure=0):
    """One `wording.Difference` of a figure of two arms; an interval only where enough patients and seeds carry one."""
    s = m.scores
    a, b = s.of(arm), s.of(baseline)
    low = high = chance = np.nan
    if len(s.patients) >= stats.MIN_CASES and len(s.seeds) >= stats.MIN_SEEDS:
        drawn, left = (held[arm][:, [figure]] - held[baseline][:, [figure]] for held in (m.drawn, m.left))
        ends = stats.interval([m.value[arm][figure] - m.value[baseline][figure]], drawn, left, m.block, LEVEL)
        low, high = (float(end[0]) for end in ends)
        chance = stats.sign_flip((a - b).mean(0) / len(s.patients)) if figure == 0 else np.nan
    return wording.Difference(
        endpoint=(MEAN, "tenth percentile of patients", "deviation over patients")[figure], arm=arm, baseline=baseline, classes=s.layers,
        value=float(m.value[arm][figure]), base=float(m.value[baseline][figure]), low=low, high=high, tiles=s.tiles, cases=len(s.patients),
        seeds=len(s.seeds), found=a.mean(1).tolist(), base_found=b.mean(1).tolist(), smallest=len(s.patients), p=chance,
        same=bool(np.array_equal(a, b)),
    )  # fmt: skip


def table(m):
    """One row an arm, for reading: mean over patients with its interval, minimum, tenth percentile, deviation, IoU, pooled Dice."""
    rows, s = [], m.scores
    for arm in s.arms:
        dice, iou = s.of(arm), s.of(arm, segmentation.iou)
        low = high = [np.nan]
        if len(s.patients) >= stats.MIN_CASES and len(s.seeds) >= stats.MIN_SEEDS:
            low, high = stats.interval(m.value[arm][[0]], m.drawn[arm][:, [0]], m.left[arm][:, [0]], m.block, LEVEL, bounds=(0, 1))
        pooled = segmentation.dice(*np.moveaxis(s.counts[s.arms.index(arm)].sum(axis=1), -1, 0)).mean()
        row = {"arm": arm, "dice": m.value[arm][0], "low": low[0], "high": high[0], "least": float(dice.min(1).mean())}
        row |= {"tenth": m.value[arm][1], "sd": m.value[arm][2], "iou": float(iou.mean()), "pooled": float(pooled)}
        rows.append(row | {"patients": len(s.patients), "runs": len(s.runs)})
    return pd.DataFrame(rows)


def hardest(m, arm, most=8):
    """Patients that an arm gets least of, hardest first: DataFrame patient, label, dice (mean over runs), of every arm a column."""
    s = m.scores
    found = pd.DataFrame({"patient": s.patients, "label": s.labels, **{name: s.of(name).mean(0) for name in s.arms}})
    return found.sort_values(arm, kind="stable").head(most).reset_index(drop=True)


def sentence(mine, rivals=(), *, spread=None, draws=1, generators=1, has_cases=True, without=0, said="", demo=False):
    """The verdict in one sentence, in the words of `wording`.

    Args:
        mine: Difference of the judged arm and the baseline in the mean; rivals: of the judged arm and every other arm without made tiles.
        spread: (Difference of the tenth percentile, of the deviation).
        draws, generators: as in `wording.sentence`. without: patients without foreground. said: a sentence of a transductive study.
    """
    where, arm, base = wording.scope(draws, generators), mine.arm, mine.baseline
    what = f"mean Dice of {mine.cases} patients"
    numbers = f"{what} {wording.percent(mine.value)} against {wording.percent(mine.base)}, "
    numbers += f"{wording.points(mine.difference, mine.low, mine.high)} (95 % interval; {mine.tiles} tiles, {mine.seeds} segmenter seeds)"
    rival = max(rivals, key=lambda r: r.base, default=None)
    rival = rival if rival and rival.base > mine.base else None
    if mine.outcome == "more":
        firm = draws >= wording.MIN_DRAWS and generators >= wording.MIN_GENERATORS and (rival is None or rival.outcome == "more")
        lead = (
            f"{arm} helps: {where} it segments better than {base}"
            if firm
            else f"{wording.capital(where)}, {arm} segments better than {base}"
        )
    elif mine.outcome == "fewer":
        lead = f"{wording.capital(where)}, {arm} hurts: it segments worse than {base}"
    elif mine.outcome == "none":
        lead = f"No evidence, {where}, that {arm} segments better or worse than {base}"
    else:
        few = "patients" if mine.outcome == "few cases" else "segmenter seeds"
        lead = f"Too few {few} to say, {where}, whether {arm} segments better than {base}"
        numbers = (
            f"{what} {wording.percent(mine.value)} against {wording.percent(mine.base)} ({mine.tiles} tiles, {mine.seeds} segmenter seeds)"
        )
    parts = [f"{lead}: {numbers}"]
    if rival is not None and mine.outcome != "fewer":
        gap = wording.points(rival.difference, rival.low, rival.high)
        best = f"{rival.baseline}, the best of the arms without synthetic tiles"
        parts.append({
            "more": f"better {'also ' if mine.outcome == 'more' else ''}than {best} ({gap})",
            "fewer": f"{rival.baseline}, without any synthetic tile, segments better ({arm} minus {rival.baseline} {gap})",
        }.get(rival.outcome, f"not shown to beat {best} ({gap})"))  # fmt: skip
    if spread:
        tenth, sd = spread
        parts.append(
            f"the tenth percentile of patients {wording.points(tenth.difference, tenth.low, tenth.high)}, the deviation between them "
            f"{wording.points(sd.difference, sd.low, sd.high)}"
        )
    if without:
        parts.append(f"{without} patient{'s' * (without != 1)} without any foreground left out")
    if not has_cases:
        parts.append("every tile is taken for a patient, so the interval is too narrow")
    parts += [said.rstrip("."), "demo size, not evidence" if demo else ""]
    return "; ".join(part for part in parts if part) + "."


def conclude(m, parts, *, draws=1, generators=1, has_cases=True, said="", demo=False):
    """Everything results.json holds: the sentence first, the numbers behind it.

    Args:
        parts: `question.Roles`.
    """
    judged, base = parts.judged, parts.baseline
    every = {arm: [difference(m, arm, base, k) for k in range(3)] for arm in m.scores.arms if arm != base}
    rivals = [difference(m, judged, rival) for rival in parts.rivals]
    how = {"draws": draws, "generators": generators if parts.generated else 0, "has_cases": has_cases, "without": m.scores.without}
    return {
        "sentence": sentence(every[judged][0], rivals, spread=every[judged][1:], said=said, demo=demo, **how),
        "arm": judged, "baseline": base, "demo": demo, "layers": m.scores.layers, "n": {**how, "patients": len(m.scores.patients)},
        "arms": table(m).to_dict("records"), "differences": {arm: [_plain(d) for d in found] for arm, found in every.items()},
        "rivals": [_plain(d) for d in rivals], "scores": m.scores.hashes,
    }  # fmt: skip


def _plain(d):
    return asdict(d) | {"difference": d.difference, "outcome": d.outcome}
