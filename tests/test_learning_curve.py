"""How many real tiles synthetic ones were worth: known curves, and planted arms whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from planted import CLASSES, dataset, predicted, tiles

from histokit.evaluate import learning_curve, question, verdict

ROWS = tiles([20, 15, 14, 12], per_case=8)
CURVE = {10: -0.6, 15: 0.0, 30: 0.7, 60: 1.4}  # raise of Polyp's right answers at so many real tiles
SPECS = {f"real{n}": {"real_tiles": n} for n in (10, 30, 60)} | {"real": {}, "augmented": {"synthetic": "keep"}}


def study(shift, specs=SPECS, rows=ROWS, doses=(), bare=False):
    """(points, worth) of an `augmented` arm whose Polyp answers are raised by `shift`, and of doses of it; or what it follows from."""
    arms = {"real": {}} | {f"real{n}": {"Polyp": CURVE[n]} for n in (10, 30, 60)} | {"augmented": {"Polyp": shift}}
    arms |= {f"augmented{n}": {"Polyp": shift * n / 100} for n in doses}
    specs = specs | {f"augmented{n}": {"synthetic": "keep", "per_class": n} for n in doses}
    read = predicted(rows, arms)
    specs = {arm: specs[arm] for arm in arms}
    m, parts = verdict.measure(read, dataset(), resamples=300), question.cast(specs, list(arms), "real")
    if bare:
        return m, parts, specs
    counts = [{"arm": a, "label": c, "real": 15 if c == "Polyp" else 100, "synthetic": 0, "recoloured": 0} for a in arms for c in CLASSES]
    counts = pd.DataFrame(counts)
    for n in (10, 30, 60):
        counts.loc[counts["arm"].eq(f"real{n}") & counts["label"].eq("Polyp"), "real"] = n
    for arm, n in {"augmented": 100, **{f"augmented{n}": n for n in doses}}.items():
        counts.loc[counts["arm"].eq(arm) & counts["label"].eq("Polyp"), "synthetic"] = n
    points = learning_curve.curves(m, parts, specs, counts)
    return points, learning_curve.worth(m, parts, points)


def test_a_recall_on_the_curve_gives_back_its_tiles_and_between_points_the_logarithm_is_straight():
    n, recall = [10, 20, 40, 80], np.array([0.1, 0.3, 0.5, 0.9])
    assert [float(learning_curve.looked_up(n, recall, y)) for y in recall] == pytest.approx(n)
    assert learning_curve.looked_up(n, recall, 0.4) == pytest.approx(20 * 2**0.5)
    assert learning_curve.looked_up(n, recall, np.array(0.0)) == pytest.approx(10) and learning_curve.looked_up(
        n, recall, 1.0
    ) == pytest.approx(80)


def test_many_curves_at_once_are_looked_up_one_by_one_and_a_dip_is_pooled():
    n, curves = [10, 20, 40], np.array([[0.1, 0.3, 0.5], [0.2, 0.6, 0.4]])
    both = learning_curve.looked_up(n, curves, np.array([0.4, 0.5]))
    assert both.tolist() == pytest.approx([20 * 2**0.5, 20]), "0.6 and 0.4 are 0.5 both: the first point that high"


@pytest.mark.parametrize(("shift", "truth"), [(CURVE[10], -5), (0.0, 0), (CURVE[30], 15), (1.05, 60 * 0.7 - 15)])
def test_the_worth_of_a_planted_arm_is_found(shift, truth):
    _, (row,) = (lambda found: (found[0], found[1].to_dict("records")))(study(shift))
    assert (row["class"], row["synthetic"], row["real"]) == ("Polyp", 100, 15)
    assert row["low"] - 1e-6 <= truth <= row["high"] + 1e-6 and abs(row["worth"] - truth) < 10
    assert row["text"].startswith("Polyp: 100 synthetic tiles of augmented were worth ") and "[" in row["text"]


def test_beyond_its_ends_the_curve_says_or_more_or_fewer():
    assert study(3.0)[1]["text"][0].endswith("did at least what 45 more real ones do, the end of the curve.")
    assert "were worth less than nothing: with the 15 real ones they did no better than 10 real ones alone" in study(-3.0)[1]["text"][0]


def test_a_curve_that_noise_makes_flat_says_that_nothing_can_be_said(monkeypatch):
    for n in CURVE:
        monkeypatch.setitem(CURVE, n, 0.0)
    (row,) = study(0.02, rows=tiles([20, 15, 9, 12], per_case=2))[1].to_dict("records")
    assert (round(row["low"]), round(row["high"])) == (-5, 45) and "what they are worth in real tiles cannot be said" in row["text"]


def test_too_few_cases_give_a_number_without_an_interval():
    (text,) = study(0.5, rows=tiles([20, 15, 5, 12]))[1]["text"]
    assert "no interval" in text and "[" not in text


def test_only_arms_that_differ_in_one_setting_stand_on_a_curve():
    points, found = study(0.5, SPECS | {"real30": {"real_tiles": 30, "augment": "stain"}})
    assert points[points["kind"].eq("real")]["tiles"].tolist() == [10, 15, 60]
    points, found = study(0.5, SPECS | {"real30": {"augment": "stain"}, "real10": {"mode": "knn"}})
    assert points.empty and found.empty, "two points are no curve"


def test_doses_of_the_judged_arm_stand_on_the_synthetic_curve():
    points, found = study(0.7, doses=(10, 30))
    made = points[points["kind"].eq("synthetic")]
    assert made[["arm", "tiles"]].values.tolist() == [["real", 0], ["augmented10", 10], ["augmented30", 30], ["augmented", 100]]
    assert found["arm"].tolist() == ["augmented"], "the judged arm is valued, not its largest dose or its best"


def test_replicates_with_other_numbers_of_tiles_give_their_range():
    m, parts, specs = study(0.3, bare=True)
    real = {"real10": 10, "real": 15, "real30": 30, "real60": 60, "augmented": 15}
    rows = [{"arm": arm, "label": c, "real": n if c == "Polyp" else 9, "synthetic": 0} for arm, n in real.items() for c in CLASSES]
    made = [row for row in rows if (row["arm"], row["label"]) == ("augmented", "Polyp")]
    rows = [row for row in rows if row not in made] + [made[0] | {"synthetic": n} for n in (24, 30, 47)]
    points = learning_curve.curves(m, parts, specs, rows)
    made = points[points["arm"].eq("augmented")].iloc[0]
    assert (made["tiles"], made["fewest"], made["most"]) == (34, 24, 47)
    assert points.loc[points["kind"].eq("real"), "fewest"].tolist() == [10, 15, 30, 60]
    assert learning_curve.worth(m, parts, points)["text"][0].startswith("Polyp: 24 to 47 synthetic tiles of augmented")


def test_the_judged_arm_stands_on_the_ceilings_of_any_generator():
    shifts = {"augmented": 0.3, "same": 1.5, "coded": 0.8, "other": 4.0, "more": 5.0}
    arms = {"real": {}} | {name: {"Polyp": shift, "Serrated": shift} for name, shift in shifts.items()}
    given = {"real_tiles": 40, "from": "same_cases"}
    specs = {"real": {}, "augmented": {"synthetic": "keep"}, "same": given, "coded": given | {"through": "vae"}}
    specs |= {"other": given | {"from": "new_cases"}, "more": given | {"sampler": "balanced"}}
    m = verdict.measure(predicted(ROWS, arms), dataset(), resamples=300)
    parts = question.cast(specs, list(arms), "real")
    found = learning_curve.ceilings(m, parts, specs)
    assert found["arm"].tolist() == ["same", "coded", "other"], "an arm that differs in more is no ceiling"
    assert found["difference"].iloc[1] < found["difference"].iloc[0] < found["difference"].iloc[2]
    twice = {"other": specs["same"] | {"real_tiles": 70}, "more": specs["coded"] | {"real_tiles": 70}}
    assert learning_curve.ceilings(m, parts, specs | twice)["arm"].tolist() == ["same", "coded", "other", "more"], "each beside its own"
    first, second = learning_curve.ruler(m, parts, found)
    assert first.startswith("A perfect generator that knows these cases could bring +")
    assert "; of which this base's autoencoder leaves +" in first and first.endswith("; all beside real, on the rare classes.")
    mine = float((m.value["augmented"] - m.value["real"])[m.endpoints.index(verdict.TAIL)])
    assert second.startswith("augmented with +") and mine < found["low"].iloc[0] and "stands below the lower bound" in second
    assert learning_curve.ruler(m, parts, found.head(0)) == [] and parts.rivals == []
