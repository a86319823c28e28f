"""From the runs of params/mini.yaml to histokit/mini: weights, the list of what was seen, the model card.

python -m histokit.training.pretraining.package_mini [experiment]
"""

import sys
from pathlib import Path

import pandas as pd

from histokit.core import files
from histokit.diffusion import backbone, pretrained
from histokit.tiles import contamination

CARD = """# mini: the embedded base of histokit

A working miniature of Stable Diffusion 1.x for 128 px H&E tiles, made to learn, test and demonstrate with. It is **not** a base for
research results on other tissue: bring Stable Diffusion 1.x / 2.x or a model of your own tissue for that.

| part | what | parameters |
|---|---|---|
{parts}

- **Trained on** {n:,} pictures: {sources}. The sha256 of each one's pixels is in `trained_on.csv`; nothing else was seen. EBHI-Seg's
  Serrated_adenoma, Normal and Polyp, `toy`'s tail classes and every validation and test tile are not among them.
- **Attribution**: EBHI-Seg, Shi et al., Front Med 10:1114673 (2023), CC BY 4.0. PatchCamelyon, Veeling et al., arXiv:1806.03962, CC0 1.0.
- **Licence of the weights**: Apache-2.0, with the attribution above.
- **Made** with `histokit run params/mini.yaml`, on {where}; optimiser updates: {steps}.{history}
- **Measured** on {held} held-out tiles of the same sources and classes: {numbers}.
- **Limits**: one hospital's colon and a sample of lymph nodes. {looks} Variations of a real tile keep the tile's layout.
  `init: mini` in `20_pretrain` goes on from here. Never for diagnosis.
"""
# What must be looked at and remembered; written anew with new weights.
LOOKS = (
    "From pure noise it draws crypts with lumina for low-grade neoplasia and solid sheets for carcinoma; high-grade neoplasia it hardly "
    "tells from carcinoma. Of 96 samples of toy's common classes at guidance 2 an independent network recognises 90 % [82 to 94]: all of "
    "lymphoid tissue, fat, solid tumour and normal glands, 11 of 16 of stroma and of adenoma; at guidance 1 75 % [65 to 83]."
)
HISTORY = """
  The UNet's first 2,200 updates saw the same latents before they were centred, on SD's own schedule; its next 4,000 began with a new
  one-cycle rate and newly drawn toy tiles and looks. In all of them toy was 3 % of the draws instead of the 20 % its recipe says. Then
  (2026-11-30) the UNet was given the pooled text beside the timestep, at first without effect, and 2,400 and 3,600 updates: EBHI-Seg 40 and
  45 %, PCam 5 %, toy's common classes 43 and 40 % (1,200 and 1,800 fresh pictures each), other looks 12 and 10 % of the draws, timesteps
  drawn where the layout is decided. The decoder learned to give back the fine contrast of real tiles (900 updates of quarters; what is left
  of it after a round trip: EBHI-Seg 0.52 before and 0.81 now, toy 0.66 and 0.84); both encoders were trained anew with blur and noise in
  their views."""
NUMBERS = (
    "reconstruction {diffusion[psnr_db]:.1f} dB PSNR; nearest neighbour of the same class for {ssl[nearest_neighbour_agreement]:.0%} (ssl) "
    "and {sup[nearest_neighbour_agreement]:.0%} (sup); KID x 1000 of {diffusion[samples]} samples of the two hospitals' classes at "
    "guidance 2 {kid}. Colour-texture measures stain and grain, which the decoder gives to noise as well; content is what mini-ssl sees"
)
SPACE = (
    "{samples:.0f} in {space} (autoencoder alone {autoencoder:.0f}, untrained UNet {untrained:.0f}, real tiles of other cases {floor:.0f}, "
    "{n} a side)"
)


def package(experiment="mini", target=pretrained.MINI):
    """Copy the finished parts of `outputs/<experiment>` to `target` with card and list; returns the facts written to mini.json.

    A part that was not trained anew stays as it is, with what mini.json says of it; the autoencoder is the one whose latents the
    diffusion model learned, with the decoder that was trained for it, if any. The list names every picture that any part has learned
    from, also before it was packaged the last time.
    Raises FileNotFoundError when a part is neither there nor packaged before, ValueError when the whole is above 34 MB.
    """
    target, home = Path(target), files.root() / "outputs" / experiment
    facts = files.read_json(target / "mini.json") if (target / "mini.json").exists() else {}
    lists = [files.read_table(target / contamination.LIST)] if (target / contamination.LIST).exists() else []
    for step in ("autoencoder", "diffusion", "decoder", "ssl", "sup"):
        if (step in facts or step == "decoder") and not (home / step / "results.json").exists():
            continue
        run = files.read_json(home / step / "run.json")
        where = f"{run['platform'].split('-')[0]}, {run.get('threads', '?')} threads, device {run.get('device', 'cpu')}"
        made = {"batch_size": run["parameters"]["batch_size"], "finished": run["finished"], "on": where}
        facts[step] = files.read_json(home / step / "results.json") | made
        lists.append(files.read_table(home / step / contamination.LIST))
        for part in {"diffusion": pretrained.PARTS, "decoder": ("vae",)}.get(step, ()):
            for path in sorted((home / step / part).iterdir()):
                files.write_bytes(target / part / path.name, path.read_bytes())
        if step in ("ssl", "sup"):
            files.write_bytes(target / f"{step}.safetensors", (home / step / f"{step}.safetensors").read_bytes())
    pictures = pd.concat(lists).drop_duplicates("pixels_sha256").sort_values(["source", "label", "tile"])
    files.write_table(target / contamination.LIST, pictures)
    files.write_json(target / "mini.json", facts)
    files.write_text(target / "model_card.md", card(target, facts, pictures))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6
    if size > 34:
        raise ValueError(f"{target} is {size:.1f} MB, the package allows 34; use smaller widths")
    return facts


def card(target, facts, pictures):
    """The text of the model card."""
    model = backbone.load(str(target))
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    side, predicts = model.latent_px, model.scheduler.config.prediction_type
    rows = [
        ("vae", f"AutoencoderKL, factor {model.factor}, {model.vae.config.latent_channels} channels", count(model.vae)),
        ("unet", f"UNet2DConditionModel, {side} x {side} latents, {predicts}", count(model.unet)),
        ("text_encoder", f"CLIPTextModel, vocabulary of {len(model.tokenizer):,}", count(model.text_encoder)),
    ]
    rows += [(name, f"encoder, {kind}", 1.2) for name, kind in (("ssl", "self-supervised"), ("sup", "supervised on the common classes"))]
    sources = pictures.groupby("source").size()
    return CARD.format(
        parts="\n".join(f"| {name} | {what} | {size:.1f} M |" for name, what, size in rows),
        n=len(pictures),
        sources=", ".join(f"{n:,} of {Path(name).stem}" for name, n in sources.items()),
        where=facts["diffusion"]["on"],
        steps=", ".join(f"{step} {it['updates']:,} of batch {it['batch_size']} ({it['finished'][:10]})" for step, it in facts.items()),
        history=HISTORY,
        looks=LOOKS,
        held=facts["diffusion"]["psnr_tiles"],
        numbers=NUMBERS.format(**facts, kid="; ".join(SPACE.format(space=k, **v) for k, v in facts["diffusion"]["kid"].items())),
    )


if __name__ == "__main__":
    print(package(*sys.argv[1:2]))
