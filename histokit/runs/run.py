"""Run folders: where a notebook writes, what it depended on, and whether it finished.

`start` opens outputs/<experiment>/<step>/[<class>/] under a lock and writes run.json as `running`; `Run.finish` writes the result,
a hash of every file, and `done`. Between the two, whatever kills the process leaves a folder that the next start can resume.
Whether a folder still holds what its parameters, code and inputs would give is asked in `states`.
"""

import atexit
import datetime
import functools
import os
import platform
import shutil
import socket
import time
from pathlib import Path

from histokit.core import files, locks
from histokit.core.machine import commit, device, memory, notice, threads, versions
from histokit.runs import keys, places, states
from histokit.runs.places import folder

__all__ = ["Run", "folder", "notice", "parameters", "start", "versions"]

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
BIG = 100_000  # rows above which a manifest is parquet


def parameters(namespace):
    """The annotated values of the parameters cell, from globals(); an int given for a float becomes one, other types raise."""
    found = {}
    for name, kind in namespace.get("__annotations__", {}).items():
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        if kind not in TYPES or name not in namespace:
            continue
        value = namespace[name]
        if kind == "float" and type(value) is int:
            value = float(value)
        if type(value) is not TYPES[kind]:
            raise TypeError(f"parameter {name} is declared {kind}, got {type(value).__name__} {value!r}")
        found[name] = value
    return found


def start(*, experiment, step, recipe="", class_name="", seed=0, **parameters):
    """Opens the run folder of a step, locked, with run.json first.

    An interrupted run with the same key is resumed in place; a finished one, or one with another key, moves to
    outputs/<experiment>/.old/ and the fields that changed are printed.

    Returns:
        Run.

    Raises:
        locks.Locked when another process is writing there; ValueError for names that cannot be folders.
    """
    given = dict(parameters, experiment=experiment, step=step, recipe=recipe, class_name=class_name, seed=seed)
    place = places.folder(experiment, step, class_name, given.get("shard", ""))
    notebook = keys.find_notebook(step)
    key = states.key(given, notebook)
    place.parent.mkdir(parents=True, exist_ok=True)
    with locks.alone(place.parent):
        place.mkdir(exist_ok=True)
        beaten = (locks.read(place) or {}).get("age")
        lock = locks.acquire(place)
        try:
            old = places.read(place)
            changes = states.changes(old, key) if old else []
            resume = bool(old) and old.get("status") in ("running", "failed") and "key" in old and not changes
            if resume:
                files.sweep(place)
            elif (old and "key" in old) or places.output_files(place):
                if busy := [path.name for path in sorted((place / places.SHARDS).glob("*/")) if places.written(path)]:
                    raise locks.Locked(
                        f"{places.relative(place)}: shard {', '.join(busy)} is still being made; wait for it, or stop that process"
                    )
                lock.release()
                places.set_aside(place, (old or {}).get("run_id"))
                place.mkdir(parents=True)
                lock = locks.acquire(place)
            run = Run(place, given, key, lock, old if resume else None, beaten)
            run._save(notebook=str(notebook or ""))
        except BaseException:
            lock.release()
            raise
    run._note_inputs()
    _announce(run, changes if old and not resume else [], resume)
    return run


class Finished(Exception):
    """Ends a page before its last cell, where its run is done; see `Run.end`."""


class Run:
    """An open run folder; see `start`."""

    def __init__(self, place, given, key, lock, resumed=None, beaten=None):
        self.folder, self.parameters, self._lock = place, files.plain(given), lock
        self.experiment, self.step, self.class_name = given["experiment"], given["step"], given["class_name"]
        self.recipe, self.seed = given["recipe"], given["seed"]
        _, _, self.generator_seed = places.replicated(self.experiment)  # 0 but in a replicate of --generator-seeds
        self._clock = time.time()
        atexit.register(lock.release)
        if resumed:
            self.record = resumed
            spent = max(0.0, self._clock - (beaten or 0) - resumed.get("started_s", self._clock)) if beaten is not None else 0
            self.record["earlier_s"] = round(resumed.get("earlier_s", 0) + spent, 1)
            self.record["attempt"] = resumed.get("attempt", 1) + 1
            self.record.pop("error", None)
        else:
            stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
            self.record = {"run_id": f"{stamp}-{os.urandom(2).hex()}", "attempt": 1, "earlier_s": 0.0, "notes": {}}
        self.run_id = self.record["run_id"]
        facts = {name: given[name] for name in ("experiment", "step", "class_name", "recipe", "seed")}
        facts["generator_seed"] = self.generator_seed
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.record |= {"status": "running", **facts, "parameters": self.parameters, "key": key, "inputs": {}, "parents": []}
        self.record |= {"versions": versions(), "commit": commit(), "platform": platform.platform(), "host": socket.gethostname()}
        self.record |= {"pid": os.getpid(), "threads": threads(), "started": now, "started_s": self._clock}

    def __repr__(self):
        return f"Run({places.relative(self.folder)}, {self.record['status']})"

    @functools.cached_property
    def device(self):
        """Where to compute, "cuda", "mps" or "cpu"; recorded once asked for."""
        found = device()
        self.record["device"] = found
        return found

    @property
    def previous(self):
        """The latest folder of this step and class that was set aside, or None; a resumed run sees the same one."""
        shelf = places.shelf(self.folder)
        return max((path for path in shelf.glob("*T*-*") if (path / places.RECORD).is_file()), key=lambda path: path.name, default=None)

    def twin(self, *but):
        """The latest folder set aside whose run differs from this one in the parameters `but` at most, its inputs unchanged; or None."""
        for path in sorted(places.shelf(self.folder).glob("*T*-*"), key=lambda path: path.name, reverse=True):
            record = places.read(path)
            if record and "key" in record:
                was = record["key"]["parameters"]
                same = {**self.record["key"]["parameters"], **{name: was[name] for name in but if name in was}}
                if not states.changes(record, {**self.record["key"], "parameters": same}):
                    return path
        return None

    def path(self, *names):
        """A path inside the run folder, its parents made; raises when it leads outside or the lock was lost."""
        self._alive()
        if not names:
            return self.folder
        name = "/".join(str(name) for name in names)
        files.inside(self.folder, name)
        path = self.folder / name  # as the folder is called, also where outputs/ is a link
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def generator(self, *parts):
        """A torch.Generator on the CPU whose seed follows from the run seed and `parts`, such as ("necrosis", 12)."""
        import torch

        return torch.Generator().manual_seed(files.seed(self.seed, *parts))

    def input(self, path, patterns=keys.PATTERNS):
        """Records a file, or the files of a folder that match `patterns`, as read by this run; returns its Path."""
        return self._record_input(path, lambda found: keys.record(found, patterns))

    def listing(self, path, patterns=("*",)):
        """Records names, sizes and times of a large folder's files (a data set), contents unread; returns its Path."""
        return self._record_input(path, lambda found: keys.listing(found, patterns))

    def _record_input(self, path, facts):
        name = places.stored(path)
        self.record["inputs"][name] = facts(places.restored(name))
        self._save()
        return places.restored(name)

    def parent(self, step, class_name=None, experiment=""):
        """The folder of the finished run of `step` for this class: its own, else `all`, else the step's only one.

        `experiment`: another one than the run's own, such as a replicate of it.
        """
        wanted = self.class_name if class_name is None else class_name
        found = places.find(experiment or self.experiment, step, wanted)
        if found is None:
            raise FileNotFoundError(_missing(self, step, wanted, experiment or self.experiment))
        self._record_parent(step, wanted, {places.relative(found): places.read(found)["outputs_sha256"]}, experiment)
        return found

    def parents(self, step):
        """{class name: folder} of every finished run of `step`; {"": folder} when it runs once."""
        found = places.find_all(self.experiment, step)
        if not found:
            raise FileNotFoundError(_missing(self, step, ""))
        self._record_parent(step, "*", {places.relative(path): places.read(path)["outputs_sha256"] for path in found.values()})
        return found

    def base(self, name):
        """What `backbone.load` takes for the base model `name`: the folder of the finished step that trained it, else the name itself."""
        a_step = name and Path(name).name == name and places.find(self.experiment, name, "")
        return places.relative(self.parent(name)) if a_step else name

    def folders(self, step):
        """Folders of the finished runs of `step` that this run builds on: that of its class, else of every class; [] for no step."""
        if not step:
            return []
        return list(self.parents(step).values()) if self.class_name in ("", "all") else [self.parent(step)]

    def _record_parent(self, step, class_name, hashes, experiment=""):
        request = {"step": step, "class_name": class_name, "found": hashes} | ({"experiment": experiment} if experiment else {})
        if request not in self.record["parents"]:
            self.record["parents"].append(request)
            self._save()

    def note(self, **facts):
        """Adds facts worth keeping (batch size, images per second) to run.json."""
        self.record["notes"] |= files.plain(facts)
        self._save()

    def finish(self, result=None):
        """Writes the result (a DataFrame as manifest, a dict as results.json), hashes every file and marks the run done."""
        self._alive()
        if isinstance(result, dict):
            files.write_json(self.folder / "results.json", result)
        elif result is not None:
            result = result.drop(columns="path", errors="ignore")  # absolute paths live in memory only
            files.write_table(self.folder / ("manifest.parquet" if len(result) > BIG else "manifest.csv"), result)
        files.sweep(self.folder)
        if not any(places.written(path) for path in (self.folder / places.SHARDS).glob("*/")):
            shutil.rmtree(self.folder / places.SHARDS, ignore_errors=True)  # gathered: what they made is linked here
        outputs = {}
        for path in places.output_files(self.folder):
            outputs[path.relative_to(self.folder).as_posix()] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
        seconds = time.time() - self._clock
        self.record |= {"outputs": outputs, "outputs_sha256": files.digest({name: facts["sha256"] for name, facts in outputs.items()})}
        self.record |= {"memory_gib": memory(), "threads": threads(), "wall_s": round(seconds + self.record["earlier_s"], 1)}
        self.record |= {"finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        self._save(status="done")
        self._lock.release()
        atexit.unregister(self._lock.release)
        took = self.record["wall_s"]
        print(f"done: {places.relative(self.folder)}, {len(outputs)} files, {f'{took / 60:.1f} min' if took > 99 else f'{took:.1f} s'}")

    def end(self, result):
        """`finish`, and no cell after this one: for a part of a set that leaves the rest of the page to the run of the whole."""
        self.finish(result)
        raise Finished("this part is done; a run of shard 0/1 does the rest of the page")

    def _note_inputs(self):
        """Records the files and folders that parameters name, and the built-in weights."""
        named = {name: value for name, value in self.parameters.items() if name not in (*keys.PLACE, "class_name")}
        for name, text in _texts(named):
            if name in ("folder", "shards"):  # any number of tiles; who reads them lists them
                continue
            weights = name.startswith("base_model") or "encoder" in name
            if text == "mini" or (text.startswith("mini-") and weights):
                if (keys.PACKAGE / "mini").is_dir():
                    self.input("package:mini")
                continue
            path = os.path.join(files.root(), os.path.expanduser(text))
            is_step = "/" not in text and os.path.exists(files.root() / "outputs" / self.experiment / text)
            if text and not is_step and (os.path.isfile(path) or (os.path.isdir(path) and (weights or "/" in text))):
                self.input(path)

    def _alive(self):
        if self.record["status"] == "done":
            raise RuntimeError(f"{places.relative(self.folder)} is finished; its files do not change any more. Run the notebook again")
        if not self._lock.alive():
            raise RuntimeError(f"{places.relative(self.folder)} was taken over by a later start; this run must not write there any more")

    def _save(self, **facts):
        self._alive()
        files.write_json(self.folder / places.RECORD, self.record | facts)
        self.record |= facts


def _missing(run, step, class_name, experiment=""):
    experiment = experiment or run.experiment
    top = places.folder(experiment, step)
    half = [path for path in (top, *top.glob("*/")) if (places.read(path) or {}).get("status") in ("running", "failed")]
    state = f"; {places.relative(half[0])} is {places.read(half[0])['status']}" if half else ""
    others = "" if class_name else "; per-class results are read with run.parents"
    how = f"`histokit run {run.recipe} --only {step}`" if run.recipe else f"the notebook of {step} with experiment {experiment!r}"
    how = how if experiment == run.experiment else f"`histokit run {run.recipe or 'RECIPE'} --draws N --generator-seeds N`"
    where = f" for class {class_name!r}" if class_name not in ("", "all") else ""
    return f"no finished run of {step}{where} in outputs/{experiment}{state}. Make it with {how}{others}"


def _announce(run, changes, resume):
    """One line where the run writes, one on what became of the old folder, one when a GPU is left unused."""
    again = f", attempt {run.record['attempt']}, resumed" if resume else ""
    print(f"{places.relative(run.folder)} (run {run.run_id}, seed {run.seed}){again}")
    if changes:
        print(f"  changed: {'; '.join(changes)}")
    if run.previous and not resume:
        print(f"  the folder before it is kept in {places.relative(run.previous)}")
    if idle := notice():
        print(idle)


def _texts(tree, name=""):
    """(name, text) of every str in nested parameters."""
    if isinstance(tree, str):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, name)
