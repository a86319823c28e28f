import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from histokit.show import arm_plots, distribution_plots, plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def grey(n, px=8):
    return np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(px, 1).repeat(px, 2).repeat(3, 3)


def test_an_image_grid_shows_every_pixel_in_reading_order():
    sheet = plots.image_grid(grey(5), "five", cols=2, gap=1).images[0].get_array()
    assert sheet.shape == (3 * 9, 2 * 9, 3)
    assert [int(sheet[r * 9, c * 9, 0]) for r, c in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))] == [0, 1, 2, 3, 4, 255]


def test_captions_stand_above_their_images_and_a_given_axes_is_used():
    ax = plots.new_axes()
    assert plots.image_grid(grey(3), captions=["a", "b\nc", "d"], ax=ax) is ax
    assert [text.get_text() for text in ax.texts] == ["a", "b\nc", "d"]


def test_a_class_grid_leaves_room_where_a_class_has_fewer_tiles():
    ax = plots.class_grid({"a": grey(3), "b": grey(1)})
    sheet = ax.images[0].get_array()
    assert sheet.shape[0] == 2 * 12 and (sheet[12:20, 12:] == 255).all()
    assert [text.get_text() for text in ax.texts] == ["a", "b"]


def test_the_long_tail_names_tiles_and_cases_and_the_withheld_ones():
    rows = [("a", s, "labelled", t, c) for s, t, c in (("train", 100, 9), ("val", 10, 2), ("test", 20, 3))]
    rows += [("b", s, "labelled", t, c) for s, t, c in (("train", 15, 3), ("val", 0, 0), ("test", 4, 1))] + [
        ("b", "train", "withheld", 85, 7)
    ]
    ax = distribution_plots.long_tail(pd.DataFrame(rows, columns=["label", "split", "use", "tiles", "cases"]), {"a": "head", "b": "tail"})
    shown = [text.get_text() for text in ax.texts]
    assert shown == ["100 / 9", "15 / 3 (+85)", "10 / 2", "none", "20 / 3", "4 / 1"]
    assert [tick.get_color() for tick in ax.get_yticklabels()] == [plots.INK, plots.TAIL]


def test_a_tile_journey_states_size_and_scale_and_says_when_it_is_unknown():
    axes = plots.tile_journey([("file", grey(1, 32)[0], 0.5), ("input", grey(1, 16)[0], float("nan"))])
    assert [ax.get_title() for ax in axes] == ["file\n32 x 32 px, 0.5 µm per px", "input\n16 x 16 px, µm per px unknown"]
    assert [text.get_text() for text in axes[0].texts] == ["5 µm"] and not axes[1].texts


def test_a_table_shows_marked_rows_in_red():
    html = plots.table(pd.DataFrame({"x": ["one", "two"]}), marked=pd.Series([False, True])).to_html()
    assert html.count(plots.TAIL) == 1 and '<th class="row_heading' not in html


def test_a_table_shows_words_in_angle_brackets_and_short_numbers():
    html = plots.table(pd.DataFrame({"prompt": ["a tile of <polyp>", ""], "strength": [0.6, np.nan], "tiles": [12345.6, 3]})).to_html()
    assert ">a tile of &lt;polyp&gt;</td>" in html and "<polyp>" not in html
    assert ">0.6</td>" in html and ">12,346</td>" in html and "nan" not in html


def test_a_loss_curve_shows_every_loss_and_stars_the_best_held_out_step():
    steps = pd.DataFrame({"step": [1, 2, 3, 4], "loss_a": [4, 3, 2, 1], "loss_b": [1, 1, 1, 1], "val": [np.nan, 3, np.nan, 5]})
    labels = plots.loss_curve(steps).get_legend_handles_labels()[1]
    assert [label.split(" (")[0] for label in labels] == ["training, a", "training, b", "held out", "kept: step 2"]
    assert len(plots.loss_curve(steps.drop(columns=["val", "loss_b"])).lines) == 2


def test_a_picture_is_shown_from_memory_or_from_its_file(tmp_path):
    pixels = grey(1)[0].repeat(2, axis=1)
    plt.imsave(tmp_path / "p.png", pixels)
    for image in (pixels, tmp_path / "p.png"):
        assert plots.picture(image).images[0].get_array().shape[:2] == (8, 16)


def counted(arms, same=()):
    rows = [(arm, label, 15 if label == "b" else 100, 0 if arm in same or label == "a" else 30, 0) for arm in arms for label in "ab"]
    return pd.DataFrame(rows, columns=["arm", "label", "real", "synthetic", "recoloured"])


def test_arms_that_train_on_the_same_tiles_share_a_bar():
    ax = arm_plots.arm_tiles(counted(["real", "oversampled", "more", "augmented"], same=("real", "oversampled", "more")))
    assert [text.get_text().strip() for text in ax.texts] == ["every arm: 100", "real, oversampled, more: 15", "augmented: 15 + 30"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    many = arm_plots.arm_tiles(counted([f"arm{i}" for i in range(17)], same=[f"arm{i}" for i in range(5)]))
    assert [text.get_text().strip() for text in many.texts][1:] == [
        "arm0, arm1, arm2 and 2 more: 15",
        "arm5, arm6, arm7 and 9 more: 15 + 30",
    ]


@pytest.mark.parametrize("n", [3, 17])
def test_recall_and_curves_of_many_arms_stay_on_a_page(n):
    arms = [f"arm{i}" for i in range(n)]
    recall = pd.DataFrame(
        [(arm, s, label, 0.5, 9) for arm in arms for s in (0, 1) for label in "ab"], columns=["arm", "seed", "label", "recall", "tiles"]
    )
    ax = arm_plots.arm_recall(recall)
    assert ax.figure.get_size_inches()[1] < 8 and bool(ax.images) == (n > 6)
    history = pd.DataFrame(
        [(arm, s, step, 0.5) for arm in arms for s in (0, 1) for step in (10, 20)], columns=["arm", "seed", "step", "val_balanced_accuracy"]
    )
    ax = arm_plots.arm_curves(history)
    means = [line for line in ax.lines if line.get_label() in arms]
    assert len({str(line.get_color()) for line in means}) == n, "an arm has a colour of its own"


def test_the_acceptance_curve_counts_from_the_nearest_tile_outwards():
    scores = pd.DataFrame({"label": "a", "centroid": [0.3, 0.1, 0.2, 0.4], "centroid_rank": [2, 1, 1, 1]})
    scores["status"] = ["rejected", "kept", "rejected", "kept"]
    ax = distribution_plots.acceptance_curve(scores)
    kept, own = ax.get_lines()
    np.testing.assert_allclose(kept.get_ydata(), [1, 1 / 2, 1 / 3, 2 / 4])
    np.testing.assert_allclose(own.get_ydata(), [1, 1, 2 / 3, 3 / 4])
    assert kept.get_xdata()[-1] == 1
