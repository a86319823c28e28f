"""The three parts of 20_pretrain: an autoencoder, a diffusion model on its latents, an encoder.

Each builds a `Task`: what `loop.fit` needs, what to draw, and how to save the result as `backbone.load` or
`features.load` reads it. Networks and losses are in `ldm`, pictures and words in `corpus`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from histokit.core import files, machine
from histokit.diffusion import backbone, losses, pretrained, sampling
from histokit.metrics import distributions
from histokit.runs import places
from histokit.tiles.contamination import LIST
from histokit.training import ldm, loop, representation
from histokit.vision import encoders

VERSION = 1
GUIDANCE = 4.0  # KID x 1000 of 96 samples of mini at 1, 2, 4: 158, 124, 127 in mini-ssl, 323, 204, 174 in mini-sup; crypts appear at 4
WORDS = (  # so that a class no one has trained on still has words of its own; SD's vocabulary would have them
    "adenoma adenocarcinoma carcinoma tumour tumor cancer metastasis neoplasia dysplasia polyp serrated hyperplastic tubular villous "
    "mucinous cribriform papillary solid normal mucosa colon colorectal rectum stomach breast lung prostate liver kidney skin lymph node "
    "tissue histology microscopy stain haematoxylin hematoxylin eosin nucleus nuclei gland glands crypt crypts lumen lumina stroma "
    "epithelium fibres muscle fat mucin necrosis debris blood vessel inflammation lymphocytes plasma cells goblet grade low high mild "
    "severe pale dark pink purple blue large small round oval many few dense loose light skin centre scanner group"
)


@dataclass
class Task:
    """What `loop.fit` needs for one part; `finish()` writes the result and returns its numbers."""

    player: loop.Player
    batches: Callable
    validate: Callable | None
    sheet: Callable | None
    finish: Callable
    settings: dict = field(default_factory=dict)


def task(part, run, seen, held, *, tile_px, widths, batch_size, lr, objective="", autoencoder=None, init=None, pieces=0, device="cpu"):
    """The Task of a part: `autoencoder`, `diffusion` or `encoder` (with an `objective`).

    Args:
        run: gives seed and folder.
        seen: corpus.Corpus to train on; `held`: one of held-out tiles, to validate on.
        widths: channels per level, finest first; of an encoder: [feature width]; not looked at where there is an `init`.
        autoencoder: folder of the base whose latents, centred, a diffusion model learns; None takes those of `init` as they are.
        init: folder of the base that an autoencoder or a diffusion model goes on from; None starts from random weights.
        pieces: first updates of an autoencoder that see quarters of the views, see `ldm.picture_batches`.
    """
    options = {"tile_px": tile_px, "batch_size": batch_size, "lr": lr, "device": device}
    if pieces and part != "autoencoder":
        raise ValueError(f"`pieces` is for an autoencoder, which has no layout to learn; part {part} sees whole views, leave it 0")
    if part == "autoencoder":
        return _autoencoder(run, seen, held, widths=widths, init=init, pieces=pieces, **options)
    if part == "diffusion":
        return _diffusion(run, seen, held, widths=widths, autoencoder=autoencoder, init=init, **options)
    if part == "encoder":
        if init:
            raise ValueError("an encoder starts from random weights; leave `init` empty")
        return _encoder(run, seen, held, objective=objective, dim=widths[0], **options)
    raise ValueError(f"part {part!r} is unknown; use autoencoder, diffusion or encoder")


def origin(run, name):
    """Folder of the finished step `name`, else of the base of that name; None where there is no name."""
    if not name:
        return None
    a_step = Path(name).name == name and places.find(run.experiment, name, "")
    return run.parent(name) if a_step else pretrained.locate(name)


def learned(corpus, *origins):
    """The list for trained_on.csv: this corpus, and what the bases it goes on from (folders, None left out) have seen before."""
    before = [files.read_table(folder / LIST) for folder in origins if folder and (folder / LIST).is_file()]
    return pd.concat([corpus.table(), *before], ignore_index=True).drop_duplicates("pixels_sha256", ignore_index=True)


def _on(device, module):
    """The module on the device; bfloat16 convolutions are faster channels-last, the float32 ones of the autoencoder slower."""
    return module.to(device, memory_format=torch.channels_last if machine.bfloat16(device) else torch.contiguous_format)


def _save(module, folder):
    """Half-precision weights and settings as `backbone.load` reads them, without the path a part was loaded from."""
    module.half().save_pretrained(folder, variant="fp16")
    module.float()
    settings = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {key: value for key, value in settings.items() if key != "_name_or_path"})


def whole_tiles(corpus, tile_px, limit):
    """Up to `limit` evenly spread pictures [N, 3, px, px] in [-1, 1], whole and upright, and their indices."""
    rows = np.unique(np.linspace(0, len(corpus.images) - 1, min(limit, len(corpus.images))).astype(int))
    upright = np.random.default_rng(0)
    views = [ldm.view(corpus.images[i], tile_px, upright, least=1, turn=False) for i in rows]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 127.5 - 1, rows


def tiled(images, columns):
    """Images [N, 3, H, W] in [-1, 1] as one uint8 picture of `columns` columns; the last row is filled with white."""
    count = -(-len(images) // columns) * columns
    images = torch.cat([images, torch.ones(count - len(images), *images.shape[1:])])
    rows = [torch.cat(list(images[i : i + columns]), dim=-1) for i in range(0, count, columns)]
    return ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------- autoencoder


def _autoencoder(run, seen, held, *, tile_px, widths, batch_size, lr, device, init, pieces):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(run.seed, "autoencoder"))
        vae = backbone.load(str(init)).vae.requires_grad_(True).train() if init else ldm.autoencoder(widths, tile_px=tile_px)
    vae = _on(device, vae)
    seed = files.seed(run.seed, "init") if init else run.seed  # other views than those it began with
    images, _ = whole_tiles(held, tile_px, 112)

    def finish():
        vae.eval().requires_grad_(False)
        everything, _ = whole_tiles(held, tile_px, 10_000)
        train, _ = whole_tiles(seen, tile_px, 512)
        vae.register_to_config(scaling_factor=round(ldm.measure_scaling(vae, train.to(device)), 5))
        _save(vae, run.path("vae"))
        psnr = ldm.psnr(ldm.reconstruct(vae, everything.to(device)).cpu(), everything)
        return {"psnr_db": float(psnr.mean()), "psnr_tiles": len(psnr), "scaling_factor": vae.config.scaling_factor}

    return Task(
        player=ldm.autoencoder_player(vae, lr),
        batches=ldm.picture_batches(seen.images, seen.weights, tile_px, batch_size, seed, device, pieces),
        validate=lambda: -ldm.psnr(ldm.reconstruct(vae, images.to(device)).cpu(), images).mean(),
        sheet=lambda step: tiled(torch.cat([images[::14], ldm.reconstruct(vae, images[::14].to(device)).cpu()]), len(images[::14])),
        finish=finish,
        settings={"autocast": machine.bfloat16(device), "ema": 0.995, "weight_decay": 1e-4, "schedule": "one_cycle"},
    )


# ---------------------------------------------------------------------------------------------- diffusion


def _diffusion(run, seen, held, *, tile_px, widths, batch_size, lr, device, autoencoder, init):
    if not (autoencoder or init):
        raise ValueError("part diffusion works on an autoencoder's latents; name a step or a base that has one in `autoencoder`")
    model = backbone.load(str(autoencoder or init), device).need("vae")
    model.tile_px = tile_px
    mean, logvar, source = _views(run, model, seen, tile_px)
    if autoencoder:
        mean, logvar = ldm.centre(model.vae, mean, logvar)
    if init:
        base = backbone.load(str(init), device).need("unet", "text_encoder", "tokenizer")
        model.unet, model.text_encoder = (part.requires_grad_(True).train() for part in (base.unet, base.text_encoder))
        model.tokenizer, model.scheduler = base.tokenizer, base.scheduler
        model.tokenizer.save_pretrained(run.path("tokenizer"))
    else:
        model.tokenizer = ldm.tokenizer([*seen.texts(), *WORDS.split()], run.path("tokenizer"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(files.seed(run.seed, "diffusion"))
            model.text_encoder = ldm.text_encoder(len(model.tokenizer), model.tokenizer.eos_token_id).to(device)
            model.unet = ldm.unet(widths, context=model.text_encoder.config.hidden_size, latent_px=tile_px // model.factor)
        model.scheduler = ldm.schedule()
    _on(device, model.unet)
    if model.device.type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        model.unet.set_attn_processor(AttnProcessor())  # plain attention: the fused one is slower there in bfloat16
    images, rows = whole_tiles(held, tile_px, 64)
    held_latents = torch.cat([backbone.encode(model, x)[0] for x in images.split(16)]) * model.scaling
    held_captions = [held.captions[i][-1] for i in rows]
    seed = files.seed(run.seed, "init") if init else run.seed  # other batches than those it began with
    timesteps, noise = (t.to(device) for t in losses.fixed_noise(len(images), held_latents.shape[1:], model.scheduler, run.seed))
    prompts = list({label: captions[0] for label, captions in zip(seen.labels, seen.captions, strict=True) if label}.values())

    def validate():
        return losses.diffusion_loss(
            model.unet, model.scheduler, held_latents, backbone.embed(model, held_captions), timesteps, noise, min_snr_gamma=0
        )

    def sheet(step):
        return _sample_sheet(model, prompts[:11], 2, run.seed)

    def finish():
        for name in ("unet", "text_encoder"):
            _save(getattr(model, name).eval().requires_grad_(False), run.path(name))
        model.scheduler.save_pretrained(run.path("scheduler"))
        if autoencoder:
            _save(model.vae, run.path("vae"))
        for path in () if autoencoder else (init / "vae").iterdir():
            files.link(path, run.path("vae", path.name))
        return {"vocabulary": len(model.tokenizer), "unet_parameters": sum(p.numel() for p in model.unet.parameters())}

    return Task(
        player=ldm.diffusion_player(model, lr),
        batches=ldm.caption_batches(mean, logvar, source, seen.captions, seen.weights, model.scaling, batch_size, seed),
        validate=validate,
        sheet=sheet,
        finish=finish,
        settings={"autocast": machine.bfloat16(device), "ema": 0.999, "weight_decay": 1e-2, "schedule": "one_cycle"},
    )


def _views(run, model, seen, tile_px, per_tile=8):
    """Latents of random views, encoded once and kept in the run folder: `per_tile` of a real tile, one of a drawn picture."""
    path = run.path("views.safetensors")
    if not path.exists():
        copies = [per_tile if name.endswith(".yaml") else 1 for name, *_ in seen.seen]
        mean, logvar, source = ldm.view_latents(model.vae, seen.images, copies, tile_px, run.seed, least=0.75, device=model.device)
        files.write_tensors(path, {"mean": mean, "logvar": logvar, "source": torch.from_numpy(source)})
    held = files.read_tensors(path)
    return held["mean"], held["logvar"], held["source"].numpy()


def _sample_sheet(model, prompts, per_prompt, seed):
    """One column a prompt, `per_prompt` images each at fixed seeds."""
    images = sample(model, [p for _ in range(per_prompt) for p in prompts], seed)
    return tiled(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, len(prompts))


def sample(model, prompts, seed):
    """One image uint8 [N, H, W, 3] a prompt from pure noise at fixed seeds, by the sampler of every later notebook."""
    generators = [torch.Generator().manual_seed(files.seed(seed, "sample", i)) for i in range(len(prompts))]
    return sampling.sample(model, prompts, generators, guidance_scale=GUIDANCE, num_inference_steps=20)


def fidelity(folder, held, count, seed=0, device="cpu", spaces=("colour-texture", "mini-ssl")):
    """How far `count` samples are from held-out tiles, beside what the autoencoder alone loses and what an untrained UNet draws.

    KID x 1000 in each of `spaces`, at guidance `GUIDANCE`, prompts as often as held-out labels. Colour-texture is not learned and sees
    the slightest blur, so the autoencoder bounds it from below; of layout it sees nothing: noise, decoded, is grain of about the right
    stain and was nearer to real tiles (37) than they to their own round trip (114). mini-ssl sees content.

    Returns:
        Dict of samples, psnr_db and psnr_tiles (round trip of the held-out tiles), and `kid`: space -> samples, autoencoder (held-out
        tiles after their round trip), untrained (100 samples), floor (real tiles of other cases), n tiles a side, and nearer: how many
        times nearer to the floor the samples are than those of the untrained UNet; a sample below the floor counts as on it.
    """
    model = backbone.load(str(folder), device)
    rng = np.random.default_rng(files.seed(seed, "fidelity"))
    prompts = [held.captions[i][0] for i in rng.choice(len(held.images), count)]
    real, _ = whole_tiles(held, model.tile_px, 10_000)
    again = ldm.reconstruct(model.vae, real.to(device)).cpu()
    drawn = {"samples": sample(model, prompts, seed), "autoencoder": _pixels(again)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(seed, "untrained"))
        model.unet = type(model.unet).from_config(model.unet.config).to(device).eval()
    drawn["untrained"] = sample(model, prompts[:100], seed)  # so far off that more would say the same
    psnr = ldm.psnr(again, real)
    facts = {"samples": count, "psnr_db": float(psnr.mean()), "psnr_tiles": len(psnr), "kid": {}}
    for space in spaces:
        encoder = encoders.load(space, device)
        of_real = encoder(_pixels(real)).numpy()
        found = {}
        for name, images in drawn.items():
            kid, floor, n = distributions.kid_beside_floor(of_real, encoder(images).numpy(), held.cases)
            found |= {name: float(1000 * kid.mean())} | ({"floor": float(1000 * floor.mean()), "n": n} if name == "samples" else {})
        excess = max(found["samples"] - found["floor"], 0.0)
        facts["kid"][space] = found | {"nearer": (found["untrained"] - found["floor"]) / excess if excess else float("inf")}
    return facts


def _pixels(images):
    """Images [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3]."""
    return ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()


def updates(origin, part):
    """Optimiser updates that the `part` of a base or a finished run in folder `origin` has had; 0 where nothing says so."""
    if origin is None:
        return 0
    if (origin / "mini.json").exists():
        return files.read_json(origin / "mini.json").get(part, {}).get("updates", 0)
    return files.read_json(origin / "results.json").get("updates", 0) if (origin / "results.json").exists() else 0


# ---------------------------------------------------------------------------------------------- encoder


def _encoder(run, seen, held, *, objective, tile_px, dim, batch_size, lr, device):
    labels, names = None, []
    if objective not in ("contrastive", "supervised"):
        raise ValueError(f"objective {objective!r} is unknown; an encoder is trained contrastive or supervised")
    if objective == "supervised":
        seen = _labelled(seen)
        names = sorted(set(seen.labels))
        labels = [names.index(label) for label in seen.labels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(run.seed, "encoder", objective))
        encoder = encoders.SmallCNN(dim).to(device)
        head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 64)) if not names else nn.Linear(dim, len(names))
        head.to(device)
    images, rows = whole_tiles(held, tile_px, 10_000)
    player = representation.supervised_player(encoder, head, lr) if names else representation.contrastive_player(encoder, head, lr)

    def finish():
        encoder.eval()
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in encoder.state_dict().items()}
        name = "sup" if names else "ssl"
        files.write_tensors(run.path(f"{name}.safetensors"), state, {"objective": objective, "dim": str(dim), "size": str(tile_px)})
        with torch.no_grad():
            z = nn.functional.normalize(torch.cat([encoder(x.to(device)) for x in images.split(32)]), dim=-1)
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(-1).cpu().numpy()
        kinds = np.array([held.labels[i] for i in rows])
        return {"nearest_neighbour_agreement": float((kinds[nearest] == kinds).mean()), "held_out_tiles": len(kinds), "classes": names}

    return Task(
        player=player,
        batches=representation.view_pairs(seen.images, seen.weights, tile_px, batch_size, run.seed, labels, device),
        validate=None,
        sheet=None,
        finish=finish,
        settings={"autocast": machine.bfloat16(device), "weight_decay": 1e-2 if names else 1e-4, "schedule": "one_cycle"},
    )


def _labelled(corpus):
    """The part of a corpus that has labels, its weights summing to 1 again."""
    keep = [i for i, label in enumerate(corpus.labels) if label]
    part = replace(corpus, **{f.name: [getattr(corpus, f.name)[i] for i in keep] for f in fields(corpus)})
    part.weights = list(np.array(part.weights) / np.sum(part.weights))
    return part
