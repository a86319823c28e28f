"""Where run folders lie and how they are named; which of them are finished. Nothing here writes into one.

outputs/<experiment>/<step>/[<class> | all]/            a run: run.json and its files
outputs/<experiment>/.old/<step>/[<class>/]<run_id>/    the runs it replaced
"""

import contextlib
import os
import re
from contextvars import ContextVar
from pathlib import Path

from histokit.core import files, locks
from histokit.runs import keys

RECORD = "run.json"
SHARDS = "shards"
REPLICATE = re.compile(r"(.*?)(?:-d([1-9]\d*))?(?:-g(\d+))?", re.DOTALL)  # experiment, draw, generator
_unseen = ContextVar("unseen", default=())


def folder(experiment, step, class_name="", shard=""):
    """outputs/<experiment>/<step>/[<slug of class> | all]/ of the working root, with shards/<k>/ below for one shard of several."""
    for what, name in (("experiment", experiment), ("step", step)):
        if not name or name.startswith(".") or name != name.strip() or re.search(r'[/\\:*?"<>|\x00-\x1f]', name):
            raise ValueError(f"{what} {name!r} cannot be a folder name; use letters, digits, dash and underscore")
    path = files.root() / "outputs" / experiment / step
    if class_name:
        path /= class_name if class_name == "all" else files.slug(class_name)
    k, n = share(shard or "0/1")
    return path / SHARDS / str(k) if n > 1 else path


def share(shard):
    """(k, n) of "k/n": this process makes the k-th of n parts, counted from 0; ValueError for another text."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard is {shard!r}; expected k/n with k from 0 to n - 1, such as 0/4 to 3/4")
    return int(found[1]), int(found[2])


def shards(folder):
    """Folders of the shards of a run, and the run of a shard: where its pictures may have been made already."""
    own = folder.parent.parent if folder.parent.name == SHARDS else None
    return [*sorted((folder / SHARDS).glob("*/")), *([own] if own else [])]


def read(folder):
    """run.json of a folder, or None when there is none that can be read."""
    try:
        record = files.read_json(Path(folder) / RECORD)
        return record if isinstance(record, dict) and "status" in record else None
    except (OSError, ValueError):
        return None


def find(experiment, step, class_name):
    """The folder of a finished run of `step`: of the class, else over all, else the step itself; None without one.

    A generator replicate, <experiment>-g1, has only what its seed changes; the rest is found in <experiment>.
    """
    wanted = [class_name] if class_name else []
    places = [folder(name, step, part) for name in lineage(experiment) for part in (*wanted, "all", "")]
    return next((place for place in places if _finished(place)), None)


def _finished(place):
    """run.json of a finished run that is not to be looked through, else None."""
    record = None if place in _unseen.get() else read(place)
    return record if record and record["status"] == "done" else None


@contextlib.contextmanager
def without(folders):
    """In this block `find` and `find_all` answer as if these run folders had been set aside."""
    token = _unseen.set(tuple(folders))
    try:
        yield
    finally:
        _unseen.reset(token)


def replicate(experiment, draw=0, generator=0):
    """The name of a replicate's experiment; draw 0 and generator 0 are the experiment itself. `replicated` reads it back."""
    return experiment + (f"-d{draw}" if draw else "") + (f"-g{generator}" if generator else "")


def replicated(name):
    """(experiment, draw, generator) that `replicate` made a name of; nothing else reads them out of one."""
    experiment, draw, generator = REPLICATE.fullmatch(name).groups()
    return experiment, int(draw or 0), int(generator or 0)


def lineage(experiment):
    """The experiment, and the one it replicates with another generator seed, where it reads what it has not made itself."""
    source, draw, _ = replicated(experiment)
    return list(dict.fromkeys((experiment, replicate(source, draw))))


def find_all(experiment, step):
    """{class name: folder} of every finished run of `step`, in the experiment or else in the one it replicates."""
    for name in lineage(experiment):
        top, found = folder(name, step), {}
        for path in sorted([top, *top.glob("*/")]):
            if record := _finished(path):
                found[record.get("class_name", "")] = path
        if found:
            return found
    return {}


def output_files(folder):
    """The files a run made, sorted: all but run.json, the lock, executed notebooks, logs/ and hidden ones."""
    found, home = [], Path(folder)
    for top, folders, names in os.walk(home):
        inner = Path(top) != home
        if inner and RECORD in names:  # another run, such as a class below its step
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and (inner or name != "logs")]
        kept = (name for name in names if not name.startswith(".") and name not in (RECORD, locks.NAME) and not name.endswith(".ipynb"))
        found += [Path(top) / name for name in kept]
    return sorted(found)


def leftovers(top, parts):
    """Runs of a step that no reader should find any more: those of classes, or of a layout, that its recipe does not have now.

    Args:
        top: folder of the step.
        parts: names below it that the recipe has: class folders, "all", or "" for the step's own.

    Returns:
        Run folders, finished or dead; never one in which a process writes.
    """
    found = [path for path in sorted(top.glob("*/")) if path.name not in parts and read(path)]
    if "" not in parts and read(top) and not any((top / part).exists() for part in parts):  # it would move with all below it
        found.append(top)
    return [path for path in found if not written(path)]


def written(folder):
    """True while a process writes into this run folder, or a shard of it, or a class below it."""
    holders = [locks.read(path) for path in (folder, *folder.glob("*/"), *folder.glob("shards/*/"))]
    return any(holder and not locks.stale(holder) for holder in holders)


def retire(folder):
    """Sets a leftover aside; False when somebody began to write there."""
    with locks.alone(folder.parent):
        record = read(folder)
        if record is None or written(folder):
            return False
        set_aside(folder, record.get("run_id"))
        return True


def shelf(folder):
    """Where older folders of this place go: outputs/<experiment>/.old/<step>/[<class>/]."""
    parts = folder.relative_to(files.root() / "outputs").parts
    return files.root().joinpath("outputs", parts[0], ".old", *parts[1:])


def set_aside(folder, run_id):
    """Moves a whole run folder to its shelf in one step."""
    target = shelf(folder) / (run_id or f"unknown-{os.urandom(4).hex()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    while target.exists():
        target = target.with_name(target.name + "x")
    os.rename(folder, target)


def stored(path):
    """How run.json names a file: relative to the working root, "package:..." for built-in weights, else absolute."""
    if str(path).startswith("package:"):
        return str(path)
    path = Path(os.path.abspath(files.root() / Path(path).expanduser()))
    for base, prefix in ((keys.PACKAGE, "package:"), (files.root(), "")):
        if path.is_relative_to(base):
            return prefix + path.relative_to(base).as_posix()
    return str(path)


def restored(name):
    return keys.PACKAGE / name[8:] if name.startswith("package:") else files.root() / name


def relative(path):
    path = Path(path)
    return path.relative_to(files.root()).as_posix() if path.is_relative_to(files.root()) else str(path)


def size(path):
    try:
        return path.stat().st_size
    except OSError:
        return -1
