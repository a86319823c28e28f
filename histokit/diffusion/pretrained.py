"""Where the weights of a base lie, and how they are read: "mini", a folder in diffusers layout, or a hub id.

The only module that knows how Stable Diffusion lies on disk. Pickled weights are not read, and only a hub id may use the network.
"""

import re
from pathlib import Path

from histokit import PACKAGE
from histokit.core import files

VERSION = 1

MINI = PACKAGE / "mini"
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
FITTED = "fitted_decoder.json"  # beside an autoencoder of which only the decoder was trained: whose encoder it has
STEMS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}


def locate(name):
    """Folder of the base model `name`; asks the hub only when `name` can be nothing but a hub id."""
    if str(name) == "mini" or str(name).startswith("mini/"):
        folder = MINI / str(name)[5:]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the built-in base {name!r} is not at {folder}; reinstall histokit or run params/mini.yaml to train it"
            )
        return folder
    path = Path(name).expanduser()
    for folder in (path, files.root() / path):
        if folder.is_dir():
            return _snapshot(name, folder)
        if folder.is_file():
            raise FileNotFoundError(f"base model {name!r} is a single file; convert it to a diffusers folder first. {_where(name)}")
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or (files.root() / path.parts[0]).is_dir()
    if looks_local or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise FileNotFoundError(f"base model {name!r} not found; {_where(name)}")
    return _download(str(name))


def local(name):
    """Folder of the base model `name` where it lies on this machine; None for what a hub holds, and where there is none."""
    here = name and (str(name).partition("/")[0] == "mini" or Path(name).expanduser().is_dir() or (files.root() / name).is_dir())
    return locate(name) if here else None


def _snapshot(name, folder):
    """The folder itself or, of a folder of the hub's cache (models--OWNER--NAME), its snapshot; a download that was cut off is refused."""
    found = sorted((folder / "snapshots").glob("*/")) if (folder / "snapshots").is_dir() else []
    main = folder / "refs" / "main"
    if len(found) > 1 and main.is_file():
        found = [one for one in found if one.name == main.read_text().strip()] or found
    if len(found) > 1:
        raise FileNotFoundError(f"base model {name!r}: {folder} is a cache of {len(found)} versions; name one of its snapshots, {found[0]}")
    chosen = found[0] if found else folder
    part = next(folder.rglob("*.incomplete"), None)
    if part is not None and (not found or not any(chosen.iterdir()) or any(not path.exists() for path in chosen.rglob("*"))):
        raise FileNotFoundError(
            f"base model {name!r}: {folder} holds {part.name}, a download that was cut off; delete that file and fetch it again with "
            "`hf download`, or copy the whole folder from a machine that has it"
        )
    return chosen


def _where(name):
    target = files.root() / Path(name).expanduser()
    return (
        f"put a diffusers folder (vae/, unet/, text_encoder/, tokenizer/, scheduler/ with *.safetensors weights) at {target}, "
        'or give another base_model: a folder, a hub id, or "mini" for the built-in miniature'
    )


def _download(name):
    """Folder of a hub repository's snapshot with one set of safetensors weights; a cached copy needs no network."""
    import huggingface_hub as hub

    try:
        try:
            listed = hub.list_repo_files(name)
        except Exception:
            return Path(hub.snapshot_download(name, local_files_only=True))
        return Path(hub.snapshot_download(name, allow_patterns=_wanted(listed)))
    except Exception as error:
        raise FileNotFoundError(
            f"base model {name!r} is no folder, and the hub gave none ({type(error).__name__}); {_where(name)}"
        ) from error


def _wanted(listed):
    """The files of a hub repository to fetch: settings, tokenizer, and per part the fp16 weights, else the plain ones."""
    wanted = [path for path in listed if path.split("/")[0] in PARTS and path.endswith((".json", ".txt")) and ".index." not in path]
    for part, stem in STEMS.items():
        names = [path for path in listed if path.startswith(f"{part}/{stem}") and ".safetensors" in path]
        half = [path for path in names if ".fp16" in path]
        plain = [path for path in names if re.fullmatch(rf"{part}/{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path)]
        wanted += half or plain
    return wanted


def _weights(folder, stem):
    """Variant ("fp16", another name, or None for plain) and weight files of one part; plain weights come first."""
    groups = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        tag = re.sub(r"-\d+-of-\d+", "", path.name)[len(stem) : -len(".safetensors")]
        groups.setdefault(tag.strip("."), []).append(path)
    if not groups:
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds {held}, no {stem}.safetensors; pickled .bin/.ckpt weights are not read, convert them to safetensors"
        )
    tag = min(groups, key=lambda name: (name != "", name != "fp16", name))
    return tag or None, groups[tag]


def read(name, folder, dtype):
    """What the folder of the base `name` holds: {part: module, tokenizer or scheduler} and {part: hash of its weights and settings}.

    Where only the decoder was trained, `vae` is the hash of the autoencoder whose encoder it has, since latents, caches and adapters are
    those of that one, and `decoder` is its own.

    Raises FileNotFoundError where there is no part at all, ValueError for one that is not of SD 1.x / 2.x, with or without text.
    """
    found = {part: _read_part(folder / part, part, dtype) for part in PARTS if (folder / part).is_dir()}
    if not found:
        raise FileNotFoundError(f"base model {name!r}: {folder} has none of the subfolders {', '.join(PARTS)}; {_where(name)}")
    if {"tokenizer", "text_encoder"} <= set(found):
        words, rows = len(found["tokenizer"][0]), found["text_encoder"][0].config.vocab_size
        if not rows / 2 < words <= rows:
            raise ValueError(
                f"{folder}: its tokenizer has {words} words and its text encoder {rows}, so they are not of one base, or files of the "
                "tokenizer are missing (vocab.json and merges.txt, or tokenizer.json); copy the whole folder of the base model"
            )
    if {"vae", "unet"} <= set(found):
        takes, gives = found["unet"][0].config.in_channels, found["vae"][0].config.latent_channels
        if takes != gives:
            raise ValueError(
                f"{folder}: its UNet takes latents of {takes} channels and its autoencoder makes {gives}; they are of two bases"
            )
    identity = {part: digest for part, (_, digest) in found.items()}
    if (folder / "vae" / FITTED).is_file():
        identity |= {"vae": files.read_json(folder / "vae" / FITTED)["encoder_of"], "decoder": identity["vae"]}
    return {part: loaded for part, (loaded, _) in found.items()}, identity


def _read_part(folder, part, dtype):
    """One part and the hash of its weights and settings."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if part == "tokenizer":
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        return tokenizer, files.digest(sorted(tokenizer.get_vocab().items()), tokenizer.pad_token, tokenizer.model_max_length)[:16]
    config = _settings(folder, {"scheduler": "scheduler_config.json"}.get(part, "config.json"))
    if part == "scheduler":
        scheduler = _ddim(config)
        return scheduler, files.digest(_plain(scheduler.config))[:16]

    variant, paths = _weights(folder, STEMS[part])
    options = {"variant": variant, "use_safetensors": True, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    if part == "text_encoder":
        if config.get("model_type") not in ("clip_text_model", "clip"):
            raise ValueError(f"{folder}: text encoder is a {config.get('model_type')!r}, expected CLIP; only SD 1.x / 2.x bases are read")
        module, info = transformers.CLIPTextModel.from_pretrained(folder, **options)
    else:
        free = config.get("_class_name") == "UNet2DModel"  # trained without text
        if part == "unet" and config.get("in_channels", 4) != 4 and not free:
            raise ValueError(
                f"{folder}: UNet takes {config['in_channels']} channels, expected 4; inpainting and upscaling bases do not fit"
            )
        if part == "unet" and config.get("addition_embed_type") not in (None, "text"):  # "text" takes the prompt's own states
            raise ValueError(f"{folder}: UNet wants {config['addition_embed_type']!r} conditions (SDXL); only SD 1.x / 2.x bases are read")
        kind = diffusers.AutoencoderKL if part == "vae" else diffusers.UNet2DModel if free else diffusers.UNet2DConditionModel
        module, info = kind.from_pretrained(folder, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(p.name for p in paths)} lacks {len(missing)} weights, first {missing[0]!r}; fetch the file again"
        )
    return module, files.digest(_plain(config), [files.sha256(path) for path in paths])[:16]


def _settings(folder, name):
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder of the base model")
    return files.read_json(path)


def _plain(config):
    """A config without what does not change the arithmetic (library version, where it was saved)."""
    return {
        key: config[key]
        for key in sorted(config)
        if not key.startswith("_") and key not in ("transformers_version", "torch_dtype", "dtype")
    }


def _ddim(config):
    """DDIM on the base's own noise schedule; clip_sample and steps_offset as Stable Diffusion pipelines set them."""
    from diffusers import DDIMScheduler

    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") != "v_prediction":
        raise ValueError(
            "the scheduler has rescale_betas_zero_snr without v_prediction: at its last step the noise says nothing of the image; "
            "set it to false, or prediction_type to what the UNet was trained for"
        )
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    return DDIMScheduler.from_config({**known, "clip_sample": False, "thresholding": False, "steps_offset": 1})
