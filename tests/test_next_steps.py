"""The last sentence of a page follows from what the page found."""

from types import SimpleNamespace

import pandas as pd
import pytest

from histokit.evaluate import verdict
from histokit.runs import selection_reasons
from histokit.show import next_steps


def test_every_reason_against_a_tile_has_a_remedy():
    assert set(next_steps.REMEDIES) == set(selection_reasons.CODES) - {"earlier"}


def test_a_data_set_without_a_rare_class_is_told_how_to_get_one_and_one_that_cannot_be_tested_what_it_lacks():
    assert "No class is rare" in next(next_steps.after_dataset(SimpleNamespace(tail=[], cannot_be_evaluated={})))
    held = SimpleNamespace(tail=["a", "b"], cannot_be_evaluated={"b": "no tile in test", "c": "one case"})
    said = list(next_steps.after_dataset(held))
    assert said[0].startswith("A test case of b would be worth more") and "teaches the base a, b" in said[1]


@pytest.mark.parametrize(
    ("best", "said"), [(None, "Nothing was held out"), (100, "-p 02_lora.steps=200"), (20, "fewer steps"), (60, "at step 60 of 100. 03")]
)
def test_training_says_whether_more_steps_would_help(best, said):
    history = pd.DataFrame({"step": [50, 100]})
    history.attrs["best_step"] = best
    assert said in next(next_steps.after_training(history, "02_lora"))


def accepted(**tiles):
    rows = [("kept", "", tiles.pop("kept"))] + [("rejected", why, n) for why, n in tiles.items()]
    total = sum(row[2] for row in rows)
    return pd.DataFrame([(*row, row[2] / total) for row in rows], columns=["status", "why", "tiles", "share"])


def test_selection_names_the_commonest_reason_where_few_are_kept():
    assert "misses the class: a lower `strength`" in next(next_steps.after_selection(accepted(kept=3, judge=9, blurred=2)))
    assert next(next_steps.after_selection(accepted(kept=9, judge=3))).startswith("06 trains with the kept ones")
    said = list(next_steps.after_selection(accepted(kept=0, copy=9)))
    assert len(said) == 1 and "a higher `strength`" in said[0], "nothing is kept, so nothing is trained with"


@pytest.mark.parametrize(
    ("outcome", "draws", "said"),
    [
        ("few cases", 1, ["eight test cases"]), ("few seeds", 1, ["`seeds: 6`"]), ("none", 1, ["ceilings", "--draws 3"]),
        ("more", 1, ["--draws 3"]), ("more", 3, []), ("fewer", 3, ["did harm"]),
    ],
)  # fmt: skip
def test_the_verdict_names_what_would_change_it(outcome, draws, said):
    lines = list(next_steps.after_verdict({verdict.TAIL: {"outcome": outcome}}, {"draws": draws}))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))


def test_copies_of_a_set_are_explained_beside_the_cut_of_single_tiles():
    gates = {"a": SimpleNamespace(state="pass"), "b": SimpleNamespace(state="blocked")}
    said = list(next_steps.after_fidelity(gates, pd.DataFrame({"reading": ["farther than real tiles of other cases"]})))
    assert said[0].startswith("The set of b holds") and "05 asks each tile alone" in said[0] and "decoder" in said[1] and len(said) == 3
    assert list(next_steps.after_fidelity({}, pd.DataFrame({"reading": pd.Series(dtype=str)}))) == [
        "Whether they help is the question of 07."
    ]
