"""What a run depends on, as facts that can be compared later and named when one of them changed.

A run's key has five parts: its parameters, the code cells of its notebook, the declared version of the method modules
that the notebook imports, the files it read and the finished runs it read from. Prose, plots, widgets, gallery and report are outside:
a better figure does not ask for a new training. Nothing here imports what it describes; code is read with `ast`.
"""

import ast
import functools
import json
import os
from fnmatch import fnmatch
from pathlib import Path

from histokit import PACKAGE
from histokit.core import files

OUTSIDE = ("show", "engine", "cli", "select.gallery")  # what only shows or only runs: it changes no result
PLACE = ("experiment", "step", "recipe", "shard")  # parameters that say where a run lives, not what it computes
LOOKS = ("tried",)  # parameters that only ask for more to be shown
PATTERNS = ("*.json", "*.safetensors", "*.yaml", "*.txt")  # what makes a folder of weights or settings


def parameters(given):
    """The parameters that belong to the key: all but those that say where the run lives or only ask for more to be shown."""
    given = dict({"class_name": "", "seed": 0}, **given)
    return files.plain({name: value for name, value in sorted(given.items()) if name not in (*PLACE, *LOOKS)})


# ---- code


def find_notebook(step):
    """The notebook this kernel runs: $HISTOKIT_NOTEBOOK (runner), the file open in Jupyter, else notebooks/<step>.ipynb; or None."""
    named = (os.environ.get("HISTOKIT_NOTEBOOK"), os.environ.get("JPY_SESSION_NAME"))
    beside = (folder / "notebooks" / f"{step}.ipynb" for folder in (files.root(), PACKAGE.parent))
    return next((Path(path) for path in (*filter(None, named), *beside) if str(path).endswith(".ipynb") and os.path.isfile(path)), None)


def code(notebook):
    """Hash of what the notebook computes: its code cells but for parameters, comments, layout, pictures and imports of histokit.

    What it imports from histokit is told by `modules`, so a module that moves makes no result stale.
    """
    trees = _cells(str(notebook))
    drawn = {alias.asname or alias.name for tree in trees for module, alias in _aliases(tree) if _outside(module)}
    kept = [[part for part in tree.body if not _is_own_import(part) and not _is_picture(part, drawn)] for tree in trees]
    return files.digest([ast.unparse(ast.Module(body, [])) for body in kept if body])


def modules(notebook):
    """{"histokit.generate.img2img": 1}: the VERSION of every histokit module the notebook imports, directly or through another."""
    seen, waiting = {}, [name for tree in _cells(str(notebook)) for name in _imports(tree)]
    while waiting:
        name = waiting.pop()
        if name not in seen and not _outside(name):
            version, needs = _module(name)
            seen[name] = version
            waiting += needs
    return {f"histokit.{name}": version for name, version in sorted(seen.items()) if version is not None}


def _cells(notebook):
    """The code cells that count, each as a syntax tree; a cell that is no Python raises ValueError."""
    book = files.read_json(notebook)
    trees = []
    for number, cell in enumerate(book["cells"]):
        tags = set(cell.get("metadata", {}).get("tags", []))
        if cell["cell_type"] == "code" and not tags & {"parameters", "injected-parameters"}:
            try:
                trees.append(ast.parse("".join(cell["source"])))
            except SyntaxError as error:
                raise ValueError(f"{notebook}: cell {number} is not plain Python ({error.msg}, line {error.lineno})") from None
    return trees


def _outside(name):
    """Whether a module, named below the package, belongs to no key."""
    return any(name == place or name.startswith(f"{place}.") for place in OUTSIDE)


def _is_own_import(statement):
    names = [a.name for a in statement.names] if isinstance(statement, ast.Import) else [getattr(statement, "module", None) or ""]
    return isinstance(statement, (ast.Import, ast.ImportFrom)) and all(name.partition(".")[0] == "histokit" for name in names)


def _is_picture(statement, drawn):
    """True when the statement only draws: an expression whose outer call is one of `drawn`, or no other call anywhere in it."""
    if any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement)):
        return False
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return _callee(statement.value) in drawn
    calls = [_callee(node) for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return bool(calls) and all(name in drawn for name in calls)


def _callee(call):
    """The name a call starts from: `plots` in plots.grid(x) and in plots.grid(x).figure.show()."""
    node = call.func
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


def _aliases(tree):
    """(module below the package, alias) of every name that a syntax tree imports from histokit, function bodies included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "histokit":
            for alias in node.names:
                yield f"{node.module}.{alias.name}".partition(".")[2], alias


def _imports(tree):
    """Dotted names below the package of the modules a syntax tree imports, function bodies included."""
    asked = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    asked |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level and node.module}
    inside = {name.partition(".")[2] for name in asked if name.startswith("histokit.")} | {name for name, _ in _aliases(tree)}
    return sorted(name for name in inside if _file(name))


def _file(name):
    """The file of a module, or the face of a package; None for what is neither."""
    place = PACKAGE.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _module(name):
    path = _file(name)
    return _read_module(str(path), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_module(path, _mtime):
    """(VERSION or None, histokit modules it imports) of a module file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    version = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "VERSION" for target in node.targets):
            version = ast.literal_eval(node.value)
    return version, _imports(tree)


# ---- files


def record(path, patterns=PATTERNS):
    """The facts that tell whether a file, or the files of a folder that match `patterns`, are still the same."""
    path = Path(path)
    if path.is_file():
        return _record_file(path)
    if path.is_dir():
        return {"patterns": list(patterns), "held": {name: _record_file(path / name) for name in _listing(path, patterns)}}
    raise FileNotFoundError(f"{path} does not exist; it is an input of this run")


def listing(folder, patterns=("*",)):
    """The facts of a large folder: how many files, and one hash over their names, sizes and times; contents are not read."""
    entries = []
    for name in _listing(Path(folder), patterns):
        status = os.stat(os.path.join(folder, name))
        entries.append([name, status.st_size, status.st_mtime_ns])
    return {"patterns": list(patterns), "files": len(entries), "listing": files.digest(entries)}


def same(path, recorded):
    """True when what `record` or `listing` saw at `path` is still there; contents are read only where size or time differ."""
    path = Path(path)
    if "listing" in recorded:
        return path.is_dir() and listing(path, recorded["patterns"])["listing"] == recorded["listing"]
    if "sha256" in recorded:
        return path.is_file() and _same_file(path, recorded)
    held = recorded["held"]
    if not path.is_dir():
        return not held  # git keeps no empty folder, so a clone lacks one in which nothing was
    return _listing(path, recorded["patterns"]) == sorted(held) and all(_same_file(path / name, facts) for name, facts in held.items())


def _record_file(path):
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": files.sha256(path)}


def _same_file(path, recorded):
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != recorded["size"]:
        return False
    return status.st_mtime_ns == recorded["mtime_ns"] or files.sha256(path) == recorded["sha256"]


def _listing(folder, patterns):
    """Sorted names, relative to the folder, of its files that match; hidden ones apart, links to folders followed once."""
    found, seen = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        seen.add(real)
        below = os.path.relpath(top, folder)
        wanted = [name for name in names if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)]
        found += [os.path.normpath(os.path.join(below, name)).replace(os.sep, "/") for name in wanted]
    return sorted(found)


# ---- comparing


def differences(old, new):
    """One phrase per changed fact of two keys: "strength 0.5 -> 0.35", "histokit.generate.img2img version 1 -> 2", "code changed"."""
    changes = _changed(_flat(old.get("parameters") or {}), _flat(new["parameters"]), "{name} {old} -> {new}")
    if old.get("code") != new["code"]:
        changes.append("code of the notebook changed")
    changes += _changed(old.get("modules") or {}, new["modules"], "{name} version {old} -> {new}")
    return changes


def _changed(old, new, text):
    out = []
    for name in sorted({*old, *new}):
        if name not in old:
            out.append(f"{name} is new ({_shown(new[name])})")
        elif name not in new:
            out.append(f"{name} is gone (was {_shown(old[name])})")
        elif old[name] != new[name] or isinstance(old[name], bool) != isinstance(new[name], bool):
            out.append(text.format(name=name, old=_shown(old[name]), new=_shown(new[name])))
    return out


def _flat(tree, prefix=""):
    """{"arms.real.sampler": ...} of nested dicts, so that the innermost change is named."""
    flat = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value})
    return flat


def _shown(value):
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
