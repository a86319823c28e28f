"""Which real tile each new image starts from, and what its prompt asks for: one row per image, before any is made.

Tables in, a table out. The two kinds of transfer stay apart by name: `same_class`, `diverse` and `majority_to_minority` keep
the label of their source, `cross_class` and `nearest` take it from the prompt alone; `nearest` with minority groups is
`majority_to_minority`, most alike first.
"""

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.diffusion import adapters, prompting, sampling
from histokit.tiles import data, staining

VERSION = 2

POLICIES = {
    "same_class": "tiles of the class itself, all equally often",
    "diverse": "tiles of the class itself, those that differ most first",
    "cross_class": "tiles of other (head) classes; the label comes from the prompt alone, so 05_select must check it",
    "nearest": "tiles of other classes that look most like this one; with minority groups, majority tiles of the class that look most so",
    "majority_to_minority": "tiles of the class in a majority group; the prompt asks for a minority group",
    "none": "no source: text-to-image",
}
STAINS = {
    "own": "each source as it is",
    "head": "sources in the stains of cases of the head classes",
    "all": "sources in the stains of all other training cases",
}
LEAST = 0.6  # strength below which a tile of another class stays too much what it was for its label to come from the words
SETTINGS = ("strength", "guidance_scale", "num_inference_steps")
COLUMNS = [
    "job", "tile_id", "stain", "stain_method", "source_class", "source_group", "class", "target_group", "prompt", *SETTINGS, "true_steps",
    "number", "seed", "policy", "lora_sha", "token_sha",
]  # fmt: skip


def job_table(
    model,
    tiles,
    terms,
    num_images,
    *,
    policy="same_class",
    prompt=prompting.TEMPLATES[0],
    strength=0.5,
    guidance_scale=2.0,
    num_inference_steps=25,
    seed=0,
    fill_to=0,
    head=(),
    majority=(),
    minority=(),
    group_terms=None,
    embed=None,
    stains="own",
    stain_method="macenko",
):
    """One row per image to make; the first n rows of a class are the same whatever `num_images` is.

    Args:
        model: backbone.Model, with its adapters loaded.
        tiles: manifest (`data.load`); only labelled real tiles of the training part become sources.
        terms: {class name: words for it} of the classes to make; a learned token takes the place of the words.
        num_images: images per class; with `fill_to`, as many as bring a class to that many real and synthetic tiles.
        policy: see `POLICIES`.
        prompt: with {label}, and {group} for the group of the source or, in majority_to_minority, the one asked for; with policy none it
            may be empty, for a base that was trained without text.
        head: classes that lend their tiles in cross_class and nearest, and their stains; () means all others.
        majority, minority: groups; majority () means all that are not minority.
        group_terms: {group: words for it}, the group itself where there are none.
        embed: `embed(rows)` -> [n, D], for diverse and nearest.
        stains: see `STAINS`; each time a tile is used it wears the stain of another case, and a {group} in the prompt is the group of
            that case. stain_method: see `staining.METHODS`.

    Returns:
        DataFrame job, tile_id (source), stain (case whose stain it wears, "" for its own), stain_method, source_class, source_group, class,
        target_group, prompt, strength, guidance_scale, num_inference_steps, true_steps, number, seed, policy, lora_sha, token_sha.
    """
    strength = 1.0 if policy == "none" else float(strength)
    transfer = policy == "majority_to_minority" or (policy == "nearest" and bool(minority))
    _check(model, policy, prompt, strength, minority, transfer)
    if strength:
        sampling.schedule(model.scheduler, num_inference_steps, strength)
    real = data.training(tiles)
    restain, donors, groups = _donors(real, policy, stains, stain_method, list(head))
    steps, rows = sampling.true_steps(num_inference_steps, strength), []
    settings = {"strength": strength, "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, "true_steps": steps}
    for name, term in terms.items():
        own = real[real["label"].eq(name)]
        count = max(0, fill_to - len(own)) if fill_to else num_images
        pool = _pool(real, own, name, policy, list(head), list(majority), list(minority))
        order = _order(pool, own, policy, embed, list(minority)) if len(pool) else None
        word, wanted = adapters.words(model, name, term), files.shuffled(list(minority), seed, name, "groups")
        for i in range(count):
            source = pool.iloc[_turn(order, i, policy, seed, name)] if order is not None else None
            stain = restain.donor(source, i // len(order), seed, name, cases=donors) if restain else ""
            group = groups[stain] if stain else source["group"] if source is not None else ""
            if transfer and group not in minority:
                group = wanted[i % len(wanted)]
            text = prompting.caption(prompt, word, prompting.group_words(group_terms, group)) if prompt or policy != "none" else ""
            lora_sha, token_sha = adapters.shas(model, text)
            known = {"tile_id": "tile_id", "source_class": "label", "source_group": "group"}  # of the source, "" where there is none
            row = {ours: source[theirs] if source is not None else "" for ours, theirs in known.items()} | settings
            row |= {"job": f"{files.slug(name)}-{i:05d}", "class": name, "target_group": group, "prompt": text, "policy": policy}
            row |= {"stain": stain, "stain_method": stain_method if stain else "", "number": i, "seed": files.seed(seed, name, i)}
            rows.append(row | {"lora_sha": lora_sha, "token_sha": token_sha})
    return pd.DataFrame(rows, columns=COLUMNS)


def _donors(real, policy, stains, method, head):
    """(Restainer, cases whose stains are worn, {case: its group}); no Restainer where sources stay as they are."""
    if stains not in STAINS:
        raise ValueError(f"stains {stains!r} is unknown; use {', '.join(STAINS)}")
    if stains == "own":
        return None, (), {}
    if policy == "none":
        raise ValueError(f"stains: {stains} changes the tiles that images start from, and policy none has none; use stains: own")
    lenders = real[real["label"].isin(head)] if stains == "head" and head else real
    cases = sorted(lenders["case_id"].unique())
    if len(set(real["case_id"]) | set(cases)) < 2 or not cases:
        raise ValueError(f"stains: {stains} finds no second training case whose stain could be worn; use stains: own")
    return staining.Restainer(real, method), cases, real.groupby("case_id")["group"].first().to_dict()


def _check(model, policy, prompt, strength, minority, transfer):
    """Raise ValueError for a policy that is unknown, or that cannot give its tiles the label it promises."""
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; use {', '.join(POLICIES)}")
    if transfer:
        _can_transfer(model, policy, prompt, minority)
    elif policy in ("cross_class", "nearest") and strength < LEAST:
        raise ValueError(
            f"policy {policy} takes the label from the prompt alone, and at strength {strength:g} a tile of another class stays what it "
            f"was; use {LEAST} or more, and let 05_select check the label"
        )


def _can_transfer(model, policy, prompt, minority):
    if not (minority and "{group}" in prompt):
        raise ValueError(f"policy {policy} from majority to minority needs `minority` groups and a prompt that names the {{group}}")
    learned = [text for adapter in model.adapters if adapter["kind"] == "tokens" for text in adapter.get("captions", [])]
    if learned and not any("{group}" in text for text in learned):
        raise ValueError(
            f"the adapter learned the captions {learned[0]!r}, which name no {{group}}, so it cannot tell groups apart; train it "
            f"again with prompt: {prompt!r} (in 01_textual_inversion: options: {{templates: [...]}})"
        )


def _pool(real, own, name, policy, head, majority, minority):
    """The training tiles a policy may start from; none for text-to-image."""
    if policy == "none":
        return real.iloc[:0]
    if policy in ("same_class", "diverse"):
        pool, what = own, f"of {name!r}"
    elif policy == "majority_to_minority" or (policy == "nearest" and minority):
        chosen = own["group"].isin(majority) if majority else ~own["group"].isin(minority)
        pool, what = own[chosen], f"of {name!r} in {majority or 'any majority group'}; its groups are {sorted(set(own['group']))}"
    else:
        lenders = [other for other in head if other != name] or sorted(set(real["label"]) - {name})
        pool, what = real[real["label"].isin(lenders)], f"of {lenders or 'another class'}"
    if pool.empty:
        raise ValueError(f"policy {policy} finds no training tile {what}")
    return pool.sort_values("tile_id")


def _order(pool, own, policy, embed, minority):
    """Indices into the pool in the order of their use: by likeness for nearest, farthest first for diverse, else as they lie."""
    if policy not in ("nearest", "diverse"):
        return np.arange(len(pool))
    if embed is None:
        raise ValueError(f"policy {policy} compares tiles and needs `embed`")
    feats = _unit(embed(pool))
    if policy == "diverse":
        return farthest_first(feats)
    anchors = own[own["group"].isin(minority)] if minority and own["group"].isin(minority).any() else own
    likeness = (feats @ _unit(embed(anchors)).T).max(axis=1)
    return np.argsort(-likeness, kind="stable")[: max(8, len(anchors))]


def _unit(feats):
    feats = np.asarray(feats, dtype=np.float64)
    return feats / np.linalg.norm(feats, axis=1, keepdims=True).clip(1e-12)


def farthest_first(feats, most=2000):
    """Indices [N] of unit features [N, D]: first the one nearest the mean, then always the one farthest from those before it.

    The greedy k-centre of Gonzalez (1985); beyond `most` the rest follow as they lie.
    """
    order = [int((feats @ feats.mean(axis=0)).argmax())]
    nearest = feats @ feats[order[0]]
    nearest[order[0]] = np.inf
    while len(order) < min(len(feats), most):
        order.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, feats @ feats[order[-1]])
        nearest[order] = np.inf
    return np.array(order + sorted(set(range(len(feats))) - set(order)))


def _turn(order, i, policy, seed, name):
    """Which tile of the pool image i starts from: all in turn, in a new random order each round unless the order means something."""
    lap, place = divmod(i, len(order))
    if policy in ("nearest", "diverse"):
        return order[place]
    return order[files.shuffled(range(len(order)), seed, name, "sources", lap)[place]]
