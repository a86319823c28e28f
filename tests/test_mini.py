"""The embedded base: what it may have seen, how large it is, that it works."""

import pytest
import torch

from histokit import toy
from histokit.core import files
from histokit.diffusion import backbone, pretrained
from histokit.tiles import data, decode
from histokit.training.pretraining import corpus, decoder, held_out, ldm
from histokit.vision import encoders

pytestmark = pytest.mark.skipif(
    not pretrained.MINI.is_dir(), reason="histokit/mini is not there: `histokit run params/mini.yaml` trains it"
)
LOOKS, TOY = "looks", "toy"
DATASETS = {  # description: folder below ../shared/data, classes whose training tiles it may have seen
    "ebhi_seg": ("ebhi-seg", {"Adenocarcinoma", "High-grade_IN", "Low-grade_IN"}),  # not Normal, Polyp, Serrated_adenoma
    "pcam_mini": ("pcam-mini", {"normal", "tumor"}),
}
HEADS = {name for name, facts in toy.CLASSES.items() if facts["role"] == "head"}


@pytest.fixture(scope="module")
def seen():
    return files.read_table(pretrained.MINI / "trained_on.csv")


def described(repository, name):
    folder = repository.parent / "shared" / "data" / DATASETS[name][0]
    if not folder.is_dir():
        pytest.skip(f"{name} is not at {folder}")
    return data.describe(repository / "params" / "datasets" / f"{name}.yaml", root=folder)


@pytest.fixture
def ebhi(repository):
    return described(repository, "ebhi_seg")


def source(name):
    return f"params/datasets/{name}.yaml"


def test_the_list_holds_training_tiles_of_classes_that_may_be_seen(seen):
    allowed = {source(name): classes for name, (_, classes) in DATASETS.items()} | {TOY: HEADS, LOOKS: {""}}
    assert {name: set(rows["label"]) for name, rows in seen.groupby("source")} == allowed
    real = seen[seen["source"].isin([source(name) for name in DATASETS])]
    assert [f"train/{row.label}/" for row in real.itertuples()] == [tile[: tile.rindex("/") + 1] for tile in real["tile"]]
    assert seen["pixels_sha256"].str.fullmatch("[0-9a-f]{64}").all()


@pytest.mark.parametrize("name", DATASETS)
def test_it_has_not_seen_what_experiments_make_rare_or_measure_on(seen, name, repository):
    there = described(repository, name)
    manifest = data.scan(there)
    allowed = manifest[manifest["split"].eq("train") & manifest["label"].isin(DATASETS[name][1])]
    assert set(seen.loc[seen["source"].eq(source(name)), "tile"]) == set(allowed["file_name"])
    others = manifest[~manifest["file_name"].isin(allowed["file_name"])]
    assert {"val", "test"} <= set(others["split"])
    hashes = {corpus.pixels_hash(_pixels(there.root / tile)) for tile in others["file_name"]}
    assert not hashes & set(seen["pixels_sha256"])


@pytest.mark.parametrize("name", DATASETS)
def test_the_list_is_true_of_the_files(seen, name, repository):
    there = described(repository, name)
    listed = seen[seen["source"].eq(source(name))].groupby("label").head(8)
    assert [corpus.pixels_hash(_pixels(there.root / row.tile)) for row in listed.itertuples()] == listed["pixels_sha256"].tolist()


def test_it_has_seen_toys_head_classes_in_cases_that_toy_does_not_have(seen):
    mine = seen[seen["source"].eq(TOY)].reset_index(drop=True)
    named = mine["tile"].str.extract(r"^(?P<label>\w+) (?P<case>.+) (?P<index>\d+) seed (?P<seed>\d+)$")
    assert named["label"].equals(mine["label"])
    assert named["case"].str.fullmatch(r"pretrain \d+").all() and not set(named["case"]) & set(toy.plan()["case_id"])
    for i in named.groupby(["label", "seed"]).head(1).index:  # a case fixes stain and focus, so the name must be the picture's own
        label, case, index, seed = named.loc[i]
        drawn = {corpus.pixels_hash(toy.tile(label, case, int(index), px, int(seed))[0]) for px in (128, 160)}  # 160 in the first rounds
        assert mine["pixels_sha256"][i] in drawn, mine["tile"][i]


def test_it_is_small_and_half_precision():
    size = sum(path.stat().st_size for path in pretrained.MINI.rglob("*") if path.is_file())
    assert size <= 34e6
    model = backbone.load("mini")
    assert sum(p.numel() for p in model.unet.parameters()) <= 11e6
    assert len(model.tokenizer) <= 2000 and model.factor == 4 and model.tile_px == 128
    assert model.scheduler.config.prediction_type == "v_prediction"


def test_a_round_trip_keeps_structure_and_stain(ebhi):
    manifest = data.scan(ebhi)
    held = manifest[manifest["split"].eq("val")]
    corpora = corpus.Corpus(images=[_pixels(ebhi.root / name) for name in held["file_name"]])
    tiles, _ = held_out.whole_tiles(corpora, 128, 10_000)
    back = ldm.reconstruct(backbone.load("mini").vae, tiles)
    assert len(tiles) == 224 and float(ldm.psnr(back, tiles).mean()) >= 21.5  # a soft decoder had 22.7, and half of the fine contrast
    assert float(decoder.fine_contrast(back).mean() / decoder.fine_contrast(tiles).mean()) > 0.75
    hue, kept = (x.mean(dim=(2, 3))[:, 0] - x.mean(dim=(2, 3))[:, 1] for x in (tiles, back))
    assert float((kept - hue).square().mean() / hue.var()) < 0.25, "pink comes back purple"


@pytest.mark.parametrize("name", ["mini-ssl", "mini-sup"])
def test_its_encoders_tell_toys_head_classes_apart(name):
    heads = [c for c, facts in toy.CLASSES.items() if facts["role"] == "head"]
    draw = lambda case: torch.stack([torch.from_numpy(toy.tile(c, f"{case} {i}", i)[0]) for c in heads for i in range(4)])  # noqa: E731
    encoder = encoders.load(name)
    a, b = (torch.nn.functional.normalize(encoder(draw(case).numpy()), dim=-1) for case in ("test a", "test b"))
    labels = torch.arange(len(heads)).repeat_interleave(4)
    assert float((labels[(a @ b.T).argmax(-1)] == labels).float().mean()) >= 0.5, "chance is one in six"


def _pixels(path):
    import numpy as np

    return np.asarray(decode.rgb(path)[0])
