"""What can be said about a tile without having learned anything: its colour and texture, and its picture in outline.

Fixed extractors with no weights: the first is the baseline that a learned encoder has to beat, the second finds copies.
"""

import torch
from torch import nn
from torch.nn import functional as F

from histokit.tiles import augment, near_duplicates

VERSION = 1


class ColourTexture(nn.Module):
    """78 fixed numbers about stain, contrast and fine texture; no weights, unchanged by the 8 symmetries.

    Optical density per channel (mean, deviation, skew, three quantiles) and its correlations, haematoxylin and eosin amounts,
    histograms of gradient size and of local binary patterns (Ojala et al. 2002, rotation-invariant uniform) at three scales.
    Takes [B, 3, H, W] float in [0, 1].
    """

    dim = 78

    def forward(self, x):
        density = augment.optical_density(x)
        stains = torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(augment.STAINS).to(density))[:, :2]
        out = [*_moments(density), *_moments(stains), _correlations(density)]
        grey = density.mean(dim=1, keepdim=True)
        for scale in (1, 2, 4):
            small = F.avg_pool2d(grey, scale) if scale > 1 else grey
            out += [_gradient_histogram(small), _binary_patterns(small)]
        return torch.cat(out, dim=1)


def _moments(channels):
    """Mean, deviation, skew, and quantiles .1 .5 .9 of each channel of [B, C, H, W]; six tensors [B, C]."""
    flat = channels.flatten(2)
    mean, std = flat.mean(dim=2), flat.std(dim=2)
    skew = ((flat - mean[:, :, None]) ** 3).mean(dim=2) / (std**3 + 1e-3)
    return [mean, std, skew, *(flat.quantile(q, dim=2) for q in (0.1, 0.5, 0.9))]


def _correlations(density):
    flat = density.flatten(2)
    flat = F.normalize(flat - flat.mean(dim=2, keepdim=True) + 1e-12, dim=2)
    return torch.stack([(flat[:, i] * flat[:, j]).sum(dim=1) for i, j in ((0, 1), (0, 2), (1, 2))], dim=1)


def _shares(codes, bins):
    """Share [B, bins] of each integer code in [B, ...], as a square root (Hellinger), so that distances are fair to rare codes."""
    return (F.one_hot(codes.flatten(1), bins).float().mean(dim=1)).sqrt()


def _gradient_histogram(grey):
    dx = (grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]) / 2
    dy = (grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]) / 2
    edges = torch.tensor([0.01, 0.03, 0.06, 0.12], device=grey.device)
    return _shares(torch.bucketize((dx**2 + dy**2).sqrt(), edges), 5)


def _binary_patterns(grey):
    ring = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
    height, width = grey.shape[2] - 2, grey.shape[3] - 2
    centre = grey[:, :, 1:-1, 1:-1]
    bits = torch.stack([(grey[:, :, y : y + height, x : x + width] > centre + 0.01) for y, x in ring])  # [8, B, 1, H, W]
    changes = (bits != bits.roll(1, dims=0)).sum(dim=0)
    return _shares(torch.where(changes <= 2, bits.sum(dim=0), torch.full_like(changes, 9)), 10)


class Picture(nn.Module):
    """The signature of `near_duplicates`: the low frequencies of the grey gradient, so that the product of two is a correlation.

    It sees what an encoder may overlook, that two tiles are the same picture. Takes [B, 3, H, W] float in [0, 1]; returns
    [B, 256] of length 1, or 0 where a tile is nearly uniform.
    """

    dim = near_duplicates.LOW**2

    def forward(self, x):
        grey = (x * torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]).sum(dim=1, keepdim=True)
        thumbnails = F.adaptive_avg_pool2d(grey, near_duplicates.SIDE)[:, 0] * 255
        return torch.from_numpy(near_duplicates.signatures(thumbnails.cpu().numpy())).flatten(1).to(x.device)
