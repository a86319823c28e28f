"""Kernels that start warm are kernels like any other: they know their job, fail alone, and end with those who wait for them."""

import os
import signal
import subprocess
import sys

import pytest
import stubs
from patience import HANGS, alive, wait

from histokit.core import files, machine
from histokit.engine import batch, warm
from histokit.runs import recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
FACTS = """
import os, random, sys, numpy
files.write_json(run.path('facts.json'), {
    'parent': os.getppid(), 'cwd': os.getcwd(), 'notebook': os.environ['HISTOKIT_NOTEBOOK'], 'first': sys.path[0], 'name': __name__,
    'ahead': 'numpy' in ahead, 'old': [name for name in ahead if name.startswith('histokit')],
    'random': [random.random(), float(numpy.random.rand())], 'backend': os.environ.get('MPLBACKEND'),
})"""
AHEAD = "import sys; ahead = list(sys.modules)"
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
SLOW = "import time\nwhile not run.path('go').exists(): time.sleep(0.05)"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    monkeypatch.setenv("HISTOKIT_WARM", "numpy,no_such_library")
    monkeypatch.setattr(machine, "driver_sees", lambda: "")
    return tmp_path


def study(root, **cells):
    """A recipe of a step for each name, with that cell."""
    for name, cell in cells.items():
        stubs.notebook(root, name, [], AHEAD, stubs.START, cell, "run.finish({})")
    return stubs.recipe(root, f"steps: [{', '.join(cells)}]\n")


def run(path):
    return {step: result for (step, _), result in batch.run(recipe.read(path), say=lambda line: None).items()}


def facts(root, step):
    return files.read_json(root / "outputs/study" / step / "facts.json")


def test_a_warm_kernel_knows_its_job_and_shares_nothing_but_libraries(root):
    path = study(root, **{"10_one": FACTS, "11_two": FACTS})
    assert {result.state for result in run(path).values()} == {"done"}
    one, two = facts(root, "10_one"), facts(root, "11_two")
    assert one["parent"] == two["parent"] != os.getpid(), "they are not forked from one process"
    assert one["ahead"] and not one["old"], "numpy is imported ahead, nothing of histokit is"
    assert one["cwd"] == two["cwd"] == str(root) and one["name"] == "__main__"
    assert [os.path.basename(each["notebook"]) for each in (one, two)] == ["10_one.ipynb", "11_two.ipynb"]
    assert not set(one["random"]) & set(two["random"]), "random numbers go on from the same state"
    assert not alive(one["parent"])


def test_a_cold_kernel_has_the_same_surroundings(root, monkeypatch):
    path = study(root, **{"10_one": FACTS, "11_two": FACTS})
    run(path)
    warm_ones = facts(root, "10_one")
    monkeypatch.setenv("HISTOKIT_WARM", "0")
    batch.run(recipe.read(path), say=lambda line: None, force=["10_one", "11_two"], yes=True)
    cold = facts(root, "10_one")
    assert cold["parent"] != facts(root, "11_two")["parent"] and not cold["ahead"]
    assert {key: cold[key] for key in ("cwd", "notebook", "first", "name", "backend")} == {
        key: warm_ones[key] for key in ("cwd", "notebook", "first", "name", "backend")
    }


def test_a_figure_of_a_warm_kernel_is_in_the_executed_notebook(root, monkeypatch):
    monkeypatch.setenv("HISTOKIT_WARM", "numpy,matplotlib.figure")
    draw = "import matplotlib.pyplot as plt\nassert 'matplotlib.figure' in ahead\nplt.figure(figsize=(1, 1)).gca().plot([1, 2]);"
    path = study(root, **{"10_one": draw, "11_two": "1"})
    assert {result.state for result in run(path).values()} == {"done"}
    book = files.read_json(root / "outputs/study/10_one/10_one.ipynb")
    assert any("image/png" in output.get("data", {}) for cell in book["cells"] for output in cell.get("outputs", []))


def test_a_library_that_breaks_while_it_is_imported_harms_nobody_else(root, monkeypatch):
    (root / "broken_library.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HISTOKIT_WARM", "broken_library,numpy")
    assert run(study(root, **{"10_one": FACTS, "11_two": "1"}))["10_one"].state == "done" and facts(root, "10_one")["ahead"]


def test_a_warm_process_that_dies_before_it_answers_leaves_kernels_cold(root, monkeypatch):
    (root / "deadly_library.py").write_text("import os; os._exit(1)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HISTOKIT_WARM", "deadly_library")
    found = run(study(root, **{"10_one": FACTS, "11_two": FACTS}))
    assert {result.state for result in found.values()} == {"done"} and not facts(root, "11_two")["ahead"]


def test_a_single_job_starts_cold(root, monkeypatch):
    monkeypatch.setattr(warm, "Warm", lambda *given: pytest.fail("a warm process for one kernel"))
    assert run(study(root, **{"10_one": "1"}))["10_one"].state == "done"


def test_a_kernel_that_dies_fails_alone(root):
    path = study(root, **{"10_dead": KILL, "11_left": "import sys\nsys.exit(0)", "12_well": FACTS})
    found = run(path)
    assert "the kernel died" in found["10_dead"].text and "run.json does not say done" in found["11_left"].text
    assert found["12_well"].state == "done" and facts(root, "12_well")["ahead"]


def test_without_its_warm_process_a_kernel_ends_and_the_next_starts_cold(root):
    path = study(root, **{"10_kills": "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)", "11_next": FACTS})
    found = run(path)
    assert "the kernel died" in found["10_kills"].text and found["11_next"].state == "done"
    assert not facts(root, "11_next")["ahead"]
    wait(lambda: not alive(files.read_json(root / "outputs/study/10_kills/run.json")["pid"]))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_runner_takes_kernels_and_the_warm_process_with_it(root, how):
    path = study(root, **{"10_slow": FACTS + "\n" + SLOW, "11_next": "1"})
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell's background job ignores it
    process = subprocess.Popen([sys.executable, "-m", "histokit", "run", str(path)], preexec_fn=restore, start_new_session=True)
    wait(lambda: (root / "outputs/study/10_slow/facts.json").exists())
    kernel, parent = files.read_json(root / "outputs/study/10_slow/run.json")["pid"], facts(root, "10_slow")["parent"]
    process.send_signal(how)
    assert process.wait() != 0
    wait(lambda: not alive(kernel) and not alive(parent))


def test_kernels_are_forked_only_where_no_gpu_driver_could_be_touched(monkeypatch):
    monkeypatch.setenv("HISTOKIT_WARM", "1")
    monkeypatch.setattr(machine, "driver_sees", lambda: "")
    assert (
        warm.pays() == (not os.path.exists("/dev/kfd"))
        and {"torch", "numpy"} <= set(warm.libraries())
        and not any("histokit" in name for name in warm.libraries())
    )
    monkeypatch.setattr(machine, "driver_sees", lambda: "NVIDIA H200")
    assert not warm.pays()


def test_everything_imported_ahead_exists_and_touches_no_gpu_and_starts_no_thread():
    """A fork has one thread: a pool that an import had started would be waited for in vain. jemalloc and OpenBLAS know forks."""
    code = (
        "import importlib, pathlib; from histokit.engine import warm; [importlib.import_module(name) for name in warm.LIBRARIES];"
        "import torch; assert not torch.cuda.is_initialized();"
        "names = [path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm')];"
        "assert len([name for name in names if name != 'jemalloc_bg_thd']) == 1, names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=10 * HANGS, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
