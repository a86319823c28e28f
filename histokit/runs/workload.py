"""How much the pages do that no parameter of theirs says: read by what does it, and by the forecast, which must not load what does.

The numbers belong to the method that is named beside them: who changes one raises `VERSION` there.
"""

import itertools

PLANTED = 60  # `fidelity.copy_detection`: training tiles of which each kind of copy is planted
COPIES = ("exact", "flip", "turn", "crop 90 %", "JPEG 75", "stain", "autoencoder")  # those kinds; the last where there is a base
HEADROOM = 30  # `preflight.headroom`: true tiles a class, each of the same and of other cases
TRIED = 12  # tiles a class under each of the settings that 03 tries first


def tried_pairs(tried, strength, guidance_scale):
    """[(strength, guidance_scale), ...] that `tried` of 03_img2img asks for, {"strength": [...], "guidance_scale": [...]}; [] where empty.

    Args:
        strength, guidance_scale: of the step, for what `tried` leaves out.

    Raises ValueError for another name, or values that are no list of numbers in their range.
    """
    if unknown := [name for name in tried if name not in ("strength", "guidance_scale")]:
        raise ValueError(f"tried has no {unknown[0]!r}; expected strength and guidance_scale, each with a list of values")
    for name, values in tried.items():
        number = isinstance(values, list) and values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if not number or not all(0 < v <= 1 if name == "strength" else v >= 0 for v in values):
            expected = "shares above 0, up to 1" if name == "strength" else "numbers from 0 on"
            raise ValueError(f"tried: {name} is {values!r}; expected a list of {expected}")
    return list(itertools.product(tried.get("strength", [strength]), tried.get("guidance_scale", [guidance_scale]))) if tried else []
