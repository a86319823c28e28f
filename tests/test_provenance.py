"""verify, trace and without-case on a planted chain: tiles, LoRA, synthetic tiles, selection, classifier, evaluation."""

import json
import os
import shutil

import pytest
import squares

from histokit import cli, runs
from histokit.core import files
from histokit.runs import places, provenance, selection_reasons
from histokit.tiles import data

BLANK = selection_reasons.write([{"code": "blank", "contrast": 1.0, "cut": 4.0}])
CASE = "train-blue-0"  # two tiles of the class that is rare


@pytest.fixture
def chain(root):
    """A LoRA that learned from three blue tiles; two tiles made with it from the first and the last; one of them kept."""
    squares.dataset()
    run = runs.start(experiment="exp", step="02_lora", class_name="all")
    learned = data.training(data.load(run), "blue").head(3)
    training = {
        "dataset": "squares",
        "cases": sorted(set(learned["case_id"])),
        "patients": [],
        "tiles": [s[:16] for s in learned["sha256"]],
    }
    card = {"base": {"name": "mini", "identity": {}}, "classes": {"blue": ""}, "tokens": {}, "lora": True, "training": training}
    files.write_json(run.path("adapter.json"), card)
    run.finish({})

    def made(step, read=(), experiment="exp", **facts):
        run = runs.start(experiment=experiment, step=step, class_name="blue")
        for name in read:
            run.parent(name)
        rows = []
        for i, source in enumerate(("train/blue/0.png", "train/blue/4.png")):
            given = {
                "tile_id": f"{step}/{i}",
                "root": step,
                "label": "blue",
                "split": "",
                "case_id": "",
                "source": "synthetic",
                "method": "img2img",
            }
            given |= {"sources": json.dumps([source]), "prompt": "blue", "seed": i, "settings": '{"strength": 0.5}', "run_id": run.run_id}
            place = run.folder.relative_to(files.root() / "outputs" / experiment / step) / f"{i}.png"
            rows.append(
                squares.row(
                    run.folder.parent, str(place), squares.tile("blue", 7000 + i), **given | {"status": "kept", "reason": ""} | facts
                )
            )
        rows = squares.pd.DataFrame(rows)
        run.finish(rows)
        return rows

    rows = made("made", ["00_dataset", "02_lora"])
    run = runs.start(experiment="exp", step="keep", class_name="blue")
    run.parent("made")
    run.finish(rows.assign(status=["kept", "rejected"], reason=["", BLANK]))
    run = runs.start(experiment="exp", step="06_classifier")
    run.parent("00_dataset"), run.parents("keep")
    for arm, synthetic in (("real", ""), ("augmented", "keep")):
        facts = {"arm": arm, "seed": 0, "settings": {"synthetic": synthetic, "status": "kept"}, "n_synthetic": int(bool(synthetic))}
        files.write_json(run.path(arm, "0", "model.json"), facts)
    run.finish({})
    run = runs.start(experiment="exp", step="07_evaluate")
    run.parent("06_classifier")
    run.finish({})
    return root


def test_a_tile_is_followed_to_its_cases_and_to_what_learned_from_it(chain):
    (found,) = provenance.trace("made/0")
    assert found.made_by == f"outputs/exp/made/{files.slug('blue')}"
    assert found.sources == [("train/blue/0.png", CASE)]
    assert [places.relative(folder) for folder, _ in found.adapters] == ["outputs/exp/02_lora/all"]
    assert [(status, reason) for _, status, reason in found.decisions] == [("kept", "")]
    assert found.trained == ["outputs/exp/06_classifier: arm augmented, seed 0"]
    (rejected,) = provenance.trace("made/1")
    assert rejected.decisions[0][1:] == ("rejected", BLANK) and rejected.trained == []
    (place, status, _) = rejected.decisions[0]
    for reason in (BLANK, "blank or black: contrast 1.0 below 4.0"):  # the second as an earlier version wrote it
        rejected.decisions = [(place, status, reason)]
        assert f"  rejected   {place}: blank or black: contrast 1.0 below 4.0" in provenance.told(rejected)
    text = "\n".join(provenance.told(found))
    assert "source     train/blue/0.png, case train-blue-0" in text and "learned from 3 tiles of 2 cases" in text


def test_a_picture_is_known_by_its_contents_wherever_it_lies(chain, tmp_path):
    original = next((chain / "outputs").rglob("made/*/1.png"))
    elsewhere = tmp_path / "mail attachment.png"
    elsewhere.write_bytes(original.read_bytes())
    assert [found.row["tile_id"] for found in provenance.trace(elsewhere)] == ["made/1"]
    assert [found.row["tile_id"] for found in provenance.trace(files.sha256(original)[:12])] == ["made/1"]
    elsewhere.write_bytes(original.read_bytes() + b"0")
    with pytest.raises(FileNotFoundError, match=r"no manifest below outputs/ holds a synthetic tile .*mail attachment\.png"):
        provenance.trace(elsewhere)
    with pytest.raises(FileNotFoundError, match="holds a synthetic tile mad"):
        provenance.trace("mad")  # the beginning of an id names nothing


def test_a_tile_whose_maker_is_gone_is_still_known_by_its_selection(chain):
    shutil.rmtree(chain / "outputs" / "exp" / "made")
    (found,) = provenance.trace("made/0")
    assert found.made_by.startswith("a run that is gone") and found.adapters == [] and found.decisions[0][1] == "kept"


def test_a_withdrawn_case_is_found_in_all_it_touched(chain):
    found = provenance.without_case(CASE).set_index(["run", "how"])["tiles"].to_dict()
    made, keep = (f"outputs/exp/{step}/{files.slug('blue')}" for step in ("made", "keep"))
    assert found == {
        ("outputs/exp/00_dataset", "lists them: 2 train"): 2,
        ("outputs/exp/02_lora/all", "its tokens or LoRA learned from them"): 2,
        (made, "tiles rendered from them"): 1,
        (made, "tiles made with such tokens or LoRA"): 2,
        (keep, "lists such tiles"): 2,
        ("outputs/exp/06_classifier", "arm real learned from them"): 2,
        ("outputs/exp/06_classifier", "arm augmented learned from them"): 2,
        ("outputs/exp/06_classifier", "arm augmented learned from such tiles"): 1,
        ("outputs/exp/07_evaluate", "builds on these"): 0,
    }


def test_a_test_case_touches_the_numbers_and_no_generator(chain):
    found = provenance.without_case("test-blue-1")
    assert set(found["run"]) == {"outputs/exp/00_dataset", "outputs/exp/06_classifier", "outputs/exp/07_evaluate"}
    assert len(provenance.without_case("test-blue-1", dataset="another")) == len(provenance.without_case("nobody")) == 0


def test_a_base_that_learned_from_the_case_is_named(chain):
    run = runs.start(experiment="base", step="diffusion")
    rows = [{"source": "a.yaml", "label": "blue", "tile": f"train/blue/{i}.png", "pixels_sha256": "0"} for i in (0, 3)]
    files.write_table(run.path("trained_on.csv"), squares.pd.DataFrame(rows))
    run.finish({})
    assert ("outputs/base/diffusion", "learned from them", 1) in provenance.without_case(CASE).itertuples(index=False, name=None)


def test_verify_names_what_changed(chain):
    top = chain / "outputs" / "exp"
    checked, found = provenance.verify("exp")  # as `histokit report exp` names it
    assert (checked, found) == (12, []) == provenance.verify(top)
    picture = next(top.rglob("made/*/0.png"))
    before = picture.stat()
    flipped = bytearray(picture.read_bytes())
    flipped[100] ^= 1
    picture.write_bytes(flipped)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time as before
    next(top.rglob("made/*/1.png")).unlink()
    (top / "keep" / files.slug("blue") / "extra.png").write_bytes(b"x")
    (top / "02_lora" / "all" / "adapter.json").write_text("{}")
    _, found = provenance.verify(top)
    assert {(odd.run.removeprefix("outputs/exp/").split("/")[0], odd.name, odd.what) for odd in found} == {
        ("made", "0.png", "changed"),
        ("made", "1.png", "missing"),
        ("keep", "extra.png", "added"),
        ("02_lora", "adapter.json", "changed"),
    }


def test_verify_sees_an_edited_record_and_a_parent_that_was_redone(chain):
    top = chain / "outputs" / "exp"
    record = files.read_json(top / "07_evaluate" / "run.json")
    record["outputs"]["results.json"]["sha256"] = "0" * 64
    files.write_json(top / "07_evaluate" / "run.json", record)
    run = runs.start(experiment="exp", step="02_lora", class_name="all", seed=1)
    run.finish({"other": 1})
    _, found = provenance.verify(top)
    assert ("07_evaluate", "run.json", "changed") in {(odd.run.split("/")[2], odd.name, odd.what) for odd in found}
    assert ("made", "parent outputs/exp/02_lora/all", "changed") in {(odd.run.split("/")[2], odd.name, odd.what) for odd in found}
    with pytest.raises(FileNotFoundError, match="holds no run"):
        provenance.verify(chain / "tiles")


def test_the_commands_print_and_exit(chain, capsys):
    assert cli.main(["verify", "outputs/exp"]) == 0
    assert "12 files hashed again, nothing not as recorded" in capsys.readouterr().out
    assert cli.main(["trace", "made/0"]) == 0
    assert "learned by outputs/exp/06_classifier: arm augmented, seed 0" in capsys.readouterr().out
    assert cli.main(["without-case", CASE]) == 0
    out = capsys.readouterr().out
    assert "     2  outputs/exp/02_lora/all: its tokens or LoRA learned from them" in out and "outputs/.cache" in out
    assert cli.main(["without-case", "nobody"]) == 1
    (chain / "outputs" / "exp" / "07_evaluate" / "results.json").write_text("{} ")
    assert cli.main(["verify", "outputs"]) == 1
    assert "changed    outputs/exp/07_evaluate: results.json" in capsys.readouterr().out
