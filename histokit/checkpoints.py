"""What a training run keeps on disk, and how it goes on from there: tensors and a step number, no pickle.

A checkpoint holds the values, their running averages and the state of the optimisers; who trains is in `training`.
"""

import json
from contextlib import contextmanager

import torch

from histokit import files

VERSION = 1
KEPT = ("step", "best_val", "best_step", "history", "pending")


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
    facts = {"identity": identity, **{key: state[key] for key in KEPT}}
    files.write_tensors(path, _tensors(players, shadow, optimisers), {k: json.dumps(v, default=str) for k, v in facts.items()})


def resume(path, players, optimisers, shadow, identity):
    """Puts a checkpoint into players, optimisers and averages; returns its state (dict), None where there is no file.

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
    return {key: facts[key] for key in KEPT}


def settle(players, shadow, state, folder):
    """Leave in the players' tensors what the run is judged by: the best validated weights, else the average, else the last."""
    if state["best_step"] is not None and folder is not None:
        best = files.read_tensors(folder / "best.safetensors")
        names = [
            [f"{p.name}.{i}.value" for i in range(len(p.params))] + [f"{p.name}.buffer.{i}" for i in range(len(p.buffers))] for p in players
        ]
        result = [[best[name] for name in of_one] for of_one in names]
    elif state["best_step"] is not None:
        result = state["best"]
    elif shadow is not None:
        result = shadow  # buffers have no average; the last ones stay
    else:
        return
    for player, values in zip(players, result, strict=True):
        for tensor, value in zip((*player.params, *player.buffers), values, strict=False):
            tensor.data.copy_(value)


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
