"""From a file to pixels: the one decoder and the one resize.

Everything that reads a tile goes through here, so a truncated, 16-bit or CMYK file is refused by the same words
everywhere. Grey, palette and alpha are converted (alpha on white, the colour of an empty slide); what a conversion
would guess at is refused. Nothing here knows a manifest or a class.
"""

import contextlib
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from histokit.core import files
from histokit.tiles import colour_profiles
from histokit.tiles.description import FITS

VERSION = 2
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MAX_PIXELS = 64_000_000  # a tile is small; a whole slide or a decompression bomb is not decoded at all
CONVERTED = {"L": "grey", "P": "palette", "LA": "alpha", "RGBA": "alpha", "PA": "alpha", "RGB": ""}
REFUSED = {
    "CMYK": "is CMYK, whose colours depend on a print profile; export it as RGB (with its profile applied)",
    "1": "has one bit per pixel and looks like a mask; name masks in the description's `mask`, and tiles elsewhere",
    "F": "holds floating point numbers; scale it to 8 bits yourself, because only you know the range that holds the tissue",
    "16": "has 16 bits per channel; scale it to 8 bits yourself, because only you know the range that holds the tissue",
}


COMPRESSION = {1: "not compressed", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "packed bits"} | dict.fromkeys(
    (33003, 33004, 33005, 34712), "packed as JPEG 2000"
)
EXPORT = "export it as 8-bit RGB, for example from QuPath, or with `vips copy IN OUT.png`"


class BadImage(ValueError):
    """A file that is not usable as a tile; the message names the file, the problem and the remedy."""


class BadMask(ValueError):
    """A mask that cannot be used; the message names the file, the problem and the remedy."""


def rgb(source, name=None, profile=True):
    """Decode one tile completely.

    Args:
        source: path, or the bytes of the file.
        name: how to call the file in an error; the path by default.
        profile: bring colours to sRGB where the file carries another colour profile; False takes its numbers as they are.

    Returns:
        PIL image in mode RGB, upright (EXIF orientation applied), and a note: what was converted, "" for nothing.

    Raises:
        BadImage: empty, truncated, not an image, several frames, 16-bit, CMYK, or above `MAX_PIXELS`.
    """
    name = source if name is None else name
    if isinstance(source, bytes):
        if not source:
            raise BadImage(f"{name}: is empty (0 bytes); copy it again from its source or leave it out")
        source = io.BytesIO(source)
    elif Path(source).is_file() and Path(source).stat().st_size == 0:
        raise BadImage(f"{name}: is empty (0 bytes); copy it again from its source or leave it out")
    try:
        with Image.open(source) as image:
            _refuse(image, name)
            image.load()  # the whole file; verify() would miss a truncated one
            return _convert(image, profile)
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"{name}: no such file; was it moved after 00_dataset ran?") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+ pixels", str(error))
        raise BadImage(f"{name}: {_too_large(pixels[0] if pixels else error)}") from error
    except UnidentifiedImageError as error:
        kind = _foreign(source)
        raise BadImage(f"{name}: {kind or 'is not an image, whatever its name says; leave it out'}") from error
    except Exception as error:  # a broken file can raise nearly anything inside a codec
        raise BadImage(f"{name}: cannot be decoded ({error}); copy it again from its source or leave it out") from error


def _refuse(image, name):
    """Raise what the header alone tells, before any pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{name}: {_too_large(f'{image.width} x {image.height} px')}")
    raw = " ".join(str(tile[3]) for tile in getattr(image, "tile", []))  # "RGB;16B": Pillow would halve the depth silently
    if image.mode.startswith("F"):
        raise BadImage(f"{name}: {REFUSED['F']}")
    if image.mode.startswith("I") or ";16" in raw:
        raise BadImage(f"{name}: {REFUSED['16']}")
    if image.mode not in CONVERTED:
        problem = REFUSED.get(image.mode, f"has colour mode {image.mode}; export it as 8-bit RGB")
        raise BadImage(f"{name}: {problem}")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImage(f"{name}: holds {image.n_frames} frames or pyramid levels; export the one you mean as its own file")


def _too_large(size):
    return f"is too large for a tile ({size}, limit {MAX_PIXELS / 1e6:.0f} Mpx); cut it into tiles first"


def _foreign(source):
    """What a file is that Pillow does not open: a JPEG 2000, or a TIFF with its channels, numbers and compression; "" for neither."""
    from PIL import TiffImagePlugin

    if isinstance(source, io.BytesIO):
        source.seek(0)
    with contextlib.nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        head = file.read(16)
        if head.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
            return f"is a JPEG 2000, which is not read here; {EXPORT}"
        if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return ""
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(head if b"+" in head[:4] else head[:8])
            file.seek(tags.next)
            tags.load(file)
            channels, bits, kind = tags.get(277, 1), tags.get(258, (1,)), tags.get(339, (1,))
            packed = COMPRESSION.get(tags.get(259, 1), f"compression {tags.get(259)}")
        except Exception:  # a broken directory can raise nearly anything
            return ""
    numbers = {1: "whole numbers", 2: "signed numbers", 3: "floating point numbers"}.get(kind[0], "numbers")
    return f"is a TIFF of {channels} channel{'s' * (channels != 1)} of {bits[0]}-bit {numbers}, {packed}, which is not read here; {EXPORT}"


def _convert(image, profile=True):
    """RGB image and a note on what was done to it."""
    note = CONVERTED[image.mode]
    embedded = image.info.get("icc_profile") if profile and note in ("", "palette", "alpha") else None
    if (image.mode == "P" and "transparency" in image.info) or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or image.getexif().get(0x0112, 1) != 1:
        note = " ".join(filter(None, [note, "rotated"]))
    upright = upright.convert("RGB")
    if embedded:
        upright.info["icc_profile"] = embedded
        upright, said = colour_profiles.to_srgb(upright)
        note = " ".join(filter(None, [note, said]))
    return upright, note


def fitted(image, tile_px, fit="resize", mpp=None, name="image"):
    """The one resize: uint8 [tile_px, tile_px, 3] from an RGB image, a square from its centre, bicubic with anti-aliasing.

    `fit` says how much of the file becomes a tile (`field`), `tile_px` on how many pixels; so a generator of 512 px and a
    classifier of 224 px see the same field. The aspect ratio is never changed.
    """
    width, height = image.size
    side = field(width, height, fit, tile_px, mpp, name)
    left, top = (width - side) / 2, (height - side) / 2
    if side == tile_px:  # a plain crop changes no value
        left, top = int(left), int(top)
        return np.asarray(image.crop((left, top, left + tile_px, top + tile_px)))
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC, box=box))


def field(width, height, fit, tile_px=0, mpp=None, name="image"):
    """Side, in pixels of the file, of the square that becomes a tile.

    Args:
        fit: `resize`, the shorter side; `crop=128`, that many pixels; `resample_to_mpp=0.5x128`, that many pixels of 0.5 um.
            A bare `crop` means tile_px.
        mpp: micrometres per pixel of the file; needed by `resample_to_mpp`.

    Raises:
        ValueError: the tile is smaller than its field, or has no `mpp`.
    """
    kind, _, number = fit.partition("=")
    if kind == "resize":
        return min(width, height)
    if kind == "crop":
        side = int(number or tile_px)
    elif kind == "resample_to_mpp" and "x" in number:
        if not mpp or not mpp > 0:
            raise ValueError(f"{name}: fit {fit} needs the tile's micrometres per pixel, got {mpp}; give `mpp` or a column of it")
        target, _, px = number.partition("x")
        side = float(target) * int(px) / mpp
    else:
        raise ValueError(f"{name}: unknown fit {fit!r}; choose one of {', '.join(FITS)}")
    if side > min(width, height) * 1.001:
        raise ValueError(
            f"{name}: {width} x {height} px is too small for fit {fit}, which needs {side:.0f} px; lower `tile_px` or choose `fit: resize`"
        )
    return min(side, width, height)


def to_float(pixels):
    """[N, 3, H, W] float32 tensor in [-1, 1] from uint8 [N, H, W, 3]; what the autoencoder reads."""
    import torch

    pixels = torch.as_tensor(np.ascontiguousarray(pixels))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_uint8(images):
    """uint8 [N, H, W, 3] array from a tensor [N, 3, H, W] in [-1, 1]; values outside are clipped."""
    images = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return images.permute(0, 2, 3, 1).to("cpu").numpy().astype(np.uint8)


# A tile between 89 and 179 Mpx only warns in Pillow; `_refuse` says it in our words.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def codecs(tiles, most=100, seed=0):
    """How the files of a manifest are coded: {"PNG 224 x 224 px": share}, most frequent first; `most` of them are looked at."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    kinds = []
    for path in tiles["path"].iloc[np.sort(rng.permutation(len(tiles))[:most])]:
        with Image.open(path) as image:
            tables = getattr(image, "quantization", None)
            quality = f", quantisation {files.digest(str(sorted(tables.items())))[:6]}" if tables else ""
            kinds.append(f"{image.format} {image.width} x {image.height} px{quality}")
    return pd.Series(kinds, dtype=str).value_counts(normalize=True).to_dict()


def codec_remarks(real, added):
    """One sentence where added tiles are coded unlike real ones, else none."""
    ours, theirs = codecs(real), codecs(added)
    if ours and theirs and set(ours) != set(theirs):
        one, other = (max(kinds, key=kinds.get) for kinds in (ours, theirs))
        return [
            f"real tiles are {one}, added ones {other}; all are resized alike, but what a codec or another size left in them can tell a "
            "classifier which are which."
        ] * (one != other)
    return []
