"""The two ways in which 04 steers: by a classifier of pictures (`guided`) or by one of noisy latents (`class_guided`)."""

from histokit.generate import class_guided, guided

METHODS = {"pixel": guided, "latent": class_guided}


def by(method):
    """The module that steers in this way; both answer to the same names."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use pixel (a classifier of pictures, of 06) or latent (one of noisy latents, of 21)")
    return METHODS[method]
