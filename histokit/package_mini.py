"""From the runs of params/mini.yaml to histokit/mini: weights, the list of what was seen, the model card.

python -m histokit.package_mini [experiment]
"""

import sys
from pathlib import Path

from histokit import backbone, files

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
- **Made** with `histokit run params/mini.yaml`, {when}, on {where}, but for the encoders: an earlier run of the same functions. {steps}.
- **Measured** on {held} held-out tiles of the same sources and classes: {numbers}.
- **Limits**: one hospital's colon and a sample of lymph nodes. From pure noise it draws stain, nuclei and gaps, hardly a gland: it needs
  more updates (`init: mini` in `20_pretrain` goes on from here). Variations of a real tile keep the tile's layout. Never for diagnosis.
"""
NUMBERS = (
    "reconstruction {autoencoder[psnr_db]:.1f} dB PSNR; KID x 1000 of {diffusion[samples]} samples {diffusion[kid]:.1f}, of the untrained "
    "UNet's {diffusion[kid_untrained]:.0f}, of real tiles of other cases {diffusion[kid_floor]:.1f} ({diffusion[kid_n]} a side, colour and "
    "texture, which no part was trained on); nearest neighbour of the same class for {ssl[nearest_neighbour_agreement]:.0%} (ssl) and "
    "{sup[nearest_neighbour_agreement]:.0%} (sup)"
)


def package(experiment="mini", target=backbone.MINI):
    """Copy the finished parts of `outputs/<experiment>` to `target` with card and list; returns the facts written to mini.json.

    An encoder that was not trained anew stays as it is, with what mini.json says of it. Raises FileNotFoundError when autoencoder or
    diffusion model is missing or an encoder was never packaged, ValueError when it has seen other pictures or the whole is above 34 MB.
    """
    target, home = Path(target), files.root() / "outputs" / experiment
    facts = files.read_json(target / "mini.json") if (target / "mini.json").exists() else {}
    lists = []
    for step in ("autoencoder", "diffusion", "ssl", "sup"):
        if step in facts and step in ("ssl", "sup") and not (home / step / "results.json").exists():
            lists.append(files.read_table(target / "trained_on.csv"))
            continue
        run = files.read_json(home / step / "run.json")
        made = {"steps": updates(home, run), "batch_size": run["parameters"]["batch_size"]}
        facts[step] = files.read_json(home / step / "results.json") | made
        where = f"{run['platform'].split('-')[0]}, {run.get('threads', '?')} threads, device {run.get('device', 'cpu')}"
        facts[step] |= {"finished": run["finished"], "on": where}
        lists.append(files.read_table(home / step / "trained_on.csv"))
        for part in backbone.PARTS if step == "diffusion" else ():
            for path in sorted((home / step / part).iterdir()):
                files.write_bytes(target / part / path.name, path.read_bytes())
        if step in ("ssl", "sup"):
            files.write_bytes(target / f"{step}.safetensors", (home / step / f"{step}.safetensors").read_bytes())
    seen = lists[0]
    if any(set(seen["pixels_sha256"]) != set(other["pixels_sha256"]) for other in lists):
        raise ValueError(f"the parts of {experiment} were trained on different pictures; one list must be true of them all")
    files.write_table(target / "trained_on.csv", seen.sort_values(["source", "label", "tile"]))
    files.write_json(target / "mini.json", facts)
    files.write_text(target / "model_card.md", card(target, facts, seen))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6
    if size > 34:
        raise ValueError(f"{target} is {size:.1f} MB, the package allows 34; use smaller widths")
    return facts


def updates(home, run):
    """Optimiser updates of a run and of those it went on from."""
    settings = run["parameters"]
    before = updates(home, files.read_json(home / settings["init"] / "run.json")) if settings.get("init") else 0
    return settings["steps"] + before


def card(target, facts, seen):
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
    sources = seen.groupby("source").size()
    return CARD.format(
        parts="\n".join(f"| {name} | {what} | {size:.1f} M |" for name, what, size in rows),
        n=len(seen),
        sources=", ".join(f"{n:,} of {Path(name).stem}" for name, n in sources.items()),
        when=facts["diffusion"]["finished"][:10],
        where=facts["diffusion"]["on"],
        steps="; ".join(f"{step} {found['steps']:,} steps of batch {found['batch_size']}" for step, found in facts.items()),
        held=facts["autoencoder"]["psnr_tiles"],
        numbers=NUMBERS.format(**facts),
    )


if __name__ == "__main__":
    print(package(*sys.argv[1:2]))
