"""Captions: what a tile is called once its cluster is known, as a table that nobody has to parse back.

A prompt is a row {prompt_id, label, cluster, text}; a caption names a tile's prompt. Osorio et al. (2024), arXiv:2312.09792, spell the
number of a cluster out; letters, digits, a learned word or a person's own words do as well.
"""

import numpy as np
import pandas as pd
import torch

from histokit.core import files
from histokit.diffusion import backbone, learned_tokens, prompting

VERSION = 1
STYLES = {
    "number_words": "the number in words: twenty-one",
    "digits": "the number: 21",
    "letters": "letters, as a spreadsheet counts its columns: v",
    "learned": "a word of its own, which the fine-tuning learns: <hk-form-21>",
    "descriptors": "a person's words for it, and the number in words where there are none",
}
NONE = -1  # the cluster of a prompt that names none
COLUMNS = ["prompt_id", "label", "cluster", "text", "tiles"]
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n):
    """An integer from 0 to 999 in English: 0 is zero, 32 thirty-two, 101 one hundred one."""
    if not 0 <= n < 1000:
        raise ValueError(f"{n} clusters have no words here; use words: digits")
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{SMALL[n % 10]}" if n % 10 else "")
    return f"{SMALL[n // 100]} hundred" + (f" {number_words(n % 100)}" if n % 100 else "")


def letters(n):
    """0 is a, 25 z, 26 aa."""
    text = chr(ord("a") + n % 26)
    return letters(n // 26 - 1) + text if n >= 26 else text


def words(clusters, style, names=None):
    """How each cluster is called: {(class or ALL, cluster): words}.

    Args:
        clusters: clusters.Clusters; of scope hierarchical, "family two, subtype one".
        style: see `STYLES`.
        names: {(class or ALL, cluster): a person's words}, for `descriptors`.
    """
    if style not in STYLES:  # descriptors without names are numbers in words
        raise ValueError(f"words is {style!r}; use {', '.join(STYLES)}")
    say = {"digits": str, "letters": letters}.get(style, number_words)
    found = {}
    for key, centroids in clusters.centroids.items():
        for k in range(len(centroids)):
            if style == "learned":
                found[key, k] = f"<hk-form-{files.slug(key)}-{k}>" if key else f"<hk-form-{k}>"
            elif style == "descriptors" and (key, k) in (names or {}):
                found[key, k] = names[key, k]
            elif clusters.families is not None:
                family = int(clusters.families[k])
                found[key, k] = f"family {say(family)}, subtype {say(int((clusters.families[:k] == family).sum()))}"
            else:
                found[key, k] = say(k)
    return found


def prompts(labels, cluster, called, terms, template):
    """The prompts of captioned tiles, in alphabetical order of their texts, and the place [N] of each tile's own among them.

    Args:
        labels: N class names. cluster: [N] int.
        called: `called(label, cluster)` -> words, in the place of {cluster}.
        terms: {class: words for it}, in the place of {label}.
        template: without {cluster}, a prompt per class: the arm that captions are compared with.

    Returns:
        DataFrame prompt_id (from 0), label, cluster (`NONE` where the template names none), text, tiles (how many); prompt_id [N].

    Raises ValueError where two prompts read the same.
    """
    if "{label}" not in template:
        raise ValueError(f"the prompt {template!r} has no {{label}}; write for example 'a histology image of {{label}}, type {{cluster}}'")
    asked = np.asarray(cluster) if "{cluster}" in template else np.full(len(labels), NONE)
    pairs = pd.DataFrame({"label": list(labels), "cluster": asked})
    table = pairs.groupby(["label", "cluster"], as_index=False, sort=True).size().rename(columns={"size": "tiles"})
    table["text"] = [
        prompting.caption(template, terms[row.label]).replace("{cluster}", called(row.label, row.cluster) if row.cluster != NONE else "")
        for row in table.itertuples()
    ]
    same = table[table["text"].str.lower().duplicated(keep=False)]
    if len(same):
        raise ValueError(
            f"{', '.join(f'{row.label} {row.cluster}' for row in same.itertuples())} all read {same['text'].iloc[0]!r}; "
            "give classes other words (`terms` in the description) or clusters other names"
        )
    table = table.sort_values("text", kind="stable").reset_index(drop=True)
    table["prompt_id"] = np.arange(len(table))
    ids = pairs.merge(table[["label", "cluster", "prompt_id"]], how="left", on=["label", "cluster"])["prompt_id"].to_numpy()
    return table[COLUMNS], ids


def gathered(held, cluster, feats, labels, least):
    """Clusters [N] with none of a class that has fewer than `least` of its tiles: these go to the nearest that has, else to its largest.

    A prompt of one tile teaches that tile. Where a class has too few tiles for two clusters, it has one.

    Args:
        held: clusters.Clusters. cluster: [N] int, from its `assign`. feats: [N, D]. labels: N class names.
    """
    points, labels, out = held.space(feats), np.asarray(labels, dtype=object), np.array(cluster)
    for name in dict.fromkeys(labels):
        mine = np.flatnonzero(labels == name)
        count = np.bincount(out[mine], minlength=len(held.centroids[held.of(name)]))
        large = np.flatnonzero(count >= least) if (count >= least).any() else count.argmax()[None]
        small = mine[~np.isin(out[mine], large)]
        apart = np.linalg.norm(points[small][:, None] - held.centroids[held.of(name)][large][None], axis=-1)  # [n, large]
        out[small] = large[apart.argmin(axis=1)] if len(small) else out[small]
    return out


def shuffled(cluster, labels, seed=0):
    """Clusters [N] dealt anew among the tiles of each class: the control of captions, whose words then say nothing of a tile's form."""
    labels, out = np.asarray(labels, dtype=object), np.array(cluster)
    for name in dict.fromkeys(labels):
        mine = np.flatnonzero(labels == name)
        out[mine] = out[mine][files.shuffled(range(len(mine)), seed, name, "forms")]
    return out


def moved(cluster, counted, labels, least):
    """A sentence where tiles count for another cluster than the one they lie in, see `gathered`."""
    other = np.asarray(cluster) != np.asarray(counted)
    if other.any():
        pairs = set(zip(np.asarray(labels)[other].tolist(), np.asarray(cluster)[other].tolist(), strict=True))
        yield (
            f"{other.sum()} of {len(other)} tiles lie in a cluster that has fewer than {least} of their class ({len(pairs)} such pairs): "
            "they count for the nearest that has more. `options: {least: ...}` sets the number."
        )


def table(tiles, cluster, ids, prompts):
    """One row for each tile: tile_id, prompt_id, text, cluster (that it counts for, also where its prompt names none)."""
    text = prompts.set_index("prompt_id")["text"].reindex(ids).to_numpy()
    return pd.DataFrame({"tile_id": tiles["tile_id"].to_numpy(), "prompt_id": ids, "text": text, "cluster": np.asarray(cluster)})


def refuse_alike(model, texts):
    """Raises ValueError where the text encoder of `model` would read two texts as the same tokens, or not to the end.

    Words that are still to be learned count as one token each, and as different ones.
    """
    known, spared = {}, [learned_tokens.PLACEHOLDER.sub("x", text) for text in texts]
    rows = backbone.token_ids(model, spared).tolist()
    for text, row in zip(texts, rows, strict=True):
        key = (tuple(row), tuple(found.group() for found in learned_tokens.PLACEHOLDER.finditer(text)))
        if key in known:
            raise ValueError(f"the text encoder reads {text!r} and {known[key]!r} as the same tokens; use other words (`words`, or names)")
        known[key] = text


def new_words(clusters, called, terms, label_vectors=0):
    """The words that captions want learned: {placeholder: {"start": words its vectors start from, "vectors": how many}}.

    Args:
        clusters: clusters.Clusters. called: of `words`; a learned word of a cluster is one vector, and starts from its number.
        terms: {class: words for it}; with `label_vectors` each class gets a word of its own beside these, see `class_words`.
    """
    found = {
        word: {"start": number_words(k), "vectors": 1} for (_, k), word in called.items() if learned_tokens.PLACEHOLDER.fullmatch(word)
    }
    return found | {_class_word(name): {"start": term, "vectors": label_vectors} for name, term in terms.items() if label_vectors}


def class_words(terms, label_vectors=0):
    """How captions call each class: its words, and with `label_vectors` a learned word of so many vectors after them."""
    return {name: f"{term} {_class_word(name)}" if label_vectors else term for name, term in terms.items()}


def _class_word(name):
    return f"<hk-class-{files.slug(name)}>"


NEAR = 0.25  # of the usual distance between classes, below which forms of one class are hardly told apart


def apart(model, prompts):
    """How far the text encoder holds captions of one class from each other: nearest pair of a class over the median pair of classes.

    Where there is one class alone, over the median distance to the empty caption.

    That of mini holds `type two` and `type zero` at a seventh of the distance between its two nearest classes, digits at a twenty-fifth.
    What is near cannot be learned apart by the denoiser alone, so any other text encoder is to be asked first.

    Args:
        prompts: of `prompts`; words that are still to be learned are looked at as they start, by number.

    Returns:
        DataFrame class, nearest (ratio, lower is nearer), pair (the two texts); one row for each class of two prompts or more.
    """
    texts = [learned_tokens.PLACEHOLDER.sub("x", text) for text in prompts["text"]]
    with torch.no_grad():
        held, empty = (backbone.embed(model, some).flatten(1).float().cpu() for some in (texts, [""]))
    far, label = torch.cdist(held, held).numpy(), prompts["label"].to_numpy()
    between = far[label[:, None] != label[None]]
    if not len(between):  # one class: how far its captions lie from the empty one
        between = torch.cdist(held, empty).numpy()
    rows, usual = [], float(np.median(between))
    for name in dict.fromkeys(label):
        mine = np.flatnonzero(label == name)
        if len(mine) < 2 or not usual > 0:
            continue
        inner = far[np.ix_(mine, mine)] + np.diag(np.full(len(mine), np.inf))
        i, j = np.unravel_index(inner.argmin(), inner.shape)
        rows.append({"class": name, "nearest": inner.min() / usual, "pair": " | ".join(prompts["text"].iloc[mine[[i, j]]])})
    return pd.DataFrame(rows, columns=["class", "nearest", "pair"])


def near(found, style):
    """A sentence where captions of a class are nearer to each other than can be learned, see `apart`."""
    close = found[found["nearest"].lt(NEAR)]
    if len(close) and style != "learned":
        worst = close.loc[close["nearest"].idxmin()]
        yield (
            f"THE TEXT ENCODER HARDLY TELLS THESE APART: in {len(close)} of {len(found)} classes two captions lie within {NEAR:.0%} of "
            f"what tells classes apart, the nearest at {worst['nearest']:.1%} ({worst['pair']}). What reads alike is made alike; "
            "`words: learned` gives every form a word of its own."
        )
