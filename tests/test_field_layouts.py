"""Folders and tables as people have them: what `histokit init` drafts, what 00 then reads, and what is said to be left out."""

import os
from pathlib import Path

import pandas as pd
import pytest
from field_folders import TWO, classes, counts, flat, tiles, write

from histokit.tiles import audit, data
from histokit.tiles.ingest import levels, masks, table_files, tile_names, walk

# --- levels of folders -----------------------------------------------------------------------------------------------

LAYOUTS = {  # name -> (file names, {class: tiles}, cases, {split: tiles}); cases None for one a tile
    "class": (classes(), TWO, 12, {"": 36}),
    "class, case": ([n.replace("_", "/") for n in classes()], TWO, 12, {"": 36}),
    "case numbers restart in each class": (
        [f"{c}/{k}/t{i}.png" for c in ("adipose", "stroma", "tumour") for k in range(1, 5) for i in range(3)], TWO, 4, {"": 36},
    ),
    "case, class": (
        [f"{8863 + 17 * p}/{k}/{p}_x{i}.png" for p in range(8) for k in (0, 1) for i in range(3)], {"0": 24, "1": 24}, 8, {"": 48},
    ),
    "case, class, some without": (
        [f"patient_{p:03d}/{k}/t{i}.png" for p in range(9) for k in ("benign", "tumour")[p % 2 :] for i in range(2)],
        {"benign": 10, "tumour": 18}, 9, {"": 28},
    ),
    "set, class": ([f"{s}/{c}/{c}-{'ABCDEF'[i]}XQ.tif" for s in ("NCT-100K", "VAL-7K") for c in ("ADI", "STR") for i in range(4)],
                   {"ADI": 8, "STR": 8}, None, {"": 16}),
    "fold, class": ([f"fold{f}/{n}" for f in (1, 2) for n in classes(cases=2)], {"adipose": 12, "stroma": 12, "tumour": 12}, 6, {"": 36}),
    "split words": ([f"{s}/{n}" for s in ("Training_set", "val_images", "TEST") for n in classes(cases=2)], dict.fromkeys(TWO, 18), 6,
                    {"train": 18, "val": 18, "test": 18}),
    "set, split, class": ([f"release 2/{s}/{n}" for s in ("train", "test") for n in classes(cases=2)], TWO, 6, {"train": 18, "test": 18}),
    "class, split": ([f"{c}/{s}/P{k}_{i}.png" for c in ("a", "b") for s, k in (("train", 1), ("test", 2)) for i in range(3)],
                     {"a": 6, "b": 6}, 2, {"train": 6, "test": 6}),
    "magnifications below slides": (
        [f"{c}/SOB/x/SOB_{c}_14-{n}AB/{z}X/SOB-14-{n}AB-{z}-{i}.png"
         for c, n0 in (("benign", 22549), ("malignant", 23549)) for n in range(n0, n0 + 4) for z in (40, 100) for i in range(2)],
        {"benign": 16, "malignant": 16}, 8, {"": 32},
    ),
    "magnifications below classes": (
        [f"{c}/{z}/P{p}_{i}.png" for c in ("a", "b") for z in ("10x", "20x") for p in (1, 2) for i in range(2)],
        {"a": 8, "b": 8}, 2, {"": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_levels_of_folders_are_told_apart(root, drafted, name):
    files_, expected, cases, splits = LAYOUTS[name]
    _, rows = drafted(tiles(root / "set", files_))
    assert counts(rows) == expected and rows["split"].value_counts().to_dict() == splits
    assert rows["case_id"].nunique() == (len(rows) if cases is None else cases)


@pytest.mark.parametrize(
    "names",
    [
        [f"{c}/tile_{x}_{y}.png" for c in "ab" for x in range(4) for y in range(4)],
        [f"{c}/x{x}_y{y}.png" for c in "ab" for x in (0, 128, 256) for y in (0, 128, 256)],
        [f"{c}/row{x}_col{y}.png" for c in "ab" for x in range(3) for y in range(3)],
        [f"{c}/{z}X_{i}.png" for c in "ab" for z in (40, 100) for i in range(4)],
    ],
    ids=["grid", "x and y", "rows and columns", "magnification"],
)
def test_a_position_is_no_case(root, drafted, names):
    said, rows = drafted(tiles(root / "set", names))
    assert "NO CASE IDS FOUND" in said and rows["case_id"].nunique() == len(rows)


def test_numbers_of_cases_and_tiles_that_differ_between_classes_are_cases(root, drafted):
    names = [f"{c}/{10 * k + p}_{i}.png" for k, c in enumerate("ab") for p in range(4) for i in range(3)]
    _, rows = drafted(tiles(root / "set", names))
    assert rows["case_id"].nunique() == 8


@pytest.mark.parametrize(
    ("name", "split"),
    [("Train", "train"), ("training_set", "train"), ("val_images", "val"), ("validation", "val"), ("test-data", "test"),
     ("train_tumour", None), ("testis", None), ("contest", None), ("train_test", None), ("labels", None)],
)  # fmt: skip
def test_a_split_is_read_from_whole_words(name, split):
    assert levels.split_of(name) == split


def test_a_level_that_names_a_folder_takes_its_files_alone():
    assert levels.read("tumour/image/a.png", ["class", "image"]) == {"class": "tumour"}
    assert levels.read("tumour/label/a.png", ["class", "image"]) is None
    assert levels.read("train/P1/tumour/a.png", ["split", "case_id", "class"]) == {"split": "train", "case_id": "P1", "class": "tumour"}
    assert levels.read("notes/P1/tumour/a.png", ["split", "case_id", "class"]) is None and levels.read("a.png", ["class"]) is None


def test_levels_of_a_description_are_checked(root):
    tiles(root / "set", ["P1/tumour/a.png", "P2/stroma/a.png"])
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "root: set\ntile_px: 16\nclasses: [tumour, stroma]\nlevels: "
    path.write_text(text + "[patient, class]\n")
    rows = data.scan(data.describe(path))
    assert rows[["label", "patient", "case_id"]].to_numpy().tolist() == [["tumour", "P1", "P1"], ["stroma", "P2", "P2"]]
    path.write_text(text + "[patient]\n")
    with pytest.raises(ValueError, match="`class` once"):
        data.describe(path)


def test_folders_beside_the_splits_are_named_with_their_pictures(root, drafted):
    names = (
        [f"{s}/{n}" for s in ("train", "test") for n in classes(cases=2)] + [f"extra/tumour/q{i}.png" for i in range(5)] + ["figure.png"]
    )
    said, rows = drafted(tiles(root / "set", names))
    assert "extra/tumour (5 pictures)" in said and "the top folder (1 picture)" in said and len(rows) == 36


def test_look_alike_cases_and_cases_in_two_splits_are_questioned(root, drafted):
    names = [f"{c}/{case}_{i}.png" for c in "ab" for case in ("18842", "18842D", "200", "201") for i in range(2)]
    said, _ = drafted(tiles(root / "alike", names))
    assert "1 case ids differ from another by a last letter alone: one patient or two? 18842 and 18842D" in said
    ids = {"a": ("GT20123", "GTxc30123", "GT40100"), "b": ("GTXC30123", "GTDC20123", "GT40101")}
    said, _ = drafted(
        tiles(root / "letters", [f"{c}/{case}-{k}-400-{i:03d}.png" for c in ids for case in ids[c] for k in (1, 2) for i in (1, 5)])
    )
    assert "1 times case ids differ in capitals alone: GTXC30123 and GTxc30123." in said and "d{5,})'` takes it alone" in said
    assert "1 times case ids have one number and other letters: GT20123 and GTDC20123." in said
    names = [f"{s}/{c}/scanner{k}_{s}{i}.png" for s in ("train", "test") for c in "ab" for k in (1, 2) for i in range(3)]
    said, _ = drafted(tiles(root / "parted", names))
    assert "2 OF 2 CASES LIE IN TWO OF THE GIVEN SPLITS, first scanner1: 00 will stop" in said


# --- masks, litter, links --------------------------------------------------------------------------------------------


MASKED = {
    "in a folder below each class": (lambda c, i: (f"{c}/image/P{i}_0.png", f"{c}/label/P{i}_0.png"), "{0}/label/{stem}.png"),
    "in a folder above the classes": (lambda c, i: (f"images/{c}/P{i}_0.png", f"masks/{c}/P{i}_0.png"), "masks/{1}/{stem}.png"),
    "with a suffix": (lambda c, i: (f"{c}/x ({i}).png", f"{c}/x ({i})_mask.png"), "{folder}/{stem}_mask.png"),
    "with a suffix and another format": (lambda c, i: (f"{c}/x-{i}.jpg", f"{c}/x-{i}-labelled.png"), "{folder}/{stem}-labelled.png"),
    "in their folder with a suffix": (lambda c, i: (f"{c}/images/P{i}_0.tif", f"{c}/masks/P{i}_0_anno.png"), "{0}/masks/{stem}_anno.png"),
    "with a prefix": (lambda c, i: (f"{c}/x{i}.png", f"{c}/mask_x{i}.png"), "{folder}/mask_{stem}.png"),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_no_tiles_and_become_a_template(root, drafted, name):
    pair, template = MASKED[name]
    every = [pair(c, i) for c in ("adipose", "tumour") for i in range(6)]
    said, rows = drafted(tiles(root / "set", [one for two in every for one in two]))
    assert sorted(rows["file_name"]) == sorted(tile for tile, _ in every)
    assert dict(zip(rows["file_name"], rows["mask"], strict=True)) == dict(every)
    assert "12 pictures are masks and no tiles (12 of 12 tiles have one)" in said and f"mask: {template}" in said


def test_several_masks_of_a_tile_are_no_tiles(root, drafted):
    names = [f"{c}/x{i}{mask}.png" for c in "ab" for i in range(4) for mask in ("", "_mask", "_mask_1")]
    said, rows = drafted(tiles(root / "set", names))
    assert len(rows) == 8
    assert "16 pictures are masks" in said


def test_a_word_that_is_a_tile_of_its_own_is_no_mask():
    found = masks.apart(["a/label.png", "a/seg 1.png", "a/x_mask.png"])
    assert found.masks == [] and len(found.tiles) == 3, "none of them is a tile's name and a word more"


def test_litter_of_systems_is_counted_and_never_a_tile(root, drafted):
    folder = tiles(root / "set", classes())
    thumbs = [f"{n.rpartition('/')[0]}/@eaDir/{n.rpartition('/')[2]}/SYNOPHOTO_THUMB_M.png" for n in classes()]
    tiles(folder, [*thumbs, "#recycle/old.png", "lost+found/#12.png", "$RECYCLE.BIN/a.png", "__MACOSX/adipose/P00_0.png",
                   "adipose/._P00_0.png", ".ipynb_checkpoints/a.png", "System Volume Information/x.png"])  # fmt: skip
    said, rows = drafted(folder)
    assert counts(rows) == TWO and rows["case_id"].nunique() == 12
    assert "@eaDir (3)" in said and "#recycle (1)" in said and "$RECYCLE.BIN (1)" in said


def test_links_are_named_followed_when_asked_and_never_counted_twice(root, drafted):
    store = tiles(root / "store", classes())
    (root / "set").mkdir()
    for name in TWO:
        (root / "set" / name).symlink_to(store / name)
    with pytest.raises(ValueError, match=r"no tiles below .*LINKS WERE NOT FOLLOWED: \w+ leads to .*store/\w+ and 2 more"):
        drafted(root / "set")
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "root: set\ntile_px: 16\nclasses: [adipose, stroma, tumour]\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="a link leads outside the root.*`follow_links: true`"):
        data.scan(data.describe(path))
    path.write_text(text + "follow_links: true\n")
    described = data.describe(path)
    rows, facts, _ = audit.read(data.scan(described), described.root, follow=True)
    assert counts(rows) == TWO and facts["problem"].eq("").all() and rows["sha256"].str.len().eq(64).all()
    (root / "set" / "again").symlink_to(store / "tumour")
    assert len(walk.look(root / "set", follow=True).pictures) == 36, "a folder that two links lead to is read once"


@pytest.mark.skipif(os.fsencode("ä") != b"\xc3\xa4", reason="names are not UTF-8 here")
def test_a_name_that_is_not_utf8_is_refused_with_the_command_that_mends_it(root, drafted):
    folder = tiles(root / "set", classes())
    try:
        os.mkdir(os.path.join(os.fsencode(folder), b"Dr\x81se"))
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    with pytest.raises(ValueError, match=r"the name Dr\\x81se is not UTF-8.*convmv -f cp850"):
        drafted(folder)


def test_files_that_are_not_read_are_counted(root, drafted):
    folder = tiles(root / "set", classes())
    for name in ("adipose/a.jp2", "adipose/b.jp2", "slides/one.svs"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    said, _ = drafted(folder)
    assert "files that are not read as tiles: 2 .jp2, 1 .svs" in said


# --- tables ----------------------------------------------------------------------------------------------------------


RENAMED = [{"filename": row["file"], "label": row["label"], "patient": row["patient"]} for row in flat()]


def spelt(kind, folder):
    """Writes the rows of `flat` in one of the ways people do."""
    rows = pd.DataFrame(RENAMED)
    if kind == "upper case":
        write(folder / "LABELS.CSV", rows)
    elif kind == "workbook":
        rows.to_excel(folder / "labels.xlsx", index=False)
    elif kind == "parquet":
        rows.to_parquet(folder / "labels.parquet")
    elif kind == "no header":
        write(folder / "truth.csv", rows[["filename", "label"]], header=False)
    elif kind == "stems":
        write(folder / "train_labels.csv", rows.assign(id=rows["filename"].str.extract(r"(t\d+)")[0])[["id", "label", "patient"]])
    elif kind == "absolute":
        write(folder / "labels.csv", rows.assign(path=[str(folder / name) for name in rows["filename"]])[["path", "label", "patient"]])
    elif kind == "absolute on another machine":
        write(folder / "labels.csv", rows.assign(path=["D:\\data\\" + name.replace("/", "\\") for name in rows["filename"]]))
    elif kind == "an index and spaces":
        write(folder / "labels.csv", rows.set_axis(["Image Path", "Label", "Patient ID"], axis=1).assign(Label=rows["label"] + " "))
    elif kind == "tabs":
        write(folder / "labels.tsv", rows, sep="\t")
    elif kind == "bars and UTF-16":
        write(folder / "labels.csv", rows, sep="|", encoding="utf-16")
    elif kind == "upper-case suffix":
        write(folder / "labels.csv", rows.assign(filename=rows["filename"].str.replace(".png", ".PNG")))


SPELT = ["upper case", "workbook", "parquet", "no header", "stems", "absolute", "absolute on another machine", "an index and spaces",
         "tabs",         "bars and UTF-16", "upper-case suffix"]  # fmt: skip


@pytest.mark.parametrize("kind", SPELT)
def test_a_table_is_read_however_it_is_spelt(root, drafted, kind):
    folder = tiles(root / "set", [row["file"] for row in flat()])
    spelt(kind, folder)
    said, rows = drafted(folder)
    assert counts(rows) == TWO and "is used: 36 of 36 rows name a tile" in said
    assert rows["case_id"].nunique() == (36 if kind == "no header" else 12)


def test_windows_text_keeps_its_umlauts(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in flat()])
    rows = [{"filename": row["file"], "label": {"adipose": "Drüse"}.get(row["label"], row["label"])} for row in flat()]
    write(folder / "labels.csv", rows, sep=";", encoding="cp1252")
    assert counts(drafted(folder)[1]) == {"Drüse": 12, "stroma": 12, "tumour": 12}


@pytest.mark.parametrize("names", [("train.csv", "val.csv", "test.csv"), ("labels_train.csv", "labels_val.csv", "labels_test.csv")])
def test_tables_of_splits_are_one_data_set(root, drafted, names):
    folder, rows = tiles(root / "set", [row["file"] for row in flat()]), pd.DataFrame(RENAMED)
    part = rows["patient"].str[1:].astype(int) % 10
    for name, which in zip(names, ((0, 1), (2,), (3,)), strict=True):
        write(folder / name, rows[part.isin(which)])
    said, found = drafted(folder)
    assert found["split"].value_counts().to_dict() == {"train": 18, "val": 9, "test": 9} and found["case_id"].nunique() == 12
    assert all(f"{name} is used" in said for name in names) and "its own split" in said


def test_metadata_in_the_folders_of_splits_is_read_beside_its_files(root, drafted):
    rows = flat(sub="x")
    for row in rows:
        split = ("train", "train", "validation", "test")[int(row["patient"][1:]) % 10]
        row["split"] = split
        tiles(root / "set", [f"{split}/{row['file'][2:]}"])
    for split in ("train", "validation", "test"):
        mine = [{"file_name": r["file"][2:], "label": r["label"], "patient": r["patient"]} for r in rows if r["split"] == split]
        write(root / "set" / split / "metadata.csv", mine)
    _, found = drafted(root / "set")
    assert found["split"].value_counts().to_dict() == {"train": 18, "val": 9, "test": 9} and counts(found) == TWO


NOT_TILES = {
    "a legend": ([{"label": i, "name": n} for i, n in enumerate(TWO)], "0 of 3 names in its column 'name' are files"),
    "coordinates": ([{"filename": n, "x": 128 * i, "y": 256 * (i % 7)} for i, n in enumerate(classes())],
                    "it has no column that could be the class"),
    "measurements": ([{"image": n, "area": 0.37 * i, "nuclei": 17 * i % 41} for i, n in enumerate(classes())],
                     "it has no column that could be the class"),
    "mostly gone": ([{"image": n if i < 5 else f"old/{i}.png", "label": n[:3]} for i, n in enumerate(classes())],
                    "only 5 of 36 names in its column 'image' are files below the folder, first missing 'old/5.png'"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_TILES)
def test_a_table_of_something_else_is_named_and_folders_win(root, drafted, name):
    rows, why = NOT_TILES[name]
    folder = tiles(root / "set", classes())
    write(folder / "table.csv", rows)
    said, found = drafted(folder)
    assert counts(found) == TWO and f"table.csv is there and not used: {why}" in said


def test_what_is_no_table_is_named(root, drafted):
    folder = tiles(root / "set", classes())
    (folder / "labels.xlsx").write_bytes(b"PK\x03\x04 no workbook")
    (folder / "empty.csv").write_bytes(b"")
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    (folder / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    said, found = drafted(folder)
    assert counts(found) == TWO
    for name in ("labels.xlsx", "empty.csv", "binary.csv", "old.xls"):
        assert f"{name} is there and not used: " in said


def test_cells_stay_as_they_are_spelt(tmp_path):
    (tmp_path / "t.csv").write_text("name,case,label\na.png,007, tumour \nb.png,1.10,\nc.png,1e5,NA\n")
    table = table_files.read(tmp_path / "t.csv")
    assert table["case"].tolist() == ["007", "1.10", "1e5"] and table["label"].tolist() == ["tumour", "", "NA"]
    pd.DataFrame({"name": ["a", "b"], "class": [1.0, float("nan")], "note": [1.5, 2]}).to_parquet(tmp_path / "t.parquet")
    assert table_files.read(tmp_path / "t.parquet")["class"].tolist() == ["1", ""], "whole numbers with gaps are no fractions"


def test_cells_are_never_cut_nor_taken_for_missing(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\na.png,tumour, high grade\n")
    with pytest.raises(table_files.TableError, match="a cell that holds the separator ',' needs quotes"):
        table_files.read(tmp_path / "t.csv")
    pd.DataFrame({"file": ["a", "b", "c"], "label": ["NA", "None", ""]}).to_excel(tmp_path / "t.xlsx", index=False)
    assert table_files.read(tmp_path / "t.xlsx")["label"].tolist() == ["NA", "None", ""]
    frame = pd.DataFrame({"label": ["x", None, "y"], "k": [1, None, 3]}, index=pd.Index(["a.png", "b.png", "c.png"], name="file"))
    frame.convert_dtypes().to_parquet(tmp_path / "t.parquet")
    table = table_files.read(tmp_path / "t.parquet")
    assert table["file"].tolist() == ["a.png", "b.png", "c.png"] and table["k"].tolist() == ["1", "", "3"] and table["label"][1] == ""


def test_a_table_without_header_keeps_cells_that_are_alike(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in flat()])
    write(folder / "truth.csv", [{"a": r["file"], "b": r["label"], "c": 3, "d": 3} for r in flat()], header=False)
    table = table_files.read(folder / "truth.csv", folder, tile_names.Names(folder, [row["file"] for row in flat()]))
    assert table.iloc[0].tolist() == ["images/t0000.png", "adipose", "3", "3"] and table.columns.tolist() == ["1", "2", "3", "4"]


def test_a_column_that_one_table_lacks_is_empty_there(root):
    folder, rows = tiles(root / "set", [row["file"] for row in flat()]), flat()
    for split, slides in (("train", True), ("test", False)):
        mine = [r for i, r in enumerate(rows) if (i % 2 == 0) == slides]
        write(folder / f"{split}.csv", [{"f": r["file"], "label": r["label"]} | ({"group": "A"} if slides else {}) for r in mine])
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "root: set\ntile_px: 16\nclasses: [adipose, stroma, tumour]\ntable: {train: train.csv, test: test.csv}\ncolumns: {file_name: f}\n"
    )
    path.write_text(text)
    assert data.scan(data.describe(path)).groupby("split")["group"].unique().map(list).to_dict() == {"train": ["A"], "test": [""]}


def test_number_classes_with_gaps_are_read_as_they_are_drafted(root, drafted):
    folder, rows = tiles(root / "set", [row["file"] for row in flat()]), flat()
    table = [{"filename": r["file"], "class": "" if i % 9 == 4 else list(TWO).index(r["label"]) + 1} for i, r in enumerate(rows)]
    write(folder / "labels.csv", table)
    said, found = drafted(folder)
    assert counts(found) == {"1": 11, "2": 10, "3": 11} and found["use"].eq("unlabelled").sum() == 4 and "4 rows have no class" in said


def test_a_name_that_two_files_have_is_no_file():
    names = tile_names.Names("/data", ["train/1.png", "test/1.png", "train/2.png"])
    assert names.find(["1.png", "2", "train/1.PNG", "/data/test/1.png", "C:\\x\\2.png", "../1.png", ""]) == [
        None, "train/2.png", "train/1.png", "test/1.png", "train/2.png", None, None,
    ]  # fmt: skip
    assert names.find(["1"], beside="test") == ["test/1.png"]


def test_folders_of_tiles_and_masks_need_no_classes(root, drafted):
    pairs = [(f"images/P{i // 3}_{i}.png", f"masks/P{i // 3}_{i}.png") for i in range(12)]
    folder = tiles(root / "set", [name for pair in pairs for name in pair])
    _, rows = drafted(folder)
    assert dict(zip(rows["file_name"], rows["mask"], strict=True)) == dict(pairs) and set(rows["use"]) == {"unlabelled"}
    write(folder / "labels.csv", [{"image": name[7:], "label": "ab"[i % 2]} for i, (name, _) in enumerate(pairs)])
    _, rows = drafted(folder)
    assert counts(rows) == {"a": 6, "b": 6} and dict(zip(rows["file_name"], rows["mask"], strict=True)) == dict(pairs)


def test_a_stray_picture_above_the_classes_costs_no_split_and_no_patient(root, drafted):
    names = [f"{s}/{n}" for s in ("train", "test") for n in classes(cases=2)]
    _, rows = drafted(tiles(root / "split", [*names, "train/preview.png"]))
    assert len(rows) == len(names) and rows["split"].value_counts().to_dict() == {"train": 18, "test": 18}
    names = [f"P{p:02d}/{c}/{i}.png" for p in range(10) for c in ("tumour", "normal") for i in range(2)]
    _, rows = drafted(tiles(root / "patients", [*names, "P07/overview.png"]))
    assert len(rows) == len(names) and rows["case_id"].nunique() == 10


def test_unlabelled_tiles_beside_folders_of_cases_are_cases_of_their_own(root, drafted):
    names = [n.replace("_", "/") for n in classes(cases=2)]
    _, rows = drafted(tiles(root / "set", [*names, *(f"unlabelled/u{i}.png" for i in range(5))]))
    loose = rows[rows["use"].eq("unlabelled")]
    assert len(loose) == 5 and loose["case_id"].tolist() == loose["file_name"].tolist() and counts(rows)["adipose"] == 6


def test_numbers_of_classes_are_told_from_numbers_of_patients_that_come_back(root, drafted):
    _, rows = drafted(tiles(root / "set", [f"{k}/{8863 + 17 * p}/{i}.png" for k in (0, 1) for p in range(9) for i in range(2)]))
    assert counts(rows) == {"0": 18, "1": 18} and rows["case_id"].nunique() == 9


@pytest.mark.parametrize("mask", ["{}_mask.png", "{}_anno.bmp"])
def test_masks_beside_loose_tiles_are_no_tiles(root, drafted, mask):
    stems = [f"P{i // 2}_{i}" for i in range(8)]
    _, rows = drafted(tiles(root / "set", [name for stem in stems for name in (f"{stem}.png", mask.format(stem))]))
    assert rows["mask"].tolist() == [mask.format(stem) for stem in stems] and rows["case_id"].nunique() == 4


def test_a_headerless_table_of_bare_names_keeps_its_first_row(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in flat()])
    for spelling in ("name", "stem"):
        bare = [{"a": getattr(Path(row["file"]), spelling), "b": row["label"]} for row in flat()]
        write(folder / "truth.csv", bare, header=False)
        assert counts(drafted(folder)[1]) == TWO


def test_a_class_may_be_called_test(root, drafted):
    _, rows = drafted(tiles(root / "set", classes(("control", "test"))))
    assert counts(rows) == {"control": 12, "test": 12} and set(rows["split"]) == {""}


def test_a_link_that_leads_nowhere_says_so(root):
    folder = tiles(root / "set", classes())
    (folder / "adipose" / "P00_9.png").symlink_to(root / "gone.png")
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("root: set\ntile_px: 16\nclasses: [adipose, stroma, tumour]\nfollow_links: true\n")
    with pytest.raises(ValueError, match=r"P00_9.png: a link leads nowhere, to .*gone.png"):
        data.scan(data.describe(path))


# --- words that mean something already -------------------------------------------------------------------------------


def test_a_class_called_by_a_word_of_recipes_gets_a_name_of_its_own(root, drafted):
    names = [f"{c}/UID{10 * k + p}_{i}_{c}.bmp" for k, c in enumerate(("all", "hem")) for p in range(4) for i in range(3)]
    said, rows = drafted(tiles(root / "set", names))
    assert counts(rows) == {"all (class)": 12, "hem": 12} and "the class 'all' is called 'all (class)'" in said
    held = data.describe(root / "params" / "datasets" / "draft.yaml")
    assert held.classes == ["all (class)", "hem"] and held.terms["all (class)"] == "all"


def test_a_class_called_tissue_and_tiles_without_a_class_do_not_meet(root, drafted):
    folder, rows = tiles(root / "set", [row["file"] for row in flat(("tissue", "background"))]), flat(("tissue", "background"))
    write(folder / "labels.csv", [{"filename": r["file"], "label": "" if i % 4 == 3 else r["label"]} for i, r in enumerate(rows)])
    _, found = drafted(folder)
    assert counts(found) == {"background": 9, "tissue (class)": 9}
    assert found.loc[found["use"].eq("unlabelled"), "label"].tolist() == ["tissue"] * 6


def test_masks_of_a_renamed_class_are_found_by_its_folder(root):
    for i in range(4):
        tiles(root / "set", [f"all/P{i}_0.png", f"hem/P{i}_0.png", f"masks/all/P{i}_0.png", f"masks/hem/P{i}_0.png"])
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("root: set\ntile_px: 16\nclasses: [all, hem]\nmask: masks/{label}/{name}\nbudget: {all: {tiles: 2, cases: 2}}\n")
    described = data.describe(path)
    rows = data.scan(described)
    assert counts(rows) == {"all (class)": 4, "hem": 4} and described.budget == {"all (class)": {"tiles": 2, "cases": 2}}
    assert rows["mask"].tolist() == ["masks/" + name for name in rows["file_name"]]
