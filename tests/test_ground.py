"""The repository itself: what is pinned, what is shipped, who imports whom."""

import ast
import re
import shutil
import subprocess
import tomllib

import pytest

from histokit import keys

GROUND = {"files", "tables", "keys", "locks", "places", "machine", "notebooks", "runs"}
TOP = {"batch", "cli", "report", "doctor", "forecast", "jobs", "worker"}


def modules(repository):
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (repository / "histokit").glob("*.py")}


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


def test_the_ground_floor_imports_nothing_from_above(repository):
    found = {name: set(keys._imports(tree)) for name, tree in modules(repository).items() if name in GROUND}
    assert {name: needs - GROUND for name, needs in found.items() if needs - GROUND} == {}


def test_nothing_below_imports_the_top_floor(repository):
    found = {name: set(keys._imports(tree)) & TOP for name, tree in modules(repository).items() if name not in TOP | {"__main__"}}
    assert {name: needs for name, needs in found.items() if needs} == {}


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
