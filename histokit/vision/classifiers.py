"""Classifiers that carry everything needed to use them: encoder, transform, class list, scale, temperature.

Build, save, load and predict; `fit_classifier` trains. Which tiles a classifier sees, and why, is `comparison`'s business.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from histokit.core import files
from histokit.tiles import data
from histokit.vision import features

VERSION = 3
MODES = {"linear": 1e-2, "head": 1e-3, "knn": 0.0, "prototype": 0.0, "full": 1e-3}  # learning rate where none is given; 0: nothing to learn
UNSEEN = -1e4  # logit of a class that a knn or prototype head has no example of


# --- heads on features -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Multinomial logistic regression on standardised features."""

    def __init__(self, dim, n_classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.out = nn.Linear(dim, n_classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def standardise(self, feats):
        """Take mean and deviation from feats [N, D]; a dimension that never changes is left alone."""
        self.mean.copy_(feats.mean(dim=0))
        std = feats.std(dim=0, unbiased=False)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, feats):
        return self.out((feats - self.mean) / self.std)


class Head(Linear):
    """One hidden layer of 256 with dropout 0.4 on standardised features: the head of Wang et al. (2024), arXiv:2406.18375."""

    def __init__(self, dim, n_classes):
        super().__init__(dim, n_classes)
        self.out = nn.Sequential(nn.Linear(dim, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, n_classes))


class Prototype(nn.Module):
    """Cosine similarity to the mean of each class, divided by 0.07; a class without examples is never chosen."""

    def __init__(self, dim, n_classes):
        super().__init__()
        self.register_buffer("centres", torch.zeros(n_classes, dim))
        self.register_buffer("origin", torch.zeros(dim))

    def fit(self, feats, targets, shares):
        self.origin.copy_(feats.mean(dim=0))
        unit = F.normalize(feats - self.origin, dim=1)
        for c in targets.unique():
            self.centres[c] = F.normalize(unit[targets == c].mean(dim=0), dim=0)
        return self

    def forward(self, feats):
        logits = F.normalize(feats - self.origin, dim=1) @ self.centres.T / 0.07
        return logits.masked_fill((self.centres == 0).all(dim=1), UNSEEN)


class Neighbours(nn.Module):
    """Vote of the 20 nearest training tiles, each with weight exp(cosine / 0.07), as in Caron et al. (2021), arXiv:2104.14294.

    A vote counts class share wanted / class share present, so that `balanced` gives a rare class its say.
    """

    k = 20

    def __init__(self, dim, n_classes, n=0):
        super().__init__()
        self.register_buffer("bank", torch.zeros(n, dim))
        self.register_buffer("targets", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("weight", torch.zeros(n_classes))
        self.register_buffer("origin", torch.zeros(dim))

    def fit(self, feats, targets, shares):
        self.origin.copy_(feats.mean(dim=0))
        self.bank, self.targets = F.normalize(feats - self.origin, dim=1), targets.clone()
        self.weight.copy_(shares.to(targets.device) / torch.bincount(targets, minlength=len(self.weight)).clamp(min=1) * len(targets))
        return self

    def forward(self, feats):
        return torch.cat([self._vote(part) for part in feats.split(64)]) if len(feats) else feats.new_zeros(0, len(self.weight))

    def _vote(self, feats):  # a few at a time: a bank of 130,000 tiles in 8 views is long
        near, index = (F.normalize(feats - self.origin, dim=1) @ self.bank.T).topk(min(self.k, len(self.bank)), dim=1)
        votes = ((near - 1) / 0.07).exp() * self.weight[self.targets[index]]
        total = votes.new_zeros(len(feats), len(self.weight)).scatter_add_(1, self.targets[index], votes)
        return (total / total.sum(dim=1, keepdim=True) + 1e-4).log().masked_fill(self.weight == 0, UNSEEN)


HEADS = {"linear": Linear, "head": Head, "prototype": Prototype, "knn": Neighbours, "full": Linear}


# --- the classifier --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder and a head, with all that is needed to use them on a tile.

    `facts` is what model.json holds: classes, mode, encoder with its identity and licence, transform, scale, temperature, and
    what the caller adds. Logits are multiplied by `scale` (for losses that train scaled logits) and divided by `temperature`
    (fitted on validation tiles), so that softmax gives probabilities.
    """

    def __init__(self, encoder, classes, mode="linear", *, tile_px=0, fit="", seed=0):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if mode == "full" and not any(True for _ in encoder.net.parameters()):
            raise ValueError(f"mode full trains the encoder, and {encoder.name!r} has nothing to train; use cnn, or mode: linear")
        self.encoder = encoder
        self.net = encoder.net if mode == "full" else None  # a frozen encoder is named in model.json, its weights are not copied
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = HEADS[mode](encoder.dim, len(classes)).to(encoder.device)
        transform = {"tile_px": tile_px, "fit": fit, "size": encoder.size, "mean": list(encoder.mean), "std": list(encoder.std)}
        named = {"encoder": encoder.name, "encoder_identity": encoder.identity, "licence": encoder.licence, "dim": encoder.dim}
        self.facts = dict(classes=list(classes), mode=mode, **named, transform=transform, scale=1.0, temperature=1.0)

    classes = property(lambda self: self.facts["classes"])
    mode = property(lambda self: self.facts["mode"])
    transform = property(lambda self: self.facts["transform"])
    temperature = property(lambda self: self.facts["temperature"])

    @property
    def last(self):
        """The last linear layer, which cRT trains anew and tau-normalisation rescales."""
        return self.head.out[-1] if isinstance(self.head, Head) else self.head.out

    def from_features(self, feats):
        """Logits [B, C] of features [B, D]."""
        return self.head(feats.to(self.encoder.device)) * (self.facts["scale"] / self.facts["temperature"])

    def forward(self, images):
        """Logits [B, C] of images [B, 3, H, W] float in [-1, 1], with gradients, so that a generator can be steered by them."""
        return self.from_features(self.encoder.features(images))

    def predict(self, pixels, batch_size=64):
        """Probabilities float32 [B, C] of uint8 tiles [B, H, W, 3]; columns in the order of `classes`."""
        with torch.inference_mode():
            self.eval()
            parts = [self(data.to_float(pixels[i : i + batch_size])).softmax(dim=1).cpu() for i in range(0, len(pixels), batch_size)]
        return torch.cat(parts).numpy() if parts else np.zeros((0, len(self.classes)), np.float32)

    def predict_tiles(self, tiles, batch_size=64):
        """Probabilities float32 [N, C] of manifest rows; through the feature cache where the encoder is frozen."""
        return probabilities(self.logits_of(tiles, batch_size))

    def logits_of(self, tiles, batch_size=64):
        """Logits float32 [N, C] on the CPU of manifest rows, resized as in training."""
        size = self.transform["tile_px"], self.transform["fit"]
        with torch.inference_mode():
            self.eval()
            if self.mode != "full":
                feats = features.embed(self.encoder, tiles, tile_px=size[0], fit=size[1])
                return self.from_features(torch.from_numpy(np.array(feats))).cpu()
            starts = range(0, len(tiles), batch_size)
            parts = [self(data.to_float(data.pixels(tiles.iloc[i : i + batch_size], *size))).cpu() for i in starts]
            return torch.cat(parts) if parts else torch.zeros(0, len(self.classes))

    def save(self, folder, **facts):
        """Write model.safetensors, then model.json with `facts` added: a folder that has a model.json is whole."""
        files.write_tensors(Path(folder) / "model.safetensors", self.state_dict())
        files.write_json(Path(folder) / "model.json", {"version": VERSION, **self.facts, **facts})


def trained(top, step, arm="", role="judge"):
    """Folders of the finished seeds of one arm of a 06 step, in order of their seeds.

    Args:
        top: folder of the step.
        step: its id, for messages.
        arm: empty when it has only one.
        role: what the arm is wanted for.

    Raises ValueError for an arm that is not there.
    """
    found = {}
    for path in sorted(Path(top).glob("*/*/model.json"), key=lambda path: int(path.parent.name)):
        found.setdefault(path.parent.parent.name, []).append(path.parent)
    name = next(iter(found)) if not arm and len(found) == 1 else arm
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise ValueError(f"{role} arm {arm!r} is not in {step}, which has {known}; set {role}_arm to one of them")
    return found[name]


def load(folder, device="cpu"):
    """The classifier saved in `folder`, frozen, in eval mode; ValueError when its encoder is not the one it was fitted on."""
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model.json: no classifier was finished there")
    facts = files.read_json(path)
    full = facts["mode"] == "full"
    name = facts["encoder"].partition("@")[0] if full else facts["encoder"]  # its own weights replace those it started from
    encoder = features.load(name, device, frozen=not full, dim=facts["dim"])
    changed = [key for key, value in files.plain(encoder.identity).items() if value != facts["encoder_identity"].get(key)]
    if changed and not full:
        raise ValueError(f"{path} was fitted on another {name!r} (its {', '.join(changed)} differs); run that step again")
    transform = facts["transform"]
    encoder.size, encoder.mean, encoder.std = transform["size"], tuple(transform["mean"]), tuple(transform["std"])
    classifier = Classifier(encoder, facts["classes"], facts["mode"])
    classifier.facts = facts
    state = files.read_tensors(Path(folder) / "model.safetensors", device)
    if facts["mode"] == "knn":
        classifier.head = Neighbours(encoder.dim, len(facts["classes"]), len(state["head.bank"])).to(device)
    classifier.load_state_dict(state)
    return classifier.requires_grad_(False).eval()


def probabilities(logits):
    return logits.double().softmax(dim=1).float().numpy()


def identity(classifier):
    """16 hex that tell one trained classifier from another."""
    facts = classifier.facts
    return files.digest(facts.get("key", ""), facts["encoder_identity"], facts["classes"], facts["scale"], facts["temperature"])[:16]
