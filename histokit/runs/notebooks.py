"""Notebooks as files: where they are, which parameters they declare, a copy with other values.

Plain JSON and ast: no kernel, papermill or nbformat, so that `histokit --dry-run` answers at once.
"""

import ast
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from histokit import PACKAGE

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
NAME = re.compile(r"\d\d_[a-z0-9_]+")  # how our notebooks are named, and so most step ids


@dataclass(frozen=True)
class Parameter:
    type: str  # a key of TYPES
    default: object
    comment: str

    @property
    def names_a_step(self):
        """True for a default such as "02_lora" or a comment that begins with "step": the value is the id of an earlier step."""
        shown = self.default if isinstance(self.default, str) else ""
        said = self.type in ("str", "list") and re.match(r"(the )?steps?\b", self.comment)
        return bool(said or NAME.fullmatch(shown))


def available(root):
    """{name: path} of the notebooks: those of the working root, else those beside the package."""
    for folder in (Path(root) / "notebooks", PACKAGE.parent / "notebooks"):
        if found := {p.stem: p for p in sorted(folder.glob("*.ipynb"))}:
            return found
    return {}


def declared(path):
    """{name: Parameter} of a notebook's `parameters` cell, read with ast.

    Refuses what papermill's own reader silently drops or changes: a second "=" on a line, types such as `str | None`,
    computed values; also a missing kernelspec. Raises ValueError naming the line and the remedy.
    """
    book = _load(path)
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    tagged = [c for c in code if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1 or tagged[0] is not code[0]:
        raise ValueError(f"{path}: needs one cell tagged `parameters`, before any other code cell; found {len(tagged)}")
    if book.get("metadata", {}).get("kernelspec", {}).get("name") != "python3":
        raise ValueError(f"{path}: no kernelspec python3 in its metadata; JupyterLab would ask for a kernel and run nothing")

    source = "".join(tagged[0]["source"])
    lines = source.splitlines()
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{path}: the parameters cell is not Python: {error}") from None
    found = {}
    for node in body:
        where = f"{path}, parameters cell, line {node.lineno} `{lines[node.lineno - 1].strip()}`"
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise ValueError(f"{where}: write `name: type = literal  # comment`")
        kind = getattr(node.annotation, "id", "")
        if kind not in TYPES:
            raise ValueError(f'{where}: the type must be one of {", ".join(TYPES)}; "" means none')
        own = [s for s in lines[node.lineno - 1 : node.end_lineno] if not s.strip().startswith("#")]
        if sum(s.count("=") for s in own) > 1:
            raise ValueError(f'{where}: papermill drops a parameter with a second "=", even in text or comment; reword it')
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError):  # ast's own words name an object's address
            raise ValueError(f"{where}: the value must be a literal of type {kind}; compute in the next cell") from None
        try:
            default = coerce(value, kind)
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
        rest = own[-1].encode()[node.end_col_offset :].decode()  # ast counts bytes
        found[node.target.id] = Parameter(kind, default, rest.partition("#")[2].strip())
    return found


def _load(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a notebook: {error}") from None


def coerce(value, kind):
    """`value` as plain JSON of the declared type; an int serves as a float. Raises TypeError saying what was expected."""
    value = _plain(value)
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not TYPES[kind]:
        got = 'nothing; write "" for none' if value is None else f"{type(value).__name__} {value!r}"
        raise TypeError(f"expected {kind}, got {got}")
    return value


def _plain(value, depth=0):
    """ruamel's or ast's value as str, int, float, bool, list, dict or None; anything else is refused."""
    if depth > 20:
        raise TypeError("nested more than 20 deep, or refers to itself")
    if isinstance(value, dict):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise TypeError(f"the key {odd[0]!r} must be text; put it in quotes")
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, depth + 1) for v in value]
    if value is None or isinstance(value, bool):
        return value
    if type(value).__name__ == "ScalarBoolean":  # ruamel's bool with an anchor is an int by birth
        return bool(value)
    for plain in (str, int, float):
        if isinstance(value, plain):
            if plain is float and not math.isfinite(value):
                raise TypeError(f"{value} is not a number to compute with")
            return plain(value)
    raise TypeError(f"{type(value).__name__} {value!s:.40} is none of {', '.join(TYPES)}; put text in quotes")


def write_copy(path, target, values):
    """Copy a notebook to `target` with `values` in an `injected-parameters` cell, as papermill would have it."""
    from histokit.core import files

    book = _load(path)
    at = next(i for i, c in enumerate(book["cells"]) if "parameters" in c.get("metadata", {}).get("tags", []))
    book["cells"] = [c for c in book["cells"] if "injected-parameters" not in c.get("metadata", {}).get("tags", [])]
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "injected-parameters",
        "metadata": {"tags": ["injected-parameters"]},
        "outputs": [],
        "source": "\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in values.items())]),
    }
    book["cells"].insert(at + 1, cell)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(target, book)
    return target


def papermill_command(path, target, values):
    """The shell line that runs a notebook with papermill alone; the variable tells the kernel which file it runs."""
    flow = "{" + ", ".join(f"{name}: {_yaml(value)}" for name, value in values.items()) + "}"
    return f"HISTOKIT_NOTEBOOK={shlex.quote(str(path))} " + shlex.join(["papermill", str(path), str(target), "-y", flow])


def _yaml(value):
    """JSON, but for floats: papermill reads YAML 1.1, where 1e-05 is a text and 1.0e-05 a number."""
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return json.dumps(value)
