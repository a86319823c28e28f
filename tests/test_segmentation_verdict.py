"""The verdict per patient: figures by second definitions, patients without foreground, planted effects found and no effect not found."""

import numpy as np
import pandas as pd
import pytest

from histokit.core import files
from histokit.evaluate import question, segmentation


def planted(root, gains, patients=24, seeds=4, draws=(0,), generators=(0,), seed=0, empty=0):
    """Folders with scores.parquet of arms whose Dice lies about 0.6 + gain; returns {(draw, generator): folder}."""
    rng = np.random.default_rng(seed)
    level, folders = rng.normal(0, 0.1, patients), {}
    for d in draws:
        for g in generators:
            folder = root / f"exp-d{d}-g{g}" / "31_segmentation"
            folders[d, g] = folder
            for arm, gain in gains.items():
                for s in range(seeds):
                    rows = []
                    for p in range(patients + empty):
                        for t in range(2):
                            size = 0 if p >= patients else 1000
                            hit = int(size * np.clip(0.6 + gain + level[p % patients] + rng.normal(0, 0.03), 0, 1))
                            told = {
                                "tile_id": f"p{p}_{t}",
                                "case_id": f"p{p}",
                                "label": "ab"[p % 2],
                                "split": "test",
                                "arm": arm,
                                "seed": s,
                            }
                            told["gen_seed"] = g
                            rows += [told | {"layer": "ground", "layer_id": 0, "tp": 9000, "fp": size - hit, "fn": size - hit}]
                            rows += [told | {"layer": "gland", "layer_id": 1, "tp": hit, "fp": size - hit, "fn": size - hit}]
                    files.write_table(folder / arm / str(s) / "scores.parquet", pd.DataFrame(rows))
    return folders


def test_figures_are_those_of_numpy_and_weights_are_copies():
    rng = np.random.default_rng(0)
    dice = rng.uniform(size=(5, 20))
    mean, tenth, sd = segmentation.figures(dice)
    assert mean == pytest.approx(dice.mean()) and sd == pytest.approx(dice.std(axis=1, ddof=1).mean())
    assert tenth == pytest.approx(np.sort(dice, axis=1)[:, 1].mean())  # the second of twenty
    times, runs = rng.integers(0, 3, 20), np.array([1, 0, 2, 1, 1])
    copied = np.repeat(dice, times, axis=1)
    found = segmentation.figures(dice, times.astype(float), runs.astype(float))
    assert found[0] == pytest.approx(np.average(copied.mean(1), weights=runs))
    assert found[2] == pytest.approx(np.average(copied.std(1, ddof=1), weights=runs))


def test_a_gain_is_found_with_its_interval_and_no_gain_is_not(root):
    found = segmentation.read(planted(root, {"real": 0.0, "better": 0.06, "same": 0.0}), ["real"])
    m = segmentation.measure(found, resamples=400)
    better, same = (segmentation.difference(m, arm, "real") for arm in ("better", "same"))
    assert better.outcome == "more" and better.low < 0.06 < better.high and better.p < 0.01
    assert same.outcome == "none" and same.low < 0 < same.high
    assert found.of("real").shape == (4, 24) and found.layers == ["gland"]
    table = segmentation.table(m).set_index("arm")
    assert table.loc["better", "dice"] == pytest.approx(table.loc["real", "dice"] + better.difference)
    assert (table["least"] < table["tenth"]).all() and (table["tenth"] < table["dice"]).all() and (table["iou"] < table["dice"]).all()


def test_patients_without_foreground_are_left_out_and_counted(root):
    whole = segmentation.read(planted(root / "a", {"real": 0.0, "other": 0.01}), ["real"])
    more = segmentation.read(planted(root / "b", {"real": 0.0, "other": 0.01}, empty=3), ["real"])
    assert more.without == 3 and len(more.patients) == 24 == len(whole.patients) and more.tiles == 54
    said = segmentation.conclude(segmentation.measure(more, resamples=50), roles())["sentence"]
    assert "3 patients without any foreground left out" in said


def roles(generated=True, rivals=()):
    return question.Roles("real", "other", list(rivals), generated, "30_style_layout" if generated else "", "kept")


def test_helps_is_kept_for_several_draws_generators_and_all_rivals(root):
    arms = {"real": 0.0, "other": 0.08, "stained": 0.03}
    one = segmentation.conclude(
        segmentation.measure(segmentation.read(planted(root / "1", arms), ["real"]), resamples=200), roles(rivals=["stained"])
    )
    assert one["sentence"].startswith("For this one draw and generator, other segments better than real: mean Dice of 24 patients")
    assert "better also than stained, the best of the arms without synthetic tiles" in one["sentence"]
    assert "the tenth percentile of patients" in one["sentence"] and "the deviation between them" in one["sentence"]
    folders = planted(root / "2", arms, draws=(0, 1, 2), generators=(0, 1))
    m = segmentation.measure(segmentation.read(folders, ["real"]), resamples=200)
    many = segmentation.conclude(m, roles(rivals=["stained"]), draws=3, generators=2)
    assert many["sentence"].startswith("other helps: over 3 draws and 2 generator seeds it segments better than real")
    assert len(m.scores.runs) == 24
    worse = segmentation.conclude(
        segmentation.measure(segmentation.read(planted(root / "3", {"real": 0.0, "other": -0.08}), ["real"])), roles()
    )
    assert "other hurts: it segments worse than real" in worse["sentence"]


def test_few_patients_have_no_interval(root):
    found = segmentation.read(planted(root, {"real": 0.0, "other": 0.2}, patients=5), ["real"])
    said = segmentation.conclude(segmentation.measure(found, resamples=50), roles())["sentence"]
    assert (
        said.startswith("Too few patients to say, for this one draw and generator, whether other segments better than real")
        and "[" not in said
    )


def test_the_order_of_rows_and_files_has_no_say(root):
    folders = planted(root, {"real": 0.0, "other": 0.03}, seeds=3)
    before = segmentation.read(folders, ["real"])
    for path in folders[0, 0].glob("*/*/scores.parquet"):
        files.write_table(path, files.read_table(path).sample(frac=1, random_state=1))
    after = segmentation.read(folders, ["real"])
    assert (before.counts == after.counts).all() and before.layers == after.layers


def test_arms_that_were_judged_on_other_tiles_are_refused(root):
    folders = planted(root, {"real": 0.0, "other": 0.03}, seeds=3)
    path = folders[0, 0] / "other" / "1" / "scores.parquet"
    files.write_table(path, files.read_table(path).iloc[2:])
    with pytest.raises(ValueError, match="other/1 of draw 0, generator 0 was judged on other test tiles"):
        segmentation.read(folders, ["real"])
    with pytest.raises(FileNotFoundError, match="no scores.parquet of arm 'gone'"):
        segmentation.read(folders, ["gone"])


def test_the_hardest_patients_come_first(root):
    m = segmentation.measure(segmentation.read(planted(root, {"real": 0.0, "other": 0.05}), ["real"]), resamples=50)
    found = segmentation.hardest(m, "other", 5)
    assert found["other"].is_monotonic_increasing and found["other"].iloc[0] == pytest.approx(m.scores.of("other").mean(0).min())
