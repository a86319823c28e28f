"""From pictures of a slide to one vector that says how it looks: encoders of one picture, and ways to make one vector of several.

Öttl et al. (2024), arXiv:2403.14429. A style is [B, n, 3, px, px] in [-1, 1], n pictures of one slide, or [B, n, D] features where an
encoder that learns nothing (`features`) has seen them before. Nothing here knows a layout or a denoiser.
"""

import torch
from torch import nn

from histokit.tiles import augment

VERSION = 1
ENCODERS = ("swin_v2_t", "tiny_cnn", "features", "colour")
AGGREGATIONS = ("mean", "max", "linear", "svit", "none")


class TinyCNN(nn.Module):
    """Four halvings and a mean over what is left: [B, 3, px, px] to [B, dim]; for processors without a GPU."""

    def __init__(self, dim, widths=(32, 64, 96, 128)):
        super().__init__()
        stages, before = [], 3
        for width in widths:
            stages += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(before, dim)

    def forward(self, pictures):
        return self.head(self.stages(pictures).mean(dim=(2, 3)))


class Colour(nn.Module):
    """Mean and deviation of the optical density of each colour, and what a small network makes of these six: no shape can pass."""

    def __init__(self, dim, width=64):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, pictures):
        density = augment.optical_density(pictures / 2 + 0.5).flatten(2)
        return self.head(torch.cat([density.mean(dim=2), density.std(dim=2)], dim=1))


def encoder(kind, dim, width=0):
    """A network from one picture [B, 3, px, px], or its features [B, width], to [B, dim].

    `swin_v2_t` is the published one, Swin-V2-Tiny with a head of its own; `features` a linear map of what a frozen encoder of any kind saw.
    """
    if kind == "swin_v2_t":
        from torchvision.models import swin_v2_t

        network = swin_v2_t(weights=None)
        network.head = nn.Linear(network.head.in_features, dim)
        return network
    if kind == "tiny_cnn":
        return TinyCNN(dim)
    if kind == "colour":
        return Colour(dim)
    if kind == "features":
        if width < 1:
            raise ValueError("style encoder features needs the width of the features that a frozen encoder gives")
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
    raise ValueError(f"style encoder {kind!r} is unknown; use {', '.join(ENCODERS)}")


class Mean(nn.Module):
    """The mean of n vectors, [B, n, dim] to [B, dim]; their order and number do not matter."""

    def forward(self, vectors):
        return vectors.mean(dim=1)


class Max(nn.Module):
    """The largest of n vectors, place by place."""

    def forward(self, vectors):
        return vectors.amax(dim=1)


class Linear(nn.Module):
    """All n vectors side by side through two layers; their order matters and n is fixed."""

    def __init__(self, dim, count):
        super().__init__()
        self.count = count
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(dim * count, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, vectors):
        if vectors.shape[1] != self.count:
            raise ValueError(f"aggregation linear was built for {self.count} style pictures and got {vectors.shape[1]}; give as many")
        return self.layers(vectors.flatten(1))


class _Block(nn.Module):
    """Attention and a small network, each after normalisation and added on; a token never attends to itself, and the temperature learns."""

    def __init__(self, width, heads, head_width, hidden, dropout):
        super().__init__()
        inner = heads * head_width
        self.heads, self.temperature = heads, nn.Parameter(torch.tensor(head_width**-0.5).log())
        self.before, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(dropout))
        self.dropout = nn.Dropout(dropout)
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, head_width]
        scores = q @ k.transpose(-1, -2) * self.temperature.exp()
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        weights = self.dropout(scores.masked_fill(itself, float("-inf")).softmax(dim=-1))
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.network(x)


class SetViT(nn.Module):
    """Patches at the same place of all n pictures as one token: [B, n, 3, px, px] to [B, dim]; n and px are fixed.

    After the few-shot diffusion models of Giannone et al. (2022), arXiv:2205.15463. Pictures are made `px` wide first, for at 512 px it
    would have 4,098 tokens.
    """

    def __init__(self, dim, count, px=64, patch=8, width=256, depth=6, heads=12, head_width=64, dropout=0.1):
        super().__init__()
        if px % patch or px > 128:
            raise ValueError(f"aggregation svit reads pictures of at most 128 px, a multiple of {patch}; got {px}")
        self.count, self.px, self.patch = count, px, patch
        tokens = (px // patch) ** 2 + 1
        self.embed = nn.Sequential(nn.LayerNorm(3 * count * patch**2), nn.Linear(3 * count * patch**2, width))
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, head_width, width, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, pictures):
        if pictures.ndim != 5 or pictures.shape[1] != self.count:
            raise ValueError(f"aggregation svit was built for {self.count} style pictures and got {tuple(pictures.shape)}; give as many")
        x = nn.functional.interpolate(pictures.flatten(0, 1), (self.px, self.px), mode="bilinear", antialias=True, align_corners=False)
        x = nn.functional.unfold(x.unflatten(0, pictures.shape[:2]).flatten(1, 2), self.patch, stride=self.patch).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], dim=1)
        x = self.dropout(x + self.places)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class Style(nn.Module):
    """One vector [B, dim] of n pictures or their features, by an encoder of each and an aggregation.

    Only what is used is built: a module without a part in the loss would wait for a gradient that never comes.
    """

    def __init__(self, kind, aggregation, dim, count, width=0, px=64):
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation {aggregation!r} is unknown; use {', '.join(AGGREGATIONS)}")
        if aggregation == "svit" and kind == "features":
            raise ValueError("aggregation svit reads pictures; with style encoder features use mean, max or linear")
        self.dim, self.silent = dim, aggregation == "none"
        if aggregation == "svit":
            self.whole = SetViT(dim, count, px)
        elif not self.silent:
            self.each = encoder(kind, dim, width)
            self.joined = {"mean": Mean, "max": Max}[aggregation]() if aggregation in ("mean", "max") else Linear(dim, count)

    def forward(self, style):
        if self.silent:
            return torch.zeros(len(style), self.dim, device=style.device)
        if hasattr(self, "whole"):
            return self.whole(style)
        return self.joined(self.each(style.flatten(0, 1)).unflatten(0, style.shape[:2]))
