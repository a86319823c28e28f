"""`histokit init FOLDER`: a first dataset description, guessed from a folder, to be read and corrected by its owner.

It guesses layout, classes, sizes and how file names tell the case, writes them with a comment on each, and prints what to check.
A guess is shown on real file names, so that a wrong one is seen at a glance.
"""

import re
from collections import Counter
from pathlib import Path

from histokit.core import files
from histokit.tiles.description import describe
from histokit.tiles.ingest import remarks, survey

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
    if not output and (files.root() == root or files.root().is_relative_to(root)):
        raise ValueError(
            f"{files.root()} is the folder of tiles itself, and nothing is written there; go to your study (`histokit new FOLDER` makes "
            "one) and give this folder from there, or say where with --output"
        )
    if path.exists():
        raise FileExistsError(f"{path} exists and is left as it is; delete it, or name another file with --output")
    guess = survey.look(root)
    files.write_text(path, render(guess, root, name))
    try:
        described = describe(path)
    except ValueError as error:
        print(f"The draft needs your hand: {error}\n")
        described = None
    print(report(guess, root, path, described))
    return 0


def _many(count, what):
    return f"{count} {what}{'s' * (count != 1)}"


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
        put("table", guess["table"] if isinstance(guess["table"], str) else _flow(guess["table"]), guess["layout"])
        put("columns", _flow(guess["columns"]), "ours: theirs")
    if guess["levels"]:
        put("levels", _flow(guess["levels"]), "what each level of folders says, from the top; - says nothing")
    if guess["label_pattern"]:
        put("label_pattern", guess["label_pattern"], "searched in the file name: the class")
    if guess["facts"]:
        put("facts", [CommentedMap(table=one["table"], on=one["on"], columns=_flow(one["columns"])) for one in guess["facts"]])
        top.yaml_set_comment_before_after_key("facts", before="What other tables say of a tile, or of its case or slide (`on`).")
    apart = guess["masks"]
    if apart.template and "mask" not in guess["columns"]:
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
            if label in guess["also"]:
                classes[label]["also"] = _flow(guess["also"][label])
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
    after += ["exclude: [CLASS/one_tile.png]  # single tiles to leave out"]
    after += ["budget: {A_COMMON_CLASS: {tiles: 15, cases: 3}}  # makes a class rare on purpose"]
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.allow_unicode = True
    yaml.dump(top, text)
    return text.getvalue() + "".join(f"# {line}\n" for line in after)


def _flow(values):
    """A list or a mapping, written on one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    flow = CommentedMap({key: _flow(v) if isinstance(v, list) else v for key, v in values.items()}) if isinstance(values, dict) else None
    flow = CommentedSeq(values) if flow is None else flow
    flow.fa.set_flow_style()
    return flow


def tile_px(sizes):
    """The commonest shorter side, at most 256: what a classifier of tiles usually reads."""
    known = Counter({size: n for size, n in sizes.items() if min(size) > 0})
    return max(16, min(256, min(known.most_common(1)[0][0]))) if known else 224


def report(guess, root, path, described):
    """What to check, as text: counts, and the case guessed for ten file names of every class, for fewer where there are many classes."""
    lines = [f"{path}", f"  {root}: {guess['layout']}, {remarks.sizes_text(guess['sizes'])} px", ""]
    case_of = guess["case_of"]
    cases = {label: {case_of[name] for name in names} for label, names in guess["names"].items()} if case_of else {}
    width, few = max(len(label) for label in guess["names"]), max(2, min(10, 24 // len(guess["names"])))
    for label, names in guess["names"].items():
        of = f" of {_many(len(cases[label]), 'case')}" if cases else ""
        lines.append(f"  {label:<{width}}  {len(names):>6} tile{'s' * (len(names) != 1)}{of}")
        shown, last = sorted(names), len(names) - 1
        for name in dict.fromkeys(shown[round(i * last / (few - 1))] for i in range(few)):
            lines.append(f"      {case_of[name] + '  <-  ' if cases else ''}{name}")
    lines += ["", "Check:"] + [f"  - {point}" for point in remarks.points(guess, cases, described)]
    return "\n".join(lines)
