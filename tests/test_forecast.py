"""What a dry run says of time, disk and files: counted from parameters, priced by this machine, corrected by earlier runs."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import squares
from tiny import write_hub_layout

from histokit import cli, toy
from histokit.core import files, machine
from histokit.engine import forecast, jobs, speed
from histokit.runs import notebooks, recipe, workload
from histokit.training import settings

COUNTS = forecast.Counts(train=500, held=300, tail_train=24, tail=("fat", "mucin"), classes=6, tile_px=128)
RATES = speed.Rates(start=10, read=0.01, see={"e": 0.5}, head=0.1, train=2, denoise=3, code=7, lora_bytes=100, latent_bytes=1000)


def job(repository, stem, step="", class_name="", known=True, **parameters):
    path = repository / "notebooks" / f"{stem}.ipynb"
    given = {name: p.default for name, p in notebooks.declared(path).items()} | {"encoder": "e"} | parameters
    return jobs.Job(step or stem, class_name, path, repository, given, (), known)


def units(one, found=()):
    return forecast.work(one, [one, *found], COUNTS)


def test_every_notebook_has_a_rule_or_is_known_to_have_none(repository):
    stems = {path.stem for path in (repository / "notebooks").glob("*.ipynb")}
    assert stems == set(forecast.RULES)


def test_a_prior_takes_its_updates_and_the_views_that_they_can_draw(repository):
    told = {"part": "prior", "init": "mini", "steps": 50, "batch_size": 4}
    found, longer = (units(job(repository, "20_pretrain", **told | {"steps": steps})) for steps in (50, 5000))
    n = COUNTS.train + COUNTS.loose
    assert found["train"] >= 200 and longer["train"] - found["train"] >= 4 * 4950
    assert found["latents"] == n * max(1, min(8, 200 // n)) and longer["latents"] == 8 * n
    for other in ({"part": "encoder"}, {"part": "prior", "network": "paper", "init": "", "autoencoder": "mini"}):
        assert forecast.work(job(repository, "20_pretrain", **other), [], COUNTS) is None, "nobody has measured that"


def test_an_encoder_that_a_step_trains_is_tried_as_minis(repository):
    arms = {"a": {"encoder": "ssl"}, "b": {}}
    found = [job(repository, "20_pretrain", part="encoder"), job(repository, "06_classifier", arms=arms)]
    found[0] = dataclasses.replace(found[0], step="ssl")
    assert ("real", "mini-ssl") in forecast.work(found[1], found, COUNTS)
    assert {arm["encoder"] for p in forecast._asked(found) for arm in p.get("arms", {}).values()} == {"mini-ssl", ""}


@pytest.mark.parametrize(("changes", "passes"), [({}, 20), ({"guidance_scale": 1.0}, 10), ({"strength": 1.0}, 40), ({"num_images": 8}, 20)])
def test_a_set_of_images_takes_its_true_steps_twice_under_guidance(repository, changes, passes):
    settings = {"num_images": 4, "num_inference_steps": 20, "strength": 0.5, "guidance_scale": 2.0} | changes
    found = units(job(repository, "03_img2img", class_name="fat", **settings))
    assert found["denoise"] == settings["num_images"] * passes
    assert found["files"] == settings["num_images"] + forecast.HOUSEKEEPING and found["start"] == 1
    more = units(job(repository, "03_img2img", class_name="fat", tried={"strength": [0.25, 0.5], "guidance_scale": [1, 2]}, **settings))
    each = min(settings["num_images"], workload.TRIED)
    assert more["denoise"] - found["denoise"] == each * 3 * (5 + 10) and more["code"] - found["code"] == 2 * each * 4


def test_a_guided_image_costs_three_passes_a_step_and_update(repository):
    guide = job(repository, "06_classifier", "guide", arms={"guide": {}}, seeds=1)
    settings = {"num_images": 4, "num_inference_steps": 20, "updates": 5, "guidance_scale": 3.0}
    whole, last = (
        units(job(repository, "04_guided", class_name="fat", **settings, options=given), [guide]) for given in ({}, {"last_steps": 5})
    )
    assert whole["denoise"] == 4 * 6 * 20 * 2 * 3 and whole["see", "e"] == whole["code"] == 2 * 4 * 6 * 3
    assert last["denoise"] == 4 * 6 * 5 * 2 * 3 + 4 * 15 * 2 and last["code"] == whole["code"]
    assert (
        units(job(repository, "04_guided", class_name="fat", **settings | {"guidance_scale": 1.0}), [guide])["denoise"]
        == whole["denoise"] / 2
    )


def test_training_grows_with_steps_and_batch(repository):
    one, other = (units(job(repository, "02_lora", class_name="all", steps=steps, batch_size=4)) for steps in (100, 300))
    assert other["train"] - one["train"] == pytest.approx(800) and one["latents"] == 8 * 24


def test_sheets_and_validations_cost_what_a_recipe_asks_for_and_nothing_where_it_asks_for_none(repository):
    usual, same, none = (
        units(job(repository, "02_lora", class_name="fat", steps=200, options=options))
        for options in ({}, settings.pace(200), {"validate_every": 0, "sheet_every": 0})
    )
    assert usual == same and usual["train"] - none["train"] == pytest.approx((10 + 4) * settings.HELD_OUT_DRAWS / 3)
    assert usual["denoise"] - none["denoise"] == 4 * settings.SHEET_SAMPLES * settings.SHEET_STEPS * 2


def test_real_tiles_are_seen_once_and_synthetic_ones_by_every_arm_that_has_them(repository):
    made = job(repository, "03_img2img", class_name="fat", num_images=30), job(repository, "03_img2img", class_name="mucin", num_images=30)
    kept = [dataclasses.replace(job(repository, "05_select", class_name=one.class_name, source="03_img2img")) for one in made]
    judge = job(repository, "06_classifier", "judge", arms={"judge": {}}, seeds=1)
    arms = {"real": {}, "dose": {"synthetic": "05_select", "per_class": 3}, "all": {"synthetic": "05_select"}, "far": {"encoder": "f"}}
    compared = job(repository, "06_classifier", arms=arms, seeds=6, steps=500)
    found = [judge, *made, *kept, compared]
    first, *_, last = speed.once([forecast.work(one, found, COUNTS) for one in found])
    assert first["real", "e"] == 8 * 500 + 300 and last["real", "e"] == 0 and last["real", "f"] == 8 * 500 + 300
    assert last["made", "e", "05_select"] == 8 * 60 and last["head"] == 4 * 6 * 500
    assert speed.cost(last, RATES)[0] is None, "nobody knows how fast f is"
    full = units(job(repository, "06_classifier", arms={"full": {"mode": "full"}}, seeds=2, steps=100, batch_size=8))
    assert full["see", "e"] == 3 * 2 * 100 * 8 + 2 * 10 * 100 and not full["head"]


def test_a_step_whose_classes_are_not_known_counts_once_for_each(repository):
    settings = {"num_images": 5, "num_inference_steps": 10, "strength": 0.5}
    one, both = (units(job(repository, "03_img2img", known=known, **settings)) for known in (True, False))
    assert both == {name: 2 * number for name, number in one.items()}


def test_the_price_is_a_sum():
    held = Counter(
        {"start": 1, "train": 4, ("see", "e"): 2, ("real", "e"): 4, "seconds": 5, "bytes": 9, "latents": 2, "loras": 3, "files": 6}
    )
    price = speed.cost(held, RATES)
    assert price == (10 + 8 + 1 + 2 + 5, 9 + 2000 + 300, 6)
    assert speed.cost(held, dataclasses.replace(RATES, train=None))[0] is None


def test_counts_come_from_the_description_until_00_has_run(repository, root):
    text = (repository / "params/demo.yaml").read_text()
    (root / "params" / "demo.yaml").write_text(text)
    files.write_text(root / "params/datasets/toy.yaml", (repository / "params/datasets/toy.yaml").read_text())
    found = recipe.read(root / "params/demo.yaml")
    at = {one.step: one for one in jobs.expand(found)}
    counted = forecast.counts(found, at["02_lora"])
    assert (
        counted.tail == ("mucinous", "cribriform")
        and counted.classes == 8
        and counted.train + counted.held == len(toy.plan())
        and counted.tail_train == 20
    )
    assert forecast.counts(found, SimpleNamespace(step="02_lora", notebook=at["02_lora"].notebook)) == counted


def test_counts_come_from_the_manifest_once_00_has_run(repository, root, capsys, measured):
    squares.dataset({"train": {"red": 9, "blue": 4}, "val": {"red": 3, "blue": 2}, "test": {"blue": 5}}, experiment="study")
    text = """steps:
  - 00_dataset
  - 03_img2img: {num_images: 7, lora: ""}
  - 06_classifier: {arms: {real: {}}, seeds: 2}
"""
    (root / "params" / "study.yaml").write_text(text)
    found = recipe.read(root / "params/study.yaml")
    one = next(job for job in jobs.expand(found) if job.step == "06_classifier")
    assert forecast.counts(found, one) == forecast.Counts(13, 10, 4, ("blue",), len(squares.CLASSES), squares.PX)
    assert cli.main(["run", str(root / "params/study.yaml"), "--dry-run"]) == 0
    assert "unknown" not in capsys.readouterr().out and len(measured) == 1


def test_a_dry_run_measures_once_and_an_earlier_run_knows_better(repository, root, measured, monkeypatch):
    (root / "params" / "demo.yaml").write_text((repository / "params/demo.yaml").read_text())
    files.write_text(root / "params/datasets/toy.yaml", (repository / "params/datasets/toy.yaml").read_text())
    found = recipe.read(root / "params/demo.yaml")
    every = jobs.expand(found)
    todo = [one.id for one in every]
    nothing, _ = forecast.expect(found, every, todo, measure=False)
    assert measured == [] and all(guess.seconds is None for guess in nothing.values())
    first, lacking = forecast.expect(found, every, todo, say=lambda line: None)
    again, _ = forecast.expect(found, every, todo, say=pytest.fail)
    assert first == again and lacking == "" and [base for base, *_ in measured] == ["mini"]
    assert all(guess.seconds > 0 and guess.files for guess in first.values())
    lora = next(one for one in every if one.step == "02_lora")
    for steps, seconds in ((lora.parameters["steps"], 77.0), (50, 5.0)):
        given = lora.parameters | {"steps": steps, "experiment": "other", "seed": 9}
        files.write_json(root / f"outputs/other{steps}/02_lora/all/run.json", {"status": "done", "wall_s": seconds, "parameters": given})
    guess = forecast.expect(found, every, todo)[0][lora.id]
    assert guess.seconds == 77.0 and guess.files == 1


def test_a_base_that_a_step_trains_is_measured_as_the_one_it_goes_on_from(repository, root, measured):
    squares.dataset(experiment="study")
    text = """steps:
  - 00_dataset
  - decoder: {run: 20_pretrain, part: decoder, init: mini, steps: 5}
  - 03_img2img: {num_images: 7, lora: "", base_model: decoder}
"""
    (root / "params" / "study.yaml").write_text(text)
    found = recipe.read(root / "params/study.yaml")
    every = jobs.expand(found)
    made = next(one for one in every if one.step == "03_img2img")
    assert "decoder" in [step for step, _ in made.parents]
    guess = forecast.expect(found, every, [made.id])[0][made.id]
    assert [base for base, *_ in measured] == ["mini"] and guess.seconds > 0


def test_a_base_that_is_not_there_is_named_and_the_rest_is_known(tmp_path):
    found = REAL("models/none", 2, ["colour-texture"], "cpu", 0.1)
    assert "models/none" in found.lacking and found.train is None and found.see["colour-texture"] > 0 and found.start > 0


def test_what_was_measured_on_a_busy_machine_is_used_said_and_not_kept(root, measured, monkeypatch):
    said = []
    for busy in (True, True, False, False):
        monkeypatch.setattr(machine, "busy", lambda busy=busy: busy)
        assert speed.rates([{"base_model": "mini"}], say=said.append).denoise == 0.05
    assert len(measured) == 3 and ["it was busy" in line for line in said] == [True, True, False]


def test_every_rate_is_measured_on_a_base(tmp_path):
    write_hub_layout(tmp_path / "tiny")
    found = REAL(str(tmp_path / "tiny"), 2, ["colour-texture"], "cpu", 0.1)
    assert (
        found.lacking == ""
        and min(found.read, found.head, found.train, found.denoise, found.code, found.lora_bytes, found.latent_bytes) > 0
    )


REAL = speed.measure_all  # as it is before any test puts another in its place
