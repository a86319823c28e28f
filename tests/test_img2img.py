"""Job tables that can be checked by eye, and images that survive kills, extensions and other batch sizes."""

import json

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from PIL import Image
from tiny import tiny_model

from histokit import runs
from histokit.core import files
from histokit.diffusion import adapters, backbone, latents, learned_tokens, sampling
from histokit.generate import img2img, policies
from histokit.tiles import data, staining

TERMS = {"blue": "blue gland"}
FEW = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def tiles():
    """Nine real tiles of each class: six in train, one group each half, two in val, one in test."""
    squares.dataset(
        {"train": dict.fromkeys(squares.CLASSES, 6), "val": dict.fromkeys(squares.CLASSES, 2), "test": dict.fromkeys(squares.CLASSES, 1)}
    )
    run = start("look")
    found = data.load(run)
    found["group"] = ["5" if int(name.split("/")[-1][0]) % 3 == 2 else "1" for name in found["file_name"]]
    return found


def start(step="03_img2img", **options):
    return runs.start(experiment="exp", step=step, class_name="blue", **options)


def jobs(model, tiles, count=10, **options):
    return img2img.job_table(model, tiles, TERMS, count, **FEW | options)


def pixels(rows):
    return np.stack([np.asarray(Image.open(path)) for path in rows["path"]])


# --- the table


def prompts(*rows):
    return pd.DataFrame(rows, columns=["prompt_id", "label", "text", "share"])


def test_each_image_asks_for_the_prompt_that_is_most_behind_and_starts_from_a_tile_that_has_it(model, tiles):
    own = data.training(tiles).query("label == 'blue'").sort_values("tile_id")["tile_id"].tolist()
    captioned = pd.Series([3, 3, 3, 7, 7, 7], index=own)
    table = prompts((3, "blue", "dark", 0.75), (7, "blue", "pale", 0.25), (9, "red", "red", 1.0))
    found = jobs(model, tiles, 8, prompts=table, captioned=captioned)
    assert found["prompt_id"].value_counts().to_dict() == {3: 6, 7: 2} and found["number"].tolist() == list(range(8))
    assert found["prompt"].tolist() == found["prompt_id"].map({3: "dark", 7: "pale"}).tolist()
    assert (found["tile_id"].map(captioned) == found["prompt_id"]).all()
    assert found.groupby("tile_id").size()[own[:3]].tolist() == [2, 2, 2], "all tiles of a prompt in turn"
    pd.testing.assert_frame_equal(jobs(model, tiles, 5, prompts=table, captioned=captioned), found.head(5))
    plain = jobs(model, tiles, 8)
    assert plain["seed"].tolist() == found["seed"].tolist() and set(plain["prompt_id"]) == {-1}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([(9, "red", "red", 1.0)], {}, "no prompt of 'blue' is asked for"),
        ([(3, "blue", "dark", 0.0)], {}, "no prompt of 'blue' is asked for"),
        ([(5, "blue", "pale", 1.0)], {}, "finds no training tile of the prompt 'pale'"),
        (
            [(3, "blue", "dark", 1.0)],
            {"policy": "majority_to_minority", "minority": ["5"], "prompt": "{label} {group}"},
            "captions have none",
        ),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(model, tiles, rows, options, said):
    own = data.training(tiles).query("label == 'blue'")["tile_id"]
    with pytest.raises(ValueError, match=said):
        jobs(model, tiles, 4, prompts=prompts(*rows), captioned=pd.Series(3, index=own), **options)


@pytest.mark.parametrize("text", ["2/2", "x", "1/0", "-1/2", "1"])
def test_a_shard_that_is_none_is_refused(model, tiles, text):
    with pytest.raises(ValueError, match="expected k/n"):
        policies.part(jobs(model, tiles, 4), text, 2)


def test_shards_are_whole_batches_and_all_of_them_together(model, tiles):
    table = jobs(model, tiles, 10)
    parts = [policies.part(table, f"{k}/3", 2) for k in range(3)]
    assert pd.concat(parts).sort_index().equals(table) and policies.part(table, "0/1", 2).equals(table)
    assert [sorted(set(part["number"] // 2)) for part in parts] == [[0, 3], [1, 4], [2]]


def test_every_use_of_a_tile_wears_the_stain_of_another_case_and_never_one_of_val_or_test(model, tiles):
    train = data.training(tiles)
    own = train.set_index("tile_id")["case_id"]
    for stains, lenders in (("all", train), ("head", train[train["label"].ne("blue")])):
        table = jobs(model, tiles, 18, stains=stains, head=["red", "green"])
        assert set(table["stain"]) <= set(lenders["case_id"]) and (table["stain"] != table["tile_id"].map(own)).all()
        assert table.groupby("tile_id")["stain"].nunique().eq(3).all(), "three uses, three stains"
        few = jobs(model, tiles, 5, stains=stains, head=["red", "green"])
        pd.testing.assert_frame_equal(few, table.head(5))
    assert set(jobs(model, tiles, 3)["stain"]) == {""}


def test_the_group_in_a_prompt_is_that_of_the_case_whose_stain_is_worn(model, tiles):
    train = data.training(tiles)
    table = jobs(model, tiles, 18, stains="all", prompt="{label}, {group}", group_terms={"1": "pale", "5": "dark"})
    of_case = train.groupby("case_id")["group"].first()
    assert set(table["target_group"]) == {"1", "5"} and (table["target_group"] == table["stain"].map(of_case)).all()
    assert all(row.prompt.endswith({"1": "pale", "5": "dark"}[row.target_group]) for row in table.itertuples())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stains": "tail"}, "stains 'tail' is unknown"),
        ({"stains": "all", "policy": "none"}, "policy none has none"),
        ({"stains": "all", "stain_method": "vahadane"}, "stain method 'vahadane' is unknown"),
    ],
)
def test_stains_that_cannot_be_worn_are_refused(model, tiles, options, said):
    with pytest.raises(ValueError, match=said):
        jobs(model, tiles, 3, **options)


def test_stains_of_one_case_alone_are_refused(model, tiles):
    with pytest.raises(ValueError, match="no second training case"):
        jobs(model, tiles.assign(case_id="one"), 3, stains="all")


def test_an_image_starts_from_the_tile_in_the_stain_that_its_row_names(model, tiles):
    """At strength 0 an image is its source: so it shows the stain of the donor, and its row says whose."""
    run = start()
    table = jobs(model, tiles, 4, stains="head", head=["red"], strength=0.0)
    made = img2img.render(model, table, run, tiles)
    restain = staining.Restainer(data.training(tiles))
    by_name = tiles.set_index("tile_id", drop=False)
    for row, name in zip(made.to_dict("records"), table["tile_id"], strict=True):
        settings = json.loads(row["settings"])
        assert settings["stain"] in set(tiles.query("label == 'red' and split == 'train'")["case_id"])
        assert json.loads(row["sources"]) == [name] and row["label"] == "blue"
        dyed = restain(by_name.loc[name], settings["stain"], model.tile_px)
        assert dyed.mean((0, 1))[0] > dyed.mean((0, 1))[2], "red tissue, of a blue tile"
    expected = backbone.encode(
        model, data.to_float(np.stack([restain(by_name.loc[r.tile_id], r.stain, model.tile_px) for r in table.itertuples()]))
    )
    sources = img2img.Sources(model, table, tiles)
    torch.testing.assert_close(sources.latents(list(table.itertuples())), expected[0] * model.scaling, atol=1e-4, rtol=1e-4)
    undyed = jobs(model, tiles, 4, strength=0.0)
    assert not set(made["sha256"]) & set(img2img.render(model, undyed, start("other"), tiles)["sha256"])


def test_every_tile_of_the_class_is_used_equally_often_and_never_one_of_val_or_test(model, tiles):
    table = jobs(model, tiles, 13)
    used = table["tile_id"].value_counts()
    assert set(used.index) == set(data.training(tiles, "blue")["tile_id"]) and set(used) == {2, 3}
    assert table["tile_id"].iloc[:6].nunique() == 6
    for policy in ("same_class", "cross_class", "diverse", "nearest", "majority_to_minority"):
        options = {"minority": ["5"]} if policy == "majority_to_minority" else {}
        table = jobs(model, tiles, 30, policy=policy, prompt="{label}, {group}", strength=0.75, embed=rng, **options)
        assert set(tiles.set_index("tile_id").loc[table["tile_id"], "split"]) == {"train"}


def rng(rows):
    return np.stack([np.random.default_rng(files.seed(name)).normal(size=4) for name in rows["tile_id"]])


def test_asking_for_more_images_keeps_the_first_ones(model, tiles):
    for policy in ("same_class", "cross_class", "diverse", "nearest"):
        few, many = (jobs(model, tiles, n, policy=policy, embed=rng, strength=0.75) for n in (7, 20))
        pd.testing.assert_frame_equal(few, many.head(7))


def test_rows_have_their_own_seeds_and_say_everything(model, tiles):
    table = jobs(model, tiles, 50)
    assert table["seed"].is_unique and table["job"].is_unique and set(table["true_steps"]) == {2}
    assert table["seed"][3] == files.seed(0, "blue", 3)
    assert list(table["prompt"].unique()) == ["a histology image of blue gland"]
    assert not set(table["seed"]) & set(jobs(model, tiles, 50, seed=1)["seed"])


def test_cross_class_takes_head_classes_and_keeps_the_wanted_label(model, tiles):
    table = jobs(model, tiles, 12, policy="cross_class", head=["red"], strength=0.75)
    assert set(table["source_class"]) == {"red"} and set(table["class"]) == {"blue"}
    assert set(jobs(model, tiles, 12, policy="cross_class", strength=0.75)["source_class"]) == {"red", "green"}


def test_a_label_from_words_alone_needs_strength(model, tiles):
    for policy in ("cross_class", "nearest"):
        with pytest.raises(ValueError, match=f"policy {policy} takes the label from the prompt alone, and at strength 0.5"):
            jobs(model, tiles, policy=policy, embed=rng)


def test_majority_to_minority_names_the_group_it_asks_for(model, tiles):
    table = jobs(
        model, tiles, 8, policy="majority_to_minority", minority=["5", "6"], prompt="{label} of {group}", group_terms={"5": "dark skin"}
    )
    assert set(table["source_group"]) == {"1"} and table["target_group"].value_counts().to_dict() == {"5": 4, "6": 4}
    assert set(table["prompt"]) == {"blue gland of dark skin", "blue gland of 6"}
    with pytest.raises(ValueError, match="names the"):
        jobs(model, tiles, policy="majority_to_minority", minority=["5"])
    with pytest.raises(ValueError, match=r"its groups are \['1', '5'\]"):
        jobs(model, tiles, policy="majority_to_minority", minority=["5"], majority=["9"], prompt="{label} {group}")


def test_nearest_with_a_minority_stays_in_the_class_and_asks_for_the_minority(model, tiles):
    table = jobs(model, tiles, 8, policy="nearest", minority=["5"], prompt="{label}, scanner {group}", embed=rng)
    assert set(table["source_class"]) == {"blue"} and set(table["source_group"]) == {"1"} and set(table["target_group"]) == {"5"}
    assert set(table["prompt"]) == {"blue gland, scanner 5"}


def test_an_adapter_that_never_heard_of_groups_is_not_asked_for_one(tiles, tmp_path):
    asked = {"policy": "majority_to_minority", "minority": ["5"], "prompt": "{label}, scanner {group}"}
    for prompt, refused in (("a histology image of {label}", True), ("{label}, scanner {group}", False)):
        model = tiny_model()
        adapters.add_lora(model, 2)
        adapters.save(tmp_path / str(refused), model, {"blue": ""}, tiles.head(1), lora=True, settings={"prompt": prompt})
        loaded = adapters.load(tiny_model(), tmp_path / str(refused))
        if refused:
            with pytest.raises(ValueError, match=r"learned the captions 'a histology image of \{label\}', which name no \{group\}"):
                jobs(loaded, tiles, **asked)
        else:
            assert set(jobs(loaded, tiles, **asked)["target_group"]) == {"5"}


def test_nearest_takes_the_most_similar_and_diverse_the_least(model, tiles):
    place = {name: k for k, name in enumerate(sorted(tiles["tile_id"]))}

    def embed(rows):  # on a circle, so that neighbours in the list are similar
        angle = np.array([place[name] for name in rows["tile_id"]]) / len(place) * np.pi
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    anchors = [place[name] for name in data.training(tiles, "blue")["tile_id"]]
    order = jobs(model, tiles, 8, policy="nearest", embed=embed, strength=0.75)["tile_id"]
    gaps = [min(abs(place[name] - a) for a in anchors) for name in order]
    assert gaps == sorted(gaps)
    first = jobs(model, tiles, 3, policy="diverse", embed=embed)["tile_id"]
    assert {place[name] for name in first} >= {min(anchors), max(anchors)}
    with pytest.raises(ValueError, match="needs `embed`"):
        jobs(model, tiles, policy="nearest", strength=0.75)


def test_a_quota_fills_a_class_up(model, tiles):
    assert len(jobs(model, tiles, 99, fill_to=20)) == 14 and len(jobs(model, tiles, 99, fill_to=5)) == 0


def test_what_cannot_be_done_is_refused_with_the_remedy(model, tiles):
    with pytest.raises(ValueError, match=r"policy 'best' is unknown; use same_class"):
        jobs(model, tiles, policy="best")
    with pytest.raises(ValueError, match="no denoising step at all; raise num_inference_steps"):
        jobs(model, tiles, strength=0.2)
    with pytest.raises(ValueError, match=r"no \{label\}"):
        jobs(model, tiles, prompt="tissue")
    with pytest.raises(ValueError, match="finds no training tile of 'pink'"):
        img2img.job_table(model, tiles, {"pink": "pink"}, 3)


# --- the images


def test_the_manifest_tells_where_every_image_comes_from(model, tiles):
    run = start()
    table = jobs(model, tiles, 5)
    made = img2img.render(model, table, run, tiles)
    assert made["tile_id"].is_unique and set(made["root"]) == {"03_img2img"} and set(made["status"]) == {"kept"}
    assert [json.loads(s) for s in made["sources"]] == [[name] for name in table["tile_id"]]
    assert json.loads(made["settings"][0])["true_steps"] == 2 and made["seed"].tolist() == table["seed"].tolist()
    assert (made["width"].eq(32) & made["mpp"].eq(1.0)).all()  # 64 px of 0.5 um on 32 px
    assert [files.sha256(path) for path in made["path"]] == made["sha256"].tolist()
    run.finish(data.without_memory(made))
    again = data.load(start("later"), step="03_img2img", class_name="blue")
    assert np.array_equal(data.pixels(again, 32), pixels(made))


def test_how_hard_the_prompt_pulled_is_kept_with_every_image(model, tiles):
    run = start()
    rows = img2img.render(model, jobs(model, tiles, 5), run, tiles, batch=2)
    pulls = [json.loads(text)["prompt_pull"] for text in rows["scores"]]
    assert len(set(pulls)) == 5 and min(pulls) > 0
    again = img2img.render(model, jobs(model, tiles, 6), run, tiles, batch=2)
    assert again["scores"].tolist()[:5] == rows["scores"].tolist(), "read from the pictures that were there"
    run.finish(again)
    plain = img2img.render(model, jobs(model, tiles, 2, guidance_scale=1.0), start("other"), tiles)
    assert set(plain["scores"]) == {"{}"}


def test_an_interrupted_set_ends_as_an_uninterrupted_one(model, tiles, monkeypatch):
    table, write = jobs(model, tiles, 11), files.write_png
    run = start("whole")
    whole = img2img.render(model, table, run, tiles)

    for step, limit in (("cut0", 0), ("cut1", 5), ("cut2", 8)):
        left = [limit]

        def dies(path, *rest, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return write(path, *rest)

        run = start(step)
        monkeypatch.setattr(files, "write_png", dies)
        with pytest.raises(KeyboardInterrupt):
            img2img.render(model, table, run, tiles)
        run._lock.release()
        monkeypatch.setattr(files, "write_png", write)
        run = start(step)
        assert run.record["attempt"] == 2
        again = img2img.render(model, table, run, tiles)
        assert np.array_equal(pixels(again), pixels(whole))
        assert run.record["notes"]["images_reused"] == limit


def test_more_images_later_make_only_the_new_ones(model, tiles):
    run = start(num_images=6)
    few = img2img.render(model, jobs(model, tiles, 6), run, tiles)
    run.finish(data.without_memory(few))
    run = start(num_images=13)
    many = img2img.render(model, jobs(model, tiles, 13), run, tiles)
    assert (run.record["notes"]["images_reused"], run.record["notes"]["images_made"]) == (6, 7)
    assert many["sha256"].tolist()[:6] == few["sha256"].tolist()
    assert np.array_equal(pixels(many), pixels(img2img.render(model, jobs(model, tiles, 13), start("fresh"), tiles)))


@pytest.mark.parametrize("change", [{"guidance_scale": 3.0}, {"prompt": "an image of {label}"}, {"seed": 1}, {"strength": 0.8}])
def test_an_image_of_other_settings_is_not_reused(model, tiles, change):
    run = start()
    img2img.render(model, jobs(model, tiles, 3), run, tiles)
    run.finish()
    run = start(other=str(change))
    img2img.render(model, jobs(model, tiles, 3, **change), run, tiles)
    assert run.record["notes"]["images_reused"] == 0


def test_images_are_remade_when_the_code_that_made_them_changed(model, tiles, monkeypatch):
    run = start()
    img2img.render(model, jobs(model, tiles, 2), run, tiles)
    run.finish()
    for module in (sampling, latents):
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
        run = start(other=module.__name__)
        img2img.render(model, jobs(model, tiles, 2), run, tiles)
        assert run.record["notes"]["images_reused"] == 0
        run.finish()


def test_images_are_remade_when_the_weights_or_the_source_changed(tiles):
    model = tiny_model()
    run = start()
    img2img.render(model, jobs(model, tiles, 2), run, tiles)
    assert img2img.render(model, jobs(model, tiles, 2), run, tiles) is not None and run.record["notes"]["images_made"] == 0
    model.identity = {**model.identity, "unet": "another"}
    img2img.render(model, jobs(model, tiles, 2), run, tiles)
    assert run.record["notes"]["images_made"] == 2
    img2img.render(model, jobs(model, tiles, 2), run, tiles.assign(sha256="0" * 64))
    assert run.record["notes"]["images_made"] == 2


def test_the_batch_size_and_the_order_of_the_jobs_do_not_matter(model, tiles):
    table = jobs(model, tiles, 9)
    made = {batch: pixels(img2img.render(model, table, start(f"b{batch}"), tiles, batch=batch)).astype(int) for batch in (1, 4, 5)}
    assert abs(made[1] - made[4]).max() <= 1 and abs(made[1] - made[5]).max() <= 1
    shuffled = table.sample(frac=1, random_state=3)
    other = img2img.render(model, shuffled, start("shuffled"), tiles, batch=4)
    order = other["tile_id"].str.split("/").str[1].argsort()
    assert np.array_equal(pixels(other.iloc[order]), made[4])


def test_a_part_of_the_table_gives_the_same_images(model, tiles):
    table = jobs(model, tiles, 9)
    whole = pixels(img2img.render(model, table, start("whole"), tiles))
    part = img2img.render(model, table.iloc[[2, 7]], start("part"), tiles)
    assert np.array_equal(pixels(part), whole[[2, 7]])


def test_strength_0_is_the_round_trip_and_strength_1_ignores_the_source(model, tiles):
    still = img2img.render(model, jobs(model, tiles, 4, strength=0), start("still"), tiles)
    rows = tiles.set_index("tile_id").loc[jobs(model, tiles, 4)["tile_id"]]
    mean, _ = backbone.encode(model, data.to_float(data.pixels(rows, 32)))
    assert abs(pixels(still).astype(int) - backbone.decode(model, mean * model.scaling)).max() <= 1
    free = img2img.render(model, jobs(model, tiles, 4, strength=1), start("free"), tiles)
    other = jobs(model, tiles, 4, strength=1, policy="cross_class")
    assert np.array_equal(pixels(img2img.render(model, other, start("other"), tiles)), pixels(free))
    none = img2img.render(model, jobs(model, tiles, 4, policy="none"), start("none"), tiles)
    assert np.array_equal(pixels(none), pixels(free)) and set(none["method"]) == {"text2img"} and set(none["sources"]) == {"[]"}


def test_a_val_or_test_tile_is_refused_even_if_a_table_names_it(model, tiles):
    table = jobs(model, tiles, 2)
    for split in ("val", "test"):
        leak = tiles.loc[tiles["split"].eq(split), "tile_id"].iloc[0]
        with pytest.raises(ValueError, match=f"tile of {split}, labelled; only real labelled training tiles"):
            img2img.render(model, table.assign(tile_id=leak), start(split), tiles)
    withheld = tiles.assign(use=tiles["use"].where(tiles["tile_id"].ne(table["tile_id"][0]), "withheld"))
    with pytest.raises(ValueError, match="tile of train, withheld; only real labelled"):
        img2img.render(model, table, start("withheld"), withheld)
    with pytest.raises(ValueError, match="is not in the manifest"):
        img2img.render(model, table.assign(tile_id="gone"), start("gone"), tiles)


def test_the_preview_is_the_first_batch_bit_for_bit(model, tiles):
    table = jobs(model, tiles, 9)
    show = img2img.previewer(model, table, tiles)
    before = show(strength=0.9, guidance_scale=4.0)
    preview = show(strength=0.75, guidance_scale=3.0)
    made = img2img.render(model, jobs(model, tiles, 9, strength=0.75, guidance_scale=3.0), start(), tiles)
    assert preview.true_steps == 3 and len(preview.images) == 4
    assert np.array_equal(preview.images, pixels(made)[:4]) and not np.array_equal(before.images, preview.images)
    assert np.array_equal(preview.sources, data.pixels(tiles.set_index("tile_id").loc[table["tile_id"].iloc[:4]], 32))
    assert np.array_equal(show().images, img2img.previewer(model, table, tiles)().images)
    steps = show.sweep([0.25, 0.75], guidance_scale=3.0)
    assert abs(steps[1].astype(int) - preview.images[0]).max() <= 1


def test_tiles_tried_under_other_settings_are_those_that_would_be_written(model, tiles):
    table = jobs(model, tiles, 6)
    found = img2img.tried(model, table.iloc[[1, 0, 5, 2]], tiles, strength=0.75, guidance_scale=3.0)
    made = img2img.render(model, jobs(model, tiles, 6, strength=0.75, guidance_scale=3.0), start(), tiles)
    assert np.array_equal(found, pixels(made)[[1, 0, 5, 2]])


def test_a_preview_of_another_seed_is_the_batch_of_that_seed(model, tiles):
    table = lambda seed: jobs(model, tiles, 6, seed=seed)  # noqa: E731
    show = img2img.previewer(model, table(0), tiles, table=table)
    assert show.known(seed=4) is None, "nothing is looked up while somebody waits"
    preview = show(strength=0.75, seed=4)
    made = img2img.render(model, jobs(model, tiles, 6, seed=4, strength=0.75), start(), tiles)
    assert np.array_equal(preview.images, pixels(made)[:4])
    assert list(preview.jobs["tile_id"]) == list(table(4)["tile_id"][:4]) != list(table(0)["tile_id"][:4])
    assert np.array_equal(show.known(seed=4, strength=0.75).images, preview.images)
    assert np.array_equal(show(seed=0).images, show().images)
    (point,) = show.sweep([0.75], job=1, seed=4)
    assert abs(point.astype(int) - preview.images[1]).max() <= 1
    with pytest.raises(ValueError, match="another seed is another job table"):
        img2img.previewer(model, table(0), tiles)(seed=4)


def test_tokens_and_lora_shape_the_images_and_are_named_in_the_rows(tiles, tmp_path):
    model = tiny_model()
    name = learned_tokens.placeholder("blue")
    tokens = learned_tokens.add_tokens(model, {name: torch.randn(2, 32)})
    scrambled = adapters.add_lora(model, 2)
    for k, p in enumerate(scrambled):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 0.3
    adapters.save(tmp_path / "lora", model, {"blue": name}, tiles.head(1), tokens=tokens.vectors(), lora=True)
    plain, tuned = tiny_model(), adapters.load(tiny_model(), tmp_path / "lora")
    table = jobs(tuned, tiles, 2)
    assert set(table["prompt"]) == {f"a histology image of {name}"} and all(table["lora_sha"]) and all(table["token_sha"])
    made = img2img.render(tuned, table, start("tuned"), tiles)
    assert made["lora_sha"].tolist() == table["lora_sha"].tolist()
    assert not np.array_equal(pixels(made), pixels(img2img.render(plain, jobs(plain, tiles, 2), start("plain"), tiles)))


def test_the_metadata_list_survives_export_and_import(tmp_path):
    rows = pd.DataFrame(
        {"file_name": ["a b/ü.png", "c.png"], "label": ["x", "y"], "group": ["5", "6"], "prompt": ["a <hk-x>, dark", 'say "hi"']}
    )
    img2img.export_json(tmp_path / "m.json", rows.assign(seed=1))
    pd.testing.assert_frame_equal(img2img.import_json(tmp_path / "m.json"), rows)
    assert sorted(files.read_json(tmp_path / "m.json")[0]) == ["image_path", "label", "prompt", "skin_type"]
    files.write_json(tmp_path / "bad.json", [{"image_path": "a.png", "label": "x"}])
    with pytest.raises(ValueError, match=r"bad.json, entry 0: no skin_type, prompt"):
        img2img.import_json(tmp_path / "bad.json")
