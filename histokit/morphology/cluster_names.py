"""A person's words for clusters: one CSV per experiment, params/cluster_names/<experiment>.csv, append-only, its last lines count.

A name belongs to the clusters it was given to, by their hash: fitted anew, they are other clusters and have no names.
"""

import re

import pandas as pd

from histokit.core import files, locks
from histokit.morphology import clusters

VERSION = 1
COLUMNS = ["clusters", "label", "cluster", "name", "reviewer", "date"]
LONGEST = 60  # letters; a caption has 77 tokens in all


def file_of(experiment):
    return files.root() / "params" / "cluster_names" / f"{experiment}.csv"


def of_run(run, held):
    """{(class or ALL, cluster): name} for clusters.Clusters, the file an input of this run."""
    folder = file_of(run.experiment).parent
    folder.mkdir(parents=True, exist_ok=True)
    run.input(folder, patterns=(f"{run.experiment}.csv",))
    return standing(run.experiment, clusters.digest(held))


def standing(experiment, sha):
    """{(class or ALL, cluster): name} that stand for the clusters of this hash."""
    path = file_of(experiment)
    if not path.is_file():
        return {}
    table = files.read_table(path)
    missing = [name for name in COLUMNS[:4] if name not in table]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    rows = table[table["clusters"].astype(str).eq(sha)].fillna({"label": "", "name": ""})
    found = {(str(row.label), int(row.cluster)): str(row.name_) for row in rows.rename(columns={"name": "name_"}).itertuples()}
    return {where: name for where, name in found.items() if name}


def check(name):
    """The name as captions have it, spaces single; ValueError for one that is empty, too long, or reads like code."""
    text = re.sub(r"\s+", " ", str(name)).strip()
    if not text:
        raise ValueError("a name is empty; leave the cluster as it is, or say what its tiles show")
    if len(text) > LONGEST:
        raise ValueError(f"{text[:20]!r}... has {len(text)} letters; {LONGEST} at most, captions have 77 tokens")
    if re.search(r"[<>{}&\\]|[^\x20-\uffff]", text):
        raise ValueError(f"{text!r} holds signs that mean something to programs (< > {{ }} & \\); use plain words")
    return text


def add(experiment, held, names, reviewer=""):
    """Append a person's names; what stands already is not said again. All or none are written.

    Args:
        held: clusters.Clusters.
        names: {(class or ALL, cluster): name}; "" takes a name back.

    Returns:
        Path of the file.

    Raises ValueError for a cluster there is not, a name that `check` refuses, or two clusters of a class by one name.
    """
    path, today, sha = file_of(experiment), pd.Timestamp.now().date().isoformat(), clusters.digest(held)
    for key, k in names:
        if key not in held.centroids or not 0 <= k < len(held.centroids[key]):
            raise ValueError(f"there is no cluster {k} of {key or 'all classes'}")
    told = {where: check(name) if name else "" for where, name in names.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locks.alone(path.parent):
        before = standing(experiment, sha)
        after = {where: name for where, name in (before | told).items() if name}
        for where, name in after.items():
            twin = [other for other, said in after.items() if other != where and other[0] == where[0] and said.lower() == name.lower()]
            if twin:
                raise ValueError(f"clusters {twin[0][1]} and {where[1]} would both be called {name!r}; captions could not tell them apart")
        new = [
            {"clusters": sha, "label": key, "cluster": k, "name": name, "reviewer": reviewer, "date": today}
            for (key, k), name in told.items()
            if name != before.get((key, k), "")
        ]
        if new:
            earlier = [files.read_table(path)] if path.is_file() else []
            files.write_table(path, pd.concat([*earlier, pd.DataFrame(new, columns=COLUMNS)], ignore_index=True))
    return path
