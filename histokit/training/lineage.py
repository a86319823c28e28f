"""What a training of a base comes from: the weights it goes on from, the pictures they and it have seen, what it asks.

From it follows whether another experiment has trained just the same (`checkpoints.shared`), and which tiles a base has never seen.
"""

import pandas as pd

from histokit.core import files
from histokit.diffusion import pretrained
from histokit.tiles.contamination import LIST
from histokit.vision import classifiers

VERSION = 1


def origin(run, name):
    """Folder of the finished step `name`, else of the base of that name; None where there is no name."""
    return pretrained.locate(run.base(name)) if name else None


def learned(corpus, *origins):
    """The list for trained_on.csv: this corpus, and what the bases it goes on from (folders, None left out) have seen before."""
    before = [files.read_table(folder / LIST) for folder in origins if folder and (folder / LIST).is_file()]
    return pd.concat([corpus.listed(), *before], ignore_index=True).drop_duplicates("pixels_sha256", ignore_index=True)


def updates(origin, part):
    """Optimiser updates that the `part` of a base or a finished run in folder `origin` has had; 0 where nothing says so."""
    if origin is None:
        return 0
    if (origin / "mini.json").exists():
        return files.read_json(origin / "mini.json").get(part, {}).get("updates", 0)
    return files.read_json(origin / "results.json").get("updates", 0) if (origin / "results.json").exists() else 0


def identity(run, seen, held, origins, watching="", lpips="", **settings):
    """What a training depends on, for `loop.fit` and `checkpoints.shared`, but for versions of the code.

    Args:
        seen, held: corpus.Corpus.
        origins: {name: folder of the base it goes on from, or None}.
        watching: step of the classifier that it asks, `lpips` the file of a distance; "" for none.
        settings: what else was asked for.
    """
    told = [(one.table["pixels_sha256"] + one.table["source"] + one.table["label"]).str.cat(sep=" ") for one in (seen, held)]
    words = [sorted(set(one.captions)) for one in (seen, held)]
    shares = [one.table.groupby("source")["weight"].first().to_dict() for one in (seen, held)]
    parts = [folder / part for folder in origins.values() if folder for part in pretrained.PARTS]
    weights = [files.sha256(path) for part in parts for path in sorted(part.glob("*")) if path.suffix in (".safetensors", ".json")]
    asked = [classifiers.identity(classifier(run, watching, "cpu"))] if watching else []
    asked += [files.sha256(files.root() / lpips)] if lpips else []
    return {"pictures": files.digest(told, words, shares), "weights": files.digest(weights, asked), **settings}


def classifier(run, step, device):
    """The classifier of a 06 step with one arm, that a decoder is to please."""
    try:
        return classifiers.load(classifiers.trained(run.parent(step), step)[0], device)
    except ValueError as error:
        raise ValueError(f"classifier {step!r} is to be a 06_classifier with one arm ({error})") from error
