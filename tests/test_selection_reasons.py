"""Reasons of a selection: codes and numbers in the manifest, words where they are shown."""

import re

import pandas as pd
import pytest

from histokit.core import files
from histokit.runs import selection_reasons

# every form a reason can have, with the words that it is shown in
WORDS = [
    ({"code": "blank", "contrast": 1.25, "cut": 4.0}, "blank or black: contrast 1.2 below 4.0"),
    ({"code": "copy", "of": "r1", "space": "feature", "similarity": 0.9981, "cut": 0.97}, "copy of r1: feature 0.998, cut 0.970"),
    ({"code": "repeat", "of": "s8", "space": "picture", "similarity": 0.9561, "cut": 0.9}, "repeats s8: picture 0.956, cut 0.900"),
    ({"code": "judge", "asked": "mucinous", "seen": "stroma", "place": 3, "cut": 1}, "judge sees stroma: mucinous in place 3, cut 1"),
    ({"code": "judge", "asked": "fat", "seen": "stroma", "probability": 0.012, "cut": 0.25}, "judge sees stroma: fat only 0.012, cut 0.25"),
    ({"code": "judge", "asked": "fat", "seen": "fat", "probability": 0.2, "cut": 0.25}, "judge unsure: fat only 0.2, cut 0.25"),
    ({"code": "stain", "deviation": 3.52, "cut": 3.1}, "stain: 3.5 deviations from real tiles, cut 3.1"),
    ({"code": "blurred", "sharpness": 1.04, "cut": 2.0}, "blurred: sharpness 1.0, cut 2.0"),
    ({"code": "centroid", "asked": "fat", "place": 4, "cut": 2}, "centroid: fat in place 4, cut 2"),
    ({"code": "realism", "realism": 0.412, "cut": 0.5}, "realism: 0.41, cut 0.50"),
    ({"code": "cluster", "asked": 3, "seen": 11}, "cluster: falls into 11, asked for 3"),
    ({"code": "person", "verdict": "keep", "note": "rare stain; see slide 4"}, "person: keep, rare stain; see slide 4"),
    ({"code": "person", "verdict": "reject", "note": ""}, "person: reject"),
    ({"code": "quota", "place": 7, "by": "judge", "most": 5}, "quota: place 7 by judge, 5 are kept"),
    ({"code": "earlier", "text": "blank or black"}, "blank or black"),
]


def test_every_code_has_a_sentence_and_a_caption_that_names_no_tile():
    assert {reason["code"] for reason, _ in WORDS} == set(selection_reasons.CODES)
    for reason, words in WORDS:
        assert selection_reasons.sentence(reason) == words
        (caption,) = selection_reasons.captions(selection_reasons.write([reason]))
        assert caption == selection_reasons.CODES[reason["code"]] and str(reason.get("of")) not in caption


@pytest.mark.parametrize(("reason", "words"), WORDS)
def test_every_number_of_a_sentence_is_a_field_and_every_field_is_said(reason, words):
    fields = {name: value for name, value in reason.items() if name != "code"}
    texts = [value for value in fields.values() if isinstance(value, str)]
    numbers = [value for value in fields.values() if not isinstance(value, str)]
    plain = words
    for text in sorted(filter(None, texts), key=len, reverse=True):
        plain = plain.replace(text, "")
    for said in re.findall(r"\d+(?:\.\d+)?", plain):
        rounding = 0.6 * 10.0 ** -len(said.partition(".")[2])
        assert any(abs(float(said) - number) <= rounding for number in numbers), said
    for name, value in fields.items():
        other = value + 10 if not isinstance(value, str) else f"another {value}"
        assert selection_reasons.sentence({**reason, name: other}) != words, f"{name} is not said"


@pytest.mark.parametrize("reason", [{"code": "ugly"}, {"code": "copy", "of": "r1"}, {}])
def test_what_has_no_words_is_not_written(reason):
    with pytest.raises(ValueError, match="no words for the reason .*; expected a code of blank, copy"):
        selection_reasons.write([reason])


def test_reasons_come_back_from_a_table_as_they_went(root):
    odd = [
        {"code": "copy", "of": 'train/Ünal, "x"\n/1.png', "space": "feature", "similarity": 0.998123456789, "cut": 1.0},
        {"code": "person", "verdict": "keep", "note": "=1+1; judge sees red\r\n[…]"},
        {"code": "quota", "place": 1234567, "by": "judge", "most": 0},
    ]
    cells = [
        "",
        selection_reasons.write([]),
        selection_reasons.write(odd),
        *(selection_reasons.write([reason]) for reason, _ in WORDS if reason["code"] != "earlier"),
    ]
    for name in ("manifest.csv", "manifest.parquet"):
        files.write_table(root / name, pd.DataFrame({"tile_id": map(str, range(len(cells))), "reason": cells}))
        assert files.read_table(root / name)["reason"].tolist() == cells
    assert selection_reasons.read(cells[0]) == selection_reasons.read(cells[1]) == [] and selection_reasons.said("") == ""
    assert selection_reasons.read(cells[2]) == [{**odd[0], "similarity": 0.998123, "cut": 1}, *odd[1:]], (
        "floats to six digits, all else as it was"
    )
    assert [selection_reasons.said(cell) for cell in cells[3:]] == [words for reason, words in WORDS if reason["code"] != "earlier"]


def test_a_manifest_of_an_earlier_version_is_shown_as_it_is():
    text = "person: keep, [see slide; 4]; copy of r1: feature 0.998, cut 0.970"
    assert selection_reasons.said(text) == text
    (caption,) = selection_reasons.captions(text)
    assert "r1" not in caption, "a caption goes where no tile may be named"
    assert selection_reasons.caption("judge disagrees") == "judge disagrees", "results.json of an earlier version holds captions"
