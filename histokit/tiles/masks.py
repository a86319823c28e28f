"""Annotations as layers: which of K tissues each pixel of a tile shows.

A mask takes the same way as its picture (`decode.field`), by the nearest pixel, so that no value is made up at an edge. It may be a grey,
coloured or palette picture, or polygons as QuPath exports them (GeoJSON). Which values mean what stands in the description's `layers`;
a value that none of them names is refused, for a silent background would be a wrong annotation.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from histokit.core import files
from histokit.tiles import decode
from histokit.tiles.decode import BadMask
from histokit.tiles.ingest import polygons

VERSION = 1
REST = "rest"  # every value that no other layer names
POLYGONS = (".geojson", ".json")


@dataclass(frozen=True)
class Layers:
    """The layers of a data set in fixed order, the background first: the place of a layer is its id.

    Args:
        names: K >= 2 of them.
        ranges: of each the values of a mask, a tuple of (lowest, highest), both included.
        called: of each the names that polygons of it go by.
        coloured: whether values are colours, 0xRRGGBB; then none is a grey value.
        rest: id of the layer that takes every other value, None for none.
    """

    names: tuple
    ranges: tuple
    called: tuple
    rest: int | None = None
    coloured: bool = False

    @classmethod
    def of(cls, described, where="layers"):
        """From {name: values} of a description; see `_values` for what values may be. ValueError for fewer than two or an overlap."""
        if len(described) < 2:
            raise ValueError(f"{where}: {len(described)} layers ({', '.join(described)}); there are at least a background and one tissue")
        names, ranges, called, rest, kinds = tuple(map(str, described)), [], [], None, set()
        for k, (name, given) in enumerate(described.items()):
            own, words = [], {str(name)}
            for value in given if isinstance(given, list) else [given]:
                found = _values(value, f"{where}: {name}")
                if found == REST:
                    if rest is not None:
                        raise ValueError(f"{where}: both {names[rest]!r} and {name!r} are the rest; one layer alone can be")
                    rest = k
                elif isinstance(found, str):
                    words.add(found)
                else:
                    kinds.add(str(value).startswith("#"))
                    own.append(found)
            for low, high in own:
                for other, theirs in zip(names, ranges, strict=False):
                    if both := [max(a, low) for a, b in theirs if a <= high and low <= b]:
                        raise ValueError(f"{where}: value {both[0]} is both {other!r} and {name!r}; each value means one layer")
            ranges.append(tuple(own))
            called.append(frozenset(words))
        if len(kinds) > 1:
            raise ValueError(f"{where}: some values are colours and some grey values; a mask is one or the other, write '#000000' for 0")
        return cls(names, tuple(ranges), tuple(called), rest, True in kinds)

    @classmethod
    def of_dataset(cls, dataset):
        """Those of a `data.Dataset`; ValueError where it has none."""
        if not dataset.layers:
            raise ValueError(
                f"the dataset {dataset.name} has no `layers`: say in its description where masks lie (`mask`) and what their values "
                "show, such as layers: {other: 0, gland: 255}, and run 00 again"
            )
        return cls.of(dataset.layers, f"{dataset.name}: `layers`")

    def __len__(self):
        return len(self.names)

    def ids(self, values, name="mask"):
        """uint8 ids of an array of values (int); BadMask names the values that no layer has."""
        found, where = np.unique(values, return_inverse=True)
        table = np.full(len(found), 255 if self.rest is None else self.rest, np.uint8)
        for k, own in enumerate(self.ranges):
            for low, high in own:
                table[(found >= low) & (found <= high)] = k
        if (table == 255).any():
            counts = np.bincount(where.ravel(), minlength=len(found))
            odd = ", ".join(f"{_shown(v, self.coloured)} ({n:,} px)" for v, n, t in zip(found, counts, table, strict=True) if t == 255)
            known = ", ".join(self.names)
            raise BadMask(
                f"{name}: holds {_short(odd)}, which is none of the layers ({known}); name these values in the description's `layers`, or "
                "give one layer `rest`"
            )
        return table[where].reshape(values.shape)

    def of_class(self, word):
        """Id of the layer whose polygons go by `word`, None where there is none."""
        return next((k for k, words in enumerate(self.called) if word in words), None)


def _values(value, where):
    """(lowest, highest) of 255, "128-255" or "#aa00ff"; REST of "rest"; the word itself of another, a name of polygons."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= 0xFFFF:
            raise ValueError(f"{where} is {value}; a grey value or number lies in 0 to 65535, a colour is written '#rrggbb'")
        return value, value
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}; expected 255, '128-255', '#aa00ff', rest, or the name of a class of polygons, or a list")
    if found := re.fullmatch(r"(\d+)-(\d+)", value):
        low, high = int(found[1]), int(found[2])
        if low > high or high > 0xFFFF:
            raise ValueError(f"{where} is {value!r}; a range goes from the lower value to the higher one, at most 65535")
        return low, high
    if re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        colour = int(value[1:], 16)
        return colour, colour
    return value


def _shown(value, coloured):
    return f"#{value:06x}" if coloured else str(value)


def _short(text, most=160):
    return text if len(text) <= most else f"{text[:most].rpartition(', ')[0]} and more"


# --- from a file to ids ----------------------------------------------------------------------------------------------


def read(path, layers, size=None, name=None):
    """uint8 [H, W] layer ids of one mask.

    Args:
        path: a picture, or polygons (GeoJSON) in pixels of the tile.
        layers: Layers.
        size: (width, height) of the tile; polygons need it, a picture of another size is refused.
        name: how to call the file in an error.

    Raises BadMask for a file that is missing, unreadable, of another size, or holds what no layer names.
    """
    path, name = Path(path), name or str(path)
    if path.suffix.lower() in POLYGONS:
        return polygons.rasterised(path, layers, size, name)
    try:
        with Image.open(path) as image:
            image.load()
            ids = layers.ids(_numbers(image, layers, name), name)
    except FileNotFoundError as error:
        raise BadMask(f"{name}: no such mask; correct `mask` in the description, or leave the tile's cell empty") from error
    except BadMask:
        raise
    except UnidentifiedImageError as error:
        raise BadMask(f"{name}: is no picture, whatever its name says; save the mask as PNG, or polygons as .geojson") from error
    except Exception as error:  # a broken file can raise nearly anything inside a codec
        raise BadMask(f"{name}: cannot be decoded ({error}); copy it again from its source") from error
    if size is not None and (ids.shape[1], ids.shape[0]) != tuple(size):
        raise BadMask(
            f"{name}: is {ids.shape[1]} x {ids.shape[0]} px and its tile {size[0]} x {size[1]} px; export masks at the size of the tiles, "
            "by the nearest pixel"
        )
    return ids


def _numbers(image, layers, name):
    """int [H, W]: colours, grey values, places in a palette, or numbers of objects."""
    kind = image.mode
    if layers.coloured and kind in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        rgb = np.asarray(image.convert("RGBA").convert("RGB"), np.int64)
        return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    if kind == "1":  # no values but 0 and 1, which may be told as 0 and 255
        named = [any(low <= value <= high for own in layers.ranges for low, high in own) for value in (1, 255)]
        return np.asarray(image, np.int64) * (1 if named == [True, False] else 255)
    if kind in ("L", "LA", "P", "PA", "I") or kind.startswith("I;16"):
        return np.asarray(image.getchannel(0) if kind in ("LA", "PA") else image).astype(np.int64)
    if kind not in ("RGB", "RGBA"):
        raise BadMask(f"{name}: has colour mode {kind}; save the mask as grey, palette or RGB")
    rgb = np.asarray(image, np.int64)[..., :3]
    if (rgb != rgb[..., :1]).any():
        raise BadMask(f"{name}: is coloured, and `layers` names grey values; write its colours there, such as tumour: '#ff0000'")
    return rgb[..., 0]


def fitted(ids, tile_px, fit="resize", mpp=None, name="mask"):
    """uint8 [tile_px, tile_px] of ids [H, W]: the same square that `decode.fitted` takes of the picture, by the nearest pixel."""
    height, width = ids.shape
    side = decode.field(width, height, fit, tile_px, mpp, name)
    left, top = (width - side) / 2, (height - side) / 2
    if side == tile_px:
        left, top = int(left), int(top)
        return ids[top : top + tile_px, left : left + tile_px]
    at = (np.arange(tile_px) + 0.5) * side / tile_px
    rows = np.floor(top + at).astype(int).clip(0, height - 1)
    columns = np.floor(left + at).astype(int).clip(0, width - 1)
    return ids[rows[:, None], columns[None]]


# --- of a manifest ---------------------------------------------------------------------------------------------------


def has(tiles):
    """Whether each row has a mask, bool [N]: in the manifest, and not held back by `annotated`."""
    found = tiles["mask"].fillna("").ne("")
    return found & tiles["annotated"].astype(bool) if "annotated" in tiles else found


def annotated(tiles, *splits, every=False):
    """Real tiles of some splits with a mask; `every` takes the masks that are held back as well, for an upper bound."""
    real = tiles[tiles["split"].isin(splits) & tiles["source"].eq("real") & tiles["use"].ne("withheld")]
    return real[real["mask"].fillna("").ne("") if every else has(real)].reset_index(drop=True)


def path_of(row):
    """Where the mask of a manifest row, as `data.load` returns it, lies: inside the root of its tile."""
    return files.inside(row["folder"], row["mask"])


def pixels(tiles, layers, tile_px=None):
    """uint8 [N, px, px] layer ids of the rows of a manifest, in step with `data.pixels`; a row without a mask raises BadMask."""
    tiles = tiles.to_frame().T if isinstance(tiles, pd.Series) else tiles
    side = tile_px or (int(tiles["tile_px"].iloc[0]) if len(tiles) else 0)
    result = np.empty((len(tiles), side, side), np.uint8)
    made = Layers.of({name: i for i, name in enumerate(layers.names)})  # a made mask holds the ids themselves
    for i, (_, row) in enumerate(tiles.iterrows()):
        if not row["mask"]:
            raise BadMask(f"{row['tile_id']}: has no mask; take the annotated tiles alone (masks.has)")
        own = made if row.get("source") == "synthetic" else layers
        ids = read(path_of(row), own, (int(row["width"]), int(row["height"])) if row["width"] else None, row["mask"])
        fit = "resize" if row.get("source") == "synthetic" else row.get("fit", "resize")
        result[i] = fitted(ids, side, fit, row.get("mpp"), row["mask"])
    return result


def survey(tiles, layers):
    """What the masks of a manifest show, one row a mask: tile_id, split, case_id, problem ("" for none), and the share of each layer.

    Every mask is read as training will read it; what cannot be read is named in `problem`, all of it, before anything is trained.
    """
    rows = []
    for _, row in tiles[tiles["mask"].fillna("").ne("")].iterrows():
        told = {"tile_id": row["tile_id"], "split": row["split"], "case_id": row["case_id"], "problem": ""}
        try:
            ids = pixels(row, layers)[0]
            shares = np.bincount(ids.ravel(), minlength=len(layers)) / ids.size
        except ValueError as error:
            told["problem"], shares = str(error), np.full(len(layers), np.nan)
        rows.append(told | dict(zip(layers.names, shares, strict=True)))
    return pd.DataFrame(rows, columns=["tile_id", "split", "case_id", "problem", *layers.names])


def foreground(tiles, layers):
    """Share [N] of each tile of a manifest that is not the first layer, the background."""
    return np.array([(pixels(row, layers) > 0).mean() for _, row in tiles.iterrows()])


def shares(found, layers):
    """The masks of a `survey` by split, a table for reading: masks, cases, mean share of each layer, cases without any foreground."""
    rows = []
    for split, own in found[found["problem"].eq("")].groupby("split", sort=False):
        inside = own[list(layers.names[1:])].sum(axis=1).groupby(own["case_id"]).sum()
        mean = {name: round(float(own[name].mean()), 3) for name in layers.names}
        told = {"split": split, "masks": len(own), "cases": own["case_id"].nunique()}
        rows.append(told | mean | {"cases without foreground": int(inside.eq(0).sum())})
    return pd.DataFrame(rows)


def said(tiles, found, layers):
    """What a reader should know of the masks, in sentences."""
    train = tiles[tiles["split"].eq("train") & tiles["mask"].fillna("").ne("")]
    if "annotated" in tiles:
        own = train[has(train)]
        cases = own["case_id"].nunique()
        yield f"Masks of {len(own):,} training tiles of {cases:,} cases are used; {len(train) - len(own):,} are held back."
    bare = tiles["mask"].fillna("").eq("").sum()
    if bare:
        yield f"{bare:,} of {len(tiles):,} tiles have no mask."
    empty = found[found["problem"].eq("") & found[list(layers.names[1:])].sum(axis=1).eq(0)]
    if len(empty):
        yield f"{len(empty):,} masks show {layers.names[0]} alone, such as that of {empty['tile_id'].iloc[0]}."


def problems(found, most=5):
    """One sentence on the masks of a `survey` that cannot be used; "" where all can."""
    bad = found.loc[found["problem"].ne(""), "problem"].tolist()
    return f"{len(bad)} of {len(found)} masks cannot be used:\n" + "\n".join(bad[:most]) if bad else ""


# --- as what a network reads -----------------------------------------------------------------------------------------


def one_hot(ids, count):
    """Layout [B, K, H, W] float32 in {0, 1} of ids [B, H, W] (array or tensor), K = `count` layers."""
    import torch

    ids = torch.as_tensor(np.ascontiguousarray(ids) if isinstance(ids, np.ndarray) else ids).long()
    return torch.nn.functional.one_hot(ids, count).movedim(-1, -3).float()


def coarser(layout, px):
    """Layout [B, K, px, px]: the share of each layer in each cell, by area, so that what is thinner than a cell becomes a fraction."""
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(layout, px)
