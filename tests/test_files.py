import io
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from histokit.core import files

# ---- whole or absent


def _table(n):
    return pd.DataFrame({"tile_id": [f"t{i}" for i in range(n)], "score": np.random.default_rng(0).random(n)})


WRITERS = {
    "bytes": ("a.bin", lambda path, big: files.write_bytes(path, os.urandom(200_000 if big else 10))),
    "text": ("a.txt", lambda path, big: files.write_text(path, "ü" * (200_000 if big else 10))),
    "json": ("a.json", lambda path, big: files.write_json(path, list(range(100_000 if big else 10)))),
    "csv": ("a.csv", lambda path, big: files.write_table(path, _table(20_000 if big else 10))),
    "parquet": ("a.parquet", lambda path, big: files.write_table(path, _table(50_000 if big else 10))),
    "png": (
        "a.png",
        lambda path, big: files.write_png(path, np.random.default_rng(0).integers(0, 256, (300 if big else 4,) * 2 + (3,), "uint8")),
    ),
    "tensors": ("a.safetensors", lambda path, big: files.write_tensors(path, {"x": torch.rand(100_000 if big else 10)}, {"k": "v"})),
}


@pytest.fixture
def small_disk():
    """A disk on which no file can pass 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_as_it_was(kind, tmp_path, small_disk):
    name, write = WRITERS[kind]
    write(tmp_path / name, False)
    before = (tmp_path / name).read_bytes()
    small_disk()
    with pytest.raises(OSError, match=name):
        write(tmp_path / name, True)
    assert (tmp_path / name).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "params"])


def test_a_failed_link_over_a_full_disk_leaves_the_old_file(tmp_path, small_disk, monkeypatch):
    (tmp_path / "big").write_bytes(os.urandom(200_000))
    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(18, "cross-device link")))
    small_disk()
    with pytest.raises(OSError):
        files.link(tmp_path / "big", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"old"


def test_an_error_in_the_block_leaves_the_old_file_and_no_rubbish(tmp_path):
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), files.atomic(tmp_path / "a", "w") as file:
        file.write("half")
        raise KeyError("x")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "a", "old")
    code = f"""
        import os, signal
        from histokit.core import files
        with files.atomic({str(tmp_path / "a")!r}) as file:
            file.write(b"half"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    files.sweep(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_sweep_takes_only_our_own_leftovers(tmp_path):
    (tmp_path / ".theirs.tmp").write_text("x")
    files.sweep(tmp_path)
    assert (tmp_path / ".theirs.tmp").exists()


def test_a_read_only_folder_is_named_in_the_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        files.write_text(tmp_path / "file" / "a", "x")  # a file where a folder should be


def test_writing_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_writing_to_a_hard_link_does_not_touch_the_other_name(tmp_path):
    files.write_text(tmp_path / "a", "old")
    files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    files.link(tmp_path / "a", tmp_path / "b")  # once more is no harm
    files.write_text(tmp_path / "b", "new")
    assert (tmp_path / "a").read_text() == "old" and not list(tmp_path.glob(".*.tmp"))


# ---- JSON


def test_json_has_no_nan_and_knows_numpy_and_tensors(tmp_path):
    given = {
        "a": float("nan"),
        "b": np.float32(np.inf),
        "c": np.arange(2),
        "d": Path("x"),
        "e": torch.tensor([1.5, float("nan")]),
        "f": (1, "ü"),
        3: True,
    }
    text = files.write_json(tmp_path / "a.json", given).read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert strict == {"a": None, "b": None, "c": [0, 1], "d": "x", "e": [1.5, None], "f": [1, "ü"], "3": True}
    assert "ü" in text and files.read_json(tmp_path / "a.json") == strict


def test_json_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="object"):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1,}'])
def test_unreadable_json_names_the_file(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json"):
        files.read_json(tmp_path / "bad.json")


# ---- tables

NASTY = [
    "Größe, µm",
    'a "quoted" one',
    "two\nlines",
    "=cmd|' /C calc'!A0",
    "+1",
    "-5",
    "@SUM(A1)",
    "'=x",
    "''-1",
    "\ttab",
    "\rback",
    "a\rb",
    " x ",
    "",
    "NA",
    "null",
    "None",
    "#",
]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_text_survives_a_table(tmp_path, suffix):
    table = pd.DataFrame({"case_id": NASTY, "free": NASTY, "=danger": NASTY})
    back = files.read_table(files.write_table(tmp_path / f"a.{suffix}", table))
    assert back["case_id"].tolist() == NASTY and back["free"].tolist() == NASTY and list(back) == list(table)


def test_no_cell_of_a_csv_starts_a_formula(tmp_path):
    import csv

    files.write_table(tmp_path / "a.csv", pd.DataFrame({"case_id": NASTY, "=danger": NASTY, "n": range(len(NASTY))}))
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_numbers_keep_their_last_bit_and_names_stay_names(tmp_path, suffix):
    table = pd.DataFrame(
        {
            "case_id": [7, 12, 3],
            "patient": ["007", "1e5", "1"],
            "seed": [2**62 + 1, 0, -1],
            "x": [0.1 + 0.2, np.nan, 1e-300],
            "flag": [True, False, True],
            "mpp": [np.nan] * 3,
            "code": ["007", "012", "000"],
            "gaps": ["a", None, "b"],
        }
    )
    back = files.read_table(files.write_table(tmp_path / f"a.{suffix}", table))
    assert back["case_id"].tolist() == ["7", "12", "3"] and back["patient"].tolist() == ["007", "1e5", "1"]
    assert back["seed"].tolist() == table["seed"].tolist() and back["seed"].dtype == "int64"
    np.testing.assert_array_equal(back["x"], table["x"])
    assert back["flag"].dtype == bool and back["mpp"].isna().all() and back["mpp"].dtype == float
    assert back["code"].tolist() == ["007", "012", "000"] and back["gaps"].tolist() == ["a", "", "b"]


def test_long_numbers_with_gaps_keep_every_digit(tmp_path):
    table = pd.DataFrame({"tile_id": ["a", "b"], "seed": pd.array([2**62 + 1, None], dtype="Int64"), "id": ["9" * 19, "9" * 30]})
    for suffix in ("csv", "parquet"):
        back = files.read_table(files.write_table(tmp_path / f"a.{suffix}", table))
        assert back["seed"][0] == 2**62 + 1 and back["seed"].isna().tolist() == [False, True]
        assert back["id"].tolist() == ["9" * 19, "9" * 30]


def test_csv_and_parquet_give_the_same_table(tmp_path):
    table = pd.DataFrame({"tile_id": ["a", "b"], "label": pd.Categorical(["x", "y"]), "n": pd.array([1, None], dtype="Int64"), "w": [1, 2]})
    one, two = (files.read_table(files.write_table(tmp_path / f"a.{suffix}", table)) for suffix in ("csv", "parquet"))
    pd.testing.assert_frame_equal(one, two)


def test_an_empty_table_keeps_its_columns(tmp_path):
    for suffix in ("csv", "parquet"):
        back = files.read_table(files.write_table(tmp_path / f"a.{suffix}", pd.DataFrame({"tile_id": [], "score": []})))
        assert list(back) == ["tile_id", "score"] and len(back) == 0


def test_tables_of_spreadsheets_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("path;case\nä b.png;007\n", encoding="utf-8-sig")
    assert files.read_table(tmp_path / "a.csv").to_dict("list") == {"path": ["ä b.png"], "case": ["007"]}


@pytest.mark.parametrize(
    "name, content",
    [("a.csv", b""), ("a.csv", b"a,b\n1,2,3\n4\n5,6,7,8\n"), ("a.csv", "a\nü\n".encode("latin-1")), ("a.parquet", b"no"), ("a.xlsx", b"")],
)
def test_an_unreadable_table_names_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        files.read_table(tmp_path / name)


def test_lists_in_cells_are_refused(tmp_path):
    with pytest.raises(TypeError, match="sources"):
        files.write_table(tmp_path / "a.csv", pd.DataFrame({"sources": [["a"]]}))


# ---- pictures and tensors


def test_png_keeps_pixels_and_text(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), "uint8")
    files.write_png(tmp_path / "a.png", pixels, {"prompt": "Größe"})
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.text["prompt"] == "Größe"


@pytest.mark.parametrize("shape, dtype", [((4, 4, 3), "float32"), ((4, 4, 4), "uint8"), ((4,), "uint8")])
def test_png_refuses_other_arrays(tmp_path, shape, dtype):
    with pytest.raises(ValueError, match="uint8"):
        files.write_png(tmp_path / "a.png", np.zeros(shape, dtype))


def test_tensors_come_back_bit_for_bit_and_stock_safetensors_reads_them(tmp_path):
    import safetensors.torch

    given = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(2, 3, dtype=torch.bfloat16),
        "view": torch.randn(4, 4).T,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "learned": torch.nn.Parameter(torch.randn(2)),
    }
    given["shared"] = given["odd"]
    path = files.write_tensors(tmp_path / "a.safetensors", given, {"format": "pt", "token": "<hk-ä>"})
    for back in (files.read_tensors(path), safetensors.torch.load_file(path)):
        assert back.keys() == given.keys()
        for name, tensor in given.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor.detach())
    assert files.read_metadata(path) == {"format": "pt", "token": "<hk-ä>"}


def test_the_same_tensors_give_the_same_bytes_whatever_their_order(tmp_path):
    text = {str(i): "x" for i in range(9)}  # safetensors itself shuffles these
    files.write_tensors(tmp_path / "one", {"b": torch.ones(2), "a": torch.zeros(3).half()}, text)
    files.write_tensors(tmp_path / "two", {"a": torch.zeros(3).half(), "b": torch.ones(2)}, dict(reversed(text.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_pickle_is_not_read_as_tensors(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        files.read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="text"):
        files.write_tensors(tmp_path / "b", {}, {"rank": 4})


# ---- hashes, names


def test_digest_knows_values_not_order_or_container():
    assert files.digest({"a": 1, "b": [1, 2]}) == files.digest({"b": (1, 2), "a": np.int64(1)})
    assert len({files.digest(x) for x in (1, "1", True, None, [1], [[1]], 1.5, "")}) == 8
    assert files.digest("a", "b") != files.digest("ab") and len(files.digest()) == 64


def test_seed_is_stable_and_in_range():
    assert files.seed(0, "necrosis", 12) == files.seed(0, "necrosis", 12)
    seeds = {files.seed(0, "necrosis", i) for i in range(1000)}
    assert len(seeds) == 1000 and all(0 <= s < 2**63 for s in seeds)
    torch.Generator().manual_seed(max(seeds))


NAMES = [
    "High-grade IN",
    "high-grade in",
    "HIGH-GRADE_IN",
    "con",
    "CON",
    "nul.txt",
    "a/b",
    "a\\b",
    "a:b",
    "..",
    ".",
    " ",
    "",
    "癌",
    "肿",
    "tumor ",
    "tumor.",
    "all",
    "x" * 300,
]


def test_slugs_never_meet_even_where_case_does_not_count():
    slugs = [files.slug(name) for name in NAMES]
    assert len({slug.lower() for slug in slugs}) == len(NAMES)
    assert all(slug == slug.lower() and slug.isascii() and len(slug) <= 60 for slug in slugs)
    illegal = {"con", "nul", "aux", "prn", "all", ".", ".."}
    assert not [s for s in slugs if s in illegal or set(s) & set('<>:"/\\|?*. ') or s.endswith((".", " "))]


def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 3)
    (tmp_path / "a").write_bytes(b"four")
    first = files.sha256(tmp_path / "a")
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *a: pytest.fail("read again"))
    assert files.sha256(tmp_path / "a") == first
    monkeypatch.undo()
    (tmp_path / "a").write_bytes(b"fives")
    assert files.sha256(tmp_path / "a") != first


# ---- safe paths


@pytest.mark.parametrize("text", ["a.png", "a/b ä [1], c.png", "./a.png", "a//b.png", "..a/b..png", "a/./b"])
def test_plain_paths_stay_inside(tmp_path, text):
    assert files.inside(tmp_path, text).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "../a",
        "a/../../b",
        "a/../b",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a/..",
        "a/",
        "C:\\x",
        "C:x",
        "c:/x",
        "..\\a",
        "a\\..\\..\\b",
        "\\\\host\\share",
        "a\0b",
        "//host/x",
        "\\a",
    ],
)
def test_paths_that_lead_out_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="below"):
        files.inside(tmp_path, text)


def test_links_that_lead_out_are_refused_and_others_followed(tmp_path):
    home, away = tmp_path / "home", tmp_path / "home-not"
    (home / "real").mkdir(parents=True)
    away.mkdir()
    for folder in (home / "real", away):
        (folder / "a.png").write_text("x")
    (home / "in").symlink_to(home / "real")
    (home / "out").symlink_to(away)
    (home / "out.png").symlink_to(away / "a.png")
    assert files.inside(home, "in/a.png") == home / "real" / "a.png"
    for text in ("out/a.png", "out.png", "out"):
        with pytest.raises(ValueError, match="out"):
            files.inside(home, text)
    (tmp_path / "entry").symlink_to(home)  # the root itself may be a link
    assert files.inside(tmp_path / "entry", "real/a.png") == home / "real" / "a.png"


def test_inside_all_is_inside_for_every_row(tmp_path):
    names = [f"{i % 5}/{i}.png" for i in range(50)]
    assert files.inside_all(tmp_path, names) == [files.inside(tmp_path, name) for name in names]
    with pytest.raises(ValueError, match=r"'\.\./x'"):
        files.inside_all(tmp_path, [*names, "../x"])


# ---- root and caches


def test_the_root_is_found_from_below(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.delenv("HISTOKIT_ROOT")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert files.root() == tmp_path
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path / "notebooks"))
    assert files.root() == tmp_path / "notebooks"


def test_prune_drops_the_least_recently_used(root):
    folder = files.cache("test")
    for age, name in enumerate("abcd"):
        files.write_bytes(folder / name, bytes(1000))
        os.utime(folder / name, (1000 - age, 1000 - age))
    os.utime(folder / "d")  # a hit
    assert files.prune("test", 1) == 0
    assert files.prune("test", 2e-6, keep=[folder / "c"]) == 2000
    assert sorted(p.name for p in folder.iterdir()) == ["c", "d"]
    with pytest.raises(ValueError):
        files.cache("../elsewhere")


def test_files_imports_nothing_heavy():
    heavy = ("numpy", "pandas", "torch", "PIL")
    code = f"import sys; from histokit import runs; from histokit.core import files; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_stream_is_text_in_utf8(tmp_path):
    with files.atomic(tmp_path / "a", "w") as file:
        assert isinstance(file, io.TextIOWrapper)
        file.write("ü\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\n"
