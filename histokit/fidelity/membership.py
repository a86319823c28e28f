"""Does an adapter know the tiles it learned from? Membership inference by the stability of short deterministic walks.

A tile's latent walks a little way towards noise; one step further and back again ends near where it was if the model knows the place.
SecMI, Duan et al. (2023), arXiv:2302.01316, section 3. An AUROC of 0.5 is what one hopes for; the base without the adapter, which saw
none of these tiles, is asked the same beside it, since training and held-out tiles may differ anyhow. A low number is no proof of privacy.
"""

import numpy as np
import pandas as pd
import torch

from histokit.diffusion import adapters, backbone, latents, prompting, sampling

VERSION = 1
STEP, WALK = 10, 100  # timesteps of 1000 taken at a time, and how far the walk goes; section 4.1 of the paper
LEAST = 10  # tiles a side
STRICT = 100  # held-out tiles below which a false alarm rate of one in a hundred cannot be measured
SHOWN = "class training held_out cases auroc low high base_auroc gain gain_low gain_high tpr_at_1_fpr".split()


@torch.no_grad()
def instability(predict, z, scheduler, step=STEP, walk=WALK):
    """How far one step on and back misses the latents it left [N], mean square; small for tiles that a model knows.

    Args:
        predict: `predict(z, t, i) -> eps` as for `sampling.denoise`.
        z: [N, 4, h, w] clean scaled latents.
    """

    def moved(z, eps, a, a_next):  # Song et al. (2021), equation 12 without noise, either way
        return a_next**0.5 * (z - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - a_next) ** 0.5 * eps

    times = [torch.tensor(t, device=z.device) for t in range(0, walk + 2 * step, step)]
    levels = [sampling.level(scheduler, t) for t in times]
    for i in range(len(times) - 2):
        z = moved(z, predict(z, times[i], i), levels[i], levels[i + 1])
    on = moved(z, predict(z, times[-2], 0), levels[-2], levels[-1])
    back = moved(on, predict(on, times[-1], 0), levels[-1], levels[-2])
    return (back - z).square().mean(dim=(1, 2, 3)).cpu().numpy()


def told_apart(member, other):
    """AUROC in [0, 1]: the chance that a training tile is the more stable one, ties counting half; 0.5 where a model knows neither."""
    member, other = np.asarray(member, float)[:, None], np.asarray(other, float)[None]
    return float(((member < other) + (member == other) / 2).mean())


def caught(member, other, false_alarms=0.01):
    """Share of training tiles more stable than all but one in a hundred of the others; NaN below a hundred of those."""
    if len(other) < STRICT:
        return np.nan
    return float((np.asarray(member) < np.quantile(other, false_alarms, method="lower")).mean())


def compare(with_, without, member, cases, resamples=1000, seed=0):
    """AUROC with the adapter and without it, and their difference, with 95 % intervals over cases drawn anew on either side.

    Args:
        with_, without: [N] `instability` of each tile with the adapter and of the base alone.
        member: [N] bool, whether the adapter learned from the tile.
        cases: [N].

    Returns:
        Dict of auroc, low, high, base_auroc, gain, gain_low, gain_high, tpr_at_1_fpr; intervals NaN with fewer than two cases a side.
    """
    with_, without, member, cases = (np.asarray(x) for x in (with_, without, member, cases))
    scores = [told_apart(x[member], x[~member]) for x in (with_, without)]
    rng, drawn = np.random.default_rng(seed), []
    sides = [[np.flatnonzero(side & (cases == case)) for case in np.unique(cases[side])] for side in (member, ~member)]
    if min(map(len, sides)) > 1:
        for _ in range(resamples):
            one, other = (np.concatenate([side[k] for k in rng.integers(len(side), size=len(side))]) for side in sides)
            drawn.append([told_apart(x[one], x[other]) for x in (with_, without)])
    drawn = np.array(drawn).reshape(-1, 2)
    low, high = np.quantile(drawn[:, 0], [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    gain_low, gain_high = np.quantile(drawn[:, 0] - drawn[:, 1], [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    found = {"auroc": scores[0], "low": low, "high": high, "base_auroc": scores[1], "gain": scores[0] - scores[1]}
    return found | {"gain_low": gain_low, "gain_high": gain_high, "tpr_at_1_fpr": caught(with_[member], with_[~member])}


def ask(base, folders, tiles, dataset, device, *, most=100, resamples=1000, seed=0):
    """Whether adapters tell their training tiles from held-out ones of other cases, one row per rare class.

    Args:
        base: name of the base model, as 02 was given it.
        folders: run folders of 01 or 02; without any, nothing is asked.
        tiles: manifest of 00_dataset; dataset: its Dataset.
        most: tiles of a class a side, seeded.

    Returns:
        DataFrame with the columns SHOWN; numbers are NaN below ten tiles a side.
    """
    if not (folders := list(folders)):
        return pd.DataFrame(columns=SHOWN)
    model = backbone.load(base, device, tiles=tiles)
    real = tiles[tiles["use"].eq("labelled") & tiles["source"].eq("real") & tiles["label"].isin(dataset.tail)]
    parts = [real[real["split"].eq("train")], real[real["split"].isin(["val", "test"])]]
    rows = pd.concat([_some(part[part["label"].eq(name)], most, seed) for part in parts for name in dataset.tail], ignore_index=True)
    if rows.empty:
        return pd.DataFrame(columns=SHOWN)
    rows["tile_px"], rows["fit"] = dataset.tile_px, dataset.fit
    cache = latents.Latents(model, rows, symmetries=1)
    mean, _ = cache.batch(range(len(rows)), [0] * len(rows))
    z = mean * model.scaling
    without = _stabilities(model, z, rows["label"], dataset)
    adapters.load(model, *folders, tiles=tiles, dataset=dataset.name)
    with_ = _stabilities(model, z, rows["label"], dataset)
    member, found = rows["split"].eq("train").to_numpy(), []
    for name in dataset.tail:
        mine = rows["label"].eq(name).to_numpy()
        n = int((mine & member).sum()), int((mine & ~member).sum())
        row = dict.fromkeys(SHOWN, np.nan) | {"class": name, "training": n[0], "held_out": n[1]}
        row["cases"] = rows.loc[mine & ~member, "case_id"].nunique()
        if min(n) >= LEAST:
            row |= compare(with_[mine], without[mine], member[mine], rows.loc[mine, "case_id"], resamples, seed)
        found.append(row)
    return pd.DataFrame(found, columns=SHOWN)


def _some(rows, most, seed):
    return rows.sample(min(most, len(rows)), random_state=seed).sort_index()


def _stabilities(model, z, labels, dataset):
    """`instability` of every latent under the prompt its class was taught with."""
    said = next((adapter["captions"][0] for adapter in model.adapters if adapter.get("captions")), prompting.TEMPLATES[0])
    prompts = [prompting.caption(said, adapters.words(model, name, dataset.terms[name])) for name in labels]
    context = {prompt: backbone.embed(model, [prompt])[0] for prompt in dict.fromkeys(prompts)}
    size, out = sampling.batch_size(model), []
    for start in range(0, len(z), size):
        cond = torch.stack([context[prompt] for prompt in prompts[start : start + size]])
        out.append(instability(sampling.guided(model, cond), z[start : start + size].to(model.device), model.scheduler))
    return np.concatenate(out)


def remarks(found):
    """What may be said of each class, in sentences."""
    for row in found.to_dict("records"):
        n = f"{row['training']} training and {row['held_out']} held-out tiles"
        share, low, high, base = (f"{100 * row[key]:.0f}" for key in ("auroc", "low", "high", "base_auroc"))
        if np.isnan(row["auroc"]):
            yield f"{row['class']}: n too small to say whether the adapter knows its training tiles; {n}, {LEAST} a side needed."
        elif row["gain_low"] > 0:
            yield (
                f"{row['class']}: the adapter knows its training tiles: a random one is more stable than a held-out one {share} % of the "
                f"time [{low} to {high}], without the adapter {base} % ({n})."
            )
        else:
            beside = f"{share} % against {base} % by the base alone"
            yield f"{row['class']}: not shown that the adapter knows its training tiles: {beside} ({n})."


def table(found):
    """The rows of `ask` for reading."""
    shown = found[["class", "training", "held_out", "cases"]].rename(columns={"held_out": "held out"})
    shown["AUROC"] = [_bar(*row) for row in found[["auroc", "low", "high"]].to_numpy(float)]
    shown["base alone"] = [_bar(value) for value in found["base_auroc"]]
    shown["difference"] = [_bar(*row) for row in found[["gain", "gain_low", "gain_high"]].to_numpy(float)]
    caught = ["n too small to say" if np.isnan(share) else f"{100 * share:.0f} %" for share in found["tpr_at_1_fpr"]]
    shown["found at 1 % false alarms"] = caught
    return shown


def _bar(value, low=np.nan, high=np.nan):
    if np.isnan(value):
        return "n too small to say"
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f} to {high:.2f}]"
