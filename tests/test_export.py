"""What leaves the house: only what the copy gate lets out, loadable elsewhere, without a patient's name in it."""

import json

import pytest
import squares

from histokit import cli, runs
from histokit.core import files
from histokit.runs import places, provenance
from histokit.select import export

PASS, BLOCKED = {"state": "pass", "reasons": []}, {"state": "blocked", "reasons": ["up to 30.0 points more copies in outline"]}
UNSURE = {"state": "uncalibrated", "reasons": ["fewer than 20 held-out tiles of two cases"]}


def study(gates, **synthetic):
    """Tiles of two classes, selected class by class, and an evaluation that looked at them for copies."""
    squares.dataset()
    for name in ("blue", "red"):
        facts = {"sources": json.dumps([f"train/{name}/0.png"]), "prompt": f"a <hk-{name}>, =1+1", "method": "img2img"} | synthetic
        squares.synthetic({name: 3}, step="keep", class_name=name, **facts)
    evaluate(gates)
    return files.root() / "outputs" / "exp" / "keep"


def evaluate(gates, step="08_fidelity"):
    run = runs.start(experiment="exp", step=step)
    run.parents("keep")
    run.finish({"copies": {"gates": gates}})


@pytest.fixture
def step(root):
    return study({"blue": PASS, "red": PASS})


def test_the_folder_loads_elsewhere_and_every_picture_is_known(step, tmp_path):
    table = export.export(step, tmp_path / "out")
    assert table["label"].value_counts().to_dict() == {"blue": 3, "red": 3}
    held = files.read_table(tmp_path / "out" / "metadata.csv")
    assert held["prompt"].tolist() == table["prompt"].tolist()
    for row in held.itertuples():
        picture = tmp_path / "out" / row.file_name
        assert files.sha256(picture) == row.sha256
        assert provenance.trace(picture)[0].row["label"] == row.label


def test_no_name_of_a_patients_tile_or_case_or_folder_goes_along(step, tmp_path):
    export.export(step, tmp_path / "out")
    text = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in (b"train/", b"train-blue", str(files.root()).encode(), b"sources"):
        assert secret not in text


def test_the_card_says_what_it_is_and_what_is_not_known(step, tmp_path):
    export.export(step, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| blue | 3 | pass |" in card and "never for diagnosis" in card and "not a\npromise of privacy" in card
    assert "licence: not stated; ask its owners" in card and "Exported although" not in card
    assert card.startswith("---\npretty_name: squares, synthetic tiles\n")


def test_a_blocked_class_stays_and_the_others_may_go(root, tmp_path):
    step = study({"blue": BLOCKED, "red": PASS})
    with pytest.raises(ValueError, match="blue is blocked from export: up to 30.0 points more copies in outline. Leave it out"):
        export.export(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(export.export(step, tmp_path / "out", classes=["red"])["label"]) == {"red"}


def test_an_uncalibrated_class_goes_only_when_somebody_says_so_and_the_card_says_it_too(root, tmp_path):
    step = study({"blue": UNSURE})  # red was not looked at at all
    with pytest.raises(ValueError, match="copies cannot be told from chance .fewer than 20 held-out tiles"):
        export.export(step, tmp_path / "out")
    export.export(step, tmp_path / "out", accept_uncalibrated=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Exported although the copy detector could not be calibrated" in card and "| red | 3 | uncalibrated |" in card
    assert "- blue: fewer than 20 held-out tiles of two cases." in card


def test_nothing_leaves_before_it_was_looked_at_or_after_it_changed(root, tmp_path):
    step = study({"blue": PASS, "red": PASS})
    picture = next(step.rglob("blue-1.png"))
    before = picture.read_bytes()
    picture.write_bytes(before + b"0")
    with pytest.raises(ValueError, match=r"blue-1\.png is not the picture that was judged"):
        export.export(step, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part")), "half an export is none"
    picture.write_bytes(before)
    squares.synthetic({"blue": 4}, step="keep", class_name="blue")  # selected anew since
    with pytest.raises(FileNotFoundError, match="no finished 08_fidelity of exp has looked at these tiles"):
        export.export(step, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="holds no finished selection"):
        export.export(places.folder("exp", "00_dataset"), tmp_path / "other")


def test_nothing_kept_and_a_folder_that_is_there(root, tmp_path):
    step = study({"blue": PASS}, status="rejected")
    with pytest.raises(ValueError, match="kept no tile of any class"):
        export.export(step, tmp_path / "out")
    with pytest.raises(FileExistsError, match="name a folder that does not"):
        export.export(step, tmp_path)


def test_the_command(step, capsys):
    assert cli.main(["export", "outputs/exp/keep"]) == 0
    assert "6 tiles of 2 classes in exports/exp" in capsys.readouterr().out
    assert cli.main(["export", "outputs/exp/keep"]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["export", "tiles"]) == 2
    assert "tiles is not below outputs/; name the folder of a step of 05_select" in capsys.readouterr().err


def test_hugging_face_reads_it_as_an_imagefolder(step, tmp_path):
    import datasets

    export.export(step, tmp_path / "out")
    tiles = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(tiles) == 6 and set(tiles["label"]) == {"blue", "red"} and tiles[0]["image"].size == (64, 64)


def test_captions_go_along_as_lines_that_datasets_reads(root, tmp_path):
    from datasets import load_dataset

    step = study({"blue": PASS, "red": PASS}, prompt="a blue tile, type zero", settings=json.dumps({"prompt_id": 4}))
    export.export(step, tmp_path / "out", jsonl=True)
    assert not (tmp_path / "out" / "metadata.csv").exists()
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / ".hf"))["train"]
    assert set(loaded["text"]) == {"a blue tile, type zero"} and set(loaded["prompt_idx"]) == {4}
    ids = dict(zip(loaded["label_name"], loaded["label"], strict=True))
    assert ids == {"red": 0, "blue": 2}  # the ids of the dataset
