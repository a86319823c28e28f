"""Trains one segmenter: the loss, batches in which real and made tiles have exactly their shares, the weights that validation likes best.

Whatever an arm is made of, it takes the same number of updates of the same number of tiles: more tiles never mean more training. What the
arms are is in `segmentation_arms`.
"""

import functools
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional as F

from histokit.core import files
from histokit.metrics import segmentation
from histokit.tiles import augment, decode
from histokit.training import loop

VERSION = 1
SMOOTH = 0.01  # of the Dice term


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a segmenter is trained.

    Args:
        steps, batch_size: updates, and tiles of each.
        lr: peak of the one-cycle schedule.
        ce, dice: weights of cross-entropy and of the Dice term; 0.1 and 0.9 as published.
        rim: pixels along the border of a tile that do not count in the loss.
        augment: none, symmetries, or stain (with jittered stains too).
        weight_decay: of AdamW.
    """

    steps: int = 400
    batch_size: int = 16
    lr: float = 2e-3
    ce: float = 0.1
    dice: float = 0.9
    rim: int = 0
    augment: str = "symmetries"
    weight_decay: float = 0.01

    def __post_init__(self):
        if self.augment not in ("none", "symmetries", "stain"):
            raise ValueError(f"augment is {self.augment!r}; use none, symmetries or stain")
        if min(self.steps, self.batch_size) < 1 or min(self.ce, self.dice, self.rim) < 0 or self.ce + self.dice <= 0:
            raise ValueError(f"a segmenter needs updates, tiles and a loss; got {asdict(self)}")


def loss(logits, ids, *, ce=0.1, dice=0.9, rim=0):
    """ce x cross-entropy + dice x (1 - Dice of the foreground), >= 0, lower is better; as in STEDM, arXiv:2403.14429.

    Dice is that of the probabilities, its sums over batch and pixels together, mean over the layers but the background.

    Args:
        logits: [B, K, H, W]. ids: [B, H, W] int64.
        rim: pixels along the border that do not count.
    """
    if rim:
        logits, ids = logits[..., rim:-rim, rim:-rim], ids[..., rim:-rim, rim:-rim]
    p = logits.softmax(dim=1)
    drawn = F.one_hot(ids, logits.shape[1]).movedim(-1, 1).to(p)
    both, each = (p * drawn).sum((0, 2, 3))[1:], (p + drawn).sum((0, 2, 3))[1:]
    overlap = ((2 * both + SMOOTH) / (each + SMOOTH)).mean()
    return ce * F.cross_entropy(logits, ids) + dice * (1 - overlap)


def made_before(k, batch_size, share):
    """How many made tiles the first k batches hold: k x batch_size x share, rounded down, so that every epoch has exactly its share."""
    return int(k * batch_size * share + 1e-9)


def drawn(k, batch_size, share, n_real, n_made, seed):
    """Rows of batch k: real ones are numbers from 0, made ones from n_real on; each source in rounds, in a new order every round.

    A function of k alone, so that a resumed training draws what it would have drawn.
    """
    first, last = (made_before(i, batch_size, share) for i in (k, k + 1))
    rows = [n_real + _in_rounds(i, n_made, seed, "made") for i in range(first, last)]
    return rows + [_in_rounds(i, n_real, seed, "real") for i in range(k * batch_size - first, (k + 1) * batch_size - last)]


def _in_rounds(i, n, seed, source):
    lap, place = divmod(i, n)
    return _order(n, seed, source, lap)[place]


@functools.lru_cache(64)
def _order(n, seed, source, lap):
    return files.shuffled(range(n), seed, source, lap)


def augmented(pictures, ids, generator, how):
    """Pictures float [B, 3, H, W] in [0, 1] and ids [B, H, W] under the same symmetry each, and with other stains where asked."""
    if how == "none":
        return pictures, ids
    ks = torch.randint(8, (len(pictures),), generator=generator).tolist()
    pictures = torch.stack([augment.symmetry(one, k) for one, k in zip(pictures, ks, strict=True)])
    ids = torch.stack([augment.symmetry(one, k) for one, k in zip(ids, ks, strict=True)])
    return (augment.stain_jitter(pictures, generator) if how == "stain" else pictures), ids


def fit(segmenter, read, n_real, n_made, share, how, *, val=None, seed=0, folder=None, identity=None):
    """Train a Segmenter in place; returns the history of `loop.fit`.

    Args:
        read: `read(rows)` -> pixels uint8 [B, H, W, 3] and ids uint8 [B, H, W].
        n_real, n_made: how many rows are of each; share: of made ones in the draws, 0 without any.
        how: Settings.
        val: (pixels, ids, patients) of real validation tiles, whose mean Dice over patients chooses the weights; None takes the last.
        folder, identity: see `loop.fit`.
    """
    if not 0 <= share <= 1 or (share and not n_made) or (share < 1 and not n_real):
        raise ValueError(f"a share of {share} of made tiles needs made ones, and the rest real ones; there are {n_made} and {n_real}")
    device = segmenter.mean.device

    def batch(k):
        rows = drawn(k, how.batch_size, share, n_real, n_made, seed)
        pixels, ids = read(rows)
        g = torch.Generator().manual_seed(files.seed(seed, "augment", k))
        pictures, ids = augmented(decode.to_float(pixels) / 2 + 0.5, torch.as_tensor(np.array(ids)).long(), g, how.augment)
        return {"pictures": pictures, "ids": ids}

    def error(batch, step, generator):
        return loss(segmenter(batch["pictures"].to(device)), batch["ids"].to(device), ce=how.ce, dice=how.dice, rim=how.rim)

    def validate():
        pixels, ids, patients = val
        seen = segmenter.ids(pixels)
        segmenter.train()
        scores, _ = segmentation.per_patient(*segmentation.counts(ids, seen, len(segmenter.layers)), patients)
        with np.errstate(all="ignore"):
            mean = float(np.nanmean(scores[:, 1:]))
        return 1 - mean, {"val_dice": mean}

    segmenter.train()
    every = max(1, how.steps // 10)
    player = loop.Player("segmenter", [{"params": segmenter.net.parameters(), "lr": how.lr}], error, list(segmenter.net.buffers()))
    with loop.ahead(batch, how.steps) as batches:
        history = loop.fit(
            [player], batches, how.steps, seed, folder=folder, identity={**(identity or {}), **asdict(how)},
            validate=validate if val is not None and len(val[0]) else None, schedule="one_cycle", weight_decay=how.weight_decay,
            validate_every=every, log_every=every, checkpoint_every=max(every, 100),
        )  # fmt: skip
    segmenter.eval()
    return history
