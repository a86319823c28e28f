"""Training a classifier: a head on cached features, or a network end to end, and by which validation score its weights are chosen.

Which tiles make which batch, and what an error costs, comes from `longtail`; what a classifier is, from `classifiers`.
"""

import contextlib
import copy

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from histokit.core import files, machine
from histokit.metrics import classification
from histokit.tiles import augment, data
from histokit.training import loop
from histokit.vision import classifiers

VERSION = 1
SELECT = ("balanced_accuracy", "likelihood", "head_minus_missed")


# --- what validation tiles say ---------------------------------------------------------------------------------------


def balanced_accuracy(logits, targets):
    """Mean recall in [0, 1] over the classes that occur in targets [N]; higher is better, NaN without tiles."""
    hit = (logits.argmax(dim=1) == targets).double()
    return float(torch.stack([hit[targets == c].mean() for c in targets.unique()]).mean()) if len(targets) else float("nan")


def score(name, logits, targets, tail):
    """The number that the weights kept have the highest of.

    Args:
        name: `balanced_accuracy`; `likelihood`, minus the mean cross-entropy; `head_minus_missed`, balanced accuracy of the common classes
            minus `classification.tail_missed` of the probability of the rare ones: find the rare, and do not pay with the common.
        logits: [N, C], as they are used.
        tail: [C] bool, the rare classes.

    Raises ValueError for `head_minus_missed` where validation tiles are all of rare, or all of common classes.
    """
    if name == "balanced_accuracy":
        return balanced_accuracy(logits, targets)
    if name == "likelihood":
        return -float(F.cross_entropy(logits, targets))
    if name != "head_minus_missed":
        raise ValueError(f"select_by is {name!r}; expected one of {', '.join(SELECT)}")
    tail = torch.as_tensor(tail, dtype=torch.bool)
    rare = tail[targets]
    if rare.all() or not rare.any():
        raise ValueError("select_by head_minus_missed needs validation tiles of rare and of common classes; use balanced_accuracy")
    missed = classification.tail_missed(logits.double().softmax(dim=1)[:, tail].sum(dim=1).numpy(), rare.numpy())
    return balanced_accuracy(logits[~rare], targets[~rare]) - missed


def fit_temperature(logits, targets):
    """The temperature in [0.1, 10] that makes softmax(logits / T) likeliest on targets (Guo et al. 2017), 1 without tiles.

    A weak belief in T = 1 (log T of deviation 0.7) keeps a few tiles, all answered right, from claiming certainty. Tiles of a class
    the classifier has never seen say nothing about its temperature and are left out.
    """
    seen = logits.gather(1, targets[:, None])[:, 0] > classifiers.UNSEEN / 2 if len(targets) else torch.zeros(0, dtype=torch.bool)
    if not seen.any():
        return 1.0
    grid = torch.logspace(-1, 1, 201, dtype=torch.float64)
    cost = torch.stack([F.cross_entropy(logits[seen].double() / t, targets[seen], reduction="sum") for t in grid])
    return float(grid[(cost + (grid.log() / 0.7) ** 2 / 2).argmin()])


# --- a head on features ----------------------------------------------------------------------------------------------


def fit_head(
    head, feats, targets, batches, objective, *,
    lr, generator, mixture=None, val=None, select_by="balanced_accuracy", patience=0, weight_decay=1e-2, checks=20, only=None,
):  # fmt: skip
    """Train a linear or hidden-layer head on cached features, one update per row of `batches`.

    Args:
        feats: [N, V, D] float array, V views of each tile; each draw takes one of them at random.
        targets: [N] int64.
        batches: [steps, B] int64 into feats, from `longtail.draws`.
        objective: longtail.Objective.
        mixture: (partners [steps, B], shares [steps]) of `longtail.mixtures`, mixed as features; or None.
        val: (feats [M, D], targets [M]) of real validation tiles, or None. The check with the best score, then the best likelihood, is
            kept; without validation tiles the last weights are.
        patience: checks without a better one after which training ends; 0 for never.
        only: parameters to train, by default all.

    Returns:
        DataFrame of the checks: step, loss, val_balanced_accuracy, val_nll, val_score; `attrs` has best_step and updates.
    """
    steps, device = len(batches), next(head.parameters()).device
    views = torch.randint(feats.shape[1], (2, *batches.shape), generator=generator)
    optimiser = torch.optim.AdamW(list(only or head.parameters()), lr=lr, weight_decay=weight_decay)
    every, rows, best, losses, renewed = max(1, steps // checks), [], None, [], int(np.ceil(objective.drw * steps))

    def read(index, view):
        return torch.from_numpy(np.asarray(feats[index.numpy(), view.numpy()])).to(device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # dropout
        for step in range(1, steps + 1):
            done, batch = (step - 1) / steps, batches[step - 1]
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 + np.cos(np.pi * done)) / 2 * objective.rate(done)
            x, y = read(batch, views[0, step - 1]), targets[batch].to(device)
            if mixture is None:
                value = objective(head.train()(x), y, done)
            else:
                partner, share = mixture[0][step - 1], float(mixture[1][step - 1])
                x = torch.lerp(x, read(partner, views[1, step - 1]), share)
                value = objective.mixed(head.train()(x), y, targets[partner].to(device), share, done)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
            losses.append(value.detach())
            if step % every == 0 or step == steps:
                row = {"step": step, "loss": float(torch.stack(losses).mean()), **_check(head.eval(), val, device, objective, select_by)}
                if not np.isfinite(row["loss"]):
                    raise FloatingPointError(f"the loss is {row['loss']} at step {step}; lower lr (now {lr}) or look at the features")
                rows, losses = [*rows, row], []
                rank = (row["val_score"], -row["val_nll"])
                if val is not None and (best is None or rank > best[0]):
                    best = (rank, step, copy.deepcopy(head.state_dict()))
                if loop.spent(step, best and best[1], patience * every, renewed):
                    break
    if best is not None:
        head.load_state_dict(best[2])
    history = pd.DataFrame(rows, columns=["step", "loss", "val_balanced_accuracy", "val_nll", "val_score"])
    history.attrs.update(best_step=best[1] if best else steps, updates=steps)
    return history


def _check(head, val, device, objective, select_by):
    if val is None:
        return {"val_balanced_accuracy": float("nan"), "val_nll": float("nan"), "val_score": float("nan")}
    with torch.no_grad():
        logits = objective.scale * head(torch.from_numpy(np.array(val[0])).to(device)).cpu()
    found = {"val_balanced_accuracy": balanced_accuracy(logits, val[1]), "val_nll": float(F.cross_entropy(logits, val[1]))}
    return found | {"val_score": score(select_by, logits, val[1], objective.tail)}


# --- a network end to end --------------------------------------------------------------------------------------------


def fit_full(
    classifier, read, targets, batches, objective, *,
    lr, seed, folder, identity=None, mixture=None, val=None, select_by="balanced_accuracy", patience=0, jitter=False, turns=True,
    checks=10, only_last=False,
):  # fmt: skip
    """Train encoder and head end to end, one update per row of `batches`; resumable in `folder`.

    Args:
        read: `read(indices)` -> uint8 [B, H, W, 3] of training tiles; for an accelerator it is called ahead, in a thread.
        batches, objective, select_by, patience: as in `fit_head`; `mixture` mixes images.
        val: (`read(indices)`, targets [M]) of real validation tiles, or None; the best check is kept.
        turns: each image under a random one of the 8 symmetries; `jitter`: also with its stains jittered.
        only_last: train the last layer alone, on an encoder that stays as it is, statistics of batch normalisation included.

    Returns:
        DataFrame of `loop.fit` with val_score and val_balanced_accuracy; `attrs` has best_step and updates.
    """
    device, steps = torch.device(classifier.encoder.device), len(batches)
    renewed = int(np.ceil(objective.drw * steps))

    def images_of(k, rows, name):
        generator = torch.Generator().manual_seed(files.seed(seed, name, k))
        images = data.to_float(torch.as_tensor(read(rows.numpy())).to(device))
        images = augment.stain_jitter((images + 1) / 2, generator) * 2 - 1 if jitter else images
        return augment.random_symmetry(images, generator) if turns else images

    def batch_of(k):
        images = images_of(k, batches[k], "augment")
        if mixture is None:
            return images, targets[batches[k]], None, 0.0
        partner, share = mixture[0][k], float(mixture[1][k])
        return torch.lerp(images, images_of(k, partner, "augment partner"), share), targets[batches[k]], targets[partner], share

    def settle():
        """Batch statistics from the same 4 training batches whatever came before, so that a resumed run judges alike."""
        norms = [] if only_last else [module for module in classifier.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # plain average
        if norms:
            classifier.train()
            with torch.no_grad():
                [classifier(batch_of(k)[0]) for k in range(min(4, steps))]
        classifier.eval()

    def step_loss(batch, step, generator):
        images, y, others, share = batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(files.seed(seed, "dropout", step))
            logits = classifier.train(not only_last)(images).float()
        if others is None:
            return objective(logits, y.to(device), step / steps)
        return objective.mixed(logits, y.to(device), others.to(device), share, step / steps)

    def validate():
        settle()
        logits = objective.scale * _logits(classifier, val[0], len(val[1]))
        said = {"val_score": score(select_by, logits, val[1], objective.tail), "val_balanced_accuracy": balanced_accuracy(logits, val[1])}
        return -said["val_score"], said

    trained = list(classifier.last.parameters()) if only_last else [p for p in classifier.parameters() if p.requires_grad]
    player = loop.Player("classifier", [{"params": trained, "lr": lr}], step_loss)
    every = max(1, steps // checks)
    with loop.ahead(batch_of, steps) if device.type != "cpu" else contextlib.nullcontext(batch_of) as batch:
        history = loop.fit(
            [player], batch, steps, seed, folder=folder, identity=identity, schedule="one_cycle", validate_every=every,
            validate=validate if val is not None else None, checkpoint_every=every, patience=patience, renewed=renewed,
            factor=lambda step: objective.rate(step / steps), autocast=machine.bfloat16(device) if device.type == "cuda" else None,
        )  # fmt: skip
    settle()
    history.attrs.update(best_step=history.attrs["best_step"] or steps, updates=steps)
    return history


def _logits(classifier, read, n, batch_size=64):
    starts = range(0, n, batch_size)
    with torch.no_grad():
        return torch.cat([classifier(data.to_float(read(np.arange(i, min(i + batch_size, n))))).cpu().float() for i in starts])
