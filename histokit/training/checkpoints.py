"""What a training run keeps on disk, and how it goes on from there: tensors and a step number, no pickle.

A checkpoint holds the values, their running averages and the state of the optimisers; who trains is in `loop`.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch

from histokit.core import files
from histokit.runs import places

VERSION = 1
LAST = "checkpoint.safetensors"  # of a training folder; the file that resuming begins with


@dataclass
class State:
    """How far a run has come: what a checkpoint holds beside tensors.

    Args:
        step: updates that are done.
        best_val, best_step: of the best validation so far, None before the first.
        history: rows (dict) of what was logged.
        pending: {name: values} of losses that no row holds yet.
    """

    step: int = 0
    best_val: float | None = None
    best_step: int | None = None
    history: list = field(default_factory=list)
    pending: dict = field(default_factory=dict)


def _tensors(players, shadow=None, optimisers=None):
    out = {}
    for n, player in enumerate(players):
        for i, p in enumerate(player.params):
            out[f"{player.name}.{i}.value"] = p.detach()
            if shadow is not None:
                out[f"{player.name}.{i}.ema"] = shadow[n][i]
            if optimisers is not None:
                for key, value in optimisers[n].state[p].items():
                    out[f"{player.name}.{i}.{key}"] = value.detach() if torch.is_tensor(value) else torch.tensor(value)
        out |= {f"{player.name}.buffer.{i}": buffer.detach() for i, buffer in enumerate(player.buffers)}
    return {k: v.cpu().contiguous() for k, v in out.items()}


def save_weights(path, players, facts):
    """Writes the values alone, with facts (dict) about them."""
    files.write_tensors(path, _tensors(players), {k: json.dumps(v) for k, v in facts.items()})


def save_checkpoint(path, players, optimisers, shadow, state, identity):
    """Writes all that a run needs to go on, bit for bit on a CPU."""
    facts = {"identity": identity, **vars(state)}
    files.write_tensors(path, _tensors(players, shadow, optimisers), {k: json.dumps(v, default=str) for k, v in facts.items()})


def resume(path, players, optimisers, shadow, identity):
    """Puts a checkpoint into players, optimisers and averages; returns its State, None where there is no file.

    Raises ValueError where it was trained otherwise, naming the setting.
    """
    if not path.exists():
        return None
    facts = {k: json.loads(v) for k, v in files.read_metadata(path).items()}
    wanted = json.loads(json.dumps(identity, default=str))
    for key in sorted(wanted.keys() | facts["identity"].keys()):
        if wanted.get(key) != facts["identity"].get(key):
            was, now = facts["identity"].get(key), wanted.get(key)
            raise ValueError(f"{path} was trained with {key} = {was!r}, now {now!r}; move the folder away or restore the setting")
    saved = files.read_tensors(path)
    for n, (player, optimiser) in enumerate(zip(players, optimisers, strict=True)):
        for i, p in enumerate(player.params):
            prefix = f"{player.name}.{i}."
            mine = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
            p.data.copy_(mine.pop("value"))
            if shadow is not None:
                shadow[n][i].copy_(mine.pop("ema"))
            optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in mine.items()}
        for i, buffer in enumerate(player.buffers):
            buffer.copy_(saved[f"{player.name}.buffer.{i}"])
    return State(**{one.name: facts[one.name] for one in fields(State)})


def sheet_path(folder, step):
    return folder / "sheets" / f"step_{step:06d}.png"


def keep(folder, players, step, val=None):
    """Keeps the values of a step, with its held-out loss where there is one (float or None), for `settle` to take."""
    save_weights(_kept_path(folder, step), players, {"step": step, "val": val})


def kept(folder):
    """{step: held-out loss or None} of the weights that are kept, in order."""
    found = [files.read_metadata(path) for path in sorted(folder.glob("kept/step_*.safetensors"))]
    return {json.loads(facts["step"]): json.loads(facts["val"]) for facts in found}


def _kept_path(folder, step):
    return folder / "kept" / f"step_{step:06d}.safetensors"


def refuse_step(folder, step, planned=()):
    """Raises ValueError where the weights of `step` are not kept, nor will be: `planned` are steps to come. 0 is always right."""
    there = sorted({*kept(folder), *planned} - {0})
    if step and step not in there:
        said = ", ".join(map(str, there)) or "none"
        raise ValueError(f"no weights are kept of step {step}; there are {said}, and 0 takes the best validated, else the last")


def settle(players, shadow, state, folder, take=0, best=None):
    """Leave in the players' tensors what the run is judged by, and return its step.

    The step asked for by `take`, else the best validated weights (`best`, as `copied` gave them, of a run without a folder), else the
    average, else the last.
    """
    if take:
        refuse_step(folder, take)
        result = _read(_kept_path(folder, take), players)
    elif state.best_step is not None:
        result = _read(folder / "best.safetensors", players) if folder is not None else best
    elif shadow is not None:
        result = shadow  # buffers have no average; the last ones stay
    else:
        return state.step
    for player, values in zip(players, result, strict=True):
        for tensor, value in zip((*player.params, *player.buffers), values, strict=False):
            tensor.data.copy_(value)
    return take or state.best_step or state.step


def copied(players):
    """The tensors of each player as they are now, [[value, ..., buffer, ...], ...], in memory."""
    return [[t.detach().clone() for t in (*player.params, *player.buffers)] for player in players]


def _read(path, players):
    """The tensors of each player, [[value, ..., buffer, ...], ...], as `save_weights` wrote them."""
    saved = files.read_tensors(path)
    names = [
        [f"{p.name}.{i}.value" for i in range(len(p.params))] + [f"{p.name}.buffer.{i}" for i in range(len(p.buffers))] for p in players
    ]
    return [[saved[name] for name in of_one] for of_one in names]


def take_over(run, choice="checkpoint"):
    """The training folder of a run, logs/training, with what the run before it has trained where the two differ in `choice` alone.

    Resuming is exact, so a finished training that is taken over is not done again; the result is the step now chosen.
    """
    folder, former = run.path("logs", "training"), run.twin(choice)
    old = former and former / "logs" / "training"
    if former is not None and (old / LAST).exists() and not (folder / LAST).exists():
        adopt(old, folder)
        print(f"  goes on from the training of {former.name}: {choice} is all that changed, so what was trained is not trained again")
    return folder


def shared(run, known, steps):
    """The training folder of a run, with what another experiment trained under the same step id of just the same, where there is one.

    What sees no label is the same for other draws of the labels, and for other shares of them.

    Args:
        known: the identity given to `loop.fit`, with all that the result follows from but steps, seed and code;
            what another version trained is left.
    """
    folder = run.path("logs", "training", LAST).parent
    wanted = json.loads(json.dumps(known | {"steps": steps, "seed": run.seed}, default=str))
    others = () if (folder / LAST).exists() else sorted((files.root() / "outputs").glob(f"*/{run.step}/logs/training/{LAST}"))
    for path in others:
        facts, other = ({key: json.loads(value) for key, value in files.read_metadata(path).items()}, places.read(path.parents[2]))
        same_code = other is not None and all(other["key"].get(name) == run.record["key"].get(name) for name in ("code", "modules"))
        if same_code and facts["step"] == steps and wanted.items() <= facts["identity"].items():
            adopt(path.parent, folder)
            print(f"  trained in {path.relative_to(files.root() / 'outputs').parts[0]} already, on the same pictures in the same way")
            break
    return folder


def adopt(old, folder):
    """Makes what one training folder holds that of another as well."""
    names = [path.relative_to(old) for path in sorted(old.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    for name in sorted(names, key=lambda name: name.name == LAST):  # without it nothing is resumed, so it comes last
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.link(old / name, folder / name)  # every file here is replaced as a whole, never written into


@contextmanager
def swapped(players, shadow):
    """The running averages in the place of the values, within the `with`."""
    live = [[p.detach().clone() for p in player.params] for player in players]
    try:
        for player, values in zip(players, shadow, strict=True):
            for p, value in zip(player.params, values, strict=True):
                p.data.copy_(value)
        yield
    finally:
        for player, values in zip(players, live, strict=True):
            for p, value in zip(player.params, values, strict=True):
                p.data.copy_(value)
