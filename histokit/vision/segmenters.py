"""Networks that say of every pixel which layer it shows: a small U-Net of our own, or any of `segmentation_models_pytorch`.

Pixels in, layer ids out; the transform travels with the network. Nothing here trains one.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from histokit.core import files
from histokit.tiles import decode

VERSION = 1
FILE = "segmenter"
SMALL = "small"  # 0.4 M parameters, for processors without a GPU


class _Twice(nn.Sequential):
    """Two convolutions, each normalised; what goes by is the same size."""

    def __init__(self, before, width):
        layers = []
        for channels in (before, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class SmallUNet(nn.Module):
    """A U-Net of four levels that looks at half the resolution; Ronneberger et al. (2015), arXiv:1505.04597.

    [B, 3, H, W] to logits [B, K, H, W], H and W multiples of 16. At full resolution it would take four times as long, for two pixels
    along an edge.
    """

    def __init__(self, layers, widths=(24, 32, 64, 96)):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        before = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(_Twice(a, b) for a, b in zip(before, widths, strict=True))
        pairs = list(zip(widths[::-1][:-1], widths[::-1][1:], strict=True))
        self.up = nn.ModuleList(_Twice(low + high, high) for low, high in pairs)
        self.last = nn.Conv2d(widths[0], layers, 1)

    def forward(self, x):
        seen, x = [], self.first(x)
        for i, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if i else x)
            seen.append(x)
        for stage, skip in zip(self.up, seen[-2::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1))
        return F.interpolate(self.last(x), scale_factor=2.0, mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A network with the names of its layers and the transform its encoder wants.

    Args:
        network: `small`, or an encoder of segmentation_models_pytorch such as mit_b2 or resnet34, in a U-Net.
        layers: names of the layers, the background first.
        tile_px: side of the tiles it sees.
        weights: safetensors file of weights for the encoder, by the names that smp gives them; "" begins with random ones.
    """

    def __init__(self, network, layers, tile_px, weights=""):
        super().__init__()
        self.layers, self.tile_px, self.name, self.facts = tuple(layers), tile_px, network, {}
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        if network == SMALL:
            if weights:
                raise ValueError("the small segmenter has no encoder whose weights could be loaded; name one such as resnet34")
            self.net, step = SmallUNet(len(layers)), 16
        else:
            self.net, step, mean, std = _unet(network, len(layers), weights)
        if tile_px % step:
            raise ValueError(f"segmenter {network} halves its pictures to a {step}th, and tiles are {tile_px} px; use {SMALL}, or tile_px")
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pictures):
        """Logits [B, K, H, W] of pictures float [B, 3, H, W] in [0, 1]."""
        return self.net((pictures - self.mean) / self.std)

    @torch.no_grad()
    def _logits(self, pixels, batch_size=16):
        """Logits of tiles uint8 [N, H, W, 3], batch by batch."""
        self.eval()
        for start in range(0, len(pixels), batch_size):
            yield self((decode.to_float(pixels[start : start + batch_size]) / 2 + 0.5).to(self.mean.device))

    def ids(self, pixels):
        """Layer ids uint8 [N, H, W] on the CPU of tiles uint8 [N, H, W, 3]."""
        found = [logits.argmax(dim=1).to(torch.uint8).cpu() for logits in self._logits(pixels)]
        return torch.cat(found or [torch.zeros(0, self.tile_px, self.tile_px, dtype=torch.uint8)]).numpy()

    def confidence(self, pixels):
        """How sure it is of each tile, [N] in (1 / K, 1]: the mean over its pixels of the probability of the likeliest layer."""
        found = [logits.softmax(dim=1).amax(dim=1).mean(dim=(1, 2)).cpu() for logits in self._logits(pixels)]
        return torch.cat(found or [torch.zeros(0)]).numpy()

    def save(self, folder, **facts):
        """Weights, and what it was built from with `facts`, into a folder."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        files.write_tensors(Path(folder) / f"{FILE}.safetensors", tensors, {})
        built = {"network": self.name, "layers": list(self.layers), "tile_px": self.tile_px}
        files.write_json(Path(folder) / f"{FILE}.json", {**built, **facts})


def _unet(network, count, weights):
    """(U-Net with this encoder, by how much it halves, mean and deviation its encoder wants); nothing is fetched from a hub."""
    import segmentation_models_pytorch as smp

    if network not in smp.encoders.encoders:
        some = "mit_b0, mit_b2, resnet18, resnet34, efficientnet-b0"
        raise ValueError(f"segmenter {network!r} is unknown; use {SMALL}, or an encoder of segmentation_models_pytorch such as {some}")
    net = smp.Unet(encoder_name=network, encoder_weights=None, in_channels=3, classes=count)
    if weights:
        path = files.root() / Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}; save those of {network} as safetensors, or leave `weights` out")
        held, own = files.read_tensors(path), net.encoder.state_dict()
        lost = sorted(set(own) - set(held) - {name for name in own if name.endswith("num_batches_tracked")})
        if lost:
            raise ValueError(f"{path}: lacks {len(lost)} tensors of {network}, the first {lost[0]!r}; is it of another encoder?")
        net.encoder.load_state_dict({name: held.get(name, tensor) for name, tensor in own.items()}, strict=True)
    settings = smp.encoders.encoders[network].get("pretrained_settings", {})
    wanted = next((one for one in settings.values() if one.get("mean")), {})
    return net, 32, tuple(wanted.get("mean", (0.485, 0.456, 0.406))), tuple(wanted.get("std", (0.229, 0.224, 0.225)))


def load(folder, device="cpu"):
    """The Segmenter that `save` wrote, in eval mode, with its `facts`. Raises FileNotFoundError, or ValueError for a folder of another."""
    place = Path(folder) / f"{FILE}.json"
    if not place.is_file():
        raise FileNotFoundError(f"{folder} holds no {place.name}; name an arm and seed of 31_segmentation that has finished")
    held = files.read_json(place)
    found = Segmenter(held["network"], held["layers"], held["tile_px"])
    try:
        found.load_state_dict(files.read_tensors(place.with_suffix(".safetensors")), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights and settings are not of one segmenter ({error})") from error
    found.facts = held
    return found.requires_grad_(False).eval().to(device)
