"""Style pictures: of the right slide, of tissue, not the target, in the colours they have; and from training tiles alone."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from histokit.diffusion import style_sampling
from histokit.tiles import augment

PX = 16


@pytest.fixture
def tiles(root):
    """Three slides of two patients, a grid of 4 x 3 tiles each; a slide has a colour, and its last tile is glass."""
    rows, colours = [], {"A": (200, 80, 120), "B": (90, 40, 160), "C": (60, 120, 60)}
    for slide, colour in colours.items():
        for i in range(12):
            pixels = np.full((PX, PX, 3), 250 if i == 11 else colour, np.uint8)
            path = root / f"{slide}_{i}.png"
            Image.fromarray(pixels).save(path)
            rows.append(
                {"tile_id": path.name, "path": str(path), "tile_px": PX, "fit": "resize", "source": "real", "sha256": f"{slide}{i}",
                 "mpp": 1.0, "slide": slide, "case_id": "1" if slide in "AB" else "2", "patient": "", "split": "train", "label": slide,
                 "width": PX, "height": PX, "x": PX * (i % 4), "y": PX * (i // 4)}
            )  # fmt: skip
    return pd.DataFrame(rows).sample(frac=1, random_state=0).reset_index(drop=True)  # no order of theirs may matter


def pool(tiles, **how):
    return style_sampling.Pool(tiles, style_sampling.Settings(**{"px": PX, **how}))


def draws(of, tile_id, n=200):
    g = torch.Generator().manual_seed(0)
    return [of.tiles.iloc[of.beside(tile_id, g)] for _ in range(n)]


def test_mp_draws_lie_on_tissue_of_the_right_slide(tiles):
    of = pool(tiles, kind="mp", pictures=10, distinct=False)
    for slide in "ABC":
        drawn = pd.concat(draws(of, f"{slide}_3.png", 40))
        assert set(drawn["slide"]) == {slide} and f"{slide}_11.png" not in set(drawn["tile_id"])
        assert drawn["tile_id"].nunique() == 11  # the target's own among them
    distinct = draws(pool(tiles, kind="mp", pictures=10, distinct=True), "A_3.png", 20)
    assert all(part["tile_id"].nunique() == 10 and "A_3.png" not in set(part["tile_id"]) for part in distinct)


def test_random_draws_are_other_tiles_of_the_same_patient(tiles):
    drawn = pd.concat(draws(pool(tiles, kind="random", pictures=4), "A_3.png"))
    assert set(drawn["slide"]) == {"A", "B"} and "A_3.png" not in set(drawn["tile_id"])
    assert set(pd.concat(draws(pool(tiles, kind="random", pictures=4), "C_3.png"))["slide"]) == {"C"}


def test_nearby_keeps_its_distance(tiles):
    near = pd.concat(draws(pool(tiles, kind="nearby", pictures=1), "B_5.png"))
    assert set(near["tile_id"]) == {f"B_{i}.png" for i in (0, 1, 2, 4, 6, 8, 9, 10)}
    half = tiles.assign(x=tiles["x"] / 2, y=tiles["y"] / 2)  # neighbours share a half
    loose = pd.concat(draws(pool(half, kind="nearby", pictures=1, relative_dist=0.5), "B_5.png"))
    assert set(loose["tile_id"]) == set(near["tile_id"])
    apart = pd.concat(draws(pool(half, kind="nearby", pictures=1, relative_dist=0.5, min_shift=0.6), "B_5.png"))
    assert set(apart["tile_id"]) == {f"B_{i}.png" for i in (0, 2, 8, 10)}  # those at corners share a quarter
    alone = draws(pool(half, kind="nearby", pictures=1, relative_dist=0.2), "B_5.png", 3)
    assert all(part["tile_id"].tolist() == ["B_5.png"] for part in alone)  # none is so near: it speaks for itself


def test_a_target_without_tissue_or_companions_speaks_for_itself(tiles):
    of = pool(tiles[tiles["tile_id"].isin(["A_1.png", "C_1.png"])], kind="random", pictures=2)
    assert draws(of, "A_1.png", 1)[0]["tile_id"].tolist() == ["A_1.png"] * 2


def test_style_of_a_slide_comes_from_that_slide(tiles):
    of = pool(tiles, kind="mp", pictures=3, distinct=False)
    assert of.homes == ["A", "B", "C"]
    g = torch.Generator().manual_seed(0)
    assert set(of.tiles.iloc[of.of("C", g)]["slide"]) == {"C"}
    with pytest.raises(ValueError, match="no tile of slide 'D' lends its style; there are 3"):
        of.of("D", g)


def test_the_same_seed_draws_the_same_and_the_order_of_a_table_has_no_say(tiles):
    one, other = pool(tiles, kind="random", pictures=4), pool(tiles.sort_values("tile_id"), kind="random", pictures=4)
    names = lambda of: [part["tile_id"].tolist() for part in draws(of, "A_3.png", 5)]  # noqa: E731
    assert names(one) == names(one)
    assert {tuple(sorted(of.homes)) for of in (one, other)} == {("1", "2")}
    assert names(one) == names(other)


def test_styles_are_turned_and_bent_and_never_recoloured(tiles):
    of = pool(tiles, kind="random", pictures=4)
    g = torch.Generator().manual_seed(0)
    for bent in (0.0, 1.0):
        style = of.style([of.of("2", g)], g, bent=bent)
        assert style.shape == (1, 4, 3, PX, PX)
        colours = ((style[0] + 1) * 127.5).round().flatten(2)
        assert torch.equal(colours.amax(2), colours.amin(2)) and colours[:, :, 0].tolist() == [[60, 120, 60]] * 4
    own = pool(tiles, kind="augmented", pictures=1)
    assert own.tiles.iloc[own.beside("B_2.png", g)]["tile_id"].tolist() == ["B_2.png"]


def test_a_bent_picture_stays_within_what_it_was_and_masks_keep_their_values():
    g = torch.Generator().manual_seed(0)
    maps = augment.random_affine(64, g)
    ids = torch.randint(5, (64, 1, 12, 12), generator=g).float()
    bent = augment.warp(ids, maps, "nearest")
    assert set(bent.unique().tolist()) <= set(range(5)) and not torch.equal(bent, ids)
    assert torch.equal(augment.warp(ids, augment.random_affine(64, g, share=0.0), "nearest"), ids)
    half = augment.random_affine(4000, g, share=0.5)
    same = (half == torch.eye(2, 3)).flatten(1).all(1).float().mean()
    assert abs(float(same) - 0.5) < 0.03
    assert float(torch.linalg.det(maps[:, :, :2]).abs().min()) > 1 / 1.2**2 - 1e-4  # areas change by the square of the scale alone
    assert float(torch.linalg.det(maps[:, :, :2]).abs().max()) < 1 / 0.8**2 + 1e-4
    assert float(maps[:, :, 2].abs().max()) <= 0.2


def test_features_of_a_frozen_encoder_are_passed_as_they_are(tiles):
    seen = np.arange(len(tiles) * 5, dtype=np.float32).reshape(-1, 5)
    of = style_sampling.Pool(
        tiles, style_sampling.Settings(kind="random", pictures=2, px=PX), lambda rows: seen
    )  # of the rows as the pool holds them
    assert of.style([[3, 7], [0, 1]], torch.Generator())[0].tolist() == [seen[3].tolist(), seen[7].tolist()]


@pytest.mark.parametrize(
    ("how", "change", "said"),
    [
        ({"kind": "mp", "pictures": 10}, {"slide": ""}, "names none.*use style sampling: random"),
        ({"kind": "nearby", "pictures": 1}, None, "columns x and y"),
        ({"kind": "random", "pictures": 4}, "empty", "the style pool is empty"),
        ({"kind": "random", "pictures": 4, "tissue": 1.0}, "glass", "none of 3 tiles shows tissue"),
    ],
)
def test_what_a_pool_cannot_do_is_said_with_the_remedy(tiles, how, change, said):
    if isinstance(change, dict):
        tiles = tiles.assign(**change)
    elif change == "empty":
        tiles = tiles.head(0)
    elif change == "glass":
        tiles = tiles[tiles["tile_id"].str.endswith("_11.png")]
    else:
        tiles = tiles.drop(columns=["x"])
    with pytest.raises(ValueError, match=said):
        pool(tiles, **how)


def test_settings_that_mean_nothing_are_refused():
    for how, said in (
        ({"kind": "far"}, "style sampling 'far' is unknown"),
        ({"kind": "nearby", "pictures": 4}, "takes 1 picture"),
        ({"min_shift": 2}, "min_shift is a share"),
    ):
        with pytest.raises(ValueError, match=said):
            style_sampling.Settings(**how)


def test_neither_layout_nor_style_comes_from_test_tiles_unless_the_report_says_so(tiles):
    mixed = tiles.assign(split=["test" if slide == "C" else "train" for slide in tiles["slide"]])
    with pytest.raises(ValueError, match="12 tiles of 1 cases.*are for test and not for training.*allow_test_style"):
        style_sampling.refuse_held_out(mixed)
    assert style_sampling.refuse_held_out(mixed, allowed=True).startswith("TRANSDUCTIVE: style comes from 12 test tiles")
    assert style_sampling.refuse_held_out(tiles) == ""
