"""Textual inversion: a new word for a class, learned from a few tiles of it.

Gal et al. (2022), arXiv:2208.01618. Only the new rows of the token embedding are trained, everything else is frozen. The
word then goes into prompts like any other; `adapters` writes and reads it.
"""

from histokit.diffusion import adapters, backbone, prompting
from histokit.training import finetuning, loop

VERSION = 2


def train(
    model,
    tiles,
    phrases,
    *,
    seed,
    folder=None,
    n_vectors=4,
    start="spread",
    fixed_norm=False,
    steps=1000,
    lr=2e-3,
    batch_size=8,
    templates=prompting.TEMPLATES,
    group_terms=None,
    balance="class+group",
    caption_dropout=0.0,
    min_snr_gamma=5.0,
    loss="l2",
    hold_out=0.125,
    **options,
):
    """Learn one token, of one or more vectors, for each class.

    Args:
        model: backbone.Model; gets the tokens.
        tiles: training tiles of those classes (`data.training`).
        phrases: {class name: words the vectors start from}, such as {"MUC": "mucinous tissue"}.
        folder: where checkpoints and sample sheets go; None keeps none.
        n_vectors: vectors per token; each takes one of the prompt's 77 places.
        start: "spread" or "mean", see `adapters.initial_rows`.
        lr: step size as it is used, never scaled by batch or devices; no weight decay on the vectors.
        templates: prompts with {label}, and {group} where tiles have one; `group_terms` say what to call them, else their own names do.
        hold_out: share of a class's training cases whose loss picks the best step, where it has twenty tiles or more.
        loss: "l2", or "l1" of the denoising error.
        options: for `loop.fit`, such as `ema` or `checkpoint_every`.

    Returns:
        ({class name: placeholder}, adapters.Tokens, history DataFrame).
    """
    missing = sorted(set(phrases) - set(tiles["label"]))
    if missing or not phrases:
        raise ValueError(f"no training tile of {', '.join(missing) or 'any class'}; check class and split")
    model.need("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    tiles = tiles[tiles["label"].isin(list(phrases))]
    classes = {name: adapters.placeholder(name) for name in phrases}
    tokens = adapters.add_tokens(model, {classes[name]: words for name, words in phrases.items()}, n_vectors, start, fixed_norm)
    learn, held = finetuning.hold_out(tiles, hold_out, seed)

    def texts(row):
        group = prompting.group_words(group_terms, row["group"])
        return [prompting.caption(template, classes[row["label"]], group) for template in templates]

    def embed(prompts):
        return backbone.embed(model, prompts)

    settings = {
        "method": "inversion", "phrases": phrases, "n_vectors": n_vectors, "start": start, "fixed_norm": fixed_norm, "lr": lr,
        "batch_size": batch_size, "templates": list(templates), "group_terms": group_terms or {}, "balance": balance,
        "caption_dropout": caption_dropout, "min_snr_gamma": min_snr_gamma, "loss": loss,
    }  # fmt: skip
    tokens.parameter.requires_grad_(True)
    try:
        error = finetuning.loss(model, embed, caption_dropout=caption_dropout, min_snr_gamma=min_snr_gamma, kind=loss)
        player = loop.Player("tokens", [{"params": [tokens.parameter], "lr": lr, "weight_decay": 0.0}], error)
        history = finetuning.run(
            model, [player], embed, learn, texts, steps=steps, seed=seed, folder=folder, batch_size=batch_size, balance=balance,
            settings=settings, held=held, kind=loss, **options,
            prompts=[prompting.caption(templates[0], token) for token in classes.values()],
        )  # fmt: skip
    finally:
        tokens.parameter.requires_grad_(False)
    return classes, tokens, history
