"""How much the pages do that no parameter of theirs says: read by what does it, and by the forecast, which must not load what does.

The numbers belong to the method that is named beside them: who changes one raises `VERSION` there.
"""

PLANTED = 60  # `fidelity.copy_detection`: training tiles of which each kind of copy is planted
COPIES = ("exact", "flip", "turn", "crop 90 %", "JPEG 75", "stain", "autoencoder")  # those kinds; the last where there is a base
HEADROOM = 30  # `preflight.headroom`: true tiles a class, each of the same and of other cases
TRIED = 12  # tiles a class under each of the settings that 03 tries first
