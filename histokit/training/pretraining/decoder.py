"""A decoder whose pictures have the fine contrast of real tiles: the half of an autoencoder that may change under a finished base.

Squared and absolute error are least where a decoder, unsure of a texture, draws its mean. Softness costs no decibel and is what a
classifier sees first: on toy, true tiles lost six sevenths of their worth on the way through a decoder that had kept four fifths of
their fine contrast. The encoder is not touched, so that latents, diffusion model and adapters stay valid.
"""

import torch
import torch.nn.functional as F

from histokit.training import loop
from histokit.training.pretraining import ldm

VERSION = 3
GRAIN = 1e-3  # variance below which contrast is a sensor's grain: a decoder that is asked for it draws rings into empty fat


def fine_contrast(images, floor=1e-5):
    """Local deviation [B, C, h, w] of images [B, C, H, W] in [-1, 1] from their 3 x 3 mean, over windows of 8 px: what blur takes first."""
    around = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return torch.sqrt(F.avg_pool2d((images - around).square(), 8) + floor)


def trainable(vae):
    """The decoder's half of an AutoencoderKL, as a list of parameters; the encoder's takes no gradient from here on."""
    vae.requires_grad_(False)
    halves = [vae.decoder, *([vae.post_quant_conv] if vae.post_quant_conv is not None else [])]
    return [p for half in halves for p in half.requires_grad_(True).parameters()]


def errors(again, images, l1=0.5, edge=0.5, contrast=3.0):
    """Total error [B] of pictures after their round trip, lower is better: those of `ldm.autoencoder_player` and of `fine_contrast`."""
    error, over = again - images, (1, 2, 3)
    total = error.square().mean(over) + l1 * error.abs().mean(over) + edge * sum(e.abs().mean(over) for e in ldm.edges(error))
    return total + contrast * (fine_contrast(again, GRAIN) - fine_contrast(images, GRAIN)).abs().mean(over)


def player(vae, lr=7e-4, classifier=None, weight=0.1):
    """Mean of `errors`, on latents as the encoder draws them.

    With a `classifier` (images [B, 3, H, W] in [-1, 1] -> logits, frozen) also `weight` times the cross-entropy of what it calls the
    decoded pictures: HistoDiffusion's adaptation of the decoder to a few labelled tiles, whose weight is not published.
    """
    params = trainable(vae)

    def loss(batch, step, generator):
        images = batch["images"]
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        again = vae.decode(z).sample.float()
        total, logs = errors(again, images).mean(), {"squared_error": (again - images).square().mean()}
        if classifier is not None:
            lost = F.cross_entropy(classifier(again).float(), batch["targets"])
            total, logs = total + weight * lost, logs | {"class_error": lost}
        return total, logs

    return loop.Player("decoder", [{"params": params, "lr": lr}], loss)


def targets(corpus, classes):
    """Label id [N] of each picture of a corpus, in the order of `classes`; ValueError for one without a label of theirs."""
    strange = sorted(set(corpus.table["label"]) - set(classes))
    if strange:
        what = f"label {strange[0]!r}, which is none of {', '.join(classes)}" if strange[0] else "no label"
        raise ValueError(
            f"a decoder that a classifier watches learns from labelled tiles alone, and a picture has {what}; give its sources "
            "as {step: 00_dataset, labelled: true}"
        )
    return [list(classes).index(label) for label in corpus.table["label"]]
