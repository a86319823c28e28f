"""The button's edit of a recipe: these values and no other character."""

import pytest
from ruamel.yaml import YAML

from histokit.core import files
from histokit.runs import recipe_edit

RECIPE = """\
# From majority to minority.
shared:                       # handed to every notebook
  base_model:   mini
  lr: 1e-4
steps:
  - 00_dataset
  - plain: {run: 03_img2img, strength: 0.5,   # a guess
            guidance_scale: 2.0}
  - 07_evaluate: {arms_of: plain}
"""
CLASSES = """\
classes:                      # what the sliders' button writes
  necrosis: {plain: {strength: 0.35}}   # looked at on Monday
  Müll:
    plain:
      # careful
      strength: 0.2   # low

# the end
"""


def parsed(text):
    return YAML(typ="safe", pure=True).load(text)


def changed_lines(old, new):
    return [line for line in new.splitlines() if line not in old.splitlines()]


def test_without_classes_they_are_added_at_the_end():
    new = recipe_edit.amended(RECIPE, "necrosis", "plain", {"strength": 0.35, "guidance_scale": 2.0})
    assert new == RECIPE + "classes:\n  necrosis: {plain: {strength: 0.35, guidance_scale: 2.0}}\n"


def test_a_value_is_replaced_where_it_stands_and_its_comment_stays():
    new = recipe_edit.amended(RECIPE + CLASSES, "Müll", "plain", {"strength": 0.45})
    assert new == (RECIPE + CLASSES).replace("strength: 0.2   # low", "strength: 0.45   # low")


def test_a_value_is_added_in_the_style_of_its_neighbours():
    new = recipe_edit.amended(RECIPE + CLASSES, "necrosis", "plain", {"strength": 0.35, "guidance_scale": 3.0})
    assert changed_lines(RECIPE + CLASSES, new) == ["  necrosis: {plain: {strength: 0.35, guidance_scale: 3.0}}   # looked at on Monday"]
    new = recipe_edit.amended(RECIPE + CLASSES, "Müll", "plain", {"guidance_scale": 3.0})
    assert new == (RECIPE + CLASSES).replace("# low\n", "# low\n      guidance_scale: 3.0\n")


def test_a_class_is_added_after_the_others():
    new = recipe_edit.amended(RECIPE + CLASSES, "polyp", "plain", {"strength": 0.6})
    assert new == (RECIPE + CLASSES).replace("# low\n", "# low\n  polyp: {plain: {strength: 0.6}}\n")


@pytest.mark.parametrize(
    "name", ["Müll", "a: b", "- x", "#1", "12", "no", "null", "<b>x</b>", 'say "hi"', "it's", "a, [b] {c}", "喉 🧫", "&a", "*"]
)
def test_any_class_name_is_quoted_as_it_needs(name):
    for text in (RECIPE, RECIPE + CLASSES, RECIPE + "classes: {}\n", RECIPE + "classes: {x: {plain: {}}}\n"):
        new = recipe_edit.amended(text, name, "plain", {"strength": 0.6})
        assert parsed(new)["classes"][name] == {"plain": {"strength": 0.6}}
        again = recipe_edit.amended(new, name, "plain", {"strength": 0.7, "guidance_scale": 1.5})
        assert parsed(again)["classes"][name]["plain"] == {"strength": 0.7, "guidance_scale": 1.5}


@pytest.mark.parametrize(
    "classes, expected",
    [
        ("classes:\n", "classes:\n  necrosis: {plain: {strength: 0.6}}\n"),
        ("classes:   # none yet\n# end\n", "classes:   # none yet\n  necrosis: {plain: {strength: 0.6}}\n# end\n"),
        ("classes:", "classes:\n  necrosis: {plain: {strength: 0.6}}\n"),
        ("classes: {}  # none yet\n", "classes: {necrosis: {plain: {strength: 0.6}}}  # none yet\n"),
        ("classes:\n  necrosis:\n", "classes:\n  necrosis: {plain: {strength: 0.6}}\n"),
        ("classes:\n  necrosis:\n    plain:  # todo\n", "classes:\n  necrosis:\n    plain: {strength: 0.6}  # todo\n"),
        ("classes:\n    necrosis:\n        plain: {}\n", "classes:\n    necrosis:\n        plain: {strength: 0.6}\n"),
        ("classes:\n  a:  # todo\n# end\n", "classes:\n  a:  # todo\n  necrosis: {plain: {strength: 0.6}}\n# end\n"),
        ("classes: {necrosis: {plain: {strength: }}}\n", "classes: {necrosis: {plain: {strength: 0.6 }}}\n"),
        ("classes:\n  'necrosis': {keep: {a: [1, 2]}} # c\n", "classes:\n  'necrosis': {keep: {a: [1, 2]}, plain: {strength: 0.6}} # c\n"),
        (
            "classes:\n  necrosis: {plain: {a: 1,\n     b: 2,  # two\n     }}",
            "classes:\n  necrosis: {plain: {a: 1,\n     b: 2, strength: 0.6,  # two\n     }}",
        ),
    ],
)  # fmt: skip
def test_half_written_classes_are_filled(classes, expected):
    assert recipe_edit.amended(RECIPE + classes, "necrosis", "plain", {"strength": 0.6}) == RECIPE + expected


def test_classes_before_steps_and_deeper_indents_stay_in_place():
    text = "classes:\n    x:\n        plain:\n            strength: 0.1\n    # y comes later\nsteps:\n- plain\n"
    new = recipe_edit.amended(text, "y", "plain", {"strength": 0.2})
    assert new == text.replace("0.1\n", "0.1\n    y: {plain: {strength: 0.2}}\n")


def test_line_ends_and_byte_order_mark_survive():
    text = "\ufeff" + (RECIPE + CLASSES).replace("\n", "\r\n")
    new = recipe_edit.amended(text, "necrosis", "plain", {"strength": 0.6})
    assert new == text.replace("0.35", "0.6")


def test_values_shared_by_an_anchor_are_left_alone():
    text = RECIPE + "classes:\n  a: &low {plain: {strength: 0.1}}\n  b: *low\n"
    with pytest.raises(ValueError, match="anchor") as caught:
        recipe_edit.amended(text, "b", "plain", {"strength": 0.2})
    assert "b: {plain: {strength: 0.2}}" in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: [plain\n", "not YAML"),
        ("- a list\n", "not a recipe"),
        ("", "not a recipe"),
        ("steps: [keep]\n", "no step 'plain'; it has: keep"),
        (RECIPE + "classes: [a]\n", "instead of a mapping"),
        (RECIPE + "classes: {necrosis: {plain: 3}}\n", "instead of a mapping"),
        (RECIPE + "classes: {necrosis: {plain: {strength: [1]}}}\n", "list or mapping"),
        (RECIPE + "classes: {}\nclasses: {}\n", "not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        recipe_edit.amended(text, "necrosis", "plain", {"strength": 0.6})


# ---- the file


def test_apply_returns_the_diff_and_the_old_text_undoes_it(root):
    path = root / "params" / "study.yaml"
    files.write_text(path, RECIPE + CLASSES)
    diff = recipe_edit.apply(path, "necrosis", "plain", {"strength": 0.6})
    assert "-  necrosis: {plain: {strength: 0.35}}   # looked at on Monday\n+  necrosis: {plain: {strength: 0.6}}" in diff
    assert recipe_edit.current(path, "necrosis", "plain") == {"strength": 0.6}
    assert recipe_edit.apply(path, "necrosis", "plain", {"strength": 0.6}) == ""
    files.write_text(path, RECIPE + CLASSES)
    assert recipe_edit.current(path, "necrosis", "plain") == {"strength": 0.35}


def test_an_edit_by_hand_meanwhile_is_kept(root):
    path = root / "params" / "study.yaml"
    files.write_text(path, RECIPE + CLASSES)
    seen = recipe_edit.current(path, "necrosis", "plain")
    files.write_text(path, (RECIPE + CLASSES).replace("# the end", "# the end, or nearly"))
    recipe_edit.apply(path, "necrosis", "plain", {"strength": 0.6}, expected=seen)
    assert path.read_text().endswith("# the end, or nearly\n") and "0.6" in path.read_text()


def test_a_value_set_by_hand_meanwhile_is_shown_and_not_replaced(root):
    path = root / "params" / "study.yaml"
    files.write_text(path, RECIPE + CLASSES)
    seen = recipe_edit.current(path, "necrosis", "plain")
    by_hand = (RECIPE + CLASSES).replace("0.35", "0.4")
    files.write_text(path, by_hand)
    with pytest.raises(recipe_edit.RecipeChanged, match=r"now says strength: 0\.4"):
        recipe_edit.apply(path, "necrosis", "plain", {"strength": 0.6}, expected=seen)
    assert path.read_text() == by_hand
    assert recipe_edit.apply(path, "necrosis", "plain", {"strength": 0.6}, expected=recipe_edit.current(path, "necrosis", "plain"))


def test_a_read_only_recipe_is_left_as_it_is(root):
    path = root / "params" / "study.yaml"
    files.write_text(path, RECIPE)
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        recipe_edit.apply(path, "necrosis", "plain", {"strength": 0.6})
    assert path.read_text() == RECIPE and [p.name for p in path.parent.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize(
    "before, after",
    [
        ("  - 00\n  - lora  # why\n", "  - 00\n  - lora: {checkpoint: 3}  # why\n"),
        ("  - lora: {a: 1,\n      b: {c: 2}}  # why\n  - z\n", "  - lora: {a: 1,\n      b: {c: 2}, checkpoint: 3}  # why\n  - z\n"),
        ("  - lora:\n      a: 1  # why\n  - z: {}\n", "  - lora:\n      a: 1  # why\n      checkpoint: 3\n  - z: {}\n"),
        ("  - lora:  # why\n  - z\n", "  - lora: {checkpoint: 3}  # why\n  - z\n"),
        ("  - lora: {checkpoint: 12}\n", "  - lora: {checkpoint: 3}\n"),
    ],
)
@pytest.mark.parametrize("name", ["all", ""])
def test_the_one_run_of_all_classes_has_its_values_in_the_step(before, after, name):
    assert recipe_edit.amended(f"steps:\n{before}", name, "lora", {"checkpoint": 3}) == f"steps:\n{after}"


def test_lines_to_add_by_hand_to_a_step_are_those_of_a_step():
    assert recipe_edit.lines("all", "lora", {"checkpoint": 3}) == "  - lora: {checkpoint: 3}\n"
    with pytest.raises(ValueError, match="has no step 'lora'"):
        recipe_edit.amended("steps: [z]\n", "all", "lora", {"checkpoint": 3})
