"""Clusters of features: the same whatever they were started from, kept, asked again, and refused where they say nothing."""

import numpy as np
import pandas as pd
import pytest
import squares
import torch

from histokit import runs
from histokit.core import files
from histokit.morphology import cluster_number, clusters, junk_tiles
from histokit.morphology.settings import Settings
from histokit.tiles import data
from histokit.vision import encoders


def blobs(counts=(40, 25, 12), width=8, seed=0, apart=6.0):
    """Points around well separated centres, and the blob of each."""
    rng = np.random.default_rng(seed)
    centres = np.eye(len(counts), width) * apart
    return np.concatenate([c + rng.normal(0, 0.4, (n, width)) for c, n in zip(centres, counts, strict=True)]), np.repeat(
        np.arange(len(counts)), counts
    )


def test_clusters_are_the_blobs_the_largest_first_whatever_the_start():
    feats, blob = blobs()
    for seed in range(4):
        held = clusters.fit(feats, ["a"] * len(feats), 3, seed=seed, pca=4)
        assert held.assign(feats, ["a"] * len(feats)).cluster.tolist() == blob.tolist()
        assert held.sizes[clusters.ALL].tolist() == [40, 25, 12]


def test_equal_clusters_keep_their_places_when_tiles_are_shuffled():
    feats, blob = blobs((20, 20, 20))
    order = np.random.default_rng(1).permutation(len(feats))
    first = clusters.fit(feats, ["a"] * 60, 3, scaling="none", pca=0).assign(feats, ["a"] * 60).cluster
    again = clusters.fit(feats[order], ["a"] * 60, 3, scaling="none", pca=0, seed=7).assign(feats, ["a"] * 60).cluster
    assert first.tolist() == again.tolist() and pd.Series(first).groupby(blob).nunique().eq(1).all()


def test_nearest_centroid_distance_and_margin_are_those_of_the_definition():
    feats, _ = blobs()
    held = clusters.fit(feats, ["a"] * len(feats), 3, scaling="standardise", pca=5)
    found, points = held.assign(feats, ["a"] * len(feats)), held.space(feats).astype(np.float64)
    apart = np.linalg.norm(points[:, None] - held.centroids[clusters.ALL][None], axis=-1)
    assert found.cluster.tolist() == apart.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.distance, np.sort(apart, axis=1)[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.margin, np.diff(np.sort(apart, axis=1)[:, :2])[:, 0], atol=1e-5)


@pytest.mark.parametrize("scope", clusters.SCOPES)
@pytest.mark.parametrize("names", [("only",), ("a", "b"), ("a", "b", "c", "d", "e")])
def test_any_number_of_classes_in_every_scope(scope, names):
    feats, blob = blobs((20,) * 5)
    labels = [names[i % len(names)] for i in blob]
    held = clusters.fit(feats, labels, 4, scope=scope, pca=5)
    found = held.assign(feats, labels)
    assert set(held.centroids) == (set(names) if scope == "per_label" else {clusters.ALL})
    for key, size in held.sizes.items():
        mine = [cluster for cluster, label in zip(found.cluster, labels, strict=True) if held.of(label) == key]
        assert np.bincount(mine, minlength=len(size)).tolist() == size.tolist()


def test_families_stand_together_and_the_largest_comes_first():
    feats, _ = blobs((10, 12, 30, 31), apart=6.0)
    feats[:22, 4] += 20  # two pairs of blobs, far apart
    held = clusters.fit(feats, ["a"] * len(feats), 4, scope="hierarchical", families=2, scaling="none", pca=0)
    assert held.families.tolist() == [0, 0, 1, 1]
    assert held.sizes[clusters.ALL].tolist() == [31, 30, 12, 10]


def test_a_small_class_has_fewer_clusters_and_a_class_of_one_tile_has_one():
    feats, _ = blobs((30, 30, 1))
    labels = ["common"] * 50 + ["rare"] * 10 + ["single"]
    held = clusters.fit(feats, labels, 5, scope="per_label", least=10, pca=0)
    assert {name: len(centres) for name, centres in held.centroids.items()} == {"common": 5, "rare": 1, "single": 1}
    found = held.assign(feats, labels)
    assert found.cluster[-1] == 0 and np.isnan(found.margin[-1])


def test_what_is_kept_assigns_as_what_was_fitted(tmp_path):
    feats, _ = blobs()
    labels = ["a" if i % 2 else "b" for i in range(len(feats))]
    for scope in clusters.SCOPES:
        held = clusters.fit(feats, labels, 3, scope=scope, pca=3, facts={"encoder": "x", "encoder_identity": "y"})
        clusters.save(tmp_path / scope, held)
        again = clusters.load(tmp_path / scope)
        assert again.assign(feats, labels).cluster.tolist() == held.assign(feats, labels).cluster.tolist()
        assert clusters.digest(again) == clusters.digest(held) and again.facts == held.facts
        assert (again.families is None) == (scope != "hierarchical")
    with pytest.raises(FileNotFoundError, match="10_morphology_prompts"):
        clusters.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"k": 200}, "200 clusters asked of 77 tiles"),
        ({"scope": "locally"}, "scope is 'locally'"),
        ({"scaling": "log"}, "scaling is 'log'"),
        ({"nan": True}, "features of 1 tiles are not finite, the first of row 5"),
        ({"same": True}, "too few different ones"),
    ],
)
def test_what_cannot_be_clustered_is_refused(change, expected):
    feats, _ = blobs()
    feats[5, 2] = np.nan if change.pop("nan", False) else feats[5, 2]
    feats = np.ones_like(feats) if change.pop("same", False) else feats
    with pytest.raises(ValueError, match=expected):
        clusters.fit(feats, ["a"] * len(feats), **{"k": 3, **change})


def test_clusters_of_another_encoder_and_of_another_class_are_refused():
    squares.dataset()
    tiles = data.training(data.load(runs.start(experiment="exp", step="look")))
    encoder = encoders.load("colour-texture")
    feats = np.stack([encoder(data.pixels(row))[0].numpy() for _, row in tiles.iterrows()])
    held = clusters.fit(feats, tiles["label"].tolist(), 2, scope="per_label", least=2, facts=clusters.encoder_facts(encoder))
    assert clusters.assign_tiles(held, tiles).cluster.tolist() == held.assign(feats, tiles["label"].tolist()).cluster.tolist()
    other = clusters.Clusters(held.scope, held.space, held.centroids, held.sizes, None, held.facts | {"encoder_identity": "other"})
    with pytest.raises(ValueError, match="other weights"):
        clusters.assign_tiles(other, tiles)
    with pytest.raises(ValueError, match="another encoder"):
        held.assign(feats[:, :-1], tiles["label"].tolist())
    with pytest.raises(ValueError, match="no clusters of class 'purple'"):
        held.assign(feats, ["purple"] * len(feats))


def test_examples_are_the_middle_and_the_border_of_each_cluster():
    feats, _ = blobs()
    labels = ["a"] * len(feats)
    held = clusters.fit(feats, labels, 3, pca=4)
    found, shown = held.assign(feats, labels), clusters.examples(held, feats, labels, medoids=3, borders=2)
    for k in range(3):
        mine = np.flatnonzero(found.cluster == k)
        medoids = shown[shown["cluster"].eq(k) & shown["role"].eq("medoid")]["row"].tolist()
        assert medoids == mine[np.argsort(found.distance[mine])][:3].tolist()
        border = shown[shown["cluster"].eq(k) & shown["role"].eq("border")]["row"].tolist()
        assert set(border) <= set(mine[np.argsort(found.margin[mine])][:2].tolist())


# --- the right pixels ------------------------------------------------------------------------------------------------


def test_a_tile_reaches_the_network_scaled_once():
    """Scaled twice, as the released code does, its channels have a deviation of two thousandths."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x.mean(dim=(2, 3))

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tile = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    encoders.Encoder("spy", Spy(), 3, {}, mean=mean, std=std)(tile)
    expected = (tile[0].astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert seen[0].std() > 0.5


# --- how many --------------------------------------------------------------------------------------------------------


def test_the_number_of_clusters_is_that_of_the_blobs():
    feats, _ = blobs((40, 40, 40, 40), apart=8.0)
    found, table = cluster_number.choose(feats, ["a"] * 160, "global", Settings(scaling="none", pca=0, ks=[2, 3, 4, 5, 6]))
    row = table.set_index("k").loc[4]
    assert found == {clusters.ALL: 4} and row["silhouette"] == table["silhouette"].max() and row["stability"] == 1.0
    assert table.loc[table["chosen"], "k"].tolist() == [4]


def test_nine_blobs_in_sixteen_dimensions_are_nine_clusters():
    rng = np.random.default_rng(0)
    feats = np.concatenate([centre + rng.normal(0, 0.8, (30, 16)) for centre in rng.normal(0, 3, (9, 16))])
    found, table = cluster_number.choose(feats, ["a"] * 270, "global", Settings(scaling="none", pca=0))
    assert found == {clusters.ALL: 9}
    assert table.loc[table["s_dbw"].idxmin(), "k"] > 9  # which is why it does not choose


def test_s_dbw_is_that_of_the_paper():
    """Halkidi and Vazirgiannis (2001), term by term, on nine points."""
    points = np.array([[0, 0], [0, 1], [1, 0], [5, 5], [5, 6], [6, 5], [0, 9], [0, 10], [1, 9.0]])
    labels = np.repeat([0, 1, 2], 3)
    sigma = lambda part: np.sqrt(sum((np.mean([(p[j] - part[:, j].mean()) ** 2 for p in part])) ** 2 for j in range(2)))  # noqa: E731
    parts = [points[labels == k] for k in range(3)]
    radius = np.sqrt(sum(sigma(part) for part in parts)) / 3
    density = lambda at, *sets: sum(np.sqrt(((p - at) ** 2).sum()) <= radius for part in sets for p in part)  # noqa: E731
    between = 0
    for i in range(3):
        for j in range(3):
            if i != j:
                ci, cj = parts[i].mean(0), parts[j].mean(0)
                own = max(density(ci, parts[i], parts[j]), density(cj, parts[i], parts[j]))
                between += density((ci + cj) / 2, parts[i], parts[j]) / max(own, 1)
    expected = sum(sigma(part) for part in parts) / 3 / sigma(points) + between / 6
    assert cluster_number.s_dbw(points, labels) == pytest.approx(expected)


def test_too_few_tiles_for_two_clusters_make_one():
    feats, _ = blobs((5, 4))
    found, table = cluster_number.choose(feats, ["a"] * 5 + ["b"] * 4, "per_label", Settings())
    assert found == {"a": 1, "b": 1} and table.empty


def test_an_option_there_is_not_names_the_nearest():
    with pytest.raises(ValueError, match="'scalling'; did you mean scaling"):
        Settings.of({"scalling": "l2"})
    with pytest.raises(ValueError, match="cap is -1"):
        Settings.of({"cap": -1})


# --- junk ------------------------------------------------------------------------------------------------------------


def drawn(kind):
    rng = np.random.default_rng(0)
    tissue = (rng.integers(0, 256, (24, 24, 3)) * [0.5, 0.3, 0.5] + [110, 60, 110]).clip(0, 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    blurred = np.full((96, 96, 3), 0.0) + np.linspace(100, 220, 96)[:, None, None] * [1, 0.6, 0.9]
    return {
        "tissue": tissue,
        "ink": (tissue * 0.2).astype(np.uint8),
        "glass": np.full((96, 96, 3), 240, np.uint8),
        "blur": blurred.astype(np.uint8),
    }[kind]


def test_ink_glass_and_blur_are_told_from_tissue():
    found = junk_tiles.statistics(np.stack([drawn(kind) for kind in ("tissue", "ink", "glass", "blur")]))
    limits = {name: limit for name, (_, limit, _) in junk_tiles.RULES.items()}
    fired = [{name for name in limits if row[name] < limits[name]} for _, row in found.iterrows()]
    assert fired[0] == set() and "brightness" in fired[1]
    assert {"saturation", "brightness_std", "saturation_std", "sharpness"} <= fired[2] and "sharpness" in fired[3]


def test_hue_is_measured_around_the_circle():
    red = np.zeros((2, 96, 96, 3), np.uint8)
    red[..., 0], red[:, :48, :, 1], red[:, 48:, :, 2] = 200, 20, 20  # hues on both sides of 0
    red[1, :, :, 1], red[1, :, :, 2] = 0, 0
    found = junk_tiles.statistics(red)
    assert found["hue_std"][0] < 8 and found["hue_std"][1] == pytest.approx(0, abs=0.1)


def test_contours_count_areas_and_holes():
    mask = np.zeros((96, 96), bool)
    mask[10:30, 10:30], mask[15:20, 15:20], mask[60:70, 60:70] = True, False, True
    assert junk_tiles._contours(mask) == 3
    assert junk_tiles._contours(~mask) == 4  # the background, its two holes, and what lies in the first


def test_a_rare_class_is_not_emptied_by_rules_and_it_is_said(root):
    rows = []
    for name, kinds in {"common": ["tissue"] * 3 + ["glass"], "rare": ["tissue", "glass", "glass"]}.items():
        rows += [squares.row(root, f"{name}{i}.png", drawn(kind), label=name) for i, kind in enumerate(kinds)]
    tiles = pd.DataFrame(rows).assign(path=[str(root / row["file_name"]) for row in rows], tile_px=96, fit="resize")
    found = junk_tiles.find(tiles, {"sharpness": 0}, rare=["rare"])
    assert found.groupby("label")["dropped"].sum().to_dict() == {"common": 1, "rare": 0}
    assert junk_tiles.report(found).set_index("class")["like junk"].to_dict() == {"common": 1, "rare": 2}
    (said,) = junk_tiles.remarks(found)
    assert said.startswith("rare: 2 of 3 tiles look like junk")
    forced = junk_tiles.find(tiles, rare=["rare"], most=1.0)
    assert forced.groupby("label")["dropped"].sum().to_dict() == {"common": 1, "rare": 2}
    off = junk_tiles.find(tiles, dict.fromkeys(junk_tiles.RULES, 0))
    assert not off["dropped"].any()
    with pytest.raises(ValueError, match="no statistic 'bright'"):
        junk_tiles.find(tiles, {"bright": 3})


def test_junk_is_found_by_tile_and_not_by_place(root):
    rows = [squares.row(root, f"{i}.png", drawn(kind), label="a") for i, kind in enumerate(["tissue", "glass", "tissue"])]
    tiles = pd.DataFrame(rows).assign(path=[str(root / row["file_name"]) for row in rows], tile_px=96, fit="resize")
    shuffled = tiles.iloc[[1, 2, 0]]
    assert junk_tiles.find(shuffled).set_index("tile_id")["dropped"].to_dict() == {"0.png": False, "1.png": True, "2.png": False}
    assert files.sha256(tiles["path"].iloc[0])
