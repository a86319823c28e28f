"""Who is trained on and who is tested: splits by case, and budgets that make a class rare on purpose.

A case lies on one side only, because tiles of one case look alike and a split by tile would test memory. Everything is
seeded and depends on the set of rows, not on their order. Tables in, tables out; no file is touched.
"""

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.tiles.description import SPLITS, TISSUE

VERSION = 4


def assign(manifest, fractions, seed, copies=None, strict=True, seen=None):
    """The manifest with `split` filled, by case.

    A split that the data gives is kept. One that is missing although its fraction is above 0 is cut from train, by
    case, in proportion: data with train and test but no val lends val from train.

    A class of three cases or more gets one in every split, rarest class first; of two cases, train and test; a single
    case goes to train and the class cannot be evaluated.

    Args:
        manifest: one row per tile, with `case_id, patient, label, split, use, file_name`.
        fractions: {"train": 0.6, "val": 0.15, "test": 0.25}, share of the tiles of every class.
        seed: int.
        copies: pairs of tile ids in columns `a, b` that must not be parted, as `audit.copied` finds them; a split that the
            data gives is kept all the same.
        strict: False leaves what is wrong with the cases to `check`, so that an audit of everything else can be written first.
        seen: bool [N], tiles that a model has learned from (`contamination.learned_from`); where a split is drawn, their cases are for
            training, and the others are spread so that the fractions hold as far as they can.

    Raises:
        ValueError: a case in two splits, or two patients in one case.
    """
    manifest = manifest.copy()
    unit = units(manifest, strict)
    labelled = manifest["use"].ne("unlabelled")
    given = manifest["split"].ne("") & (labelled if labelled.any() else True)
    if strict:
        check(manifest)
    movable = given & manifest["split"].eq("train") | ~given & labelled
    present = set(manifest.loc[given, "split"])
    wanted = [s for s in SPLITS if (fractions.get(s, 0) > 0 and s not in present) or s == "train"]
    if len(wanted) > 1 and movable.any():
        kept = manifest["split"].where(given & ~movable, "")
        share = {s: fractions[s] for s in wanted}
        joint = _joined(unit[movable], manifest.loc[movable, "tile_id"], copies)
        known = set() if seen is None else set(joint[unit[movable].isin(set(unit[np.asarray(seen, bool)]))])
        chosen = _balanced(joint, manifest.loc[movable, "label"], share, seed, known=known)
        manifest["split"] = kept.where(~movable, joint.map(chosen))
    joint = _joined(unit, manifest["tile_id"], copies)
    _place_unlabelled(manifest, joint, fractions, seed, () if seen is None else set(joint[np.asarray(seen, bool)]))
    if strict:
        check(manifest)
    return manifest


def units(manifest, strict=True):
    """What must stay on one side, per row: the patient where one is known, else the case.

    A case of two patients raises ValueError; unless `strict`, it counts for the first of them.
    """
    known = manifest.loc[manifest["patient"].ne(""), ["case_id", "patient"]].drop_duplicates()
    twice = known["case_id"][known["case_id"].duplicated()]
    if len(twice) and strict:
        names = known.loc[known["case_id"].eq(twice.iloc[0]), "patient"].tolist()
        raise ValueError(f"case {twice.iloc[0]!r} has two patients, {names[0]!r} and {names[1]!r}; correct `case_id` or `patient`")
    patient = manifest["case_id"].map(known.drop_duplicates("case_id").set_index("case_id")["patient"])
    return ("patient " + patient.astype("str")).where(patient.notna(), "case " + manifest["case_id"])


def _joined(unit, tile_id, copies):
    """`unit`, with units that share a copy given one name."""
    if copies is None or not len(copies):
        return unit
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    codes, names = pd.factorize(unit, sort=True)
    of_tile = pd.Series(codes, index=tile_id.to_numpy())
    a, b = copies["a"].map(of_tile), copies["b"].map(of_tile)
    both = a.notna() & b.notna()
    links = coo_array((np.ones(both.sum()), (a[both].astype(int), b[both].astype(int))), shape=(len(names), len(names)))
    group = connected_components(links, directed=False)[1]
    first = pd.Series(np.arange(len(names))).groupby(group).first()
    return pd.Series(np.asarray(names)[first[group[codes]]], index=unit.index)


def check(manifest):
    """Raise ValueError where a case, or a patient, lies in two splits; names both files."""
    twice = parted(manifest)
    if len(twice):
        rows = twice[twice["unit"].eq(twice["unit"].iloc[0])]
        (_, a), (_, b) = list(rows.iterrows())[:2]
        raise ValueError(
            f"{a['unit']!r} is in two splits: {a['file_name']!r} in {a['split']} and {b['file_name']!r} in {b['split']} "
            f"({twice['unit'].nunique()} such in all). A model would be tested on tissue it has seen; move all its tiles to one split, or, "
            "where these are no cases at all, correct `case_pattern` or the column of cases"
        )


def parted(manifest, strict=True):
    """`unit, split, file_name` of the cases, or patients, that lie in two splits: one row per split, sorted."""
    given = manifest[manifest["split"].ne("")]
    pairs = pd.DataFrame({"unit": units(given, strict), "split": given["split"], "file_name": given["file_name"]})
    pairs = pairs.drop_duplicates(["unit", "split"])
    return pairs[pairs["unit"].duplicated(keep=False)].sort_values(["unit", "file_name"])


def _balanced(unit, label, share, seed, tries=64, known=()):
    """Split per unit (Series unit -> split): the best balanced of several seeded greedy passes; `known` units are for training."""
    counts = pd.crosstab(unit, label).sort_index()  # sorted: the order of rows does not matter
    table = counts.to_numpy(dtype=float)  # [units, classes] tiles
    names = list(share)
    portion = np.array([share[s] for s in names]) / sum(share.values())
    tries = max(1, min(tries, 20_000 // len(table)))  # many cases balance themselves
    rng = np.random.default_rng(files.seed(seed, "splits"))
    fixed = counts.index.isin(list(known)) if "train" in names else np.zeros(len(table), bool)
    results = [_greedy(table, portion, rng.permutation(len(table)), names, fixed) for _ in range(tries)]
    best = min(range(tries), key=lambda i: _imbalance(table, portion, results[i]))
    return pd.Series([names[s] for s in results[best]], index=counts.index, dtype=str)


def _greedy(table, portion, order, names, fixed):
    """Index of the split of every unit: `fixed` ones train; rarest class first, each unit where most of its class is still missing."""
    cases = (table > 0).sum(axis=0)
    want = table.sum(axis=0)[:, None] * portion  # [classes, splits] tiles
    have = np.zeros_like(want)
    filled = np.zeros(want.shape, dtype=int)  # cases
    place = np.full(len(table), -1)
    if fixed.any():
        train = names.index("train")
        place[fixed], have[:, train], filled[:, train] = train, table[fixed].sum(axis=0), (table[fixed] > 0).sum(axis=0)
    first = [names.index(s) for s in ("train", "test", "val") if s in names]
    by_rarity = np.argsort(cases, kind="stable")
    rarest = by_rarity[(table[:, by_rarity] > 0).argmax(axis=1)]  # [units] rarest class of each
    for c in by_rarity:
        for u in order[(rarest[order] == c) & ~fixed[order]]:
            empty = [s for s in first if not filled[c, s]]
            missing = np.clip(want[c] - have[c], 0, None) / want[c].clip(1e-9)
            place[u] = s = empty[0] if empty else int(missing.argmax())
            have[:, s] += table[u]
            filled[:, s] += table[u] > 0
    return place


def _imbalance(table, portion, place):
    """How far the shares of tiles are from the wanted ones, summed over classes; a class missing from a split costs 1."""
    got = np.stack([table[place == s].sum(axis=0) for s in range(len(portion))], axis=1)  # [classes, splits]
    total = got.sum(axis=1, keepdims=True).clip(1)
    return np.abs(got / total - portion).sum() + (got == 0).sum()


def _place_unlabelled(manifest, unit, fractions, seed, seen):
    """Unlabelled tiles follow their case; those of no labelled case are for training, or split when nothing is labelled."""
    loose = manifest["use"].eq("unlabelled") & manifest["split"].eq("")
    if not loose.any():
        return
    if manifest["use"].eq("unlabelled").all():
        share = {s: f for s, f in fractions.items() if f > 0}
        manifest.loc[loose, "split"] = unit[loose].map(_balanced(unit[loose], manifest.loc[loose, "label"], share, seed, known=seen))
        return
    known = manifest["split"].where(~loose).groupby(unit).first()
    manifest.loc[loose, "split"] = unit[loose].map(known).fillna("train")


def budget(manifest, limits, seed, draw=0):
    """The manifest with training tiles beyond the budget marked `use = withheld`; val and test stay whole.

    Args:
        limits: {class: {"tiles": 15, "cases": 3}}; without `cases`, tiles of as many cases as chance picks.
        draw: another number keeps other tiles, by another chance.

    Raises:
        ValueError: the class has fewer training tiles or cases than its budget asks for.
    """
    manifest = manifest.copy()
    for name, limit in limits.items():
        train = manifest[manifest["label"].eq(name) & manifest["split"].eq("train") & manifest["use"].eq("labelled")]
        train = train.sort_values("file_name")
        tiles, sizes = limit["tiles"], train.groupby("case_id").size()  # sorted by case
        cases = limit.get("cases")
        largest = sizes.nlargest(cases or len(sizes)).sum()
        if len(sizes) < (cases or 1) or largest < tiles:
            raise ValueError(
                f"budget of {name!r} asks for {tiles} training tiles" + (f" of {cases} cases" if cases else "")
                + f"; it has {len(train)} of {len(sizes)}" + (f", and its {cases} largest hold {largest}" if cases else "")
                + "; lower the budget"
            )  # fmt: skip
        rng = np.random.default_rng(files.seed(seed, "budget", name, *([draw] if draw else [])))
        chosen = train.index if cases is None else train.index[train["case_id"].isin(_pick_cases(sizes, cases, tiles, rng))]
        keep = _pick_tiles(train.loc[chosen, "case_id"], tiles, rng, even=cases is not None)
        manifest.loc[train.index.difference(keep), "use"] = "withheld"
    return manifest


def _pick_cases(sizes, n, tiles, rng):
    """n cases that together hold enough tiles, drawn at random; the largest ones when chance finds none."""
    for _ in range(1000):
        chosen = sizes.iloc[rng.permutation(len(sizes))[:n]]
        if chosen.sum() >= tiles:
            return chosen.index
    return sizes.nlargest(n).index


def _pick_tiles(case, n, rng, even):
    """Index of n rows: in turns from every case when `even`, so that each gives at least one; else at random."""
    case = case.iloc[rng.permutation(len(case))]
    turn = case.groupby(case).cumcount() if even else pd.Series(0, index=case.index)
    return turn.sort_values(kind="stable").index[:n]


def keep_labels(manifest, share, seed, draw=0):
    """The manifest with labels left to a share of the training cases; the tiles of the others become `use = unlabelled`.

    By case, as a hospital labels: a case is labelled whole or not at all. Every class keeps as many of its cases as the share says, one at
    least, rarest class first; a case that shows several classes counts for each. Val and test keep their labels, withheld tiles stay so.

    Args:
        share: of the training cases of every class, in (0, 1]; 1 leaves the manifest as it is.
        draw: another number keeps the labels of other cases.

    Raises ValueError for another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"labelled must be a share of the training cases, above 0 and at most 1, got {share}")
    manifest = manifest.copy()
    train = manifest[manifest["split"].eq("train") & manifest["use"].eq("labelled")]
    if share == 1 or not len(train):
        return manifest
    unit = units(train)
    shows = {name: sorted(set(unit[rows])) for name, rows in train.groupby("label").groups.items()}
    rng, chosen = np.random.default_rng(files.seed(seed, "labels", *([draw] if draw else []))), set()
    for name in sorted(shows, key=lambda name: (len(shows[name]), name)):
        others = [case for case in rng.permutation(shows[name]) if case not in chosen]
        wanted = max(1, round(share * len(shows[name]))) - (len(shows[name]) - len(others))
        chosen |= set(others[: max(0, wanted)])
    loose = train.index[~unit.isin(chosen)]
    manifest.loc[loose, "use"], manifest.loc[loose, "label"] = "unlabelled", TISSUE
    return manifest


def annotate(manifest, cases, seed, draw=0):
    """The manifest with masks left to some training cases: the column `annotated` is False for the tiles of all others.

    A hospital annotates slide by slide. Cases are drawn in turn from every class, so that few of them still show what there is, and more
    cases hold every smaller number of them. The masks stay named, for an upper bound; val and test keep theirs.

    Args:
        cases: how many training cases keep their masks, 1 or more; 0 leaves the manifest as it is.
        draw: another number keeps those of other cases.

    Raises ValueError where there are fewer such cases.
    """
    if not cases:
        return manifest
    drawn = manifest["mask"].fillna("").ne("")
    train = manifest[drawn & manifest["split"].eq("train") & manifest["use"].ne("withheld")]
    unit = units(train)
    there = sorted(set(unit))
    if not 0 < cases <= len(there):
        raise ValueError(f"annotated asks for the masks of {cases} training cases, and {len(there)} have any; give 1 to {len(there)}, or 0")
    rng = np.random.default_rng(files.seed(seed, "annotated", *([draw] if draw else [])))
    shows = {name: list(rng.permutation(sorted(set(unit[rows])))) for name, rows in sorted(train.groupby("label").groups.items())}
    names, chosen = list(rng.permutation(sorted(shows))), []
    while len(chosen) < cases:
        for name in names:
            waiting = [case for case in shows[name] if case not in chosen]
            chosen += waiting[:1]
    kept = pd.Series(False, index=manifest.index)
    kept[train.index] = unit.isin(chosen[:cases])
    return manifest.assign(annotated=drawn & (manifest["split"].ne("train") | kept))


def labels_said(manifest):
    """A sentence on training tiles without a label, where there are any beside labelled ones."""
    train = manifest[manifest["split"].eq("train") & manifest["source"].eq("real")]
    loose, kept = (train[train["use"].eq(use)] for use in ("unlabelled", "labelled"))
    if len(loose) and len(kept):
        yield (
            f"Labels of {len(kept):,} training tiles of {kept['case_id'].nunique():,} cases; {len(loose):,} tiles of "
            f"{loose['case_id'].nunique():,} cases have none."
        )


def spread(tiles, n, seed=0):
    """At most n rows, drawn from as many cases as there are, sorted by file name; for contact sheets."""
    tiles = tiles.sort_values("file_name")
    return tiles.loc[_pick_tiles(tiles["case_id"], n, np.random.default_rng(files.seed(seed, "spread")), even=True).sort_values()]


def counts(manifest, classes):
    """Tiles and cases per class and split, as a long table `label, split, use, tiles, cases`; absent combinations are 0.

    Withheld training tiles are their own rows (`use` = withheld).
    """
    real = manifest[manifest["label"].isin(classes)]
    table = real.groupby(["label", "split", "use"]).agg(tiles=("tile_id", "size"), cases=("case_id", "nunique"))
    plain = "labelled" if classes != [TISSUE] else "unlabelled"
    every = pd.MultiIndex.from_product([classes, SPLITS, [plain]], names=table.index.names)
    return table.reindex(every.append(table.index.difference(every))).fillna(0).astype(int).reset_index()


def roles(manifest, classes, given, tail_below):
    """{class: "head" | "tail"}: as given, else tail when fewer than `tail_below` labelled training tiles are left."""
    train = manifest[manifest["split"].eq("train") & manifest["use"].eq("labelled")]
    sizes = train["label"].value_counts()
    return {name: given.get(name) or ("tail" if sizes.get(name, 0) < tail_below else "head") for name in classes}


def not_evaluable(manifest, classes):
    """{class: why} of classes without a test case apart from their training cases."""
    why = {}
    for name in classes:
        rows = manifest[manifest["label"].eq(name) & manifest["use"].ne("unlabelled")]
        if rows["case_id"].nunique() == 1:
            why[name] = f"all its {len(rows)} tiles come from a single case ({rows['case_id'].iloc[0]})"
        elif not rows["split"].eq("test").any():
            why[name] = "no tile in test"
    return why
