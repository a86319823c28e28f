"""From masks and slides to tiles with masks: what is learned, whose layout meets whose style, that colour and shape come out as asked."""

import json

import blobs
import numpy as np
import pandas as pd
import pytest
import torch

from histokit import runs
from histokit.core import files
from histokit.diffusion import conditioning, style_sampling
from histokit.fidelity import style_and_layout
from histokit.generate import style_layout, style_pairing
from histokit.metrics import segmentation
from histokit.tiles import data, masks
from histokit.training import style_layout as training

QUICK = {"network": "tiny", "batch_size": 16, "lr": 2e-3, "checkpoint_every": 50, "log_every": 25, "validate_every": 0, "sheet_every": 0}
STYLE = {"encoder": "tiny_cnn", "sampling": "random", "pictures": 3, "px": 16, "injection": "time"}


def learned(root, steps=350, style=None, folder=None, study=None, **options):
    tiles, model = blobs.study(root, **(study or {})), blobs.model()
    asked = training.Asked.of(STYLE | (style or {}), QUICK | {"steps": steps} | options)
    return (*training.fit(model, tiles, blobs.LAYERS, asked, seed=0, folder=folder), tiles, model, asked)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A model that has learned blobs, and what it learned from."""
    root = tmp_path_factory.mktemp("blobs")
    before = files.os.environ.get("HISTOKIT_ROOT")
    files.os.environ["HISTOKIT_ROOT"] = str(root)
    try:
        found, _, _, tiles, model, asked = learned(root, study={"cases": 46, "tiles": 3, "annotated": 20})
    finally:
        files.os.environ["HISTOKIT_ROOT"] = before
    return found, tiles, model, asked


@pytest.fixture
def at(told, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(told[1]["path"].iloc[0].split("/tiles/")[0]))
    return told


def maker_of(told, which="unannotated"):
    found, tiles, model, asked = told
    rows, said = style_pairing.lenders(tiles, which)
    assert said == ""
    return style_layout.Maker(found, model, blobs.LAYERS, training.annotated(tiles), style_sampling.Pool(rows, asked.sampling))


def made(maker, jobs, **how):
    settings = style_layout.Settings(**{"style_scale": 1.0, "num_inference_steps": 10, "bent": 0.0, **how})
    parts = [maker.make(jobs.loc[block], settings, 8) for block in style_layout.blocks(jobs, 8)]
    return np.concatenate([images for images, _ in parts]), np.concatenate([ids for _, ids in parts])


def test_colour_follows_the_style_and_shape_the_mask_on_slides_that_nobody_annotated(at):
    """The claim of the whole method, on tiles where both can be measured without a network."""
    maker = maker_of(at)
    jobs = style_pairing.job_table(maker.layouts, maker.pool, 24)
    images, ids = made(maker, jobs, style_scale=2.0)
    wanted = np.array(
        [style_sampling.mean_density(maker.pool.seen[[maker.pool.place[n] for n in json.loads(s)]]).mean(0) for s in jobs["styles"]]
    )
    got = style_sampling.mean_density(images)
    assert all(np.corrcoef(wanted[:, c], got[:, c])[0, 1] > 0.6 for c in range(3))
    luminance = images.mean(axis=3)
    dark = luminance < (luminance.max(axis=(1, 2), keepdims=True) + luminance.min(axis=(1, 2), keepdims=True)) / 2
    hit, extra, lost = ((dark & (ids > 0)).sum(), (dark & (ids == 0)).sum(), (~dark & (ids > 0)).sum())
    assert segmentation.iou(hit, extra, lost) > 0.7
    other = np.roll(ids, 1, axis=0)
    assert segmentation.iou((dark & (other > 0)).sum(), (dark & (other == 0)).sum(), (~dark & (other > 0)).sum()) < 0.6  # of another layout


def test_without_guidance_of_the_style_its_colour_is_not_followed(at):
    maker = maker_of(at)
    jobs = style_pairing.job_table(maker.layouts, maker.pool, 12)
    own, bare = (made(maker, jobs, style_scale=scale)[0] for scale in (2.0, 0.0))
    wanted = np.array(
        [style_sampling.mean_density(maker.pool.seen[[maker.pool.place[n] for n in json.loads(s)]]).mean(0) for s in jobs["styles"]]
    )
    alike = lambda images: np.corrcoef(style_sampling.mean_density(images).ravel(), wanted.ravel())[0, 1]  # noqa: E731
    assert alike(own) > 0.7 > 0.4 > alike(bare)


def test_an_image_follows_from_its_own_row(at):
    maker = maker_of(at)
    jobs = style_pairing.job_table(maker.layouts, maker.pool, 5, classes=["a"])
    images, ids = made(maker, jobs)
    again, same = made(maker, jobs.iloc[[3]])
    assert (again[0] == images[3]).all() and (same[0] == ids[3]).all()
    turned = jobs.assign(symmetry=(jobs["symmetry"] + 1) % 4)
    assert not (made(maker, turned)[1] == ids).all()


def test_a_killed_training_goes_on_to_the_same_bits(root, monkeypatch):
    whole, _, _, *_ = learned(root, steps=12, folder=root / "whole", checkpoint_every=5, validate_every=4)
    from histokit.training import loop

    save = loop.Training._save

    def dies(self, done):
        save(self, done)
        if done == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        learned(root, steps=12, folder=root / "cut", checkpoint_every=5, validate_every=4)
    monkeypatch.setattr(loop.Training, "_save", save)
    again, history, *_ = learned(root, steps=12, folder=root / "cut", checkpoint_every=5, validate_every=4)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert history["val"].notna().sum() == 3


def test_styles_are_left_out_as_often_as_asked(root, monkeypatch):
    tiles = blobs.study(root, cases=8, tiles=2, annotated=2)
    seen, how = [], training.Settings(style_drop=0.25, layout_drop=0.1)

    def spy(found, scheduler, z, timesteps, noise, asked, kind):
        seen.append((asked[2].clone(), (asked[0].flatten(1).sum(1) == 0).clone(), noise.mean((2, 3)).clone()))
        return torch.zeros(len(z), requires_grad=True)

    monkeypatch.setattr(training, "_error", spy)
    of = training.loss(None, blobs.model().scheduler, how)
    batch = {"latents": torch.zeros(100, 3, 8, 8), "layout": torch.ones(100, 2, 8, 8), "style": torch.zeros(100, 1, 3, 8, 8)}
    for k in range(20):
        of(batch, k, torch.Generator().manual_seed(k))
    gone, bare = (torch.cat([part[i] for part in seen]).float().mean() for i in (0, 1))
    for share, wanted in ((gone, 0.25), (bare, 0.1)):  # four deviations of 2,000 draws
        assert abs(float(share) - wanted) < 4 * (wanted * (1 - wanted) / 2000) ** 0.5
    means = torch.cat([part[2] for part in seen])
    assert float(means.std()) == pytest.approx((how.noise_offset**2 + 1 / 64) ** 0.5, rel=0.05)
    assert len(tiles)


def test_only_annotated_training_tiles_are_learned_from(root):
    tiles = blobs.study(root)
    learn = training.annotated(tiles)
    assert set(learn["split"]) == {"train"} and learn["case_id"].nunique() == 6 and masks.has(learn).all()
    assert masks.annotated(tiles, "train", every=True)["case_id"].nunique() == 8  # the upper bound
    assert set(masks.annotated(tiles, "val")["split"]) == {"val"}
    with pytest.raises(ValueError, match="no training tile has a mask"):
        training.annotated(tiles.assign(mask=""))


def test_restained_copies_wear_the_stain_of_cases_that_need_no_mask(root):
    from histokit.tiles import staining

    tiles = blobs.study(root)
    learn, every = training.annotated(tiles), data.learnable(tiles)
    rows, places, cases = staining.restained(learn, every, 2, 0)
    assert len(rows) == len(places) == len(cases) > len(learn) and places[: len(learn)] == list(range(len(learn)))
    for row, place, case in zip(rows.to_dict("records"), places, cases, strict=True):
        assert row["label"] == learn["label"].iloc[place]
        assert case == "" or (case != learn["case_id"].iloc[place] and case in set(every["case_id"]))
    assert any(case not in set(learn["case_id"]) for case in cases if case)


# --- the job table ---------------------------------------------------------------------------------------------------


def pools(root):
    tiles = blobs.study(root)
    layouts = training.annotated(tiles)
    rows, _ = style_pairing.lenders(tiles, "unannotated")
    return tiles, layouts, style_sampling.Pool(rows, style_sampling.Settings(kind="random", pictures=3, px=16))


def test_the_first_images_are_the_same_however_many_follow(root):
    _, layouts, pool = pools(root)
    few, more = (style_pairing.job_table(layouts, pool, n, seed=3) for n in (4, 9))
    for name in "ab":
        pd.testing.assert_frame_equal(
            few[few["class"].eq(name)].reset_index(drop=True), more[more["class"].eq(name)].head(4).reset_index(drop=True)
        )
    assert not style_pairing.job_table(layouts, pool, 4, seed=4)["styles"].equals(few["styles"])


def test_layouts_and_styles_are_each_used_equally_often(root):
    _, layouts, pool = pools(root)
    jobs = style_pairing.job_table(layouts, pool, 30, pairing="balanced")
    for name, own in jobs.groupby("class"):
        assert set(own["tile_id"]) == set(layouts.loc[layouts["label"].eq(name), "tile_id"])
        for counts in (own["tile_id"].value_counts(), own["style_home"].value_counts()):
            assert counts.max() - counts.min() <= 1
    homes = pool.tiles.set_index("tile_id")["case_id"]
    assert all({homes[name] for name in json.loads(row.styles)} == {row.style_home} for row in jobs.itertuples())
    own = style_pairing.job_table(layouts, pool, 30, pairing="within_class")
    case_class = pool.tiles.drop_duplicates("case_id").set_index("case_id")["label"]
    assert (own["style_home"].map(case_class) == own["class"]).all()


def test_who_lends_a_style_is_as_asked_and_never_for_testing(root):
    tiles, layouts, _ = pools(root)
    drawn = set(layouts["case_id"])
    for which, wanted in (
        ("annotated", drawn),
        ("both", {f"{c:02d}" for c in range(8)}),
        ("unannotated", {f"{c:02d}" for c in range(8)} - drawn),
    ):
        rows, said = style_pairing.lenders(tiles, which)
        assert set(rows["case_id"]) == wanted and said == ""
    with pytest.raises(ValueError, match="for test and not for training"):
        style_pairing.lenders(tiles, "test")
    rows, said = style_pairing.lenders(tiles, "test", allowed=True)
    assert set(rows["split"]) == {"test"} and said.startswith("TRANSDUCTIVE")
    with pytest.raises(ValueError, match="for val and not"):
        style_pairing.job_table(masks.annotated(tiles, "val"), None, 1)
    with pytest.raises(ValueError, match="no training tile is there to lend"):
        style_pairing.lenders(tiles.assign(annotated=True), "unannotated")


def test_a_rare_class_can_be_the_style_and_common_ones_the_layout(root):
    tiles, layouts, _ = pools(root)
    rows, _ = style_pairing.lenders(tiles, "both", classes=["b"])
    pool = style_sampling.Pool(rows, style_sampling.Settings(kind="random", pictures=2, px=16))
    jobs = style_pairing.job_table(layouts, pool, 12, classes=["b"], label="style")
    label = tiles.set_index("tile_id")["label"]
    assert set(jobs["class"]) == {"b"} and set(label[jobs["tile_id"]]) == {"a"}
    assert {label[name] for text in jobs["styles"] for name in json.loads(text)} == {"b"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pairing": "best"}, "pairing 'best' is unknown"),
        ({"label": "both"}, "label is 'both'"),
        ({"classes": ["c"]}, "class 'c' has no annotated"),
    ],
)
def test_what_a_job_table_cannot_do_is_said(root, change, said):
    _, layouts, pool = pools(root)
    with pytest.raises(ValueError, match=said):
        style_pairing.job_table(layouts, pool, 2, **change)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_set_is_written_with_masks_and_history_and_goes_on_where_it_was(at, tmp_path, monkeypatch):
    maker, (_, tiles, _, _) = maker_of(at), at
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    settings = style_layout.Settings(num_inference_steps=4, style_scale=1.0)
    jobs = style_pairing.job_table(maker.layouts, maker.pool, 6)
    run = runs.start(experiment="exp", step="30_style_layout")
    rows = style_layout.render(maker, jobs, run, tiles, settings, batch=4)
    assert len(rows) == 12 and run.record["notes"]["images_made"] == 12
    one = rows.iloc[0]
    assert one["method"] == "style_layout" and one["source"] == "synthetic" and json.loads(one["sources"])[0] == jobs["tile_id"].iloc[0]
    assert (
        json.loads(one["sources"])[1:] == json.loads(jobs["styles"].iloc[0])
        and json.loads(one["settings"])["style_home"] == jobs["style_home"].iloc[0]
    )
    ids = masks.pixels(rows, blobs.LAYERS)
    assert set(np.unique(ids)) == {0, 1} and (ids[0] == maker.mask(jobs["tile_id"].iloc[0], int(jobs["symmetry"].iloc[0]))).all()
    path = files.Path(rows["path"].iloc[7])
    first = {name: files.Path(name).read_bytes() for name in rows["path"]}
    path.unlink()
    again = style_layout.render(maker, jobs, run, tiles, settings, batch=4)
    assert {name: files.Path(name).read_bytes() for name in again["path"]} == first and run.record["notes"]["images_made"] == 1
    longer = style_pairing.job_table(maker.layouts, maker.pool, 8)
    style_layout.render(maker, longer, run, tiles, settings, batch=4)
    assert run.record["notes"]["images_made"] == 4
    other = style_layout.render(maker, jobs, run, tiles, style_layout.Settings(num_inference_steps=4, style_scale=2.0), batch=4)
    assert run.record["notes"]["images_made"] == 12 and other["tile_id"].tolist() == rows["tile_id"].tolist()
    run.finish(data.without_memory(other))
    back = files.read_table(run.folder / "manifest.csv")
    assert back["mask"].str.startswith("masks/").all()


def test_a_model_is_taken_over_from_the_step_that_trained_it(at, tmp_path, monkeypatch):
    found, _, model, asked = at
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    run = runs.start(experiment="exp", step="style")
    history = pd.DataFrame({"step": [9]})
    history.attrs["step"] = 9
    found.save(run.folder, training.facts(asked, history))
    run.finish({})
    later = runs.start(experiment="exp", step="made")
    again, sampling = style_layout.taken_over(later, "style", model, None)
    assert sampling == asked.sampling and all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert style_layout.Maker(again, model, None, pd.DataFrame({"tile_id": []}), None).identity
    seen = type("Seen", (), {"identity": "another"})()
    with pytest.raises(ValueError, match="learned with the style encoder 'tiny_cnn'"):
        style_layout.taken_over(later, "style", model, seen)


def test_a_panel_draws_a_layout_in_a_style_once(at):
    maker = maker_of(at)
    show = style_layout.Previewer(maker, style_layout.Settings(num_inference_steps=3))
    first = show(layout=0, style=1, style_scale=1.5)
    assert (
        first.images.shape == (1, blobs.PX, blobs.PX, 3) and first.sources.shape == (1, blobs.PX, 2 * blobs.PX, 3) and first.true_steps == 3
    )
    assert show.known(layout=0, style=1, style_scale=1.5) is not None and show.known(layout=0, style=0) is None
    assert not (show(layout=0, style=0, style_scale=1.5).images == first.images).all()
    limits = style_layout.sliders(show.settings, len(show.layouts), len(show.homes), free=False)
    assert "layout_scale" not in limits and limits["style"][2] == len(show.homes) - 1


# --- what came of it -------------------------------------------------------------------------------------------------


def test_followed_is_one_for_tiles_in_the_colour_of_their_style_and_none_for_others():
    rng = np.random.default_rng(0)
    wanted = rng.uniform(0.1, 0.6, (40, 3))
    rows = lambda got: pd.DataFrame(  # noqa: E731
        [
            {"tile_id": i, "channel": c, "wanted": wanted[i, k], "got": got[i, k], "other": wanted[i - 1, k]}
            for i in range(40)
            for k, c in enumerate(style_and_layout.CHANNELS)
        ]
    )
    same, half, none = (style_and_layout.followed(rows(got)) for got in (wanted, 0.5 * wanted + 0.1, rng.uniform(0.1, 0.6, (40, 3))))
    assert same["correlation"].tolist() == pytest.approx([1, 1, 1]) and same["slope"].tolist() == pytest.approx([1, 1, 1])
    assert same["distance"].max() == pytest.approx(0) and (same["of_others"] > 0.05).all()
    assert half["correlation"].tolist() == pytest.approx([1, 1, 1]) and half["slope"].tolist() == pytest.approx([0.5] * 3)
    assert none["correlation"].abs().max() < 0.45
    assert any("HARDLY" in line for line in style_and_layout.remarks(none)) and not any(
        "HARDLY" in line for line in style_and_layout.remarks(same)
    )


def test_a_style_that_carries_layout_is_found_out():
    rng = np.random.default_rng(0)
    cases, foreground = np.repeat(np.arange(20), 6), rng.uniform(size=120)
    blind = rng.normal(size=(120, 8))
    telling = np.column_stack([blind, foreground + 0.1 * rng.normal(size=120)])
    assert style_and_layout.leakage(telling, foreground, cases) > 0.8
    assert style_and_layout.leakage(blind, foreground, cases) < 0.1
    assert np.isnan(style_and_layout.leakage(blind[:6], foreground[:6], cases[:6]))
    assert "carries layout" in next(style_and_layout.remarks(pd.DataFrame(), 0.4))


def test_agreement_is_the_overlap_of_mask_and_segmenter(at, tmp_path, monkeypatch):
    maker, (_, tiles, _, _) = maker_of(at), at
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    run = runs.start(experiment="exp", step="30_style_layout")
    jobs = style_pairing.job_table(maker.layouts, maker.pool, 2, classes=["a"])
    rows = style_layout.render(maker, jobs, run, tiles, style_layout.Settings(num_inference_steps=2, style_scale=1.0), batch=2)
    ids = masks.pixels(rows, blobs.LAYERS)
    seen = ids.copy()
    assert style_and_layout.agreement(rows, seen, blobs.LAYERS)[["ground", "blob"]].to_numpy() == pytest.approx(1)
    seen[0] = 1 - seen[0]
    found = style_and_layout.agreement(rows, seen, blobs.LAYERS)
    assert found["blob"].tolist() == [0, 1]


def test_settings_that_there_are_not_are_refused_by_name():
    for given, said in (
        ({"injecton": "time"}, "did you mean 'injection'|no setting 'injecton'"),
        ({"sampling": "far"}, "style sampling 'far' is unknown"),
        ({"network": "huge"}, "network 'huge' is unknown"),
        ({"style_drop": 1.0}, "style_drop is a share"),
        ({"noise_offset": -1}, "noise_offset is -1"),
    ):
        with pytest.raises(ValueError, match=said):
            training.Asked.of({}, given)
    asked = training.Asked.of({"encoder": "mini-ssl", "sampling": "nearby", "learn": False})
    assert asked.frozen == "mini-ssl" and asked.how.encoder == "features" and asked.sampling.pictures == 1 and not asked.how.learn_style
    none = training.Asked.of({"sampling": "none"}, {"steps": 7, "guidance_rescale": 0.7}, spare=style_layout.Settings.names())
    assert none.how.aggregation == "none" and none.how.steps == 7 and none.frozen == ""
    with pytest.raises(ValueError, match="network reference halves latents 2 times"):
        training.fresh(training.Settings(network="reference"), style_sampling.Settings(), blobs_of_six(), ("a", "b"))


def blobs_of_six():
    model = blobs.model()
    model.tile_px = 24
    return model


def test_conditions_without_a_style_are_zero_and_cost_no_encoder(root):
    found, _, _, _, _, asked = learned(root, steps=2, style={"sampling": "none", "pictures": 1})
    assert asked.sampling.kind == "none" and not list(found.style.parameters())
    assert isinstance(found, conditioning.StyleLayout)
