"""True tiles in the place of made ones, before anything is trained: gains that can be checked by hand."""

import numpy as np
import pandas as pd
import pytest
import squares

from histokit import runs
from histokit.evaluate import preflight
from histokit.metrics import stats
from histokit.tiles import data


def test_the_gain_is_that_of_the_mean_recall_of_the_rare_classes_alone():
    val = pd.DataFrame({"label": ["a"] * 4 + ["b"] * 4, "case_id": list("ppqqrrss")})
    before = np.array([0, 0, 0, 0, 0, 0, 1, 1])  # b: half found
    after = np.array([1, 1, 1, 1, 1, 1, 1, 1])  # b: all; a: none, which is not asked
    tiles, cases, first, gain, low, high = preflight._gain(val, ["a", "b"], ["b"], before, after)
    assert (tiles, cases, first, gain) == (4, 2, 0.5, 0.5) and np.isnan(low) and np.isnan(high), "two cases carry no interval"


def test_the_interval_is_the_paired_one_over_cases():
    rng = np.random.default_rng(0)
    cases = np.repeat(np.arange(20), 3)
    val = pd.DataFrame({"label": ["a"] * 60, "case_id": [f"c{k:02d}" for k in cases]})
    before, after = (rng.integers(0, 2, 20)[cases] for _ in range(2))
    *_, gain, low, high = preflight._gain(val, ["a", "b"], ["a"], before, after)
    per_case = (after == 0).reshape(20, 3).mean(1) - (before == 0).reshape(20, 3).mean(1).astype(float)
    half = stats.stats.t.ppf(0.975, 19) * per_case.std(ddof=1) / np.sqrt(20)  # of cases of equal size this is Student's interval
    assert gain == pytest.approx(per_case.mean())
    assert (low, high) == pytest.approx((max(-1, gain - half), min(1, gain + half)), abs=0.04)


@pytest.fixture
def made_rare():
    squares.dataset({"train": {"red": 8, "green": 8, "blue": 8}, "val": dict.fromkeys(squares.CLASSES, 4)})
    run = runs.start(experiment="exp", step="look")
    tiles = data.load(run)
    blue = tiles["label"].eq("blue") & tiles["split"].eq("train")
    last = tiles["file_name"].str.contains("/blue/[1-7]")  # one tile of the first case is left, one more of it and six of others withheld
    tiles.loc[blue & last, "use"] = "withheld"
    return run, tiles


class Colour:
    """An encoder that sees the mean colour of a tile."""

    identity, device, dim, name = {"encoder": "colour"}, "cpu", 3, "colour"

    def __call__(self, pixels):
        import torch

        return torch.from_numpy(pixels.mean((1, 2)).astype(np.float32))


def test_spare_tiles_of_the_same_and_of_other_cases_are_asked_about_apart(made_rare):
    run, tiles = made_rare
    found = preflight.headroom(run, tiles, data.dataset(run), Colour())
    assert found["whose"].tolist() == ["same_cases", "new_cases"] and found["through"].tolist() == ["none", "none"]
    assert found["added"].tolist() == [1, 6] and found["tiles"].tolist() == [4, 4] and found["cases"].tolist() == [2, 2]
    assert (found["before"] + found["difference"]).tolist() == [1, 1], "plain colours are told apart"
    (line,) = preflight.headroom_said(found)
    assert (
        "up to 1 more true tiles a class, of the same cases: " in line
        and "up to 6 more true tiles a class, of other cases: " in line
        and "a hint" in line
    )


def test_what_the_autoencoder_leaves_is_asked_of_the_same_tiles(made_rare):
    class Grey:
        identity = {"codec": "grey"}  # noqa: RUF012

        def __call__(self, pixels):
            return np.full_like(pixels, 128)

    run, tiles = made_rare
    found = preflight.headroom(run, tiles, data.dataset(run), Colour(), Grey())
    assert found["through"].tolist() == ["none", "vae"] * 2 and found["added"].tolist() == [1, 1, 6, 6]
    plain = preflight.headroom(run, tiles, data.dataset(run), Colour())
    assert found.query("through == 'none'")["difference"].tolist() == plain["difference"].tolist()
    (line,) = preflight.headroom_said(found)
    assert line.count("after this base's autoencoder") == 2


def test_nothing_is_said_where_no_class_was_made_rare():
    squares.dataset()
    run = runs.start(experiment="exp", step="look")
    found = preflight.headroom(run, data.load(run), data.dataset(run), Colour())
    assert len(found) == 0 and preflight.headroom_said(found) == []
