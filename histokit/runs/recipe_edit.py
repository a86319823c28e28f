"""Sets values under `classes:` of a recipe, or of a step itself, and leaves every other character of the file as it was.

The sliders' button writes through here. ruamel.yaml says where in the text a value stands, the new value is put there, and the
result is parsed again: unless it is the old recipe plus exactly these values, nothing is written. So comments, order, flow and
block style survive without being understood. Nothing here knows a notebook's parameters; `recipe` checks those before a run.
"""

import difflib
import io
from pathlib import Path

from histokit.core import files

EVERY = ("", "all")  # class names of a run for all classes


class RecipeChanged(ValueError):
    """Somebody else set one of the values since they were last looked at."""


def apply(recipe_path, class_name, step, values, expected=None):
    """Writes `classes: {class_name: {step: values}}` into a recipe; the file is whole at every moment.

    A class_name of "all" or "" means the one run of a step for all classes: the values are those of the step, under `steps:`.

    The file is read right before it is written, so what was edited by hand meanwhile is kept. Writing the old text back undoes it.

    Args:
        values: {parameter: bool, int, float or str}.
        expected: what `current` returned earlier; when one of the values has changed since, RecipeChanged is raised instead.

    Returns:
        The difference as unified diff text, "" when the recipe holds these values already.

    Raises:
        ValueError naming the file and what stands in the way; OSError when it cannot be written. The file is then as before.
    """
    path = Path(recipe_path)
    old = _read(path)
    if expected is not None:
        now = _values(_tree(old, path), class_name, step)
        other = [key for key in values if now.get(key) != expected.get(key) and now.get(key) != values[key]]
        if other:
            said = ", ".join(f"{key}: {now[key]}" if key in now else f"no {key}" for key in other)
            raise RecipeChanged(f"{path} was edited meanwhile and now says {said} for {class_name!r}; nothing was written")
    new = amended(old, class_name, step, values, path)
    if new == old:
        return ""
    if not path.stat().st_mode & 0o222:
        raise PermissionError(f"{path} is read-only; nothing was written")
    files.write_text(path, new)
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), path.name, path.name, n=2)).replace("\r\n", "\n")


def current(recipe_path, class_name, step):
    """The values a recipe holds under `classes:` for one class and step, or for the step itself, {} when there are none."""
    path = Path(recipe_path)
    return _values(_tree(_read(path), path), class_name, step)


def lines(class_name, step, values):
    """The values as they stand at the end of a recipe, or at their step, for somebody to type or paste."""
    if class_name in EVERY:
        return "  - " + _line([step], _Flow(values)) + "\n"
    return _emit({"classes": {class_name: _Flow({step: values})}})


def amended(text, class_name, step, values, name="the recipe"):
    """`text` of a recipe with the values under classes -> class_name -> step; ValueError when that cannot be done safely."""
    tree = _tree(text, name)
    _check_step(tree, step, name)
    values = files.plain(values)  # numbers of numpy too
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    wanted, new = _plain(tree), plain
    try:
        for key, value in values.items():
            if class_name in EVERY:
                new = _set(new, ["steps", _position(tree, step), step, key], value)
                _own(wanted, step)[key] = value
            else:
                new = _set(new, ["classes", class_name, step, key], value)
                _at(wanted, ["classes", class_name, step])[key] = value
        if _plain(_tree(new, name)) != wanted:
            raise ValueError("the lines around it are laid out in an unusual way, or shared with another class by an anchor")
    except ValueError as error:
        raise ValueError(f"{name} cannot be changed from here ({error}); add by hand:\n{lines(class_name, step, values)}") from None
    new = new.replace("\n", "\r\n") if "\r\n" in text else new
    return "\ufeff" + new if text.startswith("\ufeff") else new


# ---- reading


def _read(path):
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _yaml():
    from ruamel.yaml import YAML

    yaml = YAML(pure=True)  # YAML 1.2, as the runner reads it
    yaml.width = 100_000
    return yaml


def _tree(text, name):
    from ruamel.yaml.error import YAMLError

    try:
        tree = _yaml().load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name} is not a recipe: expected a mapping with `steps:`, got {type(tree).__name__}")
    return tree


def _values(tree, class_name, step):
    if class_name in EVERY:
        return dict(_own(_plain(tree), step))
    for key in ("classes", class_name, step):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return dict(tree) if isinstance(tree, dict) else {}


def _ids(tree):
    steps = tree.get("steps") if isinstance(tree.get("steps"), list) else []
    return [next(iter(item), "") if isinstance(item, dict) else item for item in steps]


def _position(tree, step):
    return _ids(tree).index(step)


def _own(tree, step):
    """The settings of a step itself, as a dict inside `tree`, made where the step is only named; {} where there is no such step."""
    if step not in _ids(tree):
        return {}
    at = _position(tree, step)
    if not isinstance(tree["steps"][at], dict):
        tree["steps"][at] = {step: {}}
    return _at(tree["steps"][at], [step])


def _check_step(tree, step, name):
    ids = _ids(tree)
    if step not in ids:
        raise ValueError(f"{name} has no step {step!r}; it has: {', '.join(map(str, ids)) or 'none'}")


def _plain(node):
    """A copy in plain dicts and lists, anchors resolved, to compare with."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list) else node


def _at(tree, keys):
    for key in keys:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ValueError(f"`{key}` holds {tree!r} instead of a mapping")
    return tree


# ---- writing


class _Flow(dict):
    """A mapping to be written {like: this}."""


def _emit(mapping):
    """YAML text of nested dicts, block style but for _Flow, without wrapping."""
    from ruamel.yaml.comments import CommentedMap

    def convert(node, flow=False):
        if not isinstance(node, dict):
            return node
        flow = flow or isinstance(node, _Flow)
        made = CommentedMap({key: convert(value, flow) for key, value in node.items()})
        made.fa.set_flow_style() if flow else made.fa.set_block_style()
        return made

    stream = io.StringIO()
    _yaml().dump(convert(mapping), stream)
    return stream.getvalue()


def _nested(keys, value):
    for key in reversed(keys):
        value = {key: value}
    return value


def _inline(keys, value):
    """Flow text of {k: {k2: value}}, braces included; with no keys the value alone."""
    return _emit(_Flow(_nested(keys, value))).strip() if keys else _emit(_Flow({"x": value})).strip()[4:-1]


def _set(text, keys, value):
    """`text` with one value set; keys is the path to it from the top."""
    name, node = None, _yaml().compose(text)
    for depth, key in enumerate(keys):
        if isinstance(key, int):  # of the list of steps
            name, node = None, node.value[key]
            if node.id == "scalar":  # a step without settings so far
                end = node.end_mark.index
                return f"{text[:end]}: {_inline(keys[depth + 2 :], value)}{text[end:]}"
            continue
        if depth and _empty(node):  # `classes:` with nothing behind it
            if depth == 1:
                return _insert_line(text, _line_end(text, name.end_mark.index), "  " + _line(keys[1:], value))
            return _replace(text, name, node, _inline(keys[depth:], value))
        if node.id != "mapping":
            raise ValueError(
                f"`{keys[depth - 1]}` holds {text[node.start_mark.index : node.end_mark.index].strip()!r} instead of a mapping"
            )
        found = next((pair for pair in node.value if pair[0].id == "scalar" and pair[0].value == key), None)
        if found is None:
            return _insert(text, node, keys[depth:], value)
        name, node = found
    if node.id != "scalar":
        raise ValueError(f"`{keys[-1]}` holds a list or mapping")
    return _replace(text, name, node, _inline([], value))


def _empty(node):
    return node.id == "scalar" and not node.value and not node.style


def _replace(text, name, node, new):
    """`text` with another value behind the key `name`."""
    if _empty(node):  # its own mark may lie behind comments
        at = text.index(":", name.end_mark.index) + 1
        return f"{text[:at]} {new}{text[at:]}"
    return text[: node.start_mark.index] + new + text[node.end_mark.index :]


def _line_end(text, at):
    """Index where the line after the one of `at` starts."""
    return (text.find("\n", at) + 1) or len(text)


def _insert(text, node, keys, value):
    """`text` with one more entry in a mapping that is there already."""
    if node.flow_style:
        entry = _inline(keys, value)[1:-1]
        if not node.value:
            at = node.start_mark.index + 1
            return text[:at] + entry + text[at:]
        at = node.value[-1][1].end_mark.index
        return f"{text[:at]}, {entry}{text[at:]}"
    if len(keys) == 4:  # no `classes:` yet: at the very end
        return _insert_line(text, len(text), f"classes:\n  {_line(keys[1:], value)}")
    name, last = _leaf(node)
    indent = " " * node.value[0][0].start_mark.column
    return _insert_line(text, _line_end(text, (name if _empty(last) else last).end_mark.index), indent + _line(keys, value))


def _line(keys, value):
    return _emit({keys[0]: _Flow(_nested(keys[1:], value)) if len(keys) > 1 else value}).rstrip("\n")


def _insert_line(text, at, line):
    return f"{text[:at]}{'' if text[:at].endswith(chr(10)) or not at else chr(10)}{line}\n{text[at:]}"


def _leaf(node):
    """Key and value of the last entry inside a block mapping; the value is a scalar or flow collection, which ends where its text does."""
    name, node = node.value[-1]
    while node.id != "scalar" and not node.flow_style and node.value:
        name, node = node.value[-1] if node.id == "mapping" else (name, node.value[-1])
    return name, node
