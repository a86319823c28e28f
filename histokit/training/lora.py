"""LoRA: a small change to the UNet, learned from the tiles of one class or of all rare classes together; or all of the UNet.

Hu et al. (2021), arXiv:2106.09685. One adapter shared by the classes is the default: captions tell them apart, and each
class lends the others what all tissue has in common. With `joint` the tokens are trained in the same steps (pivotal
tuning). With captions of their own (`captions`), tiles are called what these say. `adapters` writes and reads the result.
"""

from dataclasses import dataclass

from histokit.core import files
from histokit.diffusion import adapters, backbone, latents, learned_tokens, prompting
from histokit.training import finetuning, settings

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Finetuning):
    """What can be turned of a LoRA, beside what every fine-tuning has.

    Args:
        mode: `lora`, or `full`, which trains every weight of the UNet.
        joint: train tokens as well: those given, and new ones of `n_vectors` for classes that have none.
        rank: of each update.
        alpha: update scale times rank; None means alpha = rank.
        targets: "attention", "attention+feedforward" or "attention+conv"; `dora` takes about twice the time.
        token_lr: step size of the vectors, as `lr` is of the LoRA; no weight decay on them.
        prompt: caption with {label}, and {group} where tiles have one.
    """

    mode: str = "lora"
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
        if self.mode not in ("lora", "full"):
            raise ValueError(f"mode is {self.mode!r}; use lora or full")

    @classmethod
    def of(cls, given):
        """As of every fine-tuning; the weights of all sheets are kept where they are few."""
        return super().of({"keep": given.get("mode", cls.mode) == "lora", **given})

    def identity(self):
        """What a resumed run is compared by; `mode` came later."""
        return {name: value for name, value in super().identity().items() if name != "mode" or value != "lora"}


def train(model, tiles, terms, *, seed, folder=None, tokens=None, captions=None, new_words=None, **options):
    """Learn a LoRA on the UNet, or all of it, and with `joint` the tokens of the classes too.

    Args:
        model: backbone.Model without adapters; gets them.
        tiles: training tiles of the classes (`data.training`).
        terms: {class name: words for it}: what captions call a class without a token, and what a new token starts from.
        folder: where checkpoints and sample sheets go; None keeps none.
        tokens: {class name: (placeholder, rows [n, D])} learned before (`adapters.read_tokens`); frozen unless `joint`.
        captions: DataFrame tile_id, text, weight, cluster, one row a tile: what tiles are called, in the place of `prompt` and tokens, and
            how often each is drawn; a tile that has none, or weight 0, is left out.
        new_words: {placeholder: {"start": words its vectors start from, "vectors": how many}} of words in captions that are to be learned.
        options: by name, what `Settings` and `settings.Loop` have; ValueError for another name.

    Returns:
        ({class name: placeholder or ""}, learned_tokens.Tokens or None, history DataFrame; with captions, `attrs["rows"]` are those of the
        sample sheets).
    """
    how, training = Settings.of(options)
    tiles, joint = finetuning.of_classes(model, tiles, terms), how.joint and captions is None
    if captions is not None:
        tiles = finetuning.captioned(tiles, captions)
        if tokens:
            raise ValueError("captions say what tiles are called, so tokens of classes have no place in them; leave `tokens` out")
    given = {name: held for name, held in (tokens or {}).items() if name in terms}
    classes = {name: given[name][0] if name in given else learned_tokens.placeholder(name) if joint else "" for name in terms}
    fresh = {name: learned_tokens.initial_rows(model, word["start"], word["vectors"]) for name, word in (new_words or {}).items()}
    initial = dict(given.values()) | fresh
    if joint:
        initial |= {classes[name]: terms[name] for name in terms if name not in given}
    words = learned_tokens.add_tokens(model, initial, how.n_vectors) if initial else None
    full = how.mode == "full"
    weights = adapters.all_weights(model) if full else adapters.add_lora(model, how.rank, how.alpha, how.targets, how.dora, seed)
    groups, moved = [{"params": weights, "lr": how.lr}], joint or bool(new_words)
    if moved:
        groups.append({"params": [words.parameter], "lr": how.token_lr, "weight_decay": 0.0})
    called = {name: classes[name] or terms[name] for name in terms}
    of_tile = {} if captions is None else dict(zip(captions["tile_id"], captions["text"], strict=True))

    def texts(row):
        if of_tile:
            return [of_tile[row["tile_id"]]]
        return [prompting.caption(how.prompt, called[row["label"]], prompting.group_words(how.group_terms, row["group"]))]

    def encode(prompts):
        return backbone.embed(model, prompts)

    identity = {"method": "lora", "terms": terms, "classes": classes, "tokens": learned_tokens.digest_rows(words)}
    identity |= {"captions": files.digest(sorted(of_tile.items()), captions["weight"].tolist())} if of_tile else {}
    rows = finetuning.shown(tiles, of_tile) if of_tile else [prompting.caption(how.prompt, word) for word in called.values()]
    history = finetuning.run(
        model, how.mode, groups, encode if moved else latents.Prompts(model), tiles, texts, how, training, seed=seed, folder=folder,
        identity=identity, drawn=captions if of_tile else None,
        prompts=rows,
    )  # fmt: skip
    history.attrs |= {"rows": rows} if of_tile else {}
    return classes, words, history
