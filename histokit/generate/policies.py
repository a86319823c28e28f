"""Which real tile each new image starts from, and what its prompt asks for: one row per image, before any is made.

Tables in, a table out. The two kinds of transfer stay apart by name: `same_class`, `diverse` and `majority_to_minority` keep
the label of their source, `cross_class` and `nearest` take it from the prompt alone; `nearest` with minority groups is
`majority_to_minority`, most alike first.
"""

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.diffusion import adapters, prompting, sampling
from histokit.runs import places
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
NO_PROMPT = -1
SETTINGS = ("strength", "guidance_scale", "num_inference_steps")
COLUMNS = [
    "job", "prompt_id",
    "tile_id", "stain", "stain_method", "source_class", "source_group", "class", "target_group", "prompt", *SETTINGS, "true_steps",
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
    prompts=None,
    captioned=None,
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
        prompts: DataFrame prompt_id, label, text, share (of its class's images), as `prompt_table.applied` gives it; their texts take the
            place of `prompt`. A policy that starts from tiles of the class itself takes those that have the prompt.
        captioned: Series tile_id -> prompt_id, with `prompts`.

    Returns:
        DataFrame job, prompt_id (-1 without `prompts`), tile_id (source), stain (case whose stain it wears, "" for its own), stain_method,
        source_class, source_group, class, target_group, prompt, strength, guidance_scale, num_inference_steps, true_steps, number, seed,
        policy, lora_sha, token_sha.
    """
    strength = 1.0 if policy == "none" else float(strength)
    transfer = policy == "majority_to_minority" or (policy == "nearest" and bool(minority))
    _check(model, policy, prompt, strength, minority, transfer)
    if prompts is not None and transfer:
        raise ValueError(
            f"policy {policy} from majority to minority names the {{group}} in its prompt; captions have none, use another policy"
        )
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
        orders = _orders(pool, own, policy, embed, list(minority), _of_class(prompts, name), captioned)
        word, wanted = adapters.words(model, name, term), files.shuffled(list(minority), seed, name, "groups")
        for i, (p, turn) in enumerate(_asked(_of_class(prompts, name), count)):
            order = orders[p.prompt_id if p else NO_PROMPT]
            source = pool.iloc[_turn(order, turn, policy, seed, name, *([p.prompt_id] if p else []))] if len(order) else None
            stain = restain.donor(source, turn // len(order), seed, name, cases=donors) if restain else ""
            group = groups[stain] if stain else source["group"] if source is not None else ""
            if transfer and group not in minority:
                group = wanted[i % len(wanted)]
            if p:
                text = p.text
            else:
                text = prompting.caption(prompt, word, prompting.group_words(group_terms, group)) if prompt or policy != "none" else ""
            lora_sha, token_sha = adapters.shas(model, text)
            known = {"tile_id": "tile_id", "source_class": "label", "source_group": "group"}  # of the source, "" where there is none
            row = {ours: source[theirs] if source is not None else "" for ours, theirs in known.items()} | settings
            row |= {"job": f"{files.slug(name)}-{i:05d}", "class": name, "target_group": group, "prompt": text, "policy": policy}
            row |= {
                "prompt_id": p.prompt_id if p else NO_PROMPT,
                "stain": stain,
                "stain_method": stain_method if stain else "",
                "number": i,
                "seed": files.seed(seed, name, i),
            }
            rows.append(row | {"lora_sha": lora_sha, "token_sha": token_sha})
    return pd.DataFrame(rows, columns=COLUMNS)


def part(jobs, shard, batch):
    """The jobs of one shard, "k/n": whole batches, so that every image has the neighbours it has when nothing is split."""
    k, n = places.share(shard)
    return jobs[jobs["number"] // batch % n == k]


def asked_of(row):
    """What the manifest says of the prompt that a job asked for: nothing where it came from a template."""
    return {"prompt_id": int(row.prompt_id)} if row.prompt_id != NO_PROMPT else {}


def _of_class(prompts, name):
    """The prompts of one class, as tuples with share; None where prompts are a template. ValueError for a class without a share."""
    if prompts is None:
        return None
    own = [row for row in prompts.itertuples() if row.label == name and row.share > 0]
    if not own:
        raise ValueError(f"no prompt of {name!r} is asked for; the captions have {', '.join(sorted(set(prompts['label'])))}")
    return own


def _asked(own, count):
    """(prompt, how many before it asked for the same) of each image: each the prompt that is most behind its share.

    The divisor method of Sainte-Lague: the first n are the same however many follow, and whole shares are met exactly.
    """
    if own is None:
        yield from ((None, i) for i in range(count))
        return
    given = [0] * len(own)
    for _ in range(count):
        k = max(range(len(own)), key=lambda k: (own[k].share / (2 * given[k] + 1), -k))
        yield own[k], given[k]
        given[k] += 1


def _orders(pool, own, policy, embed, minority, asked, captioned):
    """{prompt_id: indices into the pool in the order of their use}: tiles of the class itself serve the prompt that they have."""
    every = _order(pool, own, policy, embed, minority) if len(pool) else np.zeros(0, int)
    if asked is None or policy not in ("same_class", "diverse"):
        return {p.prompt_id: every for p in asked} if asked else {NO_PROMPT: every}
    found, has = {}, captioned.reindex(pool["tile_id"]).to_numpy()
    for p in asked:
        found[p.prompt_id] = every[has[every] == p.prompt_id]
        if not len(found[p.prompt_id]):
            raise ValueError(
                f"policy {policy} finds no training tile of the prompt {p.text!r}; leave it out of the budget, or policy: none"
            )
    return found


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


def _turn(order, i, policy, seed, *name):
    """Which tile of the pool image i starts from: all in turn, in a new random order each round unless the order means something."""
    lap, place = divmod(i, len(order))
    if policy in ("nearest", "diverse"):
        return order[place]
    return order[files.shuffled(range(len(order)), seed, *name, "sources", lap)[place]]
