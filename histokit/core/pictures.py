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
    from PIL import Image, ImageDraw

    scale = 2 if max(max(pixels.shape[:2]) for pixels, *_ in tiles) > 160 else 1
    side, gap, top, band = 128 * scale, 8 * scale, 24 * scale, 34 * scale
    bold, plain = font(11 * scale, bold=True), font(11 * scale)
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


def jpeg(picture, quality=85):
    """JPEG bytes of a PIL picture: a tenth of a PNG's, for what is sent again and again."""
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=quality)
    return stream.getvalue()


def stacked(images, gap=6):
    """PIL pictures one below the other, on white."""
    from PIL import Image

    sheet = Image.new("RGB", (max(one.width for one in images), sum(one.height + gap for one in images) - gap), "white")
    top = 0
    for one in images:
        sheet.paste(one, (0, top))
        top += one.height + gap
    return sheet


def font(size, bold=False):
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def curve(lines, width, end, height=90):
    """A PIL picture of one or two lines over steps 0 to `end`, lowest and highest value at the left; lines: [([(step, value)], name)]."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (width, height), "white")
    draw, small = ImageDraw.Draw(sheet), font(10)
    values = [value for points, _ in lines for _, value in points if math.isfinite(value)]
    if not values:
        return sheet
    low, high = min(values), max(values)
    left, right, top, bottom = 52, width - 8, 18, height - 16
    place = lambda step, value: (left + (right - left) * step / max(1, end), bottom - (bottom - top) * (value - low) / ((high - low) or 1))  # noqa: E731
    draw.line([(left, top), (left, bottom), (right, bottom)], "#cccccc")
    for value, y in ((high, top - 6), (low, bottom - 8)):
        draw.text((left - 4, y), f"{value:.3f}", "#666666", small, anchor="ra")
    draw.text((right, bottom + 3), f"step {end:,}", "#666666", small, anchor="ra")
    at = left
    for (points, name), colour in zip(lines, ("#9db7d5", "#d98a29"), strict=False):
        points = [place(*point) for point in points if math.isfinite(point[1])]
        if points:
            draw.line(points, colour, 2) if len(points) > 1 else None
            for x, y in points if name == "held out" else points[-1:]:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
            draw.text((at, 2), name, colour, small)
            at += small.getlength(name) + 12
    return sheet


def outlined(pixels, ids, colour=(255, 235, 0)):
    """Copies of pictures uint8 [..., H, W, 3] with the borders between the layers of their masks [..., H, W] drawn in."""
    edge = np.zeros(ids.shape, bool)
    edge[..., :-1, :] |= ids[..., :-1, :] != ids[..., 1:, :]
    edge[..., :, :-1] |= ids[..., :, :-1] != ids[..., :, 1:]
    return np.where(edge[..., None], np.array(colour, np.uint8), pixels)
