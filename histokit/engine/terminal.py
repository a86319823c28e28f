"""What `histokit run`, its dry run and `histokit status` show in a terminal. The work is in `batch`, `forecast` and `jobs`.

A part is (recipe, step ids to keep to, step ids to redo); there are several where a recipe has replicates.
"""

import functools
import os
import shlex
import sys
import time
from dataclasses import replace

from histokit.core import files
from histokit.engine import batch, forecast, hints, jobs
from histokit.runs import notebooks, places


def run(parts, *, classes, workers, yes):
    """Run what is not done yet of each part and say how it goes; the exit status, 1 where a job failed."""
    live = sys.stdout.isatty()
    clear = "\r\x1b[K" if live else ""
    failed = False
    for recipe, only, force in parts:
        if len(parts) > 1:
            print(f"\n{recipe.experiment}", flush=True)
        results = batch.run(
            recipe, only=only, classes=classes, force=force, workers=workers, yes=yes,
            ask=input if sys.stdin.isatty() else None, say=lambda line: print(clear + line, flush=True),
            tick=(lambda line: print(clear + line[: os.get_terminal_size().columns - 1], end="", flush=True)) if live else a_minute(),
        )  # fmt: skip
        print(*batch.summary(results, recipe), sep="\n")
        failed |= any(r.state in ("failed", "not run") for r in results.values())
        if failed and recipe is not parts[-1][0]:
            print("not run for that reason: the other replicates and what compares them")
            break
    return int(failed)


def a_minute(say=None, clock=time.monotonic, every=60):
    """`tick(line)` for a log: says a line at most once a minute, and not in the first."""
    say, last = say or functools.partial(print, flush=True), [clock()]

    def tick(line):
        if clock() - last[0] >= every:
            last[0] = clock()
            say(f"  {line}")

    return tick


def dry_run(parts, classes):
    """The jobs of each part, how long they may take, and the papermill command of each; the exit status, 0.

    What will stop 00 is said first, and nothing is measured for a run that will not come to it.
    """
    for recipe, only, force in parts:
        if len(parts) > 1:
            print(f"\n{recipe.experiment}")
        found = jobs.expand(recipe)
        states = [jobs.look(j) for j in batch.select(recipe, found, only, classes)]
        again = {s.job.id for s in batch.redo(states, force)}
        todo = [s for s in states if s.state != "done" or s.job.id in again]
        width, asked = _width(states), [s.job.id for s in todo]
        problems, remarks = hints.refusals(recipe, [s.job for s in todo if s.state == "stale" or not jobs.expected(s.job)])
        for line in (*(f"WILL STOP {problem}" for problem in problems), *remarks):
            print(line)
        guesses, lacking = forecast.expect(
            recipe, found, asked, measure=not problems, say=lambda line: print(line, file=sys.stderr, flush=True)
        )
        for s in states:
            state = {"done": "redo" if s.job.id in again else "done", "unknown": ""}.get(s.state, s.state)
            print(f"{s.job.name:<{width}}  {state:<11}  {batch.duration(guesses[s.job.id].seconds):>7}  {s.why}".rstrip())
        print(f"\n{len(todo)} of {len(states)} jobs to run: {_estimate([guesses[s.job.id] for s in todo], lacking)}")
        for line in hints.shorter(recipe, found, [s.job for s in todo], guesses):
            print(line)
        if left := jobs.leftovers(found):
            print(f"set aside first, as {recipe.name} does not ask for it any more: {', '.join(left.values())}")
        if todo:
            print("\neach job by papermill alone, in this order:")
            print(*(_papermill(recipe, s.job) for s in todo), sep="\n")
    return 0


def _papermill(recipe, job):
    """The shell line that does a job without histokit's runner, a remark where its class is not known yet."""
    if not job.known:
        return f"# {job.name}"
    declared = recipe.steps[job.step].declared
    changed = {k: v for k, v in job.parameters.items() if v != declared[k].default}
    target = files.root() / "outputs" / recipe.experiment / f"{job.stem}.ipynb"
    command = notebooks.papermill_command(places.relative(job.notebook), places.relative(target), changed)
    # papermill makes no folder for its output
    return command if target.parent.is_dir() else f"mkdir -p {shlex.quote(places.relative(target.parent))} && {command}"


def _estimate(guesses, lacking):
    judged = [guess for guess in guesses if guess.seconds is not None]
    why = f" ({lacking})" if lacking else ""
    if not judged:
        return f"time and disk unknown{why}" if guesses else "nothing to wait for"
    time, room, many = sum(g.seconds for g in judged), sum(g.bytes for g in judged), sum(g.files for g in judged)
    size = f"{room / 1e9:.1f} GB" if room > 1e9 else f"{room / 1e6:.0f} MB"
    unknown = len(guesses) - len(judged)
    return f"about {batch.duration(time)}, {size}, {many:,} files" + (f" for {len(judged)}; {unknown} unknown{why}" if unknown else "")


def _width(states):
    return max((len(s.job.name) for s in states if s.job.known), default=0)


def status(study):
    """What of a recipe and its replicates is done, stale (and why) or missing, and the time each takes; the exit status, 0."""
    states = []
    for recipe in study:
        if len(study) > 1:
            print(f"\n{recipe.experiment}")
        found = jobs.expand(recipe)
        mine = [jobs.look(j) for j in found]
        width = _width(mine)
        guesses, _ = forecast.expect(recipe, found, [s.job.id for s in mine if s.seconds is None], measure=False)
        again = {s.job.id for s in batch.redo(mine)}
        for s in mine:
            if s.state == "done" and s.job.id in again:
                s = replace(s, state="stale", why="a step above it will be done again")
            states.append(s)
            takes = s.seconds if s.seconds is not None else guesses[s.job.id].seconds
            print(f"{s.job.name:<{width}}  {'' if s.state == 'unknown' else s.state:<11}  {batch.duration(takes):>7}  {s.why}".rstrip())
        if left := jobs.leftovers(found):
            print(f"set aside by the next run, as {recipe.name} does not ask for it any more: {', '.join(left.values())}")
    counts = {state: sum(s.state == state for s in states) for state in dict.fromkeys(s.state for s in states)}
    print("\n" + ", ".join(f"{n} {'not yet known' if state == 'unknown' else state}" for state, n in counts.items()))
    return 0
