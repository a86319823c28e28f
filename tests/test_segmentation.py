"""Segmentation: the loss and its parts by second definitions, exact shares, patients counted as patients, networks that come back."""

import math

import blobs
import numpy as np
import pytest
import torch

from histokit.arms import fit_segmenter
from histokit.core import files
from histokit.metrics import segmentation
from histokit.vision import segmenters


def test_pixels_are_counted_as_a_confusion_matrix_counts_them():
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    drawn, seen = rng.integers(0, 3, (2, 4, 7, 5))  # no square
    tp, fp, fn = segmentation.counts(drawn, seen, 3)
    for i in range(4):
        table = confusion_matrix(drawn[i].ravel(), seen[i].ravel(), labels=[0, 1, 2])
        assert tp[i].tolist() == np.diag(table).tolist()
        assert fp[i].tolist() == (table.sum(0) - np.diag(table)).tolist() and fn[i].tolist() == (table.sum(1) - np.diag(table)).tolist()


def test_a_patient_is_its_tiles_together_and_one_without_foreground_has_no_score():
    drawn, seen = np.zeros((5, 4, 6), int), np.zeros((5, 4, 6), int)
    drawn[0, :2] = seen[0, :2] = 1  # 12 right
    drawn[1, 0, :2] = 1  # two lost
    seen[2, 0] = 1  # patient b has nothing to find, and six are found
    drawn[4, :, :3], seen[4, :, 1:4] = 1, 1  # patient c: 8 right, 4 extra, 4 lost
    tp, fp, fn = segmentation.counts(drawn, seen, 2)
    scores, names = segmentation.per_patient(tp, fp, fn, ["a", "a", "b", "b", "c"])
    assert names.tolist() == ["a", "b", "c"]
    assert scores[:, 1].tolist() == pytest.approx([24 / 26, float("nan"), 16 / 24], nan_ok=True)
    ious, _ = segmentation.per_patient(tp, fp, fn, ["a", "a", "b", "b", "c"], segmentation.iou)
    assert ious[:, 1].tolist() == pytest.approx([12 / 14, float("nan"), 8 / 16], nan_ok=True)


def test_the_loss_is_cross_entropy_and_dice_of_the_foreground():
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 3, 5, 4, generator=g), torch.randint(3, (2, 5, 4), generator=g)
    p = logits.softmax(1).numpy()
    dices = []
    for k in (1, 2):
        both = each = 0.0
        for b in range(2):
            for y in range(5):
                for x in range(4):
                    here = float(ids[b, y, x] == k)
                    both += p[b, k, y, x] * here
                    each += p[b, k, y, x] + here
        dices.append((2 * both + 0.01) / (each + 0.01))
    entropy = -np.mean([math.log(p[b, int(ids[b, y, x]), y, x]) for b in range(2) for y in range(5) for x in range(4)])
    assert float(fit_segmenter.loss(logits, ids)) == pytest.approx(0.1 * entropy + 0.9 * (1 - np.mean(dices)), rel=1e-5)
    assert float(fit_segmenter.loss(logits, ids, ce=1.0, dice=0.0)) == pytest.approx(entropy, rel=1e-5)


def test_a_rim_does_not_count():
    ids = torch.zeros(1, 8, 8, dtype=torch.int64)
    ids[:, 3:5, 3:5] = 1
    sure = (torch.nn.functional.one_hot(ids, 2).movedim(-1, 1) * 40.0) - 20
    wrong = sure.clone()
    wrong[..., 0, :] *= -1
    assert float(fit_segmenter.loss(sure, ids)) < 1e-3 < 0.05 < float(fit_segmenter.loss(wrong, ids))
    assert float(fit_segmenter.loss(wrong, ids, rim=2)) == pytest.approx(float(fit_segmenter.loss(sure, ids, rim=2)))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8, 1 / 3, 1.0])
@pytest.mark.parametrize("batch_size", [1, 8, 10])
def test_every_epoch_has_exactly_its_shares_whatever_the_batch(share, batch_size):
    batches, n_real, n_made = 60, 7, 11
    rows = [fit_segmenter.drawn(k, batch_size, share, n_real, n_made, 0) for k in range(batches)]
    assert {len(part) for part in rows} == {batch_size}
    flat = np.concatenate(rows)
    assert (flat >= n_real).sum() == int(batches * batch_size * share + 1e-9)
    assert all(abs((np.array(part) >= n_real).sum() - batch_size * share) < 1 for part in rows)
    for low, high in ((0, n_real), (n_real, n_real + n_made)):
        counts = np.bincount(flat[(flat >= low) & (flat < high)] - low, minlength=high - low)
        assert counts.max() - counts.min() <= 1  # in rounds: every tile as often as every other
    assert rows[17] == fit_segmenter.drawn(17, batch_size, share, n_real, n_made, 0)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs made ones"):
        fit_segmenter.fit(segmenters.Segmenter("small", ("a", "b"), 32), None, 5, 0, 0.5, fit_segmenter.Settings())


def test_picture_and_mask_are_turned_together():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, (40, 8, 8), generator=g)
    pictures = ids[:, None].repeat(1, 3, 1, 1).float()
    turned, drawn = fit_segmenter.augmented(pictures, ids, g, "symmetries")
    assert torch.equal(turned[:, 0].long(), drawn) and not torch.equal(drawn, ids)
    stained, drawn = fit_segmenter.augmented(pictures * 0.5 + 0.2, ids, g, "stain")
    assert (stained[:, 0][drawn == 1].mean() > stained[:, 0][drawn == 0].mean()) and stained.min() >= 0


def blob_set(root, n=24):
    """read(rows), and pixels, ids and cases of the tiles behind it."""
    tiles = blobs.study(root, cases=n // 2, tiles=2, annotated=n)
    from histokit.tiles import data, masks

    pixels, ids = data.pixels(tiles), masks.pixels(tiles, blobs.LAYERS)
    return (lambda rows: (pixels[rows], ids[rows])), pixels, ids, tiles["case_id"].to_numpy()


def trained(root, folder=None, steps=60, **more):
    read, pixels, ids, cases = blob_set(root)
    torch.manual_seed(0)
    net = segmenters.Segmenter("small", blobs.LAYERS.names, blobs.PX)
    how = fit_segmenter.Settings(steps=steps, batch_size=8, lr=5e-3)
    history = fit_segmenter.fit(net, read, 16, 0, 0.0, how, val=(pixels[16:], ids[16:], cases[16:]), folder=folder, **more)
    return net, history, pixels, ids, cases


def test_a_small_segmenter_learns_blobs_and_comes_back_from_disk(root):
    net, history, pixels, ids, cases = trained(root)
    scores, _ = segmentation.per_patient(*segmentation.counts(ids[16:], net.ids(pixels[16:]), 2), cases[16:])
    assert np.nanmean(scores[:, 1]) > 0.9
    assert 1 - history["val"].dropna().min() == pytest.approx(np.nanmean(scores[:, 1]))  # the best weights are the ones in place
    net.save(root / "it", arm="real", seed=3)
    again = segmenters.load(root / "it")
    assert (again.ids(pixels) == net.ids(pixels)).all() and again.facts["arm"] == "real" and again.layers == ("ground", "blob")
    held = files.read_json(root / "it" / "segmenter.json")
    files.write_json(root / "it" / "segmenter.json", held | {"layers": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="not of one segmenter"):
        segmenters.load(root / "it")
    with pytest.raises(FileNotFoundError, match="has finished"):
        segmenters.load(root)


def test_a_killed_segmenter_goes_on_to_the_same_bits(root, monkeypatch):
    from histokit.training import loop

    whole = trained(root, root / "whole", steps=8)[0]
    save = loop.Training._save

    def dies(self, done):
        if done == 5:
            self.how = self.how.__class__(self.how.updates, self.how.validation, self.how.sheets, loop.settings.Records(checkpoint_every=1))
            save(self, done)
            raise KeyboardInterrupt
        save(self, done)

    monkeypatch.setattr(loop.Training, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(root, root / "cut", steps=8)
    monkeypatch.setattr(loop.Training, "_save", save)
    again = trained(root, root / "cut", steps=8)[0]
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_published_segmenter_has_as_many_parameters_as_published():
    net, step, mean, _ = segmenters._unet("mit_b2", 2, "")
    assert sum(p.numel() for p in net.parameters()) == 27_477_154 and step == 32
    assert mean == pytest.approx((0.485, 0.456, 0.406))  # its encoder's own


def test_weights_of_an_encoder_come_from_a_file_and_of_no_other(root):
    net, *_ = segmenters._unet("resnet18", 2, "")
    held = {name: tensor.clone() for name, tensor in net.encoder.state_dict().items()}
    files.write_tensors(root / "resnet18.safetensors", held, {})
    again = segmenters.Segmenter("resnet18", ("a", "b"), 64, weights="resnet18.safetensors")
    assert all(torch.equal(a, held[name]) for name, a in again.net.encoder.state_dict().items())
    with pytest.raises(ValueError, match="lacks .* tensors of mit_b0"):
        segmenters.Segmenter("mit_b0", ("a", "b"), 64, weights="resnet18.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        segmenters.Segmenter("resnet18", ("a", "b"), 64, weights="none.safetensors")


@pytest.mark.parametrize(
    ("network", "px", "said"),
    [("vgg", 64, "segmenter 'vgg' is unknown"), ("small", 36, "to a 16th, and tiles are 36 px"), ("resnet18", 40, "to a 32th")],
)
def test_a_segmenter_that_does_not_fit_is_refused(network, px, said):
    with pytest.raises(ValueError, match=said):
        segmenters.Segmenter(network, ("a", "b"), px)
