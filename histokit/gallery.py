"""Tiles for a person's eye, as one page that needs nothing but a browser; and what several people said of them.

The page holds small pictures and no name of a tile, case or folder: a key file in the experiment says which is which. Blind, it also holds
real training tiles among the synthetic ones and hides scores and sources; the question is then whether people can tell them apart.
"""

import base64
import io
import json
from itertools import combinations
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from histokit import data, files, places, provenance, screening, stats

VERSION = 1
REASONS = ("wrong class", "artefact", "copy", "stain", "blur")
MOST = 15_000  # bytes of one picture
SHOWN = ("judge", "similarity_feature", "similarity_picture", "realism", "focus", "stain")  # scores a page can be sorted by


def page(step, path, *, blind=False, seed=0):
    """Write the page of a finished selection, and its key; returns how many tiles it shows.

    Args:
        step: folder of a finished 05_select: of one class, or above those of all classes.
        path: HTML file.
        blind: hide scores, sources and verdicts, and mix in as many real training tiles of the same classes, where there are.
        seed: of the order, and of which real tiles.
    """
    rows, experiment, dataset = _selection(step)
    real = provenance.real_tiles(experiment)
    tiles = data.located(real, dataset, files.root() / "outputs" / experiment).set_index("tile_id", drop=False)
    rng = np.random.default_rng(files.seed(seed, "gallery") % 2**32)
    shown = [_card(row, tiles, dataset, blind) for row in rows.to_dict("records")]
    truth = [_true("synthetic", row) for row in rows.to_dict("records")]
    if blind:
        planted = _planted(rows, data.training(tiles.reset_index(drop=True)), rng)
        shown += [
            {"image": _thumb(data.pixels(planted.loc[[i]], dataset.tile_px)[0]), "label": planted.at[i, "label"]} for i in planted.index
        ]
        truth += [_true("real", row) for row in planted.to_dict("records")]
        order = rng.permutation(len(shown))
        shown, truth = [shown[i] for i in order], [truth[i] for i in order]
    key = files.digest("gallery", VERSION, blind, seed, [(t["kind"], t["sha256"]) for t in truth])[:16]
    cards = [{"id": f"{i:04d}", **card} for i, card in enumerate(shown)]
    held = {"experiment": experiment, "blind": blind, "tiles": {f"{i:04d}": one for i, one in enumerate(truth)}}
    files.write_json(_key(experiment, key), held)
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "gallery.html").read_text("utf-8"))
    given = {"key": key, "blind": blind, "reasons": list(REASONS), "scores": [] if blind else list(SHOWN), "tiles": cards}
    safe = json.dumps(given).replace("<", "\\u003c").replace("&", "\\u0026")  # a class name that looks like HTML stays text
    files.write_text(path, template.render(title=f"{dataset.name}: {len(cards)} tiles", blind=blind, given=safe))
    return len(cards)


def _true(kind, row):
    return {"kind": kind, "sha256": row["sha256"] or files.sha256(row["path"]), "tile_id": row["tile_id"], "label": row["label"]}


def _selection(step):
    """(synthetic rows, experiment, dataset) of a finished 05_select."""
    runs = [place for place in provenance.runs_below(step) if (places.read(place) or {}).get("status") == "done"]
    tables = [files.read_table(path) for place in runs if (path := provenance.manifest(place))]
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if "status" not in rows or not rows["source"].eq("synthetic").any():
        raise FileNotFoundError(f"{step} holds no finished selection of synthetic tiles; name the folder of a 05_select step")
    experiment = places.read(runs[0])["experiment"]
    dataset = data.read_frozen(files.root() / "outputs" / experiment / "00_dataset" / "dataset.json")
    rows = rows[rows["source"].eq("synthetic")].reset_index(drop=True)
    return data.located(rows, dataset, files.root() / "outputs" / experiment), experiment, dataset


def _card(row, tiles, dataset, blind):
    """What the page knows of one synthetic tile."""
    with Image.open(row["path"]) as picture:
        card = {"image": _thumb(np.asarray(picture.convert("RGB"))), "label": row["label"]}
    if blind:
        return card
    scores, sources = json.loads(row["scores"]), json.loads(row["sources"])
    other = {"source": sources[0] if sources else "", "nearest": scores.get("nearest_feature", "")}
    pixels = {name: data.pixels(tiles.loc[[tile]], dataset.tile_px)[0] for name, tile in other.items() if tile in tiles.index}
    card |= {name: _thumb(image) for name, image in pixels.items()}
    known = {name: round(float(scores[name]), 3) for name in SHOWN if isinstance(scores.get(name), int | float)}
    return card | {"status": row["status"], "why": row["reason"] if isinstance(row["reason"], str) else "", "scores": known}


def _planted(rows, real, rng):
    """As many real training tiles of each class as it has synthetic ones, or all there are."""
    some = []
    for name, count in rows["label"].value_counts().items():
        own = real[real["label"].eq(name)]
        some.append(own.iloc[np.sort(rng.permutation(len(own))[:count])])
    return pd.concat(some)


def _thumb(pixels):
    """A JPEG of at most `MOST` bytes as a data address; the same way for real and synthetic tiles."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
    for quality in (92, 85, 75, 60, 40, 20):
        stream = io.BytesIO()
        picture.save(stream, format="JPEG", quality=quality)
        if stream.tell() <= MOST:
            break
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _key(experiment, key):
    return files.inside(files.root() / "outputs" / experiment, f".galleries/{key}.json")


# --- what people said ------------------------------------------------------------------------------------------------


def read(paths):
    """Verdicts of several exported files: DataFrame rater, tile, verdict (keep or reject), reasons, and of the key: kind, sha256, label.

    Raises ValueError for a file that is no export, for pages that are not the same, and for a rater who comes twice.
    """
    tables, keys = [], set()
    for path in paths:
        try:
            held = files.read_json(path)
            key, rater = str(held["gallery"]), str(held["rater"])
            rows = [(str(v["id"]), v["verdict"], ", ".join(r for r in v.get("reasons", []) if r in REASONS)) for v in held["verdicts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no export of a gallery page ({error}); use its Export button") from None
        keys.add(key)
        tables.append(pd.DataFrame(rows, columns=["tile", "verdict", "reasons"]).assign(rater=rater))
    table = pd.concat(tables, ignore_index=True)
    if len(keys) > 1:
        raise ValueError("these verdicts are of different pages; import those of one page at a time")
    if table.duplicated(["rater", "tile"]).any():
        raise ValueError(f"rater {table.loc[table.duplicated(['rater', 'tile']), 'rater'].iloc[0]!r} comes twice; give every rater a name")
    if not set(table["verdict"]) <= set(screening.VERDICTS):
        raise ValueError(f"verdicts are {', '.join(screening.VERDICTS)}; got {sorted(set(table['verdict']))}")
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
        for row in told_apart(table).itertuples():
            share = f"{100 * row.right / row.tiles:.0f} % [{100 * row.low:.0f} to {100 * row.high:.0f}]"
            said.append(f"{row.rater} told real from synthetic in {row.right} of {row.tiles} tiles, {share}; 50 % is chance.")
    for row in agreement(table).itertuples():
        said.append(f"{row.first} and {row.second} agree on {100 * row.same:.0f} % of {row.tiles} tiles, kappa {row.kappa:.2f}.")
    return said


def write(table):
    """Append the settled verdicts to params/reviews/<experiment>.csv; returns how many. Those of a blind page answer another question."""
    if table.attrs["blind"]:
        return 0
    rows = settled(table)
    for row in rows.itertuples():
        screening.add_review(table.attrs["experiment"], row.sha256, row.verdict, row.reviewer, row.note)
    return len(rows)
