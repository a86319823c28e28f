"""The embedded base: what it may have seen, how large it is, that it works."""

import pytest
import torch

from histokit import backbone, corpus, data, decode, encoders, files, ldm, pretrain, toy

pytestmark = pytest.mark.skipif(not backbone.MINI.is_dir(), reason="histokit/mini is not there: `histokit run params/mini.yaml` trains it")
SEEN_CLASSES = {"Adenocarcinoma", "High-grade_IN", "Low-grade_IN"}


@pytest.fixture(scope="module")
def seen():
    return files.read_table(backbone.MINI / "trained_on.csv")


@pytest.fixture
def ebhi(repository):
    folder = repository.parent / "shared" / "data" / "ebhi-seg"
    if not folder.is_dir():
        pytest.skip(f"EBHI-Seg is not at {folder}")
    return data.describe(repository / "params" / "datasets" / "ebhi_seg.yaml", root=folder)


def test_it_has_not_seen_what_experiments_make_rare(seen, ebhi):
    manifest = data.scan(ebhi)
    allowed = manifest[manifest["split"].eq("train") & manifest["label"].isin(SEEN_CLASSES)]
    listed = seen[seen["source"].str.contains("ebhi")]
    assert set(listed["tile"]) == set(allowed["file_name"])
    others = manifest[~manifest["file_name"].isin(allowed["file_name"])]
    hashes = {corpus.pixels_hash(_pixels(ebhi.root / name)) for name in others["file_name"]}
    assert not hashes & set(seen["pixels_sha256"])


def test_the_list_is_true_of_the_files(seen, ebhi):
    listed = seen[seen["source"].str.contains("ebhi")].head(20)
    assert [corpus.pixels_hash(_pixels(ebhi.root / row.tile)) for row in listed.itertuples()] == listed["pixels_sha256"].tolist()


def test_it_has_not_seen_toys_rare_classes_or_any_of_its_tiles(seen):
    tail = {name for name, facts in toy.CLASSES.items() if facts["role"] == "tail"}
    assert not tail & set(seen.loc[seen["source"].eq("toy"), "label"])
    plan = toy.plan().groupby("label").head(3)
    own = {corpus.pixels_hash(toy.tile(row.label, row.case_id, row.index)[0]) for row in plan.itertuples(index=False)}
    assert not own & set(seen["pixels_sha256"])


def test_it_is_small_and_half_precision():
    size = sum(path.stat().st_size for path in backbone.MINI.rglob("*") if path.is_file())
    assert size <= 34e6
    model = backbone.load("mini")
    assert sum(p.numel() for p in model.unet.parameters()) <= 11e6
    assert len(model.tokenizer) <= 2000 and model.factor == 4 and model.tile_px == 128
    assert model.scheduler.config.prediction_type == "v_prediction"


def test_a_round_trip_keeps_structure_and_stain(ebhi):
    manifest = data.scan(ebhi)
    held = manifest[manifest["split"].eq("val")]
    corpora = corpus.Corpus(images=[_pixels(ebhi.root / name) for name in held["file_name"]])
    tiles, _ = pretrain.whole_tiles(corpora, 128, 10_000)
    back = ldm.reconstruct(backbone.load("mini").vae, tiles)
    assert len(tiles) == 224 and float(ldm.psnr(back, tiles).mean()) >= 22
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
