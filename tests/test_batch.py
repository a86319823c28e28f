"""Running a recipe: real kernels on stub notebooks that import nothing but histokit.runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import stubs
from patience import alive, wait

from histokit import runs
from histokit.core import files, machine, progress
from histokit.engine import batch, jobs, terminal
from histokit.runs import notebooks, recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A root in which the recipe of `stubs.chain` has run once; copied by `root`, so no test spoils another's."""
    root = tmp_path_factory.mktemp("Tübingen [1], {a}")  # spaces, umlauts, brackets, braces and commas
    path = stubs.chain(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTOKIT_ROOT", str(root))
        lines = []
        results = batch.run(recipe.read(path), workers=2, say=lines.append)
        assert {r.state for r in results.values()} == {"done"}, "\n".join([*lines, *batch.summary(results, recipe.read(path))])
    return root, lines


@pytest.fixture
def root(finished, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(finished[0], root, copy_function=shutil.copy2)  # times kept: inputs are known by them
    monkeypatch.setenv("HISTOKIT_ROOT", str(root))
    return root


def read(root, *given):
    return recipe.read(root / "params" / "study.yaml", given)


def states(root, *given):
    return {s.job.name: (s.state, s.why) for s in map(jobs.look, jobs.expand(read(root, *given)))}


def no_kernel(monkeypatch):
    monkeypatch.setattr(machine, "notice", lambda: "")  # it asks the driver, by a process of its own
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"started {a[0]}"))


def run(root, *given, say=lambda line: None, **more):
    results = batch.run(read(root, *given), say=say, **more)
    return {"/".join(filter(None, id)): r.state for id, r in results.items()}


ALL = ("00_dataset", "03_img2img/fat", "03_img2img/mucin", "05_select/fat", "05_select/mucin", "07_evaluate")


def test_a_recipe_runs_to_its_verdict_one_line_per_job(finished):
    _, lines = finished
    assert [line.split()[:2] for line in lines[:1]] == [["00_dataset", "done"]]
    assert sorted(line.split()[0] for line in lines) == sorted(ALL)
    assert all(line.split()[2].isdigit() and line.split()[3] in ("s", "min") for line in lines)


def test_the_executed_notebook_lies_in_the_run_folder(root):
    for job in jobs.expand(read(root)):
        book = json.loads((job.folder / job.notebook.name).read_text())
        injected = next(c for c in book["cells"] if "injected-parameters" in c["metadata"].get("tags", []))
        assert f'experiment = "{job.parameters["experiment"]}"' in "".join(injected["source"])
    assert not (root / "outputs/study/.jobs").exists() or not list((root / "outputs/study/.jobs").iterdir())


def test_a_finished_recipe_starts_no_kernel(root, monkeypatch):
    no_kernel(monkeypatch)
    assert run(root) == dict.fromkeys(ALL, "up to date")


def test_the_verdict_is_the_last_line(root):
    results = batch.run(read(root), say=lambda line: None)
    assert batch.summary(results, read(root))[-1] == "no evidence"


def test_a_changed_value_is_named_and_moves_the_old_run(root):
    assert states(root, "strength=0.7")["03_img2img/fat"] == ("stale", "strength 0.5 -> 0.7")
    old = files.read_json(root / "outputs/study/03_img2img" / files.slug("fat") / "run.json")["run_id"]
    lines = []
    done = run(root, "03_img2img.strength=0.7", say=lines.append, classes=["fat"], workers=2)
    assert "stale: 03_img2img/fat: strength 0.5 -> 0.7" in lines
    assert done == {"00_dataset": "up to date", "03_img2img/fat": "done", "05_select/fat": "done", "07_evaluate": "done"}
    assert (root / "outputs/study/.old/03_img2img" / files.slug("fat") / old / "made.txt").read_text() == "fat 0.5"
    assert files.read_json(root / "outputs/study/05_select" / files.slug("fat") / "results.json") == {"kept": "fat 0.7"}


def test_a_failed_class_stops_what_depends_on_it_and_other_chains_finish(root):
    shutil.rmtree(root / "outputs/study/03_img2img")
    text = "classes:\n  fat: {03_img2img: {fail: true}}\n"
    path = root / "params/study.yaml"
    path.write_text(path.read_text() + text)
    results = batch.run(read(root), say=lambda line: None, workers=2)
    assert {"/".join(filter(None, id)): r.state for id, r in results.items()} == {
        "00_dataset": "up to date", "03_img2img/fat": "failed", "03_img2img/mucin": "done",
        "05_select/fat": "not run", "05_select/mucin": "up to date", "07_evaluate": "not run",
    }  # fmt: skip
    told = "\n".join(batch.summary(results, read(root)))
    executed = f"outputs/study/03_img2img/{files.slug('fat')}/03_img2img.ipynb"
    assert "FAILED 03_img2img/fat: AssertionError: asked to fail" in told and f"{executed}, In [" in told
    assert "not run for that reason: 05_select/fat, 07_evaluate" in told and "no evidence" not in told
    assert (root / executed).exists()
    assert states(root)["03_img2img/fat"] == ("failed", "AssertionError: asked to fail")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "the kernel died"),
        ("import sys\nsys.exit(0)", "run.json does not say done: the notebook must end with run.finish"),
    ],
    ids=["killed", "left early"],
)  # fmt: skip
def test_only_run_json_says_that_a_job_succeeded(root, cell, expected):
    stubs.notebook(root, "10_odd", [], stubs.START, cell, "run.finish({})")
    path = stubs.recipe(root, "steps: [10_odd]\n", "odd")
    results = batch.run(recipe.read(path), say=lambda line: None)
    assert results["10_odd", ""].state == "failed" and expected in results["10_odd", ""].text
    assert runs.check(root / "outputs/odd/10_odd", {"step": "10_odd"}, root / "notebooks/10_odd.ipynb")[0] == "failed"


def test_redoing_more_than_ten_minutes_asks_first(root, monkeypatch):
    no_kernel(monkeypatch)
    record = root / "outputs/study/03_img2img" / files.slug("fat") / "run.json"
    files.write_json(record, files.read_json(record) | {"wall_s": 700.0})
    with pytest.raises(recipe.RecipeError, match=r"would be redone \(03_img2img/fat, .*\), about 12 min; nothing started\. Say --yes"):
        run(root, "strength=0.7")
    asked = []
    with pytest.raises(recipe.RecipeError, match="nothing started"):
        run(root, "strength=0.7", ask=lambda question: asked.append(question) or "n")
    assert "Go on?" in asked[0]
    with pytest.raises(recipe.RecipeError, match="Say --yes"):
        run(root, force=["00_dataset"])  # what stands on it may have to be redone too


def test_what_stands_below_a_stale_step_is_due_as_well():
    def state(step, says, *parents):
        job = types.SimpleNamespace(id=(step, ""), step=step, parents=tuple((p, "") for p in parents))
        return types.SimpleNamespace(job=job, state=says)

    states = [state("a", "done"), state("b", "stale", "a"), state("c", "done", "b"), state("d", "done", "c"), state("e", "missing", "a")]
    assert [s.job.step for s in batch.due(states)] == ["b", "c", "d", "e"]
    assert [s.job.step for s in batch.redo(states)] == ["b", "c", "d"], "what never ran is not done again"
    assert batch.due(states, ["a"]) == states and not batch.due(states[:1])


def test_force_redoes_a_step_and_nothing_that_stays_the_same(root):
    assert run(root, force=["03_img2img"], classes=["mucin"]) == {
        "00_dataset": "up to date", "03_img2img/mucin": "done", "05_select/mucin": "up to date", "07_evaluate": "up to date",
    }  # fmt: skip  # the new tiles are the old ones, bit for bit


def test_only_and_classes(root, monkeypatch):
    no_kernel(monkeypatch)
    assert run(root, only=["05_select"]) == {"05_select/fat": "up to date", "05_select/mucin": "up to date"}
    for more, expected in (
        ({"only": ["05_selekt"]}, "no step '05_selekt'.*did you mean 05_select"),
        ({"classes": ["mucine"]}, "runs for class 'mucine'; did you mean mucin"),
        ({"force": ["x"]}, "no step 'x'"),
    ):
        with pytest.raises(recipe.RecipeError, match=expected):
            run(root, **more)
    shutil.rmtree(root / "outputs/study/03_img2img" / files.slug("fat"))
    with pytest.raises(recipe.RecipeError, match="05_select/fat needs 03_img2img, which has not finished; add it to --only"):
        run(root, only=["05_select"])
    shutil.rmtree(root / "outputs/study/05_select" / files.slug("fat"))
    assert run(root, classes=["mucin"])["07_evaluate"] == "left out"


def rewrite(root, **steps):
    """The chain's recipe with these values of its steps."""
    lines = [f"  - {id}: {steps.get(id[3:], '{}')}\n" for id in ("00_dataset", "03_img2img", "05_select", "07_evaluate")]
    (root / "params/study.yaml").write_text("steps:\n" + "".join(lines))


def left(root):
    return list(jobs.leftovers(jobs.expand(read(root))).values())


class Here:
    """In place of a job's process: its notebook's cells, executed here when it is first asked whether it has ended."""

    def __init__(self, command, *, env, **more):
        self.stdin, self.env, self.code = self, env, None

    def write(self, line):
        self.spec = json.loads(line)

    def poll(self):
        if self.code is None:
            parameters, *cells = ["".join(cell["source"]) for cell in files.read_json(self.spec["notebook"])["cells"]]
            space = {}
            exec(parameters, space)
            space |= self.spec["parameters"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HISTOKIT_NOTEBOOK", self.env["HISTOKIT_NOTEBOOK"])
                for cell in cells:
                    exec(cell, space)
            files.write_json(self.spec["answer"], {})
            self.code = 0
        return self.code

    def flush(self):
        pass

    close = wait = flush


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(machine, "notice", lambda: "")
    monkeypatch.setattr(batch, "subprocess", types.SimpleNamespace(Popen=Here, PIPE=subprocess.PIPE))


def read_by_the_verdict(root):
    (request,) = files.read_json(root / "outputs/study/07_evaluate/run.json")["parents"]
    return {path.rpartition("05_select/")[2] for path in request["found"]}


def kept(root, class_name):
    return files.read_json(runs.folder("study", "05_select", class_name) / "results.json")["kept"]


def test_one_run_over_all_classes_takes_the_place_of_those_of_each_and_back(root, here):
    rewrite(root, img2img="{class_name: all}")
    found = states(root)
    assert found["05_select/fat"] == ("stale", "parent 03_img2img is not there or not finished")
    assert (runs.folder("study", "03_img2img", "fat") / "made.txt").exists(), "looking moves nothing"
    lines = []
    assert set(run(root, say=lines.append).values()) == {"up to date", "done"}
    told = "set aside, as params/study.yaml does not ask for it any more: 03_img2img/fat, 03_img2img/mucin; kept in outputs/study/.old"
    assert lines.count(told) == 1
    assert kept(root, "fat") == kept(root, "mucin") == "all 0.5", "made by the one run"
    assert (next((root / "outputs/study/.old/03_img2img").glob("fat-*/*")) / "made.txt").read_text() == "fat 0.5"

    rewrite(root, img2img="{class_name: all}", select="{class_name: all}")
    run(root)
    assert read_by_the_verdict(root) == {"all"} and kept(root, "all") == "all 0.5"
    rewrite(root, img2img="{class_name: all}")
    assert left(root) == ["05_select/all"] and states(root)["07_evaluate"][0] == "stale"
    run(root)
    assert read_by_the_verdict(root) == {files.slug("fat"), files.slug("mucin")} and left(root) == []


def test_a_class_that_is_asked_for_no_more_is_read_no_more(root, here):
    rewrite(root, img2img="{for: [mucin]}", select="{for: [mucin]}")
    assert states(root)["07_evaluate"] == ("stale", "parent 05_select changed")
    done = run(root)
    assert done == {"00_dataset": "up to date", "03_img2img/mucin": "up to date", "05_select/mucin": "up to date", "07_evaluate": "done"}
    assert read_by_the_verdict(root) == {files.slug("mucin")} and left(root) == []


def test_to_run_one_class_or_step_sets_no_other_aside(root, monkeypatch):
    no_kernel(monkeypatch)
    lines = []
    run(root, say=lines.append, classes=["mucin"])
    run(root, say=lines.append, only=["05_select"], classes=["fat"])
    assert not any("set aside" in line for line in lines) and set(states(root).values()) == {("done", "")}


FREEZE = """from histokit.tiles import description
held = description.describe(dataset)
files.write_json(run.path('dataset.json'), {'classes': held.classes, 'roles': {c: held.roles.get(c, 'head') for c in held.classes}})
run.finish({})"""


def test_a_class_that_is_rare_no_more_is_read_no_more_and_none_at_all_can_be_mended(root, here):
    stubs.notebook(root, "00_dataset", ["dataset: str = 'params/datasets/tiles.yaml'  # description"], stubs.START, FREEZE)
    stubs.dataset(root, "{fat: {}, mucin: {role: tail}, stroma: {}}")
    assert left(root) == [], "known after 00"
    lines = []
    done = run(root, say=lines.append)
    assert list(done) == ["00_dataset", "03_img2img/mucin", "05_select/mucin", "07_evaluate"]
    assert any(line.endswith("any more: 03_img2img/fat, 05_select/fat; kept in outputs/study/.old") for line in lines)
    assert read_by_the_verdict(root) == {files.slug("mucin")}

    stubs.dataset(root, "{fat: {}, mucin: {}, stroma: {}}")
    with pytest.raises(recipe.RecipeError, match="no class is rare in .* set roles"):
        run(root)
    stubs.dataset(root, "{fat: {role: tail}, mucin: {}, stroma: {}}")
    assert run(root, only=["00_dataset"]) == {"00_dataset": "done"}
    assert "03_img2img/fat" in states(root) and left(root) == []


def test_a_second_writer_is_refused(root):
    (root / "outputs/study/07_evaluate/run.json").unlink()
    from histokit.core import locks

    lock = locks.acquire(root / "outputs/study/07_evaluate")
    try:
        lines = []
        assert run(root, say=lines.append)["07_evaluate"] == "failed"
        assert "another process is writing this run: process" in lines[-1]
    finally:
        lock.release()


def test_a_gpu_that_torch_cannot_use_is_named_when_there_is_work(root, monkeypatch):
    monkeypatch.setattr(batch.machine, "notice", lambda: "The driver sees a GPU")
    done, again = [], []
    run(root, say=done.append)
    run(root, say=again.append, force=["07_evaluate"], yes=True)
    assert "The driver sees a GPU" not in done and again[0] == "The driver sees a GPU"


SLOW = "import time\nfor i in range(600): time.sleep(0.1) if not run.path('go').exists() else None"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_runner_takes_its_kernel_with_it_and_the_next_run_goes_on(root, how):
    stubs.notebook(root, "10_slow", [], stubs.START, SLOW, "run.finish({})")
    path = stubs.recipe(root, "steps: [10_slow]\n", "slow")
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell's background job ignores it
    process = subprocess.Popen([sys.executable, "-m", "histokit", "run", str(path)], preexec_fn=restore, start_new_session=True)
    record = root / "outputs/slow/10_slow/run.json"
    wait(lambda: record.exists() and files.read_json(record)["status"] == "running")
    kernel = files.read_json(record)["pid"]
    process.send_signal(how)
    assert process.wait() != 0
    wait(lambda: not alive(kernel))
    (state,) = map(jobs.look, jobs.expand(recipe.read(path)))
    assert state.state in ("interrupted", "failed")
    (root / "outputs/slow/10_slow/go").touch()
    assert batch.run(recipe.read(path), say=lambda line: None)["10_slow", ""].state == "done"
    assert files.read_json(record)["attempt"] == 2


def test_threads_are_shared_out_unless_the_user_fixed_them(monkeypatch, tmp_path):
    job = jobs.Job("x", "", tmp_path / "x.ipynb", tmp_path, {}, ())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert batch.environment(tmp_path, job, 2)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    given = batch.environment(tmp_path, job, 2)
    assert given["OMP_NUM_THREADS"] == given["MKL_NUM_THREADS"] == "3", "torch takes the larger of the two"
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert batch.environment(tmp_path, job, 2)["GOMP_SPINCOUNT"] == "1000"  # or threads spin on cores that others need


def test_a_copy_to_open_has_the_values_and_the_same_code(root):
    job = next(j for j in jobs.expand(read(root, "strength=0.7")) if j.name == "03_img2img/fat")
    copy = notebooks.write_copy(job.notebook, root / "outputs/study/.open/x.ipynb", job.parameters)
    cells = json.loads(copy.read_text())["cells"]
    assert cells[1]["metadata"]["tags"] == ["injected-parameters"] and "strength = 0.7" in cells[1]["source"]
    from histokit.runs import keys

    assert keys.code(copy) == keys.code(job.notebook)


def test_what_a_running_kernel_says_reaches_the_terminal_and_a_log_once_a_minute(tmp_path, monkeypatch):
    log = tmp_path / "02_lora.log"
    running = batch.Running(jobs.Job("02_lora", "", tmp_path / "x.ipynb", tmp_path, {}, ()), None, None, None, log, {})
    assert batch._shown(running).startswith("02_lora 0")
    monkeypatch.setenv(progress.FILE, str(log.with_suffix(".progress")))
    show = progress.Progress(100)
    show({"step": 40, "images_per_s": 5.0, "peak_gb": 1.0}, 0.25)
    assert ": step 40/100   loss 0.2500" in batch._shown(running)
    said, now = [], [0.0]
    tick = terminal.a_minute(said.append, lambda: now[0])
    for now[0] in (1, 59, 61, 62, 119, 122):
        tick(f"at {now[0]}")
    assert said == ["  at 61", "  at 122"]
    monkeypatch.setenv(progress.FILE, str(tmp_path / "no folder" / "x"))
    show({"step": 100, "images_per_s": 5.0, "peak_gb": 1.0}, 0.25)  # nothing that goes wrong here ends the loop
