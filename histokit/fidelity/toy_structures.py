"""Do made tiles of toy hold what their class is made of? Nuclei, lumina and fibres counted in the pixels, beside real tiles of the class.

Only invented tissue can be asked so: its structures were drawn, so that counting them was tried on their truth (`toy.morphometry`). A
class that is told by round lumina and has none in its made tiles is not shown, however like real ones the tiles look to an encoder.
"""

import numpy as np
import pandas as pd

from histokit.tiles import data
from histokit.toy import morphometry

VERSION = 1
MEASURES = ("nuclei_count", "nuclei_size", "lumen_count", "lumen_area", "fibre_coherence")
COLUMNS = "class measure made tiles real real_tiles low high inside apart".split()


def measure(real, synthetic, classes, *, most=60, seed=0):
    """Each measure of the made tiles of a class beside real tiles of it that no generator saw.

    Args:
        real, synthetic: manifests with `path`; real tiles are those of val and test.
        classes: class names.
        most: tiles of a side at most, drawn by seed.

    Returns:
        DataFrame class, measure, made (median), tiles, real (median), real_tiles, low, high (5 and 95 % of the real ones), inside (share
        of made tiles between these, 0.9 expected), apart (probability that a made tile has more of it than a real one, ties half; 0.5 is
        alike). No rows for a class that lacks tiles on either side.
    """
    rng, rows = np.random.default_rng(seed), []
    held_out = real[real["split"].isin(["val", "test"])]
    for name in classes:
        sides = [_measured(table[table["label"].eq(name)], most, rng) for table in (synthetic, held_out)]
        if all(len(side) for side in sides):
            rows += [{"class": name, **_beside(what, *(side[what].to_numpy(float) for side in sides))} for what in MEASURES]
    return pd.DataFrame(rows, columns=COLUMNS)


def _measured(tiles, most, rng):
    chosen = tiles.iloc[np.sort(rng.permutation(len(tiles))[:most])]
    return pd.DataFrame([morphometry.measure(image) for image in data.pixels(chosen)]) if len(chosen) else chosen


def _beside(what, made, real):
    low, high = np.quantile(real, [0.05, 0.95])
    more = (made[:, None] > real[None]).mean() + (made[:, None] == real[None]).mean() / 2
    row = {"measure": what, "made": np.median(made), "tiles": len(made), "real": np.median(real), "real_tiles": len(real)}
    return row | {"low": low, "high": high, "inside": ((made >= low) & (made <= high)).mean(), "apart": more}


def table(found):
    """The same for reading."""
    rows = []
    for row in found.to_dict("records"):
        digits = 0 if row["real"] >= 10 else 2
        real = f"{row['real']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"
        shown = {"class": row["class"], "measure": row["measure"].replace("_", " "), "made, median": f"{row['made']:.{digits}f}"}
        shown |= {"real, median (5 to 95 %)": real, "made tiles within": f"{row['inside']:.0%} of {row['tiles']}"}
        rows.append(shown | {"more than a real one": f"{row['apart']:.2f}"})
    return pd.DataFrame(rows)


def remarks(found):
    """What stands out, in sentences: measures that hardly any made tile of a class shares with real ones."""
    for row in found.to_dict("records"):
        if row["inside"] < 0.5:
            more = "more" if row["apart"] > 0.5 else "less"
            yield (
                f"{row['class']}: {row['inside']:.0%} of {row['tiles']} made tiles lie in the range of real ones for "
                f"{row['measure'].replace('_', ' ')}; they have {more} of it (median {row['made']:.3g}, real {row['real']:.3g})."
            )
