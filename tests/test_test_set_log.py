"""Every look at a test split is written down before it happens, and a plan that changed afterwards is seen."""

import pytest
import squares

from histokit import runs
from histokit.core import files
from histokit.evaluate import test_set_log
from histokit.tiles import data

PLAN = {"judged": "augmented", "baseline": "oversampled", "endpoint": "tail balanced accuracy", "margin": 0.01}


@pytest.fixture
def tiles(root):
    squares.dataset()
    return data.load(runs.start(experiment="exp", step="look"))


def look(tiles, plan=PLAN, experiment="exp", recipe="params/a.yaml"):
    run = runs.start(experiment=experiment, step="07_evaluate", recipe=recipe, n=len(list(files.root().rglob("test_splits.csv"))))
    found = test_set_log.open_test(run, "squares", tiles, plan)
    again = test_set_log.open_test(run, "squares", tiles, plan)
    assert again == found, "a run that is resumed counts once"
    run.finish({"plan": str(plan)})
    return found


def test_the_first_look_is_the_first(tiles):
    found = look(tiles)
    assert found.before == 0 and found.changed == ""
    assert list(found.remarks("squares")) == [f"The test tiles of squares are opened for the first time, with plan {found.plan[:8]}."]


def test_looks_are_counted_over_experiments_and_a_changed_plan_is_named(tiles):
    look(tiles)
    look(tiles, experiment="other", recipe="params/b.yaml")
    found = look(tiles, PLAN | {"judged": "unselected"})
    assert found.before == 2 and len(found.plans) == 2
    said = " ".join(found.remarks("squares"))
    assert "opened 2 times before, with 2 plans, by params/a.yaml, params/b.yaml." in said
    assert "The plan was changed after the first look at them: judged was augmented." in said
    assert len(files.read_table(test_set_log.path())) == 3


def test_a_run_that_crashed_is_no_look(tiles):
    run = runs.start(experiment="exp", step="07_evaluate", recipe="params/a.yaml", n=0)
    test_set_log.open_test(run, "squares", tiles, PLAN)
    run._lock.release()
    runs.mark_failed(run.folder, "cannot reshape")
    assert look(tiles).before == 0, "set aside as failed"
    assert look(tiles, experiment="other").before == 1


def test_of_arms_that_changed_only_the_names_are_said(tiles):
    arms = {"real": {}, "few": {"synthetic": "keep", "per_class": 5}, "old": {"loss": "focal"}}
    look(tiles, PLAN | {"arms": arms})
    more = {"real": {}, "few": {"synthetic": "keep", "per_class": 9}, "new": {}, "newer": {}}
    assert look(tiles, PLAN | {"arms": more}).changed == "arms new, newer new; arm old gone; arm few with other settings"
    assert look(tiles, PLAN | {"arms": arms}).changed == "", "back to what was planned"
    assert look(tiles, PLAN | {"arms": arms, "strata": "slide"}).changed == "strata is new (slide)"


def test_a_line_of_an_earlier_version_is_shown_as_it_stands(tiles):
    look(tiles)
    table = files.read_table(test_set_log.path())
    files.write_table(test_set_log.path(), table.assign(plan_text="judged augmented, margin 0.01"))
    assert look(tiles, PLAN | {"margin": 0.05}).changed == "it was judged augmented, margin 0.01"


def test_other_test_tiles_are_another_split_and_training_tiles_do_not_matter(tiles):
    look(tiles)
    first = tiles["tile_id"].eq(tiles.loc[tiles["split"].eq("test"), "tile_id"].iloc[0])
    assert look(tiles[~first]).before == 0
    assert look(tiles[tiles["split"].ne("train")]).before == 1


def test_the_order_of_a_plan_does_not_matter(tiles):
    look(tiles)
    found = look(tiles, dict(reversed(PLAN.items())))
    assert found.before == 1 and found.changed == "" and len(found.plans) == 1
