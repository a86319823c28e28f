import os
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from folders import FolderRun, class_folders, described, encoded, save, texture
from PIL import Image, ImageCms

from histokit.core import files
from histokit.tiles import audit, data, decode, description, scan, splits

PATTERN = "case_pattern: '(?P<case_id>P[0-9]+)_'\n"


def table(root, rows, name="tiles.csv"):
    path = root / name
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


# ---- descriptions


def test_the_three_descriptions_of_the_repository_are_valid_where_their_data_is(repository, root):
    for name, classes in {"toy": 8, "ebhi_seg": 6, "pcam_mini": 2}.items():
        (root / "manifest.csv").write_text("image,cls\n")
        found = data.describe(repository / "params" / "datasets" / f"{name}.yaml", root=root)
        assert (found.name, len(found.classes)) == (name, classes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tail_bellow: 3", "did you mean 'tail_below'"),
        ("tail_below: many", "`tail_below` is 'many', expected int"),
        ("fit: stretch", "known: crop, resize, resample_to_mpp"),
        ("fit: resample_to_mpp", "needs `target_mpp`"),
        ("case_pattern: '(P[0-9]+)'", "needs a named group"),
        ("case_pattern: '(?P<case_id>'", "not a regular expression"),
        ("budget: {c: {tiles: 1}}", "`budget` names class 'c'"),
        ("budget: {a: {tiles: 2, cases: 3}}", "every case gives one or more"),
        ("split: {train: 0.5, test: 0.2}", "sum to 1"),
        ("columns: {label: cls}", "needs a `table`"),
        ("table: none.csv", "none.csv does not exist"),
        ("mpp: 0", "micrometres per pixel above 0"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_description_names_key_value_and_remedy(root, text, said):
    with pytest.raises((ValueError, FileNotFoundError), match=r"set.yaml") as error:
        described(root, class_folders(root / "tiles"), text)
    assert said in str(error.value)


def test_a_missing_folder_and_a_missing_description_say_what_to_do(root):
    with pytest.raises(FileNotFoundError, match="is not a folder; correct `root` or pass data_root"):
        described(root, root / "nowhere")
    with pytest.raises(FileNotFoundError, match="histokit init"):
        data.describe("params/datasets/none.yaml")


def test_one_class_only_is_refused(root):
    with pytest.raises(ValueError, match=r"one class only .'a'.; a classifier needs two"):
        described(root, class_folders(root / "tiles", ["a"]), classes="{a: {}}")


def test_data_root_and_budget_replace_those_of_the_description(root):
    described(root, class_folders(root / "tiles"), "budget: {a: {tiles: 2}}")
    found = data.describe("params/datasets/set.yaml", root=class_folders(root / "other"), budget={"b": {"tiles": 1}})
    assert (found.root, found.budget) == (root / "other", {"b": {"tiles": 1}})


def test_a_step_bounds_the_size_at_which_tiles_are_seen_and_never_raises_it(root):
    held = described(root, class_folders(root / "tiles"))
    step = {"dataset": "params/datasets/set.yaml"}
    assert description.of_step(step).tile_px == held.tile_px
    assert description.of_step(step | {"tile_px": held.tile_px // 2}).tile_px == held.tile_px // 2
    assert description.of_step(step | {"tile_px": held.tile_px * 2}).tile_px == held.tile_px
    described(root, root / "tiles", "fit: crop")
    cut = description.of_step(step | {"tile_px": held.tile_px // 2})
    assert (cut.fit, cut.tile_px) == (f"crop={held.tile_px}", held.tile_px // 2), "the same field, smaller"
    with pytest.raises(ValueError, match="tile_px is 8, expected the side"):
        description.of_step(step | {"tile_px": 8})


def test_class_names_that_yaml_takes_for_something_else_stay_names(root):
    folder = class_folders(root / "tiles", ["01", "b"])
    assert described(root, folder, classes="{01: {term: first}, b: second}").terms == {"1": "first", "b": "second"}
    assert described(root, folder, classes="{'01': {}, b: {}}").classes == ["01", "b"]


# ---- manifests


def test_class_folders_become_rows_sorted_by_name(root):
    tiles = data.scan(described(root, class_folders(root / "tiles", cases=2, tiles=1), PATTERN))
    assert list(tiles.columns) == list(scan.COLUMNS)
    assert tiles["file_name"].tolist() == ["a/P00_0.png", "a/P01_0.png", "b/P00_0.png", "b/P01_0.png"]
    assert tiles["case_id"].tolist() == ["P00", "P01", "P00", "P01"]
    assert set(tiles["root"]) == {"data"} and set(tiles["use"]) == {"labelled"}


def test_split_folders_bring_their_split(root):
    for split in ("train", "validation", "test"):
        class_folders(root / "tiles", cases=1, above=split)
    tiles = data.scan(described(root, root / "tiles"))
    assert tiles.groupby("split").size().to_dict() == {"test": 6, "train": 6, "val": 6}
    assert tiles["case_id"].equals(tiles["tile_id"])


def test_a_table_is_read_with_the_columns_of_the_description(root):
    folder = class_folders(root / "tiles", cases=1, tiles=2)
    rows = [
        {"image": f"{c}/P00_{i}.png", "cls": c, "case": "007", "set": "Train", "mask": f"{c}/P00_1.png", "mpp": "0,25"}
        for c in "ab"
        for i in (0, 1)
    ]
    table(folder, rows)
    columns = "columns: {file_name: image, label: cls, case_id: case, split: set, mask: mask}"
    tiles = data.scan(described(root, folder, f"table: tiles.csv\n{columns}"))
    assert set(tiles["case_id"]) == {"007"} and set(tiles["split"]) == {"train"} and set(tiles["mpp"]) == {0.25}
    assert tiles["mask"].tolist() == ["a/P00_1.png", "a/P00_1.png", "b/P00_1.png", "b/P00_1.png"]


def test_a_semicolon_table_and_a_parquet_table_give_the_same_rows(root):
    folder = class_folders(root / "tiles", cases=1, tiles=1)
    rows = pd.DataFrame({"file_name": ["a/P00_0.png", "b/P00_0.png"], "label": ["a", "b"], "case_id": [1, 2]})
    rows.to_csv(folder / "t.csv", sep=";", index=False, encoding="utf-8-sig")
    rows.to_parquet(folder / "t.parquet")
    one, other = (data.scan(described(root, folder, f"table: {name}")) for name in ("t.csv", "t.parquet"))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize(
    "name", ["../outside.png", "/etc/passwd", "C:\\tiles\\x.png", "a/../../outside.png", "link.png", "linked/outside.png", ""]
)
def test_a_row_that_leaves_its_root_is_refused_by_file_and_row(root, name):
    folder = class_folders(root / "tiles", cases=1, tiles=1)
    save(root / "outside.png", texture(0))
    (folder / "link.png").symlink_to(root / "outside.png")
    (folder / "linked").symlink_to(root)
    table(folder, [{"file_name": n, "label": c} for n, c in (("a/P00_0.png", "a"), ("b/P00_0.png", "b"), (name, "b"))])
    with pytest.raises(ValueError, match=r"tiles.csv row 4: .*relative to .*tiles, where all tiles must lie"):
        data.scan(described(root, folder, "table: tiles.csv"))


def test_a_folder_with_a_link_out_of_it_is_refused(root):
    folder = class_folders(root / "tiles")
    save(root / "outside.png", texture(0))
    (folder / "a" / "x.png").symlink_to(root / "outside.png")
    with pytest.raises(ValueError, match=r"a/x.png: a link leads outside the root"):
        data.scan(described(root, folder))


def test_the_root_may_itself_be_a_link(root):
    (root / "linked").symlink_to(class_folders(root / "tiles"))
    assert len(data.scan(described(root, root / "linked"))) == 36


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a/none.png", "a", "")], r"row 2: 'a/none.png' does not exist"),
        ([("a/P00_0.png", "a", "hold-out")], r"row 2: split 'hold-out' .*known: train, val, test"),
        ([("a/P00_0.png", "a", "train"), ("b/P00_0.png", "b", "")], r"row 3: 'b/P00_0.png' has no split while others have"),
        ([("a/P00_0.png", "a", ""), ("a/P00_0.png", "b", "")], r"rows 2 and 3: both name 'a/P00_0.png' .a, b."),
        ([("a/P00_0.png", "A", ""), ("b/P00_0.png", "b", "")], r"'a/P00_0.png' has label 'A', .* did you mean 'a'"),
        ([("a/P00_0.png", "a", "")], r"class 'b' has no tile in .*tiles.csv"),
    ],
)
def test_a_wrong_row_is_named(root, rows, said):
    folder = class_folders(root / "tiles", cases=1, tiles=1)
    table(folder, [dict(zip(("file_name", "label", "split"), row, strict=True)) for row in rows])
    with pytest.raises(ValueError, match=said):
        data.scan(described(root, folder, "table: tiles.csv"))


def test_an_empty_class_folder_and_an_unknown_folder_are_named(root):
    folder = class_folders(root / "tiles")
    (folder / "c").mkdir()
    with pytest.raises(ValueError, match="class 'c' has no tile"):
        data.scan(described(root, folder, classes="{a: {}, b: {}, c: {}}"))
    save(folder / "extra" / "x.png", texture(1))
    with pytest.raises(ValueError, match=r"'extra/x.png' has label 'extra', which is not in `classes`"):
        data.scan(described(root, folder))
    assert len(data.scan(described(root, folder, "ignore: [extra]"))) == 36


def test_names_with_spaces_umlauts_brackets_and_commas_survive_the_way_to_pixels(root):
    folder = root / "my tiles [2024], München"
    for name in ("a b", "Tumor, (groß) [*?]"):
        save(folder / name / "Fall 1, Schnitt #2 [x].png", texture(3))
    held = described(root, f"'{folder}'", classes="{a b: {}, 'Tumor, (groß) [*?]': {}}")
    tiles = data.scan(held).assign(split="train")
    run = FolderRun(root)
    files.write_table(run.path("manifest.csv"), data.without_memory(data.freeze(run, tiles, held)))
    np.testing.assert_array_equal(data.pixels(data.load(run))[1], texture(3))


def test_an_umlaut_spelt_in_two_characters_on_disk_is_found(root):
    folder = root / "tiles"
    for name in "ab":
        save(folder / name / "Mu\u0308ller.png", texture(1))  # as a Mac writes it
    table(folder, [{"file_name": f"{c}/M\u00fcller.png", "label": c} for c in "ab"])
    assert data.scan(described(root, folder, "table: tiles.csv"))["file_name"].tolist() == ["a/Mu\u0308ller.png", "b/Mu\u0308ller.png"]


def test_a_pattern_that_misses_a_file_names_it(root):
    folder = class_folders(root / "tiles")
    save(folder / "a" / "odd.png", texture(0))
    with pytest.raises(ValueError, match=r"does not match 'a/odd.png'; widen it, or `exclude` the tile"):
        data.scan(described(root, folder, PATTERN))
    assert len(data.scan(described(root, folder, PATTERN + "exclude: [a/odd.png]"))) == 36


def test_masks_follow_a_template_and_a_missing_one_is_named(root):
    folder = class_folders(root / "tiles", cases=1, tiles=1)
    for name in "ab":
        save(folder / "masks" / name / "P00_0.png", texture(1))
    tiles = data.scan(described(root, folder, "mask: masks/{label}/{stem}.png"))
    assert tiles["mask"].tolist() == ["masks/a/P00_0.png", "masks/b/P00_0.png"]
    (folder / "masks" / "b" / "P00_0.png").unlink()
    with pytest.raises(ValueError, match=r"tile 'b/P00_0.png' has no mask 'masks/b/P00_0.png'"):
        data.scan(described(root, folder, "mask: masks/{label}/{stem}.png"))


def test_tiles_without_labels_are_one_class_tissue(root):
    folder = class_folders(root / "tiles")
    held = described(root, folder, "unlabelled: .", classes="{}")
    tiles = splits.assign(data.scan(held), held.split, seed=0)
    assert set(tiles["use"]) == {"unlabelled"} and set(tiles["split"]) == {"train", "val", "test"}
    run = FolderRun(root)
    data.freeze(run, tiles, held)
    assert data.dataset(run).classes == ["tissue"] and data.dataset(run).counts["tissue"]["train"]["tiles"] > 0


# ---- freezing and loading


def frozen(root, text="", **facts):
    held = described(root, class_folders(root / "tiles"), PATTERN + text)
    tiles = splits.budget(splits.assign(data.scan(held), held.split, seed=0), held.budget, seed=0).assign(**facts)
    run = FolderRun(root)
    files.write_table(run.path("manifest.csv"), data.without_memory(data.freeze(run, tiles, held)))
    return run, tiles


def test_label_ids_come_from_the_description_even_when_a_class_is_missing_from_a_table(root):
    run, _ = frozen(root)
    assert [data.dataset(run).label_id(name) for name in "ab"] == [0, 1]
    with pytest.raises(ValueError, match="no class 'A'; did you mean 'a'"):
        data.dataset(run).label_id("A")


def test_roles_follow_the_training_tiles_left_by_the_budget(root):
    run, _ = frozen(root, "tail_below: 5\nbudget: {a: {tiles: 4, cases: 2}}")
    assert (data.dataset(run).tail, data.dataset(run).head) == (["a"], ["b"])
    assert data.dataset(run).counts["a"]["train"] == {"tiles": 4, "cases": 2}


def test_a_loaded_manifest_knows_its_files_and_training_leaves_out_the_rest(root):
    run, tiles = frozen(root, "budget: {a: {tiles: 4, cases: 2}}")
    loaded = data.load(run)
    assert all(os.path.isfile(path) for path in loaded["path"])
    pd.testing.assert_frame_equal(data.without_memory(loaded)[["tile_id", "split", "use"]], tiles[["tile_id", "split", "use"]])
    assert len(data.training(loaded, "a")) == 4 and set(data.training(loaded)["split"]) == {"train"}


def test_a_manifest_row_that_leaves_its_step_is_refused(root):
    run, tiles = frozen(root)
    files.write_table(run.home / "made" / "manifest.csv", tiles.head(1).assign(root="made", file_name="../00_dataset/dataset.json"))
    with pytest.raises(ValueError, match=r"root 'made': .*00_dataset"):
        data.load(run, "made")


def test_mixed_and_oblong_sizes_need_a_fit(root):
    held = described(root, class_folders(root / "tiles"), PATTERN)
    tiles = data.scan(held).assign(split="train", width=32, height=32)
    tiles.loc[3, ["width", "height"]] = 48
    with pytest.raises(ValueError, match=r"2 sizes .'a/P00_0.png' is 32 x 32 px but 'a/P01_0.png' is 48 x 48 px., so `fit` must say"):
        data.freeze(FolderRun(root), tiles, held)
    with pytest.raises(ValueError, match="not square"):
        data.freeze(FolderRun(root), tiles.assign(width=32, height=48), held)


def test_a_class_without_training_tiles_is_refused(root):
    held = described(root, class_folders(root / "tiles"), PATTERN)
    tiles = data.scan(held)
    with pytest.raises(ValueError, match=r"class 'b' has no training tile .18 in test."):
        data.freeze(FolderRun(root), tiles.assign(split=tiles["label"].map({"a": "train", "b": "test"})), held)


# ---- pixels


def one(path, **facts):
    return pd.DataFrame([{"path": str(path), "tile_px": 32, "fit": "resize", "mpp": 0.5} | facts])


def test_a_tile_of_the_right_size_is_not_touched(tmp_path):
    np.testing.assert_array_equal(data.pixels(one(save(tmp_path / "x.png", texture(1))))[0], texture(1))


def test_a_crop_is_the_centre_and_keeps_its_values(tmp_path):
    image = texture(1, 64)
    got = data.pixels(one(save(tmp_path / "x.png", image), fit="crop=32"))[0]
    np.testing.assert_array_equal(got, image[16:48, 16:48])


def test_the_field_is_the_same_whatever_size_reads_it(tmp_path):
    """A crop of 32 px read at 64 px is the enlarged crop, not a larger field."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = 255
    got = data.pixels(one(save(tmp_path / "x.png", image), fit="crop=32"), 64)[0]
    assert (got[4:-4, 4:-4] == 255).all() and got.min() > 100  # the border blends with the pixel next to it


def test_resampling_brings_tiles_of_two_scales_to_one(tmp_path):
    ramp = np.repeat(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], 128, axis=0).repeat(3, axis=2)
    fine = save(tmp_path / "fine.png", ramp)  # 128 px of 0.25 um
    coarse = save(tmp_path / "coarse.png", Image.fromarray(ramp).resize((64, 64), Image.Resampling.BOX))  # the same field, 0.5 um
    rows = pd.concat([one(fine, mpp=0.25), one(coarse, mpp=0.5)]).assign(fit="resample_to_mpp=0.5x32")
    a, b = data.pixels(rows).astype(int)
    assert np.abs(a - b).max() <= 3
    assert data.um_per_px(rows.iloc[0].to_dict() | {"width": 128, "height": 128, "file_name": "x"}, 32) == 0.5


def test_too_small_a_tile_and_an_unknown_scale_say_so(tmp_path):
    path = save(tmp_path / "x.png", texture(1))
    with pytest.raises(ValueError, match=r"x.png: 32 x 32 px is too small for fit crop=48"):
        data.pixels(one(path, fit="crop=48", tile_px=48))
    with pytest.raises(ValueError, match="needs the tile's micrometres per pixel, got nan"):
        data.pixels(one(path, fit="resample_to_mpp=0.5x32", mpp=float("nan")))


def test_many_tiles_come_in_the_order_of_their_rows(tmp_path):
    rows = pd.concat([one(save(tmp_path / f"{i}.png", texture(i))) for i in range(40)])
    np.testing.assert_array_equal(data.pixels(rows)[[0, 17, 39]], np.stack([texture(0), texture(17), texture(39)]))


def test_uint8_to_float_and_back_is_exact():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    there = data.to_float(pixels)
    assert there.shape == (1, 3, 16, 16) and there.dtype == torch.float32 and there.min() == -1 and there.max() == 1
    np.testing.assert_array_equal(data.to_uint8(there), pixels)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty .0 bytes."),
        (b"this is no picture", "is not an image, whatever its name says"),
        (encoded(texture(1), "JPEG")[:-200], "cannot be decoded .*truncated"),
        (encoded(texture(1))[:900], "cannot be decoded"),
        (encoded(np.zeros((8, 8), np.uint16)), "16 bits per channel"),
        (encoded(Image.new("CMYK", (8, 8)), "JPEG"), "is CMYK"),
        (encoded(Image.new("1", (8, 8))), "looks like a mask"),
        (encoded(Image.new("L", (9000, 9000))), r"is too large for a tile .9000 x 9000 px, limit 64 Mpx."),
        (encoded(Image.new("1", (14000, 14000))), "is too large for a tile"),
        (encoded(texture(1), "TIFF", save_all=True, append_images=[Image.fromarray(texture(2))]), "holds 2 frames"),
    ],
    ids=["empty", "text", "truncated jpeg", "truncated png", "16 bit", "CMYK", "mask", "huge", "bomb", "frames"],
)
def test_what_is_no_usable_tile_is_refused_by_name_and_remedy(tmp_path, content, said):
    path = tmp_path / "tile, [odd].png"
    path.write_bytes(content)
    with pytest.raises(decode.BadImage, match=rf"tile, \[odd\].png: .*{said}"):
        data.pixels(one(path))


def tiff(channels=3, bits=8, kind=1, packing=1):
    """The directory of a TIFF of 8 x 8 px, enough to say what it is."""
    tags = [(256, 3, 8), (257, 3, 8), (258, 3, bits), (259, 3, packing), (262, 3, 2), (277, 3, channels), (339, 3, kind)]
    body = b"".join(struct.pack("<HHIHH", tag, code, 1, value, 0) for tag, code, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", 0) + bytes(8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            tiff(channels=5),
            "is a TIFF of 5 channels of 8-bit whole numbers, not compressed, which is not read here; export it as 8-bit RGB",
        ),
        (tiff(packing=33005), "is a TIFF of 3 channels of 8-bit whole numbers, packed as JPEG 2000"),
        (tiff(bits=32, kind=3), "of 32-bit floating point numbers"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "holds floating point numbers"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "is a JPEG 2000"),
        (b"II*\0" + bytes(20), "is not an image"),
    ],
    ids=["channels", "JPEG 2000 inside", "floats", "grey floats", "JPEG 2000", "broken"],
)
def test_what_cannot_be_read_is_called_what_it_is(content, said):
    with pytest.raises(decode.BadImage, match=said):
        decode.rgb(content, "x.tif")


def swapped_profile():
    """An sRGB profile, by its name too, with red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    at = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    x, y = at[b"rXYZ"], at[b"gXYZ"]
    profile[x + 4 : x + 12], profile[y + 4 : y + 12] = profile[y + 4 : y + 12], profile[x + 4 : x + 12]
    return bytes(profile)


def test_a_colour_profile_is_honoured_unless_the_description_says_not(root):
    folder = class_folders(root / "set", cases=3)
    stored = Image.fromarray(texture(1)).point(lambda v: v // 2)
    held = stored.copy()
    held.save(folder / "a" / "P00_0.png", icc_profile=swapped_profile())
    plain, said = decode.rgb(folder / "a" / "P00_0.png")
    as_stored = np.asarray(stored)
    assert said == "colour profile"
    np.testing.assert_allclose(np.asarray(plain)[..., [1, 0, 2]], as_stored, atol=2)  # red is green and green is red
    np.testing.assert_array_equal(np.asarray(decode.rgb(folder / "a" / "P00_0.png", profile=False)[0]), as_stored)
    for text, expected in (("", np.asarray(plain)), ("colour_profile: ignore\n", as_stored)):
        run, held = FolderRun(root), described(root, folder, text)
        tiles, facts, _ = audit.read(data.scan(held), held.root, profile=held.colour_profile == "convert")
        assert facts["note"].str.contains("colour profile").any() == (text == "")
        frozen = data.freeze(run, splits.assign(tiles, held.split, 0), held)
        row = frozen[frozen["file_name"].eq("a/P00_0.png")]
        np.testing.assert_array_equal(data.pixels(row)[0], expected)
        assert (data.shown(row.iloc[0]) == ["resize", ""]) == (text == "")
    with pytest.raises(ValueError, match="`colour_profile` is 'keep'"):
        described(root, folder, "colour_profile: keep\n")


def test_an_srgb_profile_changes_no_pixel_and_a_broken_one_is_noted():
    image = Image.fromarray(texture(3))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, note in ((srgb, ""), (b"no profile at all", "unreadable ICC")):
        out, said = decode.rgb(encoded(image, icc_profile=profile))
        np.testing.assert_array_equal(np.asarray(out), np.asarray(image))
        assert said == note


def test_16_bit_colour_is_refused_though_pillow_would_halve_it(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + b"\x12\x34" * 12) * 4)) + chunk(b"IEND", b"")
    with pytest.raises(decode.BadImage, match="16 bits per channel"):
        decode.rgb(b"\x89PNG\r\n\x1a\n" + header + body, "x.png")


def test_grey_palette_and_alpha_become_rgb_and_are_noted():
    grey = Image.fromarray(texture(1)).convert("L")
    assert decode.rgb(encoded(grey))[1] == "grey"
    assert decode.rgb(encoded(Image.fromarray(texture(1)).quantize(16)))[1] == "palette"
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image, note = decode.rgb(encoded(clear))
    assert note == "alpha" and np.asarray(image).min() == 255  # see-through is white, not the red below it


def test_an_exif_turned_tile_stands_upright():
    image, exif = Image.fromarray(texture(1, 64)[:32]), Image.Exif()
    exif[0x0112] = 6
    upright, note = decode.rgb(encoded(image, exif=exif))
    assert upright.size == (32, 64) and note == "rotated"


def test_describe_is_light(root):
    """A dry run reads descriptions; it must not wait for pandas or Pillow."""
    import subprocess
    import sys

    code = "import histokit.tiles.description, sys; print(sorted({'pandas', 'numpy', 'PIL', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert description.TISSUE == "tissue"
