"""Arms of a segmenter: what each learns from, that it is never trained twice, that test tiles stay apart, that a control does worse."""

import blobs
import numpy as np
import pandas as pd
import pytest

from histokit import runs
from histokit.arms import fit_segmenter, segmentation_arms
from histokit.core import files
from histokit.tiles import data
from histokit.vision import segmenters

HOW = fit_segmenter.Settings(steps=40, batch_size=8, lr=5e-3)
ARMS = {
    "real": {},
    "made": {"synthetic": "made", "share": 0.5},
    "made_alone": {"synthetic": "made", "real": "none"},
    "wrong_alone": {"synthetic": "made", "real": "none", "masks": "shuffled"},
    "stained": {"recolour": "reinhard", "copies": 2, "share": 0.5},
    "pseudo": {"pseudo": {"arm": "real"}, "share": 0.5},
    "all": {"real": "all"},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A finished set of arms, trained once."""
    root = tmp_path_factory.mktemp("arms")
    before = files.os.environ["HISTOKIT_ROOT"]
    files.os.environ["HISTOKIT_ROOT"] = str(root)
    try:
        tiles = blobs.finished(root, cases=16, tiles=3, annotated=2)
        blobs.made(tiles)
        run = runs.start(experiment="exp", step="31_segmentation")
        table = train(run, ARMS, seeds=2)
        run.finish({})
    finally:
        files.os.environ["HISTOKIT_ROOT"] = before
    return root, table


@pytest.fixture
def at(told, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(told[0]))
    return told


def train(run, arms, seeds=1, how=HOW, **more):
    return segmentation_arms.train(
        run, segmentation_arms.settle(arms), data.load(run), data.dataset(run), seeds=seeds, how=how, say=lambda line: None, **more
    )


def scores(root, arm, seed=0):
    return files.read_table(root / "outputs" / "exp" / "31_segmentation" / arm / str(seed) / "scores.parquet")


def dice(table, layer="blob", split="test"):
    own = table[table["layer"].eq(layer) & table["split"].eq(split)][["tp", "fp", "fn"]].sum()
    return 2 * own["tp"] / (2 * own["tp"] + own["fp"] + own["fn"])


def test_every_arm_takes_the_same_updates_and_learns_from_what_it_says(at):
    root, table = at
    assert len(table) == 14 and set(table["updates"]) == {40} and not table["reused"].any()
    first = table[table["seed"].eq(0)].set_index("arm")
    assert first["n_real"].to_dict() == {"real": 6, "made": 6, "made_alone": 0, "wrong_alone": 0, "stained": 6, "pseudo": 6, "all": 30}
    assert first.loc["made", "n_beside"] == 12 and first.loc["pseudo", "n_beside"] == 24 and first.loc["real", "n_beside"] == 0
    assert (
        0 < first.loc["stained", "n_beside"] <= 12
        and first.loc["made", "share"] == 0.5
        and first.loc["all", "share"] == 0
        and first.loc["made_alone", "share"] == 1
    )
    for arm in ARMS:
        own = scores(root, arm)
        assert set(own["split"]) == {"val", "test"} and own.groupby("layer").size().eq(18).all() and set(own["gen_seed"]) == {0}
        assert (own["tp"] + own["fn"]).groupby(own["tile_id"]).sum().eq(blobs.PX**2).all()  # every pixel is of one layer
        assert segmenters.load(root / "outputs/exp/31_segmentation" / arm / "0").facts["arm"] == arm


def test_tiles_with_masks_of_others_teach_worse_than_with_their_own(at):
    root, _ = at
    mean = lambda arm: np.mean([dice(scores(root, arm, s)) for s in (0, 1)])  # noqa: E731
    assert mean("made_alone") > mean("wrong_alone") + 0.2
    assert mean("all") > 0.8


def test_a_finished_pair_is_never_trained_twice_and_a_changed_one_is(at, tmp_path_factory):
    import shutil

    root = tmp_path_factory.mktemp("again")
    shutil.copytree(at[0], root, dirs_exist_ok=True)
    files.os.environ["HISTOKIT_ROOT"] = str(root)
    run = runs.start(experiment="exp", step="31_segmentation", seeds=3)
    some = {name: ARMS[name] for name in ("real", "pseudo")}
    table = train(run, {**some, "real2": {"augment": "stain"}}, seeds=3).set_index(["arm", "seed"])["reused"]
    assert table.to_dict() == {(arm, s): arm in some and s < 2 for arm in (*some, "real2") for s in range(3)}
    other = train(run, some, seeds=1, how=fit_segmenter.Settings(steps=41, batch_size=8, lr=5e-3))
    assert not other["reused"].any()


def test_a_tile_made_from_a_test_tile_is_refused(root):
    tiles = blobs.finished(root, cases=10, tiles=2, annotated=2)
    blobs.made(tiles.assign(split=tiles["split"].map({"test": "train"}).fillna("test")))  # its source is a test tile
    run = runs.start(experiment="exp", step="31_segmentation")
    with pytest.raises(ValueError, match="was made from .* which is not for training"):
        train(run, {"made": {"synthetic": "made"}})


def test_made_tiles_without_masks_and_arms_without_tiles_are_refused(root):
    tiles = blobs.finished(root, cases=10, tiles=2, annotated=2)
    blobs.made(tiles)
    path = root / "outputs" / "exp" / "made" / "manifest.csv"
    files.write_table(path, files.read_table(path).assign(mask=""))
    run = runs.start(experiment="exp", step="31_segmentation")
    with pytest.raises(ValueError, match="tiles of made have no mask"):
        train(run, {"made": {"synthetic": "made"}})
    with pytest.raises(ValueError, match="nothing stands beside"):
        train(run, {"made": {"synthetic": "made", "status": "rejected"}})
    sure = {"real": {}, "pseudo": {"pseudo": {"arm": "real", "confidence": 1.0}}}
    with pytest.raises(ValueError, match="is nowhere as sure as 1.0"):
        train(run, sure, how=fit_segmenter.Settings(steps=2, batch_size=2))


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({}, "no arm to train"),
        ({"a b": {}}, "becomes a folder name"),
        ({"x": {"synthetik": "y"}}, "did you mean synthetic"),
        ({"x": {"masks": "wrong"}}, "masks is 'wrong'"),
        ({"x": {"synthetic": "y", "recolour": "macenko"}}, "one alone can be compared"),
        ({"x": {"pseudo": {"arm": "y"}}}, "name an arm that stands before it"),
        ({"x": {"share": 0.5}}, "share does nothing where nothing stands beside"),
        ({"x": {"real": "none"}}, "there is nothing to learn from"),
        ({"x": {"synthetic": "y", "share": 1.5}}, "share is 1.5"),
    ],
)
def test_arms_that_mean_nothing_are_refused(arms, said):
    with pytest.raises(ValueError, match=said):
        segmentation_arms.settle(arms)


def test_many_tiles_are_read_batch_by_batch_to_the_same_pixels(root, monkeypatch):
    tiles = blobs.study(root, cases=8, tiles=2)
    whole = segmentation_arms.Tiles(tiles, blobs.LAYERS, blobs.PX)
    monkeypatch.setattr(segmentation_arms, "HELD", 0)
    lazy = segmentation_arms.Tiles(tiles, blobs.LAYERS, blobs.PX)
    assert whole.held and not lazy.held
    rows = [3, 0, 7, 3]
    assert all((a == b).all() for a, b in zip(whole(rows), lazy(rows), strict=True))
    read = segmentation_arms.joined(lazy, whole)
    pixels, ids = read([1, 16 + 1, 0])
    assert (pixels[0] == pixels[1]).all() and (ids[0] == ids[1]).all() and not (pixels[0] == pixels[2]).all()
    assert isinstance(tiles, pd.DataFrame)
