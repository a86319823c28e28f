"""The dataset description: what a YAML file in `params/datasets/` says about a folder of tiles.

It fixes the order of the classes, hence the label ids, and how to read case, slide and split. A key it does not
know is an error, because a misspelt `tail_bellow` would otherwise change a study silently. No image is opened here.
"""

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from histokit.core import files

VERSION = 2
ROLES = ("head", "tail")
FITS = ("crop", "resize", "resample_to_mpp")
SPLITS = ("train", "val", "test")
TISSUE = "tissue"  # the one class of tiles without labels
RESERVED = ("all", "tail", TISSUE)  # words of recipes and manifests, which no class may be called
FACTS = ("case_id", "patient", "slide", "group")  # what `case_pattern` may name and a table may hold
AT = ("x", "y")  # upper left corner of a tile on its slide, in px of the tile, where the description says how to read it
COLUMNS = ("file_name", "label", "split", "mask", "mpp", *FACTS, *AT)


@dataclass
class Description:
    """One dataset, as described. `classes` is in fixed order: the position of a class is its label id."""

    path: Path
    name: str
    root: Path  # absolute; holds the tiles, may be read-only
    classes: list = field(default_factory=list)
    terms: dict = field(default_factory=dict)  # class -> words for a prompt
    roles: dict = field(default_factory=dict)  # class -> head | tail, only where the description says so
    tail_below: int = 50  # training tiles under which a class counts as tail
    tile_px: int = 0  # side of a tile everywhere behind the decoder
    fit: str = ""  # resize | crop=128 | resample_to_mpp=0.5x128, see decode.field
    mpp: float | None = None  # micrometres per pixel of the files
    case_pattern: str = ""  # regex with named groups, searched in the file name
    label_pattern: str = ""  # regex with the group `label`, where neither folders nor a table name the class
    table: Path | dict | list | None = None  # or one for each split, {"train": Path, ...}, or several
    levels: list = field(default_factory=list)  # what each level of folders says, see `levels.KINDS`; a folder's name takes that one alone
    follow_links: bool = False  # whether links among the tiles are read through
    facts: list = field(default_factory=list)  # of {table, on, columns}: what other tables say of a tile, or of its case or slide
    spelt: dict = field(default_factory=dict)  # other spelling of a class -> its name; `also` of a class
    colour_profile: str = "convert"  # what to do with a profile (ICC) in a file: bring its colours to sRGB, or `ignore` it
    columns: dict = field(default_factory=dict)  # our name -> column of the table
    mask: str = ""  # template such as masks/{split}/{label}/{stem}.png
    layers: dict = field(default_factory=dict)  # tissue in a mask -> its values, the background first, see `masks.Layers`
    partly_annotated: bool = False  # whether tiles may lack the mask that `mask` names
    unlabelled: str = ""  # folder of tiles without a label
    ignore: list = field(default_factory=list)  # folders or labels that are not classes, and patterns of file names such as *_mask.png
    exclude: list = field(default_factory=list)  # single tiles to leave out
    budget: dict = field(default_factory=dict)  # class -> {tiles, cases}: rare on purpose
    split: dict = field(default_factory=lambda: {"train": 0.6, "val": 0.15, "test": 0.25})
    licence: str = ""
    procedural: str = ""  # "toy": drawn by histokit itself


def own_name(label):
    """What a class is called here: as it is found, but `all (class)` for one that is called by a word of `RESERVED`."""
    return f"{label} (class)" if label in RESERVED else label


def found_name(name):
    """The folder or label that a class of `own_name` has in the data."""
    return name.removesuffix(" (class)") if name.removesuffix(" (class)") in RESERVED else name


def of_step(parameters):
    """`describe` with the parameters of a 00_dataset step, {name: value}."""
    return describe(parameters["dataset"], *(parameters.get(name) for name in ("data_root", "budget", "tile_px")))


def describe(path, root="", budget=None, tile_px=0):
    """Read and check a description.

    Args:
        path: YAML file; relative paths start at the working root.
        root: replaces the description's `root` when not empty.
        budget: replaces the description's `budget` when not empty.
        tile_px: bounds the description's `tile_px` when not 0, the field that `fit` takes stays: so a base that draws smaller tiles is
            compared at its own size.

    Raises:
        ValueError: names the file, the key, the value and what was expected.
        FileNotFoundError: the file or the folder of tiles does not exist.
    """
    path = files.root() / path
    given = _read(path)
    if root:
        given["root"] = str(root)
    if budget:
        given["budget"] = budget
    if tile_px and not 16 <= tile_px <= 4096:
        raise ValueError(f"tile_px is {tile_px}, expected the side in px at which tiles are seen, 16 to 4096; 0 takes the description's")
    if not given.get("root"):
        raise ValueError(f"{path}: `root` is missing; name the folder of tiles, or pass data_root")
    classes, terms, roles, spelt = _classes(path, given.pop("classes", {}))
    target = given.pop("target_mpp", None)
    group = given.pop("group", "")
    described = Description(
        path=path,
        name=str(given.pop("name", path.stem)),
        root=(files.root() / Path(str(given.pop("root"))).expanduser()).resolve(),
        classes=classes,
        terms=terms,
        roles=roles,
        spelt=spelt,
        **given,
    )
    if described.procedural not in ("", "toy"):
        raise ValueError(f"{path}: `procedural` is {described.procedural!r}; the only one is toy")
    if not described.root.is_dir() and not described.procedural:
        raise FileNotFoundError(f"{path}: root {described.root} is not a folder; correct `root` or pass data_root=FOLDER")
    _check_pixels(described, target)
    described.tile_px = min(described.tile_px, tile_px or described.tile_px)  # `fit` has taken its field by then
    _check_columns(described, group)
    _check_levels(described)
    _check_split(described)
    _check_budget(described)
    if described.layers:
        from histokit.tiles import masks  # which reads what is described here

        masks.Layers.of(described.layers, f"{path}: `layers`")
    return described


def _read(path):
    """The YAML mapping at `path`, its keys and their types checked."""
    from ruamel.yaml import YAML, YAMLError

    if not path.is_file():
        raise FileNotFoundError(f"no dataset description at {path}; `histokit init FOLDER` drafts one")
    try:
        given = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(given).__name__}")
    kinds = {f.name: f.type for f in fields(Description) if f.name not in ("path", "spelt")} | {
        "target_mpp": float,
        "group": str,
    }
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("ignore", "exclude", "levels"):
        if isinstance(given.get(key), list):
            given[key] = [str(name) for name in given[key]]
    for key, value in given.items():
        if key not in kinds:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(key, kinds)}")
        kind = kinds[key]
        if key == "root":
            kind = str
        elif key == "table":
            kind = (str, dict, list)
        elif key == "mpp":
            kind = float
        elif key == "classes":
            kind = (dict, list)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = given[key] = float(value)
        if key == "name":
            value = given[key] = str(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{path}: `{key}` is {value!r}, expected {getattr(kind, '__name__', 'a mapping or a list')}")
    return given


def nearest(word, words):
    """The end of an error message: '; did you mean ...?', or the list of valid words."""
    known = {str(w).lower(): str(w) for w in words}
    close = difflib.get_close_matches(str(word).lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[close[0]]!r}?" if close else f"; known: {', '.join(map(str, words))}"


def _classes(path, given):
    """Class names in order, prompt terms and explicit roles."""
    if isinstance(given, list):
        given = {name: {} for name in given}
    classes, terms, roles, spelt = [], {}, {}, {}
    for name, facts in given.items():
        name = str(name)  # a folder may be called 01
        facts = {"term": facts} if isinstance(facts, str) else facts or {}
        for key in facts:
            if key not in ("term", "role", "also"):
                raise ValueError(f"{path}: class {name!r} has an unknown key {key!r}{nearest(key, ('term', 'role', 'also'))}")
        if facts.get("role", "head") not in ROLES:
            raise ValueError(f"{path}: role of class {name!r} is {facts['role']!r}, expected head or tail")
        term = str(facts.get("term") or re.sub(r"[_\-\s]+", " ", name).strip().lower())
        name = own_name(name)
        classes.append(name)
        terms[name] = term
        if "role" in facts:
            roles[name] = facts["role"]
        if not isinstance(facts.get("also", []), list):
            raise ValueError(f"{path}: `also` of class {name!r} is {facts['also']!r}, expected a list of its other spellings")
        for other in map(str, facts.get("also", [])):
            if other in spelt:
                raise ValueError(f"{path}: {other!r} is another spelling of {spelt[other]!r} and of {name!r}; take it out of one of them")
            spelt[other] = name
    if both := sorted(set(spelt) & set(classes)):
        raise ValueError(f"{path}: {both[0]!r} is a class and another spelling of {spelt[both[0]]!r}; take it out of one of them")
    if len(classes) == 1:
        raise ValueError(
            f"{path}: one class only ({classes[0]!r}); a classifier needs two. For tiles without labels name their "
            "folder in `unlabelled` and leave `classes` out"
        )
    if not classes:  # nothing is labelled
        return [TISSUE], {TISSUE: TISSUE}, {TISSUE: "head"}, {}
    return classes, terms, roles, spelt


def _check_pixels(described, target):
    path = described.path
    if described.colour_profile not in ("convert", "ignore"):
        raise ValueError(
            f"{path}: `colour_profile` is {described.colour_profile!r}{nearest(described.colour_profile, ('convert', 'ignore'))}"
        )
    if not 16 <= described.tile_px <= 4096:
        raise ValueError(f"{path}: `tile_px` is {described.tile_px}, expected the side of a tile, 16 to 4096 px")
    if described.fit and described.fit not in FITS:
        raise ValueError(f"{path}: `fit` is {described.fit!r}{nearest(described.fit, FITS)}")
    if described.fit == "resample_to_mpp":
        if not target or target <= 0:
            raise ValueError(f"{path}: `fit: resample_to_mpp` needs `target_mpp`, the micrometres per pixel to resample to")
        described.fit = f"resample_to_mpp={target:g}x{described.tile_px}"
    elif target:
        raise ValueError(f"{path}: `target_mpp` is used with `fit: resample_to_mpp` only, but `fit` is {described.fit or 'not given'!r}")
    if described.fit == "crop":
        described.fit = f"crop={described.tile_px}"
    if described.mpp is not None and not described.mpp > 0:
        raise ValueError(f"{path}: `mpp` is {described.mpp}, expected micrometres per pixel above 0; leave it out when unknown")


def _check_columns(described, group):
    path = described.path
    for ours in described.columns:
        if ours not in COLUMNS:
            raise ValueError(f"{path}: `columns` names {ours!r}{nearest(ours, COLUMNS)}")
    if described.mask and "{" not in described.mask:  # a column of the table
        described.columns["mask"], described.mask = described.mask, ""
    if group:
        described.columns["group"] = group
    if isinstance(described.table, dict):
        if wrong := [name for name in described.table if name not in SPLITS]:
            raise ValueError(f"{path}: `table` names a split {wrong[0]!r}{nearest(wrong[0], SPLITS)}")
        described.table = {
            split: [_table(described, str(one)) for one in held] if isinstance(held, list) else _table(described, str(held))
            for split, held in described.table.items()
        }
    elif isinstance(described.table, list):
        described.table = [_table(described, str(name)) for name in described.table]
    elif described.table:
        described.table = _table(described, described.table)
    elif described.columns:
        raise ValueError(f"{path}: `columns` needs a `table`; folders say what a tile is by their names and `case_pattern`")
    described.facts = [_joined(described, one) for one in described.facts]
    if described.label_pattern and (described.table or described.levels):
        raise ValueError(
            f"{path}: `label_pattern` is for tiles whose class stands in no table and no folder; leave `table` and `levels` out"
        )
    _check_pattern(path, "label_pattern", described.label_pattern, ("label",), "(?P<label>[^_]+)_")
    _check_pattern(path, "case_pattern", described.case_pattern, (*FACTS, *AT), "(?P<case_id>[^-]+)-")


def _check_pattern(path, key, pattern, groups, example):
    if not pattern:
        return
    try:
        named = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"{path}: `{key}` {pattern!r} is not a regular expression: {error}") from error
    for group in named:
        if group not in groups:
            raise ValueError(f"{path}: `{key}` names a group {group!r}{nearest(group, groups)}")
    if not named:
        raise ValueError(f"{path}: `{key}` needs a named group, for example {example}")


def _joined(described, one):
    """One of `facts`, checked: {"table": Path, "on": fact, "columns": {ours: theirs}}."""
    where = f"{described.path}: `facts` holds {one!r}"
    if not isinstance(one, dict) or set(one) - {"table", "on", "columns"} or not one.get("table"):
        raise ValueError(f"{where}, expected {{table: patients.csv, on: file_name, columns: {{file_name: file, patient: patient}}}}")
    on, columns = one.get("on", "file_name"), one.get("columns") or {}
    if on not in ("file_name", *FACTS):
        raise ValueError(f"{where}; `on` is what both sides have{nearest(on, ('file_name', *FACTS))}")
    for ours in columns:
        if ours not in COLUMNS or ours in ("label", "mask"):
            raise ValueError(f"{where}; its `columns` name {ours!r}{nearest(ours, ('file_name', 'split', 'mpp', *FACTS))}")
    return {"table": _table(described, str(one["table"])), "on": on, "columns": {on: on, **columns}}


def _table(described, name):
    """The path of a table, below the root or beside the description."""
    name = Path(name).expanduser()
    inside, beside = described.root / name, described.path.parent / name
    found = next((p for p in (inside, beside) if p.is_file()), inside)
    if not found.is_file() and not described.procedural:
        raise FileNotFoundError(f"{described.path}: table {inside} does not exist, nor does {beside}; correct `table`")
    return found


def _check_levels(described):
    if described.levels and described.levels.count("class") != 1:
        raise ValueError(
            f"{described.path}: `levels` is {described.levels}, expected what each level of folders says from the top, `class` once among "
            "split, case_id, patient, slide, group, - (nothing), or the name of the one folder that holds tiles"
        )


def _check_split(described):
    fractions = {name: described.split.get(name, 0) for name in SPLITS}
    wrong = set(described.split) - set(SPLITS)
    numbers = all(isinstance(f, (int, float)) and 0 <= f <= 1 for f in fractions.values())
    if wrong or not numbers or abs(sum(fractions.values()) - 1) > 1e-6 or not fractions["train"]:
        raise ValueError(f"{described.path}: `split` is {described.split}, expected fractions of train, val and test that sum to 1")
    described.split = fractions


def _check_budget(described):
    described.budget = {own_name(name): limit for name, limit in described.budget.items()}
    for name, limit in described.budget.items():
        where = f"{described.path}: budget of {name!r}"
        if name not in described.classes:
            raise ValueError(f"{described.path}: `budget` names class {name!r}{nearest(name, described.classes)}")
        whole = isinstance(limit, dict) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in limit.values())
        if not whole or "tiles" not in limit or set(limit) - {"tiles", "cases"}:
            raise ValueError(f"{where} is {limit!r}, expected {{tiles: 15, cases: 3}}, both at least 1")
        if limit.get("cases", 1) > limit["tiles"]:
            raise ValueError(f"{where} asks {limit['tiles']} tiles of {limit['cases']} cases; every case gives one or more")
