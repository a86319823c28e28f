"""Classifiers of noisy latents: what can steer a diffusion model that never saw a label.

The encoder half of a diffusion UNet with attention pooling, which hears the timestep in every block; Dhariwal & Nichol (2021),
arXiv:2105.05233, section 4.1, on latents. Normalised by group, so that no image depends on its batch. Nothing here trains or samples.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from histokit.core import files

VERSION = 1

# `paper`: HistoDiffusion (arXiv:2308.04020) on latents [3, 64, 64]; `base`: of SD 1.x and 2.x; `mini`: a quarter of its UNet's time
PRESETS = {
    "paper": {"widths": (128, 128, 256, 256, 512, 512), "blocks": 2, "attention_px": (8, 4), "head_width": 64, "groups": 32},
    "base": {"widths": (128, 256, 256, 512), "blocks": 2, "attention_px": (16, 8), "head_width": 64, "groups": 32},
    "mini": {"widths": (32, 64, 96, 128), "blocks": 1, "attention_px": (4,), "head_width": 32, "groups": 8},
}


class LatentClassifier(nn.Module):
    """Logits of latents [B, C, h, w] at timesteps [B].

    `facts` is what model.json holds: classes, shape and settings of the network, and what the caller adds.

    Args:
        classes: class names, in the order of the logits.
        channels, latent_px: of the latents.
        widths: channels a level, finest first; each level but the last halves the map.
        blocks: residual blocks a level.
        attention_px: sides of the maps at which every block is followed by self-attention, as the middle always is.
        head_width: channels of an attention head.
        groups: of the normalisation; they divide every width.
    """

    def __init__(self, classes, channels, latent_px, *, widths, blocks=2, attention_px=(8, 4), head_width=64, groups=32):
        super().__init__()
        if latent_px % 2 ** (len(widths) - 1):
            raise ValueError(
                f"{len(widths)} widths halve latents of {latent_px} px {len(widths) - 1} times, which does not come out even; take a "
                f"network of fewer levels ({', '.join(PRESETS)}), or tiles whose side is a power of two"
            )
        network = {"widths": list(widths), "blocks": blocks, "attention_px": list(attention_px), "head_width": head_width, "groups": groups}
        self.facts = {"classes": list(classes), "channels": channels, "latent_px": latent_px, "network": network}
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        hears, px, width = 4 * widths[0], latent_px, widths[0]
        self.wave = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(widths[0], hears)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.body = nn.ModuleList()
        for level, wide in enumerate(widths):
            for _ in range(blocks):
                self.body.append(_residual(width, wide, hears, groups))
                width = wide
                if px in attention_px:
                    self.body.append(_attention(width, head_width, groups))
            if level < len(widths) - 1:
                self.body.append(_residual(width, width, hears, groups, down=True))
                px //= 2
        self.body += [_residual(width, width, hears, groups), _attention(width, head_width, groups), _residual(width, width, hears, groups)]
        self.norm = nn.GroupNorm(groups, width)
        self.pool = AttentionPool(px, width, head_width, len(classes))

    classes = property(lambda self: self.facts["classes"])

    def forward(self, z, t):
        """Logits float32 [B, n] of latents [B, C, h, w], scaled as the diffusion sees them, at timesteps t, [B] or a single one."""
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        hears, x = self.embedding(self.wave(t).to(z.dtype)), self.stem(z)
        for block in self.body:
            x = block(x, hears) if hasattr(block, "time_emb_proj") else block(x)
        return self.pool(F.silu(self.norm(x))).float()

    def label(self, name):
        """Label id of a class; ValueError where the classifier does not know it."""
        if name not in self.classes:
            raise ValueError(f"the latent classifier does not know the class {name!r}; expected one of {', '.join(self.classes)}")
        return self.classes.index(name)

    def save(self, folder, **facts):
        """Write model.safetensors, then model.json with `facts` added: a folder that has a model.json is whole."""
        path = Path(folder) / "model.safetensors"
        files.write_tensors(path, {key: value.contiguous() for key, value in self.state_dict().items()})
        self.facts |= facts | {"weights": files.sha256(path)[:16]}
        files.write_json(Path(folder) / "model.json", {"version": VERSION, **self.facts})


class AttentionPool(nn.Module):
    """Logits [B, n] of maps [B, C, h, w]: their mean asks every place by attention; the head of CLIP's image encoder.

    Radford et al. (2021), arXiv:2103.00020, section 2.4.
    """

    def __init__(self, px, width, head_width, out):
        super().__init__()
        self.heads = width // head_width
        self.place = nn.Parameter(torch.randn(px * px + 1, width) / width**0.5)
        self.ask, self.hold = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # [B, hw, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.place.to(x.dtype)
        q, (k, v) = self.ask(x[:, :1]), self.hold(x).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


def _residual(width, wide, hears, groups, down=False):
    """A residual block whose second normalisation is scaled and shifted by the timestep; it begins as its shortcut."""
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(
        in_channels=width, out_channels=wide, temb_channels=hears, groups=groups, eps=1e-5, time_embedding_norm="scale_shift", down=down
    )
    for parameter in block.conv2.parameters():
        nn.init.zeros_(parameter)
    return block


def _attention(width, head_width, groups):
    """Self-attention over the places of a map, added to it; it begins as nothing."""
    from diffusers.models.attention_processor import Attention

    block = Attention(width, heads=width // head_width, dim_head=head_width, norm_num_groups=groups, bias=True, residual_connection=True)
    for parameter in block.to_out[0].parameters():
        nn.init.zeros_(parameter)
    return block


SPACE = {"vae": "an autoencoder", "scaling": "a scale of the latents", "schedule": "a noise schedule", "shape": "a shape of the latents"}


def refuse_stranger(classifier, space, classes, name="the latent classifier"):
    """ValueError where a classifier learned other latents, noise or classes than it is to be asked about.

    Args:
        space: `backbone.Model.latent_space` of the model that is to be steered.
        classes: class names of the dataset.
    """
    learned = classifier.facts["space"]
    for key, what in SPACE.items():
        if files.plain(learned[key]) != files.plain(space[key]):
            raise ValueError(f"{name} learned from {what} ({learned[key]}) that is not this model's ({space[key]}); train it on this base")
    strange = [one for one in classifier.classes if one not in classes]
    if strange:
        raise ValueError(f"{name} was trained on other classes than this dataset has: {', '.join(strange)}; train it on this one")


def load(folder, device="cpu"):
    """The latent classifier saved in `folder`, frozen, in eval mode."""
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model.json: no latent classifier was finished there")
    facts = files.read_json(path)
    if "latent_px" not in facts:
        raise ValueError(f"{folder} holds no latent classifier (a {facts.get('mode', 'model')}); name a step of 21_latent_classifier")
    classifier = LatentClassifier(facts["classes"], facts["channels"], facts["latent_px"], **facts["network"])
    classifier.load_state_dict(files.read_tensors(Path(folder) / "model.safetensors", device))
    classifier.facts = facts
    return classifier.to(device).requires_grad_(False).eval()


def identity(classifier):
    """16 hex that tell one saved latent classifier from another."""
    return files.digest(*(classifier.facts[name] for name in ("weights", "classes", "network", "space")))[:16]
