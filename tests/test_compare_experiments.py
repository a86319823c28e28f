"""Two planted experiments: what differs is found, who is better is said, what cannot be compared is refused."""

import json

import pytest
from planted import experiment

from histokit import cli, runs
from histokit.core import files
from histokit.evaluate import compare_experiments, test_set_log
from histokit.tiles import data

CASES = [12, 10, 14, 11]


def judged(root, name, shift, cases=CASES, **parameters):
    """An experiment with an arm that is better by `shift`, and a finished 07 as far as it is read here."""
    arms = {"real": {}, "augmented": {"Polyp": shift, "Serrated": shift}}
    experiment(root, arms, cases, name=name, made=6)
    run = runs.start(experiment=name, step="07_evaluate", recipe="", arms_of="06_classifier", **parameters)
    run.finish({"sentence": "s", "arm": "augmented", "baseline": "real"})


def test_settings_that_differ_are_found_and_the_better_one_is_said_to_be(root, capsys):
    judged(root, "plain", 0.0, resamples=2000)
    judged(root, "guided", 2.0, resamples=3000, extra=1)
    table = compare_experiments.settings("plain", "guided")
    rows = {(row[0], row[2]): (row[3], row[4]) for row in table.itertuples(index=False)}
    assert rows == {("07_evaluate", "resamples"): (2000, 3000), ("07_evaluate", "extra"): (None, 1)}
    said, found = compare_experiments.paired("plain", "guided", resamples=300)
    tail = found["tail balanced accuracy"]
    assert tail.outcome == "more" and tail.arm == "guided/augmented" and 0 < tail.low < tail.difference
    assert said[0].startswith("tail balanced accuracy: guided/augmented ") and said[0].endswith(": found more often.")
    back = compare_experiments.paired("guided", "plain", resamples=300)[1]["tail balanced accuracy"]
    assert back.difference == pytest.approx(-tail.difference) and back.low == pytest.approx(-tail.high)
    same = compare_experiments.paired("plain", "guided", ("real", "real"), resamples=300)[1]["tail balanced accuracy"]
    assert same.difference == same.low == same.high == 0, "the same arm in both"
    assert cli.main(["compare", "plain", "guided"]) == 0
    out = capsys.readouterr().out
    assert "2 settings differ, plain | guided" in out and "planned by neither recipe, and counts as a look" in out


def test_a_comparison_is_a_look_at_the_test_tiles_that_the_next_verdict_hears_of(root):
    for name in ("plain", "guided"):
        judged(root, name, 0.0)
    with pytest.raises(ValueError, match="no arm"):
        compare_experiments.paired("plain", "guided", ("best", ""), resamples=20)
    assert not test_set_log.path().exists(), "nothing was seen"
    for _ in range(2):
        said, _ = compare_experiments.paired("plain", "guided", resamples=20)
        assert said[-1].startswith("The test tiles of planted are opened for the first time, with plan ")
    assert [json.loads(text) for text in files.read_table(test_set_log.path())["plan_text"]] == [
        {"judged": "guided/augmented", "baseline": "plain/augmented", "endpoint": "tail balanced accuracy", "level": 0.95, "resamples": 20}
    ]
    said, _ = compare_experiments.paired("plain", "guided", ("real", "augmented"), resamples=20)
    assert "opened 1 time before, with 2 plans, by histokit compare." in said[-2] and said[-1].endswith(": baseline was plain/augmented.")
    run = runs.start(experiment="plain", step="again", recipe="params/plain.yaml")
    assert test_set_log.open_test(run, "planted", data.load(run), {"judged": "augmented"}).before == 2
    judged(root, "guided", 0.5)  # made anew: other answers
    assert "opened 3 times before" in " ".join(compare_experiments.paired("plain", "guided", resamples=20)[0])


def test_a_step_that_only_one_has_is_told(root):
    judged(root, "plain", 0.0)
    judged(root, "guided", 0.0)
    runs.start(experiment="guided", step="04_guided", recipe="", class_name="Polyp").finish({})
    (row,) = compare_experiments.settings("plain", "guided").itertuples(index=False)
    assert tuple(row) == ("04_guided", "Polyp", "(step)", "not there", "there")


def test_what_cannot_be_compared_is_refused(root):
    judged(root, "plain", 0.0)
    judged(root, "other", 0.0, cases=[12, 10, 14, 10])
    with pytest.raises(ValueError, match="have other test tiles"):
        compare_experiments.paired("plain", "other")
    with pytest.raises(ValueError, match="no arm 'best'; there is augmented, real"):
        compare_experiments.paired("plain", "plain", ("best", ""))
    with pytest.raises(FileNotFoundError, match="outputs/nothing holds no finished step"):
        compare_experiments.settings("plain", "nothing")
    with pytest.raises(FileNotFoundError, match="outputs/nothing has no finished 07_evaluate"):
        compare_experiments.paired("plain", "nothing")
    assert cli.main(["compare", "plain", "nothing"]) != 0


def test_runs_without_a_seed_in_common_are_refused(root):
    judged(root, "plain", 0.0)
    judged(root, "later", 0.0)
    folder = root / "outputs" / "later" / "06_classifier"
    for arm in ("real", "augmented"):
        for s in range(6):
            (folder / arm / str(s)).rename(folder / arm / str(s + 20))
            path = folder / arm / str(s + 20) / "predictions.parquet"
            table = files.read_table(path)
            files.write_table(path, table.assign(seed=s + 20))
    with pytest.raises(ValueError, match="no classifier seed in common"):
        compare_experiments.paired("plain", "later")
