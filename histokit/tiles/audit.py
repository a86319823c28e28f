"""What is wrong with a dataset, and what to do about each finding.

`read` opens every file once (hash, header, full decode, thumbnail); `copied` finds copies among the thumbnails; `table`
turns both and the manifest into a list of findings. Nothing is repaired or dropped silently.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.tiles import colour_profiles, decode, near_duplicates, splits

VERSION = 3
FEW_COLOURS, MASK_LIKE = 3, "two or three colours"  # what a mask has, and no picture of tissue
FEW_CASES = 8  # test cases below which a class gets counts and a range instead of an interval


def read(manifest, root, threads=None, chunk=128, follow=False, profile=True):
    """Decode every tile once.

    Args:
        manifest: rows of `data.scan`.
        root: folder of the tiles.
        threads: decoding threads; the number of cores by default, at most 8.
        follow: whether links among the tiles may lead out of the root.
        profile: whether embedded colour profiles are honoured, see `decode.rgb`.

    Returns:
        The manifest with `width, height, sha256` filled, and facts: one row per tile in the same order with `problem` (why it
        is not usable, "" when it is), `note` (what was converted) and `contrast` (standard deviation of its thumbnail in grey
        levels), and thumbnails uint8 [N, 32, 32], 1 kB a tile; zero where there is a problem.
    """
    names = manifest["file_name"].tolist()
    paths = files.inside_all(root, names, follow)
    thumbnails = np.zeros((len(names), near_duplicates.SIDE, near_duplicates.SIDE), np.uint8)

    def work(start):
        rows = []
        for i in range(start, min(start + chunk, len(names))):
            row, thumbnail = _look(paths[i], names[i], profile)
            rows.append(row)
            if thumbnail is not None:
                thumbnails[i] = thumbnail
        return rows

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        rows = [row for part in pool.map(work, range(0, len(names), chunk)) for row in part]
    facts = pd.DataFrame(rows, columns=["width", "height", "sha256", "problem", "note"], index=manifest.index)
    facts["contrast"] = thumbnails.std(axis=(1, 2)) if len(names) else 0.0
    facts.insert(0, "tile_id", manifest["tile_id"])
    manifest = manifest.assign(width=facts["width"], height=facts["height"], sha256=facts["sha256"])
    return manifest, facts[["tile_id", "problem", "note", "contrast"]], thumbnails


def _look(path, name, profile=True):
    """(width, height, sha256, problem, note) and the thumbnail of one file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return (0, 0, "", f"{name}: cannot be read ({error.strerror}); check the disk and the permissions", ""), None
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        image, note = decode.rgb(content, name, profile)
    except decode.BadImage as error:
        return (0, 0, sha256, str(error), ""), None
    if len(image.getcolors(FEW_COLOURS) or ()) > 1:
        note = f"{note}, {MASK_LIKE}".removeprefix(", ")
    return (*image.size, sha256, "", note), near_duplicates.thumbnail(image)


def copied(manifest, thumbnails, threshold=near_duplicates.THRESHOLD):
    """Pairs of copies as a table `a, b` (tile ids), `kind, correlation`.

    `kind` is exact (the same bytes), same, flipped, turned or transposed. Of tiles with the same bytes each is paired with the
    first one only, so a tile that is there a thousand times costs a thousand pairs and not half a million.
    """
    ids, sha = manifest["tile_id"].to_numpy(), manifest["sha256"]
    known = sha.ne("").to_numpy()
    first = np.arange(len(manifest))
    first[known] = pd.Series(np.flatnonzero(known)).groupby(sha[known].to_numpy()).transform("first").to_numpy()
    again = np.flatnonzero(first != np.arange(len(manifest)))
    single = np.flatnonzero((first == np.arange(len(manifest))) & known)
    i, j, value, symmetry = near_duplicates.pairs(near_duplicates.signatures(thumbnails[single]), threshold=threshold)
    a, b = np.concatenate([first[again], single[i]]), np.concatenate([again, single[j]])
    kind = ["exact"] * len(again) + [near_duplicates.SYMMETRIES[s] for s in symmetry]
    found = pd.DataFrame({"a": ids[a], "b": ids[b], "kind": kind, "correlation": np.concatenate([np.ones(len(again)), value])})
    found["correlation"] = found["correlation"].round(4)
    return found.astype({"kind": "str"}).sort_values(["a", "b"], ignore_index=True)


def beside(found, manifest):
    """The pairs of `copied` with label, split and use of both tiles: `label_a`, `label_b`, `split_a`, ..."""
    held = manifest.drop_duplicates("tile_id").set_index("tile_id")
    return found.assign(**{f"{name}_{of}": found[of].map(held[name]).fillna("") for name in ("label", "split", "use") for of in ("a", "b")})


def settle(manifest, found, on_copies="stop"):
    """The manifest without what the test, or the validation, has already shown: pictures that lie in two splits.

    Args:
        manifest: with splits assigned.
        found: pairs of copies from `copied`.
        on_copies: `stop`; `leave_out` the one that is learned from, so that the test stays whole; or `keep` both, and the verdict says so.

    Returns:
        Manifest, and {left_out, test, labels}: tiles left out, test tiles that are still copies of training or validation tiles, and
        test tiles whose copy has another label.

    Raises ValueError at `stop`, naming the pairs and the ways out.
    """
    if on_copies not in ("stop", "leave_out", "keep"):
        raise ValueError(f"on_copies is {on_copies!r}, expected stop, leave_out or keep")
    held = manifest[manifest["split"].ne("")].assign(picture=_pictures(manifest, found))
    held = held[held["picture"].ge(0)]
    order = held["split"].map({name: i for i, name in enumerate(splits.SPLITS)})
    last = order.groupby(held["picture"]).transform("max")
    across = held[order.groupby(held["picture"]).transform("min").ne(last)]
    if len(across) and on_copies == "stop":
        first = across[across["picture"].eq(across["picture"].iloc[0])].drop_duplicates("split").head(2)
        (a, b), (one, two) = first["tile_id"], first["split"]
        raise ValueError(
            f"{across['picture'].nunique()} pictures lie in two splits, first {a!r} in {one} and {b!r} in {two} (copies.csv has all): a "
            "test would reward memory. Mend the split; or set on_copies to leave_out, which drops the copies that are learned from and "
            "keeps the test whole; or to keep, and the verdict says so"
        )
    gone = set(held.loc[order.lt(last), "tile_id"]) if on_copies == "leave_out" else set()
    labelled = held[held["use"].ne("unlabelled") & ~held["tile_id"].isin(gone)]
    disputed = labelled.groupby("picture")["label"].transform("nunique").gt(1) & labelled["split"].eq("test")
    test = 0 if gone else int(across["split"].eq("test").sum())
    kept = manifest[~manifest["tile_id"].isin(gone)].reset_index(drop=True)
    return kept, {"left_out": len(gone), "test": test, "labels": int(disputed.sum())}


def _pictures(manifest, found):
    """Number of the picture [N] that each tile shows, -1 for one without a copy; pairs of copies are linked, however long the chain."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    place = pd.Series(np.arange(len(manifest)), index=manifest["tile_id"].to_numpy())
    pairs = found[found["a"].isin(place.index) & found["b"].isin(place.index)]
    a, b = (place[pairs[of]].to_numpy() for of in "ab")
    number = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(len(place),) * 2), directed=False)[1]
    alone = ~np.isin(np.arange(len(place)), np.concatenate([a, b]))
    return pd.Series(np.where(alone, -1, number), index=manifest.index)


def readable(manifest, facts):
    """The manifest without the tiles that cannot be decoded."""
    return manifest[facts["problem"].eq("")].reset_index(drop=True)


def refuse(facts, described, on_unreadable="stop"):
    """Stop at unreadable tiles, or, told to leave them out, say how many there were.

    Raises:
        ValueError: names the files and what to write into the description.
    """
    if on_unreadable not in ("stop", "leave_out"):
        raise ValueError(f"on_unreadable is {on_unreadable!r}, expected stop or leave_out")
    bad = facts[facts["problem"].ne("")]
    if len(bad) and on_unreadable == "stop":
        shown = "\n  ".join(bad["problem"].head(10))
        more = f"\n  ... and {len(bad) - 10} more, all in audit_tiles.csv" if len(bad) > 10 else ""
        raise ValueError(
            f"{len(bad)} of {len(facts)} tiles cannot be used:\n  {shown}{more}\nMend the files, list them under `exclude:` in "
            f"{described.path}, or set on_unreadable to leave_out"
        )
    return f"{len(bad)} of {len(facts)} tiles cannot be decoded" + (" and are left out" if len(bad) else "")


def table(manifest, described, facts=None, found=None):
    """One row per check: `check, count, examples, what to do`; checks that need pixels are left out without `facts`.

    Args:
        manifest: with splits assigned.
        facts: second result of `read`.
        found: pairs of copies from `copied`.
    """
    rows = []

    def add(check, names, todo):
        """`names`: what to show, one per finding."""
        names = list(names)
        rows.append((check, len(names), ", ".join(map(str, names[:3])) + (" ..." if len(names) > 3 else ""), todo if names else ""))

    if facts is not None:
        _add_pixels(add, manifest, facts, described)
    if found is not None:
        _add_copies(add, manifest, found)
    _add_cases(add, manifest, described)
    return pd.DataFrame(rows, columns=["check", "count", "examples", "what to do"])


def _add_pixels(add, manifest, facts, described):
    bad = facts["problem"].ne("")
    add("unreadable file", facts.loc[bad, "problem"], "mend it, or list it under `exclude`; see audit_tiles.csv")
    for note, todo in {
        "grey": "shown with equal red, green and blue; fine when the stain is grey, else find the colour file",
        "palette": "expanded to RGB; colours were reduced when it was saved, so prefer the original",
        "alpha": "laid on white; check that white is the colour of your empty slide",
        colour_profiles.UNREADABLE: "its colour profile is broken or not one of RGB; the numbers are taken as they are",
        colour_profiles.NOTE: "brought to sRGB by the colour profile in the file; `colour_profile: ignore` takes the numbers as they are",
        "rotated": "turned upright by its EXIF entry; masks are not turned, so save such tiles upright",
    }.items():
        add(f"converted: {note}", facts.loc[facts["note"].str.contains(note), "tile_id"], todo)
    masks = facts["note"].str.contains(MASK_LIKE)
    add(
        "a mask among the tiles", facts.loc[masks, "tile_id"], f"it has {MASK_LIKE}: name it in `mask`, or leave such files out by `ignore`"
    )
    flat = ~bad & facts["contrast"].lt(near_duplicates.FLAT)
    add("blank or black tile", facts.loc[flat, "tile_id"], "look at it; leave out (`exclude`) what holds no tissue")
    good = manifest[manifest["width"].gt(0)]
    sizes = (good["width"].astype(str) + " x " + good["height"].astype(str)).value_counts()
    mixed = [f"{size} ({n} tiles)" for size, n in sizes.items()] if len(sizes) > 1 else []
    add("several sizes", mixed, f"`fit` is {described.fit}" if described.fit else "set `fit`: crop, resize or resample_to_mpp")
    small = good[good[["width", "height"]].min(axis=1).lt(described.tile_px)]
    add("smaller than tile_px", small["tile_id"], f"it is enlarged to {described.tile_px} px, which adds no detail; lower `tile_px`")


def _add_copies(add, manifest, found):
    def shown(rows):
        return [f"{a} = {b}" for a, b in zip(rows["a"], rows["b"], strict=True)]

    def differ(column):
        held = manifest.set_index("tile_id")[column]
        return found[found["a"].map(held).ne(found["b"].map(held))]

    exact = found["kind"].eq("exact")
    add("same file twice", shown(found[exact]), "`exclude` one of the two")
    add("near copy", shown(found[~exact]), "look at the pair; `exclude` one (flips, turns, recompressed or brightened copies count)")
    add("one picture, two labels", shown(differ("label")), "ask who labelled it; `exclude` both until it is settled")
    add("copy across splits", shown(differ("split")), "the test would reward memory: mend the split, or see on_copies")


def _add_cases(add, manifest, described):
    tiles = manifest[manifest["use"].ne("unlabelled")]
    add("case in two splits", splits.parted(manifest, strict=False)["unit"].unique(), "move all its tiles to one split")
    own = manifest["case_id"].eq(manifest["tile_id"]).all() and len(manifest)
    note = "tiles of one case may lie on both sides, and every interval counts tiles; give `case_pattern` or a column"
    add("no case ids", [f"{len(manifest)} tiles, each its own case"] if own else [], note)
    per_class = tiles.groupby("label")["case_id"].nunique()
    test = tiles[tiles["split"].eq("test")].groupby("label")["case_id"].nunique().reindex(per_class.index).fillna(0)
    add("class from a single case", per_class.index[per_class.eq(1)], "it is trained on and listed as 'cannot be evaluated'")
    why = splits.not_evaluable(manifest, described.classes)
    add("class without a test tile", [n for n in why if per_class.get(n, 0) > 1], "move a case to test, or read no number for it")
    few = test[test.gt(0) & test.lt(FEW_CASES)]
    todo = "counts and a range are reported, no interval"
    add(f"fewer than {FEW_CASES} test cases", [f"{name} ({n:.0f})" for name, n in few.items()], todo)


def reach(manifest, classes, roles):
    """What the test tiles can show, one row per class: label id, role, tiles / cases, and the kind of statement possible.

    `one tile` is the step of recall in percentage points: no smaller difference can be seen.
    """
    table = splits.counts(manifest, classes)
    held = {(row.label, row.split): row for row in table[table["use"].ne("withheld")].itertuples()}
    why, rows = splits.not_evaluable(manifest, classes), []
    for i, name in enumerate(classes):
        train, val, test = (held[name, split] for split in splits.SPLITS)
        if name in why:
            statement = f"cannot be evaluated: {why[name]}"
        elif test.cases < FEW_CASES:
            statement = f"counts and range only ({test.cases} test cases)"
        else:
            statement = "interval over cases"
        facts = {split.split: f"{split.tiles} / {split.cases}" for split in (train, val, test)}
        step = f"{100 / test.tiles:.1f} points" if test.tiles else "-"
        rows.append({"id": i, "class": name, "role": roles[name], **facts, "one tile": step, "what the test can show": statement})
    return pd.DataFrame(rows)


def side_by_side(found, manifest, pairs=12):
    """Rows of the manifest for the first pairs of copies, a beside b, with a `caption`."""
    rows = manifest.set_index("tile_id", drop=False)
    shown = found[found["a"].isin(rows.index) & found["b"].isin(rows.index)].head(pairs)
    table = rows.loc[shown[["a", "b"]].to_numpy().ravel()].reset_index(drop=True)
    kind = shown["kind"].repeat(2).to_numpy()
    return table.assign(caption=[f"{k}\n{label}, {split}" for k, label, split in zip(kind, table["label"], table["split"], strict=True)])
