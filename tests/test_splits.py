import numpy as np
import pandas as pd
import pytest

from histokit.tiles import splits

FRACTIONS = {"train": 0.6, "val": 0.15, "test": 0.25}


def manifest(cases, tiles=3, split="", use="labelled", patient=""):
    """{class: number of cases} -> rows; case ids are unique to a class."""
    rows = [(f"{c}/{c}{k:03d}_{i}.png", c, f"{c}{k:03d}") for c, n in cases.items() for k in range(n) for i in range(tiles)]
    table = pd.DataFrame(rows, columns=["tile_id", "label", "case_id"])
    return table.assign(file_name=table["tile_id"], split=split, use=use, patient=patient)


def by_class(tiles):
    return {name: rows.groupby("split")["case_id"].nunique().to_dict() for name, rows in tiles.groupby("label")}


def test_every_tile_of_a_case_is_on_one_side_and_every_class_on_all():
    tiles = splits.assign(manifest({"a": 40, "b": 12, "c": 3}), FRACTIONS, seed=0)
    assert tiles.groupby("case_id")["split"].nunique().eq(1).all()
    assert by_class(tiles) == {
        "a": {"train": 24, "val": 6, "test": 10},
        "b": {"train": 7, "val": 2, "test": 3},
        "c": dict.fromkeys(FRACTIONS, 1),
    }


def test_two_cases_go_to_train_and_test_and_a_single_one_to_train():
    tiles = splits.assign(manifest({"a": 20, "b": 2, "c": 1}), FRACTIONS, seed=0)
    assert by_class(tiles)["b"] == {"train": 1, "test": 1} and by_class(tiles)["c"] == {"train": 1}
    assert splits.not_evaluable(tiles, ["a", "b", "c"]) == {"c": "all its 3 tiles come from a single case (c000)"}


@pytest.mark.parametrize("seed", range(3))
def test_the_split_depends_on_the_set_of_rows_and_the_seed_not_on_their_order(seed):
    tiles = manifest({"a": 20, "b": 9})
    mixed = tiles.sample(frac=1, random_state=seed)
    one, other = splits.assign(tiles, FRACTIONS, seed), splits.assign(mixed, FRACTIONS, seed)
    pd.testing.assert_series_equal(one.set_index("tile_id")["split"], other.set_index("tile_id")["split"].loc[one["tile_id"]])
    assert not one["split"].equals(splits.assign(tiles, FRACTIONS, seed + 1)["split"])
    budget = {"a": {"tiles": 6, "cases": 3}}
    kept = [set(t.loc[t["use"].eq("withheld"), "tile_id"]) for t in (splits.budget(one, budget, seed), splits.budget(other, budget, seed))]
    assert kept[0] == kept[1]


def test_cases_of_several_classes_and_of_very_different_size_still_balance():
    rng = np.random.default_rng(0)
    case = rng.choice([f"P{i}" for i in range(60)], 3000, p=rng.dirichlet(np.ones(60)))
    tiles = manifest({"a": 1000}).assign(case_id=case, label=rng.choice(list("abc"), 3000, p=[0.8, 0.15, 0.05]))
    tiles = splits.assign(tiles, FRACTIONS, seed=0)
    assert tiles.groupby("case_id")["split"].nunique().eq(1).all()
    share = pd.crosstab(tiles["label"], tiles["split"], normalize="index")[list(FRACTIONS)]
    assert np.abs(share - np.array(list(FRACTIONS.values()))).to_numpy().max() < 0.06


def test_a_patient_with_two_cases_stays_on_one_side():
    tiles = manifest({"a": 30, "b": 30})
    tiles["patient"] = "pat" + tiles["case_id"].str[1:].astype(int).floordiv(2).astype(str)
    tiles = splits.assign(tiles, FRACTIONS, seed=0)
    assert tiles.groupby("patient")["split"].nunique().eq(1).all()


def test_a_split_that_the_data_brings_is_kept_and_a_missing_val_is_cut_from_train():
    tiles = manifest({"a": 30, "b": 30})
    tiles["split"] = np.where(tiles["case_id"].str[1:].astype(int) < 20, "train", "test")
    done = splits.assign(tiles, FRACTIONS, seed=0)
    assert done.loc[tiles["split"].eq("test"), "split"].eq("test").all()
    assert by_class(done) == {c: {"train": 16, "val": 4, "test": 10} for c in "ab"}
    whole = tiles.assign(split=np.where(tiles["case_id"].eq("a000"), "val", tiles["split"]))
    assert splits.assign(whole, FRACTIONS, seed=0)["split"].equals(whole["split"])


def test_a_case_in_two_splits_is_refused_with_both_files():
    tiles = manifest({"a": 4, "b": 4}, split="train")
    tiles.loc[1, "split"] = "test"
    with pytest.raises(ValueError, match=r"'case a000' is in two splits: 'a/a000_0.png' in train and 'a/a000_1.png' in test .1 such"):
        splits.assign(tiles, FRACTIONS, seed=0)


def test_two_patients_in_one_case_are_refused():
    tiles = manifest({"a": 4, "b": 4}).assign(patient="x")
    tiles.loc[1, "patient"] = "y"
    with pytest.raises(ValueError, match="case 'a000' has two patients, 'x' and 'y'"):
        splits.assign(tiles, FRACTIONS, seed=0)


def test_copies_stay_on_one_side():
    tiles = manifest({"a": 30, "b": 30}, tiles=1)
    found = pd.DataFrame({"a": [f"a/a{k:03d}_0.png" for k in range(15)], "b": [f"b/b{k + 1:03d}_0.png" for k in range(15)]})
    split = splits.assign(tiles, FRACTIONS, seed=0, copies=found).set_index("tile_id")["split"]
    assert (split[found["a"]].to_numpy() == split[found["b"]].to_numpy()).all() and split.nunique() == 3


def test_unlabelled_tiles_follow_their_case_and_the_others_are_for_training():
    tiles = manifest({"a": 10, "b": 10})
    loose = manifest({"x": 2}, tiles=1, use="unlabelled").assign(label="tissue", case_id=["a003", "new"])
    done = splits.assign(pd.concat([tiles, loose], ignore_index=True), FRACTIONS, seed=0)
    assert done["split"].iloc[-2] == done.loc[done["case_id"].eq("a003"), "split"].iloc[0] and done["split"].iloc[-1] == "train"


def test_a_budget_keeps_so_many_tiles_of_so_many_cases_and_leaves_the_rest_alone():
    tiles = splits.assign(manifest({"a": 40, "b": 40}, tiles=5), FRACTIONS, seed=0)
    done = splits.budget(tiles, {"a": {"tiles": 10, "cases": 3}}, seed=0)
    kept = done[done["label"].eq("a") & done["split"].eq("train") & done["use"].eq("labelled")]
    assert len(kept) == 10 and sorted(kept.groupby("case_id").size()) == [3, 3, 4]
    changed = done["use"].ne(tiles["use"])
    assert (
        set(done.loc[changed, "use"]) == {"withheld"}
        and set(done.loc[changed, "label"]) == {"a"}
        and set(done.loc[changed, "split"]) == {"train"}
    )
    others = {
        frozenset(splits.budget(tiles, {"a": {"tiles": 10, "cases": 3}}, seed=s).query("use == 'withheld'")["tile_id"]) for s in range(4)
    }
    assert len(others) > 1


def test_a_budget_above_what_is_there_says_what_is_there():
    tiles = manifest({"a": 4, "b": 4}, split="train")
    with pytest.raises(ValueError, match="asks for 99 training tiles of 2 cases; it has 12 of 4, and its 2 largest hold 6"):
        splits.budget(tiles, {"a": {"tiles": 99, "cases": 2}}, seed=0)
    with pytest.raises(ValueError, match="asks for 13 training tiles; it has 12 of 4"):
        splits.budget(tiles, {"a": {"tiles": 13}}, seed=0)


def test_counts_list_every_class_and_split_and_withheld_tiles_apart():
    tiles = splits.budget(manifest({"a": 4, "b": 2}, split="train"), {"a": {"tiles": 2}}, seed=0)
    table = splits.counts(tiles, ["b", "a"])
    assert table["label"].tolist() == ["b", "b", "b", "a", "a", "a", "a"]
    assert table.query("label == 'a'")["tiles"].tolist() == [2, 0, 0, 10]
    assert splits.roles(tiles, ["b", "a"], {}, tail_below=5) == {"b": "head", "a": "tail"}
    assert splits.roles(tiles, ["b", "a"], {"a": "head"}, tail_below=5) == {"b": "head", "a": "head"}


def test_spread_takes_as_many_cases_as_there_are():
    tiles = manifest({"a": 5}, tiles=10)
    assert splits.spread(tiles, 5)["case_id"].nunique() == 5 and len(splits.spread(tiles, 99)) == 50


def labelled_cases(tiles):
    return {name: set(rows["case_id"]) for name, rows in tiles[tiles["use"].eq("labelled") & tiles["split"].eq("train")].groupby("label")}


def test_labels_are_kept_by_case_in_the_share_of_every_class_and_by_one_at_least():
    tiles = splits.assign(manifest({"a": 67, "b": 34, "c": 3}), FRACTIONS, seed=0)  # 40, 20 and 1 for training
    kept = splits.keep_labels(tiles, 0.2, seed=0)
    assert {name: len(cases) for name, cases in labelled_cases(kept).items()} == {"a": 8, "b": 4, "c": 1}
    changed = kept["use"].ne(tiles["use"])
    assert kept.loc[changed, "label"].eq("tissue").all() and kept.loc[changed, "split"].eq("train").all()
    pd.testing.assert_frame_equal(kept[~changed], tiles[~changed])
    assert kept.groupby("case_id")["use"].nunique().eq(1).all()


def test_a_case_of_several_classes_counts_for_each():
    tiles = manifest({"a": 20}, split="train")
    tiles = pd.concat([tiles, tiles[tiles["case_id"].lt("a010")].assign(label="b", tile_id=lambda t: "b" + t["tile_id"])])
    kept = labelled_cases(splits.keep_labels(tiles.reset_index(drop=True), 0.2, seed=1))
    assert len(kept["b"]) == 2 and len(kept["a"]) == 4 and kept["b"] < kept["a"]


def test_which_labels_are_kept_follows_from_seed_and_draw_and_not_from_the_order_of_rows():
    tiles = manifest({"a": 30, "b": 20}, split="train")
    mixed = tiles.sample(frac=1, random_state=0)
    one, other, drawn = (labelled_cases(splits.keep_labels(*given)) for given in ((tiles, 0.1, 0), (mixed, 0.1, 0), (tiles, 0.1, 0, 1)))
    assert one == other != drawn
    pd.testing.assert_frame_equal(splits.keep_labels(tiles, 1, seed=0), tiles)
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="labelled must be a share"):
            splits.keep_labels(tiles, share, seed=0)


def test_withheld_tiles_stay_withheld_when_labels_are_taken():
    tiles = splits.budget(manifest({"a": 20}, split="train"), {"a": {"tiles": 30, "cases": 10}}, seed=0)
    kept = splits.keep_labels(tiles, 0.5, seed=0)
    assert kept["use"].eq("withheld").sum() == tiles["use"].eq("withheld").sum() == 30
    assert len(labelled_cases(kept)["a"]) == 5
