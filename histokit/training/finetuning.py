"""What inversion and LoRA share: tiles and captions into batches, the denoising loss, the held-out loss, the sample sheet.

`loop` does the training; `textual_inversion` and `lora` say what is trained. Nothing here adds to a model.
"""

import numpy as np
import pandas as pd
import torch

from histokit.core import files
from histokit.diffusion import latents, losses, sampling
from histokit.training import loop
from histokit.training.settings import HELD_OUT_DRAWS, HOLD_OUT, SHEET_SAMPLES, SHEET_STEPS

VERSION = 3

GAP = 4  # white px between the samples of a sheet
SHEET_PROMPTS = 6  # rows of a sheet, where captions are many
SMALL = 20  # training tiles below which a class spares none for validation


def hold_out(tiles, share=HOLD_OUT, seed=0, small=SMALL):
    """(tiles to learn from, tiles to validate on), cut by case and inside each class.

    A class with fewer than `small` tiles or three cases keeps all of them, so the second part may be empty; training then
    runs a fixed number of steps. All are training tiles of the experiment: neither part ever holds its val or test.
    """
    held = []
    for name, rows in tiles.groupby("label", sort=True):
        cases = sorted(rows["case_id"].unique())
        if len(rows) < small or len(cases) < 3 or not share:
            continue
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(files.seed(seed, "held out", name)))
        count = 0
        for k in order.tolist()[: len(cases) // 2]:
            if count >= share * len(rows):
                break
            held.append(rows[rows["case_id"].eq(cases[k])])
            count += len(held[-1])
    chosen = tiles.index.isin([i for rows in held for i in rows.index])
    return tiles[~chosen].reset_index(drop=True), tiles[chosen].reset_index(drop=True)


def weights(tiles, balance="class+group"):
    """Probability [N] of each tile being drawn; "class" makes classes equally likely, "class+group" also the groups inside each."""
    if balance not in ("none", "class", "class+group"):
        raise ValueError(f"balance {balance!r} is unknown; use none, class or class+group")
    weight = np.ones(len(tiles))
    if balance != "none":
        weight /= tiles.groupby("label")["label"].transform("size").to_numpy()
    if balance == "class+group" and "group" in tiles:
        cells = tiles.groupby(["label", "group"])["label"].transform("size").to_numpy()
        groups = tiles.groupby("label")["group"].transform("nunique").to_numpy()
        weight = 1 / (cells * groups)
    return weight / weight.sum()


def strata(tiles):
    """Number [N] of the class and group each tile belongs to."""
    columns = [name for name in ("label", "group") if name in tiles]
    return tiles.groupby(columns, sort=True).ngroup().to_numpy()


def draw(weight, count, generator, stratum=None):
    """`count` indices drawn by `weight` [N], spread evenly (systematic): every batch holds each stratum in proportion, to within one."""
    order = torch.randperm(len(weight), generator=generator).numpy()
    if stratum is not None:  # strata in random order, and tiles in random order inside each
        place = torch.randperm(int(stratum.max()) + 1, generator=generator).numpy()
        order = order[np.argsort(place[stratum[order]], kind="stable")]
    at = (np.arange(count) + torch.rand((), generator=generator).item()) / count
    return order[np.searchsorted(np.cumsum(weight[order]), at).clip(max=len(weight) - 1)]


def batches(cache, captions, weight, batch_size, seed, stratum=None):
    """`batches(k)` for `loop.fit`: {"latents": [B, 4, h, w] scaled, in random symmetries, "captions": list of B}.

    Args:
        cache: `latents.Latents` of the N tiles.
        captions: list of N lists of str; one of a tile's own is drawn each time.
        weight: [N], see `weights`.
        stratum: [N], see `strata`.
    """

    def batch(k):
        generator = torch.Generator().manual_seed(files.seed(seed, "batch", k))
        rows = draw(weight, batch_size, generator, stratum)
        picks = torch.randint(2**31, (batch_size,), generator=generator).tolist()
        texts = [captions[row][pick % len(captions[row])] for row, pick in zip(rows, picks, strict=True)]
        return {"latents": cache.sample(rows, generator), "captions": texts}

    return batch


def loss(model, embed, *, caption_dropout=0.1, timesteps="uniform", min_snr_gamma=5.0, kind="l2"):
    """`loss(batch, step, generator)`: the denoising error under captions, each emptied with probability `caption_dropout`.

    `embed(prompts)` -> [B, L, D]: `backbone.embed` where tokens are trained, `latents.Prompts` where they are not.
    """
    draw = losses.timestep_draw(model.scheduler, timesteps)
    gamma = min_snr_gamma if timesteps == "uniform" else 0  # drawn by weight, each counts alike

    def of(batch, step, generator):
        z = batch["latents"]
        drop = torch.rand(len(z), generator=generator) < caption_dropout
        drawn = draw(len(z), generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        texts = ["" if gone else text for gone, text in zip(drop.tolist(), batch["captions"], strict=True)]
        context = spread(embed, texts)
        return losses.diffusion_loss(model.unet, model.scheduler, z, context, drawn, noise, min_snr_gamma=gamma, kind=kind)

    return of


def spread(embed, texts):
    """Embeddings [B, L, D] of texts, each different one embedded once."""
    unique = list(dict.fromkeys(texts))
    known = dict(zip(unique, embed(unique), strict=True))
    # not an index, whose gradient adds up in no fixed order, see `learned_tokens.TokenTable`
    return torch.stack([known[text] for text in texts])


def validation(model, embed, cache, captions, seed, *, draws=HELD_OUT_DRAWS, batch_size=8, kind="l2"):
    """`validate()` -> denoising error of held-out tiles on fixed noise and timesteps, lower is better, unweighted.

    Tiles as they lie and the mean of their latents, so that the number moves with the model alone.
    """
    rows = [i % len(cache) for i in range(max(draws, len(cache)))]
    mean, _ = cache.batch(rows, [0] * len(rows))
    z = mean * model.scaling
    timesteps, noise = losses.fixed_noise(len(rows), z.shape[1:], model.scheduler, seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(files.seed(seed, "levels")))
    timesteps = timesteps[order].to(z.device)  # or a tile would always meet the same share of the schedule
    noise = noise.to(z.device)

    def validate():
        total = 0.0
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            context = spread(embed, [captions[row][0] for row in rows[part]])
            with model.autocast():
                error = losses.diffusion_loss(
                    model.unet, model.scheduler, z[part], context, timesteps[part], noise[part], min_snr_gamma=0, kind=kind
                )
            total += float(error) * len(z[part])
        return total / len(rows)

    return validate


def sheet(model, prompts, seed, *, per_prompt=SHEET_SAMPLES, guidance_scale=2.0, num_inference_steps=SHEET_STEPS, gap=GAP):
    """`sheet(step)` -> uint8 [H, W, 3]: a row of samples per prompt at fixed seeds, by the sampler of later inference."""
    texts = [prompt for prompt in prompts for _ in range(per_prompt)]

    def drawn(step):
        generators = [torch.Generator().manual_seed(files.seed(seed, "sheet", i)) for i in range(len(texts))]
        images = sampling.sample(model, texts, generators, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps)
        framed = np.pad(images, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
        return np.concatenate([np.concatenate(list(framed[i : i + per_prompt]), axis=1) for i in range(0, len(framed), per_prompt)])

    return drawn


def cut(sheet, per_prompt=SHEET_SAMPLES, gap=GAP):
    """The samples uint8 [prompts, per_prompt, H, W, 3] of a sheet."""
    side = sheet.shape[1] // per_prompt
    return sheet.reshape(-1, side, per_prompt, side, 3).swapaxes(1, 2)[:, :, : side - gap, : side - gap]


def of_classes(model, tiles, words):
    """The tiles of the classes in `words`; ValueError for a class without one, or a model without the parts that a fine-tuning needs."""
    missing = sorted(set(words) - set(tiles["label"]))
    if missing or not words:
        raise ValueError(f"no training tile of {', '.join(missing) or 'any class'}; check class and split")
    model.need("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    return tiles[tiles["label"].isin(list(words))]


def captioned(tiles, captions):
    """The tiles that have a caption of weight above 0; ValueError where none has, or a caption is not text."""
    drawn = captions[captions["weight"].gt(0)]
    found = tiles[tiles["tile_id"].isin(drawn["tile_id"])]
    if found.empty:
        raise ValueError(f"none of {len(tiles)} training tiles has a caption; were the captions made from this manifest, of these classes?")
    if empty := drawn.loc[drawn["text"].str.strip().eq(""), "tile_id"].tolist():
        raise ValueError(f"the caption of tile {empty[0]!r} is empty ({len(empty)} such)")
    return found


def shown(tiles, texts, most=SHEET_PROMPTS):
    """Captions for a sample sheet: of each class the most usual one, then the second, and so on.

    Args:
        texts: {tile_id: caption}.
    """
    counts = tiles.assign(text=tiles["tile_id"].map(texts)).groupby("label")["text"].value_counts().reset_index()
    counts["rank"] = counts.groupby("label").cumcount()
    return counts.sort_values(["rank", "label"], kind="stable")["text"].head(most).tolist()


def run(model, name, param_groups, embed, tiles, texts, how, training, *, seed, folder, identity, prompts, drawn=None):
    """Train parameters of a frozen model on tiles under captions; returns the history of `loop.fit`.

    Args:
        name: of what is trained, in checkpoints and history.
        param_groups: as torch optimisers take them; they take a gradient in here alone.
        embed: see `loss`.
        texts: `texts(row)` -> list of captions of one manifest row.
        how, training: settings.Finetuning of the method and settings.Loop, see `settings.Finetuning.of`.
        folder: where checkpoints and sample sheets go; None keeps none.
        identity: dict of what the result depends on beside base, tiles and settings, for resuming.
        prompts: what the sample sheets show, a row each; none draws no sheet.
        drawn: DataFrame tile_id, weight (how often a tile is drawn), cluster, in the place of `how.balance`; what a tile is called has no
            say in which are drawn, so that two ways of captioning the same tiles learn from the same batches.
    """
    trained = [p for group in param_groups for p in group["params"]]
    for p in trained:
        p.requires_grad_(True)
    try:
        learn, held = hold_out(tiles, how.hold_out, seed)
        cache = latents.Latents(model, learn)
        error = loss(
            model, embed, caption_dropout=how.caption_dropout, timesteps=how.timesteps, min_snr_gamma=how.min_snr_gamma, kind=how.loss
        )
        captions = _captions(learn, texts)
        often, parts = (weights(learn, how.balance), strata(learn)) if drawn is None else _as_captioned(learn, drawn)
        validate = None
        if len(held):
            own = latents.Latents(model, held, symmetries=1)
            validate = validation(model, embed, own, _captions(held, texts), seed, kind=how.loss)
        seen = {"base": model.identity, "tiles": files.digest([[row.tile_id, row.sha256] for row in learn.itertuples()])}
        batch = batches(cache, captions, often, how.batch_size, seed, parts)
        return loop.Training(
            [loop.Player(name, param_groups, error)], batch, how.steps, seed, training, folder,
            identity={**seen, **identity, **how.identity()}, autocast=model.arithmetic, validate=validate,
            sheet=sheet(model, prompts, seed) if prompts else None,
        ).run()  # fmt: skip
    finally:
        for p in trained:
            p.requires_grad_(False)


def _as_captioned(tiles, drawn):
    """Probability [N] of each tile being drawn, and number [N] of the class and cluster it belongs to."""
    own = drawn.set_index("tile_id").loc[tiles["tile_id"]]
    often = own["weight"].to_numpy(float)
    cells = pd.DataFrame({"label": tiles["label"].to_numpy(), "cluster": own["cluster"].to_numpy()})
    return often / often.sum(), cells.groupby(["label", "cluster"], sort=True).ngroup().to_numpy()


def _captions(tiles, texts):
    return [texts(row) for _, row in tiles.iterrows()]
