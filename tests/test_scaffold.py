"""A study outside the clone: whole, its own, and found by the command."""

import json
import subprocess
from pathlib import Path

import pytest

from histokit import cli
from histokit.core import files
from histokit.engine import scaffold
from histokit.runs import recipe

HOUSE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("copy", [False, True])
def test_a_study_has_recipes_notebooks_and_room(tmp_path, monkeypatch, capsys, copy):
    folder = tmp_path / "my study"
    monkeypatch.delenv("HISTOKIT_ROOT", raising=False)
    assert cli.main(["new", str(folder), *(["--copy"] if copy else [])]) == 0
    assert "cd " in capsys.readouterr().out
    notebooks = sorted((folder / "notebooks").glob("*.ipynb"))
    assert [path.name for path in notebooks] == sorted(path.name for path in (HOUSE / "notebooks").glob("*.ipynb"))
    assert all(path.is_symlink() != copy and json.loads(path.read_text())["cells"] for path in notebooks)
    assert (folder / "params" / "datasets" / "toy.yaml").is_file() and (folder / "params" / "reviews").is_dir()
    (folder / "params" / "demo.yaml").write_text((folder / "params" / "demo.yaml").read_text() + "# mine\n")
    assert "# mine" not in (HOUSE / "params" / "demo.yaml").read_text(), "recipes are copies"

    # inside it, and below it, the command finds it; a recipe of it runs its notebooks
    monkeypatch.chdir(folder / "notebooks")
    assert files.root() == folder
    read = recipe.read("params/demo.yaml")
    assert next(iter(read.steps.values())).notebook.resolve().is_relative_to((folder if copy else HOUSE).resolve())
    assert cli.main(["run", "params/demo.yaml", "--dry-run", "--only", "00_dataset"]) == 0
    assert "00_dataset" in capsys.readouterr().out


def test_make_lab_finds_a_study(tmp_path):
    """The recipe of the target, its program a script that says where it was started."""
    scaffold.new(tmp_path / "my study")
    clone = tmp_path / "clone"
    files.write_text(clone / "Makefile", (HOUSE / "Makefile").read_text().replace("lab: setup", "lab:"))
    fake = clone / ".venv" / "bin" / "jupyter"
    files.write_text(fake, '#!/bin/sh\necho "$PWD|$HISTOKIT_ROOT|$@"\n')
    fake.chmod(0o755)
    for given, where in (([f"STUDY={tmp_path / 'my study'}"], tmp_path / "my study"), ([], clone)):
        said = subprocess.run(["make", "-s", "-C", clone, "lab", *given], capture_output=True, text=True, check=True).stdout
        started, root, options = said.strip().split("|")
        assert Path(started) == Path(root) == where and options.endswith("--LabApp.default_url=/lab/tree/notebooks")


def test_what_is_there_is_not_touched(tmp_path):
    files.write_text(tmp_path / "work" / "thesis.txt", "years")
    with pytest.raises(FileExistsError, match="is not empty"):
        scaffold.new(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="lies in the clone"):
        scaffold.new(HOUSE / "studies" / "one")
    assert not (HOUSE / "studies").exists()
    with pytest.raises(FileNotFoundError, match="a study is made from a clone"):
        scaffold.new(tmp_path / "new", house=tmp_path)
