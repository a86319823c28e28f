"""The `histokit` command: quick answers, plain refusals, exit statuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import stubs
from patience import HANGS

from histokit import cli, runs
from histokit.core import files
from histokit.runs import recipe

HEAVY = "torch numpy pandas papermill nbformat ruamel jupyter_client IPython"


@pytest.fixture
def root(tmp_path, monkeypatch):
    stubs.chain(tmp_path)
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    return tmp_path


def freeze(root):
    """A finished 00_dataset, as its kernel would have left it."""
    roles = {"fat": "tail", "mucin": "tail", "stroma": "head"}
    found = recipe.read(root / "params/study.yaml")
    run = runs.start(**recipe.parameters(found, found.steps["00_dataset"]))
    files.write_json(run.path("dataset.json"), {"classes": list(roles), "roles": roles})
    run.finish({})


def runs_parameters(root, step, **changes):
    found = recipe.read(root / "params/study.yaml")
    return recipe.parameters(found, found.steps[step]) | changes


def told(capsys, *arguments, status=0):
    assert cli.main(list(map(str, arguments))) == status
    out = capsys.readouterr()
    return out.err if status == 2 else out.out


def imported(code):
    code = f"import sys\n{code}\nprint(*[n for n in {HEAVY!r}.split() if n in sys.modules], file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()


def test_help_answers_at_once_because_it_imports_nothing_heavy():
    assert imported("from histokit import cli\ncli.parser().format_help()") == []


def test_a_status_and_a_dry_run_of_what_has_run_before_import_neither_torch_nor_papermill(root):
    found = recipe.read(root / "params/study.yaml")
    for id, step in found.steps.items():
        files.write_json(
            root / "outputs/other" / id / "run.json", {"status": "done", "wall_s": 1.0, "parameters": recipe.parameters(found, step)}
        )
    found = imported(f"from histokit import cli\nfor c in (['run', '-n'], ['status']): cli.main([*c, {str(root / 'params/study.yaml')!r}])")
    assert not {"torch", "papermill", "nbformat", "pandas", "IPython"} & set(found)


def test_a_dry_run_shows_jobs_estimates_and_commands(root, capsys):
    path = root / "params/study.yaml"
    out = told(capsys, "run", path, "--dry-run")
    assert "03_img2img/<rare classes, known after 00_dataset>" in out
    assert "4 of 4 jobs to run: time and disk unknown" in out, "there are no tiles to count"
    freeze(root)
    capsys.readouterr()
    earlier = root / "outputs/other/03_img2img/fat-x"
    given = runs_parameters(root, "03_img2img", strength=0.25) | {"experiment": "other", "class_name": "fat", "seed": 7}
    files.write_json(earlier / "run.json", {"status": "done", "wall_s": 180.0, "parameters": given})
    (earlier / "tiles.bin").write_bytes(bytes(2_000_000))
    out = told(capsys, "run", path, "-n", "-p", "strength=0.5", "--only", "03_img2img")
    assert "2 of 2 jobs to run: time and disk unknown" in out, "that run had other settings"
    out = told(capsys, "run", path, "-n", "-p", "strength=0.25", "--only", "03_img2img")
    assert "2 of 2 jobs to run: about 6 min, 4 MB, 4 files" in out
    (command, _) = [line for line in out.splitlines() if line.startswith("HISTOKIT_NOTEBOOK=")]
    notebook = "notebooks/03_img2img.ipynb"
    assert command.startswith(f"HISTOKIT_NOTEBOOK={notebook} papermill {notebook} outputs/study/03_img2img-fat-")
    assert '-y \'{experiment: "study", recipe: "params/study.yaml", strength: 0.25}\'' in command
    assert not (root / "outputs/study/03_img2img").exists()


def test_a_printed_command_works_before_anything_has_run(root, tmp_path, capsys):
    lines = told(capsys, "run", root / "params/study.yaml", "-n").splitlines()
    commands = lines[lines.index("each job by papermill alone, in this order:") + 1 :]
    assert "# 03_img2img/<rare classes, known after 00_dataset>" in commands, "no class to run it for"
    program = files.write_text(tmp_path / "bin/papermill", '#!/bin/sh\nprintf done > "$2"\n')  # it too makes no folder to write into
    program.chmod(0o755)
    subprocess.run(commands[0], shell=True, cwd=root, env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}, check=True)
    assert (root / "outputs/study/00_dataset.ipynb").read_text() == "done"


def test_a_dry_run_tells_what_would_be_set_aside_and_moves_nothing(root, capsys):
    freeze(root)
    found = recipe.read(root / "params/study.yaml")
    run = runs.start(**recipe.parameters(found, found.steps["03_img2img"], "stroma"))
    run.finish({})
    capsys.readouterr()
    out = told(capsys, "run", root / "params/study.yaml", "-n")
    assert "set aside first, as params/study.yaml does not ask for it any more: 03_img2img/stroma\n" in out and run.folder.is_dir()


def test_status_says_done_stale_or_missing(root, capsys):
    out = told(capsys, "status", root / "params/study.yaml")
    assert "00_dataset   missing" in out and "2 missing, 2 not yet known" in out


def test_a_refusal_is_one_plain_line_and_status_2(root, capsys):
    assert told(capsys, "run", root / "params/study.yaml", "-p", "strenth=1", status=2).startswith("histokit: -p strenth=1: no notebook")
    assert "no such file; did you mean study.yaml?" in told(capsys, "run", root / "params/studi.yaml", status=2)
    assert "no step '03'" in told(capsys, "open", root / "params/study.yaml", "03", status=2)
    assert "--jobs must be at least 1" in told(capsys, "run", root / "params/study.yaml", "--jobs", "0", status=2)


def test_a_failed_job_gives_status_1_and_its_place(root, capsys):
    out = told(capsys, "run", root / "params/study.yaml", "-p", "dataset=params/datasets/tiles.yaml", "-p", "00_dataset.step=x", status=2)
    assert "filled in by the runner" in out
    stubs.notebook(root, "10_odd", [], stubs.START, "raise ValueError('tile 3 is broken')")
    out = told(capsys, "run", stubs.recipe(root, "steps: [10_odd]", "odd"), status=1)
    assert "FAILED 10_odd: ValueError: tile 3 is broken" in out and "outputs/odd/10_odd/10_odd.ipynb, In [4]" in out


def test_open_writes_a_copy_with_the_recipes_values(root, capsys):
    path = root / "params/study.yaml"
    assert "known after 00_dataset has run" in told(capsys, "open", path, "03_img2img", "--print", status=2)
    freeze(root)
    capsys.readouterr()
    assert "say --class and one of: fat, mucin" in told(capsys, "open", path, "03_img2img", "--print", status=2)
    assert "class 'mucine'; did you mean mucin?" in told(capsys, "open", path, "03_img2img", "--class", "mucine", "--print", status=2)
    copy = told(capsys, "open", path, "03_img2img", "--class", "mucin", "-p", "strength=0.3", "--print").strip()
    assert copy.startswith(str(root / "outputs/study/.open/03_img2img-mucin-"))
    assert 'class_name = "mucin"' in json.loads(open(copy).read())["cells"][1]["source"].replace("'", '"')
    assert "it runs once" in told(capsys, "open", path, "07_evaluate", "--class", "fat", "--print", status=2)


@pytest.mark.slow
def test_jupyterlab_serves_the_opened_copy(root, tmp_path):
    """`open` puts the copy into a hidden folder, which a Jupyter server refuses unless told otherwise."""
    freeze(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "lab.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", OPEN, str(root / "params/study.yaml"), str(port)], stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}/api/contents/outputs/study/.open/07_evaluate.ipynb?token=t"
        for _ in range(2 * HANGS):
            time.sleep(0.5)
            try:
                found = json.loads(urllib.request.urlopen(address, timeout=HANGS).read())
                break
            except OSError as error:
                assert getattr(error, "code", None) in (None, 503), error
        assert found["type"] == "notebook"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


OPEN = """
import subprocess, sys
from histokit import cli
call = subprocess.call
subprocess.call = lambda command, **more: call([*command, f"--port={sys.argv[2]}", "--IdentityProvider.token=t", "--allow-root"], **more)
cli.main(["open", sys.argv[1], "07_evaluate", "--no-browser"])
"""
