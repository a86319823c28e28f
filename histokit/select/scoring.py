"""Scores of synthetic tiles, by which some are worth training on and some are not.

Each score maps features or pixels to one number per tile. Nothing here loads a model or sets a threshold: see `selection`.
"""

import numpy as np
import torch
from torch.nn import functional as F

VERSION = 1


def nearest_similarity(feats, real_feats):
    """Cosine similarity to the nearest training tile; near 1 means a copy.

    The replication score of Somepalli et al. (2023), arXiv:2212.03860, with any extractor.

    Args:
        feats: [B, D] float, or [B, V, D] for V views of each tile, of which the nearest counts.
        real_feats: [N, D] float, training tiles; N = 0 raises ValueError.

    Returns:
        Similarity [B] float in [-1, 1] and index [B] int64 into `real_feats`.
    """
    feats, real_feats = torch.as_tensor(feats), torch.as_tensor(real_feats)
    if len(real_feats) == 0:
        raise ValueError("nearest_similarity needs at least one real image, got none; check class and split")
    views = feats if feats.ndim == 3 else feats[:, None]
    real = F.normalize(real_feats, dim=-1)
    best = [(F.normalize(part, dim=-1) @ real.T).amax(dim=1).max(dim=1) for part in views.split(64)]  # [64, V, N] at a time
    if not best:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def real_similarity(views, real_feats, itself, cases=None, real_cases=None):
    """How near real tiles are to each other: similarity [B] of each to the nearest other tile, NaN where there is none.

    Args:
        views: [B, V, D], the tiles asked about, in the same views as the synthetic ones.
        real_feats: [N, D], all training tiles.
        itself: [B] int, position of each tile among them.
        cases, real_cases: [B] and [N] case ids; then only tiles of another case count. Tiles of one case are alike for
            reasons that are no copying.
    """
    views, real = torch.as_tensor(views), F.normalize(torch.as_tensor(real_feats), dim=-1)
    out = np.full(len(views), np.nan)
    for i, (tile, position) in enumerate(zip(views, itself, strict=True)):
        allowed = torch.ones(len(real), dtype=torch.bool)
        allowed[int(position)] = False
        if cases is not None:
            allowed &= torch.from_numpy(np.asarray(real_cases) != np.asarray(cases)[i])
        if allowed.any():
            out[i] = float((F.normalize(tile, dim=-1) @ real.T).amax(dim=0)[allowed].max())
    return out


def twins(views, order):
    """For each tile the most alike of those that come before it: similarity [B] (NaN for the first) and index [B] (-1).

    Args:
        views: [B, V, D] float; the first view is the tile itself.
        order: [B] int, positions from the most to the least wanted tile.
    """
    views = F.normalize(torch.as_tensor(views), dim=-1)
    similarity, index = np.full(len(views), np.nan), np.full(len(views), -1)
    for rank, i in enumerate(order):
        before = np.asarray(order[:rank], dtype=np.int64)
        if rank:
            alike = (views[int(i)] @ views[before, 0].T).amax(dim=0)
            similarity[i], index[i] = float(alike.max()), before[int(alike.argmax())]
    return similarity, index


def tone(pixels):
    """Brightness [B] (mean) and contrast [B] (standard deviation) of uint8 tiles [B, H, W, 3], both in grey levels of 0 to 255."""
    grey = np.asarray(pixels, np.float32).mean(axis=-1)
    return grey.mean(axis=(1, 2)), grey.std(axis=(1, 2))


def focus(pixels):
    """Sharpness [B] of uint8 tiles [B, H, W, 3]: standard deviation of the Laplacian of their grey levels; a blurred tile has little."""
    grey = torch.from_numpy(np.asarray(pixels, np.float32).mean(axis=-1))[:, None]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(grey, kernel).flatten(1).std(dim=1).numpy()


def deviation(amounts, reference):
    """How far [B] the stain of tiles [B, 2] (haematoxylin, eosin) lies from that of real ones [N, 2], in robust standard deviations.

    The farther of the two stains counts; 1.349 quartile ranges are a deviation of a normal distribution.
    """
    low, middle, high = np.quantile(reference, [0.25, 0.5, 0.75], axis=0)
    return (np.abs(amounts - middle) / np.maximum((high - low) / 1.349, 1e-6)).max(axis=1)


def to_centroids(feats, real_feats, real_labels, asked, metric="unit"):
    """Distances to the mean feature of each class of real training tiles; Liu et al. (2023), HistoDiffusion, section on selection.

    "unit": features and means have length 1, so a class that spreads far gains nothing by it. "raw": the paper's, means of unit features
    as they fall, mean squared difference, which favours such classes.

    Args:
        feats: [B, D]; real_feats: [N, D]; real_labels: [N].
        asked: class name the tiles were made for.

    Returns:
        Place [B] of the asked class among the nearest, from 1; distance [B] to it, lower is better; margin [B], distance to the nearest
        other class minus that, above 0 where the asked one is nearest (NaN with a single class).
    """
    if metric not in ("unit", "raw"):
        raise ValueError(f"metric is {metric!r}; expected unit or raw")
    feats, real_feats = (F.normalize(torch.as_tensor(np.asarray(x, np.float64)), dim=-1).numpy() for x in (feats, real_feats))
    names = sorted(set(real_labels))
    means = np.stack([real_feats[np.asarray(real_labels) == name].mean(0) for name in names])
    means = means / np.linalg.norm(means, axis=1, keepdims=True) if metric == "unit" else means
    distance = ((feats[:, None] - means[None]) ** 2).mean(-1)  # [B, C]
    own = names.index(asked)
    others = np.delete(distance, own, axis=1)
    margin = others.min(1) - distance[:, own] if others.shape[1] else np.full(len(feats), np.nan)
    return 1 + (distance < distance[:, [own]]).sum(1), distance[:, own], margin


def variance(feats):
    """Total variance of features [N, D] brought to length 1, unbiased, in [0, 1]; what is kept by nearness has little. NaN below two."""
    if len(feats) < 2:
        return float("nan")
    unit = F.normalize(torch.as_tensor(np.asarray(feats, np.float64)), dim=-1)
    return float((unit - unit.mean(dim=0)).square().sum() / (len(unit) - 1))


def rank_of(probabilities, asked):
    """Place [B] of class `asked` (label id) in each row of probabilities [B, C]: 1 where it is the likeliest."""
    probabilities = np.asarray(probabilities)
    return 1 + (probabilities > probabilities[:, [asked]]).sum(axis=1)
