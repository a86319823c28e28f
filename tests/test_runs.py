import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pandas as pd
import pytest

from histokit import runs
from histokit.core import files, locks, machine
from histokit.runs import keys, places
from histokit.runs import run as run_module

NOTEBOOK = """
experiment: str = "demo"  # folder
step: str = "03_img2img"  # id
class_name: str = ""  # class
lora: str = ""  # step
strength: float = 0.5  # share
arms: dict = {}  # arms
seed: int = 0  # seed
# %%
from histokit import runs
from histokit.generate import img2img
from histokit.show import plots

run = runs.start(**runs.parameters(globals()))
# %%
made = img2img.render(strength)
plots.image_grid(made, title="first")
# %%
run.finish(made)
"""


def write_notebook(root, text=NOTEBOOK, name="03_img2img"):
    """A notebook file from `# %%` text whose first cell is the parameters cell."""
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": cell.strip(), "outputs": []}
        for i, cell in enumerate(text.split("# %%\n"))
    ]
    cells.insert(1, {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": "# Prose"})
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3"}}, "cells": cells}
    return files.write_json(root / "notebooks" / f"{name}.ipynb", book)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder of a few modules, so that versions can change."""
    folder = tmp_path / "package"
    files.write_text(
        folder / "generate" / "img2img.py", "from histokit.diffusion import sampling\nfrom histokit.show import plots\nVERSION = 1\n"
    )
    files.write_text(folder / "diffusion" / "sampling.py", "def f():\n    from histokit.core.files import seed\nVERSION = 4\n")
    files.write_text(folder / "core" / "files.py", "import histokit.engine.batch\nVERSION = 2\n")
    files.write_text(folder / "runs" / "__init__.py", "from histokit.runs.run import start\n")
    files.write_text(folder / "runs" / "run.py", "VERSION = 3\n")
    for name in ("show/plots", "show/panel/sweep", "engine/batch", "select/gallery", "select/export"):
        files.write_text(folder / f"{name}.py", "VERSION = 9\n")
    monkeypatch.setattr(keys, "PACKAGE", folder)
    return folder


@pytest.fixture
def notebook(root, package):
    return write_notebook(root)


@pytest.fixture
def plain_notebook(root):
    """One for the processes that a test starts: they see the real package."""
    return write_notebook(
        root, re.sub(r"from histokit\.\w+ import .*\n", "", NOTEBOOK).replace("img2img.render", "str").replace("plots.image_grid", "print")
    )


def start(**changes):
    return runs.start(**{"experiment": "demo", "step": "03_img2img", "strength": 0.5, "lora": "", "arms": {}} | changes)


def finished(**changes):
    run = start(**changes)
    files.write_text(run.path("tiles", "a.png"), "pixels")
    run.finish({"n": 1})
    return run


def run_python(code, **env):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | env, stdout=subprocess.PIPE, text=True)


# ---- parameters


def test_parameters_are_the_annotated_literals_of_the_first_cell():
    space = {}
    exec('a: str = "x"\nb: float = 1\nc: int = 2\nd: bool = True\ne: list = [1]\nf: dict = {}\ng = 3\nimport os\nh: "int" = 4', space)
    found = runs.parameters(space)
    assert found == {"a": "x", "b": 1.0, "c": 2, "d": True, "e": [1], "f": {}, "h": 4} and type(found["b"]) is float


@pytest.mark.parametrize("line", ["n: int = 1.5", "n: int = True", "n: str = None", "n: float = '1e-4'", "n: list = (1,)"])
def test_a_parameter_of_the_wrong_type_is_refused_by_name(line):
    space = {}
    exec(line, space)
    with pytest.raises(TypeError, match="parameter n is declared"):
        runs.parameters(space)


# ---- folders


def test_a_run_folder_is_named_by_experiment_step_and_class(root):
    top = root / "outputs" / "demo" / "03"
    assert runs.folder("demo", "03") == top
    assert runs.folder("demo", "03", "all") == top / "all"
    assert runs.folder("demo", "03", "High/../IN") == top / files.slug("High/../IN")
    assert runs.folder("demo", "03", "all", "2/4") == top / "all" / "shards" / "2" and runs.folder("demo", "03", shard="0/1") == top


@pytest.mark.parametrize("experiment", ["demo", "demo-2", "demo-d", "a-g-b", "demo-d0", "x.y_z", "demo-g1-x"])
def test_the_name_of_a_replicate_is_read_back_as_it_was_made(experiment):
    for draw in (0, 1, 12):
        for generator in (0, 1, 12):
            assert places.replicated(places.replicate(experiment, draw, generator)) == (experiment, draw, generator)
    assert places.lineage(places.replicate(experiment, 3, 2)) == [f"{experiment}-d3-g2", f"{experiment}-d3"]
    assert places.lineage(places.replicate(experiment, 3)) == [f"{experiment}-d3"], "another draw does everything again"


def test_a_run_knows_its_generator_seed_and_its_key_does_not(root):
    opened = [start(experiment=places.replicate("demo", draw, generator)) for draw, generator in ((0, 0), (0, 2), (1, 3))]
    assert [run.generator_seed for run in opened] == [0, 2, 3]
    assert [files.read_json(run.folder / "run.json")["generator_seed"] for run in opened] == [0, 2, 3]
    assert len({json.dumps(run.record["key"], sort_keys=True) for run in opened}) == 1, "or what a replicate shares would be trained again"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\\b", ".old", "C:", "a\0", " a", "a\nb"])
def test_names_that_cannot_be_folders_are_refused(root, name):
    for given in ({"experiment": name}, {"step": name}):
        with pytest.raises(ValueError, match="folder name"):
            start(**given)
    assert not (root / "outputs").exists()


def test_a_run_goes_from_running_to_done_with_all_it_depended_on(root, notebook):
    run = start(class_name="Größe, [1]", seed=3, recipe="params/demo.yaml")
    assert files.read_json(run.folder / "run.json")["status"] == "running" and (run.folder / "run.lock").exists()
    files.write_text(run.path("tiles", "a.png"), "pixels")
    run.note(batch_size=4)
    run.finish(pd.DataFrame({"tile_id": ["a"], "path": ["/abs/a.png"]}))
    record = files.read_json(run.folder / "run.json")
    assert record["status"] == "done" and not (run.folder / "run.lock").exists()
    assert record["outputs"].keys() == {"tiles/a.png", "manifest.csv"} and record["notes"] == {"batch_size": 4}
    assert record["key"]["parameters"] == {"class_name": "Größe, [1]", "seed": 3, "strength": 0.5, "lora": "", "arms": {}}
    assert record["key"]["modules"] == {
        "histokit.core.files": 2,
        "histokit.diffusion.sampling": 4,
        "histokit.generate.img2img": 1,
        "histokit.runs.run": 3,
    }
    assert record["versions"]["python"] and record["memory_gib"]["ram"] > 0 and record["wall_s"] >= 0
    assert list(files.read_table(run.folder / "manifest.csv")) == ["tile_id"]  # absolute paths stay in memory


def test_results_hold_no_nan(root):
    run = start()
    run.finish({"recall": float("nan")})
    assert json.loads((run.folder / "results.json").read_text(), parse_constant=pytest.fail) == {"recall": None}


def test_large_manifests_are_parquet(root, monkeypatch):
    monkeypatch.setattr(run_module, "BIG", 2)
    run = start()
    run.finish(pd.DataFrame({"tile_id": list("abc")}))
    assert [p.name for p in places.output_files(run.folder)] == ["manifest.parquet"]


def test_a_finished_run_is_not_written_to(root):
    run = finished()
    for late in (lambda: run.path("x"), lambda: run.note(a=1), run.finish):
        with pytest.raises(RuntimeError, match="finished"):
            late()


def test_the_outputs_folder_may_be_a_link(root, tmp_path):
    (tmp_path / "scratch").mkdir()
    (root / "outputs").rename(root / "gone") if (root / "outputs").exists() else None
    (root / "outputs").symlink_to(tmp_path / "scratch")
    run = runs.start(experiment="exp", step="a")
    path = run.path("tiles", "0.png")
    assert path.relative_to(run.folder).as_posix() == "tiles/0.png" and path.is_relative_to(root)
    files.write_bytes(path, b"x")
    run.finish()
    assert (tmp_path / "scratch/exp/a/tiles/0.png").read_bytes() == b"x" and run.record["outputs"].keys() >= {"tiles/0.png"}


def test_paths_stay_inside_the_run_folder(root):
    run = start()
    for bad in ("../x", "/etc/passwd", "a\0"):
        with pytest.raises(ValueError):
            run.path(bad)
    assert run.path() == run.folder and run.path("a", "b.txt").parent.is_dir()


def test_the_output_hash_is_over_content_and_not_over_logs_or_the_executed_notebook(root):
    one = finished()
    two = start()
    files.write_text(two.path("tiles", "a.png"), "pixels")
    files.write_text(two.path("logs", "events"), "12:30")
    files.write_text(two.path("03_img2img.ipynb"), "{}")
    files.write_text(two.path(".hidden"), "x")
    two.finish({"n": 1})
    assert two.record["outputs_sha256"] == one.record["outputs_sha256"]


# ---- resuming, and what becomes of older folders


def test_an_interrupted_run_is_resumed_in_place(root, notebook):
    first = start()
    files.write_text(first.path("a"), "kept")
    files.write_text(first.folder / ".0123456789abcdef.tmp", "half")
    second = start()  # the cell again, in the same kernel
    assert second.run_id == first.run_id and second.record["attempt"] == 2 and second.previous is None
    assert (second.folder / "a").read_text() == "kept" and not list(second.folder.glob(".*.tmp"))
    with pytest.raises(RuntimeError, match="later start"):
        first.path("b")
    second.finish()
    with pytest.raises(RuntimeError):
        first.finish()


def test_a_finished_run_moves_aside_as_a_whole(root, notebook, capsys):
    one = finished(class_name="necrosis")
    two = start(class_name="necrosis", strength=0.35)
    assert "strength 0.5 -> 0.35" in capsys.readouterr().out
    shelf = root / "outputs" / "demo" / ".old" / "03_img2img" / files.slug("necrosis")
    assert two.previous == shelf / one.run_id and (two.previous / "tiles" / "a.png").read_text() == "pixels"
    assert two.run_id != one.run_id and places.output_files(two.folder) == []
    two.finish()
    three = start(class_name="necrosis")
    assert three.previous == shelf / two.run_id and (shelf / one.run_id).is_dir()  # nothing is deleted


def test_an_interrupted_run_with_other_parameters_moves_aside(root, notebook):
    one = start()
    files.write_text(one.path("a"), "x")
    two = start(strength=0.6)
    assert two.previous.name == one.run_id and not (two.folder / "a").exists()


def test_files_of_unknown_origin_are_not_taken_for_results(root):
    folder = runs.folder("demo", "03_img2img")
    files.write_text(folder / "tiles" / "a.png", "whose?")
    run = start()
    assert places.output_files(run.folder) == [] and len(list((root / "outputs/demo/.old/03_img2img").glob("unknown-*"))) == 1


def test_an_unreadable_run_json_is_missing_and_set_aside(root, notebook):
    one = finished()
    (one.folder / "run.json").write_text("{half")
    assert runs.check(one.folder, {}, notebook)[0] == "missing"
    start().finish()
    assert len(list((root / "outputs/demo/.old/03_img2img").iterdir())) == 1


# ---- what changed


def state(run, notebook, **changes):
    return runs.check(run.folder, {"strength": 0.5, "lora": "", "arms": {}} | changes, notebook)


def test_nothing_changed_is_done(root, notebook):
    run = finished()
    assert state(run, notebook) == ("done", "")
    assert runs.check(run.folder, {"experiment": "demo", "recipe": "other.yaml", "shard": "0/1"}, notebook)[0] == "done"
    assert runs.check(runs.folder("demo", "other"), {}, notebook) == ("missing", "never run")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"strength": 0.35}, "strength 0.5 -> 0.35"),
        ({"seed": 2}, "seed 0 -> 2"),
        ({"class_name": "x"}, 'class_name "" -> x'),
        ({"arms": {"a": {"loss": "ce"}}}, "arms"),
        ({"extra": 1}, "extra is new (1)"),
    ],
)
def test_a_changed_parameter_is_named(root, notebook, change, why):
    got = state(finished(), notebook, **change)
    assert got[0] == "stale" and why in got[1]


def test_the_innermost_change_is_named(root, notebook):
    run = finished(arms={"real": {"sampler": "natural"}, "aug": {"synthetic": "keep"}})
    got = state(run, notebook, arms={"real": {"sampler": "balanced"}, "aug": {"synthetic": "keep"}})
    assert got == ("stale", "arms.real.sampler natural -> balanced")


@pytest.mark.parametrize(
    "old, new, stale",
    [
        ("render(strength)", "render(strength, 2)", True),
        ("title=", "captions=None, title=", False),  # a plot
        ("from histokit.show import plots", "from histokit.show import plots, widgets", False),
        ('plots.image_grid(made, title="first")', "from histokit.show import widgets\nwidgets.tuner(img2img.previewer(made), run)", False),
        ('plots.image_grid(made, title="first")', "from histokit.select import gallery\ngallery.show(run, made, made, run.device)", False),
        ('plots.image_grid(made, title="first")', "from other import gallery\ngallery.show(run, made, made, run.device)", True),
        ('plots.image_grid(made, title="first")', "widgets.tuner(made)", True),  # not ours: nothing imports it
        (
            'plots.image_grid(made, title="first")',
            "ax = plots.image_grid(made)\nfor row in range(2):\n    plots.bar(row)",
            True,
        ),  # range() calls
        ('plots.image_grid(made, title="first")', "ax = plots.image_grid(made)", False),
        ('plots.image_grid(made, title="first")', "plots.image_grid(made := [])", True),
        ("made = img2img.render(strength)", "made = img2img.render( strength )  # a comment", False),
        ("0.5  # share", "0.6  # another default", False),  # parameters count by value
    ],
)
def test_code_counts_and_pictures_do_not(root, notebook, old, new, stale):
    run = finished()
    write_notebook(root, NOTEBOOK.replace(old, new))
    assert state(run, notebook) == (("stale", "code of the notebook changed") if stale else ("done", ""))


def test_prose_is_outside_the_key(root, notebook):
    run = finished()
    notebook.write_text(notebook.read_text().replace("# Prose", "# Better prose"))
    assert state(run, notebook)[0] == "done"


def test_a_changed_method_is_named_with_its_versions(root, notebook, package):
    run = finished()
    files.write_text(package / "diffusion" / "sampling.py", (package / "diffusion" / "sampling.py").read_text().replace("= 4", "= 5"))
    assert state(run, notebook) == ("stale", "histokit.diffusion.sampling version 4 -> 5")


def test_pictures_have_no_version(root, notebook, package):
    run = finished()
    for name in ("show/plots", "engine/batch"):
        files.write_text(package / f"{name}.py", "VERSION = 10\n")
    assert state(run, notebook)[0] == "done"


def test_the_real_modules_are_read(root, repository):
    found = keys.modules(
        write_notebook(root, "a: int = 1\n# %%\nfrom histokit import runs\nfrom histokit.core import files\nimport histokit.core.files")
    )
    assert found == {"histokit.core.files": files.VERSION}


def test_a_notebook_with_magics_is_refused_by_cell(root, notebook):
    write_notebook(root, NOTEBOOK + "# %%\n!pip install x")
    with pytest.raises(ValueError, match="cell 5 is not plain Python"):
        start()


def test_a_changed_input_file_is_named_and_a_touched_one_is_not(root, notebook):
    files.write_text(root / "params" / "d.yaml", "a: 1")
    run = finished(dataset="params/d.yaml")
    os.utime(root / "params" / "d.yaml", (1, 1))
    assert state(run, notebook, dataset="params/d.yaml") == ("done", "")
    files.write_text(root / "params" / "d.yaml", "a: 2")
    assert state(run, notebook, dataset="params/d.yaml") == ("stale", "input params/d.yaml changed")
    (root / "params" / "d.yaml").unlink()
    assert state(run, notebook, dataset="params/d.yaml") == ("stale", "input params/d.yaml is gone")


def test_inputs_are_files_folders_of_weights_and_listings(root, notebook, tmp_path):
    away = tmp_path / "away"
    for name in ("a.safetensors", "sub/config.json", "tile.png"):
        files.write_text(away / name, name)
    run = start(base_model=str(away))
    assert run.record["inputs"]["away"]["held"].keys() == {"a.safetensors", "sub/config.json"}
    assert run.listing("away") == away and run.input(away / "tile.png") == away / "tile.png"
    run.finish()
    same = {"base_model": str(away)}
    assert state(run, notebook, **same)[0] == "done"
    files.write_text(away / "new.json", "{}")
    assert "input away changed" in state(run, notebook, **same)[1]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start().input("nowhere.csv")


def test_a_folder_in_which_nothing_was_may_be_missing_as_in_a_clone(root, notebook):
    folder = root / "params" / "reviews"
    folder.mkdir(parents=True)
    run = start()
    run.input(folder, patterns=("exp.csv",))
    run.finish()
    folder.rmdir()
    assert state(run, notebook) == ("done", "")
    files.write_text(folder / "exp.csv", "sha256,verdict")
    assert state(run, notebook) == ("stale", "input params/reviews changed")


def test_a_listing_sees_new_and_edited_tiles(root, notebook):
    files.write_text(root / "data" / "a" / "1.png", "x")
    run = start()
    run.listing("data")
    run.finish()
    assert state(run, notebook)[0] == "done"
    files.write_text(root / "data" / "a" / "2.png", "x")
    assert state(run, notebook) == ("stale", "input data changed")


def test_a_step_id_or_a_prompt_is_not_taken_for_a_file(root, notebook):
    (root / "notes").mkdir()
    finished(step="01_tokens")
    assert start(lora="01_tokens", prompt="x" * 5000, policy="notes", empty="").record["inputs"] == {}


def test_built_in_weights_are_an_input(root, notebook, package):
    files.write_text(package / "mini" / "unet" / "config.json", "{}")
    run = finished(base_model="mini", arms={"real": {"encoder": "mini-sup"}})
    assert list(run.record["inputs"]) == ["package:mini"]
    given = {"base_model": "mini", "arms": {"real": {"encoder": "mini-sup"}}}
    assert state(run, notebook, **given)[0] == "done"
    files.write_text(package / "mini" / "unet" / "config.json", "{ }")
    assert state(run, notebook, **given) == ("stale", "input package:mini changed")


def test_a_lost_output_makes_a_run_stale(root, notebook):
    run = finished()
    (run.folder / "tiles" / "a.png").unlink()
    assert state(run, notebook) == ("stale", "tiles/a.png is missing or changed")


def test_the_notebook_is_found_by_environment_then_by_step(root, notebook, monkeypatch):
    assert keys.find_notebook("03_img2img") == notebook and keys.find_notebook("nothing") is None
    other = write_notebook(root, name="copy")
    monkeypatch.setenv("HISTOKIT_NOTEBOOK", str(other))
    assert keys.find_notebook("03_img2img") == other
    monkeypatch.setenv("HISTOKIT_NOTEBOOK", str(root / "gone.ipynb"))
    assert keys.find_notebook("03_img2img") == notebook


# ---- parents


def test_a_parent_is_found_in_its_class_then_all_then_the_step(root, notebook):
    once = finished(step="00")
    run = start(class_name="a")
    assert run.parent("00") == once.folder
    over_all = finished(step="02", class_name="all")
    assert run.parent("02") == over_all.folder
    own = finished(step="02", class_name="a")
    assert run.parent("02") == own.folder and run.parent("02", "b") == over_all.folder
    assert run.parents("02") == {"a": own.folder, "all": over_all.folder} and run.parents("00") == {"": once.folder}


def test_a_run_that_is_to_be_set_aside_is_looked_through(root, notebook):
    own, one = finished(step="02_lora", class_name="a"), finished(step="02_lora", class_name="all")
    with places.without([own.folder]):
        assert places.find("demo", "02_lora", "a") == one.folder and places.find_all("demo", "02_lora") == {"all": one.folder}
    assert places.find("demo", "02_lora", "a") == own.folder


def test_leftovers_are_runs_that_nobody_writes_to(root, notebook):
    kept, gone = finished(class_name="a"), finished(class_name="b")
    dead, alive = start(class_name="c"), start(class_name="d")
    dead._lock.release()
    top = kept.folder.parent
    files.write_text(top / "notes" / "mine.txt", "no run")
    assert places.leftovers(top, [kept.folder.name]) == sorted([gone.folder, dead.folder])
    assert places.retire(gone.folder) and not places.retire(alive.folder) and not places.retire(gone.folder)
    shelf = root / "outputs/demo/.old/03_img2img" / gone.folder.name / gone.run_id
    assert (shelf / "tiles/a.png").read_text() == "pixels" and alive.folder.is_dir()


def test_a_run_over_no_class_is_left_over_when_its_step_now_runs_per_class(root, notebook):
    top = finished().folder
    assert places.leftovers(top, ["", "a"]) == [] and places.leftovers(top, ["a"]) == [top]
    finished(class_name="a")
    assert places.leftovers(top, [files.slug("a")]) == [], "it would take the class below it along"


def test_a_missing_parent_names_the_command_that_makes_it(root):
    run = start(class_name="a", recipe="params/demo.yaml")
    with pytest.raises(FileNotFoundError, match=r"histokit run params/demo\.yaml --only 02_lora"):
        run.parent("02_lora")
    start(step="02_lora", class_name="a")
    with pytest.raises(FileNotFoundError, match="is running"):
        run.parent("02_lora")
    with pytest.raises(FileNotFoundError, match="02_lora"):
        run.parents("02_lora")


def test_a_changed_parent_makes_the_child_stale_and_a_remade_one_does_not(root, notebook):
    finished(step="02_lora", class_name="all")
    child = start(class_name="a", lora="02_lora")
    child.parent("02_lora")
    child.finish()
    given = {"class_name": "a", "lora": "02_lora"}
    assert state(child, notebook, **given) == ("done", "")
    finished(step="02_lora", class_name="all")  # the same files again
    assert state(child, notebook, **given) == ("done", "")
    other = start(step="02_lora", class_name="all")
    assert state(child, notebook, **given) == ("stale", "parent 02_lora is not there or not finished")
    files.write_text(other.path("tiles", "a.png"), "other pixels")
    other.finish({"n": 1})
    assert state(child, notebook, **given) == ("stale", "parent 02_lora changed")


def test_a_new_class_beside_the_others_is_a_changed_parent(root, notebook):
    finished(step="keep", class_name="a")
    child = start()
    child.parents("keep")
    child.finish()
    assert state(child, notebook)[0] == "done"
    finished(step="keep", class_name="b")
    assert state(child, notebook) == ("stale", "parent keep changed")


# ---- one writer at a time

WRITER = """
    import time, sys
    from histokit import runs
    run = runs.start(experiment="demo", step="03_img2img", strength=0.5, lora="", arms={})
    print("started", flush=True)
    time.sleep(60)
"""


def started(process):
    for line in process.stdout:
        if line == "started\n":
            return
    raise AssertionError("the writer did not start")


def test_a_second_writer_is_refused_naming_the_first(root, plain_notebook):
    process = run_python(WRITER)
    try:
        started(process)
        with pytest.raises(locks.Locked, match=f"process {process.pid} on host {socket.gethostname()}, last seen"):
            start()
        assert runs.check(runs.folder("demo", "03_img2img"), {}, plain_notebook)[0] == "running"
        with pytest.raises(locks.Locked):
            runs.mark_failed(runs.folder("demo", "03_img2img"), "no")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert runs.check(runs.folder("demo", "03_img2img"), {}, plain_notebook) == ("interrupted", "can be resumed")
    assert runs.check(runs.folder("demo", "03_img2img"), {"strength": 0.1}, plain_notebook) == ("interrupted", "strength 0.5 -> 0.1")
    again = start()  # the lock of a dead process is no hindrance
    assert again.record["attempt"] == 2


def test_of_many_writers_at_once_exactly_one_wins(root, plain_notebook):
    code = """
        import sys, time
        from histokit import runs
        from histokit.core import locks
        while time.time() < float(sys.argv[1]):
            time.sleep(0.01)
        try:
            runs.start(experiment="demo", step="03_img2img", strength=0.5, lora="", arms={})
            print("won", flush=True)
        except locks.Locked:
            print("refused", flush=True)
        sys.stdin.read()
    """
    start()._lock.release()  # an interrupted run to fight over
    at = str(time.time() + 3)
    command, pipe = [sys.executable, "-c", textwrap.dedent(code), at], subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    answers = [next(line.strip() for line in process.stdout if line in ("won\n", "refused\n")) for process in processes]
    for process in processes:
        process.communicate()
    assert sorted(answers) == ["refused"] * 3 + ["won"]


def lock_file(folder, **facts):
    facts = {"host": socket.gethostname(), "pid": 2**22 + 1, "born": "1", "time": 0, "token": "t"} | facts
    files.write_json(folder / "run.lock", facts)


@pytest.mark.parametrize(
    "facts, age, is_stale",
    [
        ({}, 0, True),  # a process that is gone
        ({"pid": 1, "born": "no"}, 0, True),  # its number was given to another
        ({"host": "elsewhere"}, 5, False),
        ({"host": "elsewhere"}, 121, True),
        ({"pid": os.getpid()}, 0, True),  # ours, from before a restart
    ],
)
def test_a_lock_is_stale_when_its_process_is_gone_or_silent(root, facts, age, is_stale):
    folder = runs.folder("demo", "03_img2img")
    lock_file(folder, **facts)
    os.utime(folder / "run.lock", (time.time() - age,) * 2)
    assert locks.stale(locks.read(folder)) is is_stale
    if is_stale:
        start().finish()
    else:
        with pytest.raises(locks.Locked, match="elsewhere"):
            start()


def test_the_heart_beats_and_stops(root, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    run = start()
    os.utime(run.folder / "run.lock", (0, 0))
    for _ in range(200):
        if locks.read(run.folder)["age"] < 60:
            break
        time.sleep(0.02)
    assert locks.read(run.folder)["age"] < 60
    run.finish()
    run._lock._thread.join(5)
    assert not run._lock._thread.is_alive()


def test_whoever_lost_the_lock_stops_writing(root):
    run = start()
    lock_file(run.folder)
    with pytest.raises(RuntimeError, match="later start"):
        run.finish({"n": 1})
    assert files.read_json(run.folder / "run.json")["status"] == "running" and (run.folder / "run.lock").exists()


# ---- failing and being killed


def test_a_failed_run_says_why_and_is_resumed(root, notebook):
    run = start()
    files.write_text(run.path("a"), "x")
    run._lock.release()
    runs.mark_failed(run.folder, "ValueError: too few tiles")
    assert state(run, notebook) == ("failed", "ValueError: too few tiles")
    again = start()
    assert again.run_id == run.run_id and (again.folder / "a").exists()
    again.finish()
    assert "error" not in files.read_json(run.folder / "run.json")
    runs.mark_failed(run.folder, "late")
    assert state(run, notebook) == ("done", "")  # a finished run stays finished


def test_a_job_that_failed_before_its_start_is_marked_too(root, notebook):
    folder = runs.folder("demo", "03_img2img")
    runs.mark_failed(folder, "ImportError")
    assert runs.check(folder, {}, notebook) == ("failed", "ImportError")
    start().finish()
    assert runs.check(folder, {}, notebook)[0] == "done" and not (root / "outputs/demo/.old").exists()


@pytest.mark.parametrize("call", ["os.replace", "os.rename", "os.mkdir", "os.fsync", "os.utime"])
def test_kill_9_at_any_system_call_leaves_a_folder_that_can_be_run(root, plain_notebook, call):
    """Kills a writer at its first, second, ... use of a call, over start, write and finish, until one run comes through."""
    code = """
        import os, signal, sys
        name, left = sys.argv[1].partition(".")[2], [int(sys.argv[2])]
        import pandas, histokit.core.tables, histokit.runs.notebooks
        from histokit import runs
        from histokit.core import files
        original = getattr(os, name)
        def killing(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(os, name, killing)
        run = runs.start(experiment="demo", step="03_img2img", strength=float(sys.argv[3]), lora="", arms={})
        files.write_text(run.path("tiles", "a.png"), "pixels")
        run.finish({"n": 1})
    """
    clean = finished(strength=0.4)  # something to move aside
    for count in range(0, 40, 3):
        command = [sys.executable, "-c", textwrap.dedent(code), call, str(count), "0.5"]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        if ended.returncode == 0:
            break
        assert runs.check(clean.folder, {"strength": 0.5}, plain_notebook)[0] in ("missing", "interrupted", "stale", "done")
    assert ended.returncode == 0
    after = files.read_json(clean.folder / "run.json")
    assert after["status"] == "done" and after["outputs_sha256"] == clean.record["outputs_sha256"]
    kept = [files.read_json(p)["run_id"] for p in (root / "outputs/demo/.old/03_img2img").glob("*/run.json")]
    assert clean.run_id in kept


def test_a_full_disk_at_the_end_leaves_a_run_that_can_be_finished(root, notebook, monkeypatch):
    run = start()
    write = files.write_json
    monkeypatch.setattr(files, "write_json", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.finish()
    monkeypatch.setattr(files, "write_json", write)
    assert files.read_json(run.folder / "run.json")["status"] == "running"
    run.finish()
    assert state(run, notebook)[0] == "done"


# ---- seeds and the machine


def test_generators_follow_from_seed_and_name_alone(root):
    import torch

    run = start(seed=1)
    draw = [torch.rand(2, generator=run.generator("necrosis", i)) for i in (0, 1, 0)]
    assert torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], torch.rand(2, generator=start(step="other", seed=1).generator("necrosis", 0)))


def test_the_device_can_be_chosen_and_is_recorded(root, monkeypatch):
    monkeypatch.setenv("HISTOKIT_DEVICE", "cpu")
    run = start()
    assert run.device == "cpu"
    run.finish()
    assert files.read_json(run.folder / "run.json")["device"] == "cpu"


def test_bfloat16_is_used_where_the_hardware_has_it(monkeypatch):
    import torch

    for able, expected in (({"avx2": True, "avx512_f": True}, None), ({"avx512_bf16": True}, torch.bfloat16), ({}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert machine.bfloat16("cpu") is expected


def test_an_idle_gpu_is_told_in_one_line(monkeypatch):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "driver_sees", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = machine.notice()
    assert "NVIDIA H200" in line and "cannot use it" in line and "\n" not in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.notice() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.notice() == ""  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "driver_sees", lambda: "")
    assert machine.notice() == ""
