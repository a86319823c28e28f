"""What 30_style_layout and 31_segmentation take, in the units of `speed.Rates`; rules of `forecast`."""

from collections import Counter

from histokit.training import settings

FIGURES = 8.0  # seconds that drawing and statistics of a page take
PICTURE = 0.012  # seconds of a core that the small segmenter learns from a tile of 128 px in
LOOK = 0.004  # and looks at one
WHOLE = 1.3  # training steps of an adapter that one of the whole denoiser with its style encoder takes


def style_layout(p, c, job, found):
    """As if every training tile were annotated, which is the most there can be."""
    options, n = p.get("options") or {}, p["num_images"] * (len(c.tail) if p["classes"] == "tail" else c.classes)
    units = Counter({"denoise": n * p["num_inference_steps"] * (1 if p["style_scale"] == 1 else 2), "code": n, "read": 3 * n})
    units += Counter({"seconds": FIGURES, "bytes": 2 * n * c.tile_px**2, "files": 2 * n})
    if p["trained"]:
        return units
    every = settings.pace(p["steps"]) | options
    checks, sheets = (p["steps"] / every[name] if every[name] else 0 for name in ("validate_every", "sheet_every"))
    rows = c.train * (1 + options.get("restained", 2))
    units["train"] = WHOLE * p["steps"] * p["batch_size"] + checks * max(settings.HELD_OUT_DRAWS, c.held / 3) / 3
    units["denoise"] += sheets * 12 * p["num_inference_steps"] * 2
    return units + Counter({"code": 8 * rows + 12 * sheets, "latents": 8 * rows, "read": 4 * rows, "bytes": 2e8, "files": 10})


def segmenters(p, c, job, found):
    """Of the small segmenter; what another takes is known after its first run."""
    if p["network"] != "small":
        return None
    size, arms = (c.tile_px / 128) ** 2, len(p["arms"])
    learned, looked = p["steps"] * p["batch_size"], 10 * c.held / 3 + c.held
    seconds = arms * p["seeds"] * size * (PICTURE * learned + LOOK * looked)
    return Counter(
        {
            "seconds": FIGURES + seconds,
            "read": 2 * (c.train + c.held) * arms,
            "bytes": 3e6 * arms * p["seeds"],
            "files": 4 * arms * p["seeds"],
        }
    )
