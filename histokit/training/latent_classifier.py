"""Teaches a classifier of latents to see through noise, so that it can steer a diffusion model that knows no label.

At every step of a generation it is asked about latents of another noise level, and so it learns from all of them: Dhariwal & Nichol
(2021), arXiv:2105.05233, section 4. HistoDiffusion (arXiv:2308.04020) on few labelled tiles; `noise: none` learns clean latents alone, as
its released code does, and is there to be compared with. What steers is in `generate.class_guided`.
"""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from histokit.core import files
from histokit.diffusion import latents
from histokit.tiles import staining
from histokit.training import loop
from histokit.vision import latent_classifiers

VERSION = 2
NOISE = ("uniform", "none")
SAMPLERS = ("balanced", "natural")
BINS = 10  # of the noise schedule, by which a classifier is judged


def batches(cache, targets, batch_size, seed, sampler="balanced"):
    """`batches(k)` for `loop.fit`: {"latents": [B, C, h, w] scaled, in random symmetries, "targets": [B] int64}.

    Args:
        cache: `latents.Latents` of N tiles.
        targets: [N] int64.
        sampler: `balanced` draws every class alike, `natural` every tile.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; use {' or '.join(SAMPLERS)}")
    weight = 1 / torch.bincount(targets)[targets].double() if sampler == "balanced" else torch.ones(len(targets)).double()

    def batch(k):
        generator = torch.Generator().manual_seed(files.seed(seed, "batch", k))
        rows = torch.multinomial(weight, batch_size, replacement=True, generator=generator)
        return {"latents": cache.sample(rows.tolist(), generator), "targets": targets[rows]}

    return batch


def restained(learn, donors, copies, seed):
    """`learn`, and each of its tiles `copies` times in the stain of another case (Macenko), which its label does not follow from.

    A few labelled cases have a few stains, and a classifier that steers by stain paints instead of drawing. Tiles without a label lend
    theirs, which costs nobody anything. A case with too little tissue to know its stain stays as it is.

    Args:
        learn: manifest rows of labelled training tiles; `donors`: rows whose cases lend their stains, see `data.learnable`.
    """
    return staining.restained(learn, donors, copies, seed, "latent classifier")[0] if copies else learn


def loss(classifier, scheduler, noise="uniform", prior=None):
    """`loss(batch, step, generator)`: cross-entropy of noised latents, and the share that is told right.

    Args:
        noise: `uniform` noises each latent to a timestep of its own, `none` none, and says timestep 0.
        prior: [C] shares of the classes among what is drawn, for logit adjustment (Menon et al. 2021, arXiv:2007.07314, equation 10), or
            None.
    """
    if noise not in NOISE:
        raise ValueError(f"noise {noise!r} is unknown; use {' or '.join(NOISE)}")
    shift = 0.0 if prior is None else torch.log(torch.as_tensor(prior, dtype=torch.float32).clamp(min=1e-4))

    def of(batch, step, generator):
        z, targets = batch["latents"], batch["targets"].to(batch["latents"].device)
        t = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        if noise == "uniform":
            t = torch.randint(scheduler.config.num_train_timesteps, (len(z),), generator=generator).to(z.device)
            z = scheduler.add_noise(z, torch.randn(z.shape, generator=generator).to(z.device), t)
        logits = classifier(z, t)
        told = (logits.argmax(dim=1) == targets).float().mean()
        return F.cross_entropy(logits + (shift if prior is None else shift.to(logits)), targets), {"accuracy": told}

    return of


@torch.no_grad()
def accuracy_by_noise(classifier, z, targets, scheduler, seed=0, draws=1, batch_size=64):
    """How well a classifier tells latents at each level of noise: where it can steer.

    Args:
        z: [N, C, h, w] scaled latents of held-out tiles. targets: [N] int64.
        draws: timesteps and noises of each tile in each bin, always the same.

    Returns:
        DataFrame low, high (timesteps, high excluded), accuracy (mean recall of the classes there are, in [0, 1]), error (mean
        cross-entropy of these classes), tiles; one row for each of `BINS` bins.
    """
    total, rows, kinds = scheduler.config.num_train_timesteps, [], targets.unique()
    classifier.eval()
    for k in range(BINS):
        low, high = k * total // BINS, (k + 1) * total // BINS
        right, wrong = torch.zeros(len(z), dtype=torch.float64), torch.zeros(len(z), dtype=torch.float64)
        for draw in range(draws):
            generator = torch.Generator().manual_seed(files.seed(seed, "bins", k, draw))
            t = torch.randint(low, high, (len(z),), generator=generator)
            noisy = scheduler.add_noise(z.cpu(), torch.randn(z.shape, generator=generator), t)
            parts = zip(noisy.split(batch_size), t.split(batch_size), strict=True)
            logits = torch.cat([classifier(part.to(z.device), at.to(z.device)).cpu() for part, at in parts])
            right += (logits.argmax(dim=1) == targets).double() / draws
            wrong += F.cross_entropy(logits, targets, reduction="none").double() / draws
        mean = lambda of: float(torch.stack([of[targets == kind].mean() for kind in kinds]).mean())  # noqa: E731
        rows.append({"low": low, "high": high, "accuracy": mean(right), "error": mean(wrong), "tiles": len(z)})
    return pd.DataFrame(rows)


def fit(
    model, learn, held, classes, *, network="mini", noise="uniform", sampler="balanced", adjust=False, steps=600, batch_size=32, lr=1e-3,
    seed=0, folder=None, **options,
):  # fmt: skip
    """Train a latent classifier on labelled tiles; returns it with the history of `loop.fit` and its `accuracy_by_noise`.

    Args:
        model: backbone.Model whose latents and noise are learned.
        learn: manifest rows of labelled training tiles, each of `classes` among them.
        held: validation rows, by whose mean accuracy over the bins the step is chosen; empty takes the last.
        network: a name of `latent_classifiers.PRESETS`.
        noise, sampler: see `loss`, `batches`.
        adjust: logit adjustment by the shares that the sampler draws, for sampler natural.
        folder: where checkpoints go.
        options: see `settings.Loop`.

    Raises ValueError for a class without a labelled training tile.
    """
    model.need("vae", "scheduler")
    missing = [name for name in classes if name not in set(learn["label"])]
    if missing:
        raise ValueError(
            f"no labelled training tile of {', '.join(missing)}: a classifier that never saw a class cannot steer towards it; take it out "
            "of the description's `classes`, or look into 00_dataset why it has none"
        )
    if network not in latent_classifiers.PRESETS:
        raise ValueError(f"network {network!r} is unknown; use {', '.join(latent_classifiers.PRESETS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.seed(seed, "latent classifier"))
        channels, px = model.latent_space["shape"]
        net = latent_classifiers.LatentClassifier(classes, channels, px, **latent_classifiers.PRESETS[network]).to(model.device)
    cache, targets = latents.Latents(model, learn), _targets(learn, classes)
    counts = torch.bincount(targets, minlength=len(classes)).double()
    prior = (counts / counts.sum() if sampler == "natural" else torch.full((len(classes),), 1 / len(classes))) if adjust else None
    z, known = _held(model, held), _targets(held, classes)

    def validate():
        found = accuracy_by_noise(net, z, known, model.scheduler, seed)
        net.train()
        return 1 - found["accuracy"].mean() + 1e-3 * found["error"].mean(), {"val_accuracy": found["accuracy"].mean()}

    known_by = lambda rows: files.digest([[row.tile_id, row.sha256, row.label] for row in rows.itertuples()])  # noqa: E731
    seen = {"tiles": known_by(learn), "held": known_by(held), "space": model.latent_space}
    how = {"size": network, "noise": noise, "sampler": sampler, "adjust": adjust, "batch_size": batch_size, "lr": lr}
    options = {"ema": 0.999, "schedule": "one_cycle", "validate_every": max(1, steps // 10), **options}
    history = loop.fit(
        [loop.Player("latent_classifier", [{"params": net.parameters(), "lr": lr}], loss(net, model.scheduler, noise, prior))],
        batches(cache, targets, batch_size, seed, sampler), steps, seed, folder=folder, identity={**seen, **how, "classes": classes},
        autocast=model.arithmetic, validate=validate if len(held) else None, **options,
    )  # fmt: skip
    net.requires_grad_(False).eval()
    curve = accuracy_by_noise(net, z, known, model.scheduler, seed, draws=4) if len(held) else pd.DataFrame()
    net.facts |= {"space": model.latent_space, **how, "curve": curve.to_dict("records")}
    return net, history, curve


def counts(learn, held, classes):
    """What is learned from and validated on: DataFrame class, training tiles, training cases, validation tiles, validation cases."""
    rows = []
    for name in classes:
        own, kept = (part[part["label"].eq(name)] for part in (learn, held))
        rows.append([name, len(own), own["case_id"].nunique(), len(kept), kept["case_id"].nunique()])
    return pd.DataFrame(rows, columns=["class", "training tiles", "cases", "validation tiles", "their cases"])


def curves(run, step):
    """{step: `accuracy_by_noise`} of an earlier step of this kind, which becomes a parent of the run; {} without a step or a curve."""
    if not step:
        return {}
    path = run.parent(step) / "model.json"
    facts = files.read_json(path) if path.is_file() else {}
    if "curve" not in facts:
        raise ValueError(f"beside: {step!r} is no step of 21_latent_classifier, so it has no curve to draw; name one, or leave it empty")
    return {f"{step} (noise: {facts['noise']})": pd.DataFrame(facts["curve"])} if facts["curve"] else {}


def remarks(curve, classes, above=0.1):
    """Plain sentences: up to which noise the classes are told apart, with `above` chance as the bar."""
    if not len(curve):
        return ["No validation tile: nobody knows at which levels of noise this classifier can steer."]
    chance = 1 / len(classes)
    blind = curve[curve["accuracy"] < chance + above]
    said = [
        f"Mean accuracy over the classes {curve['accuracy'].iloc[0]:.2f} with little noise, {curve['accuracy'].mean():.2f} over the whole "
        f"schedule; chance is {chance:.2f}."
    ]
    if len(blind) == len(curve):
        said.append("IT CANNOT TELL THE CLASSES AT ANY LEVEL OF NOISE, so it steers nowhere: more labelled tiles, or more steps.")
    else:
        told, end = curve.loc[~curve.index.isin(blind.index), "high"].max(), curve["high"].max()
        if told < end:  # only what lies above the last level at which it tells them can be left out
            said.append(f"From timestep {told:,} on it is near chance: `interval: [0.0, {told / end:.1f}]` in 04 spares its time there.")
    return said


def _targets(tiles, classes):
    return torch.tensor([list(classes).index(name) for name in tiles["label"]], dtype=torch.int64)


def _held(model, tiles):
    """Mean latents [N, C, h, w] of tiles as they lie, scaled."""
    if not len(tiles):
        return torch.zeros(0, *[model.latent_space["shape"][i] for i in (0, 1, 1)])
    cache, parts = latents.Latents(model, tiles, symmetries=1), np.array_split(range(len(tiles)), -(-len(tiles) // 16))
    return torch.cat([cache.batch(part, np.zeros(len(part), int))[0] for part in parts]) * model.scaling
