"""Whether a base or an encoder has learned from tiles that an experiment tests on or keeps back.

20_pretrain writes the sha256 of every picture it trained on into trained_on.csv, and `mini` carries its own. Weights without such a list
(Stable Diffusion, a pathology encoder) cannot be checked.
"""

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np

from histokit.core import files
from histokit.tiles import colour_profiles, decode

VERSION = 2
LIST = "trained_on.csv"


def pixels_hash(image):
    """sha256 of a picture's size and RGB bytes; the same whatever file format holds it."""
    return sha256(f"{image.shape[0]}x{image.shape[1]}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def learned_from(weights, tiles, root=None):
    """Which of the real tiles, bool [N], a picture of which the models learned from: their cases can be no validation or test cases.

    Args:
        weights: folders or files of weights, None for one that has none; those without a list say nothing.
        tiles: manifest with `sha256`, `source` and `path`, every file readable.
        root: folder of the tiles, where the manifest has no `path` yet.
    """
    tiles = tiles if root is None else tiles.assign(path=[str(Path(root) / name) for name in tiles["file_name"]])
    found = np.zeros(len(tiles), bool)
    real = tiles["source"].eq("real").to_numpy()
    for place in {_listed(one) for one in weights if one} - {None}:
        found[real] |= _known(tiles[real], set(files.read_table(place)["pixels_sha256"]), files.sha256(place))
    return found


def said(tiles, seen, by):
    """Sentences on tiles that a model has learned from, by the split they came to lie in; none where there are none."""
    rows, elsewhere = tiles[seen], int(tiles["split"][seen].isin(["val", "test"]).sum())
    if not len(rows):
        return []
    start = f"{len(rows)} tiles of {rows['case_id'].nunique()} cases are among those that {by} has learned from: "
    if not elsewhere:
        return [start + "their cases are all for training."]
    return [start + f"{elsewhere} of them lie in validation and test by the data's own split, so these weights will be refused."]


def _listed(weights):
    """The list beside weights, None where there is none."""
    place = Path(weights)
    place = (place if place.is_dir() else place.parent) / LIST
    return place if place.is_file() else None


def refuse(weights, tiles, name):
    """Raise ValueError where the model `name` learned from a picture that `tiles` hold back from training.

    Args:
        weights: folder or file of the weights; trained_on.csv lies beside them.
        tiles: manifest (`data.load`); validation, test and withheld tiles count, the sizes and formats of their files do not.
    """
    place = _listed(weights)
    if place is None:
        return
    kept = tiles[(tiles["split"].isin(["val", "test"]) | tiles["use"].eq("withheld")) & tiles["source"].eq("real")]
    rows = kept[_known(kept, set(files.read_table(place)["pixels_sha256"]), files.sha256(place))]
    if len(rows):
        first = rows.iloc[0]
        where = first["split"] if first["use"] != "withheld" else "withheld here to make its class rare"
        if first["use"] == "withheld":
            remedy = "Leave that class out of the budget, or use other weights"
        else:
            remedy = (
                "Where the data brings no split, name these weights in 00_dataset as well (base_model, encoder): it makes training cases "
                "of the cases they have seen. Otherwise give the dataset a split that both follow, or use other weights"
            )
        raise ValueError(
            f"{name} has learned from {len(rows)} tiles that this experiment keeps from training (first: {first['tile_id']!r}, {where}); "
            f"results would be flattered. {remedy}"
        )


def _is_known(path, hashes):
    """Whether a file's pixels are among them, by its colour profile or as they are stored: another may have read it the other way."""
    image, note = decode.rgb(path)
    if pixels_hash(np.asarray(image)) in hashes:
        return True
    return colour_profiles.NOTE in note and pixels_hash(np.asarray(decode.rgb(path, profile=False)[0])) in hashes


def _known(tiles, hashes, of):
    """Which of the tiles, [N] bool, are among `hashes`; remembered by the contents of tiles and list."""
    shas = [sha or files.sha256(path) for sha, path in zip(tiles["sha256"].astype(str), tiles["path"], strict=True)]
    note = files.cache("seen") / f"{files.digest(VERSION, decode.VERSION, of, shas)}.json"
    if not note.is_file():
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda path: _is_known(path, hashes), tiles["path"]))
        files.write_json(note, {"rows": np.flatnonzero(found).tolist()})
    rows = files.read_json(note)["rows"]
    return np.isin(np.arange(len(tiles)), rows)
