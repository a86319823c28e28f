"""What people said of tiles: one CSV per experiment, params/reviews/<experiment>.csv, append-only, the last line about a tile counts."""

import pandas as pd

from histokit.core import files, locks

VERSION = 1

VERDICTS = ("keep", "reject")
WITHDRAWN = "withdrawn"


def of_run(run):
    """{sha256: (verdict, note)} of params/reviews/<experiment>.csv, an input of this run; the last line about a tile counts."""
    folder = files.root() / "params" / "reviews"
    folder.mkdir(parents=True, exist_ok=True)
    run.input(folder, patterns=(f"{run.experiment}.csv",))  # the folder, so that a first verdict makes the run stale too
    return {sha: (line["verdict"], line["note"]) for sha, line in standing(run.experiment).items()}


def standing(experiment):
    """{sha256: its last line, a dict of verdict, reviewer, note} of params/reviews/<experiment>.csv; withdrawn verdicts are left out.

    Raises ValueError for a line that is no verdict.
    """
    path = file_of(experiment)
    if not path.is_file():
        return {}
    table = files.read_table(path)
    missing = [name for name in ("sha256", "verdict") if name not in table]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; expected sha256, verdict, reviewer, date, note")
    for line, row in enumerate(table.itertuples(), start=2):
        if row.verdict not in (*VERDICTS, WITHDRAWN) or len(row.sha256) != 64:
            raise ValueError(
                f"{path}, line {line}: verdict {row.verdict!r} on tile {row.sha256!r}; expected keep or reject (or withdrawn), "
                "and 64 hex digits"
            )
    lines = table.assign(**{name: "" for name in ("reviewer", "note") if name not in table}).to_dict("records")
    last = {line["sha256"]: {name: str(line[name]) for name in ("verdict", "reviewer", "note")} for line in lines}
    return {sha: line for sha, line in last.items() if line["verdict"] != WITHDRAWN}


def file_of(experiment):
    return files.root() / "params" / "reviews" / f"{experiment}.csv"


def add_reviews(experiment, verdicts):
    """Append lines to params/reviews/<experiment>.csv, in their order; earlier lines stay, and what stands already is not said again.

    Args:
        verdicts: [{sha256, verdict, reviewer, note}]; verdict "keep", "reject", or "withdrawn", which leaves the tile to its scores.

    Returns:
        Path of the file.
    """
    for line in verdicts:
        if line["verdict"] not in (*VERDICTS, WITHDRAWN):
            raise ValueError(f"verdict is {line['verdict']!r}; expected keep or reject, or withdrawn to leave the tile to its scores")
    path, today = file_of(experiment), pd.Timestamp.now().date().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locks.alone(path.parent):  # galleries of two classes may be open at a time
        stands, new = standing(experiment), []
        for line in verdicts:
            sha, said = line["sha256"], {name: line[name] for name in ("verdict", "reviewer", "note")}
            before, withdrawn = stands.get(sha, {}), line["verdict"] == WITHDRAWN
            if said != before and (before or not withdrawn):
                stands[sha] = {} if withdrawn else said
                new.append({"sha256": sha, "verdict": said["verdict"], "reviewer": said["reviewer"], "date": today, "note": said["note"]})
        if new:
            earlier = [files.read_table(path)] if path.is_file() else []
            files.write_table(path, pd.concat([*earlier, pd.DataFrame(new)], ignore_index=True))
    return path
