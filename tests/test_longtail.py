"""Losses, class weights, samplers and mixtures of longtail."""

import math
import re

import numpy as np
import pytest
import torch

from histokit.arms import longtail


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_cross_entropy_of_scaled_logits_is_the_published_value():
    logits = 30 * torch.tensor([[0.2, 0.1, 0.4]])
    assert longtail.cross_entropy(logits, torch.tensor([2])).item() == pytest.approx(0.0025988, abs=1e-6)
    assert longtail.cross_entropy(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])).item() == pytest.approx(0.1698460, abs=1e-6)


def test_focal_loss_is_the_published_value_and_with_gamma_0_cross_entropy():
    logits, targets = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    assert longtail.focal(logits, targets).item() == pytest.approx(0.0041443, abs=1e-6)
    torch.testing.assert_close(longtail.focal(logits, targets, gamma=0.0), longtail.cross_entropy(logits, targets))


def test_ldam_takes_the_published_margins_off_the_right_class_alone():
    z, counts = torch.tensor([[0.2, 0.1, 0.4]]), [100, 16, 1]
    assert longtail.ldam(z, torch.tensor([2]), counts).item() == pytest.approx(9.04871, abs=1e-4)
    assert longtail.ldam(z, torch.tensor([2]), counts, margin=0.0).item() == pytest.approx(0.0025988, abs=1e-6)
    for y, margin in enumerate((0.15811, 0.25, 0.5)):  # 0.5 (1 / n)^(1/4)
        shifted = z - margin * torch.nn.functional.one_hot(torch.tensor([y]), 3)
        torch.testing.assert_close(
            longtail.ldam(z, torch.tensor([y]), counts), longtail.cross_entropy(30 * shifted, torch.tensor([y])), rtol=1e-4, atol=1e-4
        )
    everyone = longtail.ldam(z, torch.tensor([0]), [5, 5, 5], scale=1.0)
    assert everyone > longtail.cross_entropy(z, torch.tensor([0])), "equal classes have equal margins, not none"


def test_the_coarse_term_is_the_published_value_and_stays_finite_where_log_of_a_sum_of_softmax_does_not():
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]]).log()
    tail = torch.tensor([False, False, True, True])
    value = longtail.coarse(logits, torch.tensor([0, 3]), tail)
    assert value.mean().item() == pytest.approx(0.2899092, abs=1e-6)
    assert longtail.cross_entropy(logits, torch.tensor([0, 3])).mean().item() == pytest.approx(1.4978662, abs=1e-6)
    sure = torch.tensor([[200.0, 0.0, -200.0, -300.0]], requires_grad=True)
    far = longtail.coarse(sure, torch.tensor([3]), tail)
    far.sum().backward()
    assert far.item() == pytest.approx(400) and torch.isfinite(sure.grad).all()
    assert torch.log(sure.softmax(1)[:, tail].sum(1)).item() == -math.inf  # what a sum of probabilities would have given


@pytest.mark.parametrize(
    ("counts", "weights"), [([10, 1000], [1.97921, 0.02079]), ([10, 110, 1000, 10000], [3.62500, 0.33120, 0.03807, 0.00573])]
)
def test_weights_by_effective_number_are_the_published_values(counts, weights):
    found = longtail.class_weights(counts, "effective", 0.9999)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), atol=1e-5, rtol=0)
    assert found.sum().item() == pytest.approx(len(counts))


def test_class_weights_are_scikit_learns_and_agree_in_their_limits():
    from sklearn.utils.class_weight import compute_class_weight

    counts = [3, 12, 40]
    y = np.repeat(np.arange(3), counts)
    theirs = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=y))
    torch.testing.assert_close(longtail.class_weights(counts, "balanced"), theirs)
    near = longtail.class_weights(counts, "effective", 1 - 1e-9)
    torch.testing.assert_close(near, theirs * 3 / theirs.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(longtail.class_weights(counts, "effective", 0.0), torch.ones(3, dtype=torch.float64))
    assert longtail.class_weights([4, 0], "balanced").tolist()[1] == longtail.class_weights([4, 0], "effective").tolist()[1] == 0


def test_a_weighted_mean_over_weights_is_pytorchs_and_over_tiles_depends_on_the_batch():
    logits, targets = torch.randn(9, 3, generator=generator()), torch.arange(9) % 3
    weights = torch.tensor([0.1, 1.0, 4.0])
    ours = longtail.weighted_mean(longtail.cross_entropy(logits, targets), weights[targets])
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, targets, weights))
    assert longtail.weighted_mean(torch.ones(2), torch.tensor([4.0, 4.0])).item() == 1
    assert longtail.weighted_mean(torch.ones(2), torch.tensor([4.0, 4.0]), "tiles").item() == 4


def objective(counts=(90, 10), **settings):
    shares = longtail.class_shares(list(counts))
    return longtail.Objective(list(counts), shares, [n < 50 for n in counts], **settings)


def test_deferred_weights_set_in_where_they_are_said_to_and_lower_the_rate():
    logits, targets = torch.randn(20, 2, generator=generator()), torch.arange(20) % 2
    late = objective(weights="balanced", drw=0.6)
    before, after = objective(), objective(weights="balanced")
    for done in (0.0, 0.59):
        assert late(logits, targets, done) == before(logits, targets, done) and late.rate(done) == 1
    for done in (0.6, 1.0):
        assert late(logits, targets, done) == after(logits, targets, done) and late.rate(done) == pytest.approx(0.1)
    assert after.rate(1.0) == 1 and before(logits, targets) != after(logits, targets)
    assert objective(weights="balanced", drw=0.5, options={"drw_lr": 0.3}).rate(0.7) == 0.3


def test_only_ldam_leaves_a_scale_behind_and_the_coarse_term_sees_scaled_logits():
    assert objective().scale == objective(loss="focal").scale == 1
    logits, targets = torch.randn(6, 2, generator=generator()), torch.arange(6) % 2
    plain, both = objective(loss="ldam"), objective(loss="ldam", coarse=0.1)
    assert plain.scale == 30 and objective(loss="ldam", options={"scale": 12.0}).scale == 12
    extra = longtail.coarse(30 * logits, targets, [False, True]).mean()
    torch.testing.assert_close(both(logits, targets), plain(logits, targets) + 0.1 * extra)


def test_a_mixed_loss_with_no_share_of_the_partner_is_the_plain_one():
    logits, targets, others = torch.randn(8, 2, generator=generator()), torch.arange(8) % 2, (torch.arange(8) + 1) % 2
    one = objective()
    assert one.mixed(logits, targets, others, 0.0) == one(logits, targets) and one.mixed(logits, targets, others, 1.0) == one(
        logits, others
    )
    soft = torch.nn.functional.one_hot(targets, 2) * 0.7 + torch.nn.functional.one_hot(others, 2) * 0.3
    torch.testing.assert_close(one.mixed(logits, targets, others, 0.3), torch.nn.functional.cross_entropy(logits, soft))


def test_mixup_permutes_its_batch_and_the_balanced_kind_brings_every_class_alike():
    targets = torch.tensor([0] * 95 + [1] * 5)
    batches = longtail.draws(targets, 2, 400, 10, generator())
    partner, share = longtail.mixtures(batches, targets, 2, generator(), "mixup", 0.2)
    assert torch.equal(partner.sort(dim=1).values, batches.sort(dim=1).values) and not torch.equal(partner, batches)
    assert share.mean().item() == pytest.approx(0.5, abs=0.05) and share.min() >= 0 and share.max() <= 1
    partner, share = longtail.mixtures(batches, targets, 2, generator(), "balanced", 0.2)
    assert targets[partner].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.mean().item() == pytest.approx(0.2 / 1.2, abs=0.03), "Beta(alpha, 1): the batch as drawn weighs more"
    again = longtail.mixtures(batches, targets, 2, generator(), "balanced", 0.2)
    assert torch.equal(again[0], partner) and torch.equal(again[1], share)


def test_tau_normalisation_levels_the_lengths_of_the_rows():
    weight = torch.randn(4, 6, generator=generator()) * torch.tensor([1.0, 2.0, 5.0, 0.1])[:, None]
    torch.testing.assert_close(longtail.tau_normalised(weight, 0.0), weight)
    torch.testing.assert_close(longtail.tau_normalised(weight, 1.0).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(longtail.tau_normalised(weight, 0.5).norm(dim=1), weight.norm(dim=1).sqrt())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ldma"}, "loss is 'ldma'; expected one of cross_entropy"),
        ({"weights": "cb"}, "weights is 'cb'; expected one of none, balanced, effective"),
        ({"mixture": "cutmix"}, "mixture is 'cutmix'"),
        ({"drw": 1.0, "weights": "balanced"}, "drw is 1.0: the share of the updates"),
        ({"drw": 0.5}, "drw says when class weights set in, and weights is none"),
        ({"coarse": -0.1}, "coarse is -0.1"),
        ({"decouple": "crt", "mode": "linear"}, "mode linear has only one"),
        ({"decouple": "crt", "drw": 0.5, "weights": "balanced"}, "two ways to turn to the rare classes late"),
        ({"options": {"gama": 1}}, "options has no 'gama'"),
        ({"options": {"gamma": 1.0}}, "gamma does nothing here"),
        ({"loss": "focal", "options": {"gamma": "2"}}, "gamma is '2'; expected a number"),
        ({"weights": "effective", "options": {"beta": 1.0}}, "beta is 1.0; expected at least 0 and below 1"),
        ({"weights": "balanced", "options": {"mean": "batch"}}, "taken over 'batch'; expected one of weights, tiles"),
        ({"loss": "ldam", "options": {"scale": 0}}, "scale is 0; expected more than 0"),
    ],
)
def test_a_setting_that_is_wrong_or_does_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        longtail.check(**settings)


def test_the_coarse_term_needs_both_kinds_of_class():
    with pytest.raises(ValueError, match="all are of one kind"):
        longtail.Objective([5, 5], torch.full((2,), 0.5), [True, True], coarse=0.1)


def test_logit_adjustment_with_equal_shares_is_cross_entropy():
    logits, targets = torch.randn(50, 4, generator=generator()), torch.arange(50) % 4
    adjusted = longtail.logit_adjustment(logits, targets, torch.full((4,), 0.25))
    assert adjusted.shape == (50,)
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
            value = loss(bias.expand(100, 2), targets, *([shares] if loss is longtail.logit_adjustment else [])).mean()
            value.backward()
            return value

        optimiser.step(closure)
        assert (bias[0] - bias[1]).item() == pytest.approx(expected, abs=1e-3)


def test_logit_adjustment_stays_finite_for_a_class_without_tiles():
    value = longtail.logit_adjustment(torch.zeros(3, 3), torch.tensor([0, 1, 1]), torch.tensor([0.4, 0.6, 0.0]))
    assert torch.isfinite(value).all()


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


@pytest.mark.parametrize("sampler", ["balanced", "square_root"])
def test_synthetic_tiles_have_no_more_than_their_share_of_the_draws_of_their_class(sampler):
    targets = torch.tensor([0] * 100 + [1] * 250 + [2] * 12 + [3] * 5)  # class 1: ten real tiles, class 2: nine, class 3: none
    made = torch.tensor([False] * 110 + [True] * 240 + [False] * 9 + [True] * 3 + [True] * 5)
    batches = longtail.draws(targets, 4, 400, 50, generator(), sampler, made, 0.5)
    drawn, share = targets[batches], [float(made[batches[targets[batches] == c]].double().mean()) for c in range(4)]
    assert share == pytest.approx([0, 0.5, 3 / 12, 1], abs=0.02)
    expected = longtail.class_shares(longtail.class_counts(targets, 4), sampler)
    torch.testing.assert_close(longtail.class_counts(drawn.flatten(), 4) / drawn.numel(), expected, atol=0.02, rtol=0, check_dtype=False)
    real, fake = (longtail.class_counts(batches[(drawn == 1) & (made[batches] == kind)], len(targets)) for kind in (False, True))
    for seen in (real[100:110], fake[110:350]):  # each of them once before any twice
        assert seen.max() - seen.min() <= 1


@pytest.mark.parametrize(("sampler", "most"), [("balanced", 1.0), ("balanced", 0.75), ("square_root", 0.75), ("natural", 0.1)])
def test_a_share_that_bounds_nothing_changes_no_draw(sampler, most):
    targets = torch.tensor([0] * 20 + [1] * 8)
    made = torch.tensor([False] * 22 + [True] * 6)  # six of eight are synthetic
    plain, bounded = (longtail.draws(targets, 2, 30, 10, generator(), sampler, *more) for more in ((), (made, most)))
    assert torch.equal(plain, bounded)


def test_partners_of_balanced_mixup_keep_to_the_share_too():
    targets, made = torch.tensor([0] * 50 + [1] * 50), torch.tensor([False] * 55 + [True] * 45)
    batches = longtail.draws(targets, 2, 200, 20, generator())
    partners, _ = longtail.mixtures(batches, targets, 2, generator(), "balanced", 0.2, made, 0.25)
    assert float(made[partners[targets[partners] == 1]].double().mean()) == pytest.approx(0.25, abs=0.03)


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
