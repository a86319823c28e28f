"""LoRA: a small change to the UNet, learned from the tiles of one class or of all rare classes together.

Hu et al. (2021), arXiv:2106.09685. One adapter shared by the classes is the default: captions tell them apart, and each
class lends the others what all tissue has in common. With `joint` the tokens are trained in the same steps (pivotal
tuning). `adapters` writes and reads the result.
"""

from dataclasses import dataclass

from histokit.diffusion import adapters, backbone, latents, learned_tokens, prompting
from histokit.training import finetuning, settings

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Finetuning):
    """What can be turned of a LoRA, beside what every fine-tuning has.

    Args:
        joint: train tokens as well: those given, and new ones of `n_vectors` for classes that have none.
        rank: of each update.
        alpha: update scale times rank; None means alpha = rank.
        targets: "attention", "attention+feedforward" or "attention+conv"; `dora` takes about twice the time.
        token_lr: step size of the vectors, as `lr` is of the LoRA; no weight decay on them.
        prompt: caption with {label}, and {group} where tiles have one.
    """

    joint: bool = False
    rank: int = 16
    alpha: float | None = None
    targets: str = "attention+conv"
    dora: bool = False
    token_lr: float = 2e-3
    prompt: str = prompting.TEMPLATES[0]

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "alpha", self.alpha or self.rank)


def train(model, tiles, terms, *, seed, folder=None, tokens=None, **options):
    """Learn a LoRA on the UNet, and with `joint` the tokens of the classes too.

    Args:
        model: backbone.Model without adapters; gets them.
        tiles: training tiles of the classes (`data.training`).
        terms: {class name: words for it}: what captions call a class without a token, and what a new token starts from.
        folder: where checkpoints and sample sheets go; None keeps none.
        tokens: {class name: (placeholder, rows [n, D])} learned before (`adapters.read_tokens`); frozen unless `joint`.
        options: by name, what `Settings` and `settings.Loop` have; ValueError for another name.

    Returns:
        ({class name: placeholder or ""}, learned_tokens.Tokens or None, history DataFrame).
    """
    how, training = Settings.of(options)
    tiles = finetuning.of_classes(model, tiles, terms)
    given = {name: held for name, held in (tokens or {}).items() if name in terms}
    initial = dict(given.values())
    classes = {name: given[name][0] if name in given else learned_tokens.placeholder(name) if how.joint else "" for name in terms}
    if how.joint:
        initial |= {classes[name]: terms[name] for name in terms if name not in given}
    words = learned_tokens.add_tokens(model, initial, how.n_vectors) if initial else None
    groups = [{"params": adapters.add_lora(model, how.rank, how.alpha, how.targets, how.dora, seed), "lr": how.lr}]
    if how.joint:
        groups.append({"params": [words.parameter], "lr": how.token_lr, "weight_decay": 0.0})
    called = {name: classes[name] or terms[name] for name in terms}

    def texts(row):
        return [prompting.caption(how.prompt, called[row["label"]], prompting.group_words(how.group_terms, row["group"]))]

    def encode(prompts):
        return backbone.embed(model, prompts)

    history = finetuning.run(
        model, "lora", groups, encode if how.joint else latents.Prompts(model), tiles, texts, how, training, seed=seed, folder=folder,
        identity={"method": "lora", "terms": terms, "classes": classes, "tokens": learned_tokens.digest_rows(words)},
        prompts=[prompting.caption(how.prompt, word) for word in called.values()],
    )  # fmt: skip
    return classes, words, history
