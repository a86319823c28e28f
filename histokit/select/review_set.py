"""The tiles of a selection as a deck for a person's eye: what is shown of each, and apart from it which tile each one is.

What is shown has small pictures and no name of a tile, case or folder; a key file in the experiment says which is which. Blind, there are
real training tiles among the synthetic ones, without scores and sources; the question is then whether people can tell them apart.
"""

import io
import json
from collections import namedtuple

import numpy as np
import pandas as pd
from PIL import Image

from histokit.core import files
from histokit.runs import selection_reasons
from histokit.tiles import data

VERSION = 1
REASONS = ("wrong class", "artefact", "copy", "stain", "blur")
MOST = 15_000  # bytes of one picture
SHOWN = ("judge", "similarity_feature", "similarity_picture", "realism", "focus", "stain")  # scores a deck can be sorted by
Deck = namedtuple("Deck", "key blind cards truth pictures")


def deal(rows, tiles, dataset, *, blind=False, seed=0):
    """What a gallery shows, its pictures not yet read.

    Args:
        rows: synthetic manifest rows of a selection, with `path`, scores, status and reason.
        tiles: manifest of 00_dataset with `path`.
        blind: hide scores, sources and verdicts, and mix in as many real training tiles of the same classes, where there are.
        seed: of the order, and of which real tiles.

    Returns:
        Deck: key (16 hex digits that follow from the tiles), blind, cards (what may be known of each tile), truth (which tile it is),
        pictures (manifest rows: those of the cards in their order, then the real tiles that a card names by number).
    """
    shown, known, others, cards = rows, tiles.set_index("tile_id", drop=False), {}, []
    if blind:
        rng = np.random.default_rng(files.seed(seed, "gallery") % 2**32)
        shown = pd.concat([rows, _planted(rows, data.training(tiles), rng)])
        shown = shown.iloc[rng.permutation(len(shown))]
    for i, row in enumerate(shown.to_dict("records")):
        card = {"id": f"{i:04d}", "label": row["label"]}
        if not blind:
            scores, sources = json.loads(row["scores"]), json.loads(row["sources"])
            beside = {"source": sources[0] if sources else "", "nearest": scores.get("nearest_feature", "")}
            card |= {name: others.setdefault(tile, len(shown) + len(others)) for name, tile in beside.items() if tile in known.index}
            why = ", ".join(selection_reasons.captions(row["reason"]))  # the whole reason may name a tile
            card |= {"status": row["status"], "why": why}
            card["scores"] = {name: round(float(scores[name]), 3) for name in SHOWN if isinstance(scores.get(name), int | float)}
        cards.append(card)
    truth = [
        {"kind": row["source"], "sha256": row["sha256"] or files.sha256(row["path"]), "tile_id": row["tile_id"], "label": row["label"]}
        for row in shown.to_dict("records")
    ]
    key = files.digest("gallery", VERSION, blind, seed, [(one["kind"], one["sha256"]) for one in truth])[:16]
    pictures = pd.concat([shown, known.loc[list(others)]], ignore_index=True).assign(tile_px=dataset.tile_px)
    return Deck(key, blind, cards, truth, pictures)


def _planted(rows, real, rng):
    """As many real training tiles of each class as it has synthetic ones, or all there are."""
    some = []
    for name, count in rows["label"].value_counts().items():
        own = real[real["label"].eq(name)]
        some.append(own.iloc[np.sort(rng.permutation(len(own))[:count])])
    return pd.concat(some)


def given(deck):
    """What a browser is told of a deck."""
    return {
        "key": deck.key,
        "blind": deck.blind,
        "reasons": list(REASONS),
        "scores": [] if deck.blind else list(SHOWN),
        "tiles": deck.cards,
        "count": len(deck.pictures),
    }


def keep(deck, experiment):
    """Write the key: which tile is which, for `rater_agreement.read`."""
    truth = {card["id"]: one for card, one in zip(deck.cards, deck.truth, strict=True)}
    files.write_json(place(experiment, deck.key), {"experiment": experiment, "blind": deck.blind, "tiles": truth})


def place(experiment, name):
    """The file of a key, or of one person's verdicts."""
    return files.inside(files.root() / "outputs" / experiment, f".galleries/{name}.json")


def thumbs(pictures):
    """Manifest rows as JPEG files [bytes] of at most `MOST` bytes; the same way for real and synthetic tiles."""
    return [_thumb(pixels) for pixels in data.pixels(pictures)]


def _thumb(pixels):
    picture = Image.fromarray(pixels)
    picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
    for quality in (92, 85, 75, 60, 40, 20):
        stream = io.BytesIO()
        picture.save(stream, format="JPEG", quality=quality)
        if stream.tell() <= MOST:
            break
    return stream.getvalue()
