"""What this data and this base can show at all, asked before any GPU hour.

Four questions: how large must a difference be to be seen at these test cases; how much of the task is stain alone; how well are real tiles
still recognised after the base's autoencoder, a ceiling for whatever it generates; what true tiles in the place of made ones would bring.
Real tiles only; nothing here is a verdict.
"""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from histokit.arms import ceilings
from histokit.core import files
from histokit.evaluate import wording
from histokit.metrics import classification, spectrum, stats
from histokit.runs import workload
from histokit.tiles import data, splits, staining
from histokit.training.pretraining import decoder
from histokit.vision import features, probes

VERSION = 4
MORE = workload.HEADROOM  # true tiles a class in the place of made ones
WEAK = 0.5  # of the mean recall of the other classes, below which a judge is called weak for a class
PER_CLASS = 100  # training tiles of a class that the judge of the headroom learns from at most
HEADROOM = ["whose", "through", "added", "tiles", "cases", "before", "difference", "low", "high"]
SOFT = 0.9  # share of the fine contrast below which a decoder of one's own is worth its minutes
CODED = 32  # tiles that it is measured on
DISAGREE = 0.1  # variance of a tile's difference between two arms, mean over six seeds; 0.02 to 0.15 on EBHI-Seg and toy
ALIKE = 0.2  # correlation of those differences within a case; there -0.3 to 0.5 in a class, median 0.16
SEEN_BY_COLOUR = 0.5  # of the way from chance to certainty, from which on stain alone explains too much to be passed over


def detectable(test, classes, few=8):
    """Least difference of recall that a paired comparison sees in four of five studies, one row per class.

    Two-sided 5 %, normal: (1.96 + 0.84) sqrt(d (1 + (m - 1) rho) / n) for n tiles, m to a case (mean weighted by size), with d the
    variance of a tile's difference (for single classifiers the share of tiles on which they disagree; Connett et al. 1987) and the
    design effect of Donner & Klar (2000), section 1.3. The luck of one generator and one draw of the rare tiles comes on top.

    Args:
        test: labelled test rows, with `label` and `case_id`.

    Returns:
        DataFrame class, tiles, cases, detectable (share; NaN below `few` cases, where no interval is given).
    """
    rows = []
    for name in classes:
        sizes = test.loc[test["label"].eq(name), "case_id"].value_counts().to_numpy()
        n, effect = sizes.sum(), 1 + ((sizes**2).sum() / max(1, sizes.sum()) - 1) * ALIKE
        least = (1.959964 + 0.841621) * np.sqrt(DISAGREE * effect / n) if len(sizes) >= few else np.nan
        rows.append({"class": name, "tiles": int(n), "cases": len(sizes), "detectable": min(least, 1.0) if least == least else np.nan})
    return pd.DataFrame(rows, columns=["class", "tiles", "cases", "detectable"])


def colour_trap(feats, labels, cases, seed=0, folds=5):
    """Balanced accuracy of a linear classifier on colour alone, under folds that keep cases together; chance is 1 / classes.

    Args:
        feats: [N, D]. labels, cases: [N] str.

    Returns:
        Balanced accuracy in [0, 1] and its share of the way from chance to 1, or NaN for both where a class has a single case.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels, cases = np.asarray(labels, str), np.asarray(cases, str)
    names, y = np.unique(labels, return_inverse=True)
    folds = min([folds, *(len(set(cases[y == c])) for c in range(len(names)))])
    if folds < 2 or len(names) < 2:
        return np.nan, np.nan
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=files.seed("colour", seed) % 2**32)
    found = probes.held_out(probes.linear(C=1.0), np.asarray(feats, float), y, cases, split)
    accuracy = float(classification.balanced_accuracy(classification.confusion(y, found, len(names)), range(len(names))))
    return accuracy, max(0.0, (accuracy - 1 / len(names)) / (1 - 1 / len(names)))


def ceiling(train, labels, real, coded, truth, classes):
    """Recall of a judge on real tiles, and on the same tiles after the base's autoencoder: one row per class.

    The judge is a balanced logistic regression on frozen features of the real training tiles, as the arms of 06 are.

    Args:
        train: [N, D] features; labels: [N].
        real, coded: [M, D] features of held-out tiles as they are and after the autoencoder; truth: [M].

    Returns:
        DataFrame class, tiles, real, coded (recall in [0, 1]; NaN for a class without held-out tiles).
    """
    asked = probes.judge(train, labels)
    truth, rows = np.asarray(truth), []
    called = {name: asked.predict(feats) for name, feats in (("real", real), ("coded", coded))}
    for name in classes:
        own = truth == name
        recall = {kind: float((found[own] == name).mean()) if own.any() else np.nan for kind, found in called.items()}
        rows.append({"class": name, "tiles": int(own.sum()), **recall})
    return pd.DataFrame(rows)


def warnings(limits, trap, top, tail):
    """What these tables say cannot be shown, in plain sentences; empty when nothing stands in the way.

    Args:
        limits: of `detectable`; trap: of `colour_trap`; top: of `ceiling` or None; tail: the rare classes.
    """
    for row in limits[limits["class"].isin(tail)].to_dict("records"):
        if np.isnan(row["detectable"]):
            some = f"{row['cases']} test case{'s' * (row['cases'] != 1)} carry counts and a range, no interval"
            yield f"{row['class']}: {some if row['cases'] else 'no test tile'}: no run on this split can show help."
        elif row["detectable"] > 0.2:
            n = f"{row['tiles']} test tiles of {row['cases']} cases"
            yield f"{row['class']}: with {n} a difference below {100 * row['detectable']:.0f} points would mostly go unseen."
    accuracy, share = trap
    if np.isnan(accuracy):
        yield "How much of the task is stain alone cannot be asked: a class has a single case."
    elif share > SEEN_BY_COLOUR:
        yield (
            f"Colour alone, without a single shape, reaches a balanced accuracy of {100 * accuracy:.0f} %: stain and class go together "
            "here, and a generator that shifts stain will seem to change tissue. Add arms with `augment: stain`."
        )
    for row in top.to_dict("records") if top is not None else ():
        if row["class"] in tail and not row["tiles"]:
            yield f"{row['class']}: no validation tile, so 05 cannot say whether its judge knows the class."
        others = top.loc[top["class"].ne(row["class"]), "real"].mean()
        if row["class"] in tail and row["real"] < WEAK * others:
            yield (
                f"{row['class']}: a judge that learned these tiles finds {100 * row['real']:.0f} % of {row['tiles']} validation tiles, of "
                f"the other classes {100 * others:.0f} %: it is weak here, and so is what it says of made tiles."
            )
        if row["class"] in tail and row["real"] > 0 and row["coded"] < 0.5 * row["real"]:
            yield (
                f"{row['class']}: a judge that names {100 * row['real']:.0f} % of its real tiles names {100 * row['coded']:.0f} % after "
                "this base's autoencoder: the base cannot show what tells the class apart."
            )


@dataclass(frozen=True)
class Survey:
    """What `survey` found."""

    limits: pd.DataFrame  # of `detectable`, on test tiles
    trap: tuple  # of `colour_trap`
    stains: pd.DataFrame  # case_id, label, haematoxylin, eosin: mean of the case's tiles
    top: pd.DataFrame | None  # of `ceiling`, on validation tiles
    warnings: list

    def plain(self):
        """As results.json holds it."""
        parts = {"detectable": self.limits, "ceiling": self.top if self.top is not None else self.limits.head(0)}
        tables = {name: json.loads(table.to_json(orient="records")) for name, table in parts.items()}
        colour = {"balanced_accuracy": self.trap[0], "share": self.trap[1]}
        return tables | {"colour_alone": files.plain(colour), "warnings": self.warnings}


def survey(tiles, held, encoder, codec=None, *, per_class=60, seed=0):
    """Everything above, of one dataset; test tiles are counted and their stain is looked at, never what a classifier says of them.

    Args:
        tiles: frozen manifest with paths; held: its Dataset.
        encoder: features.Encoder of the judge that asks for the ceiling.
        codec: `codecs.VaeRoundTrip` of the base; None leaves the ceiling out.
        per_class: tiles of a class at most, spread over its cases.
    """
    real = tiles[tiles["use"].eq("labelled") & tiles["source"].eq("real")]
    if real["label"].nunique() < 2:
        none = pd.DataFrame(columns=["label", "case_id", "haematoxylin", "eosin"])
        return Survey(detectable(real, []), (np.nan, np.nan), none, None, ["Without two labelled classes there is nothing to tell apart."])
    rows = _spread(real, per_class, seed)
    pixels = data.pixels(rows)
    amounts = pd.DataFrame(staining.stains(pixels), columns=["haematoxylin", "eosin"], index=rows.index)
    cases = pd.concat([rows[["case_id", "label"]], amounts], axis=1).groupby(["label", "case_id"], as_index=False).mean()
    trap = colour_trap(staining.colour(pixels), rows["label"], rows["case_id"], seed)
    limits, top = detectable(real[real["split"].eq("test")], held.classes), None
    train, val = (_spread(real[real["split"].eq(split)], n, seed) for split, n in (("train", 4 * per_class), ("val", per_class)))
    if codec is not None and len(val):
        feats = [features.embed(encoder, part) for part in (train, val)]
        top = ceiling(feats[0], train["label"], feats[1], features.embed(encoder, val, codec=codec), val["label"], held.classes)
    return Survey(limits, trap, cases, top, list(warnings(limits, trap, top, held.tail)))


def _spread(rows, n, seed):
    return pd.concat([splits.spread(group, n, seed) for _, group in rows.groupby("label")]) if len(rows) else rows


def headroom(run, tiles, held, encoder, codec=None, more=MORE, seed=0):
    """What up to `more` true tiles a class bring to the mean recall of the rare classes, asked on validation tiles: a perfect generator.

    Where a class was made rare on purpose there are true tiles to spare, and of invented tissue they are drawn. A linear judge on frozen
    features learns with and without them. The verdict on ceilings is that of 07, on test tiles.

    Args:
        run: runs.Run; drawn tiles are written below its folder.
        tiles: frozen manifest with paths; held: its Dataset.
        encoder: features.Encoder.
        codec: `codecs.VaeRoundTrip` of the base, through which the added tiles go as well; None leaves that out.

    Returns:
        DataFrame whose (same_cases | new_cases), through (none | vae), added (true tiles of a class at most), tiles, cases (rare ones to
        validate on), before (mean recall of the rare classes without them), difference, low, high (in [-1, 1], NaN ends with fewer than
        eight cases of a rare class); no rows where nothing is to spare, or a class that was made rare has no validation tile.
    """
    draw = ceilings.Drawn(run, held) if held.procedural == "toy" else None
    real = data.training(tiles)
    val = tiles[tiles["split"].eq("val") & tiles["use"].eq("labelled") & tiles["source"].eq("real")]
    rare = ceilings.made_rare(tiles, draw)
    if not rare or set(rare) - set(val["label"]) or set(rare) - set(real["label"]):
        return pd.DataFrame(columns=HEADROOM)
    few = pd.concat([splits.spread(group, PER_CLASS, seed) for _, group in real.groupby("label")])
    learned, asked = features.embed(encoder, few), features.embed(encoder, val)
    plain = _called(held.classes, learned, few["label"], asked)
    rows = []
    for whose in ("same_cases", "new_cases"):
        added = pd.concat([ceilings.spare(tiles, name, more, whose, draw) for name in rare])
        for through in ("none", "vae") if len(added) and codec is not None else ("none",) if len(added) else ():
            feats = features.embed(encoder, added, codec=codec if through == "vae" else None)
            called = _called(held.classes, np.concatenate([learned, feats]), [*few["label"], *added["label"]], asked)
            rows.append([whose, through, int(added["label"].value_counts().max()), *_gain(val, held.classes, rare, plain, called)])
    return pd.DataFrame(rows, columns=HEADROOM)


def _called(classes, feats, labels, asked):
    """Place [N] in `classes` of what the judge calls features `asked` [N, D], having learned from `feats` [M, D]."""
    called = probes.judge(feats, np.asarray(labels, str)).predict(asked)
    return np.array([classes.index(name) for name in called])


def _gain(val, classes, rare, before, after, few=stats.MIN_CASES):
    """Tiles and cases of the rare classes, their mean recall before, and the difference after with the ends of its interval."""
    truth = np.array([classes.index(name) for name in val["label"]])
    case, of = np.unique(val["case_id"], return_inverse=True)[1], [classes.index(name) for name in rare]
    counts = [stats.confusion_by_case(truth, called, case, len(classes)) for called in (before, after)]
    strata, runs = stats.strata(truth, case), np.zeros((1, 3), int)

    def recall(confusion):
        return classification.balanced_accuracy(confusion, of)[..., None]

    def gained(weights):
        return np.subtract(*(stats.replicates(one, weights, recall, len(classes)) for one in counts[::-1]))

    first, last = (float(stats.estimate(one, recall, len(classes))[0]) for one in counts)
    own = val[val["label"].isin(rare)]
    low, high = np.nan, np.nan
    if own.groupby("label")["case_id"].nunique().min() >= few:
        left, block = stats.leave_out(strata, runs)
        (low,), (high,) = stats.interval([last - first], gained(stats.resample(strata, runs)), gained(left), block)
    return len(own), own["case_id"].nunique(), first, last - first, float(low), float(high)


def headroom_said(found):
    """The table of `headroom` in words, [sentence, ...]; none where nothing was to spare."""
    if not len(found):
        return []
    parts = []
    for row in found.to_dict("records"):
        gap = wording.points(row["difference"], row["low"], row["high"])
        if row["through"] == "vae":
            parts[-1] += f", after this base's autoencoder {gap}"
        else:
            whose = "the same" if row["whose"] == "same_cases" else "other"
            parts.append(f"up to {row['added']} more true tiles a class, of {whose} cases: {gap}")
    first = found.iloc[0]
    hint = "" if first["low"] == first["low"] else " (too few cases for an interval: a hint)"
    return [
        f"Before anything is trained a linear judge finds {100 * first['before']:.0f} % of the rare classes on {first['tiles']} validation "
        f"tiles of {first['cases']} cases{hint}. With {'; '.join(parts)}. A perfect generator could bring about as much."
    ]


# --- what the autoencoder takes: every made tile has gone through its decoder, and a soft one gives them away


@dataclass(frozen=True)
class CodecGap:
    """Power [K] of real tiles and of the same after the autoencoder, by frequency [K] in cycles a pixel."""

    frequency: np.ndarray
    real: np.ndarray
    coded: np.ndarray
    contrast: float  # fine contrast after over before; 1 is as sharp as tissue
    tiles: int
    px: tuple  # side at which tiles are seen, and at which the base draws

    def said(self):
        """What is left, and what helps where that is little."""
        what = f"After this base's autoencoder {self.contrast:.0%} of the fine contrast of {self.tiles} real tiles is left"
        if self.contrast >= SOFT:
            return f"{what}."
        if self.px[0] > self.px[1]:
            return (
                f"{what}: tiles are seen at {self.px[0]} px and the base draws {self.px[1]}, so made ones are enlarged: it may give "
                f"them away. `tile_px: {self.px[1]}` in 00_dataset shows all tiles at the base's size."
            )
        return f"{what}: made tiles will be softer than tissue. 20_pretrain with part: decoder trains its decoder on your tiles."


def codec_gap(tiles, codec, seed=0):
    """What the base's autoencoder takes from real tiles: a CodecGap of up to `CODED` training tiles, spread over the cases.

    Raises ValueError where there is none.

    Args:
        tiles: frozen manifest with paths.
        codec: `codecs.VaeRoundTrip`.
    """
    rows = splits.spread(data.training(tiles), CODED, seed)
    if not len(rows):
        raise ValueError("no training tile to send through the autoencoder")
    before, after = data.pixels(rows), codec(data.pixels(rows, codec.reads_px))
    fine = [float(decoder.fine_contrast(data.to_float(part)).mean()) for part in (before, after)]
    frequency, real = spectrum.radial_power(before)
    return CodecGap(frequency, real, spectrum.radial_power(after)[1], fine[1] / fine[0], len(rows), (before.shape[1], codec.reads_px))
