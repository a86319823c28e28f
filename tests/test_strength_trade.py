"""The trade of strength: which settings are asked, of which tiles, and what is said of the answers."""

import types

import numpy as np
import pandas as pd
import pytest

from histokit.generate import img2img
from histokit.runs import workload
from histokit.show.panel import strength_trade

JOBS = pd.DataFrame(
    {"class": ["fat"] * 9 + ["mucin"] * 3, "strength": 0.5, "guidance_scale": 2.0, "number": [*range(9), *range(3)], "tile_id": "t"}
)


@pytest.fixture
def asked(monkeypatch):
    """What was made, instead of making it: pictures whose only pixel is ten times the strength, and a 05 that keeps the weaker ones."""
    made = []

    def tried(model, jobs, tiles, **settings):
        made.append((settings, jobs["class"].tolist()))
        return np.full((len(jobs), 1), 10 * settings["strength"])

    def table(images, jobs):
        strong = images[:, 0] > np.where(jobs["class"].eq("fat"), 3, 100)
        gone = strong & (jobs["number"] > 0)
        status = np.where(gone & (jobs["number"] < 3), "rejected", "kept")  # of the others the judge alone says that the class is gone
        return pd.DataFrame({"status": status, "first": ~gone | (jobs["number"] < 3), "source": 1 - images[:, 0] / 10})

    monkeypatch.setattr(img2img, "tried", tried)
    return made, types.SimpleNamespace(table=table, judge=(["a judge"], ""))


def measure(said, tried, **options):
    return strength_trade.measure(None, JOBS, None, said, tried, **options)


def test_every_pair_of_settings_is_asked_of_the_first_tiles_of_each_class(asked):
    made, said = asked
    found = measure(said, {"strength": [0.25, 0.5], "guidance_scale": [1, 2]}, each=4)
    assert [settings for settings, _ in made] == [{"strength": s, "guidance_scale": g} for s in (0.25, 0.5) for g in (1.0, 2.0)] and all(
        names == ["fat"] * 4 + ["mucin"] * 3 for _, names in made
    )
    fat, mucin = (found[found["class"].eq(name)] for name in ("fat", "mucin"))
    assert fat["kept"].tolist() == [1, 1, 0.25, 0.25] and mucin["kept"].tolist() == [1] * 4 and fat["tiles"].tolist() == [4] * 4
    assert fat["like_source"].tolist() == [0.75, 0.75, 0.5, 0.5] and (fat["low"] < fat["kept"]).all() and (fat["kept"] <= fat["high"]).all()


def test_what_is_not_tried_stays_as_it_is_asked_for(asked):
    made, said = asked
    measure(said, {"guidance_scale": [1, 4]})
    assert [settings for settings, _ in made] == [{"strength": 0.5, "guidance_scale": g} for g in (1.0, 4.0)]
    assert not len(measure(said, {})) and len(made) == 2
    without = types.SimpleNamespace(table=None, judge=([], "Not trained yet."))
    found = measure(without, {"strength": [0.5]})
    assert not len(found) and list(strength_trade.remarks(found, {"strength": [0.5]}, "Not trained yet.")) == [
        "Not measured. Not trained yet."
    ]
    with pytest.raises(ValueError, match="some tiles start from noise alone"):
        strength_trade.measure(None, JOBS.assign(tile_id=""), None, said, {"strength": [0.5]})


@pytest.mark.parametrize(
    "tried", [{"steps": [3]}, {"strength": 0.5}, {"strength": []}, {"strength": [0]}, {"guidance_scale": [-1]}, {"strength": ["a"]}]
)
def test_what_cannot_be_tried_is_refused_in_words(tried):
    with pytest.raises(ValueError, match="tried"):
        workload.tried_pairs(tried, 0.5, 2.0)


def test_the_remarks_name_the_best_and_the_worst_and_say_what_may_be_chance(asked):
    _, said = asked
    fat, mucin = strength_trade.remarks(measure(said, {"strength": [0.25, 0.5]}), {}, "")
    assert fat.startswith("fat: most, 9 of 9, are recognised and would be kept at strength 0.25 and guidance 2, fewest, 1 of 9, at")
    assert fat.endswith("at strength 0.5 and guidance 2.")
    assert mucin == "mucin: 3 of 3 are recognised and would be kept under all of these settings."
    few, _ = strength_trade.remarks(measure(said, {"strength": [0.25, 0.5]}, each=2), {}, "")
    assert few.endswith("at strength 0.5 and guidance 2; with so few tiles that may be chance.")
    assert list(strength_trade.remarks(measure(said, {}), {}, "")) == ["Not measured: `tried` names no settings."]


def test_table_and_figure_hold_every_class_and_pair(asked):
    _, said = asked
    found = measure(said, {"strength": [0.25, 0.5], "guidance_scale": [1, 2]})
    assert strength_trade.table(found)["recognised and kept"].tolist()[:3] == ["9 of 9", "3 of 3", "9 of 9"]
    axes = strength_trade.figure(found).axes
    assert [axis.get_title() for axis in axes] == ["fat", "mucin"] and all(len(axis.lines) == 2 for axis in axes)
    assert [text.get_text() for text in axes[0].texts] == ["0.25", "0.5"] * 2
