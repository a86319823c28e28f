"""Several tables at once, names as other computers spell them, and folders that mean something else: what `histokit init` makes of them."""

import re
import time

import pandas as pd
import pytest
from field_folders import TWO, classes, counts, flat, tiles, write

from histokit.tiles import data
from histokit.tiles.ingest import case_patterns, survey, table_files, tile_names


def listed(sub="images"):
    return [{"file": row["file"], "label": row["label"], "patient": row["patient"]} for row in flat(sub=sub)]


def described(root, text):
    path = root / "params" / "datasets" / "set.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"root: set\ntile_px: 16\n{text}")
    return data.describe(path)


# --- tables beside each other ----------------------------------------------------------------------------------------


def test_tables_with_tiles_of_their_own_are_one_data_set(root, drafted):
    names = [f"P{p:02d}/t_{i}.png" for p in range(6) for i in range(4)]
    folder = tiles(root / "set", names)
    for p in range(6):
        write(folder / f"P{p:02d}" / "labels.csv", [{"tile": f"t_{i}.png", "label": "ab"[(i + p) % 2]} for i in range(4)])
    said, rows = drafted(folder)
    assert counts(rows) == {"a": 12, "b": 12} and set(rows["case_id"]) == {f"P{p:02d}" for p in range(6)}
    assert all(f"P{p:02d}/labels.csv is used" in said for p in range(6))


def test_of_the_tables_of_folds_one_fold_is_used_and_the_others_are_named(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    for fold in range(3):
        of = [int(row["patient"][1:]) % 3 == fold for row in listed()]
        write(folder / f"fold{fold}" / "train.csv", [row for row, held in zip(listed(), of, strict=True) if not held])
        write(folder / f"fold{fold}" / "test.csv", [row for row, held in zip(listed(), of, strict=True) if held])
    said, rows = drafted(folder)
    assert counts(rows) == TWO and rows["split"].value_counts().to_dict() == {"train": 24, "test": 12}
    assert "fold2/train.csv is there and not used: fold0/test.csv, fold0/train.csv name 24 of its 24 tiles already" in said


def test_a_second_rater_is_named_with_how_often_she_differs(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    write(folder / "rater_a.csv", listed())
    write(folder / "rater_b.csv", [{**row, "label": "stroma" if i < 5 else row["label"]} for i, row in enumerate(listed())])
    said, rows = drafted(folder)
    assert counts(rows) == TWO
    assert "rater_b.csv is there and not used: rater_a.csv names 36 of its 36 tiles already; it names another class for 5 of 36" in said


def test_a_table_of_some_tiles_does_not_hide_the_folders_of_all(root, drafted):
    folder = tiles(root / "set", classes())
    write(folder / "reread.csv", [{"file": n, "label": n.split("/")[0] if i else "tumour"} for i, n in enumerate(classes()[::3])])
    said, rows = drafted(folder)
    assert counts(rows) == TWO
    assert "it names 12 of 36 tiles, whose folders all name a class; 1 of its rows name another class than the folder" in said


def test_a_table_that_contradicts_the_folders_is_believed_and_says_so(root, drafted):
    folder = tiles(root / "set", classes())
    write(folder / "labels.csv", [{"file": n, "label": "stroma" if i < 3 else n.split("/")[0]} for i, n in enumerate(classes())])
    said, rows = drafted(folder)
    assert counts(rows) == {"adipose": 9, "stroma": 15, "tumour": 12}
    assert "3 OF 36 ROWS NAME ANOTHER CLASS THAN THE FOLDER, first adipose/P00_0.png: stroma" in said


def test_tiles_that_no_table_names_are_counted(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    write(folder / "labels.csv", listed()[:30])
    said, rows = drafted(folder)
    assert len(rows) == 30 and "6 of 36 pictures are in no table that is used, and stay out" in said


def test_two_rows_of_a_tile_are_said_before_they_are_refused(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    write(folder / "labels.csv", [{**row, "rater": r} for row in listed() for r in "ab"])
    said, _ = drafted(folder, scan=False)
    assert "36 TILES HAVE MORE THAN ONE ROW: 00 will stop" in said


# --- facts from other tables -----------------------------------------------------------------------------------------


def test_patients_of_tiles_are_joined_to_class_folders(root, drafted):
    names = [f"{c}/img{12 * k + i:03d}.png" for k, c in enumerate(TWO) for i in range(12)]
    folder = tiles(root / "set", names)
    write(folder / "patients.csv", [{"file": n, "patient": f"P{i // 3}", "age": 40 + i % 7} for i, n in enumerate(names)])
    said, rows = drafted(folder)
    assert counts(rows) == TWO and rows["patient"].nunique() == rows["case_id"].nunique() == 12
    assert "12 cases by patients.csv" in said


def test_patients_of_slides_make_the_split_go_by_patient(root, drafted):
    names = [f"{c}/S{s:02d}_{i}.png" for k, c in enumerate(("a", "b")) for s in range(6 * k, 6 * k + 6) for i in range(2)]
    folder = tiles(root / "set", names)
    write(folder / "slides.csv", [{"slide": f"S{s:02d}", "patient": f"P{s // 2}", "hospital": "xy"[s % 2]} for s in range(14)])
    said, rows = drafted(folder)
    assert rows["case_id"].eq(rows["patient"]).all() and rows["case_id"].nunique() == 6 and rows["slide"].nunique() == 12
    assert set(rows["group"]) == {"x", "y"} and "slides.csv is joined by the case" in said


def test_a_joined_table_must_know_every_tile_once(root):
    folder = tiles(root / "set", [f"{c}/S{s}_{i}.png" for c, s in (("a", 1), ("b", 2)) for i in range(2)])
    text = "classes: [a, b]\ncase_pattern: (?P<slide>S\\d)\nfacts: [{table: slides.csv, on: slide, columns: {patient: who}}]\n"
    write(folder / "slides.csv", [{"slide": "S1", "who": "P1"}])
    with pytest.raises(ValueError, match="has no row for 'S2'"):
        data.scan(described(root, text))
    write(folder / "slides.csv", [{"slide": "S1", "who": "P1"}, {"slide": "S2", "who": "P1"}, {"slide": "S2", "who": "P2"}])
    with pytest.raises(ValueError, match="two rows for 'S2' that differ"):
        data.scan(described(root, text))
    write(folder / "slides.csv", [{"slide": "S1", "who": "P1"}, {"slide": "S2", "who": "P1"}])
    assert set(data.scan(described(root, text))["case_id"]) == {"P1"}
    with pytest.raises(ValueError, match="`columns` name 'label'"):
        described(root, "classes: [a, b]\nfacts: [{table: slides.csv, on: slide, columns: {label: who}}]\n")


def test_a_table_of_slides_is_no_table_of_tiles(root, drafted):
    names = [f"patches/TCGA-A{k}-33{k}4-01Z/{i}_{k % 3}.png" for k in range(6) for i in range(4)]
    folder = tiles(root / "set", names)
    write(folder / "slides.csv", [{"slide_id": f"TCGA-A{k}-33{k}4-01Z", "label": "ab"[k % 2]} for k in range(6)])
    said, rows = drafted(folder)
    assert set(rows["use"]) == {"unlabelled"} and rows["case_id"].nunique() == 6
    assert "ARE TAKEN FOR PATIENTS OR SLIDES" in said and "names folders: the class of a slide" in said


def test_a_biopsy_of_a_patient_is_no_case(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    write(folder / "labels.csv", [{"file": r["file"], "label": r["label"], "case": f"{r['patient']}-{i % 2}", "patient": r["patient"]}
                                  for i, r in enumerate(listed())])  # fmt: skip
    _, rows = drafted(folder)
    assert rows["case_id"].nunique() == 12 and rows["slide"].nunique() == 24


# --- columns ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "a word in a longer name": {"Majority Vote Label": "label", "Votes (of 7)": lambda i: i % 8},
    "German": {"Diagnose": "label", "Vergrößerung": lambda i: 20},
    "tissue beside diagnosis": {"tissue": lambda i: "ab"[i % 2], "diagnosis": "label"},
    "a number and its name": {"target": lambda i: i // 12, "category": "label"},
    "a yes or no for each class": {"ADIPOSE": lambda i: i // 12 == 0, "STROMA": lambda i: i // 12 == 1, "TUMOUR": lambda i: i // 12 == 2},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_column_of_the_class_is_found(root, drafted, name):
    rows = listed()
    folder = tiles(root / "set", [row["file"] for row in rows])
    cells = [
        {"file": r["file"]} | {c: r["label"] if v == "label" else int(v(i)) if name[2] == "y" else v(i) for c, v in COLUMNS[name].items()}
        for i, r in enumerate(rows)
    ]
    write(folder / "labels.csv", cells)
    _, found = drafted(folder)
    assert {label.casefold(): n for label, n in counts(found).items()} == TWO


def test_a_case_that_some_rows_lack_is_said(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    write(folder / "labels.csv", [{"Image": r["file"], "Class": r["label"], "Patient ID": r["patient"] if i % 9 else ""}
                                  for i, r in enumerate(listed())])  # fmt: skip
    said, rows = drafted(folder)
    assert "ITS COLUMN 'Patient ID' IS EMPTY IN 4 OF 36 ROWS" in said and rows["case_id"].nunique() == 36


def test_titles_remarks_and_other_sheets_are_passed_over(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    csv = pd.DataFrame(listed()).to_csv(index=False)
    (folder / "labels.csv").write_text("# exported 2026-01-02, v3\nStudy 7; final\n\n" + csv)
    table = table_files.read(folder / "labels.csv")
    assert table.columns.tolist() == ["file", "label", "patient"] and table.attrs["lines"] == list(range(5, 41))
    (folder / "labels.csv").unlink()
    head = pd.DataFrame([["Study 7, 2026", "", ""], ["", "", ""], ["file", "label", "patient"]])
    with pd.ExcelWriter(folder / "labels.xlsx") as book:
        pd.DataFrame({"Note": ["read me"]}).to_excel(book, sheet_name="about", index=False)
        pd.concat([head, pd.DataFrame([list(row.values()) for row in listed()])]).to_excel(
            book, sheet_name="tiles", index=False, header=False
        )
    said, rows = drafted(folder)
    assert counts(rows) == TWO and rows["case_id"].nunique() == 12 and "of its 2 sheets 'tiles' is read" in said


NO_CASES = {  # columns that only sound like a case: {column: cells by row}
    "an age": {"patient_age": lambda i: 40 + i % 5},
    "a kind of specimen": {"Specimen Type": lambda i: ("biopsy", "resection")[i % 2]},
    "a scanner": {"slide_scanner": lambda i: ("Aperio", "Leica")[i % 2]},
}


@pytest.mark.parametrize("name", NO_CASES)
def test_what_only_sounds_like_a_case_is_none(root, drafted, name):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    more = NO_CASES[name]
    write(folder / "labels.csv", [{"file": r["file"], "label": r["label"], "case_id": r["patient"]} | {c: v(i) for c, v in more.items()}
                                  for i, r in enumerate(listed())])  # fmt: skip
    _, rows = drafted(folder)
    assert rows["case_id"].nunique() == 12


@pytest.mark.parametrize("column", ["tumor_size_mm", "age at diagnosis", "case"])
def test_a_measurement_is_no_class(root, drafted, column):
    folder = tiles(root / "set", classes())
    write(folder / "facts.csv", [{"file": n, column: 10 + i % 7} for i, n in enumerate(classes())])
    _, rows = drafted(folder)
    assert counts(rows) == TWO


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"type": lambda i: ("biopsy", "resection")[i % 2]}, "its column 'type' (biopsy, resection) may be no class"),
        ({"patient": lambda i: f"P{i // 3}", "Tumor Stage": lambda i: ("I", "II", "III")[i % 3]}, "12 cases by metadata.csv"),
    ],
)
def test_a_table_that_may_speak_of_something_else_does_not_replace_the_folders(root, drafted, columns, said):
    folder = tiles(root / "set", classes())
    write(folder / "metadata.csv", [{"file": n} | {c: v(i) for c, v in columns.items()} for i, n in enumerate(classes())])
    told, rows = drafted(folder)
    assert counts(rows) == TWO and said in told


def test_a_table_of_other_classes_than_the_folders_is_believed_aloud(root, drafted):
    folder = tiles(root / "set", classes())
    write(folder / "labels.csv", [{"file": n, "label": "ab"[i % 2]} for i, n in enumerate(classes())])
    said, rows = drafted(folder)
    assert set(counts(rows)) == {"a", "b"} and "THE TABLE CALLS THE CLASSES a, b, THE FOLDERS adipose, stroma, tumour" in said


def test_classes_in_a_table_and_splits_in_folders_are_both_read(root, drafted):
    names = [f"{split}/P{k}_{i}.png" for split, k in (("train", 1), ("train", 2), ("test", 3)) for i in range(4)]
    folder = tiles(root / "set", names)
    write(folder / "labels.csv", [{"file": n, "label": "ab"[i % 2]} for i, n in enumerate(names)])
    said, rows = drafted(folder)
    assert rows["split"].value_counts().to_dict() == {"train": 8, "test": 4} and "brings no val split" in said


def test_several_tables_of_a_split_are_one_split(root, drafted):
    folder = tiles(root / "set", [row["file"] for row in listed()])
    for name, part in (("train_a", range(12)), ("train_b", range(12, 24)), ("test", range(24, 36))):
        write(folder / f"{name}.csv", [{"file": listed()[i]["file"], "label": listed()[i * 7 % 36]["label"]} for i in part])
    _, rows = drafted(folder)
    assert rows["split"].value_counts().to_dict() == {"train": 24, "test": 12}


def test_facts_never_overwrite_what_is_there(root, drafted):
    names = [
        f"{s}/{c}/S{k:02d}_{i}.png" for s, k0 in (("train", 0), ("test", 6)) for c in "ab" for k in range(k0, k0 + 3) for i in range(2)
    ]
    folder = tiles(root / "set", names)
    slides = [f"S{k:02d}" for k in range(9)]
    write(folder / "a.csv", [{"slide": s, "hospital": "xy"[i % 2], "split": "train"} for i, s in enumerate(slides)])
    write(folder / "b.csv", [{"slide": s, "scanner": "pq"[i % 2]} for i, s in enumerate(slides)])
    _, rows = drafted(folder)
    assert rows["split"].value_counts().to_dict() == {"train": 12, "test": 12} and set(rows["group"]) == {"x", "y"}
    with pytest.raises(ValueError, match="gives split, which the data says already"):
        data.scan(described(root, "classes: [a, b]\ncase_pattern: (?P<slide>S\\d+)\n"
                                  "facts: [{table: a.csv, on: slide, columns: {split: split}}]\n"))  # fmt: skip


def test_patients_are_joined_once_and_by_the_name_the_rest_uses(root, drafted):
    names = [f"{c}/S{s:02d}_{i}.png" for k, c in enumerate(("a", "b")) for s in range(6 * k, 6 * k + 6) for i in range(2)]
    folder = tiles(root / "set", names)
    for name in ("scans", "slides"):
        write(folder / f"{name}.csv", [{"slide": f"S{s:02d}", "patient": f"P{s // 2}"} for s in range(12)])
    write(folder / "clinical.csv", [{"patient": f"P{p}", "hospital": "xy"[p % 2], "patient_age": 40 + p} for p in range(6)])
    _, rows = drafted(folder)
    assert rows["case_id"].nunique() == 6 and set(rows["group"]) == {"x", "y"}


def test_a_patients_table_that_lacks_a_tile_is_said(root, drafted):
    folder = tiles(root / "set", classes())
    write(folder / "patients.csv", [{"file": n, "patient": f"Q{i // 3}"} for i, n in enumerate(classes()[:-1])])
    said, _ = drafted(folder)
    assert f"it gives patient of 35 of 36 tiles, not of {classes()[-1]}, so that is not joined" in said


@pytest.mark.parametrize(
    "text",
    [
        "file;label\n" + "".join(f"{r['file']};{r['label']}\n" for r in listed()).replace("images/t", "images/t,"),
        "#file,label\n" + "".join(f"{r['file']},{r['label']}\n" for r in listed()),
        "file,label\r" + "".join(f"{r['file']},{r['label']}\r" for r in listed()),
        "file,label,label \n" + "".join(f"{r['file']},{r['label']},x{i % 2}\n" for i, r in enumerate(listed())),
        "file,one_a,one_b\n" + "".join(f"{r['file']},{i % 2 == 0},{i % 2 == 1}\n" for i, r in enumerate(listed())),
    ],
    ids=["commas in names", "header with #", "old Mac lines", "twin columns", "True and False"],
)
def test_odd_text_is_read(root, drafted, text):
    comma = "t," in text
    folder = tiles(root / "set", [row["file"].replace("images/t", "images/t,") if comma else row["file"] for row in listed()])
    (folder / "labels.csv").write_bytes(text.encode())
    _, rows = drafted(folder)
    assert len(rows) == 36 and set(rows["use"]) == {"labelled"} and rows["label"].nunique() == (2 if "one_a" in text else 3)


def test_lines_are_counted_as_a_spreadsheet_does(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\n\na.png,x\n\n\nb.png,y\n")
    assert table_files.read(tmp_path / "t.csv").attrs["lines"] == [3, 6]


def test_a_running_number_names_no_picture(root, drafted):
    folder = tiles(root / "set", [f"{c}/{10 * k + i:04d}.png" for k, c in enumerate("ab") for i in range(10)])
    pd.DataFrame({"slide": [f"zz{i}.svs" for i in range(20)], "diagnosis": ["p", "q"] * 10}).to_csv(folder / "slides.csv")
    write(folder / "patients.csv", [{"id": i, "diagnosis": "pq"[i % 2]} for i in range(1, 20)])
    _, rows = drafted(folder)
    assert counts(rows) == {"a": 10, "b": 10}


def test_signs_are_no_spellings(root, drafted):
    names = [f"{c}/P{10 * k + p}_{i}.png" for k, c in enumerate(("HER2", "HER2-", "HER2+")) for p in range(2) for i in range(2)]
    _, rows = drafted(tiles(root / "set", names))
    assert set(counts(rows)) == {"HER2", "HER2-", "HER2+"}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("s3://bucket/study/train/a/0001.png", "train/a/0001.png"),
        ("study/train/a/0001.png", "train/a/0001.png"),
        ("/home/bob/study/train/b/0001.png", "train/b/0001.png"),
        ("Train\\A\\0001.PNG", "train/a/0001.png"),
        ("7", "train/a/0007.png"),
        ("0001", None),
        ("elsewhere/0007.png", None),
        ("twin", "train/b/twin.tif"),
    ],
)
def test_a_name_is_found_however_another_computer_spells_it(cell, found):
    pictures = ["train/a/0001.png", "train/b/0001.png", "train/a/0007.png", "train/b/twin.jpg", "train/b/twin.tif"]
    assert tile_names.Names("/data", pictures).find([cell], numbered=True) == [found]


# --- folders and file names that mean something else -----------------------------------------------------------------


def test_spellings_of_one_class_are_one_class(root, drafted):
    names = [f"train/{n}" for n in classes(("Drüse", "stroma"))] + [f"test/{n}" for n in classes(("Dru\u0308se", "Stroma "), 2, 2)]
    said, rows = drafted(tiles(root / "set", names))
    assert counts(rows) == {"Drüse": 16, "stroma": 16} and "'stroma', 'Stroma ' are taken as spellings of one class" in said
    with pytest.raises(ValueError, match="'b' is a class and another spelling of 'a'"):
        described(root, "classes: {a: {also: [b]}, b: {}}\n")


@pytest.mark.parametrize(
    ("names", "expected", "group"),
    [
        ([f"{c}/{h}/{h[0]}{p}_{i}.png" for c in ("adenoma", "carcinoma") for h in ("Berlin", "Graz") for p in (1, 2) for i in range(2)],
         {"adenoma", "carcinoma"}, {"Berlin", "Graz"}),
        ([f"{h}/{c}/{h[0]}{p}_{i}.png" for c in ("adenoma", "carcinoma") for h in ("Berlin", "Graz") for p in (1, 2) for i in range(2)],
         {"adenoma", "carcinoma"}, {"Berlin", "Graz"}),
        ([f"{c}/{s}/P{p}_{i}.png" for c in ("kind A", "kind B") for s in ("HE", "PAS") for p in (1, 2) for i in range(2)],
         {"kind A", "kind B"}, {"HE", "PAS"}),
        ([f"{s}/{c}/{s[0]}{p}_{i}.png" for c in ("g1", "g2") for s in ("GT450", "S360") for p in (1, 2) for i in range(2)],
         {"g1", "g2"}, {"GT450", "S360"}),
    ],
    ids=["hospitals below", "hospitals above", "stains below", "scanners above grades"],
)  # fmt: skip
def test_hospitals_stains_and_scanners_are_no_classes(root, drafted, names, expected, group):
    _, rows = drafted(tiles(root / "set", names))
    assert set(rows["label"]) == expected and set(rows["group"]) == group


def test_words_below_a_class_are_sub_classes_and_no_case(root, drafted):
    names = [f"{c}_sets/{c}_{s}/{c}{s}{i}.png" for c in ("colon", "lung") for s in ("aca", "n") for i in range(4)]
    said, rows = drafted(tiles(root / "set", names))
    assert rows["case_id"].nunique() == 16 and "`levels: [-, class]` takes them" in said


def test_a_split_without_class_folders_does_not_hide_the_classes_of_the_others(root, drafted):
    names = [f"train/{n}" for n in classes()] + [f"test/{i}.png" for i in range(15)]
    said, rows = drafted(tiles(root / "set", names))
    assert counts(rows) == TWO and "not taken as classes: test (15 pictures)" in said


def test_what_lies_twice_is_read_once(root, drafted):
    names = [f"{a}{p}/{k}/x{i}.png" for a in ("", "again/") for p in (10253, 10254, 12748) for k in (0, 1) for i in range(2)]
    said, rows = drafted(tiles(root / "set", names))
    assert len(rows) == 12 and rows["case_id"].nunique() == 3 and "THE FOLDER again REPEATS THE NAMES OF WHAT LIES BESIDE IT" in said


def test_copies_of_class_folders_figures_and_empty_folders_are_said(root, drafted):
    names = [*classes(), "tumour - Copy/P30_0.png", "tumour - Copy/P30_1.png", "figures/one.png"]
    folder = tiles(root / "set", names)
    (folder / "necrosis").mkdir()
    (folder / "labels.json").write_text("{}")
    said, rows = drafted(folder)
    assert "figures" not in counts(rows) and "not taken as classes: figures (1 picture)" in said
    assert "'tumour - Copy' is called like a copy of 'tumour'" in said and "empty folders: necrosis" in said and "1 .json" in said


def test_classes_that_begin_the_file_names_are_read_from_them(root, drafted):
    names = [f"{s}/{c}_P{10 * k + p}_{i}.png" for k, c in enumerate(("adenoma", "normal")) for s, p0 in (("train", 0), ("test", 4))
             for p in range(p0, p0 + 3) for i in range(2)]  # fmt: skip
    said, rows = drafted(tiles(root / "set", names))
    assert counts(rows) == {"adenoma": 12, "normal": 12} and rows["split"].value_counts().to_dict() == {"train": 12, "test": 12}
    assert rows["case_id"].nunique() == 12 and "begin with adenoma, normal: they are taken as the classes" in said
    said, rows = drafted(tiles(root / "other", [f"{h}_P{p}_{i}.png" for h in ("Graz", "Berlin") for p in range(3) for i in range(2)]))
    assert set(rows["use"]) == {"unlabelled"} and "begin with Berlin, Graz: if these are the classes" in said
    with pytest.raises(ValueError, match="`label_pattern` is for tiles whose class stands in no table"):
        described(root, "classes: [a, b]\nlevels: [class]\nlabel_pattern: (?P<label>[^_]+)_\n")
    with pytest.raises(ValueError, match="does not match 'test/normal_P14_0.png'"):
        data.scan(described(root, "classes: [a, b]\nlabel_pattern: (?P<label>adenoma)_\n"))


@pytest.mark.parametrize("first", ["CD3 CD8 KI67", "2018 2019 2020", "x1 x2 x3"])
def test_stains_years_and_positions_are_no_cases(first):
    names = {
        c: [f"{c}/{f}_P{10 * k + p:02d}_{i}.png" for f in first.split() for p in range(3) for i in range(2)] for k, c in enumerate("ab")
    }
    pattern = case_patterns.guess(names)
    assert {re.search(pattern, n)["case_id"] for n in names["a"]} == {"P00", "P01", "P02"}


@pytest.mark.parametrize("listed_too", [False, True], ids=["folders", "a table as well"])
def test_masks_in_a_tree_of_their_own_are_masks_whatever_else_lies_at_the_top(root, drafted, listed_too):
    names = [f"{s}/{c}/P{i}_{s}.png" for s in ("train", "val", "test") for c in ("a", "b") for i in range(4)]
    folder = tiles(root / "set", [*names, *(f"masks/{n}" for n in names), "contact_sheet.jpg"])
    if listed_too:
        write(folder / "manifest.csv", [{"image": n, "cls": n.split("/")[1], "mask": f"masks/{n}"} for n in names])
    said, rows = drafted(folder)
    assert counts(rows) == {"a": 12, "b": 12} and rows["mask"].eq("masks/" + rows["file_name"]).all()
    assert ("named in the column 'mask'" if listed_too else "offered as `mask: masks/{path}.png`") in said


def test_unlabelled_tiles_owe_no_mask_and_every_mirror_is_taken_off(root, drafted):
    names = [f"{c}/P{i}_0.png" for c in "ab" for i in range(4)]
    more = [*(f"masks/{n}" for n in names), *(f"overlay/{n}" for n in names), "unlabelled/u0.png"]
    _, rows = drafted(tiles(root / "set", [*names, *more]))
    assert counts(rows) == {"a": 4, "b": 4}
    assert rows.loc[rows["use"].eq("labelled"), "mask"].str.startswith("masks/").all()
    assert rows.loc[rows["use"].eq("unlabelled"), "mask"].tolist() == [""]


def test_overlays_beside_masks_are_neither_tiles_nor_masks(root, drafted):
    names = [f"{s}/{kind}/{s}_{i}.png" for s in ("train", "valid") for kind in ("Images", "Annotation", "Overlay") for i in range(4)]
    _, rows = drafted(tiles(root / "set", names))
    assert len(rows) == 8 and rows["mask"].str.contains("Annotation").all()


def test_tables_of_many_tiles_are_looked_at_quickly(root):
    """The work grows with the tiles and not with their square: ten times as many take less than forty times as long."""
    spent = []
    for n in (300, 3000):
        folder = root / f"set{n}"
        for k in range(4):
            (folder / f"c{k}").mkdir(parents=True)
        names = [f"c{i % 4}/P{i // 30:04d}_{i}.png" for i in range(n)]
        for name in names:
            (folder / name).touch()
        for t in range(3):
            write(folder / f"t{t}.csv", [{"file": name, "label": name[:2]} for name in names])
        start = time.process_time()
        survey.look(folder)
        spent.append(time.process_time() - start)
    assert spent[1] < 40 * spent[0]
