import numpy as np
import pytest
import squares
import torch
from PIL import Image

from histokit import runs
from histokit.arms import comparison
from histokit.core import files
from histokit.tiles import augment, data, staining

STAINS = torch.nn.functional.normalize(torch.tensor([[0.60, 0.75, 0.28], [0.10, 0.95, 0.30]], dtype=torch.float64), dim=1)


REFERENCE = augment.STAINS[:2].double()


def tissue(stains=REFERENCE, strength=(1.0, 1.0), seed=0, px=64):
    """uint8 [1, px, px, 3] of pure mixtures of two stains, a fifth of it glass; and the amounts [px * px, 2]."""
    rng = np.random.default_rng(seed)
    share = rng.beta(0.5, 0.5, px * px)  # many pixels of nearly one stain alone
    amounts = np.stack([share, 1 - share], 1) * rng.uniform(0.3, 1.0, (px * px, 1)) * np.array(strength)
    amounts[: px * px // 5] = 0
    images = augment.from_optical_density(torch.tensor(amounts) @ stains)
    return (images * 255).round().to(torch.uint8).reshape(1, px, px, 3).numpy(), amounts


@pytest.mark.parametrize("method", staining.METHODS)
def test_a_tile_in_its_own_stain_stays_as_it_is(method):
    measure, paint = staining.HOW[method]
    pixels, _ = tissue()
    look = measure(pixels)
    assert np.abs(paint(pixels, look, look).astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("method", staining.METHODS)
def test_a_tile_takes_the_look_of_the_other(method):
    measure, paint = staining.HOW[method]
    (pixels, _), (other, _) = tissue(seed=1), tissue(STAINS, (0.6, 0.8), seed=2)
    wanted = measure(other)
    got = measure(paint(pixels, measure(pixels), wanted))
    assert (got - wanted).abs().max() < 0.05 < (measure(pixels) - wanted).abs().max()


def test_reinhard_uses_the_published_matrices():
    lab = staining._lab(torch.ones(1, 3, dtype=torch.float64))  # white: L = M = S = 1 up to rounding, so all logarithms vanish
    assert lab.abs().max() < 2e-3
    grey = staining._lab(torch.full((1, 3), 0.1, dtype=torch.float64))  # l = (3 log10 0.1) / sqrt 3, no colour
    assert grey[0].tolist() == pytest.approx([-(3**0.5), 0, 0], abs=3e-3)


def test_macenko_finds_the_stains_a_tile_was_drawn_with_haematoxylin_first():
    for stains in (augment.STAINS[:2].double(), STAINS, STAINS.flip(0)):
        look = staining.macenko_look(tissue(stains, seed=3)[0])
        found, drawn = look[:2], stains if stains[0, 0] > stains[1, 0] else stains.flip(0)
        angle = torch.rad2deg(torch.acos((found * drawn).sum(1).clamp(max=1)))
        assert angle.max() < 4, f"{angle} degrees off"


def test_macenko_measures_how_strongly_a_tile_was_stained_and_leaves_glass_white():
    weak, strong = (staining.macenko_look(tissue(strength=(s, s), seed=4)[0]) for s in (0.5, 1.0))
    assert (strong[2, :2] / weak[2, :2]).tolist() == pytest.approx([2, 2], rel=0.06)
    pixels, amounts = tissue(seed=4)
    painted = staining.macenko(pixels, strong, weak).reshape(-1, 3)
    assert (painted[amounts.sum(1) == 0] >= 254).all()
    assert painted[amounts.sum(1) > 0.3].mean() > pixels.reshape(-1, 3)[amounts.sum(1) > 0.3].mean() + 20, "half the stain is lighter"


def test_one_colour_alone_falls_back_on_the_reference_stains_and_glass_alone_is_refused():
    flat = np.full((1, 32, 32, 3), (150, 60, 150), np.uint8)
    assert torch.equal(staining.macenko_look(flat)[:2], augment.STAINS[:2].double())
    for measure, _ in staining.HOW.values():
        with pytest.raises(ValueError, match="0 stained pixels"):
            measure(np.full((1, 32, 32, 3), 250, np.uint8))


@pytest.fixture
def run(root):
    squares.dataset({"train": {"red": 6, "green": 6, "blue": 4}, "val": {"red": 2}, "test": {"blue": 2}})
    run = runs.start(experiment="exp", step="06_classifier", seed=1)
    yield run
    run.finish({})


def test_an_arm_gets_recoloured_tiles_of_the_rare_class_in_stains_of_other_cases(run):
    tiles = data.load(run)
    arms = comparison.settle(
        {"real": {}, "few": {"recolour": "reinhard", "per_class": 3}, "many": {"recolour": "reinhard", "per_class": 9}}
    )
    sets = comparison.assemble(run, tiles, arms)
    few, many = (sets[name][sets[name]["source"].eq("recoloured")] for name in ("few", "many"))
    assert set(many["label"]) == {"blue"} and len(few) == 3 and few["tile_id"].isin(many["tile_id"]).all()
    assert len(set(many["sha256"])) == 9, "the second round of a tile wears another stain"
    pixels = data.pixels(many)
    own = data.pixels(data.training(tiles, "blue"))
    changed = np.abs(pixels.mean((1, 2)) - own.mean((0, 1, 2))).max(axis=1) > 30
    assert 5 <= changed.sum() < 9, "most donors are of another colour here, one case is blue as well"
    assert all(files.sha256(path) == sha for path, sha in zip(many["path"], many["sha256"], strict=True))
    told = comparison.remarks(arms, sets, tiles)
    assert not any(line.startswith("Arm") for line in told), "same codec, same size, all tiles that were asked for"
    for path in data.training(tiles)["path"]:
        Image.open(path).resize((80, 80)).save(path)
    said = comparison.remarks(arms, sets, tiles)[0]
    assert said.startswith("Arms few, many: real tiles are PNG 80 x 80 px, added ones PNG 64 x 64 px")
    table = comparison.counts(sets, squares.CLASSES).set_index(["arm", "label"])
    assert table.loc[("many", "blue")].tolist() == [4, 0, 9] and table.loc[("real", "blue")].tolist() == [4, 0, 0]


def test_recoloured_tiles_are_the_same_again_and_other_with_another_seed(run):
    real = data.training(data.load(run))
    one, again = (staining.tiles(run, real, ["blue"], "macenko", 4)["sha256"].tolist() for _ in range(2))
    run.seed += 1
    other = staining.tiles(run, real, ["blue"], "macenko", 4)["sha256"].tolist()
    run.seed -= 1
    assert one == again != other


def test_a_class_that_cannot_be_recoloured_is_named(run):
    real = data.training(data.load(run))
    alone = real[real["label"].eq("blue")].assign(case_id="one")
    with pytest.raises(ValueError, match="no other case, or too little tissue in the 4 training tiles of blue"):
        staining.tiles(run, alone, ["blue"], "reinhard", 2)
