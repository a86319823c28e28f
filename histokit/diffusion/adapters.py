"""Adapters, learned tokens and LoRA: onto disk, back into a model, and out of it.

Both kinds of file are those of stock diffusers (`load_textual_inversion`, `load_lora_weights`); beside them lies
`adapter.json`, which says on what base and from which cases they were trained, so that `load` can refuse. What a token is to a
model is in `learned_tokens`; how both are trained in `textual_inversion` and `lora`.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch

from histokit.core import files
from histokit.diffusion import learned_tokens, pretrained

VERSION = 2

MOST_MERGED = 2**27  # numbers in the weights that carry a LoRA, up to which they are copied while it is merged: half a GiB
CARD = "adapter.json"
LORA = "pytorch_lora_weights.safetensors"  # the name stock diffusers looks for
UNET = "unet/diffusion_pytorch_model.safetensors"  # where stock diffusers looks for a whole UNet
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": ATTENTION,
    "attention+feedforward": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
    "attention+conv": (*ATTENTION, "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),
}


# --- LoRA ------------------------------------------------------------------------------------------------------------


def add_lora(model, rank=16, alpha=None, targets="attention", dora=False, seed=0):
    """Put a LoRA of zero effect into the UNet and return its parameters, float32, as a list.

    Args:
        rank: of each update.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        targets: "attention", "attention+feedforward" or "attention+conv".
        dora: weight-decomposed variant (Liu et al. 2024, arXiv:2402.09353); about twice the time of a step.
        seed: of the random half of the weights.
    """
    from peft import LoraConfig

    if targets not in TARGETS:
        raise ValueError(f"targets {targets!r} is unknown; use {', '.join(TARGETS)}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    config = LoraConfig(
        r=rank, lora_alpha=alpha or rank, target_modules=list(TARGETS[targets]), init_lora_weights="gaussian", use_dora=dora
    )
    with torch.random.fork_rng():
        torch.manual_seed(files.seed(seed, "lora"))
        return _inject(model, config)


def _inject(model, config):
    if getattr(model.need("unet").unet, "peft_config", None):
        raise ValueError("the model already carries a LoRA; adapters.unload(model) first, two of them would add up")
    model.unet.add_adapter(config, adapter_name="default")
    params = [p for name, p in model.unet.named_parameters() if "lora_" in name]
    for p in params:  # a half-precision UNet makes half-precision updates, which do not train
        p.data = p.data.to(model.device, torch.float32)
        p.requires_grad_(False)
    return params


def all_weights(model):
    """The parameters of the whole UNet, float32, as a list: half-precision weights make half-precision updates, which do not train."""
    if getattr(model.need("unet").unet, "peft_config", None):
        raise ValueError("the model carries a LoRA; adapters.unload(model) first")
    model.unet.float()
    return list(model.unet.parameters())


@contextmanager
def merged(model):
    """The LoRA added into the UNet's weights within the `with`, which are then put back bit for bit; hold `model.alone()` meanwhile.

    On a CPU a sampling step of mini then takes 0.8 of its time. On a GPU, where nobody measured, and where it changes more weights than one
    would like to copy, the LoRA stays beside them.
    """
    if model.device.type != "cpu" or not getattr(model.unet, "peft_config", None):
        yield model
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.unet.modules() if isinstance(m, BaseTunerLayer) and not m.merged]
    weights = [layer.get_base_layer().weight for layer in layers]
    if sum(w.numel() for w in weights) > MOST_MERGED:
        layers = weights = []
    kept = [w.detach().clone() for w in weights]
    try:
        for layer in layers:
            layer.merge()
        yield model
    finally:
        with torch.no_grad():
            for layer, weight, before in zip(layers, weights, kept, strict=True):
                layer.unmerge()
                weight.copy_(before)


def lora_tensors(model):
    """{name: tensor} of the LoRA in the UNet, under the names of stock diffusers."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model.unet, adapter_name="default")
    return {f"unet.{name}": value.detach().float().cpu() for name, value in state.items()}


def save_lora(folder, model):
    """Write the UNet's LoRA for `load_lora_weights`, rank, alpha and targets in its header; without them alpha would read as rank."""
    config = model.unet.peft_config["default"].to_dict()
    facts = {
        f"unet.{key}": sorted(value) if isinstance(value, set) else getattr(value, "value", value) for key, value in sorted(config.items())
    }
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(facts, sort_keys=True)}
    return files.write_tensors(Path(folder) / LORA, lora_tensors(model), header)


# --- folders ---------------------------------------------------------------------------------------------------------


def save(folder, model, classes, tiles, *, dataset="", tokens=None, lora=False, unet=False, settings=None):
    """Write a finished adapter: its files and the card that says where it comes from.

    Args:
        folder: run folder of 01 or 02.
        model: the Model that was trained.
        classes: {class name: placeholder, or "" where the class is named by words}.
        tiles: manifest rows it learned from; their cases and content are remembered, so a later test set can be checked.
        dataset: name of the dataset; case ids mean the same tissue only within one.
        tokens: {placeholder: [n, D]}; LoRA folders keep the tokens they were trained with.
        lora: write the UNet's LoRA too.
        unet: write all of the UNet, in half precision, for `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`.
        settings: whatever a reader may want to know.
    """
    tokens = tokens or {}
    save_tokens(folder, tokens)
    if lora:
        save_lora(folder, model)
    if unet:
        model.unet.save_config(Path(folder) / "unet")
        state = {name: value.detach().half() for name, value in model.unet.state_dict().items()}
        files.write_tensors(Path(folder) / UNET, state, {"format": "pt"})
    card = {
        "base": {"name": model.name, "identity": model.identity},
        "classes": classes,
        "tokens": {name: {"vectors": len(rows), "width": rows.shape[1]} for name, rows in tokens.items()},
        "lora": bool(lora),
        **({"unet": True} if unet else {}),
        "training": {
            "dataset": dataset,
            "cases": sorted(set(tiles["case_id"].astype(str))),
            "patients": sorted(set(tiles["patient"].astype(str)) - {""}) if "patient" in tiles else [],
            "tiles": sorted({sha[:16] for sha in tiles["sha256"].astype(str) if sha}),
        },
        "settings": settings or {},
    }
    return files.write_json(Path(folder) / CARD, card)


def save_tokens(folder, tokens):
    """Write one file per token for `load_textual_inversion`: tokens/<name>.safetensors holding {placeholder: [n, D]}."""
    return [
        files.write_tensors(Path(folder) / "tokens" / f"{name.strip('<>')}.safetensors", {name: rows}, {"format": "pt"})
        for name, rows in tokens.items()
    ]


def load(model, *folders, tiles=None, dataset=""):
    """`model` with the tokens and the LoRA, or the whole UNet, of finished 01 or 02 folders, ready to sample.

    Args:
        model: backbone.Model without a LoRA; a UNet that is put in stays in.
        folders: run folders; a token that two of them share is taken once.
        tiles: this experiment's manifest; an adapter trained on a case or a picture of its val or test part is refused.
        dataset: name of this experiment's dataset.

    Raises FileNotFoundError for a folder that holds no adapter, ValueError for another base, for leaked cases, for tokens
    that contradict each other and for a second LoRA.
    """
    cards = {Path(folder): _card(Path(folder)) for folder in folders}
    for folder, card in cards.items():
        _same_base(model, card, folder)
        if tiles is not None:
            _no_leak(tiles, dataset, card, folder)
    tokens, classes = {}, {}
    for folder, card in cards.items():
        for name in card["tokens"]:
            path = folder / "tokens" / f"{name.strip('<>')}.safetensors"
            rows = files.read_tensors(path)[name]
            if name in tokens and not torch.equal(tokens[name][0], rows):
                raise ValueError(f"{folder} and {tokens[name][1].parent.parent} hold different vectors of {name}; load only the later one")
            tokens[name] = (rows, path)
        classes |= {k: v for k, v in card["classes"].items() if v or k not in classes}
    if tokens:
        learned_tokens.add_tokens(model, {name: rows for name, (rows, _) in tokens.items()})
    for folder, card in cards.items():
        if card["lora"]:
            _load_lora(model, folder)
            model.adapters.append({"kind": "lora", "folder": str(folder), "sha": files.sha256(folder / LORA)})
        if card.get("unet"):
            _load_unet(model, folder)
            model.adapters.append({"kind": "unet", "folder": str(folder), "sha": files.sha256(folder / UNET)})
    shas = {name: files.sha256(path) for name, (_, path) in tokens.items()}
    said = [text for card in cards.values() for text in _captions(card["settings"])]
    model.adapters.append({"kind": "tokens", "classes": classes, "sha": shas, "captions": said})
    return model


def read_tokens(model, *folders, tiles=None, dataset=""):
    """{class name: (placeholder, rows [n, D])} of finished folders; a later folder wins. Refuses what `load` refuses."""
    found = {}
    for folder in map(Path, folders):
        card = _card(folder)
        _same_base(model, card, folder)
        if tiles is not None:
            _no_leak(tiles, dataset, card, folder)
        for class_name, name in card["classes"].items():
            if name:
                found[class_name] = (name, files.read_tensors(folder / "tokens" / f"{name.strip('<>')}.safetensors")[name])
    return found


def unload(model):
    """Take every adapter out: the UNet's modules, the token table and the tokenizer are as `backbone.load` left them.

    ValueError for a UNet that was put in as a whole: load the base again.
    """
    if any(adapter["kind"] == "unet" for adapter in model.adapters):
        raise ValueError("all of the UNet was replaced; load the base again")
    if model.unet is not None and getattr(model.unet, "peft_config", None):
        model.unet.unload_lora()
    table = model.text_encoder.get_input_embeddings() if model.text_encoder is not None else None
    if isinstance(table, learned_tokens.TokenTable):
        model.text_encoder.set_input_embeddings(table.table)
        model.tokenizer = table.tokenizer
    model.adapters, model.placeholders = [], {}
    return model


def words(model, class_name, term=""):
    """How a prompt names a class: by its learned token where one is loaded, else by `term`."""
    for adapter in model.adapters:
        if adapter["kind"] == "tokens" and adapter["classes"].get(class_name):
            return adapter["classes"][class_name]
    return term or class_name


def shas(model, prompt):
    """(lora_sha, token_sha) of what shapes an image of `prompt`; "" where there is none."""
    lora = "".join(a["sha"] for a in model.adapters if a["kind"] in ("lora", "unet"))
    known = {name: sha for a in model.adapters if a["kind"] == "tokens" for name, sha in a["sha"].items()}
    used = [known[name] for name in sorted(known) if name in prompt]
    return lora, used[0] if len(used) == 1 else files.digest(used) if used else ""


def _card(folder):
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"{folder} holds no {CARD}; name a finished step of 01_textual_inversion or 02_lora")
    return files.read_json(folder / CARD)


def _captions(settings):
    """The templates an adapter was trained on, from its card."""
    return [settings["prompt"]] if settings.get("prompt") else list(settings.get("templates", []))


def _same_base(model, card, folder):
    theirs, ours = card["base"]["identity"], model.identity
    differ = [part for part in pretrained.PARTS if part in theirs and theirs[part] != ours.get(part)]
    if differ:
        raise ValueError(
            f"{folder} was trained on base {card['base']['name']!r}; {', '.join(differ)} of {model.name!r} differ from it. "
            "Adapters do not carry over: load that base, or train again on this one"
        )


def _no_leak(tiles, dataset, card, folder):
    held, learned = tiles[tiles["split"].isin(["val", "test"])], card["training"]
    seen = held["sha256"].astype(str).str[:16].isin(set(learned["tiles"])) & held["sha256"].astype(str).ne("")
    if learned["dataset"] == dataset:
        seen |= held["case_id"].astype(str).isin(set(learned["cases"]))
        if "patient" in held:
            seen |= held["patient"].astype(str).isin(set(learned["patients"]))
    if seen.any():
        row = held[seen].iloc[0]
        raise ValueError(
            f"{folder} learned from {seen.sum()} tiles or their cases that are {'/'.join(sorted(set(held[seen]['split'])))} here "
            f"(first: case {row['case_id']!r}, tile {row['tile_id']!r}); results would be flattered. Train it again in this experiment"
        )


def _load_unet(model, folder):
    """Puts a UNet that was trained as a whole in the place of the model's; strict, and only where no other adapter is in it."""
    if any(adapter["kind"] in ("lora", "unet") for adapter in model.adapters):
        raise ValueError(f"{folder} holds a whole UNet, and the model carries another adapter already; load one of them")
    state = files.read_tensors(folder / UNET)
    expected = model.unet.state_dict()
    odd = sorted(set(expected) ^ set(state)) or [name for name in state if state[name].shape != expected[name].shape]
    if odd:
        raise ValueError(
            f"{folder / UNET} does not fit this UNet: {len(odd)} weights missing, unknown or of another shape, first {odd[0]!r}"
        )
    model.unet.load_state_dict({name: value.to(model.device, expected[name].dtype) for name, value in state.items()})


def _load_lora(model, folder):
    from peft import LoraConfig, set_peft_model_state_dict

    facts = json.loads(files.read_metadata(folder / LORA).get("lora_adapter_metadata", "{}"))
    if not facts:
        raise ValueError(f"{folder / LORA} says neither rank nor alpha; save it again with its metadata")
    config = {key.removeprefix("unet."): value for key, value in facts.items() if key.startswith("unet.")}
    keep = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    _inject(model, LoraConfig(**{key: config[key] for key in keep if key in config}))
    state = {key.removeprefix("unet."): value.to(model.device) for key, value in files.read_tensors(folder / LORA).items()}
    expected = {key.removeprefix("unet.") for key in lora_tensors(model)}
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        raise ValueError(f"{folder / LORA} does not fit this UNet: {len(odd)} weights missing or unknown, first {odd[0]!r}")
    set_peft_model_state_dict(model.unet, state, adapter_name="default")
