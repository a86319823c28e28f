"""LoRA: a small change to the UNet, learned from the tiles of one class or of all rare classes together.

Hu et al. (2021), arXiv:2106.09685. One adapter shared by the classes is the default: captions tell them apart, and each
class lends the others what all tissue has in common. With `joint` the tokens are trained in the same steps (pivotal
tuning). `adapters` writes and reads the result.
"""

from histokit.diffusion import adapters, backbone, latents, prompting
from histokit.training import finetuning, loop

VERSION = 2


def train(
    model,
    tiles,
    terms,
    *,
    seed,
    folder=None,
    tokens=None,
    joint=False,
    n_vectors=4,
    rank=16,
    alpha=None,
    targets="attn",
    dora=False,
    steps=1000,
    lr=1e-4,
    token_lr=2e-3,
    batch_size=8,
    prompt=prompting.TEMPLATES[0],
    group_terms=None,
    balance="class+group",
    caption_dropout=0.1,
    min_snr_gamma=5.0,
    loss="l2",
    hold_out=0.125,
    **options,
):
    """Learn a LoRA on the UNet, and with `joint` the tokens of the classes too.

    Args:
        model: backbone.Model without adapters; gets them.
        tiles: training tiles of the classes (`data.training`).
        terms: {class name: words for it}: what captions call a class without a token, and what a new token starts from.
        folder: where checkpoints and sample sheets go; None keeps none.
        tokens: {class name: (placeholder, rows [n, D])} learned before (`adapters.read_tokens`); frozen unless `joint`.
        joint: train tokens as well: those given, and new ones of `n_vectors` for classes that have none.
        alpha: update scale times rank; None means alpha = rank.
        targets: "attn", "attn+ff" or "attn+conv"; `dora` takes about twice the time.
        lr, token_lr: step sizes of LoRA and vectors; no weight decay on the vectors.
        prompt: caption with {label}, and {group} where tiles have one; `group_terms` say what to call them, else their own names do.
        caption_dropout: share of empty captions, which keep the unconditional branch in step with the rest.
        loss: "l2", or "l1" of the denoising error.
        options: for `loop.fit`, such as `ema` or `checkpoint_every`.

    Returns:
        ({class name: placeholder or ""}, adapters.Tokens or None, history DataFrame).
    """
    missing = sorted(set(terms) - set(tiles["label"]))
    if missing or not terms:
        raise ValueError(f"no training tile of {', '.join(missing) or 'any class'}; check class and split")
    model.need("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    tiles = tiles[tiles["label"].isin(list(terms))]
    given = {name: held for name, held in (tokens or {}).items() if name in terms}
    initial = {given[name][0]: given[name][1] for name in given}
    classes = {name: given[name][0] if name in given else adapters.placeholder(name) if joint else "" for name in terms}
    if joint:
        initial |= {classes[name]: terms[name] for name in terms if name not in given}
    words = adapters.add_tokens(model, initial, n_vectors) if initial else None
    params = adapters.add_lora(model, rank, alpha, targets, dora, seed)
    learn, held = finetuning.hold_out(tiles, hold_out, seed)

    def texts(row):
        word = classes[row["label"]] or terms[row["label"]]
        return [prompting.caption(prompt, word, prompting.group_words(group_terms, row["group"]))]

    def encode(prompts):
        return backbone.embed(model, prompts)

    embed = encode if joint else latents.Prompts(model)
    settings = {
        "method": "lora", "terms": terms, "classes": classes, "joint": joint, "n_vectors": n_vectors, "rank": rank, "alpha": alpha or rank,
        "targets": targets, "dora": dora, "lr": lr, "token_lr": token_lr, "batch_size": batch_size, "prompt": prompt,
        "group_terms": group_terms or {}, "balance": balance, "caption_dropout": caption_dropout, "min_snr_gamma": min_snr_gamma,
        "loss": loss, "tokens": adapters.digest_rows(words),
    }  # fmt: skip
    groups = [{"params": params, "lr": lr}]
    if joint:
        groups.append({"params": [words.parameter], "lr": token_lr, "weight_decay": 0.0})
    trained = [p for group in groups for p in group["params"]]
    for p in trained:
        p.requires_grad_(True)
    try:
        error = finetuning.loss(model, embed, caption_dropout=caption_dropout, min_snr_gamma=min_snr_gamma, kind=loss)
        history = finetuning.run(
            model, [loop.Player("lora", groups, error)], embed, learn, texts, steps=steps, seed=seed, folder=folder,
            batch_size=batch_size, balance=balance, settings=settings, held=held, kind=loss,
            prompts=[prompting.caption(prompt, classes[name] or terms[name]) for name in terms], **options,
        )  # fmt: skip
    finally:
        for p in trained:
            p.requires_grad_(False)
    return classes, words, history
