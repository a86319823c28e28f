"""Textual inversion: a new word for a class, learned from a few tiles of it.

Gal et al. (2022), arXiv:2208.01618. Only the new rows of the token embedding are trained, everything else is frozen. The
word then goes into prompts like any other; `adapters` writes and reads it.
"""

from dataclasses import dataclass

from histokit.diffusion import backbone, learned_tokens, prompting
from histokit.training import finetuning, settings

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Finetuning):
    """What can be turned of an inversion, beside what every fine-tuning has; no weight decay on the vectors.

    Args:
        start: "spread" or "mean", see `learned_tokens.initial_rows`.
        fixed_norm: train directions only and keep each vector at its initial length.
        templates: captions with {label}, and {group} where tiles have one; each draw takes one of them.
    """

    lr: float = 2e-3
    caption_dropout: float = 0.0
    start: str = "spread"
    fixed_norm: bool = False
    templates: tuple = prompting.TEMPLATES

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "templates", tuple(self.templates))


def train(model, tiles, phrases, *, seed, folder=None, **options):
    """Learn one token, of one or more vectors, for each class.

    Args:
        model: backbone.Model; gets the tokens.
        tiles: training tiles of those classes (`data.training`).
        phrases: {class name: words the vectors start from}, such as {"MUC": "mucinous tissue"}.
        folder: where checkpoints and sample sheets go; None keeps none.
        options: by name, what `Settings` and `settings.Loop` have; ValueError for another name.

    Returns:
        ({class name: placeholder}, learned_tokens.Tokens, history DataFrame).
    """
    how, training = Settings.of(options)
    tiles = finetuning.of_classes(model, tiles, phrases)
    classes = {name: learned_tokens.placeholder(name) for name in phrases}
    initial = {classes[name]: words for name, words in phrases.items()}
    tokens = learned_tokens.add_tokens(model, initial, how.n_vectors, how.start, how.fixed_norm)

    def texts(row):
        group = prompting.group_words(how.group_terms, row["group"])
        return [prompting.caption(template, classes[row["label"]], group) for template in how.templates]

    def embed(prompts):
        return backbone.embed(model, prompts)

    history = finetuning.run(
        model, "tokens", [{"params": [tokens.parameter], "lr": how.lr, "weight_decay": 0.0}], embed, tiles, texts, how, training,
        seed=seed, folder=folder, identity={"method": "inversion", "phrases": phrases},
        prompts=[prompting.caption(how.templates[0], token) for token in classes.values()],
    )  # fmt: skip
    return classes, tokens, history
