"""Embedded colour profiles (ICC): what a scanner says its numbers mean, brought to sRGB, which everything after takes them for."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

VERSION = 1
NOTE = "colour profile"
UNREADABLE = "unreadable ICC"
SAME = 2  # grey levels by which a profile may move a colour and still be sRGB


def to_srgb(image):
    """(RGB image in sRGB, note): converted by its profile where it carries one of another colour space; perceptual intent.

    The note is "" where there was nothing to do, `NOTE` where colours were converted, `UNREADABLE` where the profile is broken or is not
    one of RGB colours and the numbers were left as they are.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image, ""
    transform = _transform(bytes(profile))
    if transform is None or transform == UNREADABLE:
        return image, transform or ""
    return ImageCms.applyTransform(image, transform), NOTE


@lru_cache(64)
def _transform(profile):
    """A transform of RGB pixels to sRGB; None where it would change nothing, `UNREADABLE` where the profile cannot be used."""
    try:
        held = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if held.profile.xcolor_space.strip() != "RGB":
            return UNREADABLE
        transform = ImageCms.buildTransform(held, ImageCms.createProfile("sRGB"), "RGB", "RGB")
        grid = np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3), axis=-1).reshape(12, 18, 3).astype(np.uint8)
        moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform)).astype(int) - grid
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return UNREADABLE
    return transform if np.abs(moved).max() > SAME else None
