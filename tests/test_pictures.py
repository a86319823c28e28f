"""Pictures by number from folders and tar shards, what is refused of them, and the order in which they are seen."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from histokit.core import files
from histokit.tiles.contamination import pixels_hash
from histokit.training.pretraining import corpus, pictures


def shade(i, px=24):
    """A picture that no other number has: its shade says which."""
    return np.full((px, px, 3), (7 * i) % 256, np.uint8) + np.arange(px, dtype=np.uint8)[:, None, None]


def png(image):
    held = io.BytesIO()
    Image.fromarray(image).save(held, "PNG")
    return held.getvalue()


def shard(path, numbers, extra=()):
    """A tar as webdataset writes it: picture and a text of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in [*((f"P{i % 5}_{i:03d}.png", png(shade(i))) for i in numbers), *extra]:
            for suffix, data in ((name, content), (name.replace(".png", ".json"), b"{}")):
                member = tarfile.TarInfo(suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tars(root):
    shard(root / "tars" / "a.tar", range(7))
    shard(root / "tars" / "b.tar", range(7, 12))
    return root / "tars"


def test_any_picture_of_any_shard_is_read_by_its_number(tars):
    found = pictures.Shards(tars)
    assert len(found) == 12 and found.name(8).endswith("b.tar/P3_008.png")
    for i in (11, 0, 7, 6, 3):
        np.testing.assert_array_equal(found[i], shade(i))


def test_a_shard_reads_as_its_files_do(tars, root):
    with tarfile.open(tars / "a.tar") as tar:
        tar.extractall(root / "plain", filter="data")
    plain, packed = pictures.Folder(root / "plain"), pictures.Shards(tars / "a.tar")
    assert sorted(plain.names) == sorted(packed.names)
    hashes = [set(pictures.survey(found)["pixels_sha256"]) for found in (plain, packed)]
    assert hashes[0] == hashes[1] == {pixels_hash(shade(i)) for i in range(7)}


def test_a_shard_that_was_cut_off_is_named(tars):
    whole = (tars / "b.tar").read_bytes()
    for end in (len(whole) // 2, len(whole) - 10240, 1536):  # in a member, where its zeros begin, at a member's end
        (tars / "b.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"b\.tar was cut off: .*copy or write it again"):
            pictures.Shards(tars)


def test_a_broken_header_in_the_middle_is_no_end(tars):
    whole = bytearray((tars / "b.tar").read_bytes())
    at = whole.index(b"P3_008.png")
    whole[at + 148 : at + 156] = b"00000000"  # its checksum
    (tars / "b.tar").write_bytes(whole)
    with pytest.raises(ValueError, match=r"b\.tar was cut off"):
        pictures.Shards(tars)


def test_an_empty_shard_a_compressed_one_and_no_shard_are_refused(tars, root):
    shard(root / "none" / "c.tar", [])
    with pytest.raises(ValueError, match=r"c\.tar holds no picture"):
        pictures.Shards(root / "none")
    (tars / "d.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"d\.tar\.gz is compressed"):
        pictures.Shards(tars)
    with pytest.raises(ValueError, match="no .tar file there"):
        pictures.Shards(root)
    with pytest.raises(ValueError, match="no such folder"):
        pictures.Folder(root / "nowhere")


def test_a_picture_that_cannot_be_decoded_is_named_with_its_shard_or_left_out(root):
    shard(root / "tars" / "a.tar", range(3), extra=[("bad.png", png(shade(9))[:60])])
    found = pictures.Shards(root / "tars")
    with pytest.raises(ValueError, match=r"1 of 4 pictures cannot be used:\n.*a\.tar/bad\.png: .*\n.*unreadable: leave_out"):
        pictures.survey(found)
    assert pictures.survey(found, "leave_out")["row"].tolist() == [0, 1, 2]


def test_a_survey_is_made_anew_when_a_file_changes(root):
    for i in range(3):
        files.write_png(root / "t" / f"{i}.png", shade(i))
    before = pictures.survey(pictures.Folder(root / "t"))
    files.write_png(root / "t" / "1.png", shade(40))
    after = pictures.survey(pictures.Folder(root / "t"))
    assert (before["pixels_sha256"] == after["pixels_sha256"]).tolist() == [True, False, True]


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own():
    weights, sources = np.full(50, 1 / 50), np.zeros(50, int)
    first, second = (pictures.order(weights, sources, 3, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first.tolist() != second.tolist()
    np.testing.assert_array_equal(first, pictures.order(weights, sources, 3, 0))
    assert first.tolist() != pictures.order(weights, sources, 4, 0).tolist()


def test_sources_have_their_share_and_one_that_is_drawn_oftener_comes_round_evenly():
    sources = np.array([0] * 30 + [1] * 10)
    weights = np.where(sources == 0, 0.3 / 30, 0.7 / 10)
    counts = np.zeros(40)
    for epoch in range(50):
        order = pictures.order(weights, sources, 0, epoch)
        assert len(order) == 40
        of = np.bincount(order, minlength=40)
        assert np.ptp(of[30:]) <= 1, "28 draws of 10 pictures: each comes two or three times"
        counts += of
    assert counts[30:].sum() / counts.sum() == pytest.approx(0.7, abs=0.005)


# --- as sources of a corpus


def test_tiles_without_labels_are_learned_from_and_one_in_fifty_is_held_out(root):
    shard(root / "tars" / "a.tar", range(12))
    for i in range(100, 104):
        files.write_png(root / "more" / f"{i}.png", shade(i))
    sources = {"scans": {"shards": "tars", "weight": 3}, "more": {"folder": "more"}}
    seen, held = corpus.gather(sources), corpus.gather(sources, split="val")
    assert len(seen.images) + len(held.images) == 16 and len(held.images) >= 2, "one of each at least"
    assert not set(seen.table["pixels_sha256"]) & set(held.table["pixels_sha256"])
    assert seen.table["weight"][seen.table["source"].eq("scans")].sum() == pytest.approx(0.75)
    assert set(seen.table["label"]) == {""} and seen.captions == [("",)] * len(seen.images)
    for i in range(len(seen.images)):
        assert pixels_hash(seen.images[i]) == seen.table["pixels_sha256"][i]


def test_a_case_pattern_keeps_cases_together_and_says_what_it_does_not_find(root):
    shard(root / "tars" / "a.tar", range(60))
    sources = {"scans": {"shards": "tars", "case_pattern": r"(P\d)_"}}
    seen, held = corpus.gather(sources), corpus.gather(sources, split="val")
    assert not set(seen.cases) & set(held.cases)
    with pytest.raises(ValueError, match="finds no case in 'P0_000.png'"):
        corpus.gather({"scans": {"shards": "tars", "case_pattern": r"(Q\d)_"}})
    with pytest.raises(ValueError, match="has no group"):
        corpus.gather({"scans": {"shards": "tars", "case_pattern": r"P\d_"}})


def test_settings_of_another_kind_of_source_are_refused(root):
    with pytest.raises(ValueError, match="source 'scans': unknown setting 'tiles'; use case_pattern, shards, unreadable, weight"):
        corpus.gather({"scans": {"shards": "tars", "tiles": 3}})
    with pytest.raises(ValueError, match="there is no run to read it in"):
        corpus.gather({"own": {"step": "00_dataset"}})
