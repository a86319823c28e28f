import io
import json
import types

import numpy as np
import pandas as pd
import pytest
from folders import FolderRun, class_folders, described, encoded, save, texture
from PIL import Image, ImageEnhance

from histokit.core import files
from histokit.diffusion import pretrained
from histokit.show import text
from histokit.tiles import audit, contamination, data, near_duplicates, splits
from histokit.vision import features

PATTERN = "case_pattern: '(?P<case_id>P[0-9]+)_'\n"


def recompressed(image, quality):
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


CHANGES = {
    "same": lambda image: image,
    "flipped": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "turned 90": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned 180": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned 270": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "transposed": lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    "other diagonal": lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    "JPEG 75": lambda image: recompressed(image, 75),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "turned, JPEG 75, darker": lambda image: recompressed(ImageEnhance.Brightness(image.rotate(90)).enhance(0.9), 75),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change):
    images = [Image.fromarray(texture(seed, 96)) for seed in range(40)]
    planted = [*images, *(CHANGES[change](images[i]) for i in (3, 17))]
    waves = near_duplicates.signatures(np.stack([near_duplicates.thumbnail(image) for image in planted]))
    i, j, value, symmetry = near_duplicates.pairs(waves)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(3, 40), (17, 41)]
    assert (value > 0.95).all() and len(set(symmetry.tolist())) == 1


@pytest.mark.parametrize(
    ("change", "name"),
    [("same", "same"), ("flipped", "flipped"), ("turned 90", "turned"), ("turned 180", "turned"), ("transposed", "transposed")],
)
def test_the_symmetry_is_named(change, name):
    image = Image.fromarray(texture(0, 96))
    waves = near_duplicates.signatures(np.stack([near_duplicates.thumbnail(image), near_duplicates.thumbnail(CHANGES[change](image))]))
    assert near_duplicates.SYMMETRIES[near_duplicates.pairs(waves)[3][0]] == name


def test_candidates_miss_nothing_that_the_eight_symmetries_would_find():
    waves = near_duplicates.signatures(np.stack([near_duplicates.thumbnail(Image.fromarray(texture(seed, 64))) for seed in range(60)]))
    flat, eight = waves.reshape(60, -1), near_duplicates.symmetric(waves).reshape(60, 8, -1)
    best = np.einsum("id,jsd->ijs", flat, eight).max(axis=2)
    quick = near_duplicates.invariant(waves) @ near_duplicates.invariant(waves).T
    assert (quick >= best - 1e-5).all()
    i, j, value, _ = near_duplicates.pairs(waves, threshold=0.2, block=7)
    expected = np.argwhere(np.triu(best >= 0.2, 1))
    assert len(expected) > 5 and sorted(zip(i, j, strict=True)) == [tuple(pair) for pair in expected]
    np.testing.assert_allclose(value, best[i, j], atol=1e-5)


def test_two_sets_are_compared_with_each_other_only():
    waves = near_duplicates.signatures(np.stack([near_duplicates.thumbnail(Image.fromarray(texture(seed, 64))) for seed in (1, 2, 1)]))
    i, j, *_ = near_duplicates.pairs(waves[:2], waves[[2, 0]])
    assert list(zip(i, j, strict=True)) == [(0, 0), (0, 1)]


def test_nearly_uniform_tiles_are_no_copies_of_each_other():
    rng = np.random.default_rng(0)
    blank = [rng.integers(240, 243, (64, 64, 3), np.uint8) for _ in range(5)]
    assert (
        len(near_duplicates.pairs(near_duplicates.signatures(np.stack([near_duplicates.thumbnail(Image.fromarray(b)) for b in blank])))[0])
        == 0
    )


# ---- the audit of a folder


def checked(root, text="", split=None, **kwargs):
    held = described(root, root / "tiles", PATTERN + text)
    tiles, facts, thumbnails = audit.read(data.scan(held), held.root)
    found = audit.copied(tiles, thumbnails)
    tiles = audit.readable(tiles, facts)
    tiles = splits.assign(tiles, held.split, 0, found) if split is None else tiles.assign(split=split(tiles))
    return held, tiles, facts, found, audit.table(tiles, held, facts, found).set_index("check")


def test_a_clean_folder_has_no_findings_and_knows_its_sizes_and_hashes(root):
    class_folders(root / "tiles", cases=40, tiles=1)
    _, tiles, facts, found, table = checked(root)
    assert table["count"].sum() == 0 and len(found) == 0 and facts["problem"].eq("").all()
    assert set(tiles["width"]) == {32} and tiles["sha256"].str.len().eq(64).all()


def test_every_finding_has_a_count_an_example_and_a_remedy(root):
    folder = class_folders(root / "tiles", cases=10, tiles=2)
    (folder / "a" / "P00_empty.png").write_bytes(b"")
    (folder / "a" / "P00_cut.jpg").write_bytes(encoded(texture(1), "JPEG")[:-100])
    (folder / "b" / "P01_text.png").write_text("not a picture")
    save(folder / "a" / "P02_grey.png", Image.fromarray(texture(99)).convert("L"))
    save(folder / "b" / "P02_clear.png", Image.fromarray(texture(98)).convert("RGBA"))
    save(folder / "b" / "P03_blank.png", np.full((32, 32, 3), 240, np.uint8))
    save(folder / "b" / "P04_large.png", texture(97, 48))
    save(folder / "b" / "P05_copy.png", texture(1))  # of a/P00_0.png, byte for byte, under another label
    save(folder / "a" / "P06_flip.png", texture(2)[::-1])  # of a/P00_1.png
    *_, found, table = checked(root, split=lambda tiles: np.where(tiles["case_id"].isin(["P05", "P06"]), "test", "train"))
    expected = {
        "unreadable file": 3, "converted: grey": 1, "converted: alpha": 1, "blank or black tile": 1, "several sizes": 2,
        "same file twice": 1, "near copy": 1, "one picture, two labels": 1, "copy across splits": 2, "fewer than 8 test cases": 2,
    }  # fmt: skip
    assert table.loc[table["count"] > 0, "count"].to_dict() == expected
    assert (table["what to do"].ne("") == table["count"].gt(0)).all()
    assert "P00_cut.jpg: cannot be decoded" in table.loc["unreadable file", "examples"]
    assert found[["a", "b", "kind"]].to_numpy().tolist() == [
        ["a/P00_0.png", "b/P05_copy.png", "exact"],
        ["a/P00_1.png", "a/P06_flip.png", "flipped"],
    ]
    shown = audit.side_by_side(
        found, pd.DataFrame({"tile_id": data.scan(described(root, folder))["tile_id"], "label": "x", "split": "train"})
    )
    assert shown["tile_id"].tolist() == ["a/P00_0.png", "b/P05_copy.png", "a/P00_1.png", "a/P06_flip.png"]


def test_unreadable_tiles_stop_unless_told_to_leave_them_out(root):
    folder = class_folders(root / "tiles")
    (folder / "a" / "P00_empty.png").write_bytes(b"")
    held, tiles, facts, *_ = checked(root)
    with pytest.raises(
        ValueError, match=r"1 of 37 tiles cannot be used:\n  a/P00_empty.png: is empty .0 bytes.*\n.*`exclude:` in .*set.yaml"
    ):
        audit.refuse(facts, held)
    assert audit.refuse(facts, held, "leave_out") == "1 of 37 tiles cannot be decoded and are left out"
    assert len(tiles) == 36
    with pytest.raises(ValueError, match="expected stop or leave_out"):
        audit.refuse(facts, held, "skip")


def test_a_file_that_is_there_a_thousand_times_costs_a_thousand_pairs(root):
    tiles = pd.DataFrame({"tile_id": [str(i) for i in range(1000)], "sha256": ["x"] * 1000})
    assert len(audit.copied(tiles, np.stack([near_duplicates.thumbnail(Image.fromarray(texture(1)))] * 1000))) == 999


def test_without_pixels_the_audit_still_looks_at_cases(root):
    class_folders(root / "tiles", ["a"], cases=20, tiles=1)
    save(root / "tiles" / "b" / "P90_0.png", texture(500))
    held = described(root, root / "tiles", PATTERN)
    tiles = splits.assign(data.scan(held), held.split, 0)
    table = audit.table(tiles, held).set_index("check")
    assert table.loc["class from a single case", ["count", "examples"]].tolist() == [1, "b"]
    reach = audit.reach(tiles, held.classes, {"a": "head", "b": "tail"}).set_index("class")
    assert reach.loc["b", "what the test can show"].startswith("cannot be evaluated: all its 1 tiles come from a single case")
    assert reach.loc["a", "one tile"] == "20.0 points" and "5 test cases" in reach.loc["a", "what the test can show"]


def test_a_case_in_two_splits_stops_the_run_when_all_findings_are_written(root, repository):
    class_folders(root / "tiles", cases=6, above="train")
    save(root / "tiles/test/a/P03_9.png", texture(900))
    save(root / "tiles/test/b/P09_9.png", np.full((32, 32, 3), 240, np.uint8))
    held, run = described(root, root / "tiles", PATTERN), FolderRun(root)
    book = json.loads((repository / "notebooks/00_dataset.ipynb").read_text())
    cells = {cell["id"]: "".join(cell["source"]) for cell in book["cells"]}
    space = {"audit": audit, "data": data, "files": files, "splits": splits, "text": text}
    space |= {"run": run, "described": held, "tiles": data.scan(held), "seed": 0, "draw": 0, "on_unreadable": "stop"}
    space |= {"contamination": contamination, "pretrained": pretrained, "features": features, "base_model": "mini", "encoder": "mini-sup"}
    space["plots"] = types.SimpleNamespace(table=len)
    exec(cells["audit"], space)
    table = files.read_table(run.path("audit.csv")).set_index("check")
    assert table.loc["case in two splits", ["count", "examples"]].tolist() == [1, "case P03"]
    assert table.loc["blank or black tile", "count"] == 1
    with pytest.raises(ValueError, match="'case P03' is in two splits: 'test/a/P03_9.png' in test and 'train/a/P03_0.png' in train"):
        exec(cells["refuse"], space)
    assert not run.path("dataset.json").exists()


def test_a_case_of_two_patients_stops_the_run_as_late(root):
    class_folders(root / "tiles", cases=8)
    held = described(root, root / "tiles", PATTERN)
    tiles = data.scan(held).assign(patient=[f"patient {i % 2}" for i in range(48)])
    tiles = splits.assign(tiles, held.split, 0, strict=False)
    assert audit.table(tiles, held)["count"].sum() > 0
    with pytest.raises(ValueError, match="has two patients"):
        splits.check(tiles)


def test_no_case_ids_is_a_finding(root):
    held = described(root, class_folders(root / "tiles"))
    table = audit.table(splits.assign(data.scan(held), held.split, 0), held).set_index("check")
    assert table.loc["no case ids", "examples"] == "36 tiles, each its own case"


def test_a_picture_of_two_or_three_colours_is_a_finding_of_its_own(root):
    folder = class_folders(root / "set")
    square = np.zeros((32, 32), np.uint8)
    square[8:24, 8:24] = 255
    save(folder / "a" / "P00_7.png", square)
    save(folder / "a" / "P00_8.png", Image.fromarray(np.stack([square, square // 2, square * 0], 2)))
    save(folder / "b" / "P00_9.png", np.full((32, 32, 3), 240, np.uint8))  # blank, and no mask
    held = described(root, "set", PATTERN)
    tiles, facts, thumbnails = audit.read(data.scan(held), held.root)
    checks = audit.table(splits.assign(tiles, held.split, 0), held, facts, audit.copied(tiles, thumbnails)).set_index("check")
    assert checks.loc["a mask among the tiles", ["count", "examples"]].tolist() == [2, "a/P00_7.png, a/P00_8.png"]


def pairs_of(*pairs):
    return pd.DataFrame([{"a": a, "b": b, "kind": "exact", "correlation": 1.0} for a, b in pairs])


def rows_of(**tiles):
    """A manifest of {tile: (split, label)}."""
    return pd.DataFrame([{"tile_id": t, "split": s, "label": c, "use": "labelled"} for t, (s, c) in tiles.items()])


LEAKED = rows_of(
    a=("train", "x"), b=("test", "x"), c=("val", "y"), d=("test", "y"), e=("train", "x"), f=("val", "x"), g=("test", "x"), h=("test", "y")
)
LEAKS = pairs_of(("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))  # the last inside the test, under two labels


def test_copies_in_two_splits_stop_a_run_with_the_ways_out():
    with pytest.raises(ValueError, match="3 pictures lie in two splits, first 'a' in train and 'b' in test.*leave_out.*keep"):
        audit.settle(LEAKED, LEAKS)
    rows, facts = audit.settle(LEAKED, LEAKS[3:])
    assert len(rows) == len(LEAKED) and facts == {"left_out": 0, "test": 0, "labels": 2}
    with pytest.raises(ValueError, match="on_copies is 'drop'"):
        audit.settle(LEAKED, LEAKS, "drop")


def test_left_out_is_what_is_learned_from_and_the_test_stays_whole():
    rows, facts = audit.settle(LEAKED, LEAKS, "leave_out")
    assert "".join(rows["tile_id"]) == "bdfgh" and facts == {"left_out": 3, "test": 0, "labels": 2}
    rows, facts = audit.settle(LEAKED, LEAKS, "keep")
    assert len(rows) == len(LEAKED) and facts == {"left_out": 0, "test": 2, "labels": 2}


def test_a_picture_in_three_splits_is_left_in_the_test_alone():
    manifest = rows_of(a=("train", "x"), b=("val", "x"), c=("test", "z"))
    rows, facts = audit.settle(manifest, pairs_of(("a", "b"), ("a", "c")), "leave_out")
    assert rows["tile_id"].tolist() == ["c"], "though b and c are no pair: of tiles with the same bytes each is paired with the first alone"
    assert facts == {"left_out": 2, "test": 0, "labels": 0}


def test_pairs_are_written_with_labels_and_splits_of_both():
    found = audit.beside(LEAKS, LEAKED)
    assert found[["label_a", "label_b", "split_a", "split_b"]].iloc[3].tolist() == ["x", "y", "test", "test"]
    assert audit.beside(LEAKS[:0], LEAKED).columns.tolist() == found.columns.tolist()
