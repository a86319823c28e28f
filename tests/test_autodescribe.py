import pandas as pd
import pytest
from folders import class_folders, save, texture

from histokit.tiles import data
from histokit.tiles.ingest import autodescribe, case_patterns


def names(*texts):
    """{class: [CLASS/name]} from "class: name name ..." lines."""
    return {line.partition(":")[0]: [f"{line.partition(':')[0]}/{n}.png" for n in line.partition(":")[2].split()] for line in texts}


@pytest.mark.parametrize(
    ("lines", "cases"),
    [
        (("a: GT20-1-400-001 GT20-1-400-002 GT21-3-400-001", "b: GT20-1-400-009 GT30-1-400-001 GT30-1-400-002"), {"GT20", "GT21", "GT30"}),
        (
            ("a: patient_012_tile_1 patient_012_tile_2 patient_013_tile_1 patient_013_tile_4", "b: patient_014_tile_1 patient_014_tile_2"),
            {"012", "013", "014"},
        ),
        (("a: a_P1_001 a_P1_002 a_P2_003 a_P2_004", "b: b_P1_001 b_P1_002"), {"P1", "P2"}),
        (("a: SOB_B_A-14-22AB-100-001 SOB_B_A-14-22AB-100-002 SOB_B_A-14-29AB-100-001 SOB_B_A-14-29AB-40-001",), {"22AB", "29AB"}),
        (("a: TCGA-AB-1234-01Z_1 TCGA-AB-1234-01Z_2 TCGA-CD-1235-01Z_1 TCGA-CD-1235-01A_1",), {"TCGA-AB-1234", "TCGA-CD-1235"}),
        (("a: P1/x P1/y P2/z P2/w",), {"P1", "P2"}),
    ],
    ids=["first part", "number after a word", "after the class name", "behind constants", "TCGA", "folders"],
)
def test_the_case_is_found_in_the_name(lines, cases):
    import re

    found = names(*lines)
    pattern = case_patterns.guess(found)
    assert {re.search(pattern, name)["case_id"] for group in found.values() for name in group} == cases


@pytest.mark.parametrize(
    "lines",
    [
        ("a: 7494f9d40a 2b8912fff3 dd25924139", "b: 00eef00257 605b8046c7"),  # hashes
        ("a: a_001 a_002 a_003 a_004", "b: b_001 b_002 b_003 b_004"),  # a running number per class
        ("a: ADI-AAAM ADI-BBBQ", "b: BACK-AAXX BACK-CCZZ"),  # class and random letters
        ("a: img_1 img_2 img_3",),
    ],
    ids=["hashes", "running numbers", "random letters", "one running number"],
)
def test_no_case_is_made_up(lines):
    assert case_patterns.guess(names(*lines)) == ""


def test_a_drafted_description_is_valid_and_shows_its_guess(root, capsys):
    folder = class_folders(root / "My tiles, [2024]", ["No", "Tumor: groß"])
    assert autodescribe.draft(folder) == 0
    shown, path = capsys.readouterr().out, root / "params" / "datasets" / "my_tiles_2024.yaml"
    held = data.describe(path)
    assert held.classes == ["No", "Tumor: groß"] and held.tile_px == 32 and held.root == folder
    assert set(data.scan(held)["case_id"]) == {f"P{i:02d}" for i in range(6)}
    assert shown.count("  <-  No/P") == 10 and "6 cases by the file names" in shown and "OF ITS OWN" not in shown
    assert "-p dataset=params/datasets/my_tiles_2024.yaml," in shown, "as a recipe finds it, from the working root"
    assert "# 18 tiles" in path.read_text() and "Order fixes the label ids" in path.read_text()
    with pytest.raises(FileExistsError, match="left as it is"):
        autodescribe.draft(folder)


def test_cases_equal_to_tiles_or_one_give_a_warning(root, capsys):
    for i in range(4):
        save(root / "hashes" / "ab"[i % 2] / f"{'xyzw'[i] * 8}.png", texture(i))
    autodescribe.draft(root / "hashes")
    assert "NO CASE IDS FOUND: every tile counts as its own case" in capsys.readouterr().out
    folder = root / "single"
    class_folders(folder, cases=1)
    rows = [{"image": f"{c}/P00_{i}.png", "class": c, "patient": "P00"} for c in "ab" for i in range(3)]
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    autodescribe.draft(folder)
    shown = capsys.readouterr().out
    assert "ONE CASE ONLY" in shown and "from a single case, so trained on but never evaluated: a, b" in shown


def test_a_column_that_gives_every_tile_a_case_of_its_own_gives_a_warning(root, capsys):
    folder = class_folders(root / "single", cases=2)
    rows = [{"image": f"{c}/P{k:02d}_{i}.png", "class": c, "case": f"{c}{k}{i}"} for c in "ab" for k in range(2) for i in range(3)]
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    autodescribe.draft(folder)
    shown = capsys.readouterr().out
    assert "12 tiles, 12 cases by column 'case'" in shown and "EVERY TILE IS A CASE OF ITS OWN" in shown


def test_an_output_beside_the_reader_is_found_and_named_as_recipes_find_it(root, tmp_path_factory, monkeypatch, capsys):
    class_folders(root / "set")
    outside = tmp_path_factory.mktemp("outside")
    for folder, name in ((root / "params", "params/mine.yaml"), (outside, str(outside / "mine.yaml"))):
        monkeypatch.chdir(folder)
        autodescribe.draft(root / "set", output="mine.yaml")
        assert f"params/check_tiles.yaml -p dataset={name}" in capsys.readouterr().out and data.describe(name).name == "set"


def test_split_folders_masks_and_sizes_are_noticed(root, capsys):
    for split in ("train", "test"):
        class_folders(root / "set", cases=2, above=split)
    save(root / "set" / "train" / "masks" / "m.png", texture(0))
    save(root / "set" / "train" / "a" / "P09_9.png", texture(9, 48))
    autodescribe.draft(root / "set", output=root / "params" / "mine.yaml")
    held = data.describe("params/mine.yaml")
    assert held.ignore == ["masks"] and held.fit == "resize" and set(data.scan(held)["split"]) == {"train", "test"}
    shown = capsys.readouterr().out
    assert "not taken as classes: train/masks (1 picture)" in shown and "sizes differ (32 x 32, 48 x 48)" in shown


def test_a_folder_of_tiles_without_classes_is_unlabelled(root):
    for i in range(6):
        save(root / "loose" / f"P{i // 2}_{i}.png", texture(i))
    autodescribe.draft(root / "loose")
    tiles = data.scan(data.describe("params/datasets/loose.yaml"))
    assert set(tiles["label"]) == {"tissue"} and set(tiles["use"]) == {"unlabelled"} and tiles["case_id"].nunique() == 3


def test_a_folder_without_tiles_or_no_folder_says_so(root):
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="no tiles below .*empty"):
        autodescribe.draft(root / "empty")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        autodescribe.draft(root / "nowhere")
    assert not (root / "params" / "datasets").exists()


def test_nothing_is_written_into_the_folder_of_tiles(root, monkeypatch):
    class_folders(root / "tiles")
    monkeypatch.setenv("HISTOKIT_ROOT", str(root / "tiles"))
    with pytest.raises(ValueError, match="is the folder of tiles itself"):
        autodescribe.draft(root / "tiles")
    assert not (root / "tiles" / "params").exists()
    assert autodescribe.draft(root / "tiles", root / "mine.yaml") == 0
