"""The one training loop: any number of players, exact resuming, nothing hidden.

Batch k and every random number of it follow from (seed, k) alone, so a checkpoint is tensors and a
step number, and a run that was killed and resumed equals one that was not, bit for bit on the CPU.
Of several processes (torch.distributed, as `accelerate launch` starts them) each takes its share of the micro-batches of an update,
and the first writes; two give the weights that one gives with the same `accumulate`.
What is learned, and from what, is the caller's: see `textual_inversion`, `lora` and `ldm`. What can be turned is in `settings`.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from histokit.core import files, machine
from histokit.core.progress import Clock, Progress
from histokit.training import checkpoints, settings

VERSION = 2


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
    settings.check_schedule(schedule)
    if schedule == "one_cycle":
        warmup = warmup or max(1, steps // 10)
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
    players, batches, steps, seed, *,
    folder=None, identity=None, factor=None, autocast=None, validate=None, sheet=None, **options,
):  # fmt: skip
    """Train `players` for `steps` updates and return the history, one row per `log_every` steps.

    Args:
        players: list of `Player`; within a step they are updated in turn on the same batch.
        batches: `batches(k)` -> the k-th micro-batch, a function of k alone; its `len`, or that of its first value, counts images.
        steps: optimiser updates, in total (a resumed run does the rest).
        seed: run seed; generator of micro-batch m of step k = hash(seed, player, k, m), without m for the first.
        folder: where checkpoint.safetensors, best.safetensors, history.csv, sheets/ and kept/ go; None keeps nothing.
        identity: dict of what the result depends on (data, base, settings); resuming with another one raises, naming the field.
        factor: `factor(step)` -> further factor of the learning rate, or None.
        autocast: torch dtype of the forward pass, None for full precision; what is trained stays float32.
        validate: `validate()` -> float, lower is better, on fixed noise, or (float, {name: float to log}); the best step's weights are the
            result. None: the last ones.
        sheet: `sheet(step)` -> uint8 [H, W, 3], drawn by the sampler of later inference at fixed seeds. One that fails is told, no more.
        options: settings by name, see `settings.Loop`: `schedule`, `ema`, `validate_every`, `take` and the like; ValueError for another.

    Returns:
        DataFrame with step, seconds, loss_<player>, logs, grad_norm_<player>, lr, val, images_per_s, peak_gb; its `attrs` hold best_step
        and `step`, whose weights were taken. The players' tensors hold the result in place.
    """
    how = settings.Loop.of(options)
    return Training(players, batches, steps, seed, how, folder, identity, factor, autocast, validate, sheet).run()


@dataclass
class Training:
    """`players` on their way: a method for each thing that happens in a step, and `state`, what a checkpoint holds of it.

    Made from what `fit` is given, the settings as `how`; what its folder holds of an earlier session is put in place at once.
    """

    players: list
    batches: Callable
    steps: int
    seed: int
    how: settings.Loop
    folder: Path | None = None
    identity: dict | None = None
    factor: Callable | None = None
    autocast: torch.dtype | None = None
    validate: Callable | None = None
    sheet: Callable | None = None

    def __post_init__(self):
        self.folder = None if self.folder is None else Path(self.folder)
        self.identity = {**(self.identity or {}), "steps": self.steps, "seed": self.seed, **self.how.updates.identity()}
        self.device = self.players[0].params[0].device
        self.rank, self.processes = machine.place()
        if self.how.updates.accumulate % self.processes:
            raise ValueError(
                f"accumulate is {self.how.updates.accumulate} and there are {self.processes} processes, which share the micro-batches of "
                f"an update; make it {self.processes} or a multiple, and the batch so much smaller"
            )
        decay = self.how.updates.weight_decay
        self.optimisers = [torch.optim.AdamW(player.param_groups, lr=1e-4, weight_decay=decay) for player in self.players]
        self.base_rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in self.optimisers]
        self.shadow = [[p.detach().clone() for p in player.params] for player in self.players] if self.how.updates.ema else None
        self.state, self.best = self._resume(), None
        self.totals = {key: [torch.tensor(v, device=self.device) for v in values] for key, values in self.state.pending.items()}
        self.seen = 0  # images since the last row
        self.progress, self.clock = Progress(self.steps, self.state.history), Clock(self.state.history)
        self.writer = _tensorboard(self.folder) if self.how.records.tensorboard and self._writes() else None

    def run(self):
        """The steps that are left to do; returns the history, see `fit`."""
        if self.state.step == 0:
            self._draw(0)
        for step in range(self.state.step, self.steps):
            if self._out_of_patience(step):
                break
            speed = rate(step, self.steps, self.how.updates.schedule, self.how.updates.warmup) * (self.factor(step) if self.factor else 1.0)
            self._update(step, speed)
            self._log(step + 1, speed)
            self._assess(step + 1)
            self._draw(step + 1)
            self._save(step + 1)
        return self._settle()

    def _writes(self):
        """Whether this process keeps what is trained: where there is a folder, the first one."""
        return self.folder is not None and self.rank == 0

    def _resume(self):
        """The State its folder holds, tensors put in place; a new one where there is none."""
        if self.folder is None:
            return checkpoints.State()
        checkpoints.refuse_step(self.folder, self.how.sheets.take, self.how.sheets.kept(self.steps))
        found = checkpoints.resume(self.folder / "checkpoint.safetensors", self.players, self.optimisers, self.shadow, self.identity)
        return found or checkpoints.State()

    def _out_of_patience(self, step):
        how = self.how.validation
        return spent(step, self.state.best_step, how.patience * how.validate_every, how.renewed)

    # --- an update

    def _update(self, step, speed):
        """One update of every player, in turn, on the same batches, at `speed` times its learning rate."""
        for player, optimiser, rates in zip(self.players, self.optimisers, self.base_rates, strict=True):
            for group, lr in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = lr * speed
            images = self._backward(player, step)
            norm = torch.nn.utils.clip_grad_norm_(player.params, self.how.updates.clip or math.inf)
            self._note(f"grad_norm_{player.name}", norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.seen += images
        if self.shadow is not None:
            self._average(step)

    def _backward(self, player, step):
        """Adds up the gradients of a player over the micro-batches of a step; returns how many images they held."""
        parts, images = self.how.updates.accumulate, 0
        for part in range(self.rank, parts, self.processes):
            generator = torch.Generator().manual_seed(files.seed(self.seed, player.name, step, *([part] if part else [])))
            batch = self.batches(step * parts + part)
            with torch.autocast(self.device.type, self.autocast) if self.autocast is not None else nullcontext():
                loss, logs = _and_logs(player.loss(batch, step, generator))
            (loss / parts).backward()
            for key, value in {f"loss_{player.name}": loss, **logs}.items():
                self._note(key, value)
            images += _count(batch)
        if self.processes > 1:
            _add_up([p.grad for p in player.params if p.grad is not None])
        return images * self.processes

    def _note(self, key, value):
        self.totals.setdefault(key, []).append(value.detach())

    def _average(self, step):
        decay = min(self.how.updates.ema, (1 + step) / (10 + step))
        for player, averages in zip(self.players, self.shadow, strict=True):
            torch._foreach_lerp_(averages, [p.detach() for p in player.params], 1 - decay)

    def _averaged(self):
        """Within the `with` the players hold their running averages, where there are any."""
        return nullcontext() if self.shadow is None else checkpoints.swapped(self.players, self.shadow)

    # --- what is said and kept of it

    def _log(self, done, speed):
        if done % self.how.records.log_every and done not in (1, self.steps):
            return
        row = {
            "step": done,
            **{k: float(torch.stack(v).float().mean()) for k, v in self.totals.items()},
            "lr": self.base_rates[0][0] * speed,
        }
        bad = [k for k, v in row.items() if k.startswith(("loss_", "grad_norm_")) and not math.isfinite(v)]
        if bad:
            first = (done - 1) * self.how.updates.accumulate
            raise FloatingPointError(f"{bad[0]} is not finite by step {done}, batch {first}; lower the learning rate")
        row |= self.clock.tick(self.seen)
        self.totals, self.seen = {}, 0
        self._record(row)
        if self.rank == 0:
            self.progress(row, sum(row[f"loss_{player.name}"] for player in self.players))

    def _record(self, row):
        self.state.history.append(row)
        if self.writer:
            [self.writer.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"]

    def _assess(self, done):
        """The held-out loss of a step that is due, and its weights where none were better."""
        every = self.how.validation.validate_every
        if self.validate is None or not every or (done % every and done != self.steps):
            return
        with self._averaged(), torch.no_grad():
            val, logs = _and_logs(self.validate())
            val = float(val)
            if not math.isfinite(val):
                raise FloatingPointError(
                    f"validation loss is {val} at step {done}; lower the learning rate or look at the validation tiles"
                )
            if self.state.best_val is None or val < self.state.best_val:
                self.state.best_val, self.state.best_step = val, done
                if self.folder is None:
                    self.best = checkpoints.copied(self.players)
                elif self._writes():
                    checkpoints.save_weights(self.folder / "best.safetensors", self.players, {"step": done, "val": val})
        self._record({"step": done, "val": val, **logs})

    def _draw(self, done):
        """The sheet of a step that is due, and its weights where they are kept."""
        every = self.how.sheets.sheet_every
        if not self._writes() or not every or (done % every and done != self.steps):
            return
        with self._averaged(), torch.no_grad():
            if self.how.sheets.keep:
                checkpoints.keep(self.folder, self.players, done, self._held_out_loss(done))
            self._show(done)

    def _held_out_loss(self, done):
        """That of a step, from the history where it is there; None where nothing is held out."""
        val = next((row["val"] for row in self.state.history if row["step"] == done and "val" in row), None)
        return float(_and_logs(self.validate())[0]) if self.validate and val is None else val

    def _show(self, done):
        if self.sheet is None:
            return
        try:
            pixels = self.sheet(done)
            files.write_png(checkpoints.sheet_path(self.folder, done), pixels)
            self.progress.draw(pixels)
        except Exception as error:
            self.progress.remark(f"no sheet at step {done:,}: {error}")

    def _save(self, done):
        self.state.step = done
        if self._writes() and (done % self.how.records.checkpoint_every == 0 or done == self.steps):
            self.state.pending = {key: [float(v) for v in values] for key, values in self.totals.items()}
            path = self.folder / "checkpoint.safetensors"
            checkpoints.save_checkpoint(path, self.players, self.optimisers, self.shadow, self.state, self.identity)

    def _settle(self):
        """Leaves the result in the players' tensors; returns the history."""
        state, keep = self.state, self.how.sheets.keep and self._writes()
        if self.processes > 1:
            torch.distributed.barrier()  # the first has written what the others read now
        taken = checkpoints.settle(self.players, self.shadow, state, self.folder, self.how.sheets.take, self.best)
        if keep and taken == state.best_step and not checkpoints.sheet_path(self.folder, taken).exists():
            self._show(taken)  # what is used is on a sheet of its own
        history = pd.DataFrame(state.history).groupby("step", as_index=False).first()
        if self._writes():
            files.write_table(self.folder / "history.csv", history)
        history.attrs |= {"best_step": state.best_step, "step": taken}
        self.progress.end(f"{state.step:,} steps of {self.steps:,}, step {taken:,} is taken")
        return history


# ---------------------------------------------------------------------------------------------- what is shown


def _add_up(gradients):
    """Each gradient becomes its sum over the processes, in place."""
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)


def _and_logs(found):
    """(number, {name: number to log}) of what a loss or a `validate` returned, which may be the number alone."""
    return found if isinstance(found, tuple) else (found, {})


def _count(batch):
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
    return len(first)


def _tensorboard(folder):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
