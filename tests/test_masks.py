"""Masks: read by what their values mean, bent as their pictures are, refused with a reason."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histokit.tiles import data, decode, masks, splits

GLAND = masks.Layers.of({"other": 0, "gland": 255})


def save(path, array, mode=None):
    Image.fromarray(np.asarray(array), mode).save(path) if mode else Image.fromarray(np.asarray(array)).save(path)
    return path


def square(n=8):
    ids = np.zeros((n, n), np.uint8)
    ids[2:5, 1:4] = 1
    return ids


def polygon(*rings, name="gland", kind="Polygon"):
    closed = [[*ring, ring[0]] for ring in rings]
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": closed}, "properties": {"classification": {"name": name}}}


def geojson(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def test_one_mask_says_the_same_in_every_way_it_may_be_written(root):
    ids = square()
    plain = save(root / "grey.png", ids * 255)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, *([9] * 762)])
    palette.save(root / "palette.png")
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[ids == 1] = (255, 0, 0)
    coloured = save(root / "rgb.png", rgb)
    blue = save(root / "blue.png", rgb[..., ::-1])
    objects = save(root / "objects.png", (ids * np.arange(64).reshape(8, 8) * 100).astype(np.uint16))
    bits = root / "bits.png"
    Image.fromarray(ids.astype(bool)).save(bits)
    ring = [(1, 2), (4, 2), (4, 5), (1, 5)]
    found = [
        masks.read(plain, GLAND),
        masks.read(bits, GLAND),
        masks.read(bits, masks.Layers.of({"other": 0, "gland": 1})),
        masks.read(root / "palette.png", masks.Layers.of({"other": 0, "gland": 1})),
        masks.read(root / "palette.png", masks.Layers.of({"other": "#000000", "gland": "#ff0000"})),
        masks.read(coloured, masks.Layers.of({"other": "rest", "gland": "#FF0000"})),
        masks.read(blue, masks.Layers.of({"other": "#000000", "gland": "#0000ff"})),
        masks.read(bits, masks.Layers.of({"other": "0-127", "gland": "128-255"})),
        masks.read(objects, masks.Layers.of({"other": 0, "gland": "rest"})),
        masks.read(objects, masks.Layers.of({"other": 0, "gland": "1-65535"})),
        masks.read(save(root / "three.png", np.repeat(ids[..., None] * 255, 3, 2)), GLAND),
        masks.read(geojson(root / "tile.geojson", polygon(ring)), GLAND, (8, 8)),
        masks.read(geojson(root / "t.geojson", polygon(ring, name="Tumor")), masks.Layers.of({"other": 0, "gland": "Tumor"}), (8, 8)),
    ]
    for one in found:
        np.testing.assert_array_equal(one, ids)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"other": 0}, "1 layers"),
        ({"other": 0, "gland": 0}, "value 0 is both 'other' and 'gland'"),
        ({"other": "0-10", "gland": [5, 255]}, "value 5 is both"),
        ({"other": "rest", "gland": "rest"}, "both 'other' and 'gland' are the rest"),
        ({"other": 0, "gland": 70000}, "a colour is written"),
        ({"other": 0, "gland": "9-3"}, "from the lower value to the higher"),
        ({"other": 0, "gland": 0.5}, "expected 255"),
        ({"other": 0, "gland": "#0000ff"}, "some values are colours and some grey"),
    ],
)
def test_layers_that_contradict_themselves_are_refused(layers, said):
    with pytest.raises(ValueError, match=said):
        masks.Layers.of(layers, "here")


def test_values_that_no_layer_has_are_named_and_counted(root):
    ids = square() * 255
    ids[7, 6:] = 17
    with pytest.raises(masks.BadMask, match=r"soft.png: holds 17 \(2 px\).*other, gland"):
        masks.read(save(root / "soft.png", ids), GLAND)
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[0, 0] = (1, 2, 3)
    with pytest.raises(masks.BadMask, match="#010203"):
        masks.read(save(root / "rgb.png", rgb), masks.Layers.of({"other": "#000000", "gland": "#ff0000"}))
    with pytest.raises(masks.BadMask, match="is coloured"):
        masks.read(root / "rgb.png", GLAND)


def test_a_mask_of_another_size_is_refused_with_both_sizes(root):
    with pytest.raises(masks.BadMask, match=r"8 x 8 px and its tile 16 x 16 px"):
        masks.read(save(root / "m.png", square() * 255), GLAND, (16, 16))


def test_a_mask_that_is_not_there_or_no_picture_is_named(root):
    with pytest.raises(masks.BadMask, match="no such mask"):
        masks.read(root / "none.png", GLAND)
    with pytest.raises(masks.BadMask, match="no such mask"):
        masks.read(root / "none.geojson", GLAND, (8, 8))
    (root / "text.png").write_text("no picture")
    with pytest.raises(masks.BadMask, match="is no picture"):
        masks.read(root / "text.png", GLAND)


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        (polygon([(20, 20), (30, 20), (30, 30)]), "outside the tile of 8 x 8"),
        (polygon([(0, 0), (4, 4), (4, 0), (0, 4)]), "Self-intersection"),
        (polygon([(0, 0), (4, 0), (4, 4)], name="necrosis"), "of class 'necrosis', which is none of the layers"),
        (polygon([(0, 0), (4, 0), (4, 4)], name=None), "without a class"),
        ({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": {}}, "is Point, no polygon"),
    ],
)
def test_polygons_that_mean_nothing_are_refused_by_name(root, feature, said):
    good = polygon([(0, 0), (2, 0), (2, 2), (0, 2)])
    with pytest.raises(masks.BadMask, match=rf"bad.geojson: object 2 of 2.*{said}"):
        masks.read(geojson(root / "bad.geojson", good, feature), GLAND, (8, 8))


def test_polygons_hold_the_pixels_whose_centre_they_hold(root):
    """Against a second definition, point by point; with a hole, over the edge, and the later layer on top."""
    layers = masks.Layers.of({"other": 0, "gland": 1, "lumen": 2})
    outer, hole = [(-3, 1.2), (9.7, 1.2), (9.7, 20), (-3, 20)], [(3, 4), (3, 7.6), (6.4, 7.6), (6.4, 4)]
    lumen = polygon([(8, 0), (11.5, 0), (11.5, 3), (8, 3)], name="lumen")
    found = masks.read(geojson(root / "p.geojson", lumen, polygon(outer, hole)), layers, (12, 10))
    for y in range(10):
        for x in range(12):
            at = x + 0.5, y + 0.5
            inside = at[0] < 9.7 and at[1] > 1.2 and not (3 < at[0] < 6.4 and 4 < at[1] < 7.6)
            assert found[y, x] == (2 if 8 < at[0] < 11.5 and at[1] < 3 else int(inside)), at


@pytest.mark.parametrize("fit", ["resize", "crop=24", "resample_to_mpp=1x16"])
@pytest.mark.parametrize("size", [(48, 32), (32, 48), (33, 47)])
def test_a_mask_stays_on_its_picture_whatever_the_fit(fit, size):
    """A picture that is its own mask: white where the mask is 1. After both went their way they agree but for one pixel at edges."""
    width, height = size
    ids = np.zeros((height, width), np.uint8)
    ids[height // 4 : height // 2 + 3, width // 3 : width // 3 * 2] = 1
    image = Image.fromarray(np.repeat(ids[..., None] * 255, 3, 2))
    px = 24 if fit.startswith("crop") else 16
    shown = decode.fitted(image, px, fit, 0.5)[..., 0] > 127
    bent = masks.fitted(ids, px, fit, 0.5)
    assert set(np.unique(bent)) <= {0, 1}
    inside = np.zeros_like(shown)
    inside[1:-1, 1:-1] = shown[1:-1, 1:-1] & shown[:-2, 1:-1] & shown[2:, 1:-1] & shown[1:-1, :-2] & shown[1:-1, 2:]
    assert (bent[inside] == 1).all() and inside.sum() > 10
    grown = shown.copy()
    for axis in (0, 1):
        for step in (1, -1):
            grown |= np.roll(shown, step, axis)
    assert (bent[~grown] == 0).all()


def test_a_plain_crop_changes_no_value():
    ids = np.random.default_rng(0).integers(0, 5, (20, 30)).astype(np.uint8)
    np.testing.assert_array_equal(masks.fitted(ids, 10, "crop=10"), ids[5:15, 10:20])


def test_what_is_thinner_than_a_cell_becomes_a_fraction():
    ids = np.zeros((1, 8, 8), np.uint8)
    ids[0, :, 3] = 1
    coarse = masks.coarser(masks.one_hot(ids, 2), 2)
    assert coarse.shape == (1, 2, 2, 2)
    np.testing.assert_allclose(coarse[0, 1], [[0.25, 0], [0.25, 0]])
    np.testing.assert_allclose(coarse.sum(1), 1)


@pytest.fixture
def annotated(root):
    """A data set of six training cases, two of test; the third tile of each case has no mask."""
    folder, rows = root / "tiles", []
    for case in range(8):
        for k in range(3):
            label, name = ("a", "b")[case % 2], f"{case}_{k}.png"
            (folder / label).mkdir(parents=True, exist_ok=True)
            save(folder / label / name, np.full((8, 8, 3), 40 * k + case, np.uint8))
            if k < 2:
                (folder / "masks" / label).mkdir(parents=True, exist_ok=True)
                save(folder / "masks" / label / name, square() * 255)
            rows.append({"path": f"{label}/{name}", "label": label, "case_id": str(case), "split": "test" if case > 5 else "train"})
    pd.DataFrame(rows).to_csv(folder / "tiles.csv", index=False)
    (root / "params" / "set.yaml").write_text(
        f"root: {folder}\ntable: tiles.csv\ncolumns: {{file_name: path}}\nclasses: [a, b]\ntile_px: 16\nfit: resize\n"
        "mask: masks/{label}/{stem}.png\npartly_annotated: true\nlayers: {other: 0, gland: 255}\n"
    )
    return root / "params" / "set.yaml"


def manifest(path):
    described = data.describe(path)
    tiles = data.scan(described).assign(width=8, height=8)
    held = data.Dataset("set", ["a", "b"], {}, {}, 16, "resize", None, str(described.root), True, {}, layers=described.layers)
    return data.located(tiles, held, path.parent)


def test_tiles_may_lack_a_mask_only_where_the_description_says_so(annotated):
    tiles = manifest(annotated)
    assert masks.has(tiles).sum() == 16 and len(tiles) == 24
    annotated.write_text(annotated.read_text().replace("partly_annotated: true\n", ""))
    with pytest.raises(ValueError, match=r"has no mask 'masks/a/0_2.png'.*partly_annotated: true"):
        data.scan(data.describe(annotated))
    annotated.write_text(annotated.read_text().replace("masks/{label}", "nowhere/{label}") + "partly_annotated: true\n")
    with pytest.raises(ValueError, match="none of 24 tiles has a mask"):
        data.scan(data.describe(annotated))


def test_pictures_and_masks_of_a_manifest_come_in_step(annotated):
    tiles = manifest(annotated)
    own = tiles[masks.has(tiles)]
    ids = masks.pixels(own, GLAND)
    assert ids.shape == (16, 16, 16) == data.pixels(own)[..., 0].shape
    np.testing.assert_array_equal(ids[0], np.kron(square(), np.ones((2, 2), np.uint8)))
    with pytest.raises(masks.BadMask, match="a/0_2.png: has no mask"):
        masks.pixels(tiles, GLAND)


def test_the_survey_names_every_mask_that_cannot_be_used(annotated):
    tiles = manifest(annotated)
    save(annotated.parent.parent / "tiles/masks/a/0_0.png", np.zeros((4, 4), np.uint8))
    save(annotated.parent.parent / "tiles/masks/b/1_0.png", np.full((8, 8), 9, np.uint8))
    for k in range(2):
        save(annotated.parent.parent / f"tiles/masks/a/6_{k}.png", np.zeros((8, 8), np.uint8))
    found = masks.survey(tiles, GLAND)
    said = masks.problems(found)
    assert "2 of 16 masks cannot be used" in said and "a/0_0.png: is 4 x 4 px" in said and "b/1_0.png: holds 9 (64 px)" in said
    table = masks.shares(found, GLAND).set_index("split")
    assert table.loc["train", "masks"] == 10 and table.loc["train", "gland"] == pytest.approx(9 / 64, abs=1e-3)
    assert table.loc["test", "cases without foreground"] == 1


def test_more_annotated_cases_hold_the_fewer_and_tests_keep_their_masks(annotated):
    tiles = manifest(annotated)
    whole = splits.annotate(tiles, 0, seed=0)
    assert "annotated" not in whole and masks.has(whole).sum() == 16
    known = []
    for cases in range(1, 7):
        some = splits.annotate(tiles, cases, seed=0)
        assert masks.has(some[some["split"].eq("test")]).sum() == 4
        mine = some[masks.has(some) & some["split"].eq("train")]
        known.append(set(mine["case_id"]))
        assert len(known[-1]) == cases and len(mine) == 2 * cases
        assert some["mask"].tolist() == tiles["mask"].tolist()
    assert all(few < more for few, more in zip(known, known[1:], strict=False))
    assert set(splits.annotate(tiles, 2, seed=0).query("annotated and split == 'train'")["label"]) == {"a", "b"}
    draws = {frozenset(splits.annotate(tiles, 2, 0, draw).query("annotated and split == 'train'")["case_id"]) for draw in range(8)}
    assert len(draws) > 2
    with pytest.raises(ValueError, match="masks of 7 training cases, and 6 have any"):
        splits.annotate(tiles, 7, seed=0)


def test_where_a_tile_lies_on_its_slide_is_read_from_columns_and_from_names(root):
    folder, rows = root / "tiles", []
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for x in (0, 512):
            save(folder / name / f"S1_x{x}_y1024.png", np.full((8, 8, 3), x // 4 + ord(name), np.uint8))
            rows.append({"path": f"{name}/S1_x{x}_y1024.png", "label": name, "case_id": name, "split": "train", "left": x, "top": 1024})
    path = root / "params" / "set.yaml"
    path.write_text(f"root: {folder}\nclasses: [a, b]\ntile_px: 16\ncase_pattern: '(?P<slide>S1)_x(?P<x>\\d+)_y(?P<y>\\d+)'\n")
    named = data.scan(data.describe(path))
    assert named["x"].tolist() == [0, 512, 0, 512] and named["y"].eq(1024).all() and set(named["slide"]) == {"S1"}
    pd.DataFrame(rows).to_csv(folder / "tiles.csv", index=False)
    table = f"root: {folder}\ntable: tiles.csv\nclasses: [a, b]\ntile_px: 16\ncolumns: {{file_name: path, x: left, y: top}}\n"
    path.write_text(table)
    found = data.scan(data.describe(path))
    assert found["x"].tolist() == [0, 512, 0, 512]
    path.write_text(table.replace(", y: top", ""))
    with pytest.raises(ValueError, match="'x' is read and the other of x and y is not"):
        data.scan(data.describe(path))
    pd.DataFrame(rows).assign(left="far").to_csv(folder / "tiles.csv", index=False)
    path.write_text(table)
    with pytest.raises(ValueError, match="x of .* is 'far', no number of pixels"):
        data.scan(data.describe(path))
    path.write_text(table.replace(", x: left, y: top", ""))
    assert "x" not in data.scan(data.describe(path))


def test_polygons_beside_the_tiles_are_masks_by_template_and_by_column(annotated, root):
    folder = root / "tiles"
    for case in range(8):
        for k in range(2):
            geojson(folder / ("a", "b")[case % 2] / f"{case}_{k}.geojson", polygon([(1, 2), (4, 2), (4, 5), (1, 5)]))
    pictures = masks.pixels(manifest(annotated).pipe(lambda t: t[masks.has(t)]), GLAND)
    annotated.write_text(annotated.read_text().replace("masks/{label}/{stem}.png", "'{folder}/{stem}.geojson'"))
    tiles = manifest(annotated)
    assert masks.has(tiles).sum() == 16
    np.testing.assert_array_equal(masks.pixels(tiles[masks.has(tiles)], GLAND), pictures)
    table = pd.read_csv(folder / "tiles.csv", dtype=str)
    named = [str(name).replace(".png", ".geojson") if not name.endswith("_2.png") else "" for name in table["path"]]
    table.assign(mask=named).to_csv(folder / "tiles.csv", index=False)
    annotated.write_text(annotated.read_text().replace("mask: '{folder}/{stem}.geojson'\n", ""))
    again = manifest(annotated)
    assert again["mask"].tolist() == tiles["mask"].tolist()
