"""A model that learned from what an experiment tests on, or keeps back, is refused; planted lists of pictures."""

import numpy as np
import pandas as pd
import pytest
import squares
from PIL import Image
from tiny import write_hub_layout

from histokit import runs
from histokit.arms import comparison, trials
from histokit.core import files
from histokit.diffusion import backbone
from histokit.tiles import contamination, data, splits
from histokit.vision import encoders


@pytest.fixture
def tiles(root):
    squares.dataset()
    return data.load(runs.start(experiment="exp", step="look"))


def remember(folder, rows):
    """Write the list that 20_pretrain leaves beside its weights."""
    hashes = [contamination.pixels_hash(np.asarray(Image.open(path))) for path in rows["path"]]
    files.write_table(folder / contamination.LIST, pd.DataFrame({"source": "a.yaml", "label": "", "tile": "x", "pixels_sha256": hashes}))


def test_a_base_that_saw_test_tiles_is_refused_whatever_their_names_and_format(tiles, tmp_path):
    write_hub_layout(tmp_path)
    remember(tmp_path, tiles[tiles["split"].eq("train")])
    backbone.load(str(tmp_path), tiles=tiles)  # training tiles are what a base is for
    path = tiles.loc[tiles["split"].eq("test"), "path"].iloc[2]
    remember(tmp_path, tiles[tiles["path"].eq(path)])
    Image.open(path).save(path, compress_level=0)  # other bytes, the same picture
    name = tiles.loc[tiles["path"].eq(path), "tile_id"].iloc[0]
    with pytest.raises(ValueError, match=f"has learned from 1 tiles that this experiment keeps from training .first: '{name}', test."):
        backbone.load(str(tmp_path), tiles=tiles.assign(sha256=""))
    backbone.load(str(tmp_path))  # without an experiment there is nothing to leak


def test_a_tile_that_was_withheld_to_make_its_class_rare_counts(tiles, tmp_path):
    rows = tiles[tiles["split"].eq("train")]
    remember(tmp_path, rows.head(1))
    with pytest.raises(ValueError, match="withheld here to make its class rare"):
        contamination.refuse(tmp_path, tiles.assign(use=tiles["use"].where(tiles["tile_id"].ne(rows["tile_id"].iloc[0]), "withheld")), "it")


def test_the_answer_is_remembered_by_content(tiles, tmp_path, monkeypatch):
    remember(tmp_path, tiles[tiles["split"].eq("train")])
    contamination.refuse(tmp_path, tiles, "it")
    monkeypatch.setattr(contamination, "pixels_hash", lambda image: pytest.fail("read again"))
    contamination.refuse(tmp_path, tiles, "it")


def test_an_encoder_of_20_pretrain_is_asked_too_and_weights_without_a_list_are_not(tiles, tmp_path):
    files.write_tensors(tmp_path / "ssl.safetensors", encoders.SmallCNN(8).state_dict(), {"dim": "8", "size": "64"})
    run = runs.start(experiment="exp", step="06_classifier")
    arms = comparison.settle({"a": {}}, encoder=f"cnn@{tmp_path / 'ssl.safetensors'}")

    def train():
        return trials.train(run, arms, comparison.assemble(run, tiles, arms), tiles, seeds=1, steps=2, batch_size=4)

    assert len(train()) == 1
    remember(tmp_path, tiles[tiles["split"].eq("val")])
    with pytest.raises(ValueError, match="encoder 'cnn@.* has learned from 15 tiles"):
        train()


def test_a_split_is_drawn_around_what_a_model_has_learned_from(tiles, tmp_path):
    write_hub_layout(tmp_path)
    seen_rows = tiles[tiles["split"].eq("test")]  # by the split of before; in the new one they must be training tiles
    remember(tmp_path, seen_rows)
    bare = tiles.assign(split="")
    seen = contamination.learned_from([tmp_path, None], bare)
    assert seen.sum() == len(seen_rows)
    drawn = splits.assign(bare, {"train": 0.6, "val": 0.15, "test": 0.25}, seed=0, seen=seen)
    of_seen = drawn["case_id"].isin(bare["case_id"][seen])
    assert drawn["split"][of_seen].eq("train").all()
    assert set(drawn["split"]) == {"train", "val", "test"} and drawn["split"].eq("train").mean() < 0.85
    contamination.refuse(tmp_path, drawn, "it")
    assert "are all for training" in contamination.said(drawn, seen, "it")[0]
    assert "will be refused" in contamination.said(tiles, seen, "it")[0]
    assert contamination.said(tiles, np.zeros(len(tiles), bool), "it") == []
    loose = bare.assign(use="unlabelled", label="")
    assert splits.assign(loose, {"train": 0.6, "val": 0.15, "test": 0.25}, seed=0, seen=seen)["split"][of_seen].eq("train").all()
    mixed = bare.assign(use=bare["use"].where(~seen, "unlabelled"))  # those that were seen have no label, their cases do
    assert splits.assign(mixed, {"train": 0.6, "val": 0.15, "test": 0.25}, seed=0, seen=seen)["split"][of_seen].eq("train").all()
    plain = splits.assign(bare, {"train": 0.6, "val": 0.15, "test": 0.25}, seed=0)
    nothing = splits.assign(bare, {"train": 0.6, "val": 0.15, "test": 0.25}, seed=0, seen=np.zeros(len(tiles), bool))
    pd.testing.assert_frame_equal(plain, nothing)
