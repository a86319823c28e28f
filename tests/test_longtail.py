"""Losses and samplers of longtail."""

import math

import pytest
import torch

from histokit import longtail


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_cross_entropy_of_scaled_logits_is_the_published_value():
    logits = 30 * torch.tensor([[0.2, 0.1, 0.4]])
    assert longtail.cross_entropy(logits, torch.tensor([2])).item() == pytest.approx(0.0025988, abs=1e-6)
    assert longtail.cross_entropy(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])).item() == pytest.approx(0.1698460, abs=1e-6)


def test_logit_adjustment_with_equal_shares_is_cross_entropy():
    logits, targets = torch.randn(50, 4, generator=generator()), torch.arange(50) % 4
    adjusted = longtail.logit_adjustment(logits, targets, torch.full((4,), 0.25))
    torch.testing.assert_close(adjusted, longtail.cross_entropy(logits, targets))


def test_logit_adjustment_learns_the_evidence_without_the_prior():
    # one feature that says nothing: the adjusted optimum has equal logits, the plain one repeats the class shares
    targets = torch.tensor([0] * 90 + [1] * 10)
    shares = longtail.class_shares(longtail.class_counts(targets, 2))
    for loss, expected in ((longtail.logit_adjustment, 0.0), (longtail.cross_entropy, math.log(9))):
        bias = torch.zeros(2, requires_grad=True)
        optimiser = torch.optim.LBFGS([bias], max_iter=50)

        def closure(bias=bias, optimiser=optimiser, loss=loss):
            optimiser.zero_grad()
            value = loss(bias.expand(100, 2), targets, shares)
            value.backward()
            return value

        optimiser.step(closure)
        assert (bias[0] - bias[1]).item() == pytest.approx(expected, abs=1e-3)


def test_logit_adjustment_stays_finite_for_a_class_without_tiles():
    value = longtail.logit_adjustment(torch.zeros(3, 3), torch.tensor([0, 1, 1]), torch.tensor([0.4, 0.6, 0.0]))
    assert torch.isfinite(value)


@pytest.mark.parametrize(
    ("sampler", "shares"), [("natural", [0.8, 0.2, 0]), ("square_root", [2 / 3, 1 / 3, 0]), ("balanced", [0.5, 0.5, 0])]
)
def test_a_sampler_draws_each_class_by_its_share(sampler, shares):
    targets = torch.tensor([0] * 160 + [1] * 40)
    torch.testing.assert_close(longtail.class_shares(longtail.class_counts(targets, 3), sampler), torch.tensor(shares, dtype=torch.float64))
    drawn = targets[longtail.draws(targets, 3, 200, 50, generator(), sampler)]
    seen = longtail.class_counts(drawn.flatten(), 3) / drawn.numel()
    torch.testing.assert_close(seen.double(), torch.tensor(shares, dtype=torch.float64), atol=0.02, rtol=0)


def test_natural_draws_every_tile_once_before_any_twice():
    batches = longtail.draws(torch.zeros(12, dtype=torch.int64), 1, 6, 4, generator())
    assert sorted(batches[:3].flatten().tolist()) == sorted(batches[3:].flatten().tolist()) == list(range(12))


def test_batches_follow_from_the_seed_and_have_one_shape_however_many_tiles():
    few, many = torch.arange(6) % 3, torch.arange(600) % 3
    for sampler in longtail.SAMPLERS:
        a, b = (longtail.draws(few, 3, 7, 5, generator(1), sampler) for _ in range(2))
        assert torch.equal(a, b)
        assert a.shape == longtail.draws(many, 3, 7, 5, generator(1), sampler).shape == (7, 5)


def test_an_unknown_sampler_and_an_empty_set_are_refused():
    with pytest.raises(ValueError, match="sampler is 'blanced'; expected one of natural"):
        longtail.class_shares([1, 2], "blanced")
    with pytest.raises(ValueError, match="no training tile"):
        longtail.class_shares([0, 0])


@pytest.mark.parametrize("counts", [[5, 5], [0, 4, 3, 3], [7, 0, 0], [1, 9, 2], [1, 0]])
def test_misplaced_labels_are_all_wrong_and_the_same_ones_where_that_can_be(counts):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    moved = longtail.misplaced(targets, len(counts), torch.Generator().manual_seed(0))
    assert (moved != targets).all() and moved.max() < len(counts)
    if max(counts) * 2 <= sum(counts):
        assert torch.bincount(moved, minlength=len(counts)).tolist() == counts
    again = longtail.misplaced(targets, len(counts), torch.Generator().manual_seed(0))
    assert torch.equal(moved, again) and len(longtail.misplaced(targets[:0], 2, torch.Generator())) == 0
