"""What is done about few tiles in the training itself: which are drawn, what an error costs, and from when on.

Losses, class weights, samplers and mixtures on tensors; an `Objective` puts those of one arm together. Which classes are rare is the
dataset's business, which images are drawn from `comparison`'s; nothing here opens a file or trains a model.
"""

import functools
import math

import numpy as np
import torch
from torch.nn import functional as F

VERSION = 3


# --- losses of one tile ----------------------------------------------------------------------------------------------


def cross_entropy(logits, targets):
    """-log softmax(logits)[target], [B] >= 0, of logits [B, C] and targets [B] int64; lower is better, as everywhere here."""
    return F.cross_entropy(logits, targets, reduction="none")


def focal(logits, targets, gamma=2.0):
    """(1 - p)^gamma times the cross-entropy [B]: what is answered right already counts little. Lin et al. (2017), arXiv:1708.02002, eq. 4.

    gamma 0 is cross-entropy.
    """
    loss = cross_entropy(logits, targets)
    return (1 - torch.exp(-loss)) ** gamma * loss


def ldam(logits, targets, counts, margin=0.5, scale=30.0):
    """Cross-entropy [B] of scale (logits - m) with a margin m of the target's class alone, wider for rare ones.

    Cao et al. (2019), arXiv:1906.07413, equations 12 and 13. What the classifier says later is softmax(scale logits): a checkpoint has to
    carry the scale, or its probabilities are far flatter than those it was trained on.

    Args:
        counts: [C] training tiles of each class; one without tiles counts as one.
        margin: of the rarest class; that of class c is margin (min n / n_c)^(1/4).
        scale: > 0.
    """
    wide = torch.as_tensor(counts).to(logits).clamp(min=1) ** -0.25
    wide = margin * wide / wide.max()
    return cross_entropy(scale * (logits - F.one_hot(targets, logits.shape[1]) * wide), targets)


def logit_adjustment(logits, targets, prior, tau=1.0):
    """Cross-entropy [B] of logits + tau log(prior): the classifier learns what speaks for a class apart from how common it is.

    Menon et al. (2021), arXiv:2007.07314, equation 10; with tau 1 it is the balanced softmax of Ren et al. (2020), arXiv:2007.10740,
    equation 4. At inference the bare logits are used.

    Args:
        prior: [C] float, share of each class among what the sampler draws; with equal shares this is cross-entropy.
            A class that is never drawn is treated as drawn once in ten thousand.
    """
    return cross_entropy(logits + tau * torch.log(prior.clamp(min=1e-4)).to(logits), targets)


def coarse(logits, targets, tail):
    """-log of the probability [B] that a tile is given to the rare classes, for a rare one, or to the common ones, for a common one.

    The coarse half of the hierarchical outlier loss of Roy et al. (2021), arXiv:2104.03829. As a difference of log-sum-exps it stays finite
    where the probability itself is 0 in floating point.

    Args:
        tail: [C] bool, both kinds present.
    """
    tail = torch.as_tensor(tail, device=logits.device)
    own = tail[targets][:, None] == tail[None]  # [B, C]
    return logits.logsumexp(dim=1) - logits.masked_fill(~own, -torch.inf).logsumexp(dim=1)


LOSSES = {"cross_entropy": cross_entropy, "focal": focal, "ldam": ldam, "logit_adjustment": logit_adjustment}
TAKES = {"focal": ("gamma",), "ldam": ("margin", "scale"), "logit_adjustment": ("tau",)}  # options of each


# --- class weights ---------------------------------------------------------------------------------------------------


def class_weights(counts, method="none", beta=0.9999):
    """Weight of a tile of each class, [C] float64; a class without tiles has 0.

    Args:
        counts: [C] training tiles.
        method: `none`: 1; `balanced`: N / (C n_c), as in scikit-learn; `effective`: (1 - beta) / (1 - beta^n_c), made to sum to C, the
            effective number of samples of Cui et al. (2019), arXiv:1901.05555, equation 5.
        beta: in [0, 1); near 1 it approaches `balanced`, at 0 every class weighs alike.
    """
    counts = torch.as_tensor(counts).double()
    there = counts > 0
    if method == "none":
        return there.double()
    if method == "balanced":
        return torch.where(there, counts.sum() / (len(counts) * counts.clamp(min=1)), 0.0)
    if method == "effective":
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}; expected at least 0 and below 1, such as 0.9999")
        weight = torch.where(there, (1 - beta) / (1 - beta ** counts.clamp(min=1)), 0.0)
        return weight * len(counts) / weight.sum()
    raise ValueError(f"weights is {method!r}; expected one of {', '.join(WEIGHTS)}")


WEIGHTS = ("none", "balanced", "effective")
MEANS = ("weights", "tiles")  # what a weighted sum is divided by


def weighted_mean(losses, weights, over="weights"):
    """Mean of losses [B] under weights [B], divided by the sum of the weights, or by the number of tiles.

    Over tiles the size of a step depends on how many rare ones a batch happens to hold.
    """
    if over not in MEANS:
        raise ValueError(f"a weighted mean is taken over {over!r}; expected one of {', '.join(MEANS)}")
    total = weights.sum() if over == "weights" else len(losses)
    return (losses * weights).sum() / total


# --- the objective of one arm ----------------------------------------------------------------------------------------

OPTIONS = {
    "gamma": 2.0,  # focal
    "margin": 0.5,  # ldam
    "scale": 30.0,  # ldam
    "tau": 1.0,  # logit_adjustment
    "beta": 0.9999,  # weights: effective
    "mean": "weights",  # what weighted losses are divided by: weights or tiles
    "drw_lr": 0.1,  # factor of the learning rate once the weights have set in
    "alpha": 0.2,  # mixture
    "crt": 0.25,  # decouple: crt, share of the updates that train the new head
    "tau_norm": 1.0,  # decouple: tau_norm
}
DECOUPLE = ("none", "crt", "tau_norm")
SETTINGS = ("loss", "weights", "drw", "coarse", "options")  # of an arm, what its Objective is made of


class Objective:
    """What a classifier is trained to lower, from the settings of an arm.

    Args:
        counts: [C] training tiles of each class.
        prior: [C] shares among what the sampler draws.
        tail: [C] bool, the rare classes.
        loss: a name of `LOSSES`.
        weights: a name of `WEIGHTS`.
        drw: share of the updates without class weights; after it they set in and the learning rate falls to `drw_lr` of what it would be.
            Deferred re-weighting, Cao et al. (2019), arXiv:1906.07413, algorithm 1.
        coarse: weight of the term `coarse`, which class weights leave alone; 0 leaves it out.
        options: some of `OPTIONS`.
    """

    def __init__(self, counts, prior, tail, *, loss="cross_entropy", weights="none", drw=0.0, coarse=0.0, options=None):
        check(loss=loss, weights=weights, drw=drw, coarse=coarse)
        self.tail, self.options = torch.as_tensor(tail, dtype=torch.bool), OPTIONS | (options or {})
        if coarse and (self.tail.all() or not self.tail.any()):
            raise ValueError("the coarse term tells rare classes from common ones, and here all are of one kind; set roles in the dataset")
        self.drw, self.coarse = float(drw), float(coarse)
        self.weights = class_weights(counts, weights, self.options["beta"])
        given = {name: self.options[name] for name in TAKES.get(loss, ())}
        given |= {"counts": counts} if loss == "ldam" else {"prior": prior} if loss == "logit_adjustment" else {}
        self._loss = functools.partial(LOSSES[loss], **given)
        self.scale = given.get("scale", 1.0)  # of logits before softmax, in training and ever after

    def __call__(self, logits, targets, done=1.0):
        """The mean loss of a batch when the share `done` in [0, 1] of the updates is over."""
        weights = self.weights if done >= self.drw else torch.ones_like(self.weights)
        loss = weighted_mean(self._loss(logits, targets), weights.to(logits)[targets], self.options["mean"])
        return loss + self.coarse * coarse(self.scale * logits, targets, self.tail).mean() if self.coarse else loss

    def mixed(self, logits, targets, others, share, done=1.0):
        """The loss of inputs that are `share` parts of `others` and the rest of `targets`; Zhang et al. (2018), arXiv:1710.09412, eq. 1."""
        return (1 - share) * self(logits, targets, done) + share * self(logits, others, done)

    def rate(self, done):
        """Factor of the learning rate when the share `done` of the updates is over."""
        return self.options["drw_lr"] if self.drw and done >= self.drw else 1.0


def check(*, loss="cross_entropy", weights="none", drw=0.0, coarse=0.0, mixture="none", decouple="none", mode="full", options=None):
    """Raise ValueError for a setting of an arm that is not known, out of range, or would do nothing."""
    for name, value, known in (
        ("loss", loss, LOSSES), ("weights", weights, WEIGHTS), ("mixture", mixture, MIXTURES), ("decouple", decouple, DECOUPLE),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if not 0 <= drw < 1:
        raise ValueError(f"drw is {drw}: the share of the updates before class weights set in, at least 0 and below 1")
    if drw and weights == "none":
        raise ValueError("drw says when class weights set in, and weights is none; set weights: effective or balanced")
    if not coarse >= 0:
        raise ValueError(f"coarse is {coarse}; expected a weight of at least 0")
    if drw and decouple == "crt":
        raise ValueError("drw and decouple: crt are two ways to turn to the rare classes late; use one of them")
    if decouple != "none" and mode not in ("full", "head"):
        raise ValueError(f"decouple: {decouple} trains the last layer apart from what is below it, and mode {mode} has only one; use full")
    used = [*TAKES.get(loss, ()), *(["beta"] if weights == "effective" else []), *(["mean"] if weights != "none" else [])]
    used += [*(["drw_lr"] if drw else []), *(["alpha"] if mixture != "none" else []), *([decouple] if decouple != "none" else [])]
    for name, value in (options or {}).items():
        if name not in OPTIONS:
            raise ValueError(f"options has no {name!r}; expected some of {', '.join(OPTIONS)}")
        if name not in used:
            raise ValueError(f"options: {name} does nothing here; leave it out (what acts: {', '.join(used) or 'none'})")
        _check_option(name, value)


RANGES = {"scale": (0, math.inf), "drw_lr": (0, math.inf), "alpha": (0, math.inf), "crt": (0, 1)}  # open


def _check_option(name, value):
    if name == "mean":
        weighted_mean(torch.ones(1), torch.ones(1), value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"options: {name} is {value!r}; expected a number")
    elif name == "beta":
        class_weights([1], "effective", value)
    elif name in RANGES and not RANGES[name][0] < value < RANGES[name][1]:
        raise ValueError(f"options: {name} is {value}; expected more than {RANGES[name][0]} and less than {RANGES[name][1]}")


def tau_normalised(weight, tau=1.0):
    """Rows [C, D] of a linear classifier divided by their length to the power tau; 0 leaves them, 1 makes all classes equally long.

    Kang et al. (2020), arXiv:1910.09217, equation 5. Rows of common classes grow longer in training; the bias is to be zeroed with it.
    """
    return weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12) ** tau


# --- which tiles are drawn -------------------------------------------------------------------------------------------

SAMPLERS = {"natural": 1.0, "square_root": 0.5, "balanced": 0.0}  # a class is drawn in proportion to its count to this power


def class_counts(targets, n_classes):
    """Number of tiles [C] int64 of each class in targets [N] int64; absent classes count 0."""
    return torch.bincount(torch.as_tensor(targets), minlength=n_classes)


def class_shares(counts, sampler="natural"):
    """Share [C] float64 of each class among what `sampler` draws; absent classes have 0.

    `natural`: as they come; `balanced`: every class alike; `square_root`: in proportion to the root of the count
    (Mahajan et al. 2018), halfway between.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    counts = torch.as_tensor(counts).double()
    weight = torch.where(counts > 0, counts ** SAMPLERS[sampler], 0.0)
    if weight.sum() == 0:
        raise ValueError("there is no training tile of any class; check split, use and class names of the manifest")
    return weight / weight.sum()


def draws(targets, n_classes, steps, batch_size, generator, sampler="natural", made=None, most=1.0):
    """Which tiles make which batch: indices [steps, batch_size] int64 into targets [N].

    `natural` goes through a new shuffle of all tiles again and again. The others draw a class by `class_shares`, then go through
    a new shuffle of that class. Every arm gets the same number of batches of the same size, however many tiles it has.

    Args:
        made: [N] bool, the synthetic tiles; None for none.
        most: share in (0, 1] of the draws of a class that synthetic tiles have at most, so that ten real ones are not lost among hundreds.
            A class with fewer synthetic tiles than that is drawn as it is, as is one without real tiles; `natural` knows no classes.
    """
    targets = torch.as_tensor(targets)
    total = steps * batch_size
    shares = class_shares(class_counts(targets, n_classes), sampler)
    if sampler == "natural":
        return _shuffles(torch.arange(len(targets)), total, generator).view(steps, batch_size)
    classes = torch.multinomial(shares, total, replacement=True, generator=generator) if total else torch.empty(0, dtype=torch.int64)
    out = torch.empty(total, dtype=torch.int64)
    for c in range(n_classes):
        slots, own = (classes == c).nonzero()[:, 0], targets == c
        parts = [(slots, own)]
        if made is not None and (own & ~made).any() and (own & made).sum() > most * own.sum():
            free = torch.rand(len(slots), generator=generator) < most  # where a synthetic tile stands
            parts = [(slots[free], own & made), (slots[~free], own & ~made)]
        for places, tiles in parts:
            out[places] = _shuffles(tiles.nonzero()[:, 0], len(places), generator)
    return out.view(steps, batch_size)


MIXTURES = ("none", "mixup", "balanced")


def mixtures(batches, targets, n_classes, generator, kind="mixup", alpha=0.2, made=None, most=1.0):
    """What is mixed into each batch: indices [steps, B] int64 of the partners, and their share [steps] float32 in [0, 1].

    `mixup`: the same batch in another order, share ~ Beta(alpha, alpha); Zhang et al. (2018), arXiv:1710.09412. `balanced`: tiles drawn
    with every class alike, share ~ Beta(alpha, 1), so that the batch as drawn weighs more; Galdran et al. (2021), arXiv:2109.09850;
    `made` and `most` as in `draws`.
    """
    if kind not in MIXTURES[1:]:
        raise ValueError(f"mixture is {kind!r}; expected one of {', '.join(MIXTURES[1:])}")
    steps, batch_size = batches.shape
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    share = torch.from_numpy(rng.beta(alpha, alpha if kind == "mixup" else 1.0, steps).astype(np.float32))
    if kind == "balanced":
        return draws(targets, n_classes, steps, batch_size, generator, "balanced", made, most), share
    order = [torch.randperm(batch_size, generator=generator) for _ in range(steps)]
    return torch.stack([row[o] for row, o in zip(batches, order, strict=True)]) if steps else batches.clone(), share


def misplaced(targets, n_classes, generator):
    """Labels [N] int64 for targets [N], none of them right: the same labels on other tiles, a control that must not help.

    Where one class has more than half of the tiles, what is left over gets labels of other classes at random.
    """
    targets = torch.as_tensor(targets)
    if not len(targets):
        return targets.clone()
    order = torch.randperm(len(targets), generator=generator)
    order = order[targets[order].argsort(stable=True)]
    out = targets.clone()
    out[order] = targets[order].roll(-int(torch.bincount(targets).max()))  # past the end of the longest run of one label
    same = (out == targets).nonzero()[:, 0]
    out[same] = (targets[same] + torch.randint(1, n_classes, (len(same),), generator=generator)) % n_classes
    return out


def _shuffles(items, total, generator):
    if total == 0:
        return items[:0]
    rounds = -(-total // len(items))
    return torch.cat([items[torch.randperm(len(items), generator=generator)] for _ in range(rounds)])[:total]
