"""LPIPS diversity with weights made here: every backbone weight arrives, pairs are those of the definition, copies are no diversity."""

import warnings
from itertools import combinations

import lpips
import numpy as np
import pytest
import squares
import torch
import torchvision

from histokit import runs
from histokit.core import files
from histokit.fidelity import perceptual
from histokit.tiles import data


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random AlexNet in a file, and the same network as lpips holds it."""
    torch.manual_seed(0)
    net = torchvision.models.alexnet(weights=None)
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    files.write_tensors(path, {name: value.contiguous() for name, value in net.state_dict().items()})
    return path, net


def pictures(n, seed=0, noise=40):
    rng = np.random.default_rng(seed)
    return rng.normal(128, noise, (n, 64, 64, 3)).clip(0, 255).astype(np.uint8)


def test_the_distance_is_lpips_on_the_given_backbone(weights):
    path, net = weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    layers = [layer for k in range(1, 6) for layer in getattr(truth.net, f"slice{k}")]
    for ours, theirs in zip(layers, net.features, strict=False):
        ours.load_state_dict(theirs.state_dict())
    x, y = data.to_float(pictures(3)), data.to_float(pictures(3, 1))
    with torch.no_grad():
        expected = truth(x, y).flatten()
    torch.testing.assert_close(perceptual.load(path)(x, y), expected)
    assert expected.min() > 0


def test_diversity_is_the_mean_over_unordered_pairs_and_zero_for_one_picture(weights):
    distance, images = perceptual.load(weights[0]), pictures(5)
    each = [float(distance(data.to_float(images[[i]]), data.to_float(images[[j]]))) for i, j in combinations(range(5), 2)]
    assert perceptual.diversity(distance, images, batch=3) == pytest.approx(np.mean(each), rel=1e-5)
    assert perceptual.diversity(distance, images[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
    assert np.isnan(perceptual.diversity(distance, images[:1]))
    assert perceptual.diversity(distance, images, most=2) in [pytest.approx((a + b) / 2, rel=1e-4) for a, b in combinations(each, 2)]


def test_a_set_that_repeats_itself_is_said_beside_as_many_real_tiles(root, weights):
    squares.dataset({"train": {"blue": 4, "red": 4}, "val": {"blue": 12}, "test": {"blue": 12, "red": 4}})
    one = squares.tile("blue", 77)
    squares.synthetic({"blue": 12}, pixels={"blue": [one] * 12})
    run = runs.start(experiment="exp", step="07_evaluate")
    real, made = data.load(run), data.load(run, step="made")
    found = perceptual.beside_real(weights[0], real, made, ["blue", "red"])
    blue, red = found.to_dict("records")
    assert blue["n"] == 12 and blue["real"] == 24 and blue["lpips"] < 1e-6 < blue["lpips_real"]
    assert red["n"] == 0 and np.isnan(red["lpips"])
    (said,) = perceptual.remarks(found)
    assert said.startswith("blue: the synthetic tiles look alike")
    assert perceptual.table(found)["of real tiles"][1] == "n too small to say"
    assert perceptual.beside_real("", real, made, ["blue"]).empty


def test_a_wrong_file_is_refused_with_the_way_to_a_right_one(root):
    with pytest.raises(FileNotFoundError, match="safetensors file; torchvision's AlexNet becomes one by\n    python -c"):
        perceptual.load("alexnet.pth")
    files.write_tensors(root / "other.safetensors", {"conv.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="neither torchvision's AlexNet nor its VGG16"):
        perceptual.load("other.safetensors")
    half = {"features.0.weight": torch.zeros(64, 3, 11, 11)}
    files.write_tensors(root / "half.safetensors", half)
    with pytest.raises(ValueError, match=r"0\.bias of alex is missing"):
        perceptual.load("half.safetensors")
