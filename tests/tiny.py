"""A random miniature of Stable Diffusion built in code, and the hub layouts it can be written in.

32 px tiles, 8x8 latents (f=4), CLIP of width 32 with a byte-level vocabulary and a few whole words.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from histokit.core import files
from histokit.diffusion import backbone

WORDS = "a an the of and image histology patch tissue colon gland necrosis mucinous tumour stroma normal skin light dark photo".split()


def byte_alphabet():
    """The 256 printable stand-ins for bytes that CLIP's and GPT-2's vocabularies are written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tiny_tokenizer(length=77):
    from transformers import CLIPTokenizer

    merges = []
    for word in WORDS:  # after the merges of the words before it, join what is left from the left
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = next((m for m in merges if m in zip(parts, parts[1:], strict=False)), (parts[0], parts[1]))
            if pair not in merges:
                merges.append(pair)
            i = list(zip(parts, parts[1:], strict=False)).index(pair)
            parts[i : i + 2] = ["".join(pair)]
    pieces = ["".join(pair) for pair in merges]
    alphabet = byte_alphabet()
    names = alphabet + [letter + "</w>" for letter in alphabet] + pieces + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(dict.fromkeys(names))}, merges=merges, model_max_length=length)


def tiny_model(seed=0, prediction_type="epsilon", text_width=32, device="cpu"):
    """backbone.Model with random weights, frozen; the same seed gives the same weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[8, 16, 16],
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
            scaling_factor=0.5,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=[16, 32],
            layers_per_block=1,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
            cross_attention_dim=text_width,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    for module in parts.values():
        module.requires_grad_(False).eval().to(device)
    identity = {name: backbone.fingerprint(module) for name, module in parts.items()}
    return backbone.Model(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        name="tiny",
        identity={**identity, "tokenizer": "tiny", "scheduler": prediction_type},
        tile_px=32,
        device=torch.device(device),
    )


def write_hub_layout(folder, *, variant="fp16", safety_checker=True, old_keys=False, prediction_type="epsilon", text_width=32, seed=0):
    """Write a tiny base the way hub repositories lie on disk; returns the model it was written from.

    Args:
        variant: "fp16" (fp16 variant files only, as many mirrors keep), "" (plain float32 files) or "both".
        safety_checker: add the folders a pipeline would load and histokit must not.
        old_keys: text encoder keys under `text_model.` and a stored `position_ids`, as written before 2026.
        prediction_type: "v_prediction" as in SD 2.1.
        text_width: 1024 as in SD 2.x, 768 as in SD 1.x.
    """
    folder = Path(folder)
    model = tiny_model(seed, prediction_type, text_width)
    for part in ("vae", "unet", "text_encoder"):
        module = getattr(model, part)
        if variant in ("", "both"):
            module.save_pretrained(folder / part)
        if variant in ("fp16", "both"):
            twin = type(module)(module.config) if part == "text_encoder" else type(module).from_config(module.config)
            twin.load_state_dict(module.state_dict())
            twin.half().save_pretrained(folder / part, variant="fp16")
    if old_keys:
        for path in (folder / "text_encoder").glob("*.safetensors"):
            old = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(path).items()}
            save_file({**old, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path, metadata={"format": "pt"})
    model.tokenizer.save_pretrained(folder / "tokenizer")
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "PNDMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": prediction_type,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
        },
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": safety_checker,
    }
    if safety_checker:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        _write_json(folder / "safety_checker" / "config.json", {"architectures": ["StableDiffusionSafetyChecker"]})
        files.write_bytes(folder / "safety_checker" / "pytorch_model.bin", b"a pickle nobody should open")
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", {"feature_extractor_type": "CLIPFeatureExtractor"})
    _write_json(folder / "model_index.json", index)
    return model


def _write_json(path, obj):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj, indent=1))
