"""Teaches a denoiser to draw a layout in a style, from annotated tiles and other tiles of their slides.

Style-Extracting Diffusion Models, Öttl et al. (2024), arXiv:2403.14429. Only annotated training tiles are learned from; slides without a
mask come in when tiles are made (`generate.style_layout`). Every part learns, the style encoder with them: in the released code it
never did, and `learn_style: False` is there to see what that costs.
"""

from dataclasses import asdict, dataclass

import torch

from histokit.core import files
from histokit.diffusion import backbone, conditioning, latents, losses, style_encoders, style_sampling
from histokit.tiles import augment, data, masks, staining
from histokit.training import finetuning, loop, settings

VERSION = 1
FIRST = 256  # slides or patients whose styles are looked at before the first update
FROM_BASE = "base_model"  # network that goes on from the base's own UNet


@dataclass(frozen=True)
class Preset:
    """Sizes of a UNet of its own.

    Args:
        widths: channels a level, finest first; every level but the last halves the map.
        blocks: residual blocks a level, one more on the way up.
        head_width: channels of a head of the one attention there is, in the middle.
        groups: of the normalisation.
        dim: of the style vector.
        betas: first and last noise variance of 1,000 steps, linear in their square roots.
        prediction: of the network, `v_prediction` on a schedule that ends in noise alone, or `epsilon`, as published: there a first step
            from the noisiest level divides the error of a young network by 0.01, and images stay noise.
    """

    widths: tuple
    blocks: int = 2
    head_width: int = 128
    groups: int = 32
    dim: int = 512
    betas: tuple = (0.0015, 0.0205)
    prediction: str = "v_prediction"


PRESETS = {
    "reference": Preset((128, 512, 1024), prediction="epsilon"),
    "base": Preset((128, 256, 512)),
    "tiny": Preset((32, 64, 64), blocks=1, head_width=32, groups=16, dim=64),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is turned in this training, beside those of `settings.Loop`.

    Args:
        network: base_model goes on from the base's UNet; a name of `PRESETS` begins with random weights.
        steps, batch_size: optimiser updates, and tiles an update.
        lr: of what the base brought, and of all where nothing was brought.
        lr_new: of mapper, style encoder and style block.
        injection, encoder, aggregation: of the style, see `conditioning` and `style_encoders`. Published is `bottleneck`; with 85 tiles of
            eight cases and 300 updates it passed no colour at all, where `time` did.
        learn_style: False keeps the style encoder as it was drawn, as the released code did.
        style_drop: share of styles left out while learning, so that the style can be weighed.
        layout_drop: the same for layouts; 0 never leaves one out.
        loss: l2 or l1 of the denoising error.
        balance: `class` draws tiles of every class alike, `none` every tile.
        restained: copies of each annotated tile in the stain of other training cases (Macenko), learned under the style of those cases,
            which nobody need have annotated; a few annotated cases have a few looks, and what a look is cannot be learned from them.
            0 learns from annotated slides alone, as published.
        noise_offset: deviation of a constant that is added to the noise of each latent channel. Plain noise has hardly a mean, so that the
            mean of a noisy latent tells the colour of the picture until almost nothing else is left of it; then nobody needs a style.
            0 is plain noise, as published.
    """

    network: str = FROM_BASE
    steps: int = 1000
    batch_size: int = 8
    lr: float = 1e-4
    lr_new: float = 2e-3
    injection: str = "time"
    encoder: str = "tiny_cnn"
    aggregation: str = "mean"
    learn_style: bool = True
    style_drop: float = 0.25
    layout_drop: float = 0.0
    loss: str = "l2"
    balance: str = "class"
    restained: int = 2
    noise_offset: float = 0.3

    def __post_init__(self):
        if self.network != FROM_BASE and self.network not in PRESETS:
            raise ValueError(f"network {self.network!r} is unknown; use {FROM_BASE}, {', '.join(PRESETS)}")
        if self.loss not in ("l1", "l2"):
            raise ValueError(f"loss is {self.loss!r}; use l2 or l1")
        if self.noise_offset < 0:
            raise ValueError(f"noise_offset is {self.noise_offset}; expected 0 or more")
        for name in ("style_drop", "layout_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share, from 0 to below 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class Asked:
    """All settings of one training, sorted: its own, those of the style pictures, those of the loop."""

    how: Settings
    sampling: style_sampling.Settings
    loop: settings.Loop
    frozen: str = ""  # encoder that takes the place of one that learns, by the name `vision.features` loads it by

    @classmethod
    def of(cls, style, options=None, spare=()):
        """From what a notebook says: `style` (dict) and `options`; ValueError for a name that none has.

        `sampling` is the kind of style sampling, `learn: false` a style encoder that stays as it was drawn, and an encoder that is none of
        `style_encoders.ENCODERS` a frozen one. What the kind makes needless is left out: without style there is no encoder, and `augmented`
        and `nearby` take one picture.

        Args:
            spare: names that `options` may hold for others.
        """
        ours = {"sampling": "kind", "learn": "learn_style"}
        given = {ours.get(name, name): value for name, value in {**(options or {}), **style}.items() if name not in spare}
        frozen = given.get("encoder", Settings.encoder)
        if frozen in style_encoders.ENCODERS and frozen != "features":
            frozen = ""
        else:
            given["encoder"] = "features"
        if given.get("kind") == "none":
            given["aggregation"], given["encoder"], frozen = "none", Settings.encoder, ""
        single = given.get("kind") in ("none", "augmented", "nearby")
        usual = {"pictures": 1} if single else {"pictures": 10, "distinct": False} if given.get("kind") == "mp" else {}
        pace = settings.pace(given.get("steps", Settings.steps))
        how, sampling, *rest = settings.apart({"ema": 0.999, **pace, **usual, **given}, Settings, style_sampling.Settings, *settings.PARTS)
        return cls(how, sampling, settings.Loop(*rest), frozen)


def fresh(how, style, model, layers, features=None, seed=0):
    """A StyleLayout to train, and what of it the base brought: {"copied", "widened", "new"}.

    Args:
        how, style: Settings and style_sampling.Settings.
        model: backbone.Model; its latents are learned in.
        layers: names of the layout's layers.
        features: vision encoder (`identity`, `dim`) of style encoder `features`.
    """
    common = {
        "layers": tuple(layers), "injection": how.injection, "encoder": how.encoder, "aggregation": how.aggregation,
        "pictures": style.pictures, "style_px": style.px, "layout_drop": how.layout_drop,
        "encoder_name": features.identity if features else "", "encoder_width": features.dim if features else 0,
    }  # fmt: skip
    if how.network == FROM_BASE:
        config = conditioning.Config(**common, dim=128, **conditioning.of_base(model.need("vae", "unet", "scheduler")))
        return conditioning.started(model, config, seed)
    preset, px = PRESETS[how.network], model.latent_px
    if px % 2 ** (len(preset.widths) - 1):
        raise ValueError(f"network {how.network} halves latents {len(preset.widths) - 1} times, and {px} px do not take that; use tiny")
    own = {"dim": preset.dim, "latent_space": conditioning.space_of(model), "scheduler": noise(preset), "unet": shape(preset, model)}
    found = conditioning.begun(conditioning.Config(**common, **own), seed)
    return found, {"copied": [], "widened": [], "new": list(found.state_dict())}


def shape(preset, model):
    """`unet` of a Config: the plain UNet of a preset for the latents of a base, with a mapped layout of three channels beside them."""
    channels = model.vae.config.latent_channels
    levels = len(preset.widths)
    return {
        "kind": "UNet2DModel", "sample_size": model.latent_px, "in_channels": channels + 3, "out_channels": channels,
        "block_out_channels": list(preset.widths), "down_block_types": ["DownBlock2D"] * levels, "up_block_types": ["UpBlock2D"] * levels,
        "layers_per_block": preset.blocks, "attention_head_dim": preset.head_width, "norm_num_groups": preset.groups,
    }  # fmt: skip


def noise(preset):
    """Diffusers config of the noise of a preset; sampling starts at its last step and ends in a clean latent."""
    first, last = preset.betas
    return {
        "num_train_timesteps": 1000, "beta_start": first, "beta_end": last, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": True, "timestep_spacing": "trailing", "prediction_type": preset.prediction, "steps_offset": 0,
        "rescale_betas_zero_snr": preset.prediction == "v_prediction",
    }  # fmt: skip


def annotated(tiles):
    """Real training tiles with a mask that may be used; ValueError where there are none."""
    found = masks.annotated(tiles, "train")
    if not len(found):
        raise ValueError("no training tile has a mask: say in the description which (`mask`), and what it shows (`layers`)")
    return found


class Layouts:
    """Layouts [N, K, h, w] of tiles at the size of their latents, in step with `latents.Latents`."""

    def __init__(self, tiles, layers, px, tile_px, places=None):
        """places: of which tile each layout is, for tiles that come more than once."""
        parts = (masks.pixels(tiles.iloc[i : i + 64], layers, tile_px) for i in range(0, len(tiles), 64))
        layout = torch.cat([masks.coarser(masks.one_hot(ids, len(layers)), px) for ids in parts])
        self.layout = layout if places is None else layout[places]

    def batch(self, rows, ks):
        """[B, K, h, w] of rows, each in the symmetry of the latents of the same number."""
        return torch.stack([augment.symmetry(self.layout[i], augment.TURN_FIRST[k]) for i, k in zip(rows, ks, strict=True)])


def batches(cache, layouts, pool, tiles, cases, how, seed):
    """`batches(k)` for `loop.fit`: {"latents", "layout", "style"} of the same tiles in the same symmetries, styles drawn anew.

    Args:
        tiles: rows to learn from, in the order of `cache` and `layouts`.
        cases: of each the case whose stain it wears, "" for its own, see `staining.restained`.
    """
    often, parts = finetuning.weights(tiles, how.balance), finetuning.strata(tiles[["label"]])
    names = tiles["tile_id"].tolist()

    def batch(k):
        generator = torch.Generator().manual_seed(files.seed(seed, "batch", k))
        rows = finetuning.draw(often, how.batch_size, generator, parts if how.balance == "class" else None).tolist()
        ks = torch.randint(cache.symmetries, (len(rows),), generator=generator)
        mean, logvar = cache.batch(rows, ks)
        z = backbone.latents(mean, logvar, cache.model.scaling, generator)
        drawn = [pool.of_case(cases[i], generator) if cases[i] else pool.beside(names[i], generator) for i in rows]
        style = pool.style(drawn, generator)
        return {"latents": z, "layout": layouts.batch(rows, ks.tolist()), "style": style}

    return batch


def loss(found, scheduler, how):
    """`loss(batch, step, generator)`: the denoising error under layout and style, each left out as often as `how` says."""
    draw = losses.timestep_draw(scheduler, "structure" if scheduler.config.prediction_type == "v_prediction" else "uniform")

    def of(batch, step, generator):
        z = batch["latents"]
        gone = torch.rand(len(z), generator=generator) < how.style_drop
        bare = torch.rand(len(z), generator=generator) < how.layout_drop
        drawn = draw(len(z), generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator)
        noise = (noise + how.noise_offset * torch.randn(*z.shape[:2], 1, 1, generator=generator)).to(z.device)
        layout = torch.where(bare[:, None, None, None], 0.0, batch["layout"]).to(z.device)
        asked = (layout, batch["style"].to(z.device), gone.to(z.device))
        return _error(found, scheduler, z, drawn, noise, asked, how.loss).mean()

    return of


def _error(found, scheduler, z, timesteps, noise, asked, kind):
    def predict(noisy, t, layout, style, gone):
        return found(noisy, t, layout, found.of_style(style, gone))

    return losses.conditional_errors(predict, scheduler, z, timesteps, noise, asked, found.parameters(), kind)


def validation(found, scheduler, cache, layouts, pool, names, how, seed, *, draws=settings.HELD_OUT_DRAWS, batch_size=8):
    """`validate()` -> denoising error of held-out tiles, given layout and style of their slide, at fixed noise; lower is better."""
    rows = [i % len(cache) for i in range(max(draws, len(cache)))]
    mean, _ = cache.batch(rows, [0] * len(rows))
    z, layout = mean * cache.model.scaling, layouts.batch(rows, [0] * len(rows))
    generator = torch.Generator().manual_seed(files.seed(seed, "styles held out"))
    style = pool.style([pool.beside(names[i], generator) for i in rows], generator)
    timesteps, noise = losses.fixed_noise(len(rows), z.shape[1:], scheduler, seed)
    noise = noise + how.noise_offset * torch.randn(*z.shape[:2], 1, 1, generator=generator)
    timesteps = timesteps[torch.randperm(len(rows), generator=torch.Generator().manual_seed(files.seed(seed, "levels")))]

    def validate():
        total = 0.0
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            here = [x[part].to(cache.model.device) for x in (z, timesteps, noise, layout, style)]
            gone = torch.zeros(len(here[0]), dtype=torch.bool, device=cache.model.device)
            total += float(_error(found, scheduler, *here[:3], (*here[3:], gone), how.loss).sum())
        return total / len(rows)

    return validate


def fit(model, tiles, layers, asked, *, features=None, seed=0, folder=None, sheet=None):
    """Train on annotated tiles; returns (StyleLayout, history of `loop.fit`, what the base brought).

    Args:
        model: backbone.Model.
        tiles: manifest; training tiles with a mask are learned from, validation tiles with one choose the step.
        layers: masks.Layers.
        asked: see `Asked.of`.
        features: `features(rows)` -> [N, D] with `identity` and `dim`, for a frozen style encoder.
        folder: where checkpoints go.
        sheet: `sheet(StyleLayout)` -> `sheet(step)` for `loop.fit`, or None.
    """
    how, style = asked.how, asked.sampling
    learn, held = annotated(tiles), masks.annotated(tiles, "val")
    if how.encoder == "features" and features is None:
        raise ValueError("a frozen style encoder was asked for, and none is given")
    found, brought = fresh(how, style, model, layers.names, features, seed)
    found.to(model.device)
    if not how.learn_style:
        found.freeze_style()
    scheduler = found.scheduler
    pool = style_sampling.Pool(data.learnable(tiles), style, features)
    g = torch.Generator().manual_seed(files.seed(seed, "first styles"))
    found.style.settle(pool.style([pool.of(home, g) for home in pool.homes[:FIRST]], g).to(model.device))
    copies = how.restained if style.kind in ("random", "mp") else 0
    rows, places, cases = staining.restained(learn, pool.tiles, copies, seed, "style and layout", cases=pool.cases)
    cache, layouts = latents.Latents(model, rows), Layouts(learn, layers, model.latent_px, model.tile_px, places)
    validate = None
    if len(held):
        of_val = tiles[tiles["split"].eq("val") & tiles["source"].eq("real")]
        own = latents.Latents(model, held, symmetries=1)
        validate = validation(
            found, scheduler, own, Layouts(held, layers, model.latent_px, model.tile_px), style_sampling.Pool(of_val, style, features),
            held["tile_id"].tolist(), how, seed,
        )  # fmt: skip
    known = {"base": model.identity, "tiles": files.digest([[row.tile_id, row.sha256] for row in rows.itertuples()])}
    known |= {"styles": style_sampling.digest(pool), "masks": files.digest(layouts.layout.sum((2, 3)).tolist()), **asdict(how)}
    groups = found.groups(how.lr, how.lr_new if how.network == FROM_BASE else how.lr)
    player = loop.Player("style_layout", groups, loss(found, scheduler, how))
    history = loop.Training(
        [player], batches(cache, layouts, pool, rows, cases, how, seed), how.steps, seed, asked.loop, folder,
        identity=known, autocast=model.arithmetic, validate=validate, sheet=sheet(found) if sheet else None,
    ).run()  # fmt: skip
    return found.eval(), history, brought


def facts(asked, history):
    """What `StyleLayout.save` is told: how style pictures are drawn, the frozen encoder, the step that was taken."""
    return {"sampling": asdict(asked.sampling), "encoder": asked.frozen, "steps": int(history.attrs["step"])}


def remarks(learn, held, found, how, brought):
    """Plain sentences on a training that is done or about to begin."""
    said = [f"Learned from {len(learn):,} annotated tiles of {learn['case_id'].nunique():,} cases."]
    if not len(held):
        said.append("No validation tile has a mask, so the last step is taken.")
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in (("UNet", found.unet), ("style", found.style))}
    learns = "" if how.learn_style else ", which keeps its first weights"
    said.append(f"UNet {count['UNet']:.1f} M parameters, style encoder {count['style']:.2f} M{learns}.")
    if brought["copied"]:
        said.append(f"{len(brought['copied'])} tensors of the base were taken over, its first convolution was widened.")
    return said
