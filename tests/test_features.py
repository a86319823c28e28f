"""Encoders, their transforms, and the cache of features."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked

from histokit.core import files
from histokit.tiles import augment, near_duplicates
from histokit.vision import encoders, features, handcrafted, pathology_encoders


@pytest.fixture
def tiles(root):
    """Six tiles of coloured fields, 64 px, with manifest columns."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        smooth = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        facts = squares.row(root, f"tile {i}.png", smooth, source="real", label="red", case_id=str(i), split="train", root="data")
        rows.append({**facts, "path": str(root / f"tile {i}.png"), "tile_px": 64, "fit": "resize"})
    return pd.DataFrame(rows)


def random_encoder(identity="a"):
    torch.manual_seed(0)
    return features.Encoder("small", features.SmallCNN().eval(), 256, {"weights": identity})


class Counting:
    """An encoder that remembers how many tiles it was given."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, pixels):
        self.calls += 1
        return self.encoder(pixels)


def test_small_cnn_takes_any_side_from_64_px_and_stays_small():
    net = features.SmallCNN().eval()
    assert 1.0e6 < sum(p.numel() for p in net.parameters()) < 1.3e6
    for height, width in ((64, 64), (128, 128), (96, 224)):
        assert net(torch.zeros(2, 3, height, width)).shape == (2, 256)


def test_features_are_computed_once_per_content(tiles):
    encoder = Counting(random_encoder())
    first = features.embed(encoder, tiles)
    calls = encoder.calls
    renamed = tiles.assign(tile_id="other", sha256="")  # hashed again from the file
    np.testing.assert_array_equal(features.embed(encoder, renamed), first)
    assert encoder.calls == calls == 1
    features.embed(Counting(random_encoder("b")), tiles)
    assert len(list((files.root() / "outputs/.cache/features").iterdir())) == 2  # another identity, another folder


def test_neighbours_and_order_never_change_a_bit(tiles):
    alone = features.embed(random_encoder(), tiles.iloc[[3]])
    shuffled = tiles.iloc[[5, 3, 0, 1]]
    together = features.embed(random_encoder("fresh cache"), shuffled)
    np.testing.assert_array_equal(alone[0], together[1])


def test_cores_never_change_a_bit():
    encoder, before = encoders.load("mini-ssl"), torch.get_num_threads()
    tiles = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), np.uint8)
    try:
        found = [(torch.set_num_threads(cores), encoder(tiles))[1] for cores in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_the_views_are_the_eight_symmetries(tiles):
    encoder = random_encoder()
    views = features.embed(encoder, tiles, augment="symmetries")
    assert views.shape == (6, 8, 256)
    np.testing.assert_array_equal(views[:, 0], features.embed(encoder, tiles))
    turned = tiles.copy()
    for i, path in enumerate(tiles["path"]):
        picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        new = files.root() / f"turned {i}.png"
        files.write_png(new, augment.symmetry(picture, 5).permute(1, 2, 0).numpy())
        turned.loc[i, ["path", "sha256"]] = [str(new), files.sha256(new)]
    np.testing.assert_array_equal(views[:, 5], features.embed(encoder, turned))


def test_a_broken_shard_is_made_again(tiles):
    encoder = random_encoder()
    first = features.embed(encoder, tiles)
    shard = next((files.root() / "outputs/.cache/features").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    np.testing.assert_array_equal(features.embed(encoder, tiles), first)


def test_large_results_live_in_a_file(tiles, monkeypatch):
    small = features.embed(random_encoder(), tiles)
    monkeypatch.setattr(features, "IN_MEMORY", 1000)
    large = features.embed(random_encoder(), tiles)
    assert isinstance(large.base, np.memmap) or isinstance(large, np.memmap)
    np.testing.assert_array_equal(small, large)


def test_no_tiles_give_no_features(tiles):
    assert features.embed(random_encoder(), tiles.iloc[:0]).shape == (0, 256)
    with pytest.raises(ValueError, match="augment is 'flip'; expected one of none"):
        features.embed(random_encoder(), tiles, augment="flip")


def test_colour_texture_and_picture_do_not_see_how_a_tile_lies():
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    turned = torch.cat([augment.symmetry(picture, k) for k in range(8)])
    found = handcrafted.ColourTexture()(turned)
    assert found.shape == (8, handcrafted.ColourTexture.dim)
    torch.testing.assert_close(found, found[:1].expand(8, -1), atol=1e-5, rtol=1e-4)
    outline = handcrafted.Picture()(turned)
    views = near_duplicates.symmetric(outline[:1].reshape(1, near_duplicates.LOW, near_duplicates.LOW).numpy()).reshape(8, -1)
    np.testing.assert_allclose((views @ outline.numpy().T).max(axis=0), 1, atol=1e-5)  # each is one of the first's eight


def test_stain_jitter_keeps_white_white():
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment.stain_jitter(picture, torch.Generator(), strength=0.0), picture, atol=1e-5, rtol=0)
    white = torch.ones(3, 3, 4, 4)
    torch.testing.assert_close(augment.stain_jitter(white, torch.Generator().manual_seed(1), strength=0.5), white, atol=1e-5, rtol=0)
    assert (augment.stain_jitter(picture, torch.Generator().manual_seed(1)) - picture).abs().max() > 0.02


def test_a_local_timm_file_and_folder_load_with_their_own_transform(root):
    import timm

    net = timm.create_model("test_resnet", pretrained=False)
    save_file(net.state_dict(), root / "weights.safetensors")
    encoder = features.load("timm:test_resnet@weights.safetensors")
    assert encoder.size == net.pretrained_cfg["input_size"][-1] and not any(p.requires_grad for p in encoder.net.parameters())
    assert encoder(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, encoder.dim)
    assert features.source("timm:test_resnet@weights.safetensors") == root / "weights.safetensors" and features.source("mini-ssl") is None
    moved = root / "elsewhere.safetensors"
    (root / "weights.safetensors").rename(moved)
    assert features.load(f"timm:test_resnet@{moved}").identity == encoder.identity
    moved.write_bytes(moved.read_bytes()[:-4] + b"\0\0\0\1")
    assert features.load(f"timm:test_resnet@{moved}").identity != encoder.identity


def test_a_transformers_folder_says_its_pooling_and_licence(root):
    import transformers

    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(root / "dino")
    assert features.load("dino").dim == 16
    files.write_json(root / "dino" / "histokit.json", {"pooling": "cls+mean", "mean": [0.5, 0.5, 0.5], "licence": "MIT"})
    encoder = features.load("dino")
    assert (encoder.dim, encoder.mean, encoder.licence, encoder.size) == (32, (0.5, 0.5, 0.5), "MIT", 28)
    assert encoder(np.zeros((1, 40, 40, 3), np.uint8)).shape == (1, 32)


def test_registers_are_no_picture_and_a_known_encoder_needs_no_description(root):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(root / "encoders" / "Midnight-12k")
    encoder = features.load("encoders/Midnight-12k")
    assert (encoder.dim, encoder.mean, encoder.licence, encoder.pooling) == (32, (0.5, 0.5, 0.5), "MIT", "cls+mean")
    tiles = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3), np.uint8)
    tokens = model(pixel_values=(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).last_hidden_state
    assert tokens.shape[1] == 1 + 3 + 4
    torch.testing.assert_close(encoder(tiles), torch.cat([tokens[:, 0], tokens[:, 4:].mean(1)], 1).detach(), rtol=1e-4, atol=1e-5)
    files.write_json(root / "encoders" / "Midnight-12k" / "histokit.json", {"pooling": "cls", "licence": "mine"})
    mine = features.load("encoders/Midnight-12k")
    assert (mine.dim, mine.licence) == (16, "mine") and mine.identity != encoder.identity, "what the folder says wins"


GATED = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 5.0}


def test_arguments_of_a_card_alone_are_known_by_name_or_asked_for(root):
    import timm

    net = timm.create_model("test_vit", pretrained=False, num_classes=0, **GATED)
    for name in ("virchow2", "mine"):
        (root / name).mkdir()
        save_file(net.state_dict(), root / name / "model.safetensors")
        args = {"img_size": 160, "mlp_ratio": GATED["mlp_ratio"]}
        picture = {"input_size": [3, 160, 160], "mean": [0] * 3, "std": [1] * 3}
        config = {"architecture": "test_vit", "model_args": args, "num_classes": net.num_classes, "pretrained_cfg": picture}
        files.write_json(root / name / "config.json", config)
    known = features.load("virchow2")
    with pytest.raises(ValueError, match=r"do not fit what its config.json says.*histokit.json"):
        features.load("mine")
    arguments = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
    files.write_json(root / "mine" / "histokit.json", {"arguments": arguments, "pooling": "cls+mean", **pathology_encoders.IMAGENET})
    tiles = np.random.default_rng(0).integers(0, 255, (1, 160, 160, 3), np.uint8)
    torch.testing.assert_close(features.load("mine")(tiles), known(tiles))
    files.write_json(root / "mine" / "histokit.json", {"arguments": {"mlp_layer": "Blurb"}})
    with pytest.raises(ValueError, match="mlp_layer is 'Blurb', which is no layer"):
        features.load("mine")


@pytest.mark.parametrize(
    ("name", "architecture", "held", "millions"),
    [
        ("uni", "vit_large_patch16_224", {}, 303),
        ("uni2-h", "vit_giant_patch14_224", {}, 681),
        ("virchow", "vit_huge_patch14_224", {"mlp_ratio": 5.3375, "init_values": 1e-5}, 631),
        ("virchow2", "vit_huge_patch14_224", {"mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4}, 631),
        ("h-optimus-0", "vit_giant_patch14_reg4_dinov2", {"img_size": 224}, 1134),
    ],
)
def test_the_arguments_of_known_encoders_give_networks_of_their_size(name, architecture, held, millions):
    import timm

    given = encoders._arguments({"model_args": held}, pathology_encoders.known(name)["arguments"], Path("."))
    with torch.device("meta"):
        net = timm.create_model(architecture, num_classes=0, **held, **given)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_known_timm_encoder_is_pooled_as_its_authors_do(root):
    import timm

    net = timm.create_model("test_vit", pretrained=False, num_classes=0, **GATED).eval()
    place = root / "virchow"
    place.mkdir()
    save_file(net.state_dict(), place / "model.safetensors")
    config = {
        "architecture": "test_vit",
        "model_args": {"img_size": 160, "mlp_ratio": GATED["mlp_ratio"]},  # the gate itself stands in the card alone
        "num_classes": net.num_classes,
        "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0] * 3, "std": [1] * 3},
    }
    files.write_json(place / "config.json", config)
    encoder = features.load("virchow")
    assert encoder.dim == 2 * net.num_features and encoder.pooling == "cls+mean" and encoder.mean == pathology_encoders.IMAGENET["mean"]
    tiles = np.random.default_rng(0).integers(0, 255, (1, 160, 160, 3), np.uint8)
    mean, std = (torch.tensor(pathology_encoders.IMAGENET[key])[:, None, None] for key in ("mean", "std"))
    tokens = net.forward_features((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(encoder(tiles), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).detach(), rtol=1e-3, atol=1e-4)


def test_licences_that_bind_what_is_made_are_told_from_open_ones():
    said = {name: pathology_encoders.restricted(facts["licence"]) for name, facts in pathology_encoders.KNOWN.items()}
    assert said["uni"] and said["virchow2"] and said["phikon-v2"] and not said["midnight"] and not said["h-optimus-0"]
    assert (
        pathology_encoders.known("kaiko-ai/midnight")
        == pathology_encoders.known("/models/Midnight-12k/")
        == pathology_encoders.KNOWN["midnight"]
    )
    assert pathology_encoders.known("mini-ssl") == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cnn", "random weights"),
        ("timm:resnet18", "timm:resnet18@path/model.safetensors"),
        ("timm:resnet18@missing.safetensors", "put it there"),
        ("timm:resnet81@w.safetensors", "no model 'resnet81'"),
        ("uni", "expected mini-ssl"),
        ("models/uni", "no|expected mini-ssl"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_a_remedy(name, words, root):
    (root / "models").mkdir()
    (root / "w.safetensors").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        features.load(name)
    assert name.partition("@")[0] in str(raised.value)


def test_weights_of_another_architecture_are_refused(root):
    save_file({"conv.weight": torch.zeros(1)}, root / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        features.load("torchvision:resnet18@w.safetensors")


def test_random_weights_follow_from_the_seed():
    a, b, c = (features.load("cnn", frozen=False, seed=s).net.stem[0].weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
