"""The toy data: what it promises about names, splits, truth, colour and morphology."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy import stats

from histokit import toy
from histokit.toy import canvas, dataset, morphometry, words

NAMES = list(toy.CLASSES)
TAILS = [name for name, about in toy.CLASSES.items() if about["role"] == "tail"]


@pytest.fixture(scope="module")
def drawn():
    """Twelve tiles of each class, one per case: rows of (class, image, mask, truth)."""
    return [(name, *toy.tile(name, f"T{case}", 0)) for name in NAMES for case in range(12)]


@pytest.fixture(scope="module")
def whole():
    """The pixels of the whole dataset at 64 px (half scale), with its plan."""
    table = toy.plan()
    images = [half(toy.tile(row.label, row.case_id, row.index)[0]) for row in table.itertuples()]
    return table, np.stack(images)


def half(image):
    """An image [H, W, 3] at half its size, by averaging."""
    h, w, _ = image.shape
    return image.reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- names and files


def test_a_tile_depends_only_on_its_name():
    alone = toy.tile("fat", "C007", 3)
    for other in ("stroma", "cribriform"):
        toy.tile(other, "C007", 0)
    again = toy.tile("fat", "C007", 3)
    assert (alone[0] == again[0]).all() and (alone[1] == again[1]).all() and alone[2] == again[2]
    for different in (("fat", "C007", 4), ("fat", "C008", 3), ("stroma", "C007", 3)):
        assert (toy.tile(*different)[0] != alone[0]).any()
    assert (toy.tile("fat", "C007", 3, seed=1)[0] != alone[0]).any()


@pytest.mark.parametrize("px", [64, 128, 200])
def test_a_tile_has_the_size_asked_for(px):
    for name in NAMES:
        image, mask, _ = toy.tile(name, "C001", 0, px=px)
        assert image.shape == (px, px, 3) and mask.shape == (px, px)
        assert image.dtype == mask.dtype == np.uint8


def test_an_unknown_class_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="stroma, lymphoid"):
        toy.tile("bone", "C001", 0)


def test_a_finished_folder_is_left_alone_and_another_seed_refused(tmp_path, monkeypatch):
    short = toy.plan().groupby("label").head(2)
    monkeypatch.setattr(dataset, "plan", lambda seed=0: short)
    table = toy.write(tmp_path / "toy")
    first = tmp_path / "toy" / table.path[0]
    before = first.stat().st_mtime_ns
    pd.testing.assert_frame_equal(toy.write(tmp_path / "toy"), table)
    assert first.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="new folder"):
        toy.write(tmp_path / "toy", seed=1)


def test_the_description_names_a_folder_of_this_version_so_that_an_older_clone_can_draw_anew():
    described = yaml.safe_load((Path(__file__).parents[1] / "params" / "datasets" / "toy.yaml").read_text())
    assert described["root"].endswith(f"toy-{dataset.VERSION}")


def test_written_files_are_what_tile_draws(tmp_path, monkeypatch):
    short = toy.plan().groupby("label").head(1)
    monkeypatch.setattr(dataset, "plan", lambda seed=0: short)
    for row, planned in zip(toy.write(tmp_path).itertuples(), short.itertuples(), strict=True):
        image, mask, truth = toy.tile(row.label, row.case_id, planned.index)
        assert (np.array(Image.open(tmp_path / row.path)) == image).all()
        assert (np.array(Image.open(tmp_path / row.mask)) == mask).all()
        assert row.nuclei_count == truth["nuclei_count"] and row.mpp == 0.5


# ---------------------------------------------------------------------------------------------- the plan


def test_a_case_is_in_one_split():
    table = toy.plan()
    assert (table.groupby("case_id").split.nunique() == 1).all()
    assert table.case_id.nunique() >= 40
    assert not table.duplicated(["label", "case_id", "index"]).any()


def test_tail_classes_have_ten_training_tiles_from_few_cases():
    table = toy.plan()
    assert len(TAILS) == 2
    for name in TAILS:
        rows = table[table.label == name]
        train, test = rows[rows.split == "train"], rows[rows.split == "test"]
        assert len(train) == 10 and train.case_id.nunique() == 3
        assert len(test) >= 24 and test.case_id.nunique() >= 8
        assert rows[rows.split == "val"].case_id.nunique() >= 8


def test_head_classes_have_enough_training_tiles_and_share_cases():
    train = toy.plan().query("split == 'train'")
    heads = train[~train.label.isin(TAILS)]
    assert heads.label.value_counts().between(60, 120).all()
    assert (heads.groupby("case_id").label.nunique() >= 2).all()
    assert len(toy.plan()) <= 1000


def test_the_plan_follows_from_its_seed():
    pd.testing.assert_frame_equal(toy.plan(3), toy.plan(3))
    assert not toy.plan(3).equals(toy.plan(4))


# ---------------------------------------------------------------------------------------------- truth


def test_masks_agree_with_truth(drawn):
    for name, _, mask, truth in drawn:
        for key, what in [("lumen_area", "lumen"), ("fat_area", "fat"), ("mucin_area", "mucin")]:
            assert truth[key] == pytest.approx((mask == dataset.MASK_VALUES[what]).mean()), name
        # nuclei touch, and some end at the border, so the area of all is the firmer comparison
        drawn_area = (mask == dataset.MASK_VALUES["nuclei"]).sum()
        assert 0.5 < drawn_area / (truth["nuclei_count"] * truth["nuclei_size"]) < 1.4, name


def test_every_class_holds_what_it_is_named_for(drawn):
    truth = pd.DataFrame([{"label": name, **t} for name, _, _, t in drawn]).set_index("label")
    assert (truth.loc["mucinous", "mucin_area"] > 0.2).all() and (truth.drop("mucinous").mucin_area == 0).all()
    assert (truth.loc["fat", "fat_area"] > 0.2).all()
    assert truth.loc["cribriform", "lumen_count"].mean() > 2 * truth.loc["normal_gland", "lumen_count"].mean()
    assert truth.loc["solid_tumour", "nuclei_size"].mean() > 1.8 * truth.loc["normal_gland", "nuclei_size"].mean()
    assert (truth.loc[["stroma", "lymphoid", "fat", "solid_tumour"], "lumen_area"] == 0).all()


def test_other_looks_belong_to_no_class():
    rng = np.random.default_rng(0)
    for _ in range(300):
        look = dataset.other_look(rng)
        assert not any(dataset.belongs(look, name) for name in NAMES)


def test_a_look_of_a_class_belongs_to_it():
    for name in NAMES:
        for case in range(20):
            rng = np.random.default_rng(case)
            assert dataset.belongs(dataset.class_look(name, rng, rng), name)


def test_other_looks_never_hold_what_defines_a_tail_class():
    rng = np.random.default_rng(1)
    looks = [dataset.other_look(rng) for _ in range(500)]
    assert not any(look.mucin or look.gland == "cribriform" for look in looks)
    assert not any(look.sheet and look.fat for look in looks)  # holes in solid epithelium
    for index in range(30):
        _, caption, truth = toy.random_look(index)
        assert truth["mucin_area"] == 0
        assert not {"mucin", "mucinous", "cribriform", "holes", "clusters"} & set(caption.replace(",", "").split())


def test_captions_use_a_small_vocabulary():
    rng = np.random.default_rng(2)
    used = set()
    for _ in range(1500):
        text = words.describe(dataset.other_look(rng), canvas.random_stain(rng), rng)
        used |= set(text.replace(",", "").split())
    for name in NAMES:
        texts = {words.caption(name, rng) for _ in range(60)}
        assert len(texts) > 5
        used |= set(" ".join(texts).replace(",", "").split())
    assert len(used) < 150


# ---------------------------------------------------------------------------------------------- measuring


def test_measure_follows_the_truth(drawn):
    truth = pd.DataFrame([t for *_, t in drawn])
    found = pd.DataFrame([morphometry.measure(image) for _, image, _, _ in drawn])
    empty, glands = truth.lumen_area + truth.fat_area, np.array(["gl" in n or n in ("adenoma", "cribriform") for n, *_ in drawn])
    clear = truth.mucin_area == 0  # a pool is neither empty nor tissue
    assert stats.spearmanr(truth.nuclei_count, found.nuclei_count)[0] > 0.8
    assert stats.spearmanr(truth.nuclei_size, found.nuclei_size)[0] > 0.7
    assert stats.spearmanr(empty[clear], found.lumen_area[clear])[0] > 0.7
    assert stats.spearmanr(truth.lumen_count[glands], found.lumen_count[glands])[0] > 0.6


def test_measure_finds_the_direction_of_fibres(drawn):
    for name, image, _, truth in drawn:
        if name == "stroma":
            apart = abs(morphometry.measure(image)["fibre_orientation"] - truth["fibre_orientation"])
            assert min(apart, 180 - apart) < 15


def test_measure_turns_with_the_tile(drawn):
    image = drawn[0][1]
    plain, turned = morphometry.measure(image), morphometry.measure(np.rot90(image).copy())
    assert turned["nuclei_count"] == pytest.approx(plain["nuclei_count"], abs=2)
    apart = abs(turned["fibre_orientation"] - plain["fibre_orientation"])
    assert apart == pytest.approx(90, abs=1)


def test_measure_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        morphometry.measure(np.zeros((8, 8, 3)))


def test_measure_takes_an_empty_tile():
    blank = morphometry.measure(np.full((64, 64, 3), 240, np.uint8))
    assert blank["nuclei_count"] == 0 and blank["lumen_area"] == 1


# ---------------------------------------------------------------------------------------------- is it a fair task?


def test_colour_alone_does_not_solve_it(whole):
    linear_model = pytest.importorskip("sklearn.linear_model")
    table, images = whole
    x, y = np.stack([colours(image) for image in images]), table.label.map(NAMES.index).to_numpy()
    train, test = (table.split == "train").to_numpy(), (table.split == "test").to_numpy()
    x = (x - x[train].mean(0)) / x[train].std(0).clip(1e-6)
    model = linear_model.LogisticRegression(C=1, max_iter=3000, class_weight="balanced").fit(x[train], y[train])
    assert balanced_accuracy(y[test], model.predict(x[test])) < 0.6


def colours(image):
    """Mean, spread and 8-bin histogram of each channel [30]: all that is left when places are forgotten."""
    flat = image.reshape(-1, 3) / 255
    bins = [np.histogram(channel, 8, (0, 1))[0] / len(flat) for channel in flat.T]
    return np.concatenate([flat.mean(0), flat.std(0), *bins])


def balanced_accuracy(y_true, y_pred):
    """Mean recall over the classes, in [0, 1]."""
    return np.mean([(y_pred[y_true == c] == c).mean() for c in np.unique(y_true)])


def test_the_head_classes_are_learnable_and_ten_tiles_are_not_enough(whole):
    """A small CNN on 60 and more tiles of each head class, and on ten of each from three cases."""
    table, images = whole
    heads = ~table.label.isin(TAILS)
    train, test = table[heads & (table.split == "train")], table[heads & (table.split == "test")]
    few = pd.concat([rows[rows.case_id.isin(rows.case_id.unique()[:3])].head(10) for _, rows in train.groupby("label")])
    many = score(images, table, train.index, test.index)
    assert many > 0.9
    assert score(images, table, few.index, test.index) < many - 0.1


@pytest.mark.slow
def test_plenty_of_tiles_solve_all_eight_classes():
    rows = [(n, f"{s}{c:02d}", i) for n in NAMES for s, k in (("P", 30), ("Q", 15)) for c in range(k) for i in range(6 if s == "P" else 2)]
    table = pd.DataFrame(rows, columns=["label", "case_id", "index"])
    images = np.stack([half(toy.tile(*row)[0]) for row in rows])
    train = table.case_id.str.startswith("P")
    assert score(images, table, table.index[train], table.index[~train], steps=600) >= 0.95


def score(images, table, train, test, steps=300):
    """Balanced accuracy on rows `test` of a small CNN trained on rows `train`; colours are jittered."""
    torch = pytest.importorskip("torch")
    from torch import nn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # convolutions this small lose time to a second thread
    torch.manual_seed(0)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.tensor(table.label.map(NAMES.index).to_list())
    widths = [3, 12, 24, 48, 48]
    layers = [
        layer
        for a, b in pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(NAMES)))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    train = torch.tensor(train.to_list())

    for _ in range(steps):
        pick = train[torch.randint(len(train), (32,))]
        batch = x[pick] * (0.85 + 0.3 * torch.rand(32, 3, 1, 1)) + 0.2 * (torch.rand(32, 3, 1, 1) - 0.5)
        if torch.rand(()) < 0.5:
            batch = batch.transpose(2, 3)
        loss = nn.functional.cross_entropy(model(batch.flip(2) if torch.rand(()) < 0.5 else batch), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        guess = torch.cat([model(part) for part in x[test.to_list()].split(64)]).argmax(1)
    torch.set_num_threads(threads)
    result = balanced_accuracy(y[test.to_list()].numpy(), guess.numpy())
    print(f"balanced accuracy {result:.3f} on {len(test)} tiles after training on {len(train)}")
    return result
