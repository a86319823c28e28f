"""Who has looked at which test tiles, with what plan: one line per look, written before the answers are read.

A test split that was opened twenty times is a validation split. The plan (which arm is judged against which, on what, with which margin)
is written down with its hash first, so that a plan that changed after a look can be seen. Lines are added and never changed.
"""

import datetime
import json
from dataclasses import dataclass

import pandas as pd

from histokit.core import files, locks
from histokit.runs import places

VERSION = 1
COLUMNS = ["time", "dataset", "test", "experiment", "recipe", "step", "run_id", "plan", "plan_text"]


@dataclass(frozen=True)
class Look:
    """What the ledger held when a test split was opened: looks before this one, plans among them, recipes they came from."""

    plan: str  # hash of this plan
    before: int
    plans: list  # hashes, first to last, this one included
    recipes: list
    changed: str  # in what this plan differs from the first one of this experiment, else ""

    def remarks(self, dataset):
        """Plain sentences for the reader of a verdict."""
        if not self.before:
            yield f"The test tiles of {dataset} are opened for the first time, with plan {self.plan[:8]}."
            return
        from_ = ", ".join(name or "a notebook opened by hand" for name in self.recipes)
        plans = f"{len(self.plans)} plans" if len(self.plans) > 1 else "the same plan"
        yield f"The test tiles of {dataset} have been opened {self.before} time{'s' * (self.before != 1)} before, with {plans}, by {from_}."
        if self.changed:
            yield f"The plan was changed after the first look at them: {self.changed}."


def path():
    """The ledger, outputs/.ledger/test_splits.csv; delete it and nobody knows any more."""
    return files.root() / "outputs" / ".ledger" / "test_splits.csv"


def open_test(run, dataset, tiles, plan):
    """Write a line and return the `Look`.

    Args:
        run: the Run that is about to read predictions on test tiles, or whatever has its experiment, recipe, step and run_id; a run
            that is resumed counts once, one that crashed not at all.
        dataset: name of the dataset.
        tiles: manifest; its test tiles, by their contents, are what is opened.
        plan: dict of what is compared and how.
    """
    test = files.digest(sorted(tiles.loc[tiles["split"].eq("test") & tiles["source"].eq("real"), "sha256"].astype(str)))[:16]
    code, text = files.digest(plan)[:16], json.dumps(plan, ensure_ascii=False)
    path().parent.mkdir(parents=True, exist_ok=True)
    with locks.alone(path().parent):
        held = files.read_table(path()) if path().is_file() else pd.DataFrame(columns=COLUMNS, dtype=str)
        earlier = held[held["test"].eq(test) & held["run_id"].ne(run.run_id)]
        earlier = earlier.loc[[not _crashed(line) for line in earlier.itertuples()]]
        if not (held["run_id"].eq(run.run_id) & held["plan"].eq(code)).any():
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            line = [now, dataset, test, run.experiment, run.recipe, run.step, run.run_id, code, text]
            files.write_table(path(), pd.concat([held, pd.DataFrame([line], columns=COLUMNS)], ignore_index=True))
    own = earlier[earlier["experiment"].eq(run.experiment)]
    changed = _changes(own["plan_text"].iloc[0], plan) if len(own) and own["plan"].iloc[0] != code else ""
    plans = list(dict.fromkeys([*earlier["plan"], code]))
    return Look(code, len(earlier), plans, sorted(set(earlier["recipe"].fillna(""))), changed)


def _crashed(line):
    """Whether the run of a line failed, here or set aside, before it had a verdict: then nobody has read one."""
    home = files.root() / "outputs" / str(line.experiment)
    for folder in (home / str(line.step), *(home / ".old" / str(line.step)).glob("*")):
        record = places.read(folder)
        if record and record.get("run_id") == line.run_id:
            return record.get("status") == "failed" and not (folder / "levels.csv").exists()  # the first thing 07 writes of what it read
    return False


def _changes(text, plan):
    """In what a plan differs from an earlier one, as the ledger holds that; of arms, only which."""
    try:
        old = json.loads(text)
    except ValueError:
        return f"it was {text}"  # as earlier versions wrote it
    said = [f"{key} was {value}" for key, value in old.items() if key != "arms" and value != plan.get(key)]
    said += [f"{key} is new ({value})" for key, value in plan.items() if key not in (*old, "arms")]
    was, now = old.get("arms", {}), plan.get("arms", {})
    arms = {
        "new": [name for name in now if name not in was],
        "gone": [name for name in was if name not in now],
        "with other settings": [name for name in now if name in was and now[name] != was[name]],
    }
    said += [f"arm{'s' * (len(names) > 1)} {', '.join(names)} {how}" for how, names in arms.items() if names]
    return "; ".join(said)
