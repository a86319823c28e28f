"""Where encoders come from, and the transform each was made for.

The built-in ones, and whatever the user brings in the layouts of timm, torchvision and transformers.
Nothing here caches, trains or judges.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from histokit import PACKAGE
from histokit.core import files, parallel
from histokit.tiles import data
from histokit.vision import handcrafted, pathology_encoders

VERSION = 1

FIXED = {"colour-texture": handcrafted.ColourTexture, "picture": handcrafted.Picture}
IMAGENET = pathology_encoders.IMAGENET
MINI = PACKAGE / "mini"
WITH_FILE = ("cnn@", "timm:", "torchvision:")
KINDS = (
    "mini-ssl, mini-sup, colour-texture, picture, cnn, cnn@FILE, timm:NAME@FILE, torchvision:NAME@FILE, a folder with config.json, "
    "or a hub id"
)
BY_CARD = 'histokit.json beside them takes what the card gives: {"arguments": {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}}'
PICKLED = "pickled .bin and .pth weights are not read; convert them once to safetensors"


class _ClampThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high):
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, slope):
        return slope, None, None


def clamp_through(x, low, high):
    """x held in [low, high], with the gradient of the identity: white background is saturated and would never change otherwise."""
    return _ClampThrough.apply(x, low, high)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut; `stride` halves the map."""

    def __init__(self, channels_in, channels_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class SmallCNN(nn.Module):
    """A residual network of 1.2 million parameters (7 ms a tile of 128 px on one core); the body of mini-ssl, mini-sup and "cnn".

    Args:
        dim: width of the pooled feature.

    Takes [B, 3, H, W] float normalised by mean 0.5 and std 0.5, H and W >= 64; returns [B, dim] float.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, dim=256):
        super().__init__()
        self.dim = dim
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())  # H/2
        self.body = nn.Sequential(
            ResidualBlock(32, 32),
            ResidualBlock(32, 64, stride=2),  # H/4
            ResidualBlock(64, 128, stride=2),  # H/8
            ResidualBlock(128, 128),
            ResidualBlock(128, 192, stride=2),  # H/16
        )
        self.top = nn.Sequential(nn.Conv2d(192, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x):
        return self.top(self.body(self.stem(x))).mean(dim=(2, 3))


@dataclass
class Encoder:
    """A network with the transform it was made for.

    `identity` says what a feature depends on (architecture, hash of the weights, transform); equal identity, equal features.
    `size` is the side in pixels that tiles are resized to, 0 keeps theirs. `licence` travels into what is exported.
    """

    name: str
    net: nn.Module
    dim: int
    identity: dict
    size: int = 0
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    pooling: str = "mean"
    licence: str = ""
    device: str = "cpu"

    def features(self, images):
        """Features [B, dim] of images [B, 3, H, W] float in [-1, 1], with gradients where the network has them."""
        x = (images.to(self.device) + 1) / 2
        if self.size and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            x = clamp_through(x, 0.0, 1.0)
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return self.net(((x - mean) / std).contiguous(memory_format=torch.channels_last))

    @torch.inference_mode()
    def __call__(self, pixels):
        """Features [B, dim] float32 on the CPU, of uint8 tiles [B, H, W, 3]."""
        out = parallel.rows(self.features, data.to_float(pixels).to(self.device)).float().cpu()
        if not torch.isfinite(out).all():
            raise FloatingPointError(f"encoder {self.name!r} gave features that are not finite; check its weights and the tiles")
        return out


def load(name, device="cpu", *, frozen=True, seed=0, dim=256):
    """Load an encoder, frozen and in eval mode.

    Args:
        name: "mini-ssl" or "mini-sup" (built in), "colour-texture" or "picture" (no weights), "cnn@FILE" (what 20_pretrain trained),
            "timm:NAME@FILE" or "torchvision:NAME@FILE" with a .safetensors file, a timm or transformers folder (config.json and
            model.safetensors; an optional histokit.json there sets pooling, mean, std, size, licence), or a hub id OWNER/NAME, the
            only kind that may use the network. For training end to end also "cnn" (`SmallCNN`), and "timm:NAME" or
            "torchvision:NAME" without weights.
        device: torch device.
        frozen: False allows random weights, drawn from `seed`, and leaves the network trainable.
        dim: feature width of "cnn".

    Raises FileNotFoundError naming where to put what is missing, ValueError for a name of no known kind or for random weights
    where `frozen`.
    """
    kind, _, rest = name.partition(":")
    architecture, _, weights = rest.partition("@")
    if frozen and (name == "cnn" or (kind in ("timm", "torchvision") and not weights)):
        remedy = "use mode: full to train it, or " + ("mini-ssl" if name == "cnn" else f"{name}@path/model.safetensors")
        raise ValueError(f"encoder {name!r} has random weights, and their frozen features say little; {remedy}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in ("mini-ssl", "mini-sup"):
            encoder = _small_cnn(name, MINI / f"{name.removeprefix('mini-')}.safetensors", licence="see the model card of mini")
        elif name.startswith("cnn@"):
            encoder = _small_cnn(name, _weights_file(name, name.partition("@")[2]))
        elif name in FIXED:
            net, identity = FIXED[name](), {"weights": f"none, version {handcrafted.VERSION}"}
            encoder = Encoder(name, net, net.dim, identity, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "its own", "Apache-2.0")
        elif name == "cnn":
            encoder = Encoder(name, SmallCNN(dim), dim, {"weights": "random"}, licence="Apache-2.0")
        elif kind == "timm":
            encoder = _timm(name, architecture, _weights_file(name, weights))
        elif kind == "torchvision":
            encoder = _torchvision(name, architecture, _weights_file(name, weights))
        else:
            encoder = _from_folder(name, _locate(name))
    known_as = name.partition("@")[0] if name.startswith(WITH_FILE) else Path(name).name  # no path: a moved file is the same encoder
    transform = {"size": encoder.size, "mean": list(encoder.mean), "std": list(encoder.std), "pooling": encoder.pooling}
    encoder.identity = {"encoder": known_as, **encoder.identity, **transform}
    encoder.net.requires_grad_(not frozen).train(not frozen).to(device, memory_format=torch.channels_last)
    encoder.device = str(device)
    return encoder


def source(name):
    """The local file or folder that an encoder's weights come from, for a run to record; None for what is built in, random or a hub's."""
    if name.startswith(WITH_FILE):
        return _weights_file(name, name.partition("@")[2])
    found = [folder for folder in (Path(name).expanduser(), files.root() / name) if (folder / "config.json").is_file()]
    return found[0] if found else None


def weights(name):
    """Where the weights of an encoder made by 20_pretrain lie, its list of training tiles beside them; None for all other kinds."""
    if name in ("mini-ssl", "mini-sup"):
        return MINI
    return _weights_file(name, name.partition("@")[2]) if name.startswith("cnn@") else None


def _small_cnn(name, path, licence=""):
    if path is None:
        raise ValueError(f"encoder {name!r} names no file; write cnn@outputs/EXPERIMENT/STEP/sup.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"encoder {name!r} is not at {path}; reinstall histokit, or run params/mini.yaml to train it")
    said = files.read_metadata(path)
    net = SmallCNN(int(said.get("dim", 256)))
    _fill(net, files.read_tensors(path), path)
    # tiles of another size are brought to the one it learned at; any from 64 px would do, but nuclei would not be as it knows them
    return Encoder(name, net, net.dim, {"weights": files.sha256(path)[:16]}, int(said.get("size", 0)), licence=licence)


def _timm(name, architecture, weights):
    import timm

    if architecture not in timm.list_models():
        raise ValueError(f"encoder {name!r}: timm has no model {architecture!r}; timm.list_models() names them")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    return _described_by_timm(name, timm.create_model(architecture, num_classes=0, **options), weights)


def _described_by_timm(name, net, weights):
    import timm

    config = timm.data.resolve_model_data_config(net)
    identity = {"weights": files.sha256(weights)[:16] if weights else "random"}
    mean, std, size = tuple(config["mean"]), tuple(config["std"]), config["input_size"][-1]
    return Encoder(name, net, net.num_features, identity, size, mean, std, "the model's own", net.pretrained_cfg.get("license") or "")


def _torchvision(name, architecture, weights):
    import torchvision

    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"encoder {name!r}: torchvision has no classifier {architecture!r}; torchvision.models.list_models() names them")
    net = torchvision.models.get_model(architecture, weights=None)
    if weights:
        _fill(net, files.read_tensors(weights), weights)
    part = next(part for part in ("fc", "heads", "head", "classifier") if hasattr(net, part))
    width = next(layer for layer in getattr(net, part).modules() if isinstance(layer, nn.Linear)).in_features
    setattr(net, part, nn.Flatten())
    identity = {"weights": files.sha256(weights)[:16] if weights else "random"}
    return Encoder(name, net, width, identity, 224, **IMAGENET, pooling="the model's own", licence="see torchvision")


class _Pooled(nn.Module):
    """A vision model reduced to one vector an image: its class token, or class token and mean patch side by side.

    `before` tokens stand before the patches: the class token and any registers, which are no picture.
    """

    def __init__(self, model, pooling, before=1, tokens=lambda model, x: model(pixel_values=x).last_hidden_state):
        super().__init__()
        self.model, self.pooling, self.before, self.tokens = model, pooling, before, tokens

    def forward(self, x):
        out = self.tokens(self.model, x)
        if out.ndim == 4:  # a convolutional model: [B, C, h, w]
            return out.mean(dim=(2, 3))
        return out[:, 0] if self.pooling == "cls" else torch.cat([out[:, 0], out[:, self.before :].mean(dim=1)], dim=1)


def _from_folder(name, folder):
    config, own = _json(folder / "config.json"), pathology_encoders.known(name) | _json(folder / "histokit.json")
    pooling = own.get("pooling", "cls")
    if pooling not in ("cls", "cls+mean"):
        raise ValueError(f"{folder / 'histokit.json'}: pooling is {pooling!r}; expected cls or cls+mean")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"encoder {name!r}: {folder} has no model.safetensors; {PICKLED}")
    if "architecture" in config:  # timm's layout
        import timm

        arguments = _arguments(config, own.get("arguments", {}), folder)
        try:
            net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **arguments)
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            why = f"the weights in {folder} do not fit what its config.json says ({str(error).splitlines()[0]})"
            raise ValueError(f"encoder {name!r}: {why}; {BY_CARD}") from error
        encoder = _described_by_timm(name, net, weights)
        encoder.identity |= {"arguments": own["arguments"]} if own.get("arguments") else {}
        if "pooling" in own and (before := getattr(encoder.net, "num_prefix_tokens", 0)):
            encoder.net = _Pooled(encoder.net, pooling, before, lambda model, x: model.forward_features(x))
            encoder.pooling, encoder.dim = pooling, encoder.dim * (2 if pooling == "cls+mean" else 1)
    else:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        picture = _json(folder / "preprocessor_config.json")
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        dim = (config.get("hidden_size") or config["hidden_sizes"][-1]) * (2 if pooling == "cls+mean" else 1)
        mean, std = tuple(picture.get("image_mean", IMAGENET["mean"])), tuple(picture.get("image_std", IMAGENET["std"]))
        size = picture.get("crop_size") or picture.get("size") or config.get("image_size", 224)
        size = size.get("height") or size.get("shortest_edge") if isinstance(size, dict) else size
        registers = config.get("num_register_tokens") or 0
        identity = {"weights": files.sha256(weights)[:16]} | ({"registers": registers} if registers and pooling == "cls+mean" else {})
        encoder = Encoder(name, _Pooled(model, pooling, 1 + registers), dim, identity, int(size), mean, std, pooling)
    for key in ("size", "mean", "std", "licence"):
        if key in own:
            setattr(encoder, key, tuple(own[key]) if isinstance(own[key], list) else own[key])
    encoder.licence = encoder.licence or "unknown; write it as `licence` into histokit.json beside the weights"
    return encoder


def _arguments(config, given, folder):
    """Keyword arguments for timm: those given, where config.json has none of that name; layers by their names."""
    import timm.layers

    out, held = {}, config.get("model_args") or {}
    for key, value in ((key, value) for key, value in given.items() if key not in held):
        if key.endswith("_layer"):
            out[key] = getattr(timm.layers, str(value), None) or getattr(nn, str(value), None)
            if out[key] is None:
                raise ValueError(f"{folder / 'histokit.json'}: {key} is {value!r}, which is no layer of timm or torch.nn")
        else:
            out[key] = value
    return out


def _json(path):
    return files.read_json(path) if path.is_file() else {}


def _weights_file(name, weights):
    for path in (Path(weights).expanduser(), files.root() / weights):
        if path.is_file() and path.suffix == ".safetensors":
            return path
    if weights:
        raise FileNotFoundError(f"encoder {name!r}: no .safetensors file at {files.root() / weights}; put it there ({PICKLED})")
    return None


def _fill(net, state, path):
    wanted = net.state_dict()
    missing = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if missing:
        raise ValueError(f"{path} does not fit: {len(missing)} of {len(wanted)} tensors missing or of another shape, first {missing[0]!r}")
    net.load_state_dict({key: state[key].to(value.dtype) for key, value in wanted.items()})


def _locate(name):
    for folder in (Path(name).expanduser(), files.root() / name):
        if (folder / "config.json").is_file():
            return folder
    looks_local = Path(name).is_absolute() or name.startswith((".", "~")) or (files.root() / name.partition("/")[0]).is_dir()
    if looks_local or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(
            f"encoder {name!r} is not there or of no known kind; expected {KINDS}; a folder is looked for at {files.root() / name}"
        )
    import huggingface_hub as hub

    wanted = ["config.json", "preprocessor_config.json", "model.safetensors"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted))  # falls back to its own cache when offline
    except Exception as error:
        where = f"put {', '.join(wanted)} at {files.root() / name}"
        raise FileNotFoundError(f"encoder {name!r} is no folder, and the hub gave none ({type(error).__name__}); {where}") from error
