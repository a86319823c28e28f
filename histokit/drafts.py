"""What a half-drawn tile looks like, at no cost: a linear map from its latents to colours, fitted on the tiles at hand.

A decoder takes as long as several denoising steps; one matrix of 5 x 3 numbers takes none, and shows where what will be.
"""

import numpy as np
import torch

from histokit import data


def fit(latents, pixels):
    """The map [5, 3] (latent channels and one, to colours in [-1, 1]) that is best in least squares.

    Args:
        latents: [N, 4, h, w] of real tiles. pixels: uint8 [N, H, W, 3], the same tiles.
    """
    _, channels, h, w = latents.shape
    colours = torch.nn.functional.adaptive_avg_pool2d(data.to_float(pixels), (h, w))
    x = latents.detach().float().cpu().permute(0, 2, 3, 1).reshape(-1, channels)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    return torch.linalg.lstsq(x, colours.permute(0, 2, 3, 1).reshape(-1, 3), driver="gelsd").solution


def picture(fitted, x0):
    """uint8 [h, w, 3] of one clean latent [4, h, w] as it is predicted at a step."""
    x = x0.detach().float().cpu().permute(1, 2, 0)
    colours = torch.cat([x, torch.ones(*x.shape[:2], 1)], dim=2) @ fitted
    return np.ascontiguousarray(((colours.clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8).numpy())
