"""What state a run folder is in: done, stale and why, running, interrupted, failed or missing; asked without kernel or torch."""

from pathlib import Path

from histokit.core import files, locks
from histokit.runs import keys, places


def check(folder, parameters, notebook_path):
    """Whether a run folder holds what these parameters and this notebook would give; no kernel, no torch.

    Returns:
        (state, why) with state "done", "stale", "missing", "running", "interrupted" or "failed"; `why` names each field that changed.
    """
    folder = Path(folder)
    holder = locks.read(folder)
    if holder and not locks.stale(holder):
        return "running", locks.describe(holder)
    record = places.read(folder)
    if record is None:
        return "missing", "never run"
    if record["status"] == "failed":
        return "failed", record.get("error", "")
    from histokit.runs import notebooks

    declared = {name: parameter.default for name, parameter in notebooks.declared(notebook_path).items()}
    why = changes(record, key(declared | dict(parameters), notebook_path))
    if record["status"] != "done":
        return "interrupted", "; ".join(why) or "can be resumed"
    gone = [name for name, facts in record["outputs"].items() if places.size(folder / name) != facts["size"]]
    if gone:
        why.append(f"{gone[0]} is missing or changed" + (f", and {len(gone) - 1} more files" if len(gone) > 1 else ""))
    return ("stale", "; ".join(why)) if why else ("done", "")


def mark_failed(folder, text):
    """Writes status `failed` and the reason into a folder whose writer is gone; a finished run is left alone."""
    folder = Path(folder)
    holder = locks.read(folder)
    if holder and not locks.stale(holder):
        raise locks.Locked(f"{folder} is being written by {locks.describe(holder)}")
    record = places.read(folder) or {"run_id": "", "parameters": {}}
    if record.get("status") != "done":
        files.write_json(folder / places.RECORD, record | {"status": "failed", "error": str(text)})
        (folder / locks.NAME).unlink(missing_ok=True)


def key(given, notebook):
    """The facts of a run that are known before it starts."""
    known = {"code": keys.code(notebook), "modules": keys.modules(notebook)} if notebook else {"code": None, "modules": {}}
    return {"parameters": keys.parameters(given), **known}


def changes(record, now):
    """Every reason why a recorded run is not what the facts of `key` would give now."""
    found = keys.differences(record.get("key") or {}, now)
    for name, facts in record.get("inputs", {}).items():
        if not keys.same(places.restored(name), facts):
            found.append(f"input {name} changed" if places.restored(name).exists() else f"input {name} is gone")
    for request in record.get("parents", []):
        step, wanted, whose = request["step"], request["class_name"], request.get("experiment", record["experiment"])
        held = places.find_all(whose, step).values() if wanted == "*" else [places.find(whose, step, wanted)]
        if None in held or not held:
            found.append(f"parent {step} is not there or not finished")
        elif {places.relative(path): places.read(path)["outputs_sha256"] for path in held} != request["found"]:
            found.append(f"parent {step} changed")
    return found
