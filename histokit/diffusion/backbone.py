"""The parts of a latent diffusion model on one device, and what each is asked for: latents, pictures, text embeddings.

Where they come from is in `pretrained`. Nothing here trains or denoises. Everything is loaded in float32: what is trained must
be, and on a GPU the arithmetic is made cheap by `autocast`, never by casting a module.
"""

import contextlib
import re
import threading
from dataclasses import dataclass, field

import torch

from histokit.core import files, machine
from histokit.diffusion import pretrained
from histokit.tiles import contamination

VERSION = 1


@dataclass
class Model:
    """The parts of one latent diffusion model on one device; a part that the folder lacks is None.

    `identity` maps each part to a hash of its weights and settings: adapters remember it. `placeholders` maps
    a learned token to the token strings it stands for; `learned_tokens.add_tokens` fills it, `expand` reads it.
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

    @property
    def latent_space(self):
        """What a network on noisy latents has to share with this model: autoencoder, scale, noise schedule, shape."""
        levels = [round(float(a), 9) for a in self.scheduler.alphas_cumprod]
        shape = [self.vae.config.latent_channels, self.latent_px]
        return {"vae": self.identity.get("vae", ""), "scaling": self.scaling, "schedule": files.digest(levels)[:16], "shape": shape}

    @property
    def hears(self):
        """Whether the UNet takes text; one that was trained without labels or captions does not."""
        return self.unet is not None and "cross_attention_dim" in self.unet.config

    def predict(self, x, t, context):
        """What the UNet returns for latents x [B, C, h, w] at timesteps t; `context` [B, L, D] is left unread by one without text."""
        return (self.unet(x, t, context) if self.hears else self.unet(x, t)).sample

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
    folder = pretrained.locate(name)
    if tiles is not None:
        contamination.refuse(folder, tiles, f"base model {name!r}")
    parts, identity = pretrained.read(name, folder, dtype)
    device = torch.device(device)
    for part in ("vae", "unet", "text_encoder"):
        if part in parts:
            parts[part].requires_grad_(False).eval().to(device)
    model = Model(**parts, name=str(name), identity=identity, device=device, dtype=dtype)
    model.tile_px = _tile_px(model)
    return model


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
    """Text embeddings [B, L, D] of prompts (list of str), with learned tokens in place; differentiable in the token rows.

    A base without text gives zeros [B, 1, 1] for empty prompts, and ValueError for others.
    """
    if isinstance(prompts, str):
        raise TypeError(f"embed takes a list of prompts, got the single string {prompts!r}")
    if not model.hears and model.unet is not None:
        if asked := next((prompt for prompt in prompts if prompt), ""):
            raise ValueError(f"base model {model.name!r} was trained without text and cannot follow the prompt {asked!r}; use prompt: ''")
        return torch.zeros(len(prompts), 1, 1, device=model.device)
    with model.alone():
        return model.text_encoder(token_ids(model, prompts)).last_hidden_state
