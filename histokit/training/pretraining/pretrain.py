"""The parts of 20_pretrain: an autoencoder, its decoder alone, a diffusion model on its latents with words or without, an encoder.

Each builds a `Task`: what `loop.fit` needs, what to draw, and how to save the result as `backbone.load` or
`features.load` reads it. Networks and losses are in `ldm`, pictures and words in `corpus`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from histokit.core import files, machine
from histokit.diffusion import backbone, pretrained
from histokit.training import adversarial, lineage, unconditional
from histokit.training.pretraining import decoder, held_out, latent_shards, ldm, prior, representation, sample_quality
from histokit.vision import encoders

VERSION = 4
WORDS = (  # so that a class no one has trained on still has words of its own; SD's vocabulary would have them
    "adenoma adenocarcinoma carcinoma tumour tumor cancer metastasis neoplasia dysplasia polyp serrated hyperplastic tubular villous "
    "mucinous cribriform papillary solid normal mucosa colon colorectal rectum stomach breast lung prostate liver kidney skin lymph node "
    "tissue histology microscopy stain haematoxylin hematoxylin eosin nucleus nuclei gland glands crypt crypts lumen lumina stroma "
    "epithelium fibres muscle fat mucin necrosis debris blood vessel inflammation lymphocytes plasma cells goblet grade low high mild "
    "severe pale dark pink purple blue large small round oval many few dense loose light skin centre scanner group"
)


TAKES = {  # what is for some parts alone
    "autoencoder": {"init", "network", "critic", "pieces"},
    "decoder": {"init", "classifier", "pieces"},
    "diffusion": {"init", "autoencoder"},
    "prior": {"init", "autoencoder", "network", "loss"},
    "encoder": {"init", "objective"},
}


@dataclass
class Task:
    """What `loop.fit` needs for one part; `finish()` writes the result and returns its numbers."""

    players: list
    batches: Callable
    validate: Callable | None
    sheet: Callable | None
    finish: Callable
    settings: dict = field(default_factory=dict)


def task(
    part, run, seen, held, *,
    tile_px, widths, batch_size, lr, steps=0, objective="", network="", loss="l2", critic=None, distance=None, classifier="",
    autoencoder=None, init=None, pieces=0,
    latents_gb=latent_shards.BUDGET_GB, device="cpu",
):  # fmt: skip
    """The Task of a part: `autoencoder`, `decoder`, `diffusion`, `prior` or `encoder` (with an `objective`).

    Args:
        run: gives seed and folder.
        seen: corpus.Corpus to train on; `held`: one of held-out tiles, to validate on.
        widths: channels per level, finest first; of an encoder: [feature width]; not looked at where there is an `init`.
        autoencoder: folder of the base whose latents, centred, a diffusion model learns; None takes those of `init` as they are.
        init: folder of the base that an autoencoder, a decoder or a diffusion model goes on from; None starts from random weights.
        steps: planned updates, by which a prior tells how many views to encode.
        network: sizes of a prior or an autoencoder from random weights, see `unconditional.PRESETS`; `loss`: a prior's error, l1 or l2.
        critic: settings of an autoencoder's critic, see `adversarial.Settings`; empty trains it on errors alone. `distance`: perceptual.
        classifier: step of 06 with one arm that must still name a decoder's labelled pictures rightly; empty for errors alone.
        latents_gb: disk for the latents of a prior.
        pieces: first updates of an autoencoder or decoder that see quarters of the views, see `ldm.picture_batches`.
    """
    options = {"tile_px": tile_px, "batch_size": batch_size, "lr": lr, "device": device}
    given = {"objective": objective, "network": network, "critic": critic, "classifier": classifier, "pieces": pieces}
    given |= {"autoencoder": autoencoder, "init": init, "loss": loss if loss != "l2" else ""}
    for name, value in given.items():
        if value and part in TAKES and name not in TAKES[part]:
            raise ValueError(f"part {part} takes no `{name}`, it is for {' and '.join(p for p in TAKES if name in TAKES[p])}; leave it out")
    if pieces and classifier:
        raise ValueError("a classifier names whole tiles, and `pieces` shows quarters of them; leave one of the two out")
    if part == "decoder":
        return _decoder(run, seen, held, init=init, pieces=pieces, classifier=classifier, **options)
    if part == "autoencoder":
        how = {"widths": widths, "network": network, "critic": critic, "distance": distance, "steps": steps}
        return _autoencoder(run, seen, held, init=init, pieces=pieces, **how, **options)
    if part == "diffusion":
        return _diffusion(run, seen, held, widths=widths, autoencoder=autoencoder, init=init, **options)
    if part == "prior":
        how = {"network": network, "loss": loss, "steps": steps, "latents_gb": latents_gb}
        return _prior(run, seen, held, autoencoder=autoencoder, init=init, **how, **options)
    if part == "encoder":
        return _encoder(run, seen, held, objective=objective, dim=widths[0], init=init, **options)
    raise ValueError(f"part {part!r} is unknown; use {', '.join(TAKES)}")


def _on(device, module):
    """The module on the device; bfloat16 convolutions are faster channels-last, the float32 ones of the autoencoder slower."""
    return module.to(device, memory_format=torch.channels_last if machine.bfloat16(device) else torch.contiguous_format)


def _save(module, folder, half=True):
    """Weights, in half precision or as they are, and settings as `backbone.load` reads them, without the path a part was loaded from."""
    (module.half() if half else module).save_pretrained(folder, **({"variant": "fp16"} if half else {}))
    module.float()
    settings = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {key: value for key, value in settings.items() if key != "_name_or_path"})


# ---------------------------------------------------------------------------------------------- autoencoder


def _autoencoder(run, seen, held, *, tile_px, widths, network, critic, distance, steps, batch_size, lr, device, init, pieces):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(run.seed, "autoencoder"))
        fresh = unconditional.fresh_autoencoder(network, tile_px) if network else ldm.autoencoder(widths, tile_px=tile_px)
        vae = backbone.load(str(init)).vae.requires_grad_(True).train() if init else fresh
        settings = adversarial.settled(critic) if critic else None
        judge = _on(device, adversarial.PatchCritic(settings.width)) if settings else None
    vae = _on(device, vae)
    players = adversarial.players(vae, judge, lr, steps, settings, distance) if settings else [ldm.autoencoder_player(vae, lr)]

    def finish():
        train, _ = held_out.whole_tiles(seen, tile_px, latent_shards.CALIBRATION)
        vae.register_to_config(scaling_factor=round(ldm.measure_scaling(vae.eval(), train.to(device)), 5))
        return _codec(run, vae, held, tile_px) | {"scaling_factor": vae.config.scaling_factor}

    # by decibels a critic's best step would be the last before it spoke
    lost = decoder.errors if settings else lambda again, images: -ldm.psnr(again, images)
    return _round_trip(run, seen, held, vae, players, lost, finish, tile_px, batch_size, init, pieces, ema=0.995)


def _decoder(run, seen, held, *, tile_px, batch_size, lr, device, init, pieces, classifier):
    if not init:
        raise ValueError("part decoder goes on from a base whose latents stay as they are; name a step or a base in `init`")
    base = backbone.load(str(init)).need("vae")
    vae = _on(device, base.vae.train())
    half = all(torch.equal(p, p.half().float()) for p in vae.encoder.parameters())  # rounding it would be another encoder
    few = held_out.BySource(held, tile_px)
    before = _contrast(_again(vae, few), few)

    def finish():
        for name in ("tokenizer", "scheduler", "text_encoder", "unet"):  # with them the folder is a base again
            for path in (init / name).iterdir() if (init / name).is_dir() else ():
                files.link(path, run.path(name, path.name))
        facts = _codec(run, vae.eval(), held, tile_px, half) | {"contrast_before": before}
        files.write_json(run.path("vae", pretrained.FITTED), {"encoder_of": base.identity["vae"]})
        return facts

    lost = decoder.errors  # by decibels the softest step would be the best
    watching = lineage.classifier(run, classifier, device) if classifier else None
    targets = decoder.targets(seen, watching.classes) if watching else None
    players = [decoder.player(vae, lr, watching)]
    return _round_trip(run, seen, held, vae, players, lost, finish, tile_px, batch_size, init, pieces, 0.99, targets)


def _round_trip(run, seen, held, vae, players, lost, finish, tile_px, batch_size, init, pieces, ema, targets=None):
    """The Task of what is trained on a round trip of pictures, and validated by `lost(again, images)` -> [N], lower is better."""
    device = next(vae.parameters()).device
    few = held_out.BySource(held, tile_px)
    seed = files.seed(run.seed, "init") if init else run.seed  # other views than those it began with
    shown = few.images[:: max(1, len(few.images) // 8)][:8]

    def validate():
        again = _again(vae, few)
        total, of = few.mean(lost(again, few.images))
        return total, of | {f"contrast_{name}": value for name, value in _contrast(again, few).items()}

    return Task(
        players=players,
        batches=ldm.picture_batches(seen.images, seen.weights, tile_px, batch_size, seed, device, pieces, targets),
        validate=validate,
        sheet=lambda step: held_out.tiled(torch.cat([shown, ldm.reconstruct(vae, shown.to(device)).cpu()]), len(shown)),
        finish=finish,
        settings={"autocast": machine.bfloat16(device), "ema": ema, "weight_decay": 1e-4, "schedule": "one_cycle"},
    )


def _again(vae, few):
    """The pictures of `few` after their round trip, on the CPU."""
    return ldm.reconstruct(vae, few.images.to(next(vae.parameters()).device)).cpu()


def _contrast(again, few):
    """{source: fine contrast of its pictures after the round trip over that before it}; 1 is as sharp as real, below is softer."""
    kept = decoder.fine_contrast(again).mean((1, 2, 3)) / decoder.fine_contrast(few.images).mean((1, 2, 3))
    return {name.removeprefix("val_"): value for name, value in few.mean(kept)[1].items()}


def _codec(run, vae, held, tile_px, half=True):
    """Writes the autoencoder; returns what its round trip keeps of the held-out pictures, source by source."""
    vae.requires_grad_(False)
    _save(vae, run.path("vae"), half)
    everything = held_out.BySource(held, tile_px, per_source=1000)
    again = _again(vae, everything)
    psnr = ldm.psnr(again, everything.images)
    of = {name.removeprefix("val_"): value for name, value in everything.mean(psnr)[1].items()}
    return {"psnr_db": float(psnr.mean()), "psnr_of": of, "psnr_tiles": len(psnr), "contrast": _contrast(again, everything)}


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
        model.unet.register_to_config(sample_size=model.latent_px)
        model.tokenizer, model.scheduler = base.tokenizer, base.scheduler
        model.tokenizer.save_pretrained(run.path("tokenizer"))
    else:
        model.tokenizer = ldm.tokenizer([*seen.texts(), *WORDS.split()], run.path("tokenizer"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(files.seed(run.seed, "diffusion"))
            model.text_encoder = ldm.text_encoder(len(model.tokenizer), model.tokenizer.eos_token_id).to(device)
            model.unet = ldm.unet(widths, context=model.text_encoder.config.hidden_size, latent_px=tile_px // model.factor)
        model.scheduler = ldm.schedule()
    _plain_attention(_on(device, model.unet))
    seed = files.seed(run.seed, "init") if init else run.seed  # other batches than those it began with
    prompts = list({label: captions[0] for label, captions in zip(seen.labels, seen.captions, strict=True) if label}.values())

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
        players=[ldm.diffusion_player(model, lr)],
        batches=ldm.caption_batches(mean, logvar, source, seen.captions, seen.weights, model.scaling, batch_size, seed),
        validate=held_out.denoising_error(model, held, lambda rows: backbone.embed(model, [held.captions[i][-1] for i in rows]), run.seed),
        sheet=lambda step: sample_quality.sheet(model, prompts[:11], 2, run.seed),
        finish=finish,
        settings={"autocast": machine.bfloat16(device), "ema": 0.999, "weight_decay": 1e-2, "schedule": "one_cycle"},
    )


def _plain_attention(unet):
    """On a CPU: the fused one is slower there in bfloat16."""
    if unet.device.type == "cpu":
        from diffusers.models.attention_processor import Attention, AttnProcessor

        for module in unet.modules():  # a UNet without text has no `set_attn_processor`
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())


def _prior(run, seen, held, *, tile_px, network, loss, batch_size, lr, steps, latents_gb, device, autoencoder, init):
    model = prior.model(run, network=network, autoencoder=autoencoder, init=init, tile_px=tile_px, device=device)
    cache, scale = prior.latents(run, model, seen, steps * batch_size, latents_gb, fit=not init)
    _plain_attention(_on(device, model.unet))
    return Task(
        players=[unconditional.player(model, lr, loss)],
        batches=latent_shards.batches(cache, model.scaling, batch_size, files.seed(run.seed, "prior")),
        validate=held_out.denoising_error(model, held, lambda rows: unconditional.silence(model, len(rows)), run.seed),
        sheet=prior.sheet(model, run.seed),
        finish=lambda: prior.finish(run, model, init or autoencoder, _save) | scale,
        settings={"autocast": machine.bfloat16(device), "ema": 0.9999, "weight_decay": 1e-2, "schedule": "one_cycle"},
    )


def _views(run, model, seen, tile_px, most=8):
    """Latents of random views, encoded once and kept in the run folder: as many of a picture as it is drawn oftener than the mean one."""
    path = run.path("views.safetensors")
    if not path.exists():
        often = np.asarray(seen.weights) / np.mean(seen.weights)
        copies = often.round().astype(int).clip(1, most)
        mean, logvar, source = ldm.view_latents(model.vae, seen.images, copies, tile_px, run.seed, least=0.75, device=model.device)
        files.write_tensors(path, {"mean": mean, "logvar": logvar, "source": torch.from_numpy(source)})
    held = files.read_tensors(path)
    return held["mean"], held["logvar"], held["source"].numpy()


# ---------------------------------------------------------------------------------------------- encoder


def _begun(init, objective):
    """The network of the encoder that the base or step in folder `init` has of this objective, ready to be trained."""
    path = init / f"{'sup' if objective == 'supervised' else 'ssl'}.safetensors"
    if not path.is_file():
        raise ValueError(f"{init} has no {path.name}, the encoder of objective {objective}; name a base or a step that has one, or none")
    return encoders.load(f"cnn@{path}").net.requires_grad_(True).train()


def _encoder(run, seen, held, *, objective, tile_px, dim, batch_size, lr, device, init):
    labels, names = None, []
    if objective not in ("contrastive", "supervised"):
        raise ValueError(f"objective {objective!r} is unknown; an encoder is trained contrastive or supervised")
    if objective == "supervised":
        seen, held = (corpus.part([bool(label) for label in corpus.labels]) for corpus in (seen, held))
        names = sorted(set(seen.labels))
        labels = [names.index(label) for label in seen.labels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(run.seed, "encoder", objective))
        encoder = _begun(init, objective) if init else encoders.SmallCNN(dim)
        encoder, dim = encoder.to(device, memory_format=torch.channels_last), encoder.dim  # a quarter faster, on CPUs too
        head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 64)) if not names else nn.Linear(dim, len(names))
        head.to(device)
    few = held_out.BySource(held, tile_px, per_source=1000)
    of_held = [names.index(label) for label in np.array(held.labels)[few.rows]] if names else []
    player = representation.supervised_player(encoder, head, lr) if names else representation.contrastive_player(encoder, head, lr)

    pairs = representation.view_pairs(held.images, held.weights, tile_px, min(batch_size, len(held.images)), files.seed(run.seed, "held"))

    def validate():  # held-out cases: which class it is or, of a contrastive encoder, which view is whose partner
        encoder.eval()
        if names:
            logits = torch.cat([head(encoder(x.to(device))).cpu() for x in few.images.split(32)])
            lost = few.mean(nn.functional.cross_entropy(logits, torch.tensor(of_held), reduction="none"))
        else:
            lost = torch.stack([player.loss({k: v.to(device) for k, v in pairs(i).items()}, 0, None)[0] for i in range(4)]).mean()
        encoder.train()
        return lost

    def finish():
        encoder.eval()
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in encoder.state_dict().items()}
        name = "sup" if names else "ssl"
        files.write_tensors(run.path(f"{name}.safetensors"), state, {"objective": objective, "dim": str(dim), "size": str(tile_px)})
        with torch.no_grad():
            z = nn.functional.normalize(torch.cat([encoder(x.to(device)) for x in few.images.split(32)]), dim=-1)
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(-1).cpu().numpy()
        kinds = np.array(held.labels)[few.rows]
        agree, known = kinds[nearest] == kinds, kinds != ""
        of = {name: float(agree[known & (few.names == name)].mean()) for name in few.share if (known & (few.names == name)).any()}
        found = {"nearest_neighbour_agreement": float(agree[known].mean()) if known.any() else None, "agreement_of": of}
        return found | {"held_out_tiles": int(known.sum()), "classes": names}

    return Task(
        players=[player],
        batches=representation.view_pairs(seen.images, seen.weights, tile_px, batch_size, run.seed, labels, device),
        validate=validate,
        sheet=None,
        finish=finish,
        settings={"autocast": machine.bfloat16(device), "weight_decay": 1e-2 if names else 1e-4, "schedule": "one_cycle"},
    )
