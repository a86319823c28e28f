"""Cuts and decisions: which synthetic tiles are worth training on, given the scores of `scoring`.

The cuts come after the scores, so that a reader sees these before anything is rejected. Cuts that nobody set are taken from what
real tiles are like. Tables in, tables out; no model is loaded here.
"""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from histokit.runs import selection_reasons
from histokit.tiles import near_duplicates

VERSION = 8  # and of `selection_reasons`
THRESHOLDS = {
    "judge_rank": 0, "judge_p": 0.0, "copy": 0.0, "duplicate": 0.0, "picture": near_duplicates.THRESHOLD, "contrast": 0.0, "stain": 0.0,
    "focus": 0.0, "centroid_rank": 0, "realism": 0.0, "judge_source": 0.5, "cluster": 0,
}  # fmt: skip
QUOTAS = ("keep", "ratio", "top_p", "balance")
RANKS = {
    "judge": False,
    "centroid": True,
    "centroid_margin": False,
    "realism": False,
    "cluster_distance": True,
}  # score -> whether less is better
TYPICAL = 0.99  # share of real tiles that a calibrated cut lets pass
CAUGHT = 0.95  # share of known copies that it still finds
PASSED = 0.75  # share of real validation tiles of the class that the judge's cut lets pass
FEW = 5  # real validation tiles of a class below which its judge cannot be calibrated
ENOUGH = 20  # real tiles below which a cut cannot be calibrated on one class


# --- cuts ------------------------------------------------------------------------------------------------------------


def calibrate(thresholds, real):
    """Cuts as a table: name, cut, and where it comes from.

    A threshold of 0 for `copy`, `duplicate` or `contrast`, and 0 for both `judge_p` and `judge_rank`, asks what real tiles are like.
    A judge of a class with ten tiles names few real ones, so a synthetic tile passes where three in four real validation tiles do
    (a conformal p-value of 0.25 of the class, Vovk et al. 2005, section 4.5); the source tells how many tiles of other classes would
    pass too. That asks little of a tile made from a training tile of the class, on which the judge was trained. Where fewer than half of
    these are still its first answer (`judge_source`, a share), the class is being lost, and the first answer is asked of each. A judge
    that does not order tiles of the class before others (`power`) cuts nothing. A copy is nearer to a training tile than 99 % of real
    tiles are to one of another case, and as near as 95 % of known copies are to their originals; a duplicate the same, with any other
    real tile instead. A tile is blank with less than half the contrast of the palest real one, blurred with less than half the
    sharpness of the blurriest real tiles, stained unlike real ones beyond 99 % of them. `centroid_rank` (1: the mean of the asked class
    must be the nearest) and `realism` (1: inside the ball of a real tile) are shown and cut nothing until somebody asks; so does `cluster`
    (1: a tile must fall into the cluster that its prompt asked for).

    Args:
        thresholds: dict, any of `THRESHOLDS`; an unknown key raises ValueError.
        real: DataFrame, one row per real tile: similarity `across_cases`, `anywhere` and `known_copy`, `stain` and `focus`, and
            `contrast` of the class's own tiles; of validation tiles the judge's probability of the asked class, `judge` where they are
            of that class, `judge_of_others` where they are not; NaN where a tile has no such number.
    """
    unknown = [key for key in thresholds if key not in THRESHOLDS]
    if unknown:
        raise ValueError(f"thresholds has no {unknown[0]!r}; expected any of {', '.join(THRESHOLDS)}")
    given = {**THRESHOLDS, **thresholds}
    rows = _agreement(given, thresholds, real)
    rows.append(
        ("picture", given["picture"], "correlation of outlines; different real tiles stay below 0.55, copies of all kinds above 0.95")
    )
    for name, column, whose in (("copy", "across_cases", "one of another case"), ("duplicate", "anywhere", "any other")):
        values, known = real[column].dropna(), real["known_copy"].dropna()
        if given[name]:
            rows.append((name, given[name], "set by hand"))
        elif min(len(values), len(known)) < ENOUGH:
            rows.append((name, 0.999, f"only {len(values)} real tiles to calibrate on: none but the nearly identical"))
        else:
            cuts = float(values.quantile(TYPICAL)), float(known.quantile(1 - CAUGHT))
            sources = (
                f"{TYPICAL:.0%} of {len(values)} real tiles are less like {whose}",
                f"{CAUGHT:.0%} of {len(known)} known copies are nearer",
            )
            found = f"; it finds {known.ge(max(cuts)).mean():.0%} of known copies"  # a low share: this encoder is no copy detector
            rows.append((name, max(cuts), sources[int(np.argmax(cuts))] + found))
    contrast = real["contrast"].dropna()
    palest = float(contrast.min()) / 2 if len(contrast) else 4.0
    rows.append(("contrast", given["contrast"] or palest, "set by hand" if given["contrast"] else "half that of the palest real tile"))
    rows += [_typical(name, given[name], real) for name in ("stain", "focus")]
    rows += [(name, given[name], "set by hand" if given[name] else "shown, not asked for") for name in ("centroid_rank", "realism")]
    rows += [("cluster", given["cluster"], "set by hand")] if given["cluster"] else []
    return pd.DataFrame(rows, columns=["name", "cut", "source"])


def _typical(name, given, real):
    values = real[name].dropna() if name in real else pd.Series(dtype=float)
    if given:
        return name, given, "set by hand"
    if len(values) < ENOUGH:
        return name, np.inf if name == "stain" else 0.0, f"only {len(values)} real tiles to calibrate on: nothing is cut"
    if name == "stain":
        return name, float(values.quantile(TYPICAL)), f"{TYPICAL:.0%} of {len(values)} real tiles are stained less unlike the others"
    return name, float(values.quantile(1 - TYPICAL)) / 2, f"half the sharpness that {TYPICAL:.0%} of {len(values)} real tiles have"


@dataclass(frozen=True)
class Power:
    """How well a judge tells real validation tiles of a class from those of others."""

    auc: float  # chance that it holds a tile of the class for likelier than one of another; 0.5 is a coin
    low: float  # lower end, one-sided 95 %
    own: int  # validation tiles of the class
    others: int

    @property
    def blind(self):
        """Whether nothing shows that it tells the class at all."""
        return self.own >= FEW and self.others > 0 and not self.low > 0.5


def power(real):
    """`Power` from the columns `judge` and `judge_of_others` of `calibrate`; Hanley and McNeil (1982), equations 1 to 4."""
    own, others = (real[name].dropna().to_numpy(float) if name in real else np.empty(0) for name in ("judge", "judge_of_others"))
    m, n = len(own), len(others)
    if not m or not n:
        return Power(np.nan, np.nan, m, n)
    above = own[:, None] - others[None]
    auc = float(((above > 0) + 0.5 * (above == 0)).mean())
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (m - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / (m * n)
    return Power(auc, auc - 1.645 * float(np.sqrt(max(variance, 0))), m, n)


def judged(real, cuts):
    """What the judge is worth, a sentence for each class it cannot judge; nothing where its cut is set by hand.

    Args:
        real: rows of `calibrate`, their class in `asked`. cuts: of `calibrate`, their class in `label`.
    """
    for name, rows in real.groupby("asked", sort=False) if len(real) and "asked" in real else ():
        if cuts.loc[cuts["label"].eq(name) & cuts["name"].isin(["judge_rank", "judge_p"]), "source"].eq("set by hand").any():
            continue
        found = power(rows)
        if found.blind:
            yield (
                f"THE JUDGE CANNOT TELL {name}: of {found.own} real validation tiles of the class and {found.others} of others it puts "
                f"the right one first in {found.auc:.0%} of the pairs, where a coin has 50 %. Its tiles are kept unless they are blank, "
                "blurred, stained unlike tissue or copies; that they show the class is for a person to say, in the gallery below."
            )
        elif found.own < FEW:
            yield (
                f"{name}: {found.own or 'no'} real validation tile{'s' * (found.own != 1)}, too few to say whether the judge can tell the "
                "class; its first answer decides."
            )


def missed(real, cuts):
    """A sentence for each class whose copy cut finds fewer than half of the known copies: what it lets pass is not shown to be new.

    Args:
        real: rows of `calibrate`, their class in `asked`. cuts: of `calibrate`, their class in `label`.
    """
    for name, rows in real.groupby("asked", sort=False) if len(real) and "asked" in real else ():
        cut = cuts.loc[cuts["label"].eq(name) & cuts["name"].eq("copy"), "cut"]
        known = rows["known_copy"].dropna()
        if len(known) >= ENOUGH and len(cut) and (found := float(known.ge(cut.iloc[0]).mean())) < 0.5:
            yield (
                f"{name}: the copy cut finds {found:.0%} of {len(known)} known copies, since real tiles of different cases lie as near "
                "each other as copies do in this encoder: that a tile is kept does not show that it is new. Outlines are compared as well, "
                "and 08_fidelity has a protocol of its own."
            )


def _agreement(given, asked, real, few=FEW):
    """The rows of the judge: place and probability asked of the class, and place of tiles made from one of it; 0 asks nothing."""
    if given["judge_rank"] or given["judge_p"]:
        given = {**given, "judge_source": asked.get("judge_source", 0)}
        names = ("judge_rank", "judge_p", "judge_source")
        return [(name, given[name], "set by hand" if given[name] else "not asked for") for name in names]
    own, others = (real[name].dropna() if name in real else pd.Series(dtype=float) for name in ("judge", "judge_of_others"))
    if len(own) < few:
        why = f"only {len(own)} real validation tiles to calibrate on"
        return [("judge_rank", 1, f"{why}: the judge's first answer"), ("judge_p", 0.0, why), ("judge_source", 0, "judge_rank asks it")]
    can = power(real)
    if can.blind:
        why = f"the judge cannot tell: of {can.own} and {can.others} validation tiles it orders {can.auc:.0%} of the pairs rightly"
        by_hand = asked.get("judge_source", 0)
        return [("judge_rank", 0, why), ("judge_p", 0.0, why), ("judge_source", by_hand, "set by hand" if by_hand else why)]
    least = float(np.quantile(own, 1 - PASSED, method="inverted_cdf"))
    passed = f"{own.ge(least).mean():.0%} of {len(own)} real validation tiles of the class pass"
    wrong = f", and {others.ge(least).mean():.0%} of {len(others)} of other classes" if len(others) else ""
    first = "where fewer tiles made from training tiles of the class are still the judge's first answer, it is asked of each"
    first = "set by hand" if "judge_source" in asked else first
    return [("judge_rank", 0, "not asked for"), ("judge_p", least, passed + wrong), ("judge_source", given["judge_source"], first)]


def decide(scores, cuts, asked, reviews=None):
    """Status and reason of every tile; a tile may fail for several reasons, and each is kept.

    Args:
        scores: DataFrame with sha256, judge (probability of the asked class), judge_class, judge_rank, own_source (whether it was made
            from real training tiles of the class alone), contrast, stain, focus, centroid_rank, realism (NaN where unknown, which cuts
            nothing), cluster_asked and cluster where tiles were asked for one, and for the spaces "feature"
            and "picture": similarity_*, nearest_* (a training tile), twin_* (similarity to a better
            synthetic tile), twin_of_*.
        cuts: from `calibrate`.
        asked: class name the tiles were made for.
        reviews: {sha256: (verdict, note)} of a person, "keep" or "reject"; they win over every score.

    Returns:
        DataFrame status (kept | rejected | quarantined), reason (see `selection_reasons`; "" where kept by the scores).
    """
    cut = dict(zip(cuts["name"], cuts["cut"], strict=True))
    still = still_first(scores)
    rows, first = [], still is not None and still < cut["judge_source"]
    for row in scores.to_dict("records"):
        found = list(_found(row, cut, asked, first and row["own_source"]))
        status = "quarantined" if any(one["code"] == "copy" for one in found) else "rejected" if found else "kept"
        verdict, note = (reviews or {}).get(row["sha256"], ("", ""))
        if verdict:
            status = "kept" if verdict == "keep" else "rejected"
            found = [{"code": "person", "verdict": verdict, "note": note}, *found]
        rows.append((status, selection_reasons.write(found)))
    return pd.DataFrame(rows, columns=["status", "reason"], index=scores.index)


def still_first(scores):
    """Share of the tiles made from training tiles of their class that are still the judge's first answer; None without such a tile."""
    own = scores["own_source"].to_numpy(bool) & scores["judge_class"].ne("").to_numpy()
    return float(scores.loc[own, "judge_rank"].eq(1).mean()) if own.any() else None


def lost(scores, cuts):
    """A sentence for each class that is being lost on the way: most of its tiles are no longer what their sources are to the judge.

    Args:
        scores: rows of `decide`'s, their class in `label`. cuts: of `calibrate`, their class in `label`.
    """
    for name, rows in scores.groupby("label", sort=False) if len(scores) else ():
        least = cuts.loc[cuts["label"].eq(name) & cuts["name"].eq("judge_source"), "cut"]
        still = still_first(rows)
        if still is not None and len(least) and still < least.iloc[0]:
            own = rows[rows["own_source"].astype(bool)]
            seen = own.loc[own["judge_class"].ne(name), "judge_class"].mode()[0]
            yield (
                f"{name.upper()} IS BEING LOST: of {len(own)} tiles made from its training tiles the judge, which learned these, takes "
                f"{own['judge_rank'].eq(1).sum()} for {name} and most others for {seen}; "
                "only the former are kept. Less strength or other guidance may keep more: `tried` of 03_img2img measures it on a few tiles."
            )


def _found(row, cut, asked, first):
    """What speaks against one tile: a reason for every cut that it does not pass; `first`: it must be the judge's first answer."""
    if row["contrast"] < cut["contrast"]:
        yield {"code": "blank", "contrast": row["contrast"], "cut": cut["contrast"]}
    for space, copied, repeated in (("feature", cut["copy"], cut["duplicate"]), ("picture", cut["picture"], cut["picture"])):
        alike, twin = row[f"similarity_{space}"], row[f"twin_{space}"]
        if alike >= copied:
            yield {"code": "copy", "of": row[f"nearest_{space}"], "space": space, "similarity": alike, "cut": copied}
        if twin >= repeated:
            yield {"code": "repeat", "of": row[f"twin_of_{space}"], "space": space, "similarity": twin, "cut": repeated}
    judged = {"code": "judge", "asked": asked, "seen": row["judge_class"]}
    place = 1 if first else cut["judge_rank"]
    if place and row["judge_rank"] > place:
        yield {**judged, "place": row["judge_rank"], "cut": place}
    elif row["judge"] < cut["judge_p"]:
        yield {**judged, "probability": row["judge"], "cut": cut["judge_p"]}
    if row["stain"] > cut["stain"]:
        yield {"code": "stain", "deviation": row["stain"], "cut": cut["stain"]}
    if row["focus"] < cut["focus"]:
        yield {"code": "blurred", "sharpness": row["focus"], "cut": cut["focus"]}
    if cut["centroid_rank"] and row["centroid_rank"] > cut["centroid_rank"]:
        yield {"code": "centroid", "asked": asked, "place": row["centroid_rank"], "cut": cut["centroid_rank"]}
    if row["realism"] < cut["realism"]:
        yield {"code": "realism", "realism": row["realism"], "cut": cut["realism"]}
    if cut.get("cluster") and row.get("cluster_asked", -1) not in (-1, row.get("cluster")):
        yield {"code": "cluster", "asked": row["cluster_asked"], "seen": row["cluster"]}


def limit(decisions, scores, quota, real_tiles, most_real=0):
    """Keep the best of the tiles that passed, where a quota says how many; the others are rejected for it.

    Args:
        decisions: from `decide`, of one class.
        scores: the same tiles; a person's "keep" comes before every score and is never cut.
        quota: {} for no limit; one of {"keep": 50}, {"ratio": 2.0} (synthetic per real training tile), {"top_p": 0.5} (share of those
            made), {"balance": True} (as many as the largest class has more); and {"by": "judge"}, or another of `RANKS`.
        real_tiles: real training tiles of the class; most_real: of the largest class.

    Raises ValueError for an unknown key or value.
    """
    asked = {key: value for key, value in (quota or {}).items() if key != "by"}
    by = (quota or {}).get("by", "judge")
    if not quota:
        return decisions
    if len(asked) != 1 or next(iter(asked)) not in QUOTAS or by not in RANKS or by not in scores:
        raise ValueError(f"quota is {quota}; expected one of {', '.join(QUOTAS)}, and `by` one of {', '.join(RANKS)}")
    ((kind, value),) = asked.items()
    expected = {"balance": "true", "top_p": "a share from 0 to 1"}.get(kind, "a number from 0 on")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not True if kind == "balance" else not number or not 0 <= value <= (1 if kind == "top_p" else np.inf):
        raise ValueError(f"quota {kind} is {value!r}; expected {expected}")
    sizes = {"keep": value, "ratio": value * real_tiles, "top_p": value * len(decisions), "balance": max(0, most_real - real_tiles)}
    most = round(sizes[kind])
    later = [not _is_wanted(reason) for reason in decisions["reason"]]
    table = decisions.assign(later=later, score=scores[by] * (1 if RANKS[by] else -1))
    order = table[table["status"].eq("kept")].sort_values(["later", "score"], kind="stable")
    over = order.index[[i >= most and later for i, later in enumerate(order["later"])]]
    out, place = decisions.copy(), {i: n for n, i in enumerate(order.index, start=1)}
    for i in over:
        out.loc[i, ["status", "reason"]] = (
            "rejected",
            selection_reasons.write([{"code": "quota", "place": place[i], "by": by, "most": most}]),
        )
    return out


def _is_wanted(reason):
    """Whether a person said keep."""
    return any(one["code"] == "person" and one["verdict"] == "keep" for one in selection_reasons.read(reason))


def merged(manifest, scores, decisions):
    """The manifest of 05: the rows of the source with their scores (JSON, after any the generator gave), status and reason."""
    columns = [name for name in scores if name != "sha256"]
    texts = []
    for earlier, row in zip(manifest.get("scores", pd.Series("", manifest.index)), scores[columns].to_dict("records"), strict=True):
        held = json.loads(earlier) if isinstance(earlier, str) and earlier else {}
        texts.append(json.dumps({**held, **{key: _plain(value) for key, value in row.items()}}, ensure_ascii=False, allow_nan=False))
    return manifest.assign(scores=texts, status=decisions["status"].to_numpy(), reason=decisions["reason"].to_numpy())


def _plain(value):
    if isinstance(value, str):
        return value
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else round(value, 5) if isinstance(value, float) else value


def acceptance(decisions):
    """One row per status and code of a reason, `why`: how many tiles, and which share of all; a tile with two reasons counts in both."""
    total = max(1, len(decisions))
    rows = [("kept", "", int(decisions["status"].eq("kept").sum()))]
    for status in ("quarantined", "rejected"):
        texts = decisions.loc[decisions["status"].eq(status), "reason"]
        codes = [code for text in texts for code in dict.fromkeys(one["code"] for one in selection_reasons.read(text))]
        rows += [(status, code, n) for code, n in pd.Series(codes, dtype=object).value_counts().items()]
    return pd.DataFrame([(*row, row[2] / total) for row in rows], columns=["status", "why", "tiles", "share"])
