"""The page for a person's eye, in a real browser, and what several people's verdicts say."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from planted import experiment
from sklearn import metrics as sk

from histokit import cli
from histokit.core import files
from histokit.runs import selection_reasons
from histokit.select import gallery, rater_agreement, review_set, reviews

ARMS, MADE = {"real": {}, "augmented": {}}, 25


@pytest.fixture
def step(root):
    """A finished selection of 25 synthetic tiles of each of two rare classes."""
    return experiment(root, ARMS, [4, 4, 6, 5], seeds=1, made=MADE) / "keep"


def held(path):
    """What the page knows, and its text."""
    text = path.read_text()
    return json.loads(re.search(r'id="given">(.*?)</script>', text, re.DOTALL)[1]), text


def key_of(root, given):
    return files.read_json(root / "outputs" / "planted" / ".galleries" / f"{given['key']}.json")


def export(root, given, rater, verdicts):
    """An exported file: verdicts {tile: keep, reject, or (reject, reasons)}."""
    split = {i: (v, []) if isinstance(v, str) else v for i, v in verdicts.items()}
    rows = [{"id": i, "verdict": v, "reasons": reasons} for i, (v, reasons) in split.items()]
    path = root / f"{rater}.json"
    files.write_json(path, {"gallery": given["key"], "rater": rater, "verdicts": rows})
    return path


def test_the_page_shows_every_candidate_with_its_source_and_names_nobody(root, step):
    assert gallery.page(step, root / "page.html") == 2 * MADE
    given, text = held(root / "page.html")
    assert len(given["tiles"]) == 2 * MADE and max(map(len, given["pictures"])) * 3 / 4 < review_set.MOST + 100
    assert all(given["pictures"][tile["source"]].startswith("data:image/jpeg") for tile in given["tiles"])
    assert {tile["status"] for tile in given["tiles"]} == {"kept", "rejected"} and given["tiles"][0]["scores"]["judge"] == 1.0
    for name in ("s-Polyp-", "Pol-train", str(root), "http://", "https://", 'src="//'):
        assert name not in text, name
    truth = key_of(root, given)["tiles"]
    assert [truth[tile["id"]]["label"] for tile in given["tiles"]] == [tile["label"] for tile in given["tiles"]]
    assert all(len(one["sha256"]) == 64 and one["kind"] == "synthetic" for one in truth.values())


def test_a_blind_page_mixes_in_real_training_tiles_and_does_not_give_them_away(root, step):
    gallery.page(step, root / "blind.html", blind=True)
    given, _ = held(root / "blind.html")
    truth = key_of(root, given)["tiles"]
    kinds = [truth[tile["id"]]["kind"] for tile in given["tiles"]]
    assert kinds.count("synthetic") == 2 * MADE and kinds.count("real") > 20 and len(set(kinds[:20])) == 2, "mixed"
    assert all(set(tile) == {"id", "label"} for tile in given["tiles"]), "nothing that one kind has and the other lacks"
    assert "synthetic" not in json.dumps(given) and given["scores"] == []
    assert all("-train-" in one["tile_id"] for one in truth.values() if one["kind"] == "real"), "no test tile is opened for it"
    gallery.page(step, root / "other.html", blind=True, seed=1)
    assert held(root / "other.html")[0]["key"] != given["key"]


def test_a_class_name_that_looks_like_html_stays_text(root, step, page, monkeypatch):
    dealt = review_set.deal

    def renamed(*given, **how):
        found = dealt(*given, **how)
        return found._replace(cards=[card | {"label": "</script><b>x</b>&amp;"} for card in found.cards])

    monkeypatch.setattr(review_set, "deal", renamed)
    gallery.page(step, root / "page.html")
    given, text = held(root / "page.html")
    assert given["tiles"][0]["label"] == "</script><b>x</b>&amp;" and "<b>x" not in text
    page.goto((root / "page.html").as_uri())
    assert page.locator(".hk-label").inner_text() == "</script><b>x</b>&amp;"


def test_verdicts_of_several_people_become_reviews_where_most_agree(root, step):
    gallery.page(step, root / "page.html")
    given, _ = held(root / "page.html")
    ids, rng = [tile["id"] for tile in given["tiles"]], np.random.default_rng(0)
    said = {name: {i: ("keep", "reject")[int(rng.random() < 0.4)] for i in ids} for name in ("ada", "ben", "cleo")}
    said["ada"][ids[0]] = said["ben"][ids[0]] = "reject"
    told_why = {ids[0]: ("reject", ["artefact", "blur"])}
    table = rater_agreement.read(
        [export(root, given, name, verdicts | (told_why if name == "ada" else {})) for name, verdicts in said.items()]
    )
    found = rater_agreement.agreement(table)
    for row in found.itertuples():
        one, other = ([said[name][i] for i in ids] for name in (row.first, row.second))
        assert row.tiles == len(ids) and row.kappa == pytest.approx(sk.cohen_kappa_score(one, other))
    assert len(found) == 3 and rater_agreement.write(table) == len(ids)
    written = files.read_table(root / "params" / "reviews" / "planted.csv").set_index("sha256")
    truth = key_of(root, given)["tiles"]
    for i in ids:
        votes = [said[name][i] for name in said]
        assert written.at[truth[i]["sha256"], "verdict"] == max(set(votes), key=votes.count)
    first = written.loc[truth[ids[0]]["sha256"]]
    assert "artefact, blur" in first["note"] and "ada, ben" in first["reviewer"]


def test_what_is_said_of_two_raters_reads_well_where_kappa_is_not_defined(root, step):
    gallery.page(step, root / "page.html")
    given, _ = held(root / "page.html")
    ids = [tile["id"] for tile in given["tiles"]]
    ada = export(root, given, "ada", dict.fromkeys(ids[:4], "keep"))
    ben = export(root, given, "ben", dict.fromkeys(ids[:6], "keep"))
    cleo = export(root, given, "cleo", dict.fromkeys(ids[8:9], "reject"))
    said = rater_agreement.remarks(rater_agreement.read([ada, ben, cleo]))
    assert "ada and ben gave the same verdict on all of 4 tiles, so kappa, which asks for two kinds, is not defined." in said
    assert "ada and cleo have no tile in common." in said and not any("nan" in line for line in said)


def test_a_reason_is_shown_without_the_tile_it_names(root, step):
    manifest = files.read_table(step / "manifest.csv")
    name = files.read_table(step.parent / "00_dataset" / "manifest.csv")["tile_id"].iloc[0]
    copied = {"code": "copy", "of": name, "space": "feature", "similarity": 0.991, "cut": 0.9}
    unsure = {"code": "judge", "asked": "x", "seen": "x", "probability": 0.1, "cut": 0.2}
    files.write_table(step / "manifest.csv", manifest.assign(reason=selection_reasons.write([copied, unsure])))
    gallery.page(step, root / "page.html")
    given, text = held(root / "page.html")
    assert {tile["why"] for tile in given["tiles"]} == {"copy of a training tile, judge disagrees"} and name not in text
    files.write_table(step / "manifest.csv", manifest.assign(reason=f"copy of {name}: feature 0.991, cut 0.9"))
    gallery.page(step, root / "page.html")
    given, text = held(root / "page.html")
    assert {tile["why"] for tile in given["tiles"]} == {"told by an earlier version"} and name not in text


def test_one_answer_for_all_is_named_where_real_tiles_are_few():
    table = pd.DataFrame(
        {"rater": "ada", "tile": [f"{i}" for i in range(10)], "verdict": "reject", "kind": ["real"] * 2 + ["synthetic"] * 8}
    )
    assert rater_agreement.told(table) == [
        "ada told real from synthetic in 8 of 10 tiles, 80 % [49 to 94]; always made would be right in 80 %."
    ]


def test_two_who_disagree_leave_a_tile_to_the_scores(root, step):
    gallery.page(step, root / "page.html")
    given, _ = held(root / "page.html")
    one, other = (tile["id"] for tile in given["tiles"][:2])
    paths = [export(root, given, "ada", {one: "keep", other: "keep"}), export(root, given, "ben", {one: "reject", other: "keep"})]
    assert len(rater_agreement.settled(rater_agreement.read(paths))) == 1


def test_a_blind_page_says_how_well_people_can_tell_and_writes_no_review(root, step, capsys):
    assert cli.main(["gallery", "outputs/planted/keep", "--blind", "--html", "blind.html"]) == 0
    given, _ = held(root / "blind.html")
    assert cli.main(["gallery", "outputs/planted/keep", "--blind"]) == 0 and held(step / "gallery-blind.html")[0] == given
    truth = key_of(root, given)["tiles"]
    path = export(root, given, "ada", {i: "keep" if one["kind"] == "real" else "reject" for i, one in truth.items()})
    (row,) = rater_agreement.told_apart(rater_agreement.read([path])).itertuples()
    assert row.right == row.tiles == len(truth) and row.high == pytest.approx(1) and 0.9 < row.low < 1
    assert cli.main(["import-verdicts", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"ada told real from synthetic in {len(truth)} of {len(truth)} tiles, 100 % [" in said and "nothing was written" in said
    assert not (root / "params" / "reviews").exists()


def test_what_is_no_export_is_refused(root, step):
    gallery.page(step, root / "page.html")
    given, _ = held(root / "page.html")
    tile = given["tiles"][0]["id"]
    one = export(root, given, "ada", {tile: "keep"})
    files.write_json(root / "x.json", {"tiles": []})
    with pytest.raises(ValueError, match="is no export of a gallery page"):
        rater_agreement.read([root / "x.json"])
    with pytest.raises(ValueError, match="rater 'ada' comes twice"):
        rater_agreement.read([one, one])
    with pytest.raises(ValueError, match="different pages"):
        rater_agreement.read([one, export(root, {"key": "other"}, "ben", {tile: "keep"})])
    with pytest.raises(ValueError, match="is nowhere below outputs"):
        rater_agreement.read([export(root, {"key": "other"}, "ben", {tile: "keep"})])
    with pytest.raises(ValueError, match="is not on that page"):
        rater_agreement.read([export(root, given, "ben", {"9999": "keep"})])
    with pytest.raises(ValueError, match="verdicts are keep, reject"):
        rater_agreement.read([export(root, given, "ben", {tile: "maybe"})])
    with pytest.raises(FileNotFoundError, match="holds no finished selection"):
        gallery.page(step.parent / "06_classifier", root / "page.html")


def test_a_number_after_a_rejection_says_why_of_the_tile_that_was_left(root, step, page):
    assert cli.main(["gallery", "outputs/planted/keep", "--html"]) == 0
    page.goto((step / "gallery.html").as_uri())
    page.locator("h1").click()
    for key in "ar2":
        page.keyboard.press(key)
    person, cells, chosen = page.locator(".hk-person"), page.locator(".hk-cell"), page.locator(".hk-reasons .hk-on")
    assert page.locator(".hk-count").inner_text() == f"tile 3 of {2 * MADE}, 2 decided", "the tile on show is not decided by that"
    assert person.inner_text() == "not decided. Tile 2 was rejected, 1 to 5 say why: artefact" and chosen.all_inner_texts() == [
        "2 artefact"
    ]
    page.keyboard.press("5")
    assert chosen.all_inner_texts() == ["2 artefact", "5 blur"] and "hk-reject" not in cells.nth(2).get_attribute("class")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("3")  # nothing was rejected just now: it is the tile on show that is, and why
    assert page.locator(".hk-count").inner_text() == f"tile 4 of {2 * MADE}, 3 decided" and person.inner_text().endswith("rejected: copy")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert person.inner_text() == "rejected: artefact, blur"


def test_fifty_candidates_are_reviewed_by_keyboard_and_come_back_as_reviews(root, step, page):
    assert cli.main(["gallery", "outputs/planted/keep", "--html"]) == 0
    page.goto((step / "gallery.html").as_uri())
    page.fill(".hk-rater", "Dr. Müller")
    page.locator("h1").click()
    for i in range(2 * MADE):
        page.keyboard.press("r" if i % 3 == 0 else "a")
    assert page.locator(".hk-count").inner_text() == f"tile {2 * MADE} of {2 * MADE}, {2 * MADE} decided"

    # undo goes back to the last one; a reason is a rejection; what is decided survives a reload
    page.keyboard.press("u")
    assert page.locator(".hk-count").inner_text() == f"tile {2 * MADE} of {2 * MADE}, {2 * MADE - 1} decided"
    page.keyboard.press("2")
    assert page.locator(".hk-reasons .hk-on").inner_text() == "2 artefact"
    page.reload()
    assert page.locator(".hk-count").inner_text().endswith(f"{2 * MADE} decided") and page.input_value(".hk-rater") == "Dr. Müller"

    # the source comes while a key is held; another order keeps the tile
    page.locator("h1").click()
    before = page.locator(".hk-big").get_attribute("src")
    page.keyboard.down("s")
    assert page.locator(".hk-big").get_attribute("src") != before and "its source" in page.locator(".hk-why").inner_text()
    page.keyboard.up("s")
    assert page.locator(".hk-big").get_attribute("src") == before
    page.select_option(".hk-sort", "judge")
    assert page.locator(".hk-big").get_attribute("src") == before
    page.locator(".hk-grid button").first.click()
    assert page.locator(".hk-scores").inner_text().startswith("judge\t0.04")

    with page.expect_download() as found:
        page.locator(".hk-export").click()
    path = root / found.value.suggested_filename
    shutil.copy(found.value.path(), path)
    assert path.name.endswith("-Dr_M_ller.json")
    assert cli.main(["import-verdicts", str(path)]) == 0
    given = files.read_table(root / "params" / "reviews" / "planted.csv")
    assert len(given) == 2 * MADE and given["reviewer"].eq("Dr. Müller").all() and set(given["verdict"]) == set(reviews.VERDICTS)
    assert given["verdict"].value_counts().to_dict() == {"keep": 32, "reject": 18} and given["note"].iloc[-1] == "artefact"
