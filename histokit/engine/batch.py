"""Run the jobs of a recipe on this machine, each in a process of its own.

A job that is done under the same key is skipped without starting a kernel. A failed class stops what depends on it; other
chains finish. Whatever papermill returned, a job succeeded only if its `run.json` says so (a killed kernel leaves a
notebook in which every cell is "completed").
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from histokit import runs
from histokit.core import files, machine, progress
from histokit.engine import jobs, warm
from histokit.runs import places
from histokit.runs.recipe import RecipeError, nearest

ASK_ABOVE = 600  # seconds of finished work that may be redone without asking
GOOD = ("done", "up to date")


@dataclass
class Result:
    state: str  # done | up to date | failed | not run | left out
    text: str = ""
    seconds: float | None = None


@dataclass
class Running:
    job: jobs.Job
    process: subprocess.Popen
    answer: Path
    target: Path
    log: Path
    before: dict
    started: float = field(default_factory=time.time)


def select(recipe, found, only=(), classes=()):
    """The jobs meant by --only (step ids) and --classes; RecipeError names the nearest valid name."""
    for id in only:
        if id not in recipe.steps:
            raise RecipeError(f"no step {id!r} in {recipe.path}{nearest(id, recipe.steps)}")
    names = list(dict.fromkeys(j.class_name for j in found if j.known and j.class_name not in ("", "all")))
    wanted = [j for j in found if not only or j.step in only]
    if all(j.known and (j.sure or not _datasets(wanted)) for j in found):
        for name in classes:
            if name not in names:
                raise RecipeError(f"no step of {recipe.path} runs for class {name!r}{nearest(name, names)}")
    return [j for j in wanted if not classes or not j.known or j.class_name in ("", "all", *classes)]


def _datasets(found):
    return [j for j in found if j.notebook.stem == "00_dataset"]


def due(states, force=()):
    """States of the jobs that may have to run: not done, forced, or downstream of such a one."""
    moving = {}
    for s in states:
        if s.state != "done" or s.job.step in force or any(p in moving for p in s.job.parents):
            moving[s.job.id] = s
    return list(moving.values())


def redo(states, force=()):
    """Those of `due` that have finished before."""
    return [s for s in due(states, force) if s.state in ("done", "stale")]


def run(recipe, *, only=(), classes=(), force=(), workers=1, yes=False, say=print, tick=None, ask=None, root=None):
    """Run what is not done yet.

    Args:
        recipe: as `recipe.read` returns it.
        only, classes, force: step ids and class names to keep to, step ids to redo.
        workers: jobs at a time; each kernel gets its share of the cores.
        yes: redo more than ten minutes of finished work without asking.
        say: called with one line per job that ended.
        tick: called several times a second with one line about what is running.
        ask: called with a question, returns an answer; None where nobody can be asked.

    Returns:
        {(step, class): Result} of every selected job.

    Raises:
        RecipeError before anything starts, also when a redo of over ten minutes is not confirmed.
    """
    root = Path(root or files.root())
    found = jobs.expand(recipe, root)
    select(recipe, found, only=force)
    session = _Session(recipe, root, force, workers, say, tick)
    states = [session.look(j) for j in select(recipe, found, only, classes)]
    _confirm(redo(states, force), yes, say, ask)
    if only:
        session.check_parents(states, found)
    moving = due(states, force)
    if moving and (unused := machine.notice()):
        say(unused)

    with session.warmed(len(moving)):
        first = _datasets(s.job for s in states)
        if first and any(not s.job.known or s in moving for s in states):
            session.work(first, found)  # the classes of all later jobs follow from it
            found = jobs.expand(recipe, root)
            session.states.clear()
        # else it would be read beside, or instead of, what runs now
        if moved := [name for folder, name in jobs.leftovers(found).items() if places.retire(folder)]:
            say(f"set aside, as {recipe.name} does not ask for it any more: {', '.join(moved)}; kept in outputs/{recipe.experiment}/.old")
        session.work(select(recipe, found, only, classes), found)
    return session.results


def _confirm(again, yes, say, ask):
    for s in again:
        if s.state == "stale":
            say(f"stale: {s.job.name}: {s.why}")
    seconds = sum(s.seconds or 0 for s in again)
    if seconds <= ASK_ABOVE or yes:
        return
    names = ", ".join(s.job.name for s in again)
    text = f"finished work would be redone ({names}), about {duration(seconds)}"
    if ask is None:
        raise RecipeError(f"{text}; nothing started. Say --yes to redo them (the old ones move to .old), or use --only")
    if ask(f"{text}; the old ones move to .old. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise RecipeError("nothing started")


class _Session:
    """The jobs of one `histokit run`: what ended how, and what is running now."""

    def __init__(self, recipe, root, force, workers, say, tick):
        self.root, self.force, self.workers, self.say, self.tick = root, set(force), workers, say, tick
        self.results, self.states, self.running, self.keep = {}, {}, [], False
        self.scratch = root / "outputs" / recipe.experiment / ".jobs" / str(os.getpid())
        for left in self.scratch.parent.glob("*"):  # of runs that were killed
            if time.time() - left.stat().st_mtime > 7 * 86400:
                shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def warmed(self, count):
        """Within the `with` kernels start warm where that pays, which it does not for a single job."""
        self.warm = warm.Warm(self.root, environment(self.root, "", self.workers)) if count > 1 and warm.pays() else None
        try:
            yield
        finally:
            if self.warm:
                self.warm.close()

    def look(self, job):
        """The job's state on disk, read once unless a parent was run since."""
        fresh = any(self.results[p].state == "done" for p in job.parents if p in self.results)
        if fresh or job.id not in self.states:
            self.states[job.id] = jobs.look(job)
        return self.states[job.id]

    def check_parents(self, states, found):
        """For --only: RecipeError when a step that is left out has not finished."""
        chosen = {s.job.id for s in states}
        for s in states:
            lacking = [p for p in s.job.parents if p not in chosen and not self._there(p, found)]
            if lacking:
                names = ", ".join(dict.fromkeys(step for step, _ in lacking))
                raise RecipeError(f"{s.job.name} needs {names}, which has not finished; add it to --only, or leave --only away")
            if not s.job.known and not _datasets(other.job for other in states):
                raise RecipeError(f"{s.job.step}: {s.job.class_name.strip('<>')}, which is stale; add it to --only, or leave --only away")

    def _there(self, id, found):
        return any(j.id == id and self.look(j).state in ("done", "stale") for j in found)

    def work(self, chosen, found):
        """Run the chosen jobs in order of their parents; returns when all have ended."""
        waiting = [j for j in chosen if j.id not in self.results]
        width = max((len(j.name) for j in found if j.known), default=0)
        try:
            while waiting or self.running:
                for job in list(waiting):
                    if len(self.running) < self.workers and self._settled(job, waiting):
                        waiting.remove(job)
                        self._begin(job, found, width)
                for r in [r for r in self.running if r.process.poll() is not None]:
                    self.running.remove(r)
                    self._note(r.job, self._end(r), width)
                if self.running:
                    if self.tick:
                        self.tick(", ".join(map(_shown, self.running)))
                    time.sleep(0.05)
        finally:
            for r in self.running:
                r.process.stdin.close()  # the worker kills its kernel and ends
            for r in self.running:
                r.process.wait()
            if not self.keep:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def _settled(self, job, waiting):
        busy = {j.id for j in waiting} | {r.job.id for r in self.running}
        return not any(p in busy for p in job.parents)

    def _begin(self, job, found, width):
        """Start a job, or say at once why it is not started."""
        bad = [p for p in job.parents if p in self.results and self.results[p].state not in GOOD]
        out = [p for p in job.parents if p not in self.results and not self._there(p, found)]
        if bad or out:
            names = ", ".join("/".join(filter(None, p)) for p in (bad or out))
            left = all(self.results[p].state == "left out" for p in bad)
            self._note(job, Result("left out" if left else "not run", f"needs {names}"), width)
            return
        if not job.known:  # 00 has finished, and its data has changed again since
            self._note(job, Result("not run", job.class_name.strip("<>")), width)
            return
        found_now = self.look(job)
        if found_now.state == "done" and job.step not in self.force:
            self._note(job, Result("up to date"), width)
        elif found_now.state == "running":
            self._note(job, Result("failed", f"another process is writing this run: {found_now.why}"), width)
        else:
            for p in job.parents:
                if p not in self.results and self.states[p].state == "stale":
                    self.say(f"note: {job.name} reads {'/'.join(filter(None, p))}, which is stale: {self.states[p].why}")
            self.running.append(self._start(job))

    def _start(self, job):
        self.scratch.mkdir(parents=True, exist_ok=True)
        answer, target, log = (self.scratch / f"{job.stem}{end}" for end in (".json", ".ipynb", ".log"))
        spec = {"notebook": job.notebook, "target": target, "answer": answer, "root": self.root, "parameters": job.parameters}
        line = self.warm.line() if self.warm else None
        fds = [line.fileno()] if line else []
        with open(log, "wb") as stream, line or contextlib.nullcontext():
            process = subprocess.Popen(
                [sys.executable, "-m", "histokit.engine.worker", *map(str, fds)],
                stdin=subprocess.PIPE, stdout=stream, stderr=stream, cwd=self.root, pass_fds=fds,
                env=environment(self.root, job.notebook, self.workers) | {progress.FILE: str(log.with_suffix(".progress"))},
            )  # fmt: skip
        process.stdin.write(json.dumps(spec, default=str).encode() + b"\n")
        process.stdin.flush()
        return Running(job, process, answer, target, log, _run_json(job.folder))

    def _end(self, r):
        """The Result of a process that ended; the executed notebook moves into the run folder."""
        r.process.stdin.close()
        seconds = time.time() - r.started
        answer = files.read_json(r.answer) if r.answer.exists() else {"error": "the job's process was killed", "text": "", "cell": None}
        after = _run_json(r.job.folder)
        mine = after and after != r.before
        shown = r.target
        if mine and r.target.exists():
            shown = r.job.folder / r.job.notebook.name
            os.replace(r.target, shown)
        if mine and after["status"] == "done" and (not answer or answer["error"] == "Finished"):
            return Result("done", "", seconds)
        if not answer:
            answer = {"error": "run.json does not say done", "text": "the notebook must end with run.finish(...)", "cell": None}
        message = f"{answer['error']}: {answer['text']}" if answer["text"] else answer["error"]
        if mine and after["status"] == "running":
            runs.mark_failed(r.job.folder, message)
        cell = f", In [{answer['cell']}]" if answer["cell"] else ""
        where = shown if shown.exists() else r.log
        self.keep |= self.scratch in where.parents
        return Result("failed", f"{message}\n    {_short(where, self.root)}{cell}", seconds)

    def _note(self, job, result, width):
        self.results[job.id] = result
        time_taken = duration(result.seconds) if result.seconds is not None else ""
        reason = result.text.splitlines()[0] if result.text else ""
        self.say(f"{job.name:<{width}}  {result.state:<10}  {time_taken:>7}  {reason}".rstrip())


def _shown(running):
    """A running job in a few words: its name, how long it runs, and what its loop says."""
    try:
        said = running.log.with_suffix(".progress").read_text(encoding="utf-8")
    except OSError:
        said = ""
    return f"{running.job.name} {duration(time.time() - running.started)}" + (f": {said}" if said else "")


def environment(root, notebook, workers):
    """The environment of a job's kernel: the root, the notebook's file, and a fixed number of threads, see `machine.KERNEL`."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    env = {**machine.KERNEL, **os.environ, "HISTOKIT_ROOT": str(root), "HISTOKIT_NOTEBOOK": str(notebook)}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        env.setdefault(name, threads)
    return env


def _run_json(folder):
    path = Path(folder) / "run.json"
    return files.read_json(path) if path.exists() else {}


def _short(path, root):
    return path.relative_to(root) if path.is_relative_to(root) else path


def summary(results, recipe, root=None):
    """The last lines of a run: every failure with its notebook and cell, then the verdict."""
    lines = []
    for id, result in results.items():
        if result.state == "failed":
            lines += ["", f"FAILED {'/'.join(filter(None, id))}: {result.text}"]
    stopped = ["/".join(filter(None, id)) for id, r in results.items() if r.state == "not run"]
    if stopped:
        lines.append(f"not run for that reason: {', '.join(stopped)}")
    home = Path(root or files.root()) / "outputs" / recipe.experiment
    for id, result in results.items():
        written = home / id[0] / "results.json"
        if result.state in GOOD and recipe.steps[id[0]].notebook.stem == "07_evaluate" and written.exists():
            sentence = files.read_json(written).get("sentence")
            lines += ["", str(sentence)] if sentence else []
    return lines


def duration(seconds):
    """Seconds as one reads them: 41 s, 12 min, 3.5 h."""
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
