"""Guided tiles as files: made once, resumed to the same bits, each with its history; and the judge that did not guide."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from PIL import Image
from test_guidance import QUICK, Eye
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.generate import guidance, guided, guides, img2img, policies, synthetic
from histokit.runs import selection_reasons
from histokit.select import guide_check, screening
from histokit.show.panel import preview_worker
from histokit.tiles import data
from histokit.vision import classifiers, encoders, features  # fmt: skip

SETTINGS = guidance.Settings.of(QUICK | {"num_inference_steps": 3, "loss_steps": 1})


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def tiles(monkeypatch):
    """A finished 00_dataset, and two finished classifiers of random eyes: `guide` and `judge`."""
    squares.dataset()
    monkeypatch.setattr(encoders, "SmallCNN", Eye)
    for seed, step in enumerate(("guide", "judge")):
        run = runs.start(experiment="exp", step=step)
        train(run.path("only", "0", "model.json").parent, seed)
        run.finish({})
    return data.load(runs.start(experiment="exp", step="look"))


def train(folder, seed, classes=squares.CLASSES, **facts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = features.Encoder("cnn", Eye(256), 256, {"eye": seed})
        model = classifiers.Classifier(encoder, classes, "full", tile_px=32, fit="resize")
        torch.nn.init.normal_(model.head.out.weight, std=3.0)
    told = {"key": str(seed), "n_synthetic": 0, "class_counts": [5, 5, 5], "val_balanced_accuracy": 0.5}
    settings = {"sampler": "balanced", "loss": "cross_entropy", "weights": "none", "drw": 0.0, "mixture": "none"}
    model.save(folder, **told, settings=settings, **facts)


def start(step="04_guided", **options):
    return runs.start(experiment="exp", step=step, class_name="blue", **options)


def table(model, tiles, count=5, **options):
    how = {"policy": "none", "guidance_scale": 3.0, "num_inference_steps": 3, **options}
    return policies.job_table(model, tiles, {"blue": "blue gland"}, count, **how)


def render(model, tiles, run, count=5, batch=2, settings=SETTINGS, **options):
    guide = guided.load_guide(run, "guide", squares.CLASSES)
    return guided.render(model, guide, table(model, tiles, count), run, tiles, settings, batch=batch, **options)


def pixels(rows):
    return np.stack([np.asarray(Image.open(path)) for path in rows["path"]])


def test_every_job_becomes_a_tile_that_carries_its_history(model, tiles):
    run = start()
    rows = render(model, tiles, run)
    assert list(rows["tile_id"]) == [f"04_guided/blue-{files.slug('blue').split('-')[-1]}-{i:05d}" for i in range(5)]
    asked = table(model, tiles)
    assert rows["seed"].tolist() == asked["seed"].tolist() and rows["prompt"].tolist() == asked["prompt"].tolist()
    assert rows["label"].eq("blue").all() and rows[["lora_sha", "token_sha"]].equals(asked[["lora_sha", "token_sha"]])
    assert rows["method"].eq("guided").all() and rows["source"].eq("synthetic").all() and rows["sources"].eq("[]").all()
    for row in rows.to_dict("records"):
        scores, settings, facts = json.loads(row["scores"]), json.loads(row["settings"]), synthetic.facts(row["path"])
        assert scores["stop"] == "updates" and len(facts["way"]) == 3 and scores["guide"] == max(facts["way"])
        assert scores["guide_plain"] == facts["way"][0] and facts["way"][scores["updates"]] == scores["guide"]
        assert settings["loss"] == "log_conf" and settings["batch"] == 2 and len(settings["guide"]) == 16
    way = guided.paths(rows)
    assert len(way) == 15 and way.groupby("tile_id")["chosen"].sum().eq(1).all()
    said = guided.remarks(rows, run)
    assert said[0].startswith("5 tiles, ") and said[-1].endswith(" s a tile.")
    run.finish(data.without_memory(rows))
    again = data.load(start("look"), step="04_guided", class_name="blue")
    assert np.array_equal(pixels(again), pixels(rows))


def test_the_twin_of_a_guided_tile_is_the_unguided_one_of_the_same_number(model, tiles):
    rows = render(model, tiles, start())
    plain = img2img.render(model, table(model, tiles), start("03_img2img"), tiles, batch=2)
    assert np.abs(guided.plain(rows).astype(int) - pixels(plain)).max() <= 1
    assert (pixels(rows) != pixels(plain)).any()


def test_a_run_that_was_killed_goes_on_to_the_same_bits_and_makes_nothing_twice(model, tiles, monkeypatch):
    whole = render(model, tiles, start("whole"))
    count, optimise = [], guidance.optimise

    def dies(*args, **given):
        for result in optimise(*args, **given):
            count.append(result.job.name)
            if len(count) == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(guidance, "optimise", dies)
    run = start("broken")
    with pytest.raises(KeyboardInterrupt):
        render(model, tiles, run)
    assert len(list(run.folder.glob("tiles/*.png"))) == 2
    again = render(model, tiles, run)
    assert len(count) == 3 + 3 and np.array_equal(pixels(again), pixels(whole))
    render(model, tiles, run)
    assert len(count) == 6
    more = render(model, tiles, run, count=7)
    assert len(count) == 8 and np.array_equal(pixels(more)[:5], pixels(whole))


def test_another_setting_guide_or_prompt_makes_a_tile_again(model, tiles, monkeypatch):
    run, asked, optimise = start(), [], guidance.optimise
    monkeypatch.setattr(
        guidance,
        "optimise",
        lambda m, g, queues, *rest, **given: asked.append(sum(map(len, queues))) or optimise(m, g, queues, *rest, **given),
    )
    render(model, tiles, run, 2)
    render(model, tiles, run, 2, settings=guidance.Settings.of(QUICK | {"num_inference_steps": 3, "loss_steps": 1, "lr": 0.2}))
    train(run.parent("guide") / "only" / "0", 5)
    render(model, tiles, run, 2)
    assert asked == [2, 2, 2]


def test_out_of_memory_halves_the_batch_says_so_and_makes_the_same_images(model, tiles, monkeypatch):
    monkeypatch.setattr(guided.parallel, "count", lambda *_: 1)  # as on a GPU
    whole, said, optimise = render(model, tiles, start("whole"), count=6, batch=4), [], guidance.optimise

    def small(model, guide, queues, *rest, **given):
        if given["batch"] > 2:  # however many batches go side by side
            yield next(optimise(model, guide, queues, *rest, **given))
            raise torch.OutOfMemoryError("planted")
        yield from optimise(model, guide, queues, *rest, **given)

    monkeypatch.setattr(guidance, "optimise", small)
    run = start("full")
    rows = render(model, tiles, run, count=6, batch=4, say=said.append)
    assert said == ["out of memory: going on with 2 images at a time"] and run.record["notes"]["batch"] == 2
    assert list(rows["seed"]) == list(whole["seed"]) and np.abs(guided.plain(rows).astype(int) - guided.plain(whole)).max() <= 1
    assert np.abs(pixels(rows).astype(int) - pixels(whole)).mean() < 1
    monkeypatch.setattr(guidance, "optimise", lambda *args, **given: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(torch.OutOfMemoryError):
        render(model, tiles, start("hopeless"), batch=2, say=said.append)
    assert said[-1] == "out of memory: going on with 1 image at a time"


def test_a_job_that_comes_to_nothing_is_named_and_has_no_row(model, tiles, monkeypatch):
    optimise, said = guidance.optimise, []

    def broken(*args, **given):
        for result in optimise(*args, **given):
            if result.job.name.endswith("00001"):
                result = guidance.Result(result.job, stop="latent not finite at update 0, step 2 of 3")
            yield result

    monkeypatch.setattr(guidance, "optimise", broken)
    run = start()
    rows = render(model, tiles, run, say=said.append)
    assert len(rows) == 4 and not rows["tile_id"].str.endswith("00001").any()
    assert said == [f"{table(model, tiles)['job'][1]}: latent not finite at update 0, step 2 of 3; there is no such tile"]


@pytest.mark.parametrize("updates", [0, 2])
def test_a_tile_tells_what_was_drawn_before_it(model, tiles, updates):
    settings = dataclasses.replace(SETTINGS, candidates=4, updates=updates)
    rows, alone = (
        render(model, tiles, start(), settings=settings),
        render(model, tiles, start("plain"), settings=dataclasses.replace(SETTINGS)),
    )
    for row, other in zip(rows.to_dict("records"), alone.to_dict("records"), strict=True):
        facts = synthetic.facts(row["path"])
        assert guided.score(row, "draws") == 4 == len(facts["drawn"]) and guided.score(row, "guide_plain") == facts["drawn"][0]
        assert facts["way"][0] == max(facts["drawn"]) and guided.score(row, "guide") == max(facts["way"])
        assert guided.score(other, "draws") == 1 and guided.score(other, "guide_plain") == facts["drawn"][0]
    assert np.array_equal(guided.plain(rows), guided.plain(alone)), "the twin is the first candidate"
    way = guided.paths(rows)
    assert len(way) == 5 * (4 + updates) and way.groupby("tile_id")["chosen"].sum().eq(1).all()
    assert way["update"].min() == -4 and way.loc[way["chosen"], "confidence"].tolist() == [
        guided.score(row, "guide") for row in rows.to_dict("records")
    ]
    assert guided.remarks(rows, start("said"))[0].startswith("5 tiles, 4.0 drawn and ")
    shown = guided.trajectory(model, guided.load_guide(start("look"), "guide", squares.CLASSES), table(model, tiles).iloc[0], settings)
    assert len(shown.frames) == 4 + (updates + 1 if updates else 0)
    assert float(f"{shown.confidence[shown.chosen]:.3g}") == pytest.approx(guided.score(rows.iloc[0], "guide"), rel=1e-2)


def test_only_text_alone_and_only_classes_the_guide_knows(model, tiles):
    run, guide = start(), guided.load_guide(start("look"), "guide", squares.CLASSES)
    from_tiles = table(model, tiles, 2, policy="same_class", strength=0.7)
    with pytest.raises(ValueError, match="starts from noise; make the job table with policy: none"):
        guided.render(model, guide, from_tiles, run, tiles, SETTINGS)
    with pytest.raises(ValueError, match="the guide does not know the class 'pink'"):
        guided.render(model, guide, table(model, tiles, 1).assign(**{"class": "pink"}), run, tiles, SETTINGS)
    with pytest.raises(ValueError, match="guide arm 'best' is not in guide, which has only; set guide_arm"):
        guided.load_guide(run, "guide", squares.CLASSES, "best")


def test_the_way_of_one_tile_can_be_looked_at_stopped_and_gone_again(model, tiles):
    guide, jobs = guided.load_guide(start("look"), "guide", squares.CLASSES), table(model, tiles)
    show = guided.Previewer(model, guide, jobs, SETTINGS)
    way = show.way()
    assert way.frames.shape == (3, 32, 32, 3) and len(way.confidence) == 3 and way.stop == "updates" and show.way() is way
    (alone,) = render(model, tiles, start("alone"), 1, batch=1)["path"]
    assert np.abs(way.frames[way.chosen].astype(int) - np.asarray(Image.open(alone))).max() <= 1
    fewer = show(updates=1.0)
    assert fewer.sources is None and len(show.way(updates=1).frames) == 2 and np.array_equal(show.way(updates=1).frames, way.frames[:2])
    steps, frames = [], []
    again = guided.Previewer(model, guide, jobs, SETTINGS)
    assert again.known() is None
    drawn = again(on_step=lambda k, n, shown: (steps.append((k, n)), frames.append(shown)))
    assert [n for _, n in steps] == [9] * len(steps) and max(steps) == (9, 9), "three pictures of three steps"
    assert np.array_equal(np.stack([frame for frame in frames if frame is not None]), way.frames)
    assert np.array_equal(again.known().images, drawn.images)

    early = guided.Previewer(model, guide, jobs, SETTINGS)
    shown = early(on_step=lambda k, n, shown: shown is not None and k > 3)
    assert shown.ended == {"updates": 1} and early.known(updates=1) is not None and early.known() is None
    assert np.array_equal(shown.images[0], show.way(updates=1).frames[show.way(updates=1).chosen]), "as if one update had been asked for"

    def enough(k, n, shown):
        if k == 4:
            raise preview_worker.Cancelled

    with pytest.raises(preview_worker.Cancelled):
        again(updates=1, on_step=enough)
    assert again.known(updates=1) is None and again.known() is not None
    stopped = guided.trajectory(model, guide, jobs.iloc[0], SETTINGS, on_frame=lambda k, frame, p: k == 1)
    assert stopped.stop == "stopped by hand" and stopped.chosen == 1 and np.array_equal(stopped.frames, way.frames[:2])


# --- the gate --------------------------------------------------------------------------------------------------------


def panel(step):
    return screening.judges(start("look"), step)


def test_a_guide_may_not_judge_what_it_steered(model, tiles):
    rows = render(model, tiles, start())
    with pytest.raises(ValueError, match="guide steered these tiles, so it cannot judge them"):
        guide_check.refuse(panel("guide"), rows, "guide")
    guide_check.refuse(panel("judge"), rows, "judge")
    guide_check.refuse(panel("guide"), img2img.render(model, table(model, tiles), start("03_img2img"), tiles), "guide")


def test_the_judge_is_asked_about_guided_tiles_and_their_twins(model, tiles):
    settings = guidance.Settings.of(QUICK | {"num_inference_steps": 3, "loss_steps": 1, "confidence": 1e-6})
    rows, judge = render(model, tiles, start(), settings=settings), panel("judge")
    decisions = pd.DataFrame({"status": "kept", "reason": ""}, index=rows.index)
    blurred = {"code": "blurred", "sharpness": 1.0, "cut": 2.0}
    disagrees = {"code": "judge", "asked": "blue", "seen": "red", "probability": 0.1, "cut": 0.5}
    decisions.loc[[0, 1], ["status", "reason"]] = ["rejected", selection_reasons.write([blurred, disagrees])]
    decisions.loc[2, ["status", "reason"]] = ["rejected", selection_reasons.write([blurred])]
    found = guide_check.judged(rows, judge, decisions)
    (row,) = found.to_dict("records")
    assert (row["tiles"], row["sure"], row["agreed"], row["kept"]) == (5, 5, 3, 2)
    column = squares.CLASSES.index("blue")
    assert row["judge"] == pytest.approx(np.median(judge[0].predict(pixels(rows))[:, column]), abs=1e-5)
    assert row["judge_plain"] == pytest.approx(np.median(judge[0].predict(guided.plain(rows))[:, column]), abs=1e-5)
    (said,) = guide_check.remarks(found)
    assert said.startswith("blue: of 5 tiles the guide was sure of, the judge agrees with 3, 60 % [") and "2 convinced only" in said
    none = guide_check.judged(rows.assign(method="text2img"), judge, decisions)
    assert none.empty and list(guide_check.remarks(none)) == []


def test_what_a_kept_tile_cost_is_told_and_remembered_where_nothing_is_left_to_make(model, tiles):
    run = start()
    rows = render(model, tiles, run)
    run.finish(data.without_memory(rows))
    rate = run.record["notes"]["images_per_s"]
    decisions = pd.DataFrame({"status": ["kept", "kept", "rejected", "rejected", "rejected"]}, index=rows.index)
    made_by = start("look").parents("04_guided").values()
    (row,) = guide_check.cost(rows, decisions, made_by).to_dict("records")
    assert (row["class"], row["tiles"], row["kept"]) == ("blue", 5, 2)
    assert row["seconds"] == pytest.approx(1 / rate) and row["seconds_kept"] == pytest.approx(5 / rate / 2)
    assert guide_check.cost(rows, decisions.assign(status="rejected"), made_by)["seconds_kept"].tolist() == [float("inf")]
    unknown = guide_check.cost(rows.assign(run_id="other"), decisions, made_by)
    assert unknown[["seconds", "seconds_kept"]].isna().all(axis=None) and unknown["kept"].tolist() == [2]
    assert guide_check.cost(rows.head(0), decisions.head(0), made_by).empty
    again = start()  # the same once more: nothing is made, and the rate stays known
    assert len(render(model, tiles, again)) == 5
    assert again.record["notes"]["images_made"] == 0 and again.record["notes"]["images_per_s"] == rate


def test_what_the_guide_is_can_be_read(tiles):
    guide = guided.load_guide(start("look"), "guide", squares.CLASSES)
    shown = guided.described(guide, ["blue"])
    assert shown["training tiles of the guide"].tolist() == [5] and "sampler balanced" in shown["trained with"][0]
    assert isinstance(guide, guides.Pictures) and guide.side == 32
