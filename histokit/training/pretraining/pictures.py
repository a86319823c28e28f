"""Pictures by number, wherever they lie: in memory, in folders, in tar shards. However many there are, only the one asked for is read.

Any order can be walked and gone on with from its middle, which a stream through shards cannot: `order` is a function of (seed, epoch).
Nothing here knows a class, a split or a model.
"""

import bisect
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.tiles import decode
from histokit.tiles.contamination import pixels_hash

VERSION = 1
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
BLOCK = 512  # bytes of a tar header, and of the zeros that end a shard
CHUNK = 2048  # pictures surveyed at a time
SAID = 10  # unreadable files that an error names


class Folder:
    """The picture files below a folder, or the named ones, in order of their names.

    Args:
        root: folder.
        names: file names relative to it; by default all pictures below it, hidden ones left out.

    Raises ValueError where there is none.
    """

    def __init__(self, root, names=None):
        self.root = Path(root)
        if names is None:
            if not self.root.is_dir():
                raise ValueError(f"{root}: no such folder; give the folder that holds the tiles")
            names = sorted(_below(self.root))
        if not len(names):
            raise ValueError(f"{root} holds no picture ({', '.join(decode.SUFFIXES)}); is it the right folder?")
        self.names = pd.Series(names, dtype="str")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """Picture i, uint8 [H, W, 3]."""
        return np.asarray(decode.rgb(self.root / self.names.iloc[i])[0])

    def name(self, i):
        """How an error calls picture i."""
        return str(self.root / self.names.iloc[i])

    def identity(self):
        """Changes when a file does."""
        stats = (os.stat(self.root / name) for name in self.names)
        return files.digest("folder", list(self.names), [(s.st_size, s.st_mtime_ns) for s in stats])


class Shards:
    """The pictures in uncompressed tar files, as webdataset and `tar` write them, in the order in which they lie.

    A shard is walked through once, header by header, for where its pictures lie; that list is kept in outputs/.cache, and afterwards any
    picture is one read. What belongs to a picture in webdataset's way (the same name, another suffix) is passed over.

    Args:
        place: folder of *.tar files, or one such file.

    Raises ValueError for a compressed shard, one that was cut off, one without a picture, and for a place without a shard.
    """

    def __init__(self, place):
        place = Path(place)
        self.shards = [place] if place.is_file() else sorted(place.glob("*.tar"))
        packed = [path for path in ([place] if place.is_file() else sorted(place.glob("*"))) if path.name.endswith(PACKED)]
        if packed:
            raise ValueError(f"{packed[0]} is compressed, so that nothing in it can be read without all before it; unpack it to a .tar")
        if not self.shards:
            raise ValueError(f"{place}: no .tar file there; give the folder of the shards, or use `folder` for plain pictures")
        tables = [_members(shard) for shard in self.shards]
        self.ends = np.cumsum([len(table) for table in tables])
        self.names = pd.concat([table["name"] for table in tables], ignore_index=True)
        self.offsets, self.sizes = (np.concatenate([table[of].to_numpy() for table in tables]) for of in ("offset", "size"))
        self._open = lru_cache(maxsize=64)(lambda shard: _Opened(self.shards[shard]))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """Picture i, uint8 [H, W, 3]."""
        read = self._open(bisect.bisect_right(self.ends, i)).read(int(self.sizes[i]), int(self.offsets[i]))
        return np.asarray(decode.rgb(read, self.name(i))[0])

    def name(self, i):
        """How an error calls picture i."""
        return f"{self.shards[bisect.bisect_right(self.ends, i)]}/{self.names.iloc[i]}"

    def identity(self):
        """Changes when a shard does."""
        return files.digest("shards", [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.shards])


class _Opened:
    """A shard that stays open; reads do not share a place in it, so threads may."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDONLY)

    def read(self, size, offset):
        return os.pread(self.file, size, offset)

    def __del__(self):
        os.close(self.file)


class Joined:
    """Sequences one after the other, as one."""

    def __init__(self, parts):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = bisect.bisect_right(self.ends, i)
        return self.parts[part][i - (int(self.ends[part - 1]) if part else 0)]


class Some:
    """Some of a sequence, by number."""

    def __init__(self, whole, rows):
        self.whole, self.rows = whole, np.asarray(rows, dtype=np.int64)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.whole[int(self.rows[i])]


def survey(found, unreadable="stop"):
    """Opens every picture once: DataFrame row, pixels_sha256 of those that can be read; kept in outputs/.cache.

    Args:
        found: Folder or Shards.
        unreadable: `stop` raises at pictures that cannot be decoded, `leave_out` goes on without them.

    Raises ValueError naming the first `SAID` unreadable ones and what to do.
    """
    if unreadable not in ("stop", "leave_out"):
        raise ValueError(f"unreadable is {unreadable!r}; use stop or leave_out")
    path = files.cache("surveys") / f"{files.digest(VERSION, decode.VERSION, found.identity())}.parquet"
    if not path.is_file():
        rows, hashes, problems = [], [], []
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(found), CHUNK):
                part = range(start, min(start + CHUNK, len(found)))
                for i, (sha, problem) in zip(part, pool.map(lambda i: _hash(found, i), part), strict=True):
                    rows.append(i)
                    hashes.append(sha)
                    problems.append(problem)
        table = pd.DataFrame({"row": np.array(rows, dtype=np.int64), "pixels_sha256": hashes, "problem": problems})
        files.write_table(path, table)
    table = files.read_table(path)
    bad = table[table["problem"].ne("")]
    if len(bad) and unreadable == "stop":
        more = f"\n  ... and {len(bad) - SAID} more" if len(bad) > SAID else ""
        raise ValueError(
            f"{len(bad)} of {len(table)} pictures cannot be used:\n  " + "\n  ".join(bad["problem"].head(SAID)) + more
            + "\nMend them, or set `unreadable: leave_out` for this source"
        )  # fmt: skip
    return table.loc[table["problem"].eq(""), ["row", "pixels_sha256"]].reset_index(drop=True)


def order(weights, sources, seed, epoch):
    """Numbers [N] in which N pictures are seen in one epoch: a function of (seed, epoch), each source having its share of the draws.

    A picture of a source that is drawn as often as it is large comes once an epoch; one that is drawn oftener comes again, each time after
    all others of its source.

    Args:
        weights: [N] shares of the draws, alike within a source.
        sources: [N] int, which source each picture is of.
    """
    rng = np.random.default_rng(files.seed(seed, "epoch", epoch))
    weights, slots, reached, start = np.asarray(weights, float), [], 0.0, rng.random()
    for one in np.unique(sources):
        own = np.flatnonzero(sources == one)
        before, reached = reached, reached + float(weights[own].sum() / weights.sum()) * len(weights)
        # what a source loses to rounding it wins in another epoch; the whole is N always
        count = round(np.floor(reached + start + 1e-6) - np.floor(before + start + 1e-6))
        turns = [rng.permutation(own) for _ in range(-(-count // len(own)))]
        slots.append(np.concatenate(turns)[:count] if turns else own[:0])
    return rng.permutation(np.concatenate(slots))


def _hash(found, i):
    """(sha256 of its pixels, "") of picture i, or ("", what is wrong with it)."""
    try:
        return pixels_hash(found[i]), ""
    except decode.BadImage as error:
        return "", str(error)


def _below(root):
    """Names of the pictures below a folder, relative to it."""
    for top, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(decode.SUFFIXES) and not name.startswith("."):
                yield Path(top, name).relative_to(root).as_posix()


def _members(shard):
    """DataFrame name, offset, size (bytes) of the pictures in a tar file."""
    stat = shard.stat()
    path = files.cache("shards") / f"{files.digest(VERSION, str(shard.resolve()), stat.st_size, stat.st_mtime_ns)}.parquet"
    if not path.is_file():
        files.write_table(path, pd.DataFrame(list(_walk(shard, stat.st_size)), columns=["name", "offset", "size"]))
    table = files.read_table(path)
    if not len(table):
        raise ValueError(f"{shard} holds no picture ({', '.join(decode.SUFFIXES)}); take it out of the folder")
    return table


def _walk(shard, size):
    cut = f"{shard} was cut off: {{}}; copy or write it again, its other members are not trusted either"
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # it would remember every one
                if member.offset_data + member.size > size:
                    raise ValueError(cut.format(f"{member.name!r} should end at byte {member.offset_data + member.size:,} of {size:,}"))
                name = PurePosixPath(member.name).name.lower()
                if member.isreg() and name.endswith(decode.SUFFIXES) and not name.startswith("."):
                    yield member.name, member.offset_data, member.size
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise ValueError(cut.format(f"the zeros that end a tar file are missing at byte {end:,}"))
    except tarfile.TarError as error:
        raise ValueError(cut.format(error)) from error
