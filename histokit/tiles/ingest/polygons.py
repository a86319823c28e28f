"""Annotations as QuPath exports them, polygons in GeoJSON, drawn as the layers of a mask."""

import json
from pathlib import Path

import numpy as np

from histokit.tiles.decode import BadMask

VERSION = 1


def rasterised(path, layers, size, name=None):
    """uint8 [H, W] layer ids of polygons as QuPath exports them: a pixel belongs to the polygon that holds its centre.

    Layers are painted in their order, so that where two overlap the later layer shows; what no polygon covers is the background. A
    polygon may reach over the tile's edge. Raises BadMask for one that lies outside, crosses itself, is no polygon, or has a class that
    no layer names.
    """
    import shapely
    from shapely.geometry import shape

    name = name or str(path)
    if size is None:
        raise ValueError(f"{name}: polygons have no size of their own; pass that of the tile")
    width, height = size
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadMask(f"{name}: no such mask; correct `mask` in the description, or leave the tile's cell empty") from error
    except ValueError as error:
        raise BadMask(f"{name}: is not valid JSON ({error}); export it again from QuPath: File, Export objects as GeoJSON") from error
    found = held.get("features", [held]) if isinstance(held, dict) else held
    areas = []
    for i, feature in enumerate(found):
        where = f"{name}: object {i + 1} of {len(found)}"
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        if not geometry or geometry.get("type") not in ("Polygon", "MultiPolygon"):
            raise BadMask(f"{where} is {geometry.get('type') if geometry else 'no feature'}, no polygon; export annotations of areas alone")
        facts = feature.get("properties") or {}
        word = (facts.get("classification") or {}).get("name") or facts.get("name")
        layer = layers.of_class(word)
        if layer is None:
            said = f"of class {word!r}" if word else "without a class"
            raise BadMask(
                f"{where} is {said}, which is none of the layers ({', '.join(layers.names)}); name it in `layers`, or give it one"
            )
        area = shape(geometry)
        if not area.is_valid or area.is_empty:
            raise BadMask(f"{where} is no proper area ({shapely.is_valid_reason(area)}); mend it in QuPath, or with shapely.make_valid")
        left, top, right, bottom = area.bounds
        if right <= 0 or bottom <= 0 or left >= width or top >= height:
            raise BadMask(
                f"{where} lies at {left:.0f} to {right:.0f}, {top:.0f} to {bottom:.0f}, outside the tile of {width} x {height} px; "
                "coordinates are those of the tile and not of the slide"
            )
        areas.append((layer, area))
    ids = np.zeros((height, width), np.uint8)
    for layer, area in sorted(areas, key=lambda one: one[0]):
        left, top, right, bottom = area.bounds
        columns = np.arange(max(0, int(left)), min(width, int(np.ceil(right))))
        rows = np.arange(max(0, int(top)), min(height, int(np.ceil(bottom))))
        shapely.prepare(area)
        inside = shapely.contains_xy(area, columns[None] + 0.5, rows[:, None] + 0.5)
        ids[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][inside] = layer
    return ids
