"""From pictures of a slide to one vector that says how it looks: encoders of one picture, and ways to make one vector of several.

Öttl et al. (2024), arXiv:2403.14429. A style is [B, n, 3, px, px] in [-1, 1], n pictures of one slide, or [B, n, D] features where an
encoder that learns nothing (`features`) has seen them before. Nothing here knows a layout or a denoiser.
"""

import torch
from torch import nn
from torch.nn import functional as F

from histokit.tiles import augment

VERSION = 1
ENCODERS = ("swin_v2_t", "tiny_cnn", "features", "colour")
AGGREGATIONS = ("mean", "max", "linear", "svit", "none")


class Standardised(nn.Module):
    """Features [B, D] brought to mean 0 and deviation 1 over some first pictures, see `Style.settle`; as they are before.

    Slides differ little beside what all tissue has in common. Without this the first thousand updates go into finding the difference.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def settle(self, features):
        self.mean.copy_(features.mean(dim=0))
        deviation = features.std(dim=0)
        self.scale.copy_(1 / deviation.clamp(min=1e-3 * float(deviation.max()) + 1e-9))

    def forward(self, features):
        return (features - self.mean) * self.scale


class TinyCNN(nn.Module):
    """What four halvings see, and the colour of the picture beside it: [B, 3, px, px] to [B, dim]; for processors without a GPU.

    Colour goes its own way, as in `Colour`: the group norm that keeps a small network stable takes a picture's mean away, and with it the
    stain.
    """

    def __init__(self, dim, widths=(32, 64, 96, 128)):
        super().__init__()
        stages, before = [], 3
        for width in widths:
            stages += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(before, dim)
        self.colour = Colour(dim)

    @property
    def standard(self):
        return self.colour.standard

    def features(self, pictures):
        return self.colour.features(pictures)

    def forward(self, pictures):
        return self.head(self.stages(pictures).mean(dim=(2, 3))) + self.colour(pictures)


def _deviation(x):
    """Standard deviation [B, C] of [B, C, N]; its slope stays finite where all N are alike."""
    return (x.var(dim=2, correction=0) + 1e-6).sqrt()


class Colour(nn.Module):
    """Mean and deviation of the optical density of each colour, and what a small network makes of these six: no shape can pass."""

    def __init__(self, dim, width=64):
        super().__init__()
        self.standard = Standardised(6)
        self.head = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, dim))

    def features(self, pictures):
        density = augment.optical_density(pictures / 2 + 0.5).flatten(2)
        return torch.cat([density.mean(dim=2), _deviation(density)], dim=1)

    def forward(self, pictures):
        return self.head(self.standard(self.features(pictures)))


class Frozen(nn.Module):
    """A linear map of what an encoder that learns nothing saw, [B, width] to [B, dim]."""

    def __init__(self, width, dim):
        super().__init__()
        self.standard, self.head = Standardised(width), nn.Linear(width, dim)

    def features(self, seen):
        return seen

    def forward(self, seen):
        return self.head(self.standard(seen))


class SwinV2Tiny(nn.Module):
    """The published encoder: torchvision's Swin-V2-Tiny from random weights, its last layer 768 to dim; 27.98 M parameters at dim 512.

    Without the stochastic depth of the original, whose random numbers no checkpoint knows.
    """

    def __init__(self, dim):
        super().__init__()
        from torchvision.models import swin_v2_t
        from torchvision.ops import StochasticDepth

        self.network = swin_v2_t(weights=None)
        for part in self.network.modules():
            if isinstance(part, StochasticDepth):
                part.p = 0.0
        self.standard, self.head = Standardised(self.network.head.in_features), nn.Linear(self.network.head.in_features, dim)
        self.network.head = nn.Identity()

    def features(self, pictures):
        return self.network(pictures)

    def forward(self, pictures):
        return self.head(self.standard(self.features(pictures)))


def encoder(kind, dim, width=0):
    """A network from one picture [B, 3, px, px], or its features [B, width], to [B, dim].

    `swin_v2_t` is the published one, Swin-V2-Tiny with a head of its own; `features` a linear map of what a frozen encoder of any kind saw.
    """
    if kind == "swin_v2_t":
        return SwinV2Tiny(dim)
    if kind == "tiny_cnn":
        return TinyCNN(dim)
    if kind == "colour":
        return Colour(dim)
    if kind == "features":
        if width < 1:
            raise ValueError("style encoder features needs the width of the features that a frozen encoder gives")
        return Frozen(width, dim)
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

    def __init__(self, width, heads, head_width, hidden):
        super().__init__()
        inner = heads * head_width
        self.heads, self.temperature = heads, nn.Parameter(torch.tensor(head_width**-0.5).log())
        self.before, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.network = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, head_width]
        scores = q @ k.transpose(-1, -2) * self.temperature.exp()
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        weights = scores.masked_fill(itself, float("-inf")).softmax(dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.network(x)


class SetViT(nn.Module):
    """Patches at the same place of all n pictures as one token: [B, n, 3, px, px] to [B, dim]; n and px are fixed.

    After the few-shot diffusion models of Giannone et al. (2022), arXiv:2205.15463. Pictures are made `px` wide first, for at 512 px it
    would have 4,098 tokens. Without the dropout of the original, whose random numbers no checkpoint knows.
    """

    def __init__(self, dim, count, px=64, patch=8, width=256, depth=6, heads=12, head_width=64):
        super().__init__()
        if px % patch or px > 128:
            raise ValueError(f"aggregation svit reads pictures of at most 128 px, a multiple of {patch}; got {px}")
        self.count, self.px, self.patch = count, px, patch
        tokens = (px // patch) ** 2 + 1
        self.embed = nn.Sequential(nn.LayerNorm(3 * count * patch**2), nn.Linear(3 * count * patch**2, width))
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads, head_width, width) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, pictures):
        if pictures.ndim != 5 or pictures.shape[1] != self.count:
            raise ValueError(f"aggregation svit was built for {self.count} style pictures and got {tuple(pictures.shape)}; give as many")
        x = F.interpolate(pictures.flatten(0, 1), (self.px, self.px), mode="bilinear", antialias=True, align_corners=False)
        x = F.unfold(x.unflatten(0, pictures.shape[:2]).flatten(1, 2), self.patch, stride=self.patch).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], dim=1)
        x = x + self.places
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

    @torch.no_grad()
    def settle(self, style):
        """Looks at first styles [B, n, ...] of different slides, so that what tells them apart counts from the first update on."""
        if hasattr(self, "each"):
            self.each.standard.settle(self.each.features(style.flatten(0, 1)))

    def forward(self, style):
        if self.silent:
            return torch.zeros(len(style), self.dim, device=style.device)
        if hasattr(self, "whole"):
            return self.whole(style)
        return self.joined(self.each(style.flatten(0, 1)).unflatten(0, style.shape[:2]))
