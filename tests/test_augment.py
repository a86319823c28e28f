"""The eight symmetries of a square: one definition, two orders, a group."""

import numpy as np
import torch

from histokit.tiles import augment

SQUARE = torch.arange(9).reshape(1, 1, 3, 3)
VIEWS = [augment.symmetry(SQUARE, k) for k in range(8)]


def number(view):
    """Which of the eight a view of the square is; ValueError for none."""
    return [torch.equal(view, one) for one in VIEWS].index(True)


def test_all_eight_differ_and_the_first_changes_nothing():
    assert len({tuple(view.flatten().tolist()) for view in VIEWS}) == 8 and torch.equal(VIEWS[0], SQUARE)


def test_they_are_the_turns_and_mirror_images_of_numpy():
    square = SQUARE[0, 0].numpy()
    for k, view in enumerate(VIEWS):
        mirrored = square[:, ::-1] if k >= 4 else square
        assert np.array_equal(view[0, 0], np.rot90(mirrored, k % 4))


def test_they_form_the_group_of_the_square():
    table = [[number(augment.symmetry(first, k)) for k in range(8)] for first in VIEWS]  # ValueError where one led outside
    for line in (*table, *zip(*table, strict=True)):
        assert sorted(line) == list(range(8)), "each can be undone"
    orders = [next(n for n in range(1, 9) if _power(table, k, n) == 0) for k in range(8)]
    assert sorted(orders) == [1, 2, 2, 2, 2, 2, 4, 4], "two quarter turns and a half turn, four mirror images: no other group of eight"
    assert table[1][4] != table[4][1], "a turn and a flip do not commute, so their order matters"


def _power(table, k, n):
    found = 0
    for _ in range(n):
        found = table[found][k]
    return found


def test_turned_first_and_flipped_then_is_the_same_eight_in_another_order():
    for k in range(8):
        turned = SQUARE.rot90(k % 4, (-2, -1))
        assert torch.equal(turned.flip(-1) if k >= 4 else turned, VIEWS[augment.TURN_FIRST[k]])
        assert augment.TURN_FIRST[augment.TURN_FIRST[k]] == k


def test_pictures_as_arrays_are_turned_as_tensors_are():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as a decoded picture comes
    for k in range(8):
        as_tensor = augment.symmetry(torch.tensor(pixels).permute(0, 3, 1, 2), k).permute(0, 2, 3, 1)
        found = augment.pixel_symmetry(pixels, k)
        assert np.array_equal(found, as_tensor) and np.array_equal(found[1], augment.pixel_symmetry(pixels[1], k))
        assert found.flags.c_contiguous and found.flags.writeable


def test_every_symmetry_is_drawn_equally_often():
    images = SQUARE.repeat(4000, 1, 1, 1)
    drawn = torch.tensor([number(view[None]) for view in augment.random_symmetry(images, torch.Generator().manual_seed(0))])
    assert (torch.bincount(drawn, minlength=8) - 500).abs().max() < 4 * (4000 / 8 * 7 / 8) ** 0.5
