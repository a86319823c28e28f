"""The synthetic tiles that a person should look at beside a training tile: the closest pairs, and those whose prompt pulled hard.

`copy_detection` measures how near; here is which pairs are shown, and what stands below them.
"""

import json

import numpy as np
import pandas as pd

VERSION = 1

PAIR = "class tile_id nearest space distance other_space other_distance rank pull".split()
PAIRS = 20  # closest pairs that a person looks at
PULLED = 4  # and tiles at which the prompt pulled far harder than is usual in their class


def of_class(name, own, found, training):
    """The nearest training tile of every synthetic tile of a class in either space, by its rank there.

    Args:
        own: [N] manifest rows of the synthetic tiles.
        found: {space: copying.Found}, two spaces.
        training: manifest rows.
    """
    spaces, (pull, limit) = list(found), _pulls(own)
    rows = []
    for space in spaces:
        other = spaces[1 - spaces.index(space)]
        distance, row, beside = found[space]
        for rank, i in enumerate(np.argsort(distance, kind="stable")):
            pair = [name, own["tile_id"].iloc[i], training["tile_id"].iloc[row[i]], space, distance[i], other, beside[i], rank, pull[i]]
            rows.append(dict(zip(PAIR, pair, strict=True)) | {"pull_limit": limit})
    return pd.DataFrame(rows, columns=[*PAIR, "pull_limit"]).drop_duplicates(["tile_id", "nearest"])


def chosen(pairs):
    """The closest pairs of all classes, and after them those whose prompt pulled far harder than the others' of their class."""
    pairs = pairs.sort_values("rank", kind="stable")
    near, pulled = pairs[pairs["rank"] < PAIRS].head(PAIRS), pairs[pairs["pull"] > pairs["pull_limit"]]
    pulled = pulled[~pulled["tile_id"].isin(near["tile_id"])].drop_duplicates("tile_id").nlargest(PULLED, "pull")
    return pd.concat([near, pulled])[PAIR]


def _pulls(own):
    """How hard the prompt pulled at each tile, as 03 wrote it down [N], NaN where it did not; and above what that is far from usual.

    Three deviations above the median, the deviation taken from the median absolute one (Leys et al. 2013, doi 10.1016/j.jesp.2013.03.013).
    """
    pull = np.array([float(json.loads(text or "{}").get("prompt_pull", np.nan)) for text in own["scores"].fillna("")])
    known = pull[np.isfinite(pull)]
    middle = np.median(known) if len(known) else np.nan
    return pull, middle + 3 * 1.4826 * np.median(np.abs(known - middle)) if len(known) else np.nan


def captions(pairs):
    """What stands below each of the closest pairs."""
    near = [f"{row.space} {row.distance:.3f}\n{row.other_space} {row.other_distance:.3f}" for row in pairs.itertuples()]
    hard = [f"\nprompt pulled {pull:.3f}" if rank >= PAIRS else "" for pull, rank in zip(pairs["pull"], pairs["rank"], strict=True)]
    return [one + other for one, other in zip(near, hard, strict=True)]
