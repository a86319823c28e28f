"""The repository itself: what is pinned, what is shipped, who imports whom."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from histokit.core import machine
from histokit.runs import keys

# Who may import whom: a room imports those of the lines above it and its own, never one of its own line and none below.
ROOMS = (
    ("core",),
    ("metrics", "toy"),
    ("runs",),
    ("tiles",),
    ("diffusion", "vision"),
    ("training", "morphology", "generate", "fidelity"),
    ("select",),
    ("arms",),
    ("evaluate",),
    ("show", "engine"),
    ("cli",),
    ("__main__",),
)
# how many versions the key of each notebook names, at least; fewer means that something is no longer found
VERSIONS = {
    "00": 20, "01": 17, "02": 17, "03": 19, "04": 22, "05": 20, "06": 23, "07": 32, "08": 35, "10": 19, "20": 21, "21": 15, "30": 20,
    "31": 15,
}  # fmt: skip


def modules(repository):
    """{dotted name below the package: syntax tree}; a room's `__init__` goes by the name of the room."""
    home = repository / "histokit"
    paths = [path.relative_to(home) for path in home.rglob("*.py") if path != home / "__init__.py"]
    dotted = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: ast.parse((home / path).read_text(encoding="utf-8")) for path, name in dotted.items()}


def test_the_lock_pins_everything_that_is_asked_for(repository):
    lock = (repository / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock, re.M))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert [need for need in asked if re.split("[<>=]", need)[0] not in pinned] == []
    assert pinned["torch"] == "2.14.1" and pinned["torchvision"] == "0.29.1"
    assert not {"pip", "setuptools", "histokit"} & set(pinned)


def test_what_only_linux_has_is_marked_so(repository):
    lines = (repository / "requirements.lock").read_text().splitlines()
    heavy = [line for line in lines if re.match(r"(nvidia-|cuda-|triton=)", line)]
    assert heavy and all('sys_platform == "linux"' in line for line in heavy)


def test_every_import_runs_to_a_room_further_up(repository):
    floor = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    found = modules(repository)
    assert len(found) >= 100, "or this test looks in the wrong place"
    pairs = [(name, need) for name, tree in found.items() for need in keys._imports(tree)]
    assert len(pairs) >= 500
    rooms = [(name.partition(".")[0], need.partition(".")[0], f"{name} imports {need}") for name, need in pairs]
    assert [said for mine, other, said in rooms if mine != other and floor[other] >= floor[mine]] == []


def test_every_folder_of_the_package_is_a_room_and_says_what_for(repository):
    home, rooms = repository / "histokit", {room for line in ROOMS for room in line}
    folders = {path.name for path in home.iterdir() if path.is_dir() and path.name != "__pycache__"} - {"mini"}
    files = {path.stem for path in home.glob("*.py")} - {"__init__"}
    assert folders | files == rooms
    for room in sorted(folders):
        purpose = ast.get_docstring(ast.parse((home / room / "__init__.py").read_text(encoding="utf-8")))
        assert purpose and "\n" not in purpose, room


def test_the_page_about_the_package_names_what_is_there(repository):
    page = (repository / "histokit" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+(?:\.py|/))`", page)
    assert len(named) >= 40 and len(page.splitlines()) <= 60
    assert [name for name in named if not any((top / name).exists() for top in (repository / "histokit", repository))] == []
    rooms = [room for line in ROOMS[:-2] for room in line]
    listed = [name.rstrip("/") for name in re.findall(r"`(\w+/)`", page[: page.index("## The way")]) if name != "mini/"]
    assert listed == rooms, "the rooms in their order"


def test_no_room_is_crowded(repository):
    """Twelve files are what a reader takes in at once; a room that grows beyond gets a room of its own inside."""
    for place in [path.parent for path in (repository / "histokit").rglob("__init__.py")]:
        held = [path.name for path in place.iterdir() if path.is_file() and path.name != "__init__.py"]
        assert len(held) <= 12, f"{place.name}: {sorted(held)}"


@pytest.fixture
def afresh():
    """`loaded(statements)` -> the modules of histokit with a VERSION that Python has in memory after these imports and no others."""
    inside = lambda: [name for name in sys.modules if name.partition(".")[0] == "histokit"]  # noqa: E731
    kept = {name: sys.modules[name] for name in inside()}

    def loaded(statements):
        for name in inside():
            del sys.modules[name]
        exec(compile(ast.Module(statements, []), "imports", "exec"), {})
        return {name for name in inside() if hasattr(sys.modules[name], "VERSION")}

    yield loaded
    for name in inside():
        del sys.modules[name]
    sys.modules.update(kept)


def test_the_key_of_a_notebook_names_every_version_that_it_loads(repository, afresh):
    """A key that lost a module would call old results up to date. The second definition: what Python really has in memory."""
    for path in sorted((repository / "notebooks").glob("*.ipynb")):
        statements = [part for tree in keys._cells(str(path)) for part in tree.body if keys._is_own_import(part)]
        for part in statements:
            part.names = [alias for alias in part.names if not keys._outside(f"{part.module}.{alias.name}".partition(".")[2])]
        loaded, named = afresh([part for part in statements if part.names]), set(keys.modules(str(path)))
        assert len(loaded) >= 5 and loaded <= named, f"{path.name}: {sorted(loaded - named)}"
        assert len(named) >= VERSIONS[path.name[:2]], f"{path.name} depended on more before; what is no longer found?"


def test_versions_are_plain_numbers(repository):
    for name in modules(repository):
        version = keys._module(name)[0]
        assert version is None or (type(version) is int and version > 0), name


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test", "lab", "lint", "bench"])
def test_make_knows_what_the_readme_names(repository, target):
    shown = subprocess.run(["make", "-n", target, "TORCH=lock"], cwd=repository, capture_output=True, text=True)
    assert shown.returncode == 0 and ".venv/bin/" in shown.stdout, shown.stderr


def test_continuous_integration_runs_the_test_command(repository):
    script = repository / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and script.read_text().splitlines()[-1] == "make test"


def test_notebooks_are_as_nbformat_writes_them(repository):
    """Else the filter that strips outputs rewrites them, and every clone looks modified."""
    import nbformat

    for path in sorted((repository / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        assert nbformat.writes(nbformat.reads(text, as_version=4)) + "\n" == text, path.name


def test_every_table_of_a_notebook_is_the_last_of_its_cell(repository):
    """Elsewhere, or inside an `if`, a table is made and never shown."""
    import ast
    import json

    for path in sorted((repository / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "code" or "plots.table(" not in "".join(cell["source"]):
                continue
            body = ast.parse("".join(cell["source"])).body
            calls = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Attribute) and node.attr == "table"]
            calls = [node for node in calls if getattr(node.value, "id", "") == "plots"]
            last = [node for node in ast.walk(body[-1]) if node in calls]
            assert isinstance(body[-1], ast.Expr) and len(last) == len(calls) == 1, f"{path.name}, cell {cell['id']}"


def test_make_gives_what_it_starts_the_environment_of_kernels(repository):
    given = dict(re.findall(r"^export (\w+) \?= (\S+)$", (repository / "Makefile").read_text(), re.M))
    assert given == machine.KERNEL
