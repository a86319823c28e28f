"""Where weights come from: the parts of a latent diffusion model, from "mini", a folder or a hub id.

The only module that knows how Stable Diffusion lies on disk. It loads, encodes, decodes and embeds
prompts; it trains nothing and denoises nothing. Everything is loaded in float32: what is trained must
be, and on a GPU the arithmetic is made cheap by `autocast`, never by casting a module.
"""

import contextlib
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from histokit import PACKAGE
from histokit.core import files, machine
from histokit.tiles import contamination

VERSION = 1

MINI = PACKAGE / "mini"
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
STEMS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass
class Model:
    """The parts of one latent diffusion model on one device; a part that the folder lacks is None.

    `identity` maps each part to a hash of its weights and settings: adapters remember it. `placeholders` maps
    a learned token to the token strings it stands for; `adapters.add_tokens` fills it, `expand` reads it.
    """

    vae: object = None
    unet: object = None
    text_encoder: object = None
    tokenizer: object = None
    scheduler: object = None
    name: str = ""
    identity: dict = field(default_factory=dict)
    tile_px: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    adapters: list = field(default_factory=list)
    placeholders: dict = field(default_factory=dict)
    lock: object = field(default_factory=threading.RLock, repr=False, compare=False)  # for whoever uses it beside others
    resting: bool = False  # its weights wait on the CPU, see `rest`

    @property
    def factor(self):
        """Pixels per latent along one side: 8 for Stable Diffusion, 4 for mini."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_px(self):
        return self.tile_px // self.factor

    @property
    def scaling(self):
        return self.vae.config.scaling_factor

    def need(self, *parts):
        """Raise a ValueError naming the parts among `parts` that this model lacks; returns the model."""
        missing = [part for part in parts if getattr(self, part) is None]
        if missing:
            raise ValueError(f"base model {self.name!r} has no {', '.join(missing)}; this step needs {', '.join(parts)}")
        return self

    @property
    def arithmetic(self):
        """torch.bfloat16 on a CUDA device that has it in hardware, None for full precision elsewhere."""
        return machine.bfloat16(self.device) if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def alone(self):
        """The model for oneself within the `with`, its weights on its device; whoever else wants it waits."""
        with self.lock:
            if self.resting:
                self._move(self.device)
                self.resting = False
            yield self

    def rest(self):
        """Move the weights to the CPU and give back the accelerator's memory; they return when the model is used next.

        Waits for who is using it. True where there was memory to give back.
        """
        if self.device.type == "cpu":
            return False
        with self.lock:
            self._move("cpu")
            self.resting = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def _move(self, device):
        for part in (self.vae, self.unet, self.text_encoder):
            if part is not None:
                part.to(device)

    def autocast(self):
        """Arithmetic in `arithmetic` within the `with`."""
        return torch.autocast("cuda", self.arithmetic) if self.arithmetic else contextlib.nullcontext()


# --- loading ---------------------------------------------------------------------------------------------------------


def load(name, device="cpu", dtype=torch.float32, tiles=None):
    """Load a base model, frozen and in eval mode.

    Args:
        name: "mini" (built in), a folder in diffusers layout (absolute, or relative to the working root), or a
            hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5"; only a hub id may use the network.
        device: torch device.
        dtype: of the weights; keep float32 for anything that is trained.
        tiles: this experiment's manifest; a base that learned from what it keeps from training is refused, see `contamination`.

    Returns:
        Model; parts without a subfolder are None.

    Raises FileNotFoundError naming where to put a missing base, ValueError for a base that is no SD 1.x / 2.x.
    """
    folder = locate(name)
    if tiles is not None:
        contamination.refuse(folder, tiles, f"base model {name!r}")
    parts, identity = {}, {}
    for part in PARTS:
        if (folder / part).is_dir():
            parts[part], identity[part] = _load_part(folder / part, part, dtype)
    if not parts:
        raise FileNotFoundError(f"base model {name!r}: {folder} has none of the subfolders {', '.join(PARTS)}; {_where(name)}")
    device = torch.device(device)
    for part in ("vae", "unet", "text_encoder"):
        if part in parts:
            parts[part].requires_grad_(False).eval().to(device)
    model = Model(**parts, name=str(name), identity=identity, device=device, dtype=dtype)
    model.tile_px = _tile_px(model)
    return model


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
            return folder
        if folder.is_file():
            raise FileNotFoundError(f"base model {name!r} is a single file; convert it to a diffusers folder first. {_where(name)}")
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or (files.root() / path.parts[0]).is_dir()
    if looks_local or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise FileNotFoundError(f"base model {name!r} not found; {_where(name)}")
    return _download(str(name))


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


def _load_part(folder, part, dtype):
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
        if part == "unet" and config.get("in_channels", 4) != 4:
            raise ValueError(
                f"{folder}: UNet takes {config['in_channels']} channels, expected 4; inpainting and upscaling bases do not fit"
            )
        if part == "unet" and config.get("addition_embed_type"):
            raise ValueError(f"{folder}: UNet wants {config['addition_embed_type']!r} conditions (SDXL); only SD 1.x / 2.x bases are read")
        kind = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}[part]
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


def _tile_px(model):
    if model.vae is None:
        return 0
    if model.unet is not None:
        return int(model.unet.config.sample_size) * model.factor
    return int(model.vae.config.sample_size)


def fingerprint(module):
    """Hash of a module's weights in memory, 16 hex; for models built in code, which have no files."""
    state = module.state_dict()
    return files.digest({name: _tensor_digest(state[name]) for name in sorted(state)})[:16]


def _tensor_digest(tensor):
    import hashlib

    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


# --- pixels, latents, prompts ----------------------------------------------------------------------------------------


@torch.no_grad()
def encode(model, images):
    """Mean and log variance [B, 4, h, w] of the unscaled latents of images [B, 3, H, W] float in [-1, 1].

    The autoencoder runs in its own precision, without autocast: tissue texture is what it must not lose.
    """
    with model.alone(), torch.autocast(model.device.type, enabled=False):
        posterior = model.need("vae").vae.encode(images.to(model.device, model.dtype)).latent_dist
    return posterior.mean, posterior.logvar


def latents(mean, logvar, scaling, generator=None):
    """Scaled latents [B, 4, h, w]: the mean when `generator` is None, else one sample of the posterior (a CPU generator)."""
    if generator is None:
        return mean * scaling
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return (mean + (0.5 * logvar).exp() * noise) * scaling


@torch.no_grad()
def decode(model, z, batch_size=4):
    """Images uint8 [B, H, W, 3] on the CPU from scaled latents z [B, 4, h, w].

    Always runs batches of exactly `batch_size` (the last is padded), so an image depends on its slot but not on its neighbours.
    """
    images = []
    for start in range(0, len(z), batch_size):
        part = z[start : start + batch_size].to(model.device, model.dtype)
        padded = torch.cat([part, part[-1:].expand(batch_size - len(part), -1, -1, -1)])
        with model.alone(), torch.autocast(model.device.type, enabled=False):
            decoded = model.need("vae").vae.decode(padded / model.scaling).sample[: len(part)]  # [b, 3, H, W]
        pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        images.append(pixels.permute(0, 2, 3, 1).cpu())
    return torch.cat(images).numpy() if images else torch.empty(0, model.tile_px, model.tile_px, 3, dtype=torch.uint8).numpy()


def expand(model, prompt):
    """`prompt` with each learned placeholder replaced by its tokens: the one place where this happens."""
    if not model.placeholders:
        return prompt
    pattern = "|".join(re.escape(name) for name in sorted(model.placeholders, key=len, reverse=True))
    return re.sub(pattern, lambda found: " ".join(model.placeholders[found.group()]), prompt)


def token_ids(model, prompts):
    """Token ids [B, L] int64 on the model's device, padded to the text encoder's length L; a longer prompt raises ValueError."""
    model.need("tokenizer", "text_encoder")
    length = min(model.tokenizer.model_max_length, model.text_encoder.config.max_position_embeddings)
    texts = [expand(model, prompt) for prompt in prompts]
    rows = model.tokenizer(texts, padding="max_length", max_length=length, truncation=False)["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > length:
            raise ValueError(
                f"prompt {prompt!r} has {len(row)} tokens, the text encoder reads {length}; shorten it or use fewer vectors per token"
            )
    return torch.tensor(rows, dtype=torch.int64, device=model.device)


def embed(model, prompts):
    """Text embeddings [B, L, D] of prompts (list of str), with learned tokens in place; differentiable in the token rows."""
    if isinstance(prompts, str):
        raise TypeError(f"embed takes a list of prompts, got the single string {prompts!r}")
    with model.alone():
        return model.text_encoder(token_ids(model, prompts)).last_hidden_state
