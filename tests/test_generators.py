"""Planted truth: six generators whose fault is known, told apart by what the verdict and its page say of them."""

import generators
import pytest

from histokit import runs
from histokit.arms import predictions
from histokit.core import files
from histokit.evaluate import question, verdict
from histokit.fidelity import copy_detection, likeness, sanity
from histokit.tiles import data
from histokit.vision import features


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """{generator: what 07 says of it} and the run's folder, by the same calls as the notebook's."""
    root = tmp_path_factory.mktemp("generators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTOKIT_ROOT", str(root))
        generators.experiment(root)
        run = runs.start(experiment="planted", step="07_evaluate")
        tiles, dataset = data.load(run), data.dataset(run)
        folder = run.parent("06_classifier")
        specs = files.read_json(folder / "run.json")["parameters"]["arms"]
        answers = predictions.read(folder, dataset.classes, list(specs))
        measured, found = verdict.measure(answers, dataset, resamples=500), {}
        # of four training tiles, one in forty honest ones lies as near as copies do in mini-sup, which brings a class together
        eyes = {name: features.load("mini-sup" if name == "collapsed" else "mini-ssl") for name in generators.GENERATORS}
        for name in generators.GENERATORS:
            made = data.load(run, step=name)
            real = likeness.surroundings(tiles, made, dataset.tail)
            seen = likeness.embed(["mini-sup"], real, made)
            like = likeness.fidelity(seen, real, made, dataset.tail, permutations=50)
            signs, stained = sanity.signs(seen, real, made, dataset.tail), sanity.stain(real, made, dataset.tail)
            parts = question.cast(specs, answers.arms, "real", name)
            found[name] = {
                "outcome": verdict.difference(measured, name, "real", verdict.TAIL).outcome,
                "sentence": verdict.conclude(measured, parts, dataset, made)["sentence"],
                "farther": like["reading"].str.startswith("farther").sum(),
                "remarks": list(sanity.remarks(signs, stained)),
                "gates": _gates(tiles, made, dataset, eyes[name]) if name in ("honest", "copier", "collapsed") else {},
            }
    return found


def _gates(tiles, made, dataset, encoder):
    return {c: gate.state for c, gate in copy_detection.measure(tiles, made, dataset.tail, encoder).gates.items()}


def of(said, name, word):
    """Rare classes of which a generator's remarks say the word."""
    return {line.partition(":")[0] for line in said[name]["remarks"] if word in line}


BOTH = set(generators.TAIL)
pytestmark = pytest.mark.slow


def test_an_honest_generator_helps_and_nothing_is_held_against_it(said):
    assert said["honest"]["outcome"] == "more"
    assert "honest finds the rare classes more often than real" in said["honest"]["sentence"]
    assert said["honest"]["farther"] == 0 and said["honest"]["remarks"] == []
    assert "blocked" not in said["honest"]["gates"].values()


def test_a_copier_is_blocked_and_teaches_nothing(said):
    assert set(said["copier"]["gates"].values()) == {"blocked"} and said["copier"]["outcome"] == "none"


def test_one_picture_over_and_over_is_called_so(said):
    assert of(said, "collapsed", "repeat themselves") == BOTH and said["collapsed"]["outcome"] in ("none", "fewer")
    assert "blocked" not in said["collapsed"]["gates"].values(), "it is no tile of a patient"


def test_wrong_labels_hurt_and_are_named(said):
    assert said["mislabelled"]["outcome"] == "fewer" and "hurts" in said["mislabelled"]["sentence"]
    assert of(said, "mislabelled", "labels are doubtful") == BOTH


def test_another_stain_is_named_and_is_not_taken_for_another_fault(said):
    assert of(said, "stained", "stained unlike") == BOTH and not of(said, "stained", "repeat themselves")
    assert said["stained"]["farther"] == 4


def test_colours_without_structure_teach_nothing_and_lie_far_from_real(said):
    assert said["useless"]["outcome"] in ("none", "fewer") and said["useless"]["farther"] == 4
    assert not of(said, "useless", "stained unlike")


def test_no_two_of_them_read_alike(said):
    words = ("repeat themselves", "labels are doubtful", "stained unlike")
    read = {
        name: (
            facts["outcome"],
            "blocked" in facts["gates"].values(),
            *(of(said, name, word) == BOTH for word in words),
            facts["farther"] > 2,
        )
        for name, facts in said.items()
    }
    assert len(set(read.values())) == len(read), read
