"""What is done about few tiles in the training itself: which are drawn, and what an error costs.

Losses and samplers on tensors. Which classes are rare is the dataset's business, which images are drawn from
`comparison`'s; nothing here opens a file or trains a model.
"""

import torch
from torch.nn import functional as F

VERSION = 2


def cross_entropy(logits, targets, prior=None):
    """Mean of -log softmax(logits)[target] over logits [B, C] and targets [B] int64; lower is better. `prior` is not used."""
    return F.cross_entropy(logits, targets)


def logit_adjustment(logits, targets, prior, tau=1.0):
    """Cross-entropy of logits + tau log(prior): the classifier learns what speaks for a class apart from how common it is.

    Menon et al. (2021), arXiv:2007.07314, equation 10. At inference the bare logits are used.

    Args:
        logits: [B, C] float.
        targets: [B] int64.
        prior: [C] float, share of each class among what the sampler draws; with equal shares this is cross-entropy.
            A class that is never drawn is treated as drawn once in ten thousand.
    """
    return F.cross_entropy(logits + tau * torch.log(prior.clamp(min=1e-4)).to(logits), targets)


LOSSES = {"cross_entropy": cross_entropy, "logit_adjustment": logit_adjustment}
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


def draws(targets, n_classes, steps, batch_size, generator, sampler="natural"):
    """Which tiles make which batch: indices [steps, batch_size] int64 into targets [N].

    `natural` goes through a new shuffle of all tiles again and again. The others draw a class by `class_shares`, then go through
    a new shuffle of that class. Every arm gets the same number of batches of the same size, however many tiles it has.
    """
    targets = torch.as_tensor(targets)
    total = steps * batch_size
    shares = class_shares(class_counts(targets, n_classes), sampler)
    if sampler == "natural":
        return _shuffles(torch.arange(len(targets)), total, generator).view(steps, batch_size)
    classes = torch.multinomial(shares, total, replacement=True, generator=generator) if total else torch.empty(0, dtype=torch.int64)
    out = torch.empty(total, dtype=torch.int64)
    for c in range(n_classes):
        slots = (classes == c).nonzero()[:, 0]
        out[slots] = _shuffles((targets == c).nonzero()[:, 0], len(slots), generator)
    return out.view(steps, batch_size)


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
