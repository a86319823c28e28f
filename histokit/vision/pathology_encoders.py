"""Encoders that people bring for pathology: how each wants to be fed and read, and under which licence.

Facts of their cards and of TRIDENT's loaders. Weights come as a folder or by hub id; what a folder's own histokit.json says wins. Many are
gated: ask for access, download once, name the folder. CONCH needs its own package and is not read.
"""

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BIOPTIMUS = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}

# Arguments of timm that a card gives in words and its config.json does not hold; layers go by their names.
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
UNI2 = {
    "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536, "mlp_ratio": 5.33334,
    "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True, **SWIGLU,
}  # fmt: skip

KNOWN = {  # last part of the hub id, or name of the folder, in small letters
    "uni": {
        "dim": 1024,
        "arguments": {"init_values": 1e-5, "dynamic_img_size": True},
        **IMAGENET,
        "licence": "CC BY-NC-ND 4.0, also for models and data sets made with it",
    },
    "uni2-h": {"dim": 1536, "arguments": UNI2, **IMAGENET, "licence": "CC BY-NC-ND 4.0, also for models and data sets made with it"},
    "virchow": {"dim": 2560, "pooling": "cls+mean", "arguments": SWIGLU, **IMAGENET, "licence": "Apache-2.0 by its paper; see its card"},
    "virchow2": {"dim": 2560, "pooling": "cls+mean", "arguments": SWIGLU, **IMAGENET, "licence": "non-commercial; see its card"},
    "h-optimus-0": {"dim": 1536, "arguments": {"init_values": 1e-5, "dynamic_img_size": False}, **BIOPTIMUS, "licence": "Apache-2.0"},
    "h-optimus-1": {
        "dim": 1536,
        "arguments": {"init_values": 1e-5, "dynamic_img_size": False},
        **BIOPTIMUS,
        "licence": "academic research; see its card",
    },
    "h0-mini": {"dim": 768, **BIOPTIMUS, "licence": "see its card"},
    "phikon": {"dim": 768, **IMAGENET, "licence": "Owkin, non-commercial; see its card"},
    "phikon-v2": {"dim": 1024, **IMAGENET, "licence": "Owkin, non-commercial; see its card"},
    "midnight": {"dim": 3072, "pooling": "cls+mean", **HALF, "licence": "MIT"},
    "dinov2-small": {"dim": 384, **IMAGENET, "licence": "Apache-2.0"},
    "dinov2-base": {"dim": 768, **IMAGENET, "licence": "Apache-2.0"},
    "dinov2-large": {"dim": 1024, **IMAGENET, "licence": "Apache-2.0"},
}
OPEN = ("apache", "mit", "see the model card of mini", "bsd")


def known(name):
    """What is known of an encoder by its hub id or folder, {} where nothing is; `kaiko-ai/midnight` and a folder `midnight` are one."""
    return KNOWN.get(name.rstrip("/").rpartition("/")[2].lower().replace("_", "-").removesuffix("-12k"), {})


def restricted(licence):
    """Whether a licence is not plainly an open one: what was filtered or guided with such an encoder may not be free either."""
    return not licence.lower().startswith(OPEN)
