"""The tiles that look least like their label: what is compared with what, and a planted tile that is found."""

import pandas as pd
import pytest
import squares
import torch
from tiny import tiny_model

from histokit import runs, toy
from histokit.core import files
from histokit.diffusion import losses
from histokit.show import label_errors
from histokit.tiles import data

ONE = {"encoders": ["colour-texture"]}


@pytest.fixture
def manifest():
    squares.dataset({"train": {"red": 10, "green": 10, "blue": 10}})
    return data.load(runs.start(experiment="exp", step="look"))


def planted(manifest, at, label):
    """The manifest with one tile under another label."""
    wrong = manifest.copy()
    wrong.loc[at, "label"] = label
    return wrong


def test_a_planted_tile_comes_first_and_the_class_it_is_of_is_named(manifest):
    wrong = planted(manifest, 0, "blue")
    tiles = data.training(wrong).query("label == 'blue'")
    found = label_errors.find(tiles, wrong, **ONE)
    assert found["tile_id"].iloc[0] == manifest["tile_id"][0] and found["nearest"].iloc[0] == "red"
    assert found["margin"].iloc[0] > 0 > found["margin"].iloc[1] and set(found["tile_id"]) == set(tiles["tile_id"])
    assert label_errors.captions(found)[0].startswith("blue?\nred +") and len(label_errors.table(found)) == 11


def places(reference, own, foreign):
    """The place, from 1, that each foreign tile takes among the tiles of `own` when it bears their label."""
    found = []
    for tile in foreign["tile_id"]:
        tiles = pd.concat([own, foreign[foreign["tile_id"].eq(tile)].assign(label=own["label"].iloc[0])])
        rest = reference[~reference["tile_id"].isin(tiles["tile_id"])]
        margin = label_errors.by_features(tiles, pd.concat([tiles, rest]))["margin"].to_numpy()
        found.append(int((margin >= margin[-1]).sum()))
    return found


def test_a_planted_tile_is_found_among_ten_of_invented_tissue(root):
    rows = []
    for name in ("mucinous", "stroma", "lymphoid", "adenoma", "fat"):
        for i in range(9):
            path = root / f"{name}{i}.png"
            files.write_png(path, toy.tile(name, f"{name}{i // 2}", i)[0])
            facts = {"tile_id": path.name, "path": str(path), "sha256": files.sha256(path)}
            rows.append({**facts, "label": name, "case_id": f"{name}{i // 2}"})
    tiles = pd.DataFrame(rows).assign(mpp=0.5, tile_px=128, fit="resize")
    own, others = tiles[tiles["label"].eq("mucinous")], tiles[tiles["label"].ne("mucinous")]
    found = places(tiles, own, others.groupby("label").head(2))
    assert len(found) == 8 and found.count(1) >= 6, found  # by chance 0.8


def test_a_planted_tile_is_found_among_ten_of_real_tissue(repository):
    folder = repository.parent / "shared" / "data" / "ebhi-seg"
    if not folder.is_dir():
        pytest.skip(f"ebhi_seg is not at {folder}")
    there = data.describe(repository / "params" / "datasets" / "ebhi_seg.yaml", root=folder)
    manifest = data.scan(there).query("split == 'train'")
    some = manifest.groupby("label").sample(24, random_state=0)
    some = some.assign(path=[str(folder / name) for name in some["file_name"]], tile_px=128, fit="resize")
    own = some[some["label"].eq("Serrated_adenoma")].iloc[:9]
    others = some[some["label"].isin(["Adenocarcinoma", "Polyp", "Normal"])].groupby("label").head(2)
    found = places(some[some["label"].ne("Serrated_adenoma")], own, others)
    assert len(found) == 6 and found.count(1) >= 4, found  # by chance 0.6


def test_a_tile_is_not_compared_with_its_own_case(manifest):
    """Else a case of wrongly labelled tiles vouches for itself."""
    wrong = planted(planted(manifest, 0, "blue"), 1, "blue")  # the first case of red
    assert wrong["case_id"][0] == wrong["case_id"][1]
    margin = label_errors.by_features(wrong[wrong["label"].eq("blue")], wrong, **ONE)
    assert (margin["margin"].to_numpy() > 0).tolist() == [True, True] + [False] * 10
    alone = manifest[manifest["case_id"].eq("train-blue-0") | manifest["label"].eq("red")]
    margin = label_errors.by_features(alone[alone["label"].eq("blue")], alone, **ONE)
    assert margin["margin"].isna().all() and margin["nearest"].eq("").all()


def test_one_class_alone_in_the_dataset_has_nothing_to_be_compared_with(manifest, capsys):
    blue = manifest[manifest["label"].eq("blue")]
    found = label_errors.find(blue, blue, **ONE)
    assert found["margin"].isna().all()
    label_errors.say(found)
    assert "10 have nothing to be compared with" in capsys.readouterr().out
    assert label_errors.captions(found)[0] == "blue?\nnothing to compare"


def test_the_loss_is_the_mean_of_the_errors():
    model, g = tiny_model(), torch.Generator().manual_seed(0)
    z, noise, context = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 77, 32, generator=g)
    args = model.unet, model.scheduler, z, context, torch.tensor([10, 500, 900]), noise
    with torch.no_grad():
        each = losses.diffusion_errors(*args)
        assert each.shape == (3,) and float(each.mean()) == pytest.approx(float(losses.diffusion_loss(*args, min_snr_gamma=0)))
