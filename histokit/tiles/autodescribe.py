"""`histokit init FOLDER`: a first dataset description, guessed from a folder, to be read and corrected by its owner.

It guesses layout, classes, sizes and how file names tell the case, writes them with a comment on each, and prints what to check.
A guess is shown on real file names, so that a wrong one is seen at a glance.
"""

import os
import re
from collections import Counter
from pathlib import Path

from histokit.core import files
from histokit.tiles.description import SPLITS, describe
from histokit.tiles.scan import ALIASES, listing

VERSION = 1
CASES = ("case_id", "patient", "slide")  # the first of these that is given says what a case is
NOT_CLASSES = re.compile(r"masks?|labels?|annotations?|thumbs?|previews?|__macosx", re.IGNORECASE)
KNOWN = {  # column names people use, lower case, for ours
    "file_name": ("file_name", "filename", "file", "image", "path", "image_path", "img", "tile", "patch", "name"),
    "label": ("label", "class", "cls", "class_name", "category", "tissue", "diagnosis", "y", "target"),
    "split": ("split", "set", "fold", "subset", "partition"),
    "case_id": ("case_id", "case", "caseid", "biopsy", "specimen"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id"),
    "slide": ("slide", "slide_id", "slideid", "wsi"),
    "mask": ("mask", "mask_path", "segmentation"),
    "group": ("group", "centre", "center", "hospital", "scanner", "site", "domain"),
    "mpp": ("mpp", "microns_per_pixel", "resolution"),
}


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
    table = _find_table(root)
    guess = {"table": "", "columns": {}, "unlabelled": "", "skipped": [], "case_of": {}}
    guess |= _look_at_table(table) if table else _look_at_folders(root)
    every = [name for names in guess["names"].values() for name in names]
    if not every:
        raise ValueError(f"no tiles below {root}; expected CLASS/tile.png, train/CLASS/tile.png, or a CSV with a column of file names")
    guess["sizes"] = _sizes(root, every)
    guess["pattern"] = "" if guess["case_of"] else case_pattern(guess["names"])
    if guess["pattern"]:
        guess["case_of"] = {name: re.search(guess["pattern"], name)["case_id"] for name in every}
    return guess


def _find_table(root):
    """The one table in `root` that names image files, or None."""
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in (".csv", ".tsv", ".parquet") and path.is_file():
            try:
                columns = files.read_table(path).columns
            except ValueError:
                continue
            if "file_name" in _columns(columns) and "label" in _columns(columns):
                return path
    return None


def _columns(names):
    """{ours: theirs} for the columns of a table whose names we know."""
    lower = {str(name).lower().strip(): str(name) for name in names}
    return {ours: lower[known] for ours, options in KNOWN.items() if (known := next((o for o in options if o in lower), None))}


def _look_at_table(path):
    table = files.read_table(path)
    columns = _columns(table.columns)
    split = columns.get("split")
    if split and not set(table[split].astype(str).str.lower()) <= {*ALIASES, ""}:
        del columns["split"]  # fold numbers and the like
    label, name = table[columns["label"]].astype(str), table[columns["file_name"]].astype(str)
    names = {str(k): list(v) for k, v in name.groupby(label) if k}
    layout = f"table {path.name}" + (" with its own split" if "split" in columns else "")
    case = next((columns[c] for c in CASES if c in columns), None)
    case_of = dict(zip(name, table[case].astype(str), strict=True)) if case else {}
    return {"table": path.name, "columns": columns, "layout": layout, "names": names, "case_of": case_of}


def _look_at_folders(root):
    tops = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    bases = [t for t in tops if t.lower() in ALIASES]
    names, skipped, loose = {}, [], ""
    for base in bases or [""]:
        for folder in sorted(e.name for e in os.scandir(root / base) if e.is_dir() and not e.name.startswith(".")):
            found = listing(root, f"{base}/{folder}".lstrip("/"))
            if NOT_CLASSES.fullmatch(folder) or not found:
                skipped.append(folder)
            elif folder.lower() in ("unlabelled", "unlabeled"):
                loose = folder
            else:
                names[folder] = names.get(folder, []) + found
    layout = f"{'/'.join(bases)} above class folders" if bases else "class folders"
    if not names and (found := listing(root, "")):
        return {"layout": "tiles without labels", "names": {"": found}, "unlabelled": ".", "skipped": skipped}
    return {"layout": layout, "names": names, "unlabelled": loose, "skipped": skipped}


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
        if digits and max(map(len, values)) > 1 and len(every) >= 1.3 * sum(map(len, values)):
            return pattern
    return ""


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
        put("table", guess["table"], guess["layout"])
        put("columns", CommentedMap(guess["columns"]), "ours: theirs")
        top["columns"].fa.set_flow_style()
    if guess["skipped"]:
        put("ignore", _flow(dict.fromkeys(guess["skipped"])), "folders that are not classes")
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
    put("tile_px", px, f"side the classifier sees; files: {sizes_text(guess['sizes'])}")
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


def sizes_text(sizes):
    shown = [f"{w} x {h}" if w else "unreadable" for (w, h), _ in sizes.most_common(3)]
    return ", ".join(shown) + (f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")


def report(guess, root, path, described):
    """What to check, as text: counts, and the case guessed for ten file names of every class."""
    lines = [f"{path}", f"  {root}: {guess['layout']}, {sizes_text(guess['sizes'])} px", ""]
    case_of = guess["case_of"]
    cases = {label: {case_of[name] for name in names} for label, names in guess["names"].items()} if case_of else {}
    width = max(len(label) for label in guess["names"])
    for label, names in guess["names"].items():
        lines.append(f"  {label:<{width}}  {len(names):>6} tiles" + (f" of {len(cases[label])} cases" if cases else ""))
        shown, last = sorted(names), len(names) - 1
        for name in dict.fromkeys(shown[round(i * last / 9)] for i in range(10)):
            lines.append(f"      {case_of[name] + '  <-  ' if cases else ''}{name}")
    lines += ["", "Check:"] + [f"  - {point}" for point in _points(guess, cases, described)]
    return "\n".join(lines)


def _points(guess, cases, described):
    """What the owner has to look at."""
    given = [c for c in CASES if c in guess["columns"]]
    total, every = sum(map(len, guess["names"].values())), set().union(*cases.values()) if cases else set()
    if not cases:
        yield (
            "NO CASE IDS FOUND: every tile counts as its own case. Tiles of one patient may then be trained on and tested on, and "
            "every interval is too narrow. Give `case_pattern`, or a table with a case column"
        )
    else:
        source = f"column {guess['columns'][given[0]]!r}" if given else "the file names"
        yield f"{total} tiles, {len(every)} cases by {source}, as shown above: is the left part one patient, biopsy or slide?"
        if len(every) == 1:
            yield "ONE CASE ONLY: nothing can be held out for a test"
        if 1 < len(every) == total:
            yield (
                "EVERY TILE IS A CASE OF ITS OWN: right only if no two tiles come from one patient. Else tiles of one patient may be "
                "trained on and tested on, and every interval is too narrow; name another column, or give `case_pattern`"
            )
        if lonely := [label for label, held in cases.items() if len(held) == 1]:
            yield f"from a single case, so trained on but never evaluated: {', '.join(lonely)}"
    if guess["skipped"]:
        yield f"not taken as classes: {', '.join(dict.fromkeys(guess['skipped']))}"
    if len(guess["sizes"]) > 1:
        yield f"sizes differ ({sizes_text(guess['sizes'])}): is `fit: resize` right, or should the scale be kept?"
    if not [s for s in SPLITS if f"{s}" in guess["layout"]] and "split" not in guess["columns"]:
        yield "the data brings no split; 00_dataset draws one by case (`split:` sets the fractions)"
    yield "the order of `classes` (label ids), their `term` for prompts, and `mpp` if you know it"
    if described:
        work, path = files.root().resolve(), described.path.resolve()
        shown = path.relative_to(work).as_posix() if path.is_relative_to(work) else path
        yield f"then look at it: histokit run with `dataset: {shown}`, or open notebooks/00_dataset.ipynb"
