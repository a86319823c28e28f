"""A part of 20_pretrain on one device or on several: what is trained is made from the run's parameters, wherever it is made.

Several processes, one a GPU, share the micro-batches of an update (`loop`). The notebook starts them by torch's launcher, and
`accelerate launch --num_processes N -m histokit join RUN` does the same by hand, on one machine or many. Their checkpoint is the
notebook's: it goes on from there, alone, and has nothing left to train.
"""

import datetime
import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import torch

from histokit.core import files, machine
from histokit.runs import places
from histokit.training import checkpoints, lineage, loop
from histokit.training.pretraining import corpus, pretrain

VERSION = 1
HOW = ("objective", "pieces", "critic", "classifier", "widths", "tile_px", "batch_size", "lr", "network", "loss", "latents_gb")
PATIENCE = datetime.timedelta(days=2)  # that a process waits for another, which may be encoding a million tiles
TOLD = 30  # last lines of the others that an error shows


def corpora(run, given):
    """(what is learned from, what is validated on): corpus.Corpus of the parameters `given`, held-out pictures of the same sources."""
    return tuple(corpus.gather(given["sources"], given["roots"], given["seed"], split=split, run=run) for split in ("train", "val"))


def origins(run, given):
    """{"autoencoder", "init"}: folders of the bases that the parameters name, None where they name none."""
    return {name: lineage.origin(run, given[name]) for name in ("autoencoder", "init")}


def prepared(run, given, seen, held, distance=None):
    """(`pretrain.Task`, identity of its training) of the parameters `given`; `distance` is that of a critic that names LPIPS weights.

    Raises ValueError for a batch that the processes cannot share evenly.
    """
    processes = given["processes"]
    if processes < 1 or given["batch_size"] % processes:
        raise ValueError(f"{processes} processes cannot share a batch of {given['batch_size']}; make batch_size a multiple of processes")
    how, bases = {name: given[name] for name in HOW}, origins(run, given)
    how["batch_size"] //= processes
    task = pretrain.task(given["part"], run, seen, held, steps=given["steps"], distance=distance, device=run.device, **how, **bases)
    asks = {"watching": given["classifier"], "lpips": given["critic"].get("lpips", "")}
    known = lineage.identity(run, seen, held, bases, **asks, **{name: given[name] for name in ("sources", "part", "init")}, **how)
    return task, known


def fit(run, given, task, known):
    """Trains what `prepared` returned; the history of `loop.fit`.

    Of several processes the others are started first, and train; what is left to this one is to read their result.
    """
    steps, processes = given["steps"], given["processes"]
    folder = checkpoints.shared(run, known, steps)
    if processes > 1 and not isinstance(run, Joined) and _done(folder) < steps:
        launch(run.folder, processes)
    return loop.fit(
        task.players, task.batches, steps, given["seed"], folder=folder, identity=known, accumulate=processes, validate=task.validate,
        validate_every=max(50, min(250, steps // 5)), sheet=task.sheet, sheet_every=max(250, steps // 5), **task.settings,
    )  # fmt: skip


def launch(folder, processes):
    """Trains the run in `folder` with so many processes on this machine, one a GPU, and shows what the first one says.

    Raises RuntimeError with their last lines where one of them fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "histokit", "join"]
    env = {**os.environ, "HISTOKIT_ROOT": str(files.root()), "OMP_NUM_THREADS": str(max(1, machine.threads() // processes))}
    last = deque(maxlen=TOLD)
    with subprocess.Popen([*command, str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as others:
        for line in others.stdout:
            last.append(line)
            if line.startswith("step "):
                print(line, end="", flush=True)
    if others.returncode:
        raise RuntimeError(f"{processes} processes were started and ended with status {others.returncode}:\n" + "".join(last))


def join(folder, load_distance):
    """One of several processes: trains the run in `folder` with the others, which the launcher's environment names.

    Args:
        load_distance: `load_distance(weights, device)` -> perceptual distance, for a critic that names LPIPS weights.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    run = Joined(folder, str(state.device))
    given = run.record["parameters"]
    weights = given["critic"].get("lpips")
    task, known = prepared(run, given, *corpora(run, given), load_distance(weights, run.device) if weights else None)
    fit(run, given, task, known)
    state.wait_for_everyone()
    state.destroy_process_group()


class Joined:
    """A run that another process has open, as much of it as a training reads: nothing is recorded here."""

    def __init__(self, folder, device):
        self.folder, self.device = (files.root() / folder).resolve(), device
        self.record = files.read_json(self.folder / places.RECORD)
        self.experiment, self.step, self.seed = (self.record[name] for name in ("experiment", "step", "seed"))

    def path(self, *names):
        path = self.folder.joinpath(*map(str, names))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def parent(self, step):
        found = places.find(self.experiment, step, "")
        if found is None:
            raise FileNotFoundError(f"no finished run of {step} in outputs/{self.experiment}")
        return found

    def parents(self, step):
        return places.find_all(self.experiment, step)

    def base(self, name):
        a_step = name and Path(name).name == name and places.find(self.experiment, name, "")
        return places.relative(self.parent(name)) if a_step else name

    def listing(self, path, patterns=("*",)):
        return path

    input = listing


def _done(folder):
    """Updates that the checkpoint of a training folder has behind it, 0 without one."""
    path = folder / checkpoints.LAST
    return json.loads(files.read_metadata(path)["step"]) if path.is_file() else 0
