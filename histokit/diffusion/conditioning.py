"""A denoiser with two conditions: a layout, place by place, and a style, one vector for the whole picture.

Style-Extracting Diffusion Models, Öttl et al. (2024), arXiv:2403.14429. The layout is a mask in layers, made coarse, mapped and laid beside
the noisy latent. The style comes from pictures of a slide (`style_encoders`) and enters at the bottleneck, with the time, or by
cross-attention. Each begins as if it were not there, so that a denoiser which can draw already goes on from what it knows. What is
trained, and what generates, is in `training.style_layout` and `generate.style_layout`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from histokit.core import files
from histokit.diffusion import backbone, style_encoders
from histokit.tiles import masks

VERSION = 1
INJECTIONS = ("bottleneck", "time", "cross")
TOKENS = 4  # places of cross-attention that a style takes
FILE = "style_layout"


@dataclass(frozen=True)
class Config:
    """Everything a StyleLayout is built from.

    Args:
        layers: names of the layout's layers, K of them.
        scheduler: diffusers config of the noise it learned in.
        unet: {"kind": UNet2DModel | UNet2DConditionModel, ...}: its diffusers config; `in_channels` counts the mapped layout in.
        latent_space: of the autoencoder it learned in, see `space_of`.
        injection, encoder, aggregation: see `INJECTIONS`, `style_encoders`.
        encoder_name: the frozen encoder of `features`, and `encoder_width` its width.
        pictures: n, style pictures of one draw.
        style_px: side at which style pictures are seen.
        dim: of the style vector.
        mapped: channels that the layout is mapped to.
        context: [L, D] shape of what cross-attention hears where nothing is said, () without cross-attention.
        layout_drop: share of layouts left out in training; above 0 the layout can be weighed when generating.
    """

    layers: tuple
    unet: dict
    scheduler: dict = field(default_factory=dict)
    latent_space: dict = field(default_factory=dict)
    injection: str = "bottleneck"
    encoder: str = "tiny_cnn"
    aggregation: str = "mean"
    encoder_name: str = ""
    encoder_width: int = 0
    pictures: int = 1
    style_px: int = 64
    dim: int = 512
    mapped: int = 3
    context: tuple = ()
    layout_drop: float = 0.0

    def __post_init__(self):
        if self.injection not in INJECTIONS:
            raise ValueError(f"style_injection {self.injection!r} is unknown; use {', '.join(INJECTIONS)}")
        if self.injection == "cross" and not self.context:
            raise ValueError("style_injection cross needs a denoiser with cross-attention; use bottleneck or time")


class StyleBlock(nn.Module):
    """A residual block that hears the style in the place of the time: y = x + conv(SiLU(GN(conv(SiLU(GN(x))) + W SiLU(v)))).

    Its last convolution starts at zero, so it changes nothing at first. [B, C, h, w] and v [B, dim] to [B, C, h, w].
    """

    def __init__(self, channels, dim, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.style = nn.Linear(dim, channels)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, v):
        h = self.conv1(F.silu(self.norm1(x))) + self.style(F.silu(v))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class StyleLayout(nn.Module):
    """The denoiser, the mapper of layouts, the style encoder, the style of no style, and the way in.

    Its UNet is walked block by block here, so that the style block is a part of its own beside an unchanged UNet.
    """

    def __init__(self, config):
        super().__init__()
        import diffusers

        self.config = config
        shape = dict(config.unet)
        self.unet = getattr(diffusers, shape.pop("kind"))(**shape)
        channels, time = self.unet.config.block_out_channels, self.unet.time_embedding.linear_2.out_features
        self.mapper = nn.Conv2d(len(config.layers), config.mapped, 1, bias=False)
        self.style = style_encoders.Style(
            config.encoder, config.aggregation, config.dim, config.pictures, config.encoder_width, config.style_px
        )
        self.null = nn.Parameter(torch.zeros(config.dim))
        self.silence = nn.Parameter(torch.zeros(config.context)) if config.context else None
        groups = self.unet.config.norm_num_groups
        if config.injection == "bottleneck":
            self.way = StyleBlock(channels[-1], config.dim, groups)
        else:
            self.way = nn.Linear(config.dim, time if config.injection == "time" else TOKENS * config.context[1])
            nn.init.zeros_(self.way.weight)
            nn.init.zeros_(self.way.bias)

    @property
    def scheduler(self):
        """DDIM on the noise it learned in."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.config.scheduler)

    def of_style(self, style, gone=None):
        """The style vector [B, dim] of pictures or features; the learned style of no style where `gone` [B] bool says so."""
        v = self.style(style)
        return v if gone is None else torch.where(gone[:, None], self.null, v)

    def forward(self, z, t, layout, v):
        """What the UNet says of noisy latents z [B, C, h, w] at timesteps t [B], under a layout [B, K, h, w] and a style v [B, dim]."""
        unet, how = self.unet, self.config.injection
        time = unet.time_embedding(unet.time_proj(t.expand(len(z))).to(z.dtype))
        if how == "time":
            time = time + self.way(v)
        context = None
        if self.silence is not None:
            context = self.silence.expand(len(z), -1, -1)
            if hasattr(unet, "add_embedding"):  # a UNet that hears its text in the time as well, as mini's does
                time = time + unet.add_embedding(context)
            if how == "cross":
                own = context[:, :TOKENS] + self.way(v).unflatten(1, (TOKENS, -1))
                context = torch.cat([own, context[:, TOKENS:]], dim=1)
        h = unet.conv_in(torch.cat([z, self.mapper(layout)], dim=1))
        skips = (h,)
        for block in unet.down_blocks:
            h, more = block(h, time, **_hears(block, context))
            skips += more
        h = self._middle(h, time, context, v)
        for block in unet.up_blocks:
            n = len(block.resnets)
            h, skips = block(h, skips[-n:], time, **_hears(block, context)), skips[:-n]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))

    def _middle(self, h, time, context, v):
        middle = self.unet.mid_block
        h = middle.resnets[0](h, time)
        if self.config.injection == "bottleneck":
            h = self.way(h, v)
        for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
            if context is not None:
                h = attention(h, encoder_hidden_states=context, return_dict=False)[0]
            elif attention is not None:
                h = attention(h)
            h = block(h, time)
        return h

    def groups(self, lr, lr_new):
        """Parameter groups: what a base brought at `lr`, what is new here at `lr_new`; every parameter that learns is in exactly one."""
        brought = list(self.unet.parameters())
        known = {id(p) for p in brought}
        new = [p for p in self.parameters() if id(p) not in known]
        groups = [{"params": [p for p in part if p.requires_grad], "lr": rate} for part, rate in ((brought, lr), (new, lr_new))]
        listed = [id(p) for group in groups for p in group["params"]]
        learns = [id(p) for p in self.parameters() if p.requires_grad]
        assert sorted(listed) == sorted(learns), "a parameter is in no optimiser group, or in two"
        return [group for group in groups if group["params"]]

    def freeze_style(self):
        """The style encoder keeps the weights it has, random ones as well; the original's never learned."""
        self.style.requires_grad_(False)

    # --- on disk

    def save(self, folder, facts=None):
        """Weights and config into a folder; `facts` is a dict that is told with them."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        files.write_tensors(Path(folder) / f"{FILE}.safetensors", tensors, {})
        files.write_json(Path(folder) / f"{FILE}.json", {"config": asdict(self.config), "facts": facts or {}, "version": VERSION})


def _hears(block, context):
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def load(folder, model=None, device="cpu"):
    """The StyleLayout that `save` wrote, in eval mode, with what was told of it as `facts`.

    Args:
        model: backbone.Model whose autoencoder and schedule it is to be used with; None does not ask.

    Raises FileNotFoundError where there is none, ValueError where weights and config do not fit, or the model has other latents.
    """
    place = Path(folder) / f"{FILE}.json"
    if not place.is_file():
        raise FileNotFoundError(f"{folder} holds no {place.name}; name a 30_style_layout step that has trained")
    held = files.read_json(place)
    config = {name: tuple(value) if isinstance(value, list) and name != "unet" else value for name, value in held["config"].items()}
    try:
        found = StyleLayout(Config(**config))
        found.load_state_dict(files.read_tensors(place.with_suffix(".safetensors")), strict=True)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: weights and config are not of one model ({error}); train that step again") from error
    space = space_of(model) if model is not None else {}
    for what, theirs in space.items():
        ours = found.config.latent_space.get(what, theirs)
        if files.plain(ours) != files.plain(theirs):
            raise ValueError(f"{folder}: it learned with {what} {ours!r}, the base has {theirs!r}; use the base it was trained on")
    found.facts = held["facts"]
    return found.requires_grad_(False).eval().to(device)


def space_of(model):
    """What a model shares with its base: autoencoder, scale and shape of the latents. Its noise schedule is its own."""
    return {name: value for name, value in model.latent_space.items() if name != "schedule"}


# --- from a base -----------------------------------------------------------------------------------------------------


def begun(config, seed):
    """A StyleLayout with random weights that follow from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(seed, "style layout"))
        return StyleLayout(config)


def started(model, config, seed):
    """A StyleLayout whose UNet goes on from a base's, and {"copied", "widened", "new"}: names of tensors.

    Args:
        model: backbone.Model; its UNet is copied, its silence is what its text encoder says to nothing.
        config: Config whose `unet` is that of `of_base`.

    All is copied strictly but for the first convolution, which gets further inputs that count nothing at first.
    """
    found = begun(config, seed)
    theirs, own = model.unet.state_dict(), found.unet.state_dict()
    odd = [name for name in own if name not in theirs or (theirs[name].shape != own[name].shape and name != "conv_in.weight")]
    if odd or set(theirs) - set(own):
        raise ValueError(f"the UNet of base {model.name!r} does not fit: {', '.join((odd or sorted(set(theirs) - set(own)))[:3])}")
    state = {name: tensor.clone() for name, tensor in theirs.items()}
    first = theirs["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([first, first.new_zeros(len(first), config.mapped, *first.shape[2:])], dim=1)
    found.unet.load_state_dict(state, strict=True)
    if found.silence is not None:
        with torch.no_grad():
            found.silence.copy_(backbone.embed(model, [""])[0])
    new = [name for name in found.state_dict() if not name.startswith("unet.") and name != "silence"]
    return found, {"copied": sorted(set(own) - {"conv_in.weight"}), "widened": ["conv_in.weight"], "new": new}


def of_base(model, mapped=3):
    """{"unet", "context", "scheduler", "latent_space"} of a Config whose UNet goes on from that of a base."""
    held = {name: value for name, value in dict(model.unet.config).items() if not name.startswith("_")}
    for name, known in (("addition_embed_type", (None, "text")), ("class_embed_type", (None,)), ("encoder_hid_dim_type", (None,))):
        if held.get(name) not in known:
            raise ValueError(f"the UNet of base {model.name!r} has {name} {held[name]!r}; layout and style go into those without it")
    if model.hears:
        length = min(model.tokenizer.model_max_length, model.text_encoder.config.max_position_embeddings)
        context = (length, model.unet.config.cross_attention_dim)
    else:
        context = ()
    kind = type(model.unet).__name__
    unet = {"kind": kind, **files.plain(held), "in_channels": held["in_channels"] + mapped}
    noise = {name: value for name, value in files.plain(dict(model.scheduler.config)).items() if not name.startswith("_")}
    return {"unet": unet, "context": context, "scheduler": noise, "latent_space": space_of(model)}


def layout_of(ids, config, px):
    """Layout [B, K, px, px] float of layer ids [B, H, W], K as the config has it; ValueError for an id beyond."""
    if int(ids.max()) >= len(config.layers):
        raise ValueError(f"layout holds layer {int(ids.max())}, the model knows {len(config.layers)} ({', '.join(config.layers)})")
    return masks.coarser(masks.one_hot(ids, len(config.layers)), px)
