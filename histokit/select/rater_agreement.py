"""What several people said of the tiles of a gallery: how far they agree, how well they told real from made, what follows for a tile."""

from itertools import combinations

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.metrics import stats
from histokit.select import review_set, reviews


def read(paths):
    """Verdicts of several exported files: DataFrame rater, tile, verdict (keep or reject), reasons, and of the key: kind, sha256, label.

    Raises ValueError for a file that is no export, for pages that are not the same, and for a rater who comes twice.
    """
    tables, keys = [], set()
    for path in paths:
        try:
            held = files.read_json(path)
            key, rater = str(held["gallery"]), str(held["rater"])
            rows = [
                (str(v["id"]), v["verdict"], ", ".join(r for r in v.get("reasons", []) if r in review_set.REASONS))
                for v in held["verdicts"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no export of a gallery page ({error}); use its Export button") from None
        keys.add(key)
        tables.append(pd.DataFrame(rows, columns=["tile", "verdict", "reasons"]).assign(rater=rater))
    table = pd.concat(tables, ignore_index=True)
    if len(keys) > 1:
        raise ValueError("these verdicts are of different pages; import those of one page at a time")
    if table.duplicated(["rater", "tile"]).any():
        raise ValueError(f"rater {table.loc[table.duplicated(['rater', 'tile']), 'rater'].iloc[0]!r} comes twice; give every rater a name")
    if not set(table["verdict"]) <= set(reviews.VERDICTS):
        raise ValueError(f"verdicts are {', '.join(reviews.VERDICTS)}; got {sorted(set(table['verdict']))}")
    (key,) = keys
    found = [path for path in (files.root() / "outputs").glob("*/.galleries/*.json") if path.stem == key]
    if not found:
        raise ValueError(f"the key of this page, {key}, is nowhere below outputs/; import where the page was made")
    held = files.read_json(found[0])
    lost = sorted(set(table["tile"]) - set(held["tiles"]))
    if lost:
        raise ValueError(f"tile {lost[0]!r} is not on that page")
    for name in ("kind", "sha256", "label"):
        table[name] = [held["tiles"][tile][name] for tile in table["tile"]]
    table.attrs = {"experiment": held["experiment"], "blind": held["blind"]}
    return table


def agreement(table):
    """Cohen's kappa (1960) of every two raters on the tiles both saw: DataFrame first, second, tiles, same (share), kappa in [-1, 1]."""
    wide = table.assign(keep=table["verdict"].eq("keep").astype(float)).pivot(index="tile", columns="rater", values="keep")
    rows = []
    for one, other in combinations(wide.columns, 2):
        both = wide[[one, other]].dropna().to_numpy()
        same = float((both[:, 0] == both[:, 1]).mean()) if len(both) else np.nan
        a, b = both.mean(axis=0) if len(both) else (np.nan, np.nan)
        chance = a * b + (1 - a) * (1 - b)
        rows.append((one, other, len(both), same, (same - chance) / (1 - chance) if chance < 1 else np.nan))
    return pd.DataFrame(rows, columns=["first", "second", "tiles", "same", "kappa"])


def told_apart(table):
    """How well each rater told real from synthetic on a blind page: rater, tiles, right, low, high (Wilson's 95 % interval)."""
    rows = []
    for rater, own in table.groupby("rater"):
        right = int((own["verdict"].eq("keep") == own["kind"].eq("real")).sum())
        rows.append((rater, len(own), right, *stats.wilson(right, len(own))))
    return pd.DataFrame(rows, columns=["rater", "tiles", "right", "low", "high"])


def settled(table):
    """One verdict for each synthetic tile that more raters gave than not: DataFrame sha256, verdict, reviewer, note; ties are left out."""
    rows = []
    for sha, own in table[table["kind"].eq("synthetic")].groupby("sha256", sort=False):
        keeps = int(own["verdict"].eq("keep").sum())
        if 2 * keeps != len(own):
            verdict = "keep" if 2 * keeps > len(own) else "reject"
            sided = own[own["verdict"].eq(verdict)]
            note = ", ".join(dict.fromkeys(filter(None, ", ".join(sided["reasons"]).split(", "))))
            rows.append((sha, verdict, ", ".join(sided["rater"]), note))
    return pd.DataFrame(rows, columns=["sha256", "verdict", "reviewer", "note"])


def remarks(table):
    """What may be said of the raters, in sentences."""
    said = [f"{own['rater'].iloc[0]}: {len(own)} tiles, {int(own['verdict'].eq('keep').sum())} kept." for _, own in table.groupby("rater")]
    if table.attrs["blind"]:
        said += told(table)
    for row in agreement(table).itertuples():
        both = f"{row.first} and {row.second}"
        if not row.tiles:
            said.append(f"{both} have no tile in common.")
        elif np.isnan(row.kappa):
            said.append(f"{both} gave the same verdict on all of {row.tiles} tiles, so kappa, which asks for two kinds, is not defined.")
        else:
            said.append(f"{both} agree on {100 * row.same:.0f} % of {row.tiles} tiles, kappa {row.kappa:.2f}.")
    return said


def told(table):
    """What may be said of `told_apart`, a sentence for each rater."""
    said = []
    for row in told_apart(table).itertuples():
        share = f"{100 * row.right / row.tiles:.0f} % [{100 * row.low:.0f} to {100 * row.high:.0f}]"
        real = table[table["rater"].eq(row.rater)]["kind"].eq("real").mean()
        always = f"always {'real' if real > 0.5 else 'made'} would be right in {100 * max(real, 1 - real):.0f} %"
        chance = "50 % is chance" if real == 0.5 else always
        said.append(f"{row.rater} told real from synthetic in {row.right} of {row.tiles} tiles, {share}; {chance}.")
    return said


def write(table):
    """Append the settled verdicts to params/reviews/<experiment>.csv; returns how many. Those of a blind page answer another question."""
    if table.attrs["blind"]:
        return 0
    rows = settled(table)
    reviews.add_reviews(table.attrs["experiment"], rows.to_dict("records"))
    return len(rows)
