"""`histokit init FOLDER`: a first dataset description, guessed from a folder, to be read and corrected by its owner.

It guesses layout, classes, sizes and how file names tell the case, writes them with a comment on each, and prints what to check.
A guess is shown on real file names, so that a wrong one is seen at a glance.
"""

import re
from collections import Counter
from pathlib import Path

import pandas as pd

from histokit.core import files
from histokit.tiles.description import describe
from histokit.tiles.ingest import label_tables, levels, masks, remarks, walk

VERSION = 1


def draft(folder, output=""):
    """Write a description of `folder` and print what to check; returns 0.

    Args:
        folder: class folders, train/val/test/CLASS, or a folder with a CSV or parquet table.
        output: YAML file; params/datasets/<folder>.yaml below the working root by default. An existing file is never replaced.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: name the folder or file and what to do.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder that holds the tiles")
    name = re.sub(r"[^a-z0-9]+", "_", root.name.lower()).strip("_") or "dataset"
    path = Path(output).expanduser().resolve() if output else files.root() / "params" / "datasets" / f"{name}.yaml"
    if path.exists():
        raise FileExistsError(f"{path} exists and is left as it is; delete it, or name another file with --output")
    guess = look(root)
    files.write_text(path, render(guess, root, name))
    try:
        described = describe(path)
    except ValueError as error:
        print(f"The draft needs your hand: {error}\n")
        described = None
    print(report(guess, root, path, described))
    return 0


def look(root):
    """What can be told about a folder of tiles: dict with layout, names {class: [file names]}, sizes, case_of {file name: case} ..."""
    found = walk.look(root)
    apart = masks.apart(found.pictures)
    guessed = levels.guess(apart.tiles)
    if guessed.masks:
        apart = masks.apart(found.pictures, guessed)
    names = label_tables.Names(root, apart.tiles if found.tables else [])
    tables = [label_tables.judge(root, name, names) for name in found.tables]
    guess = {"table": "", "columns": {}, "levels": [], "kinds": [], "unlabelled": "", "skipped": {}, "refused": [], "case_of": {}}
    guess["said"] = []
    guess |= {"found": found, "tables": tables, "masks": apart}
    guess |= _look_at_tables(tables) or _look_at_folders(apart.tiles, guessed)
    every = [name for names in guess["names"].values() for name in names]
    if not every:
        there = "".join(f" {line}." for line in remarks.left_out(guess))
        raise ValueError(
            f"no tiles below {root}; expected CLASS/tile.png, train/CLASS/tile.png, or a CSV with a column of file names.{there}"
        )
    guess["sizes"] = _sizes(root, every)
    guess["pattern"] = "" if guess["case_of"] else case_pattern(guess["names"])
    if guess["pattern"]:
        guess["case_of"] = {name: re.search(guess["pattern"], name)["case_id"] for name in every}
    return guess


def _look_at_tables(tables):
    """The guess from the tables that list tiles: one, or one for each split; None without such a table."""
    good = [table for table in tables if not table.why_not]
    if not good:
        return None
    splits = [table for table in good if table.split and "split" not in table.columns]
    first = max(good, key=lambda table: table.files)
    used = [table for table in splits if table.columns == splits[0].columns] if splits else []
    if len(used) < 2 or len({table.split for table in used}) < len(used):
        used = [first]
    for table in good:
        if table not in used:
            table.why_not = f"{', '.join(one.name for one in used)} list{'s' * (len(used) == 1)} the tiles already"
    data = pd.concat([table.data for table in used], ignore_index=True)
    labelled = data[data["label"].ne("")]
    case = next((c for c in remarks.CASES if c in data), None)
    several = len(used) > 1
    return {
        "table": {table.split: table.name for table in used} if several else first.name,
        "columns": used[0].columns,
        "layout": f"{'tables' if several else 'table'} {', '.join(table.name for table in used)}"
        + (" with its own split" if several or "split" in data else ""),
        "names": {name: list(rows) for name, rows in labelled.groupby("label")["file_name"]},
        "case_of": dict(zip(labelled["file_name"], labelled[case], strict=True)) if case else {},
        "without": len(data) - len(labelled),
    }


def _look_at_folders(tiles, guessed):
    kinds = guessed.kinds
    names, skipped, cases, refused = {}, Counter(), {}, []
    for name in tiles:
        folders = name.split("/")[:-1]
        told = levels.read(name, kinds) if "class" in kinds else None
        if told is None or levels.plain(told["class"]) in (*levels.MASKS, *levels.ASIDE, *levels.UNLABELLED):
            skipped["/".join(folders[: kinds.index("class") + 1 if "class" in kinds else 1]) or "."] += 1
            refused += [told["class"]] if told else []
            continue
        names.setdefault(told["class"], []).append(name)
        if told.get("case_id"):
            cases[name] = told["case_id"]
    loose = next((folder for folder in skipped if levels.plain(folder) in levels.UNLABELLED), "")
    skipped.pop(loose, None)
    if not names and tiles:
        return {"layout": "tiles without labels", "names": {"": tiles}, "unlabelled": ".", "skipped": {}}
    plain = kinds in (["class"], ["split", "class"])
    told = "class folders" if plain else f"folders of {' / '.join(kinds)}"
    bases = sorted({name.split("/")[0] for name in tiles if levels.split_of(name.split("/")[0])}) if kinds[:1] == ["split"] else []
    return {
        "layout": f"{'/'.join(bases)} above class folders" if bases and plain else told,
        "names": dict(sorted(names.items())),
        "unlabelled": loose,
        "skipped": dict(skipped),
        "refused": list(dict.fromkeys(name for name in refused if name not in names and name != loose)),
        "kinds": kinds,
        "levels": [] if plain else kinds,
        "case_of": cases if len(cases) == sum(map(len, names.values())) else {},
        "said": guessed.said,
    }


def _sizes(root, names, most=300):
    """Counter of (width, height) of at most `most` tiles spread over the list, read from their headers."""
    from PIL import Image

    sizes = Counter()
    for name in names[:: max(1, len(names) // most)]:
        try:
            with Image.open(files.inside(root, name.replace("\\", "/"))) as image:
                sizes[image.size] += 1
        except (OSError, ValueError, Image.DecompressionBombError):
            sizes[(0, 0)] += 1
    return sizes


def _many(count, what):
    return f"{count} {what}{'s' * (count != 1)}"


def case_pattern(names):
    """A regular expression with the group case_id that fits every file name, or "" when none is plausible.

    File names are cut at - _ and spaces. The case is taken to be the leftmost part that holds a digit, takes several values
    within a class, and comes back on several tiles of a class; a running number does not come back, a scanner's name has
    no digit, a class's name takes one value per class. Folders below the class are tried first, TCGA barcodes by their rule.

    Args:
        names: {class: [file names relative to the root]}.
    """
    every = [name for group in names.values() for name in group]
    for pattern in _candidates(names):
        search = re.compile(pattern).search
        if not all(map(search, every)):
            continue
        values = [{search(name)["case_id"] for name in group} for group in names.values()]
        digits = all(any(c.isdigit() for c in value) for value in set.union(*values)) or pattern.endswith("/[^/]+$")
        plausible = digits and max(map(len, values)) > 1 and len(every) >= 1.3 * sum(map(len, values))
        if plausible and not _is_place(names, search, values):
            return pattern
    return ""


def _is_place(names, search, values):
    """Whether what a pattern finds is where a tile lay or how it was seen, and no case: x12, row_3, 40X, or numbers of a grid.

    Numbers of a grid come back in every class, and in a class nearly every pair of them and another number of the name is there.
    """
    every = set.union(*values)
    if all(levels.POSITION.fullmatch(value) or levels.MAGNIFICATION.fullmatch(value) for value in every):
        return True
    if not all(value.isdigit() for value in every) or len(values) < 2 or any(value != values[0] for value in values):
        return False
    for group in names.values():
        pairs = set()
        for name in group:
            leaf, (start, end) = name.rpartition("/")[2], search(name).span("case_id")
            before = len(name) - len(leaf)
            pairs.add((name[start:end], leaf[: max(0, start - before)] + "#" + leaf[end - before :]))
        ones, others = (set(part) for part in zip(*pairs, strict=True))
        if len(pairs) < 0.6 * len(ones) * len(others) or not all(re.search(r"\d", other) for other in others):
            return False
    return True


def _candidates(names, most=8):
    yield r"(?P<case_id>TCGA-\w{2}-\w{4})"  # project, site, participant
    if min(name.count("/") for group in names.values() for name in group) >= 2:
        yield r"(?P<case_id>[^/]+)/[^/]+$"
    for skipped in range(most):
        before = rf"(?:[^/_\-\s]+[_\-\s]+){{{skipped}}}" if skipped else ""
        yield rf"(?:^|/){before}(?P<case_id>[^/_\-\s.]+)(?=[_\-\s.])[^/]*$"


def render(guess, root, name):
    """The text of the description, a comment on every guess."""
    import io

    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap

    top, px = CommentedMap(), tile_px(guess["sizes"])
    work = files.root().resolve()

    def put(key, value, comment=""):
        top[key] = value
        if comment:
            top.yaml_add_eol_comment(comment, key)

    top.yaml_set_start_comment(
        f"Drafted by `histokit init` from {guess['layout']}. Read every line; what is wrong here is wrong everywhere."
    )
    put("name", name)
    put("root", root.relative_to(work).as_posix() if root.is_relative_to(work) else str(root), "may be read-only; data_root replaces it")
    put("licence", "", "who may use these tiles, and whom to cite")
    if guess["table"]:
        put("table", CommentedMap(guess["table"]) if isinstance(guess["table"], dict) else guess["table"], guess["layout"])
        put("columns", CommentedMap(guess["columns"]), "ours: theirs")
        top["columns"].fa.set_flow_style()
    if guess["levels"]:
        put("levels", _flow(guess["levels"]), "what each level of folders says, from the top; - says nothing")
    apart = guess["masks"]
    if apart.template:
        put("mask", apart.template, f"{apart.of} masks; {{0}} is the top folder")
    ignore = [*guess["refused"], *apart.ignore]  # what is at no level of a class is left out anyway
    if ignore:
        put("ignore", _flow(ignore), "folders that are not classes, and files that are not tiles")
    if guess["unlabelled"]:
        put("unlabelled", guess["unlabelled"], "folder of tiles without a label")
    classes = CommentedMap()
    for label, held in guess["names"].items():
        if label:
            classes[label] = CommentedMap(term=re.sub(r"[_\-\s]+", " ", label).strip().lower())
            classes[label].fa.set_flow_style()
            classes.yaml_add_eol_comment(f"{len(held)} tiles", label)
    if classes:
        put("classes", classes)
        top.yaml_set_comment_before_after_key(
            "classes", before="Order fixes the label ids; `term` goes into prompts, so write what a pathologist would say."
        )
    put("tail_below", 50, "training tiles under which a class counts as rare; or give `role: head | tail` per class")
    put("tile_px", px, f"side the classifier sees; files: {remarks.sizes_text(guess['sizes'])}")
    mixed = len(guess["sizes"]) > 1 or any(w != h for w, h in guess["sizes"])
    put(
        "fit",
        "resize",
        "sizes differ, so choose: resize | crop | resample_to_mpp" if mixed else "the whole field; or crop, to keep the scale",
    )
    if guess["pattern"]:
        put("case_pattern", guess["pattern"], "searched in the file name; may also name patient, slide, group")
    after = [] if guess["pattern"] or guess["case_of"] else ["case_pattern: (?P<case_id>[^_]+)_"]
    after += [
        "mpp: 0.5  # micrometres per pixel of the files",
        "split: {train: 0.6, val: 0.15, test: 0.25}  # by case, when the data brings none",
    ]
    after += ["budget: {A_COMMON_CLASS: {tiles: 15, cases: 3}}  # makes a class rare on purpose"]
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.allow_unicode = True
    yaml.dump(top, text)
    return text.getvalue() + "".join(f"# {line}\n" for line in after)


def _flow(values):
    from ruamel.yaml.comments import CommentedSeq

    sequence = CommentedSeq(values)
    sequence.fa.set_flow_style()
    return sequence


def tile_px(sizes):
    """The commonest shorter side, at most 256: what a classifier of tiles usually reads."""
    known = Counter({size: n for size, n in sizes.items() if min(size) > 0})
    return max(16, min(256, min(known.most_common(1)[0][0]))) if known else 224


def report(guess, root, path, described):
    """What to check, as text: counts, and the case guessed for ten file names of every class."""
    lines = [f"{path}", f"  {root}: {guess['layout']}, {remarks.sizes_text(guess['sizes'])} px", ""]
    case_of = guess["case_of"]
    cases = {label: {case_of[name] for name in names} for label, names in guess["names"].items()} if case_of else {}
    width = max(len(label) for label in guess["names"])
    for label, names in guess["names"].items():
        of = f" of {_many(len(cases[label]), 'case')}" if cases else ""
        lines.append(f"  {label:<{width}}  {len(names):>6} tile{'s' * (len(names) != 1)}{of}")
        shown, last = sorted(names), len(names) - 1
        for name in dict.fromkeys(shown[round(i * last / 9)] for i in range(10)):
            lines.append(f"      {case_of[name] + '  <-  ' if cases else ''}{name}")
    lines += ["", "Check:"] + [f"  - {point}" for point in remarks.points(guess, cases, described)]
    return "\n".join(lines)
