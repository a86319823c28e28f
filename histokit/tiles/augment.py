"""What may change about a tile without changing its tissue: orientation, and how strongly it was stained.

Pure functions on tensors; randomness is a `torch.Generator`. Nothing here knows classes or files.
"""

import numpy as np
import torch

VERSION = 1

# Optical density (R, G, B) of haematoxylin, eosin and their normal; Ruifrok & Johnston (2001), table 2, rows made unit length.
STAINS = torch.nn.functional.normalize(torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]), dim=1)


# Which symmetry k becomes where a square is turned first and flipped then: a turn after a flip is the flip after the opposite turn. The
# latents kept on disk and the views of a pre-training are numbered in that order. It is its own inverse.
TURN_FIRST = (0, 1, 2, 3, 4, 7, 6, 5)


def symmetry(images, k, dims=(-2, -1)):
    """The k-th of the 8 symmetries of a square on two axes: k % 4 quarter turns, after a flip for k >= 4; 0 is the identity."""
    images = images.flip(dims[1]) if k >= 4 else images
    return images.rot90(k % 4, dims)


def pixel_symmetry(pixels, k):
    """`symmetry` of pictures that are uint8 arrays [..., H, W, C]; a new array."""
    return symmetry(torch.from_numpy(np.array(pixels, order="C")), k, (-3, -2)).contiguous().numpy()


def random_symmetry(images, generator):
    """Each image of [B, C, H, W] (H = W) under its own symmetry, all eight equally likely."""
    ks = torch.randint(8, (len(images),), generator=generator).tolist()
    return torch.stack([symmetry(image, k) for image, k in zip(images, ks, strict=True)])


def random_affine(count, generator, share=1.0, scale=(0.8, 1.2), shift=0.1, shear=20.0):
    """Maps [count, 2, 3] for `warp`: any turn, scale, shift (of the side) and shear (degrees); the identity but for a `share` of them."""
    draw = torch.rand(count, 6, generator=generator)
    turn, lean = 2 * torch.pi * draw[:, 0], torch.deg2rad((2 * draw[:, 1] - 1) * shear).tan()
    size = 1 / (scale[0] + (scale[1] - scale[0]) * draw[:, 2])
    cos, sin = turn.cos() * size, turn.sin() * size
    move = (2 * draw[:, 3:5] - 1) * 2 * shift
    maps = torch.stack([torch.stack([cos, lean * cos - sin, move[:, 0]], 1), torch.stack([sin, lean * sin + cos, move[:, 1]], 1)], 1)
    return torch.where((draw[:, 5] < share)[:, None, None], maps, torch.eye(2, 3))


def warp(images, maps, mode="bilinear"):
    """Images [B, C, H, W] under affine maps [B, 2, 3]; beyond the border they are mirrored. `nearest` makes up no value."""
    grid = torch.nn.functional.affine_grid(maps.to(images), images.shape, align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, mode, padding_mode="reflection", align_corners=False)


def optical_density(images):
    """Optical density, >= 0, of images float in [0, 1]: -log10((255 x + 1) / 256), so white is 0 and black stays finite."""
    return -torch.log10((images.clamp(0, 1) * 255 + 1) / 256)


def from_optical_density(density):
    """Images float in [0, 1]; the inverse of `optical_density`."""
    return ((10.0**-density * 256 - 1) / 255).clamp(0, 1)


def stain_jitter(images, generator, strength=0.25):
    """Each image with its stains made stronger or weaker, as another laboratory or scanner would.

    The density is split into haematoxylin, eosin and a residual, and each is multiplied by its own exp(u),
    u uniform in [-strength, strength]: background stays white and every structure keeps its place.

    Args:
        images: [B, 3, H, W] float in [0, 1].
        generator: torch.Generator on the CPU.
        strength: 0 changes nothing; 0.25 is a mild difference between laboratories.

    Returns:
        [B, 3, H, W] float in [0, 1].
    """
    factors = torch.exp((2 * torch.rand(len(images), 3, generator=generator) - 1) * strength)
    stains = STAINS.to(torch.float64)
    change = torch.linalg.inv(stains) @ (factors.to(torch.float64)[:, :, None] * stains)  # [B, 3, 3], row vectors on its left
    density = optical_density(images)
    return from_optical_density(torch.einsum("bchw,bcd->bdhw", density, change.to(density)))
