"""Two processes that train together give the weights of one, bit for bit: gloo on the CPU stands for several GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import two_processes

from histokit.core import files, machine
from histokit.training import checkpoints


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Folder in which two processes trained, and the weights each of them ended with."""
    home = tmp_path_factory.mktemp("two")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    script = [sys.executable, two_processes.__file__]
    running = [subprocess.Popen([*script, str(rank), str(home / "store"), str(home / "both"), "5"], env=env) for rank in (0, 1)]
    assert [process.wait() for process in running] == [0, 0]
    return home


def test_two_processes_give_the_weights_of_one(together, tmp_path):
    threads = machine.threads()
    machine.use_threads(1)
    try:
        alone = two_processes.train(tmp_path / "one", 5)
    finally:
        machine.use_threads(threads)
    for rank in (0, 1):
        held = files.read_tensors(together / f"rank{rank}.safetensors")
        assert all((held[str(i)] == p).all() for i, p in enumerate(alone))
    one, both = (files.read_tensors(folder / checkpoints.LAST) for folder in (tmp_path / "one", together / "both"))
    assert one.keys() == both.keys() and all((one[key] == both[key]).all() for key in one), "moments and averages too"


def test_a_micro_batch_for_each_process_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "place", lambda: (0, 2))
    with pytest.raises(ValueError, match="accumulate is 3 and there are 2 processes.*make it 2 or a multiple"):
        two_processes.train(tmp_path, 2, accumulate=3)


def test_only_the_first_process_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "place", lambda: (1, 2))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    monkeypatch.setattr(
        "torch.distributed.barrier",
        lambda: (tmp_path / "b").mkdir() or checkpoints.save_weights(tmp_path / "b" / "best.safetensors", [], {}),
    )
    with pytest.raises(KeyError):  # it reads what the first one kept, and here nobody did
        two_processes.train(tmp_path / "b", 2)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["best.safetensors"]
