"""Learned tokens: new words in a text encoder, and the rows of its embedding that are trained for them.

They are put in here; `adapters` writes, reads and takes them out again, `training.textual_inversion` trains them.
"""

import copy
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from histokit.core import files

VERSION = 1
PLACEHOLDER = re.compile(r"<[a-z0-9]+(-[a-z0-9]+)*>")


class TokenTable(nn.Module):
    """The text encoder's token embedding with rows of its own for new ids; the table below them is never written."""

    def __init__(self, table, tokenizer):
        super().__init__()
        self.table, self.first_id = table, len(tokenizer)
        self.tokenizer = tokenizer  # as it was, for `unload`
        self.blocks, self.norms = nn.ParameterList(), []

    @property
    def weight(self):
        return self.table.weight

    def rows(self, k):
        """Rows [n, D] of block k as the encoder sees them, held at a fixed norm where that was asked for."""
        block, norm = self.blocks[k], self.norms[k]
        return block if norm is None else F.normalize(block, dim=-1) * norm

    def forward(self, ids):
        rows = torch.cat([self.rows(k) for k in range(len(self.blocks))]).to(self.table.weight.dtype)  # [n, D]
        new = ids >= self.first_id
        old = self.table(ids.masked_fill(new, 0))  # [B, L, D]
        # not rows[...]: its gradient adds up what falls on one row in whatever order the threads arrive, and no run would repeat another
        return torch.where(new[..., None], F.embedding((ids - self.first_id).clamp(min=0), rows), old)


@dataclass
class Tokens:
    """Tokens added together: `parameter` [sum of vectors, D] is what inversion trains."""

    counts: dict  # placeholder -> number of vectors
    table: TokenTable
    block: int

    @property
    def parameter(self):
        return self.table.blocks[self.block]

    def vectors(self):
        """{placeholder: [n, D] float32 on the CPU}, as they are saved."""
        rows = self.table.rows(self.block).detach().float().cpu()
        return dict(zip(self.counts, rows.split(list(self.counts.values())), strict=True))


def placeholder(class_name):
    """The token of a class: lower case and in brackets, because CLIP folds case and stock diffusers replaces text."""
    return f"<hk-{files.slug(class_name)}>"


def initial_rows(model, phrase, n_vectors, how="spread"):
    """Rows [n_vectors, D] to start from, out of the words of any phrase.

    Args:
        phrase: text, such as the name of the class; its tokens' embeddings are the material.
        how: "mean" gives every vector the mean of the phrase; "spread" deals the tokens out in order, each vector the mean
            of its share (repeating tokens when there are fewer than vectors).
    """
    if how not in ("mean", "spread"):
        raise ValueError(f"initialiser {how!r} is unknown; use mean or spread")
    ids = model.tokenizer(phrase, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the initialiser {phrase!r} has no token; give a word or a phrase such as 'mucinous tissue'")
    table = model.text_encoder.get_input_embeddings()
    with torch.no_grad():
        words = table(torch.tensor(ids, device=model.device)[None])[0].float()  # [m, D]
    if how == "mean":
        return words.mean(0, keepdim=True).repeat(n_vectors, 1)
    if len(words) < n_vectors:
        return words[torch.arange(n_vectors) % len(words)]
    return torch.stack([share.mean(0) for share in words.tensor_split(n_vectors)])


def add_tokens(model, initial, n_vectors=1, how="spread", fixed_norm=False):
    """Give `model` new tokens and return what can be trained of them.

    Args:
        model: backbone.Model; its tokenizer is replaced by an extended copy, its token embedding wrapped.
        initial: {placeholder: phrase to start from, or tensor [n, D]}.
        n_vectors: vectors of each token that starts from a phrase.
        how: "spread" or "mean", see `initial_rows`.
        fixed_norm: train directions only and keep each vector at its initial length.

    Returns:
        Tokens, with `parameter` float32 that requires no gradient yet.

    Raises ValueError for a placeholder that is not like `<hk-name>`, or that the vocabulary already holds.
    """
    model.need("tokenizer", "text_encoder")
    rows = {}
    for name, start in initial.items():
        if not PLACEHOLDER.fullmatch(name):
            raise ValueError(f"placeholder {name!r} must be lower case, in brackets, of letters, digits and '-', such as '<hk-mucinous>'")
        rows[name] = start.detach().float() if torch.is_tensor(start) else initial_rows(model, start, n_vectors, how)
        if rows[name].ndim != 2 or rows[name].shape[1] != model.text_encoder.config.hidden_size:
            raise ValueError(f"{name}: rows {list(rows[name].shape)} do not fit a text width of {model.text_encoder.config.hidden_size}")
    names = {name: [name] + [f"{name}_{k}" for k in range(1, len(block))] for name, block in rows.items()}
    pieces = [piece for group in names.values() for piece in group]
    taken = sorted(set(pieces) & set(model.tokenizer.get_vocab()))
    if taken:
        raise ValueError(f"the vocabulary already holds {', '.join(taken)}; unload the adapter that brought it, or rename the class")

    before, tokenizer = len(model.tokenizer), copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens(pieces)
    for group in names.values():  # what the prompt will really contain, not what was asked for
        got, want = tokenizer(" ".join(group), add_special_tokens=False)["input_ids"], [before + pieces.index(p) for p in group]
        if got != want:
            raise ValueError(f"{group[0]!r} reads as token ids {got}, expected {want}; choose another class name")
    table = model.text_encoder.get_input_embeddings()
    if not isinstance(table, TokenTable):
        table = TokenTable(table, model.tokenizer)
        model.text_encoder.set_input_embeddings(table)
    block = torch.cat(list(rows.values())).to(model.device)
    table.blocks.append(nn.Parameter(block.clone(), requires_grad=False))
    table.norms.append(block.norm(dim=-1, keepdim=True) if fixed_norm else None)
    model.tokenizer = tokenizer
    model.placeholders = {**model.placeholders, **names}
    return Tokens({name: len(block) for name, block in rows.items()}, table, len(table.blocks) - 1)


def digest_rows(tokens):
    """Hash of Tokens as they stand, "" for None."""
    return files.digest({name: rows.tolist() for name, rows in tokens.vectors().items()})[:16] if tokens else ""
