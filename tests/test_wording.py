"""Every outcome a comparison can have, as the sentence a reader gets."""

import numpy as np
import pytest

from histokit.evaluate import wording
from histokit.evaluate.wording import Difference

PLAIN = {"endpoint": "tail balanced accuracy", "arm": "augmented", "baseline": "real", "tiles": 140, "cases": 22, "seeds": 6}
PLAIN |= {"classes": ["Polyp", "Normal", "Mucinous"], "found": [80, 82, 84, 86, 88, 90], "base_found": [80, 80, 81, 81, 82, 82]}


def difference(value=0.61, base=0.58, low=-0.02, high=0.08, **changes):
    return Difference(**PLAIN | {"value": value, "base": base, "low": low, "high": high} | changes)


def head(value=0.896, base=0.9, low=-0.008, high=0.001, **changes):
    return difference(value, base, low, high, endpoint="head balanced accuracy", classes=["Adenocarcinoma"], **changes)


def few(found=(5,), base=(4,), **changes):
    held = {"found": list(found), "base_found": list(base), "seeds": len(found)} | changes
    return difference(low=np.nan, high=np.nan, tiles=14, **{"cases": 3} | held)


def test_an_interval_that_holds_zero_is_no_evidence():
    assert wording.sentence(difference(), head()) == (
        "No evidence, for this one draw and generator, that augmented finds the rare classes more or less often than real: "
        "balanced accuracy over the 3 rare classes 61.0 % against 58.0 %, +3.0 points [-2.0 to +8.0] "
        "(95 % interval; 140 tiles, 22 cases, 6 classifier seeds); common classes lose at most 1 point: -0.4 points [-0.8 to +0.1]."
    )


def test_a_gain_of_one_draw_says_for_which_draw_and_never_helps():
    said = wording.sentence(difference(low=0.004, high=0.056), head())
    assert said.startswith("For this one draw and generator, augmented finds the rare classes more often than real: ")
    assert "+3.0 points [+0.4 to +5.6] (95 % interval; 140 tiles, 22 cases, 6 classifier seeds)" in said
    assert "helps" not in said and "No evidence" not in said


def test_a_loss_hurts():
    said = wording.sentence(difference(0.55, 0.6, -0.09, -0.01), head())
    assert said.startswith("For this one draw and generator, augmented hurts: it finds the rare classes less often than real: ")
    assert "-5.0 points [-9.0 to -1.0]" in said


@pytest.mark.parametrize("low, high", [(0.0, 0.06), (-0.06, 0.0), (0.0004, 0.06), (-0.06, -0.0004), (0.0, 0.0)])
def test_an_interval_that_prints_a_zero_end_is_no_evidence(low, high):
    said = wording.sentence(difference(0.6 + (low + high) / 2, 0.6, low, high), head())
    assert said.startswith("No evidence") and (" [0.0 to" in said or "to 0.0]" in said)
    assert "-0.0" not in said and "+0.0" not in said


def test_fewer_than_eight_cases_give_counts_and_range_and_no_interval():
    said = wording.sentence(few(found=[3, 5, 7], base=[4, 4, 4]), head())
    assert said.startswith(
        "Too few cases to say, for this one draw and generator, whether augmented finds the rare classes more often than real: "
        "found 5.0 of 14 (3 to 7 over 3 runs) with augmented, 4 of 14 with real (14 tiles, 3 cases, 3 classifier seeds; no interval below "
        "8 cases); "
    )
    tail_part = said.partition(";")[0]
    assert "[" not in tail_part and "evidence" not in said.partition("common")[0]


def test_a_class_of_few_cases_reads_as_counts():
    assert wording.line(few(endpoint="Polyp")) == (
        "Polyp: found 5 of 14 with augmented, 4 of 14 with real (14 tiles, 3 cases, 1 classifier seed): too few cases for an interval"
    )


def test_seven_cases_are_too_few_and_eight_are_not():
    assert [difference(cases=n).outcome for n in (1, 7, 8)] == ["few cases", "few cases", "none"]


def test_one_classifier_seed_carries_no_claim_however_large_the_gain():
    d = difference(0.9, 0.1, np.nan, np.nan, seeds=1, found=[120], base_found=[14])
    said = wording.sentence(d, head(low=np.nan, high=np.nan, seeds=1))
    assert said.startswith("Too few classifier seeds to say, for this one draw and generator, whether augmented finds")
    assert "+80.0 points (140 tiles, 22 cases, 1 classifier seed; no interval below 3 seeds" in said
    assert "common classes -0.4 points (1 classifier seed, no interval)" in said


def test_a_mean_is_as_sure_as_its_weakest_class_which_is_named():
    weak = few(cases=26, smallest=2, weakest="Serrated", classes=["Polyp", "Serrated"])
    said, why = wording.sentence(weak, head()), "no interval: Serrated has 2 test cases, and each class of a mean needs 8"
    assert "Too few cases" in said and f"; {why})" in said and wording.line(weak).endswith(why)
    assert [difference(cases=26, smallest=n).outcome for n in (2, 7, 8)] == ["few cases", "few cases", "none"]
    weak_head = difference(0.896, 0.9, np.nan, np.nan, cases=10, smallest=2, weakest="mucinous", classes=["ductal", "mucinous"])
    paid = wording.sentence(difference(), weak_head)
    assert paid.endswith("common classes -0.4 points (no interval: mucinous has 2 test cases, and each class of a mean needs 8).")


def test_rare_classes_without_a_test_tile_give_no_verdict_and_are_named():
    absent = difference(np.nan, np.nan, np.nan, np.nan, tiles=0, cases=0, classes=[], found=[0], base_found=[0])
    said = wording.sentence(wording.Difference(**vars(absent) | {"left_out": {"Polyp": "no test tile"}}), head())
    assert said.startswith("No verdict: the rare classes cannot be evaluated (Polyp (no test tile))")
    assert "nan" not in said.lower() and wording.line(absent).endswith("no test tile, so it cannot be evaluated")


def test_a_dataset_without_rare_classes_gets_no_verdict_on_them():
    absent = difference(np.nan, np.nan, np.nan, np.nan, tiles=0, cases=0, classes=[], found=[0], base_found=[0])
    said = wording.sentence(absent, head(), rare=False)
    assert said.startswith("No class of this dataset is rare, so there is no verdict on rare classes; common classes lose")


def test_classes_left_out_are_counted_and_named():
    out = {"Signet": "no test tile", "Serrated": "one test case"}
    said = wording.sentence(difference(left_out=out), head())
    assert "over 3 of the 5 rare classes" in said
    assert "; left out: Signet (no test tile), Serrated (one test case);" in said
    many = {f"class {i}": "no test tile" for i in range(9)}
    assert "class 3 (no test tile), and 5 more" in wording.sentence(difference(left_out=many), head())


def test_a_common_class_that_could_not_be_asked_is_named_too():
    assert wording.sentence(difference(), head(left_out={"Normal": "no test tile"})).endswith("; left out: Normal (no test tile).")


def test_nobody_finds_a_macro_f1():
    outcomes = [difference(low=0.01), difference(0.5, 0.58, -0.1, -0.05), difference()]
    assert [wording.reading(wording.Difference(**vars(d) | {"endpoint": "macro-F1"})) for d in outcomes] == [
        "higher",
        "lower",
        "no evidence",
    ]


def test_one_rare_class_is_called_by_its_name():
    assert "than real: recall of Polyp 61.0 % against 58.0 %" in wording.sentence(difference(classes=["Polyp"]), head())


def test_equal_answers_are_said_to_be_equal():
    said = wording.sentence(difference(0.58, 0.58, 0.0, 0.0, same=True), head())
    assert said.startswith("No evidence") and "0.0 points [0.0 to 0.0]" in said
    assert "both gave the same answer on every rare tile" in said


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"low": -0.031, "high": -0.009}, "at a cost to the common classes: -0.4 points [-3.1 to -0.9]"),
        ({"low": -0.009, "high": -0.001}, "common classes lose at most 1 point: -0.4 points [-0.9 to -0.1]"),
        ({"low": -0.031, "high": 0.022}, "a cost of up to 3.1 points to the common classes is not excluded: -0.4 points [-3.1 to +2.2]"),
        ({"value": 0.92, "low": 0.01, "high": 0.03}, "common classes found more often: +2.0 points [+1.0 to +3.0]"),
        ({"low": np.nan, "high": np.nan, "cases": 5}, "common classes -0.4 points (5 cases, no interval)"),
        ({"tiles": 0}, "no common class has a test tile, so the cost to them is unknown"),
    ],
)
def test_the_price_for_the_common_classes_is_always_said(changes, words):
    assert wording.sentence(difference(), head(**changes)).endswith(f"; {words}.")


def rival(value, base, low, high, **changes):
    return difference(value, base, low, high, baseline="oversampled", **changes)


def test_a_gain_over_plain_real_is_held_against_the_best_arm_without_synthetic_tiles():
    gain = difference(0.66, 0.58, 0.03, 0.13)
    both = [rival(0.66, 0.64, -0.02, 0.06), difference(0.66, 0.6, 0.01, 0.11, baseline="stained")]
    said = wording.sentence(gain, head(), both)
    assert "; not shown to beat oversampled, the best of the arms without synthetic tiles (+2.0 points [-2.0 to +6.0]);" in said
    assert "stained" not in said
    said = wording.sentence(gain, head(), [rival(0.66, 0.62, 0.01, 0.07)])
    assert "; more often also than oversampled, the best of the arms" in said
    said = wording.sentence(gain, head(), [rival(0.66, 0.72, -0.09, -0.03)])
    assert "; oversampled, without any synthetic tile, finds them more often (augmented minus oversampled -6.0 points" in said


def test_no_evidence_stays_no_evidence_against_a_better_rival():
    said = wording.sentence(difference(), head(), [rival(0.61, 0.6, -0.04, 0.06)])
    assert said.startswith("No evidence") and "no evidence either against oversampled" in said


def test_a_rival_below_the_baseline_is_not_mentioned():
    assert "oversampled" not in wording.sentence(difference(), head(), [rival(0.61, 0.55, 0.01, 0.1)])


def test_too_few_cases_give_counts_of_the_rival_too():
    other = Difference(**vars(few()) | {"baseline": "oversampled", "base": 0.7, "base_found": [6]})
    said = wording.sentence(few(), head(), [other])
    assert "; oversampled, without synthetic tiles, found 6 of 14;" in said


def test_helps_needs_three_draws_two_generator_seeds_and_every_arm_without_synthetic_tiles():
    gain = difference(0.66, 0.58, 0.03, 0.13)
    said = wording.sentence(gain, head(), draws=3, generators=2)
    assert said.startswith("augmented helps: over 3 draws and 2 generator seeds it finds the rare classes more often than real: ")
    for draws, generators, rivals in [(1, 1, ()), (2, 2, ()), (3, 1, ()), (1, 2, ()), (3, 2, [rival(0.66, 0.64, -0.02, 0.06)])]:
        assert "helps" not in wording.sentence(gain, head(), rivals, draws=draws, generators=generators)
    assert "helps" not in wording.sentence(difference(), head(), draws=3, generators=2)


@pytest.mark.parametrize(
    "draws, generators, words",
    [
        (1, 1, "for this one draw and generator"),
        (3, 1, "for these 3 draws and one generator"),
        (1, 2, "for this one draw and 2 generator seeds"),
        (3, 2, "over 3 draws and 2 generator seeds"),
        (1, 0, "for this one draw"),
    ],
)
def test_the_scope_is_said(draws, generators, words):
    assert wording.scope(draws, generators) == words
    assert words in wording.sentence(difference(), head(), draws=draws, generators=generators)


@pytest.mark.parametrize("tail", [difference(), difference(low=0.01), difference(low=-0.1, high=-0.01, value=0.5), few(), few(seeds=1)])
def test_demo_size_is_stamped_on_every_outcome_and_it_stays_one_sentence(tail):
    said = wording.sentence(tail, head(), [rival(0.61, 0.6, -0.04, 0.06)], demo=True)
    assert said.endswith("; demo size, not evidence.")
    assert said.count(". ") == 0 and "\n" not in said and "demo" not in wording.sentence(tail, head())


def test_tiles_without_case_ids_say_so_in_the_interval():
    said = wording.sentence(difference(), head(), has_cases=False)
    assert "(95 % interval that takes every tile for a case and so is too narrow; 140 tiles, no case ids, 6 classifier seeds)" in said


def test_numbers_are_printed_as_points_without_a_signed_zero():
    assert wording.points(0.0312, -0.02, 0.0004) == "+3.1 points [-2.0 to 0.0]"
    assert wording.points(-0.0003) == "0.0 points"
    assert wording.points(0.1004, 0.1004, 0.2) == "+10.0 points [+10.0 to +20.0]"
    assert wording.percent(np.nan) == "unknown"
