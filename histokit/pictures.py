"""Pictures as bytes, for panels and pages: no pyplot state, no front end needed to make them. Arrays in, PNG or HTML out."""

import html
import io
import math
from base64 import b64encode
from pathlib import Path

import numpy as np


def base64(data):
    return b64encode(data).decode("ascii")


def short(text, most):
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def image(pixels, most):
    """A PIL picture of uint8 [H, W, 3] with no side above `most` px."""
    from PIL import Image

    made = Image.fromarray(np.ascontiguousarray(pixels, np.uint8))
    made.thumbnail((most, most), Image.Resampling.LANCZOS)
    return made


def png(picture):
    """PNG bytes of a PIL picture."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def figure(pixels, title, caption, width, kind="", under=None):
    """HTML of one captioned picture, its bytes inside; `under` is what the pointer over it wipes to (see `panel.js`)."""
    shown = [pixels] if under is None else [pixels, under]
    images = "".join(f"<img width='{width}' alt='' src='data:image/png;base64,{base64(png(image(one, 2 * width)))}'>" for one in shown)
    return (
        f"<figure class='hk-figure {kind}' style='width:{width}px'><div class='{'hk-wipe' if len(shown) > 1 else ''}'>{images}</div>"
        f"<figcaption>{_said(title, caption)}</figcaption></figure>"
    )


def _said(title, caption):
    return f"<b>{html.escape(title)}</b><br>{html.escape(caption)}" if title else html.escape(caption)


def blank(width, text=""):
    """HTML of a field where a picture will be; with a text there will be none."""
    kind = "hk-none" if text else "hk-blank"
    return f"<div class='{kind}' style='width:{width}px;height:{width}px'>{html.escape(text)}</div>"


def strip(tiles, title):
    """One row of (pixels, name, caption, framed) as PNG bytes, and the width in px it is meant for."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    scale = 2 if max(max(pixels.shape[:2]) for pixels, *_ in tiles) > 160 else 1
    side, gap, top, band = 128 * scale, 8 * scale, 24 * scale, 34 * scale
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    bold, plain = (ImageFont.truetype(str(fonts / name), 11 * scale) for name in ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf"))
    wide = max(gap + len(tiles) * (side + gap), 2 * gap + math.ceil(plain.getlength(title)))
    sheet = Image.new("RGB", (wide, top + side + band + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 5 * scale), title, "#222222", plain)
    for i, (pixels, name, caption, framed) in enumerate(tiles):
        left = gap + i * (side + gap)
        tile = image(pixels, side)
        tile = tile.resize([max(1, round(length * side / max(tile.size))) for length in tile.size], Image.Resampling.BICUBIC)
        sheet.paste(tile, (left, top))
        if framed:
            draw.rectangle((left - 3 * scale, top - 3 * scale, left + side + 2 * scale, top + side + 2 * scale), None, "#d98a29", 3 * scale)
        draw.text((left, top + side + 5 * scale), name, "#222222", bold)
        draw.text((left, top + side + 19 * scale), caption, "#666666", plain)
    return png(sheet), sheet.width // scale
