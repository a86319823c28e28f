"""The one training loop: any number of players, exact resuming, nothing hidden.

Batch k and every random number of step k follow from (seed, k) alone, so a checkpoint is tensors and a
step number, and a run that was killed and resumed equals one that was not, bit for bit on the CPU.
What is learned, and from what, is the caller's: see `textual_inversion`, `lora` and `ldm`.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from histokit.core import files, machine
from histokit.core.progress import Progress
from histokit.training import checkpoints

VERSION = 1


@dataclass
class Player:
    """Something that is optimised on its own loss; most runs have one, an adversarial pair has two.

    Args:
        name: key of its tensors in the checkpoint and of its column in the history.
        param_groups: list of dicts as torch optimisers take them: `params` (list of tensors), `lr`, optional `weight_decay`.
        loss: `loss(batch, step, generator)` -> scalar tensor, or (scalar tensor, {name: scalar tensor to log}).
        buffers: tensors that change while training without being optimised (running statistics of batch normalisation).
    """

    name: str
    param_groups: list
    loss: Callable
    buffers: list = ()

    def __post_init__(self):
        # lists, not iterators: a `filter` object is empty after the optimiser has read it, and clipping then clips nothing
        self.param_groups = [{**group, "params": list(group["params"])} for group in self.param_groups]
        self.params = [p for group in self.param_groups for p in group["params"]]
        self.buffers = list(self.buffers)
        if not self.params:
            raise ValueError(f"player {self.name!r} has nothing to train; check what was made trainable")
        half = [p.dtype for p in self.params if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            raise ValueError(f"player {self.name!r} would train {len(half)} tensors in {half[0]}; cast what is trained to float32")


def rate(step, steps, schedule="constant", warmup=0):
    """Learning-rate factor in [0, 1] of a step: `constant`, `cosine` or `one_cycle` (10 % up, then cosine down to 1 %)."""
    if schedule == "one_cycle":
        warmup = warmup or max(1, steps // 10)
    elif schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule {schedule!r} is unknown; use constant, cosine or one_cycle")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def spent(step, best_step, patience, renewed=0):
    """Whether `patience` steps have passed since the best one, or since `renewed` if that is later; never before it, nor for patience 0."""
    return bool(patience) and best_step is not None and step >= renewed and step - max(best_step, renewed) >= patience


@contextmanager
def ahead(batches, total):
    """`batches`, each made in a thread while the device works on the one before; the same ones, since batch k follows from k alone."""
    with ThreadPoolExecutor(1) as pool:
        waiting = {}

        def batch(k):
            held = waiting.pop(k, None) or pool.submit(batches, k)
            waiting.clear()  # of another order
            if k + 1 < total:
                waiting[k + 1] = pool.submit(batches, k + 1)
            return held.result()

        yield batch


def fit(
    players,
    batches,
    steps,
    seed,
    *,
    folder=None,
    identity=None,
    schedule="constant",
    warmup=0,
    accumulate=1,
    clip=1.0,
    ema=0.0,
    weight_decay=1e-2,
    factor=None,
    autocast=None,
    validate=None,
    validate_every=0,
    patience=0,
    renewed=0,
    sheet=None,
    sheet_every=0,
    keep=False,
    take=0,
    checkpoint_every=200,
    log_every=20,
    tensorboard=False,
):
    """Train `players` for `steps` updates and return the history, one row per `log_every` steps.

    Args:
        players: list of `Player`; within a step they are updated in turn on the same batch.
        batches: `batches(k)` -> the k-th micro-batch, a function of k alone; its `len`, or that of its first value, counts images.
        steps: optimiser updates, in total (a resumed run does the rest).
        seed: run seed; generator of step k = hash(seed, player, k).
        folder: where checkpoint.safetensors, best.safetensors, history.csv, sheets/ and kept/ go; None keeps nothing.
        identity: dict of what the result depends on (data, base, settings); resuming with another one raises, naming the field.
        clip: bound on the global gradient norm of each player, 0 turns it off; the norm before clipping is in the history.
        ema: decay of the running average of the weights, (1 + k) / (10 + k) in early steps; 0 turns it off. Where it is on,
            validation, sheets and result use it.
        factor: `factor(step)` -> further factor of the learning rate, or None.
        autocast: torch dtype of the forward pass, None for full precision; what is trained stays float32.
        validate: `validate()` -> float, lower is better, on fixed noise, or (float, {name: float to log}); the best step's weights are the
            result. None: the last ones.
        patience: validations without a better one after which training ends, 0 for never; they are counted from step `renewed` on.
        sheet: `sheet(step)` -> uint8 [H, W, 3], drawn by the sampler of later inference at fixed seeds. One that fails is told, no more.
        keep: whether the weights of every sheet are kept, in kept/, with their held-out loss; for what is small, such as an adapter.
        take: step whose kept weights are the result, 0 for the best validated, else the last; outside the identity, so a finished run is
            not trained again. ValueError names the steps there are.

    Returns:
        DataFrame with step, seconds, loss_<player>, logs, grad_norm_<player>, lr, val, images_per_s, peak_gb; its `attrs` hold best_step
        and `step`, whose weights were taken. The players' tensors hold the result in place.
    """
    identity = {**(identity or {}), "steps": steps, "seed": seed, "schedule": schedule, "accumulate": accumulate, "clip": clip, "ema": ema}
    optimisers = [torch.optim.AdamW(player.param_groups, lr=1e-4, weight_decay=weight_decay) for player in players]
    base_rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    shadow = [[p.detach().clone() for p in player.params] for player in players] if ema else None
    state = {"step": 0, "best_val": None, "best_step": None, "history": [], "pending": {}}
    if folder is not None:
        folder = Path(folder)
        checkpoints.refuse_step(folder, take, (*range(sheet_every, steps, sheet_every), steps) if keep and sheet_every else ())
        state = checkpoints.resume(folder / "checkpoint.safetensors", players, optimisers, shadow, identity) or state
    averaged = lambda: checkpoints.swapped(players, shadow) if ema else nullcontext()  # noqa: E731
    writer = _tensorboard(folder) if tensorboard and folder else None
    progress, clock = Progress(steps, state["history"]), Clock(state["history"])
    where = players[0].params[0].device
    totals, seen = {key: [torch.tensor(v, device=where) for v in values] for key, values in state["pending"].items()}, 0

    def assess(step):
        if validate is not None and validate_every and (step % validate_every == 0 or step == steps):
            with averaged(), torch.no_grad():
                found = validate()
                val, logs = _number(found), found[1] if isinstance(found, tuple) else {}
                if not math.isfinite(val):
                    raise FloatingPointError(
                        f"validation loss is {val} at step {step}; lower the learning rate or look at the validation tiles"
                    )
                if state["best_val"] is None or val < state["best_val"]:
                    state.update(best_val=val, best_step=step)
                    if folder is not None:
                        checkpoints.save_weights(folder / "best.safetensors", players, {"step": step, "val": val})
                    else:
                        state["best"] = [[t.detach().clone() for t in (*player.params, *player.buffers)] for player in players]
            return {"val": val, **logs}

    def draw(step):
        if folder is not None and sheet_every and (step % sheet_every == 0 or step == steps):
            with averaged(), torch.no_grad():
                if keep:
                    val = next((row["val"] for row in state["history"] if row["step"] == step and "val" in row), None)
                    checkpoints.keep(folder, players, step, _number(validate()) if validate and val is None else val)
                show(step)

    def show(step):
        if sheet is not None:
            try:
                pixels = sheet(step)
                files.write_png(checkpoints.sheet_path(folder, step), pixels)
                progress.draw(pixels)
            except Exception as error:
                progress.remark(f"no sheet at step {step:,}: {error}")

    if state["step"] == 0:
        draw(0)
    for step in range(state["step"], steps):
        if spent(step, state["best_step"], patience * validate_every, renewed):
            break
        speed = rate(step, steps, schedule, warmup) * (factor(step) if factor else 1.0)
        for player, optimiser, rates in zip(players, optimisers, base_rates, strict=True):
            for group, lr in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = lr * speed
            generator = torch.Generator().manual_seed(files.seed(seed, player.name, step))
            for micro in range(accumulate):
                batch = batches(step * accumulate + micro)
                with torch.autocast(where.type, autocast) if autocast is not None else nullcontext():
                    out = player.loss(batch, step, generator)
                loss, logs = out if isinstance(out, tuple) else (out, {})
                (loss / accumulate).backward()
                for key, value in {f"loss_{player.name}": loss, **logs}.items():
                    totals.setdefault(key, []).append(value.detach())
            norm = torch.nn.utils.clip_grad_norm_(player.params, clip or math.inf)
            totals.setdefault(f"grad_norm_{player.name}", []).append(norm.detach())
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen += accumulate * _count(batch)
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            for player, averages in zip(players, shadow, strict=True):
                torch._foreach_lerp_(averages, [p.detach() for p in player.params], 1 - decay)
        done = step + 1
        if done % log_every == 0 or done == steps or done == 1:
            row = {"step": done, **{k: float(torch.stack(v).float().mean()) for k, v in totals.items()}, "lr": base_rates[0][0] * speed}
            bad = [k for k, v in row.items() if k.startswith(("loss_", "grad_norm_")) and not math.isfinite(v)]
            if bad:
                raise FloatingPointError(f"{bad[0]} is not finite by step {done}, batch {step * accumulate}; lower the learning rate")
            totals = {}
            row |= clock.tick(seen)
            seen = 0
            state["history"].append(row)
            progress(row, sum(row[f"loss_{player.name}"] for player in players))
            if writer:
                [writer.add_scalar(k, v, done) for k, v in row.items() if k != "step"]
        val = assess(done)
        if val is not None:
            state["history"].append({"step": done, **val})
            if writer:
                [writer.add_scalar(k, v, done) for k, v in val.items()]
        draw(done)
        state["step"] = done
        if folder is not None and (done % checkpoint_every == 0 or done == steps):
            state["pending"] = {key: [float(v) for v in values] for key, values in totals.items()}  # not yet in a row
            checkpoints.save_checkpoint(folder / "checkpoint.safetensors", players, optimisers, shadow, state, identity)

    taken = checkpoints.settle(players, shadow, state, folder, take)
    if keep and folder is not None and taken == state["best_step"] and not checkpoints.sheet_path(folder, taken).exists():
        show(taken)  # what is used is on a sheet of its own
    history = pd.DataFrame(state["history"]).groupby("step", as_index=False).first()
    if folder is not None:
        files.write_table(folder / "history.csv", history)
    history.attrs |= {"best_step": state["best_step"], "step": taken}
    progress.end(f"{state['step']:,} steps of {steps:,}, step {taken:,} is taken")
    return history


# ---------------------------------------------------------------------------------------------- what is shown


class Clock:
    """Seconds, images per second and peak memory since the last tick; earlier sessions of a resumed run are added up."""

    def __init__(self, history):
        self.before = max((row.get("seconds", 0) for row in history), default=0)
        self.start = self.last = time.perf_counter()

    def tick(self, images):
        now = time.perf_counter()
        out = {"seconds": self.before + now - self.start, "images_per_s": images / max(now - self.last, 1e-9), "peak_gb": machine.peak_gb()}
        self.last = now
        return out


def _number(found):
    """The number a `validate` returned, which may come with more to log."""
    return float(found[0] if isinstance(found, tuple) else found)


def _count(batch):
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
    return len(first)


def _tensorboard(folder):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
