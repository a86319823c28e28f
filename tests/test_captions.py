"""Captions, their balance and their budgets: every word once, every tile where it belongs, every share met exactly."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_clusters import blobs
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.generate import policies
from histokit.morphology import balance, captions, cluster_names, clusters, prompt_table

TERMS = {"a": "adenoma", "b": "mucinous carcinoma"}
TEMPLATE = "a histology image of {label}, type {cluster}"


def fitted(scope="global", k=3):
    feats, _ = blobs()
    labels = ["ab"[i % 2] for i in range(len(feats))]
    return clusters.fit(feats, labels, k, scope=scope, pca=4, least=3), feats, labels


# --- words -----------------------------------------------------------------------------------------------------------


def test_numbers_are_spelled_as_in_english():
    known = {
        0: "zero",
        9: "nine",
        13: "thirteen",
        20: "twenty",
        32: "thirty-two",
        99: "ninety-nine",
        100: "one hundred",
        321: "three hundred twenty-one",
    }
    assert {n: captions.number_words(n) for n in known} == known
    assert len({captions.number_words(n) for n in range(1000)}) == 1000
    with pytest.raises(ValueError, match="digits"):
        captions.number_words(1000)


def test_letters_count_as_columns_of_a_sheet():
    assert [captions.letters(n) for n in (0, 25, 26, 27, 51, 52, 701, 702)] == ["a", "z", "aa", "ab", "az", "ba", "zz", "aaa"]
    assert len({captions.letters(n) for n in range(2000)}) == 2000


@pytest.mark.parametrize("style", captions.STYLES)
@pytest.mark.parametrize("scope", clusters.SCOPES)
def test_every_cluster_of_a_class_has_words_of_its_own(style, scope):
    held, _, _ = fitted(scope)
    called = captions.words(held, style)
    for key in held.centroids:
        own = [called[key, k] for k in range(len(held.centroids[key]))]
        assert len(set(own)) == len(own) and all(own)


def test_families_are_named_with_what_is_in_them():
    held, _, _ = fitted("hierarchical", 4)
    called = captions.words(held, "letters")
    assert called[clusters.ALL, 0] == "family a, subtype a"
    assert len(set(called.values())) == 4


def test_a_person_s_words_win_and_the_others_keep_their_number():
    held, _, _ = fitted()
    called = captions.words(held, "descriptors", {(clusters.ALL, 1): "thick walls"})
    assert [called[clusters.ALL, k] for k in range(3)] == ["zero", "thick walls", "two"]


def test_learned_words_start_from_their_number_and_those_of_classes_from_their_words():
    held, _, _ = fitted("per_label", 2)
    called = captions.words(held, "learned")
    found = captions.new_words(held, called, TERMS)
    assert set(found) == set(called.values()) and all(word["vectors"] == 1 for word in found.values())
    assert sorted(word["start"] for word in found.values()) == ["one", "one", "zero", "zero"]
    assert captions.new_words(held, captions.words(held, "digits"), TERMS) == {}
    classes = captions.new_words(held, {}, TERMS, label_vectors=4)
    assert sorted((word["start"], word["vectors"]) for word in classes.values()) == [("adenoma", 4), ("mucinous carcinoma", 4)]
    said = captions.class_words(TERMS, 4)
    assert all(said[name].startswith(f"{TERMS[name]} <hk-class-") and said[name].split()[-1] in classes for name in TERMS)
    assert captions.class_words(TERMS) == TERMS


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_for_each_pair_there_is_in_alphabetical_order():
    labels, cluster = ["a", "b", "a", "a", "b"], [0, 1, 0, 2, 1]
    table, ids = captions.prompts(labels, cluster, lambda label, k: captions.number_words(k), TERMS, TEMPLATE)
    assert table["text"].tolist() == [
        "a histology image of adenoma, type two",
        "a histology image of adenoma, type zero",
        "a histology image of mucinous carcinoma, type one",
    ]
    assert ids.tolist() == [1, 2, 1, 0, 2] and table["tiles"].tolist() == [1, 2, 2]
    alone, ids = captions.prompts(labels, cluster, None, TERMS, "an image of {label}")
    assert alone["cluster"].tolist() == [captions.NONE] * 2 and ids.tolist() == [0, 1, 0, 0, 1]


def test_prompts_that_read_the_same_are_refused():
    with pytest.raises(ValueError, match="all read 'a histology image of tumour, type zero'"):
        captions.prompts(["a", "b"], [0, 0], lambda *_: "zero", {"a": "tumour", "b": "tumour"}, TEMPLATE)
    with pytest.raises(ValueError, match="has no {label}"):
        captions.prompts(["a"], [0], lambda *_: "zero", TERMS, "type {cluster}")


def test_captions_that_the_text_encoder_cannot_tell_apart_are_refused():
    model = tiny_model()
    captions.refuse_alike(model, ["a gland, type one", "a gland, type two", "a gland, type <hk-form-0>", "a gland, type <hk-form-1>"])
    with pytest.raises(ValueError, match="as the same tokens"):
        captions.refuse_alike(model, ["a gland, type one", "A  gland, type ONE"])  # CLIP folds case and spaces
    with pytest.raises(ValueError, match="the text encoder reads 77"):
        captions.refuse_alike(model, ["gland " * 90])


def test_captions_that_lie_too_near_each_other_are_told(monkeypatch):
    """By a second definition, on embeddings that can be checked by eye."""
    places = {"x zero": [0, 0], "x one": [0, 0.1], "y zero": [3, 0], "y one": [3, 4], "": [0, 2]}
    monkeypatch.setattr(captions.backbone, "embed", lambda model, texts: torch.tensor([places[text] for text in texts]).float())
    table = pd.DataFrame({"label": list("xxyy"), "text": list(places)[:4]})
    found = captions.apart(None, table).set_index("class")["nearest"]
    usual = np.median([3, 5, np.hypot(3, 0.1), np.hypot(3, 3.9)])
    assert found.to_dict() == pytest.approx({"x": 0.1 / usual, "y": 4 / usual})
    (said,) = captions.near(captions.apart(None, table), "digits")
    assert "in 1 of 2 classes" in said and "x zero | x one" in said
    assert not list(captions.near(captions.apart(None, table), "learned"))
    alone = captions.apart(None, table.head(2))  # of one class: beside how far they lie from the empty caption
    assert alone["nearest"].tolist() == pytest.approx([0.1 / 1.95]) and list(captions.near(alone, "digits"))


def test_a_cluster_with_few_tiles_of_a_class_counts_for_the_nearest_that_has_more():
    held, feats, _ = fitted()
    labels = ["a"] * 40 + ["b"] * 20 + ["a"] * 5 + ["b"] * 12  # blobs of 40, 25 and 12
    cluster = held.assign(feats, labels).cluster
    found = captions.gathered(held, cluster, feats, labels, 10)
    assert found[:60].tolist() == cluster[:60].tolist() and found[65:].tolist() == cluster[65:].tolist()
    assert set(found[60:65]) == {0}  # the only one in which class a has ten
    (said,) = captions.moved(cluster, found, labels, 10)
    assert said.startswith("5 of 77 tiles") and "(1 such pairs)" in said and not list(captions.moved(found, found, labels, 10))
    few = captions.gathered(held, cluster, feats, labels, 100)
    assert set(few[np.array(labels) == "a"]) == {0} and set(few[np.array(labels) == "b"]) == {1}


def test_forms_are_dealt_anew_within_each_class_and_as_often():
    labels, cluster = ["a"] * 30 + ["b"] * 12, np.array([0] * 20 + [1] * 10 + [2] * 6 + [3] * 6)
    found = captions.shuffled(cluster, labels, seed=3)
    assert sorted(found[:30]) == sorted(cluster[:30]) and sorted(found[30:]) == sorted(cluster[30:])
    assert (found != cluster).any() and np.array_equal(found, captions.shuffled(cluster, labels, seed=3))


# --- balance ---------------------------------------------------------------------------------------------------------

PROMPTS = pd.DataFrame({"prompt_id": range(5), "label": list("aaabb"), "cluster": [0, 1, 2, 0, 1], "tiles": [60, 20, 3, 30, 10]})
CAPTIONS = pd.DataFrame({"prompt_id": np.repeat(range(5), PROMPTS["tiles"]), "cluster": np.repeat(PROMPTS["cluster"], PROMPTS["tiles"])})
CAPTIONS = CAPTIONS.reset_index(drop=True).assign(tile_id=lambda t: [f"t{i}" for i in range(len(t))])


FORMS = balance.forms(CAPTIONS, PROMPTS)[1]


def drawn(weight):
    """Share of the draws that each prompt gets."""
    return pd.Series(weight).groupby(CAPTIONS["prompt_id"]).sum().to_numpy() / weight.sum()


def test_what_equal_parts_could_keep():
    table = balance.feasible(FORMS, least=1)
    assert table[["n", "tiles_per_prompt", "total", "dropped"]].to_numpy().tolist() == [[1, 30, 60, 3], [2, 10, 40, 1]]
    assert balance.feasible(FORMS)["allowed"].tolist() == [False, True]  # all of the class with fewest


def test_equal_parts_keep_the_largest_prompts_and_as_many_tiles_of_each():
    kept = lambda weight: pd.Series(weight).groupby(CAPTIONS["prompt_id"]).sum().astype(int).tolist()  # noqa: E731
    assert kept(balance.weights(CAPTIONS, PROMPTS, "equal_per_prompt")) == [10, 10, 0, 10, 10]
    assert kept(balance.weights(CAPTIONS, PROMPTS, "equal_per_prompt", least=1)) == [30, 0, 0, 30, 0]
    assert kept(balance.weights(CAPTIONS, PROMPTS, "equal_per_prompt", total=20)) == [5, 5, 0, 5, 5]
    with pytest.raises(ValueError, match="the most is 40"):
        balance.weights(CAPTIONS, PROMPTS, "equal_per_prompt", total=1000)


def test_a_cap_and_a_root_keep_the_small_prompts():
    assert drawn(balance.weights(CAPTIONS, PROMPTS, "none")) == pytest.approx(PROMPTS["tiles"] / 123)
    root = np.sqrt(PROMPTS["tiles"])
    assert drawn(balance.weights(CAPTIONS, PROMPTS, "sqrt")) == pytest.approx(root / root.sum())
    assert drawn(balance.weights(CAPTIONS, PROMPTS, "sqrt", alpha=0)) == pytest.approx(np.full(5, 0.2))
    capped = pd.Series(balance.weights(CAPTIONS, PROMPTS, "cap")).groupby(CAPTIONS["prompt_id"]).sum()
    assert capped.tolist() == [20, 20, 3, 20, 10]  # the median prompt has 20
    small, large = (balance.weights(CAPTIONS, PROMPTS, "cap", cap=cap) for cap in (5, 12))
    assert (large >= small).all()  # the same tiles, and more
    with pytest.raises(ValueError, match="balance is 'even'"):
        balance.weights(CAPTIONS, PROMPTS, "even")


@pytest.mark.parametrize("mode", balance.MODES)
def test_captions_of_the_class_alone_are_drawn_as_those_of_its_forms(mode):
    alone = PROMPTS.drop_duplicates("label").assign(cluster=captions.NONE)
    plain = CAPTIONS.assign(prompt_id=CAPTIONS["prompt_id"].map({0: 0, 1: 0, 2: 0, 3: 3, 4: 3}))
    assert np.array_equal(balance.weights(CAPTIONS, PROMPTS, mode), balance.weights(plain, alone, mode))


def test_what_is_left_out_is_said():
    table = CAPTIONS.assign(weight=balance.weights(CAPTIONS, PROMPTS, "equal_per_prompt"))
    said = list(balance.remarks(table, PROMPTS, "equal_per_prompt"))
    assert said[0] == "balance: equal_per_prompt drops 1 of 5 forms: a 2." and said[1] == "83 of 123 tiles are left out."
    assert said[2].startswith("1 of 5 forms have fewer than 5 tiles (3 in all)")


# --- budgets ---------------------------------------------------------------------------------------------------------


def asked(prompts, count):
    """How many images each prompt gets."""
    own = list(prompts.itertuples())
    found = [p.prompt_id for p, _ in policies._asked(own, count)]
    return [found.count(p.prompt_id) for p in own]


@pytest.mark.parametrize("share", [[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [1, 0, 0]])
def test_shares_are_met_exactly_and_the_first_images_stay_the_same(share):
    prompts = pd.DataFrame({"prompt_id": range(3), "label": "a", "share": share})
    assert asked(prompts, 100) == [round(100 * s) for s in share]
    own = list(prompts.itertuples())
    few, many = ([(p.prompt_id, turn) for p, turn in policies._asked(own, n)] for n in (37, 100))
    assert many[:37] == few
    turns = [turn for i, turn in many if i == 0]
    assert turns == list(range(len(turns)))


def test_budgets_within_each_class():
    table = PROMPTS.assign(text=[f"text {i}" for i in range(5)])
    shares = lambda budget: prompt_table.shares(None, "", table, budget)  # noqa: E731
    assert shares("equal") == pytest.approx([1 / 3] * 3 + [1 / 2] * 2)
    assert shares("proportional") == pytest.approx([60 / 83, 20 / 83, 3 / 83, 3 / 4, 1 / 4])
    inverse = np.array([1 / 60, 1 / 20, 1 / 3])
    assert shares("inverse")[:3] == pytest.approx(inverse / inverse.sum())
    assert shares({"0": 3, "text 1": 1, "4": 5}) == pytest.approx([0.75, 0.25, 0, 0, 1])
    for budget, expected in (({"text 9": 1}, "did you mean 'text"), ({"0": -1}, "expected a number"), ("fair", "budget is 'fair'")):
        with pytest.raises(ValueError, match=expected):
            shares(budget)


def test_the_closed_loop_asks_for_what_is_missed():
    predictions = pd.DataFrame(
        {"tile_id": list("pqrs") * 2, "y": [0, 0, 0, 1] * 2, "p_a": [0.9, 0.2, 0.2, 0.1] * 2, "p_b": [0.1, 0.8, 0.8, 0.9] * 2}
    )
    hit = prompt_table.hits(predictions)
    assert hit["hit"].tolist() == [1, 0, 0, 1] and hit["label"].tolist() == list("aaab")
    found = prompt_table.missed(PROMPTS, hit, pd.Series({"p": 0, "q": 1, "r": 1, "s": 0}))
    assert found == pytest.approx([1 / 3, 3 / 4, 1 / 2, 1 / 3, 1 / 2])  # one hit, two misses, none, one hit, none


# --- a person's names ------------------------------------------------------------------------------------------------


def test_names_are_kept_for_these_clusters_and_for_no_others():
    held, feats, labels = fitted()
    cluster_names.add("exp", held, {(clusters.ALL, 0): "thin  walls", (clusters.ALL, 2): "mucin"}, "me")
    cluster_names.add("exp", held, {(clusters.ALL, 2): "", (clusters.ALL, 0): "thin walls"})
    assert cluster_names.standing("exp", clusters.digest(held)) == {(clusters.ALL, 0): "thin walls"}
    assert len(files.read_table(cluster_names.file_of("exp"))) == 3  # what stood already was not said again
    other = clusters.fit(feats, labels, 4, pca=4)
    assert cluster_names.standing("exp", clusters.digest(other)) == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({0: "  "}, "a name is empty"),
        ({0: "<b>mucin</b>"}, "plain words"),
        ({0: "{label}"}, "plain words"),
        ({0: "x" * 61}, "61 letters"),
        ({0: "mucin", 1: "Mucin"}, "could not tell them apart"),
        ({9: "mucin"}, "there is no cluster 9"),
    ],
)
def test_a_name_that_is_none_is_refused_and_nothing_is_written(names, expected):
    held, _, _ = fitted()
    with pytest.raises(ValueError, match=expected):
        cluster_names.add("exp", held, {(clusters.ALL, k): name for k, name in names.items()} | {(clusters.ALL, 2): "good"})
    assert not cluster_names.file_of("exp").exists()


def test_names_are_an_input_of_the_run_that_uses_them():
    held, _, _ = fitted()
    run = runs.start(experiment="exp", step="10_morphology_prompts")
    assert cluster_names.of_run(run, held) == {}
    run.finish({})
    cluster_names.add("exp", held, {(clusters.ALL, 0): "mucin"})
    from histokit.runs import places, states

    record = places.read(run.folder)
    assert "cluster_names" in " ".join(states.changes(record, record["key"]))
