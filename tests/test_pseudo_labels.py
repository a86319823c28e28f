"""Tiles that nobody labelled, named by an arm that learned from labelled ones: how sure it has to be, and what is trained on them."""

import numpy as np
import pandas as pd
import pytest
import squares

from histokit import runs
from histokit.arms import comparison, pseudo_labels, trials
from histokit.core import files
from histokit.tiles import data

ARMS = {"oversampled": {"sampler": "balanced"}, "pseudo": {"sampler": "balanced", "pseudo": {"arm": "oversampled", "per_class": 2}}}


def answers(confidence):
    """Probabilities [N, 2] of class 0 with these confidences, at least one half."""
    return np.stack([np.asarray(confidence), 1 - np.asarray(confidence)], axis=1)


def test_the_threshold_is_the_lowest_that_keeps_the_precision():
    confidence = np.linspace(0.95, 0.6, 20)
    y = np.zeros(20, int)
    y[[12, 15, 16, 17]] = 1  # wrong answers, all among the less sure
    found = pseudo_labels.threshold(answers(confidence), y, 0.9)
    share = [(y[confidence >= at] == 0).mean() for at in confidence]
    assert found == min(at for at, right in zip(confidence, share, strict=True) if right >= 0.9)
    assert pseudo_labels.threshold(answers(confidence), np.ones(20, int), 0.9) is None
    assert pseudo_labels.threshold(answers(confidence[:9]), np.zeros(9, int), 0.9) is None, "ten tiles carry a threshold, nine do not"


def test_equal_confidences_are_taken_together():
    y = np.array([0] * 12 + [1] * 8)
    assert pseudo_labels.threshold(answers([0.9] * 10 + [0.8] * 10), y, 0.9) == 0.9
    assert pseudo_labels.threshold(answers([0.8] * 20), y, 0.9) is None


def test_each_class_gets_its_surest_tiles_and_none_below_the_threshold():
    sure = np.array([0.9, 0.8, 0.95, 0.7, 0.99, 0.55])
    probabilities = np.where(np.array([0, 0, 0, 0, 1, 1])[:, None] == [0, 1], sure[:, None], 1 - sure[:, None])
    rows, named = pseudo_labels.surest(probabilities, 0.6, 2)
    assert rows.tolist() == [0, 2, 4] and named.tolist() == [0, 0, 1]


def test_an_arm_that_cannot_name_anything_is_refused():
    for pseudo, said in (
        ({"arm": "later"}, "takes the name of an earlier arm of real tiles alone as `arm`, got 'later'; there is real"),
        ({"arm": "real", "share": 1}, "pseudo has no setting 'share'"),
        ({"arm": "real", "precision": 1.5}, "pseudo.precision is 1.5"),
        ({"arm": "real", "per_class": 0}, "pseudo.per_class is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            comparison.settle({"real": {}, "a": {"pseudo": pseudo}, "later": {}})
    with pytest.raises(ValueError, match="stands without synthetic"):
        comparison.settle({"real": {}, "a": {"pseudo": {"arm": "real"}, "synthetic": "keep"}})
    with pytest.raises(ValueError, match="put one before it"):
        comparison.settle({"a": {"pseudo": {"arm": "a"}}})


@pytest.fixture
def study(root):
    """Three colours, five tiles each in train, val and test; the labels of three training tiles of each are gone."""
    squares.dataset()
    path = next((root / "outputs" / "exp" / "00_dataset").glob("manifest.csv"))
    tiles = files.read_table(path)
    train = tiles[tiles["split"].eq("train")]
    loose = train.groupby("label").tail(3).index
    truth = tiles.loc[loose].set_index("tile_id")["label"]
    tiles.loc[loose, "use"], tiles.loc[loose, "label"] = "unlabelled", "tissue"
    path.unlink()  # what was frozen is a link, or read-only
    files.write_table(path, tiles)
    return truth


def compare(arms, seeds=2):
    run = runs.start(experiment="exp", step="06_classifier", arms=arms, seeds=seeds)
    tiles, settled, said = data.load(run), comparison.settle(arms, encoder="colour-texture"), []
    sets = comparison.assemble(run, tiles, settled)
    table = trials.train(run, settled, sets, tiles, seeds=seeds, steps=60, batch_size=6, say=said.append)
    return run, table, said, comparison.remarks(settled, sets, tiles)


def test_it_is_trained_on_the_tiles_its_teacher_is_sure_of_with_the_names_it_gave_them(study, monkeypatch):
    held, begin = {}, trials._Trial.__init__

    def watched(self, run, name, arm, tiles, *rest):
        held[name] = tiles
        begin(self, run, name, arm, tiles, *rest)

    monkeypatch.setattr(trials._Trial, "__init__", watched)
    run, table, said, remarks = compare(ARMS)
    assert table.groupby("arm")["n_pseudo"].unique().map(list).to_dict() == {"oversampled": [0], "pseudo": [6]}
    added = held["pseudo"][held["pseudo"]["source"].eq("pseudo")].set_index("tile_id")["label"]
    assert (added == study[added.index]).all() and added.value_counts().eq(2).all(), "three colours are easily told"
    assert any(line.startswith("pseudo: tiles named with a confidence of") for line in said)
    assert remarks == ["Arm pseudo: the tiles that it names come on top of those shown here, seed by seed (n_pseudo below)."]
    assert files.read_json(run.folder / "pseudo" / "0" / "model.json")["class_counts"] == [4, 4, 4]


def test_finished_pairs_are_taken_over_with_their_pseudo_labels(study):
    _, first, *_ = compare(ARMS)
    _, again, *_ = compare(ARMS)
    assert not first["reused"].any() and again["reused"].all()


def test_where_every_tile_has_a_label_it_says_so(root):
    squares.dataset()
    _, table, _, remarks = compare(ARMS, seeds=1)
    assert remarks == ["Arm pseudo: no training tile is without a label, so there is none to name."] and table["n_pseudo"].eq(0).all()
    pd.testing.assert_series_equal(table["n_real"], pd.Series([15, 15], name="n_real"))
