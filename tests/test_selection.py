"""Scores, cuts and decisions of 05, on planted tiles."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import squares
import stubs
import torch

from histokit import runs
from histokit.arms import comparison, trials
from histokit.core import files
from histokit.runs import selection_reasons
from histokit.select import guide_check, reviews, scoring, screening, selection
from histokit.show.panel import preview_scores
from histokit.tiles import augment, data
from histokit.vision import classifiers, encoders, features


def add_review(experiment, sha256, verdict, reviewer="", note=""):
    return reviews.add_reviews(experiment, [{"sha256": sha256, "verdict": verdict, "reviewer": reviewer, "note": note}])


def test_a_copy_of_a_training_image_finds_its_original():
    real = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    similarity, index = scoring.nearest_similarity(3 * real[[4, 11]], real)
    assert index.tolist() == [4, 11]
    torch.testing.assert_close(similarity, torch.ones(2))


def test_nearest_similarity_needs_a_real_image():
    with pytest.raises(ValueError, match="at least one real image"):
        scoring.nearest_similarity(torch.ones(1, 8), torch.empty(0, 8))


def test_of_several_views_the_nearest_counts():
    real = torch.eye(4)
    views = torch.stack([torch.stack([-real[2], real[2] + 0.1 * real[0], real[1]])])
    similarity, index = scoring.nearest_similarity(views, real)
    assert index.tolist() == [1] and similarity.item() == pytest.approx(1)
    assert len(scoring.nearest_similarity(views[:0], real)[0]) == 0


def test_real_tiles_are_compared_with_other_cases_only():
    real = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    cases = np.array(["a", "a", "b"])
    anywhere = scoring.real_similarity(real[:, None], real, range(3))
    across = scoring.real_similarity(real[:, None], real, range(3), cases, cases)
    assert anywhere[0] > 0.999 and across[0] == pytest.approx(0, abs=1e-6)
    alone = scoring.real_similarity(real[:2, None], real[:2], range(2), cases[:2], cases[:2])
    assert np.isnan(alone).all()


def test_of_two_alike_only_the_less_wanted_has_a_twin():
    views = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])[:, None]
    similarity, index = scoring.twins(views, order=[2, 1, 0])
    assert index.tolist() == [2, 2, -1]
    np.testing.assert_allclose(similarity, [1, 0, np.nan])


def test_tone_of_black_white_and_a_checkerboard():
    board = np.kron([[0, 1], [1, 0]], np.ones((2, 2)))[..., None].repeat(3, axis=2) * 255
    brightness, contrast = scoring.tone(np.stack([np.zeros_like(board), np.full_like(board, 255), board]))
    assert brightness.tolist() == [0, 255, 127.5]
    assert contrast.tolist() == [0, 0, 127.5]


def test_a_blurred_tile_is_less_sharp():
    tile = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 1), np.uint8).repeat(3, axis=3)
    smooth = ((tile.astype(int) + np.roll(tile, 1, 1) + np.roll(tile, 1, 2) + np.roll(tile, 1, (1, 2))) // 4).astype(np.uint8)
    sharp, blurred, flat = (float(scoring.focus(x)[0]) for x in (tile, smooth, np.full_like(tile, 9)))
    assert sharp > 1.5 * blurred > 0 == flat
    board = np.indices((8, 8)).sum(0)[None, ..., None].repeat(3, axis=3) % 2 * 10  # the Laplacian is 40 or -40 everywhere
    assert scoring.focus(board)[0] == pytest.approx(40, rel=0.02)


def test_deviation_counts_robust_standard_deviations_of_the_farther_stain():
    reference = np.random.default_rng(0).normal([1, 2], [0.1, 0.5], (4000, 2))
    found = scoring.deviation(np.array([[1, 2], [1.3, 2], [1, 0.5], [1.3, 0]]), reference)
    assert found == pytest.approx([0, 3, 3, 4], abs=0.2)


@pytest.mark.parametrize("metric", ["unit", "raw"])
def test_the_nearest_mean_is_found_and_the_margin_has_its_sign(metric):
    real, labels = np.array([[1.0, 0.1, 0.1], [1, -0.1, 0], [0, 1, 0], [0.1, 1, 0.2]]), ["a", "a", "b", "b"]
    place, distance, margin = scoring.to_centroids(np.array([[2.0, 0, 0], [0, 3, 0.1], [1, 1, 0]]), real, labels, "a", metric)
    assert place.tolist()[:2] == [1, 2] and margin[0] > 0 > margin[1] and distance[0] < distance[2] < distance[1]
    second = sorted(set(labels))  # the same, by scikit-learn's nearest centroid
    from sklearn.neighbors import NearestCentroid

    unit = real / np.linalg.norm(real, axis=1, keepdims=True)
    asked = np.array([[2.0, 0, 0], [0, 3, 0.1], [1, 0.8, 0]])
    theirs = NearestCentroid().fit(unit, labels).predict(asked / np.linalg.norm(asked, axis=1, keepdims=True))
    assert [second[0] == one for one in theirs] == (scoring.to_centroids(asked, real, labels, "a", "raw")[0] == 1).tolist()


def test_the_paper_s_distance_favours_a_class_that_spreads_and_ours_does_not():
    """The short mean of a diffuse class is nearer to anything, the 12th of the errors listed for HistoDiffusion."""
    rng = np.random.default_rng(0)
    tight, wide = rng.normal([1, 0, 0], 0.05, (200, 3)), rng.normal([0, 0.4, 0], 1.0, (200, 3))
    real, labels = np.concatenate([tight, wide]), ["tight"] * 200 + ["wide"] * 200
    between = np.array([[1.0, 2.2, 0]])
    places = {metric: scoring.to_centroids(between, real, labels, "wide", metric)[1:] for metric in ("raw", "unit")}
    far = np.array([[1.0, 0, 1.0]])  # nearly orthogonal to the wide class
    assert scoring.to_centroids(far, real, labels, "tight", "unit")[0] == 1
    assert places["unit"][1][0] != places["raw"][1][0]
    with pytest.raises(ValueError, match="metric is 'cosine'; expected unit or raw"):
        scoring.to_centroids(far, real, labels, "tight", "cosine")


def passed(n=6):
    """n tiles that passed with the judge's score 0.9, 0.8, ..., and the fourth by a person's word."""
    decisions = pd.DataFrame({"status": ["kept"] * n, "reason": [""] * n})
    decisions.loc[3, "reason"] = selection_reasons.write([{"code": "person", "verdict": "keep", "note": ""}])
    return decisions, pd.DataFrame({"judge": 0.9 - 0.1 * np.arange(n), "centroid": np.arange(n)[::-1] / 10})


@pytest.mark.parametrize(
    ("quota", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"keep": 2}, [0, 3]),  # the person's tile is one of the two
        ({"keep": 0}, [3]),
        ({"ratio": 0.5}, [0, 1, 3]),  # of six real tiles
        ({"top_p": 0.5}, [0, 1, 3]),  # of six made
        ({"balance": True}, [0, 1, 2, 3]),  # ten in the largest class
        ({"keep": 2, "by": "centroid"}, [3, 5]),
        ({"keep": 99}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_quota_keeps_the_best_and_what_a_person_wants(quota, kept):
    decisions, scores = passed()
    left = selection.limit(decisions, scores, quota, real_tiles=6, most_real=10)
    assert left.index[left["status"].eq("kept")].tolist() == kept
    why = [reason for text in left.loc[left["status"].eq("rejected"), "reason"] for reason in selection_reasons.read(text)]
    assert [reason["code"] for reason in why] == ["quota"] * (6 - len(kept)) and all(reason["most"] < reason["place"] for reason in why)
    assert selection.limit(left, scores, quota, 6, 10).equals(left), "again changes nothing"


@pytest.mark.parametrize(
    ("quota", "words"),
    [
        ({"keep": 2, "ratio": 1}, "expected one of keep, ratio, top_p, balance"),
        ({"most": 2}, "expected one of keep"),
        ({"keep": 2, "by": "beauty"}, "`by` one of judge, centroid"),
        ({"keep": "2"}, "quota keep is '2'; expected a number from 0 on"),
        ({"keep": True}, "expected a number"),
        ({"balance": 3}, "quota balance is 3; expected true"),
        ({"top_p": 1.5}, "a share from 0 to 1"),
    ],
)
def test_a_quota_that_means_nothing_is_refused(quota, words):
    with pytest.raises(ValueError, match=words):
        selection.limit(*passed(), quota, 6, 10)


def test_rank_of_the_asked_class():
    assert scoring.rank_of([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], 1).tolist() == [2, 2]
    assert scoring.rank_of([[0.2, 0.6, 0.2]], 1).tolist() == [1]


def real_scores(across, anywhere=None, known=0.0, contrast=20.0):
    anywhere = across if anywhere is None else anywhere
    return pd.DataFrame({"across_cases": across, "anywhere": anywhere, "known_copy": known, "contrast": contrast}, dtype=float)


NONE = real_scores([])


def test_a_calibrated_cut_lets_one_real_tile_in_a_hundred_fail():
    values = np.random.default_rng(0).random(1000)
    cuts = selection.calibrate({}, real_scores(values, values / 2, contrast=np.linspace(8, 90, 1000))).set_index("name")
    assert (values >= cuts["cut"]["copy"]).mean() == pytest.approx(0.01)
    assert cuts["cut"]["duplicate"] == pytest.approx(cuts["cut"]["copy"] / 2)
    assert cuts["cut"]["contrast"] == 4
    by_hand = selection.calibrate({"copy": 0.7, "contrast": 9.0}, real_scores(values)).set_index("name")
    assert by_hand["cut"]["copy"] == 0.7 and by_hand["cut"]["contrast"] == 9 and by_hand["source"]["copy"] == "set by hand"


def test_where_real_tiles_differ_widely_a_copy_must_be_as_near_as_copies_are():
    known = np.linspace(0.9, 1, 101)
    cuts = selection.calibrate({}, real_scores(np.full(101, 0.3), known=known)).set_index("name")
    assert cuts["cut"]["copy"] == pytest.approx(0.905) and "95% of 101 known copies" in cuts["source"]["copy"]


def judged(own, others=()):
    return pd.concat([NONE, pd.DataFrame({"judge": own}), pd.DataFrame({"judge_of_others": others})])


def test_the_judge_passes_three_in_four_of_the_class_and_tells_how_many_of_others():
    own = np.linspace(0.01, 0.20, 20)  # names none of them: an absolute cut would turn all down
    cuts = selection.calibrate({}, judged(own, np.linspace(0, 0.1, 101))).set_index("name")
    assert (own >= cuts["cut"]["judge_p"]).mean() == pytest.approx(0.75, abs=0.051) and cuts["cut"]["judge_rank"] == 0
    assert cuts["source"]["judge_p"] == "80% of 20 real validation tiles of the class pass, and 50% of 101 of other classes"
    for by_hand in ({"judge_rank": 2}, {"judge_p": 0.4}):  # one gate by the judge, not two
        cuts = selection.calibrate(by_hand, judged(own)).set_index("name")["cut"][["judge_rank", "judge_p"]]
        assert cuts.to_dict() == {"judge_rank": 0, "judge_p": 0} | by_hand


def test_where_most_tiles_are_no_longer_what_their_sources_are_the_judges_first_answer_is_asked():
    """The judge learned from the sources: by the cut of unseen cases 38 of 40 made polyps passed, of which one in four showed a polyp."""
    real = judged(np.linspace(0.01, 0.20, 20), np.linspace(0, 0.1, 101))
    own, other = GOOD | {"own_source": True}, {"judge": 0.3, "judge_rank": 2, "judge_class": "red"}
    lost, well = pd.DataFrame([own, own | other, own | other, GOOD | other]), pd.DataFrame([own, own, own | other, GOOD | other])
    cuts = selection.calibrate({}, real)
    found = selection.decide(lost, cuts, "blue")
    assert found["status"].tolist() == ["kept", "rejected", "rejected", "kept"], "a tile with another source is not asked"
    assert selection_reasons.said(found["reason"][1]) == "judge sees red: blue in place 2, cut 1"
    assert selection.decide(well, cuts, "blue")["status"].eq("kept").all(), "few that the judge doubts are what it has to learn"
    (said,) = selection.lost(lost.assign(label="blue"), cuts.assign(label="blue"))
    assert said.startswith(
        "BLUE IS BEING LOST: of 3 tiles made from its training tiles the judge, which learned these, takes 1 for blue and most"
    )
    assert list(selection.lost(well.assign(label="blue"), cuts.assign(label="blue"))) == list(selection.lost(pd.DataFrame(), cuts)) == []
    coin = judged(np.linspace(0, 1, 30), np.linspace(0, 1, 50))
    for given, scores in (({"judge_source": 0}, real), ({"judge_p": 0.2}, real), ({}, coin)):
        assert selection.decide(lost, selection.calibrate(given, scores), "blue")["status"].eq("kept").all(), f"{given}: nobody asks"
    for given, scores in (({"judge_source": 1}, real), ({"judge_rank": 3, "judge_source": 1}, real), ({"judge_source": 1}, coin)):
        decided = selection.decide(well, selection.calibrate(given, scores), "blue")
        assert decided["status"].tolist() == ["kept", "kept", "rejected", "kept"], f"{given}: asked of each"


def test_a_judge_that_orders_tiles_like_a_coin_cuts_nothing_and_says_so():
    rng = np.random.default_rng(0)
    guesses = [selection.power(judged(rng.random(9), rng.random(80))) for _ in range(400)]
    assert 0.9 <= np.mean([one.blind for one in guesses]) <= 0.99, "one coin in twenty passes for a judge"
    knows = [selection.power(judged(rng.normal(1.5, 1, 9), rng.normal(0, 1, 80))) for _ in range(200)]
    assert np.mean([one.blind for one in knows]) < 0.1
    coin = judged(np.linspace(0, 1, 30), np.linspace(0, 1, 50)).assign(asked="blue")
    cuts = selection.calibrate({}, coin).set_index("name")
    assert cuts["cut"][["judge_rank", "judge_p"]].tolist() == [0, 0] and "the judge cannot tell" in cuts["source"]["judge_p"]
    of = lambda real, **by_hand: list(selection.judged(real, selection.calibrate(by_hand, real).assign(label="blue")))  # noqa: E731
    (line,) = of(coin)
    assert (
        line.startswith("THE JUDGE CANNOT TELL blue: of 30 real validation tiles of the class and 50 of others")
        and "50% of the pairs" in line
    )
    assert of(coin, judge_p=0.4) == [], "who sets the cut by hand has decided"
    assert of(judged(np.linspace(0.5, 1, 30), np.linspace(0, 0.6, 50)).assign(asked="blue")) == []
    assert "2 real validation tiles, too few" in of(judged([0.1, 0.2], [0.3]).assign(asked="blue"))[0]
    assert list(selection.judged(pd.DataFrame(), pd.DataFrame())) == [] and not selection.power(NONE).blind


def test_a_copy_cut_that_finds_few_known_copies_says_so():
    values = np.random.default_rng(0).random(100)
    for known, said in ((values / 2, 1), (np.full(100, 0.999), 0)):
        real = real_scores(values, known=known).assign(asked="blue")
        lines = list(selection.missed(real, selection.calibrate({}, real).assign(label="blue")))
        assert len(lines) == said
        assert not lines or "blue: the copy cut finds 0% of 100 known copies" in lines[0]
    assert list(selection.missed(pd.DataFrame(), pd.DataFrame())) == []


def test_the_power_of_a_judge_is_the_area_under_its_curve():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    own, others = rng.normal(0.7, 1, 40).round(1), rng.normal(0, 1, 60).round(1)  # with ties
    found = selection.power(judged(own, others))
    assert found.auc == pytest.approx(roc_auc_score([1] * 40 + [0] * 60, np.r_[own, others]))
    drawn = [roc_auc_score([1] * 40 + [0] * 60, np.r_[rng.choice(own, 40), rng.choice(others, 60)]) for _ in range(800)]
    assert found.auc - found.low == pytest.approx(1.645 * np.std(drawn), rel=0.15)


def test_too_few_real_tiles_calibrate_nothing():
    few = selection.calibrate({}, real_scores([0.5] * 5)).set_index("name")
    assert few["cut"]["copy"] == few["cut"]["duplicate"] == 0.999
    assert few["cut"]["judge_rank"] == 1 and "only 0 real validation tiles" in few["source"]["judge_rank"]
    with pytest.raises(ValueError, match="thresholds has no 'judge'; expected any of judge_rank"):
        selection.calibrate({"judge": 1}, NONE)


GOOD = {
    "sha256": "a" * 64, "judge": 0.9, "judge_class": "blue", "judge_rank": 1, "own_source": False, "contrast": 20.0, "stain": 1.0,
    "focus": 9.0, "centroid_rank": 1, "realism": 0.8,
    "similarity_feature": 0.5, "nearest_feature": "r1", "twin_feature": float("nan"), "twin_of_feature": "",
    "similarity_picture": 0.1, "nearest_picture": "r2", "twin_picture": 0.2, "twin_of_picture": "s1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({}, "kept", ""),
        ({"contrast": 1.0}, "rejected", "blank or black: contrast 1.0 below 4.0"),
        ({"stain": 3.5}, "rejected", "stain: 3.5 deviations from real tiles, cut 3.0"),
        ({"focus": 1.0}, "rejected", "blurred: sharpness 1.0, cut 2.0"),
        ({"centroid_rank": 2}, "rejected", "centroid: blue in place 2, cut 1"),
        ({"realism": 0.4}, "rejected", "realism: 0.40, cut 0.50"),
        ({"cluster_asked": 2, "cluster": 0}, "rejected", "cluster: falls into 0, asked for 2"),
        ({"cluster_asked": 2, "cluster": 2}, "kept", ""),
        ({"cluster_asked": -1, "cluster": 2}, "kept", ""),  # its prompt named none
        ({"judge": 0.1, "judge_class": "red"}, "rejected", "judge sees red: blue only 0.1, cut 0.2"),
        ({"judge": 0.1}, "rejected", "judge unsure: blue only 0.1, cut 0.2"),
        ({"similarity_feature": 0.99}, "quarantined", "copy of r1: feature 0.990, cut 0.950"),
        (
            {"similarity_picture": 0.97, "contrast": 1.0},
            "quarantined",
            "blank or black: contrast 1.0 below 4.0; copy of r2: picture 0.970, cut 0.900",
        ),
        ({"twin_picture": 0.97}, "rejected", "repeats s1: picture 0.970, cut 0.900"),
    ],
)
def test_every_reject_keeps_its_reason(change, status, reason):
    given = {
        "copy": 0.95,
        "duplicate": 0.97,
        "judge_p": 0.2,
        "contrast": 4.0,
        "stain": 3.0,
        "focus": 2.0,
        "centroid_rank": 1,
        "realism": 0.5,
        "cluster": 1,
    }
    found = selection.decide(pd.DataFrame([GOOD | change]), selection.calibrate(given, NONE), "blue").iloc[0]
    assert (found["status"], selection_reasons.said(found["reason"])) == (status, reason)


def test_stain_and_focus_are_held_against_real_tiles_and_nothing_where_these_are_few():
    rng = np.random.default_rng(0)
    real = real_scores(rng.uniform(0, 0.5, 400)).assign(stain=np.abs(rng.normal(size=400)), focus=rng.normal(20, 2, 400))
    cuts = selection.calibrate({}, real).set_index("name")
    assert cuts["cut"]["stain"] == pytest.approx(real["stain"].quantile(0.99)) and 6.5 < cuts["cut"]["focus"] < 8.5
    few = selection.calibrate({}, real.head(9)).set_index("name")
    assert few["cut"]["stain"] == np.inf and few["cut"]["focus"] == 0 and "only 9 real tiles" in few["source"]["stain"]
    assert cuts["cut"]["realism"] == cuts["cut"]["centroid_rank"] == 0 and cuts["source"]["realism"] == "shown, not asked for"
    unknown = selection.decide(pd.DataFrame([GOOD | {"realism": np.nan, "centroid_rank": 3}]), selection.calibrate({}, NONE), "blue")
    assert unknown["status"].tolist() == ["kept"], "what nobody asked for, and what is not known, cuts nothing"


def test_a_place_set_by_hand_rejects_what_lies_behind():
    cuts = selection.calibrate({"judge_rank": 1}, NONE)
    found = selection.decide(pd.DataFrame([GOOD, GOOD | {"judge_rank": 2, "judge_class": "red"}]), cuts, "blue")
    assert [selection_reasons.read(text) for text in found["reason"]] == [
        [],
        [{"code": "judge", "asked": "blue", "seen": "red", "place": 2, "cut": 1}],
    ]


def test_a_person_wins_over_every_score_and_the_scores_stay_readable():
    cuts = selection.calibrate({"copy": 0.95, "duplicate": 0.97}, NONE)
    rows = pd.DataFrame([GOOD | {"similarity_feature": 0.99}, GOOD | {"sha256": "b" * 64}])
    found = selection.decide(rows, cuts, "blue", {"a" * 64: ("keep", "checked with the slide"), "b" * 64: ("reject", "")})
    assert found["status"].tolist() == ["kept", "rejected"]
    assert selection_reasons.said(found["reason"][0]) == "person: keep, checked with the slide; copy of r1: feature 0.990, cut 0.950"
    assert selection_reasons.read(found["reason"][1]) == [{"code": "person", "verdict": "reject", "note": ""}]


def test_scores_join_what_the_generator_wrote_as_strict_json():
    manifest = pd.DataFrame({"tile_id": ["s"], "scores": ['{"confidence": 0.4}']})
    decided = pd.DataFrame({"status": ["kept"], "reason": [""]})
    held = json.loads(selection.merged(manifest, pd.DataFrame([GOOD]), decided)["scores"][0], parse_constant=pytest.fail)
    assert held["confidence"] == 0.4 and held["judge"] == 0.9 and held["twin_feature"] is None


def test_the_acceptance_table_counts_a_tile_once_under_each_kind_of_reason():
    judged = {"code": "judge", "asked": "blue", "seen": "red", "probability": 0.1, "cut": 0.2}
    near = {"space": "feature", "similarity": 1.0, "cut": 0.9}
    alike = [{"code": code, "of": tile, **near} for code, tile in (("copy", "r"), ("copy", "s"), ("repeat", "t"))]
    texts = ["", *map(selection_reasons.write, ([judged], alike))]
    decided = pd.DataFrame({"status": ["kept", "rejected", "quarantined"], "reason": texts})
    table = selection.acceptance(decided).set_index(["status", "why"])["tiles"].to_dict()
    assert table == {("kept", ""): 1, ("rejected", "judge"): 1, ("quarantined", "copy"): 1, ("quarantined", "repeat"): 1}
    assert selection.acceptance(decided.iloc[:0])["tiles"].tolist() == [0]


# --- the whole of 05, on planted tiles -------------------------------------------------------------------------------


class Fields(torch.nn.Module):
    """Mean colour of an 8 x 8 grid, as 192 features: enough to tell a picture from another, quick enough for a test."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)


@pytest.fixture
def study(root, monkeypatch):
    """Real patterned tiles with a trained judge, and a way to screen planted synthetic ones."""
    monkeypatch.setattr(squares, "tile", patterned)
    monkeypatch.setitem(encoders.FIXED, "colour-texture", fields)
    squares.dataset({split: dict.fromkeys(squares.CLASSES, 8) for split in ("train", "val", "test")})
    run = runs.start(experiment="exp", step="judge")
    tiles = data.load(run)
    arms = comparison.settle({"judge": {"sampler": "balanced", "augment": "none"}}, encoder="colour-texture")
    trials.train(run, arms, comparison.assemble(run, tiles, arms), tiles, seeds=2, steps=60, batch_size=12)
    run.finish({})
    return root


def fields():
    net = Fields()
    net.dim = 192
    return net


def patterned(name, seed):
    """A class colour under a random pattern of 8 x 8 fields, which makes every tile a picture of its own."""
    rng = np.random.default_rng(seed)
    pattern = np.kron(rng.normal(0, 35, (8, 8, 1)), np.ones((8, 8, 1)))
    return (np.array(squares.COLOURS[name]) + pattern + rng.normal(0, 3, (64, 64, 3))).clip(0, 255).astype(np.uint8)


def screen(made_of, thresholds=None, step="keep"):
    squares.synthetic({"blue": len(made_of)}, step="made", pixels={"blue": made_of})
    run = runs.start(experiment="exp", step=step, class_name="blue")
    tiles, made = data.load(run), data.load(run, step="made", class_name="blue")
    panel = screening.judges(run, "judge")
    return run, screening.screen(run, made, tiles, panel, "colour-texture", thresholds or {})


def test_planted_faults_are_found_and_named(study):
    train = [squares.tile("blue", 200 + i) for i in range(8)]  # as squares.dataset draws them
    fresh = [squares.tile("blue", 5000 + i) for i in range(6)]
    flipped = augment.symmetry(torch.from_numpy(train[3]).permute(2, 0, 1), 6).permute(1, 2, 0).numpy()
    noisy_twin = (fresh[0] + np.random.default_rng(0).normal(0, 3, fresh[0].shape)).clip(0, 255).astype(np.uint8)
    planted = [train[1], flipped, noisy_twin, np.zeros_like(train[0]), squares.tile("red", 4001)]
    run, (manifest, scores, cuts, real) = screen(fresh + planted, {"judge_rank": 1})
    status, reason = manifest["status"].tolist(), manifest["reason"].map(selection_reasons.said).tolist()
    assert status[1:6] == ["kept"] * 5
    assert status[6] == "quarantined" and "copy of train/blue/1.png" in reason[6]
    assert status[7] == "quarantined" and "copy of train/blue/3.png" in reason[7]
    pair = {status[0], status[8]}  # of two alike one is kept, the one the judge likes better
    assert pair == {"kept", "rejected"} and "repeats" in reason[0] + reason[8]
    assert status[9] == "rejected" and reason[9].startswith("blank or black")
    assert status[10] == "rejected" and "judge sees red" in reason[10]
    assert real["across_cases"].notna().sum() == 24 and set(cuts["label"]) == {"blue"} and len(scores) == 11
    assert data.without_memory(manifest).columns.tolist() == [c for c in manifest if c not in data.MEMORY]

    run.finish(data.without_memory(manifest))
    arm = comparison.settle({"augmented": {"synthetic": "keep"}}, encoder="colour-texture")
    later = runs.start(experiment="exp", step="06_classifier")
    sets = comparison.assemble(later, data.load(later), arm)
    assert sets["augmented"]["source"].eq("synthetic").sum() == 6
    assert data.pixels(sets["augmented"].tail(1)).shape == (1, 64, 64, 3)


def test_made_tiles_take_the_place_of_the_real_ones_of_their_class(study):
    run, (manifest, *_) = screen([squares.tile("blue", 4000 + i) for i in range(3)])
    run.finish(data.without_memory(manifest.assign(status="kept")))
    later = runs.start(experiment="exp", step="06_classifier")
    tiles = data.load(later)
    arms = {"both": {"synthetic": "keep"}, "alone": {"synthetic": "keep", "replace": True}}
    sets = comparison.assemble(later, tiles, comparison.settle(arms, encoder="colour-texture"))
    counts = comparison.counts(sets, squares.CLASSES).set_index(["arm", "label"])
    assert counts.loc[("alone", "blue"), ["real", "synthetic"]].tolist() == [0, 3]
    for name in ("red", "green"):
        assert counts.loc[("alone", name), "real"] == counts.loc[("both", name), "real"] > 0
    with pytest.raises(ValueError, match="replace does nothing in an arm without synthetic tiles"):
        comparison.settle({"real": {"replace": True}})
    with pytest.raises(ValueError, match="replace is 1; expected true or false"):
        comparison.settle({"alone": {"synthetic": "keep", "replace": 1}})


def test_everything_rejected_leaves_columns_and_arms_that_say_so(study):
    run, (manifest, *_) = screen([squares.tile("red", 4000 + i) for i in range(3)])
    assert manifest["status"].eq("rejected").all() and manifest["reason"].ne("").all()
    run.finish(data.without_memory(manifest))
    later = runs.start(experiment="exp", step="06_classifier")
    tiles, arms = data.load(later), comparison.settle({"augmented": {"synthetic": "keep"}}, encoder="colour-texture")
    sets = comparison.assemble(later, tiles, arms)
    assert len(sets["augmented"]) == 24
    assert comparison.remarks(arms, sets, tiles) == ["Arm augmented: keep has no kept tile, so it was trained on real tiles alone."]


def test_no_tile_at_all_gives_an_empty_manifest_with_its_columns(study):
    run, (manifest, scores, cuts, real) = screen([])
    assert len(manifest) == len(scores) == len(cuts) == len(real) == 0
    assert {"tile_id", "file_name", "label", "status"} <= set(manifest)
    assert selection.acceptance(manifest)["tiles"].tolist() == [0]
    run.finish(data.without_memory(manifest))
    assert len(data.load(runs.start(experiment="exp", step="06_classifier"), step="keep")) == 0


def test_a_verdict_in_the_review_file_wins_and_makes_the_run_stale(study):
    made = [squares.tile("red", 4001), squares.tile("blue", 5001)]
    run, (manifest, *_) = screen(made, {"judge_rank": 1})
    assert manifest["status"].tolist() == ["rejected", "kept"]
    add_review("exp", manifest["sha256"][0], "reject", "A. B.", "first thought")
    add_review("exp", manifest["sha256"][0], "keep", "A. B.", "a rare stain, see slide 4")
    table = files.read_table(study / "params" / "reviews" / "exp.csv")
    assert table["verdict"].tolist() == ["reject", "keep"]  # nothing is overwritten
    run.finish(data.without_memory(manifest))
    run, (manifest, *_) = screen(made, {"judge_rank": 1})
    assert (
        manifest["status"].tolist() == ["kept", "kept"]
        and selection_reasons.read(manifest["reason"][0])[0]["note"] == "a rare stain, see slide 4"
    )
    with pytest.raises(ValueError, match="expected keep or reject"):
        add_review("exp", manifest["sha256"][0], "maybe")
    bad = study / "params" / "reviews" / "exp.csv"
    bad.write_text(bad.read_text().replace("keep", "kept"))
    with pytest.raises(ValueError, match=r"exp\.csv, line 3: verdict 'kept'"):
        reviews.of_run(run)


def test_a_verdict_can_be_taken_back_and_what_stands_is_not_said_again(study):
    made = [squares.tile("red", 4001), squares.tile("blue", 5001)]
    run, (manifest, *_) = screen(made, {"judge_rank": 1})
    run.finish(data.without_memory(manifest))
    red, blue = manifest["sha256"]
    line = {"verdict": "keep", "reviewer": "A. B.", "note": ""}
    taken = line | {"verdict": "withdrawn"}
    reviews.add_reviews("exp", [{"sha256": red, **line}, {"sha256": red, **line}, {"sha256": red, **taken}, {"sha256": blue, **taken}])
    table = files.read_table(study / "params" / "reviews" / "exp.csv")
    assert table["verdict"].tolist() == ["keep", "withdrawn"] and set(table["sha256"]) == {red}
    assert reviews.standing("exp") == {}
    _, (again, *_) = screen(made, {"judge_rank": 1})
    assert again["status"].tolist() == manifest["status"].tolist() == ["rejected", "kept"], "the scores decide as before"
    add_review("exp", red, "keep", "C. D.", "as before")
    assert reviews.standing("exp") == {red: {"verdict": "keep", "reviewer": "C. D.", "note": "as before"}}


def test_verdicts_written_by_two_at_a_time_are_all_there(study):
    (study / "params" / "reviews").mkdir(parents=True, exist_ok=True)
    shas = [f"{i:064x}" for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda sha: add_review("exp", sha, "keep"), shas))
    assert sorted(reviews.standing("exp")) == shas


def test_a_judge_that_saw_synthetic_tiles_is_refused(study):
    squares.synthetic({"blue": 2})
    run = runs.start(experiment="exp", step="biased")
    tiles = data.load(run)
    arms = comparison.settle({"real": {}, "augmented": {"synthetic": "made"}}, encoder="colour-texture")
    trials.train(run, arms, comparison.assemble(run, tiles, arms), tiles, seeds=1, steps=5, batch_size=6)
    run.finish({})
    run = runs.start(experiment="exp", step="keep", class_name="blue")
    with pytest.raises(ValueError, match="'augmented' of biased was trained on synthetic tiles"):
        screening.judges(run, "biased", "augmented")
    with pytest.raises(ValueError, match="judge arm '' is not in biased, which has augmented, real"):
        screening.judges(run, "biased")
    assert len(screening.judges(run, "judge")) == 2
    panel = screening.judges(run, "biased", "real")
    assert screening.remarks(panel, "colour-texture") == [
        "The judge and the distances use the same encoder, colour-texture: it judges its own choice."
    ]
    assert isinstance(panel[0], classifiers.Classifier) and features.load("picture").licence


RECIPE = """\
steps:
  - 00_dataset
  - judge: {run: 06_classifier}
  - 03_img2img
  - made: {run: 03_img2img}
  - other: {run: 05_select, source: 03_img2img, encoder: mini-ssl}
  - keep: {run: 05_select, source: made, judge: judge, encoder: colour-texture, thresholds: {judge_rank: 1}}
"""


def panel_of(root, recipe="params/study.yaml", guide=None):
    """PreviewScores of a notebook of the step `made`, opened with a recipe."""
    lines = ["class_name: str = 'blue'  # class", "source: str = '03_img2img'  # step", "judge: str = ''  # step"]
    lines += ["judge_arm: str = ''  # arm", "encoder: str = 'mini-ssl'  # of distances", "thresholds: dict = {}  # cuts"]
    stubs.notebook(root, "05_select", lines)
    stubs.notebook(root, "03_img2img", lines[:1])
    stubs.notebook(root, "06_classifier", [])
    stubs.notebook(root, "00_dataset", ["dataset: str = 'x'  # description"])
    stubs.recipe(root, RECIPE)
    run = runs.start(experiment="exp", step="made", class_name="blue", recipe=recipe)
    return preview_scores.PreviewScores(run, data.load(run), guide)


def test_what_a_panel_reads_of_a_picture_is_what_05_says_of_the_tile(study):
    train = squares.tile("blue", 201)
    pictures = np.stack([squares.tile("blue", 5000), squares.tile("red", 4001), train])
    _, (_, scores, cuts, _) = screen(list(pictures), {"judge_rank": 1})
    read = panel_of(study)
    jobs = pd.DataFrame({"class": ["blue"] * 3, "tile_id": ["", "train/blue/1.png", "train/blue/1.png"]})
    found = read.table(pictures, jobs)
    assert found["status"].tolist() == scores["status"].tolist() == ["kept", "rejected", "quarantined"]
    np.testing.assert_array_equal(found["judge"], scores["judge"])
    np.testing.assert_array_equal(found["nearest"], scores["similarity_feature"])
    np.testing.assert_array_equal(found["stain"], scores["stain"])
    assert (found["copy"] == cuts.set_index("name")["cut"]["copy"]).all()
    assert np.isnan(found["source"][0]) and found["source"][1] < 0.9 and found["source"][2] == pytest.approx(1, abs=1e-5)
    said = read(pictures, jobs)
    assert [one.good for one in said] == [True, False, False] and said[0].said == "would be kept by keep"
    assert "judge sees red" in said[1].said and "copy of train/blue/1.png" in said[2].said
    assert [name for name, *_ in said[2].rows] == ["judge", "like the nearest training tile", "like its source", "stain, in deviations"]
    assert [name for name, *_ in said[0].rows] == ["judge", "like the nearest training tile", "stain, in deviations"]


def test_without_a_judge_a_panel_says_so_and_reads_the_rest(study):
    steered = SimpleNamespace(identity=classifiers.identity(panel_of(study).judge[0][0]))
    assert panel_of(study, guide=steered).remark == "judge steers these pictures, so it cannot judge them."
    alone = panel_of(study, recipe="")
    assert alone.judge[0] == [] and alone.remark.startswith("No 05_select")
    (study / "outputs" / "exp" / "judge" / "run.json").unlink()
    read = panel_of(study)
    assert read.remark == "The judge, judge, is not trained yet."
    (said,) = read(squares.tile("blue", 5000)[None], pd.DataFrame({"class": ["blue"], "tile_id": [""]}))
    assert (
        said.good
        and said.said.endswith("without a judge")
        and [name for name, *_ in said.rows] == ["like the nearest training tile", "stain, in deviations"]
    )


def test_a_panel_records_nothing(study):
    read = panel_of(study)
    read(squares.tile("blue", 5000)[None], pd.DataFrame({"class": ["blue"], "tile_id": [""]}))
    assert {parent["step"] for parent in read.run.record["parents"]} == {"00_dataset"}


def test_a_copy_of_a_tile_without_a_label_is_a_copy_too(study):
    """A prior learns from tiles that nobody labelled, so these can be copied as well."""
    path = next((study / "outputs" / "exp" / "00_dataset").glob("manifest.csv"))
    table = files.read_table(path)
    loose = table["file_name"].eq("train/blue/5.png")
    table.loc[loose, "use"], table.loc[loose, "label"] = "unlabelled", "tissue"
    path.unlink()
    files.write_table(path, table)
    copy = patterned("blue", 205)  # as `squares.dataset` drew it
    _, (manifest, scores, _, _) = screen([copy, patterned("blue", 9001), patterned("blue", 9002)])
    assert scores["nearest_picture"].iloc[0] == "train/blue/5.png" and scores["similarity_picture"].iloc[0] > 0.999
    assert manifest["status"].iloc[0] == "quarantined"


def test_the_classifier_that_watched_a_decoder_cannot_judge_what_it_drew(root):
    def finished(step, parents=(), **parameters):
        run = runs.start(experiment="exp", step=step, **parameters)
        for parent in parents:
            run.parent(parent)
        run.finish({})

    finished("aux")
    finished("adapted", ["aux"], part="decoder", classifier="aux")
    finished("made", ["adapted"])
    run = runs.start(experiment="exp", step="keep")
    guide_check.refuse_watcher(run, "made", "judge")
    with pytest.raises(ValueError, match="aux watched while adapted trained the decoder of these tiles"):
        guide_check.refuse_watcher(run, "made", "aux")


def test_variance_is_that_of_numpy_over_features_of_length_one():
    feats = np.random.default_rng(0).normal(size=(30, 5))
    unit = feats / np.linalg.norm(feats, axis=1, keepdims=True)
    assert scoring.variance(3 * feats) == pytest.approx(unit.var(axis=0, ddof=1).sum())
    assert scoring.variance(np.ones((4, 3))) == pytest.approx(0) and np.isnan(scoring.variance(feats[:1]))


def test_a_set_that_repeats_its_centre_is_said_to_be_less_varied_than_real_tiles(study):
    alike = [patterned("blue", 9001) for _ in range(4)]
    varied = [patterned("blue", 9100 + i) for i in range(4)]
    shares = {}
    for step, made in (("same", alike), ("other", varied)):
        run, (manifest, *_) = screen(made, step=step)
        table = screening.variances(run, manifest.assign(status="kept"), data.load(run), "colour-texture")
        assert table["class"].tolist() == ["blue"] and table["tiles"].tolist() == [4] and table["real"].tolist() == [8]
        shares[step] = float(table["kept"].iloc[0])
        run.finish({})
    assert shares["same"] == pytest.approx(0, abs=1e-9) and 0.3 < shares["other"] < 3
