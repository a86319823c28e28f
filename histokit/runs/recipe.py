"""Recipes: one YAML file tells the story of one system.

Reading and checking only: no kernel, torch or papermill, so a typing error is answered at once and before anything runs.
`jobs` expands a recipe over the classes of the data, `batch` runs the jobs.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from histokit.core import files
from histokit.runs import notebooks, places

FILLED = ("experiment", "step", "recipe")  # written by the runner, never by a recipe
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
EXPERIMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line each."""


@dataclass
class Step:
    id: str
    notebook: Path
    declared: dict  # name -> notebooks.Parameter
    values: dict  # what the recipe's step says, checked
    which: object = None  # for: "tail" | "all" | [names]; None when the notebook runs once
    pinned: bool = False  # class_name: all
    parents: tuple = ()  # ids of earlier steps
    dataset: str = ""  # id of the step whose dataset.json expands this one

    @property
    def per_class(self):
        return "class_name" in self.declared and not self.pinned


@dataclass
class Recipe:
    path: Path
    name: str  # as notebooks get it: relative to the root where possible
    experiment: str
    steps: dict  # id -> Step, in order
    shared: dict
    classes: dict  # class -> step id -> values
    given: dict = field(default_factory=dict)  # -p: name or (step id, name) -> text
    inherits: object = None  # Recipe of the experiment whose finished steps are read where this one has none; see `replicates`

    @property
    def source(self):
        """The experiment that holds dataset.json."""
        return (self.inherits or self).experiment


def read_yaml(path):
    """A YAML 1.2 mapping that knows its line numbers (`.lc`); RecipeError names file and line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="rt", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(Path(path).name, [p.name for p in Path(path).parent.glob("*.y*ml")])
        raise RecipeError(f"{path}: no such file{near}") from None
    except (YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: expected a mapping with `steps:`, got {type(found).__name__}")
    return found


def nearest(name, options):
    """'; did you mean X?', or the list of what there is."""
    options = [str(o) for o in options]
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there is: {', '.join(options) or 'nothing'}"


def read(path, given=(), root=None):
    """Read and check a recipe.

    Args:
        path: the YAML file.
        given: texts "name=value" or "step.name=value" from the command line; they win over the file.
        root: working root; `files.root()` by default.

    Returns:
        Recipe with every value checked against the notebooks' parameters and every reference against the earlier steps.

    Raises:
        RecipeError listing all problems found, each with its line and the nearest valid name.
    """
    root, path = Path(root or files.root()).resolve(), Path(path)
    path = path if path.exists() or not (root / path).exists() else root / path  # called from a folder below the root
    tree, problems = read_yaml(path), []

    def at(node, key):
        line = node.lc.key(key)[0] + 1 if hasattr(node, "lc") and key in node else 0
        return f"{path}:{line}: " if line else f"{path}: "

    for key in tree:
        if key not in ("shared", "steps", "classes", "experiment"):
            near = nearest(key, ("shared", "steps", "classes", "experiment"))
            problems.append(f"{at(tree, key)}unknown key {key!r}{near}")
    full = path.resolve()
    name = full.relative_to(root).as_posix() if full.is_relative_to(root) else full.as_posix()
    recipe = Recipe(path, name, str(tree.get("experiment") or path.stem), {}, {}, {})

    available = notebooks.available(root)
    for where, id, body in _steps(tree, path, problems):
        _add_step(recipe, id, body, where, at, available, problems)
    _read_given(recipe, given, problems)
    if not EXPERIMENT.fullmatch(recipe.experiment):
        problems.append(f"{path}: experiment {recipe.experiment!r} becomes a folder: letters, digits, dot, dash and underscore only")
    if len(places.lineage(recipe.experiment)) > 1:
        problems.append(f"{path}: experiment {recipe.experiment!r} ends like a replicate that --generator-seeds makes; choose another end")

    _read_shared(recipe, tree.get("shared") or {}, at, problems)
    _read_classes(recipe, tree.get("classes") or {}, at, problems)
    _link(recipe, problems)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return recipe


def _steps(tree, path, problems):
    """(where, id, body) of each step; a step is a name or a one-key mapping."""
    steps = tree.get("steps")
    if not isinstance(steps, list) or not steps:
        problems.append(f"{path}: `steps:` must be a list of notebooks, for example `- 00_dataset`")
        return
    for i, item in enumerate(steps):
        where = f"{path}:{steps.lc.item(i)[0] + 1}: "
        id, body = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if not isinstance(id, str) or not isinstance(body or {}, dict):
            shown = f"{list(item)} side by side" if isinstance(item, dict) else repr(item)
            problems.append(f"{where}a step is `- name` or `- name: {{key: value}}`, got {shown}; check the indentation")
        else:
            yield where, str(id), body or {}


def _add_step(recipe, id, body, where, at, available, problems):
    if not ID.fullmatch(id):
        problems.append(f"{where}step id {id!r} becomes a folder: letters, digits, dash and underscore only")
    if id in recipe.steps:
        problems.append(f"{where}step id {id!r} is used twice; give one of them another id and `run: {recipe.steps[id].notebook.stem}`")
        return
    run = str(body.get("run", id))
    if run not in available:
        problems.append(f"{where}step {id!r}: no notebook {run!r}{nearest(run, available)}")
        return
    try:
        names = notebooks.declared(available[run])
    except ValueError as error:
        problems.append(str(error))
        return
    step = recipe.steps[id] = Step(id, available[run], names, {})
    if step.per_class:
        step.which = "tail"
    for key in body:
        here = at(body, key)
        if key == "for":
            _set_for(step, body[key], here, problems)
        elif key == "class_name" and step.which:
            step.pinned = body[key] == "all"
            if not step.pinned:
                problems.append(f"{here}{id}.class_name can only be `all`; for some classes write `for: [{body[key]}]`")
        elif key != "run":
            _set(step, step.values, key, body[key], here, problems)


def _set(step, values, key, value, where, problems, name=None):
    """Check one value against the notebook's declaration and put it into `values`."""
    shown = name or f"{step.id}.{key}"
    open_names = [n for n in step.declared if n not in (*FILLED, "class_name")]
    if key in FILLED:
        problems.append(f"{where}{shown}: filled in by the runner; `experiment:` stands at the top of the recipe")
    elif key not in open_names:
        near = nearest(key, open_names)
        problems.append(f"{where}{shown}: {step.notebook.name} declares no parameter {key!r}{near}")
    else:
        try:
            values[key] = notebooks.coerce(value, step.declared[key].type)
        except TypeError as error:
            problems.append(f"{where}{shown}: {error}")


def _set_for(step, value, where, problems):
    if "class_name" not in step.declared:
        problems.append(f"{where}{step.id}: `for:` needs a notebook that declares class_name; {step.notebook.name} runs once")
    elif value in ("tail", "all"):
        step.which = str(value)
    elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        step.which = [str(v) for v in value]
    else:
        problems.append(f"{where}{step.id}: `for:` is tail, all or a list of class names, got {value!r}")


def _read_shared(recipe, shared, at, problems):
    if not isinstance(shared, dict):
        problems.append(f"{recipe.path}: `shared:` must be a mapping of parameter names to values")
        return
    for key in shared:
        takers = [s for s in recipe.steps.values() if key in s.declared]
        if not takers or key in (*FILLED, "class_name"):
            names = {n for s in recipe.steps.values() for n in s.declared if n not in (*FILLED, "class_name")}
            problems.append(f"{at(shared, key)}shared.{key}: no notebook of this recipe declares {key!r}{nearest(key, sorted(names))}")
        for step in takers if key not in (*FILLED, "class_name") else ():
            _set(step, {}, key, shared[key], at(shared, key), problems, name=f"shared.{key} ({step.notebook.name})")
    recipe.shared = dict(shared)


def _read_classes(recipe, classes, at, problems):
    for class_name in classes:
        here = at(classes, class_name)
        body = classes[class_name]
        if not isinstance(class_name, str) or not isinstance(body, dict):
            problems.append(f"{here}classes: write `class name: {{step: {{key: value}}}}`, class names that are numbers in quotes")
            continue
        for id, values in body.items():
            step = recipe.steps.get(id)
            if step is None:
                problems.append(f"{at(body, id)}classes.{class_name}: no step {id!r}{nearest(id, recipe.steps)}")
            elif not step.per_class:
                why = "is pinned to class_name: all" if step.pinned else "runs once"
                problems.append(f"{at(body, id)}classes.{class_name}.{id}: this step {why}, so it takes no value per class")
            elif isinstance(step.which, list) and class_name not in step.which:
                problems.append(f"{at(body, id)}classes.{class_name}.{id}: `for:` of this step does not name {class_name!r}")
            elif not isinstance(values, dict):
                problems.append(f"{at(body, id)}classes.{class_name}.{id}: expected {{key: value}}, got {values!r}")
            else:
                kept = recipe.classes.setdefault(str(class_name), {}).setdefault(str(id), {})
                for key in values:
                    _set(step, kept, key, values[key], at(values, key), problems, name=f"classes.{class_name}.{id}.{key}")


def _read_given(recipe, given, problems):
    """-p texts: `name=value` for every notebook that declares it, `step.name=value` for one step; the closer one wins."""
    for text in given:
        key, equals, value = text.partition("=")
        id, dot, name = key.strip().rpartition(".")
        where = f"-p {text}: "
        if not equals or not name:
            problems.append(f"{where}write -p name=value or -p step.name=value")
        elif name == "experiment" and not dot:
            recipe.experiment = value
        elif dot and id not in recipe.steps:
            problems.append(f"{where}no step {id!r}{nearest(id, recipe.steps)}")
        elif name == "for" and dot:
            _set_for(recipe.steps[id], _parse(value, where, problems), where, problems)
        else:
            takers = [recipe.steps[id]] if dot else [s for s in recipe.steps.values() if name in s.declared]
            if not takers:
                names = sorted({n for s in recipe.steps.values() for n in s.declared if n not in (*FILLED, "class_name")})
                problems.append(f"{where}no notebook of this recipe declares {name!r}{nearest(name, names)}")
            for step in takers:
                kind = step.declared[name].type if name in step.declared else ""
                verbatim = kind == "str" and value[:1] not in ("'", '"')
                parsed = value if verbatim else _parse(value, where, problems)
                _set(step, recipe.given.setdefault((step.id, bool(dot)), {}), name, parsed, where, problems, name=f"{step.id}.{name}")


def _parse(text, where, problems):
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        problems.append(f"{where}not YAML: {getattr(error, 'problem', None) or error}")
        return text


def parameters(recipe, step, class_name=""):
    """All parameters of one job; later wins: default, shared, step, classes, -p name, -p step.name."""
    found = {name: p.default for name, p in step.declared.items()}
    found |= {k: notebooks.coerce(v, step.declared[k].type) for k, v in recipe.shared.items() if k in step.declared}
    found |= step.values
    found |= recipe.classes.get(class_name, {}).get(step.id, {})
    found |= recipe.given.get((step.id, False), {}) | recipe.given.get((step.id, True), {})
    filled = {"experiment": recipe.experiment, "step": step.id, "recipe": recipe.name, "class_name": class_name}
    return found | {k: v for k, v in filled.items() if k in step.declared}


def _link(recipe, problems):
    """Find each step's parents: parameter values that equal the id of an earlier step."""
    ids = list(recipe.steps)
    datasets = [s.id for s in recipe.steps.values() if s.notebook.stem == "00_dataset"]
    default = "00_dataset" if "00_dataset" in datasets else (datasets or [""])[0]
    for at, step in enumerate(recipe.steps.values()):
        earlier, later = ids[:at], ids[at:]
        parents, elsewhere = [], set()  # steps that this one reads; those among them that are another source of tiles
        own = [c for c, steps in recipe.classes.items() if step.id in steps]
        for class_name in ["all" if step.pinned else "", *own]:
            try:
                found = parameters(recipe, step, class_name)
            except TypeError:  # a wrong shared value: already among the problems
                continue
            for key, p in step.declared.items():
                if key in (*FILLED, "class_name"):
                    continue
                for trail, value, expected in _texts(found[key], key, p.names_a_step):
                    where = f"{recipe.path}: {step.id}.{trail}: "
                    if value in earlier:
                        parents.append(value)
                        elsewhere |= {value} if key == "external" else set()
                    elif value in later and (expected or notebooks.NAME.fullmatch(value)):
                        problems.append(f"{where}{value!r} does not stand before this step; a step can only use earlier ones")
                    elif expected and value:
                        origin = "" if _is_said(recipe, step, key) else f" (the default of {step.notebook.name})"
                        none = f'; `{key}: ""` means none' if p.type == "str" else ""
                        problems.append(f"{where}no earlier step {value!r}{origin}{nearest(value, earlier)}{none}")
        step.dataset = next((p for p in parents if p in datasets and p not in elsewhere), default if default in earlier else "")
        step.parents = tuple(i for i in earlier if i in parents or i == step.dataset)
        if step.per_class and not step.dataset and not isinstance(step.which, list):
            problems.append(f"{recipe.path}: {step.id}: `for: {step.which}` needs an earlier 00_dataset; or write `for: [names]`")


def _is_said(recipe, step, key):
    given = recipe.given.get((step.id, False), {}) | recipe.given.get((step.id, True), {})
    return key in step.values or key in recipe.shared or key in given


def _texts(value, trail, expected):
    """(trail, text, is a step id expected here) of every text inside a value; `arms.*.synthetic` expects one."""
    if isinstance(value, str):
        yield trail, value, expected
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _texts(v, f"{trail}.{k}", k == "synthetic")
    elif isinstance(value, list):
        for v in value:
            yield from _texts(v, trail, expected)
