"""Files that are whole or absent: atomic writes, tables, hashes, safe paths, caches.

Everything histokit writes goes through here: into a temporary file of the same folder first, then under its
name in one step, so that a full disk or a killed process leaves the old file as it was. Nothing here knows
what a tile, a run or a model is; heavy libraries are imported by the functions that use them.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import unicodedata
from pathlib import Path, PurePath, PureWindowsPath

from histokit.core.atomic import TEMPORARY, atomic, replacing, sweep, write_bytes, write_text

__all__ = ["TEMPORARY", "atomic", "replacing", "sweep", "write_bytes", "write_text"]  # handed on

VERSION = 1  # raise when seed(), digest() or the pixels of a written file change

LARGE = 64_000_000  # bytes from which a hash is remembered


def root():
    """The working root: $HISTOKIT_ROOT, else the nearest parent of the current folder with params/, else that folder."""
    if os.environ.get("HISTOKIT_ROOT"):
        return Path(os.environ["HISTOKIT_ROOT"]).expanduser().resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "params").is_dir()), here)


# ---- JSON


def write_json(path, obj):
    """Strict JSON: NaN and infinities become null, arrays lists, paths text; what has no JSON form raises TypeError."""
    return write_text(path, dumps(obj) + "\n")


def dumps(obj):
    """The text of `write_json`."""
    return json.dumps(plain(obj), indent=1, ensure_ascii=False, allow_nan=False)


def read_json(path):
    """The content of a JSON file; an error names the file and the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_constant=lambda _: None)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def plain(obj):
    """`obj` in JSON's own types: numpy scalars and arrays, tensors, paths, dates, sets and dataclasses are translated."""
    if obj is None or isinstance(obj, (bool, str)):
        return obj
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, dict):
        wrong = [key for key in obj if isinstance(plain(key), (list, dict, bool, float, type(None)))]
        if wrong:
            raise TypeError(f"JSON keys are text, got {wrong[0]!r}")
        return {str(plain(key)): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted((plain(value) for value in obj), key=repr)
    if isinstance(obj, PurePath):
        return str(obj)
    if isinstance(obj, (datetime.date, datetime.datetime)):
        return None if obj != obj else obj.isoformat()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if hasattr(obj, "tolist"):  # numpy scalars and arrays, tensors, pandas series
        return plain(obj.tolist())
    if type(obj).__name__ in ("NAType", "NaTType"):
        return None
    raise TypeError(f"no JSON form for {type(obj).__name__}: {str(obj)[:80]}")


# ---- tables, pictures, tensors


def write_table(path, table):
    """Writes a DataFrame as .csv or .parquet, without its index; see `tables` for what survives the way back."""
    from histokit.core import tables

    return tables.write(path, table)


def read_table(path):
    """The DataFrame in a .csv or .parquet file, with text columns as text."""
    from histokit.core import tables

    return tables.read(path)


def write_png(path, pixels, text=None):
    """Writes uint8 pixels [H, W, 3] (or [H, W], a mask) as PNG, with `text` (a dict of str) as its text chunks."""
    import numpy as np
    from PIL import Image, PngImagePlugin

    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"{path}: a PNG is made of uint8 [H, W, 3] or [H, W], got {pixels.dtype} {list(pixels.shape)}")
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, str(value))
    with atomic(path, lasting=False) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
    return Path(path)


def write_tensors(path, tensors, metadata=None):
    """Writes {name: tensor or array} as safetensors, `metadata` (str to str) in its header.

    The same content gives the same bytes: the library shuffles the metadata from one process to the next, which would
    change the hash of every adapter, so the (simple) format is written here.
    """
    import torch

    metadata = metadata or {}
    wrong = [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]
    if wrong:
        raise TypeError(f"{path}: safetensors metadata is text, got {wrong[0]!r}: {metadata[wrong[0]]!r}")
    codes = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    }  # fmt: skip
    tensors = {name: torch.as_tensor(value).detach() for name, value in tensors.items()}
    header, end = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}, 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide types first keeps all aligned
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in codes:
            raise TypeError(f"{path}: {name} is {tensor.dtype}, which safetensors files of histokit do not hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)
    with atomic(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            file.write(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Path(path)


def read_tensors(path, device="cpu"):
    """{name: tensor} of a safetensors file; an error names the file."""
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); pickled weights are not read") from error


def read_metadata(path):
    """The text a safetensors file carries in its header, as a dict."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); pickled weights are not read") from error


# ---- hashes, seeds, names


def sha256(path, fresh=False):
    """64 hex digits of a file's content; for large files (weights) remembered until their size or time changes, unless `fresh`."""
    status = os.stat(path)
    known = None
    if status.st_size >= LARGE and not fresh:
        known = cache("sha256") / f"{digest(os.path.realpath(path), status.st_size, status.st_mtime_ns)}.txt"
        if known.exists():
            return known.read_text()
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if known:
        write_text(known, found)
    return found


def digest(*parts):
    """64 hex digits of any JSON-able values; the same on every machine, and a dict's order does not matter."""
    text = json.dumps(plain(parts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def seed(*parts):
    """A seed in [0, 2**63) that follows from `parts` alone, such as (run seed, class name, image number)."""
    return int(digest(*parts)[:16], 16) >> 1


def shuffled(values, *parts):
    """The values in an order that follows from `parts` alone, as a list."""
    import torch

    values = list(values)
    return [values[k] for k in torch.randperm(len(values), generator=torch.Generator().manual_seed(seed(*parts))).tolist()]


def slug(name):
    """A folder name for any text: "High-grade IN" -> "high-grade-in-3fa2b1"; six digits of the exact name keep look-alikes apart."""
    folded = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", folded).strip("-")[:40].strip("-")
    return f"{words or 'class'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


# ---- safe paths


def inside(root, relative):
    """The absolute path of `relative` below `root`; ValueError when it is absolute or leads outside, a link included."""
    return inside_all(root, [relative])[0]


def inside_all(root, relatives, follow=False):
    """`inside` for many rows, one look at each folder: 130,000 tiles in about a second. `follow`: links may lead anywhere."""
    base = Path(root).resolve()
    top, folders, paths = str(base), {}, []
    for relative in relatives:
        folder, name = _parts(root, relative)
        if follow:
            paths.append(base / folder / name)
            continue
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(top, folder)) if folder else top
        path = os.path.join(folders[folder], name)
        if os.path.islink(path):
            path = os.path.realpath(path)
        if path == top or not path.startswith(top.rstrip(os.sep) + os.sep):
            raise ValueError(f"{relative!r} leads out of {root} (to {path}); paths must stay inside it, links included")
        paths.append(Path(path))
    return paths


def _parts(root, relative):
    """Folder and name of a relative path, after the checks that need no disk."""
    text = os.fspath(relative)
    steps = text.replace("\\", "/").split("/")
    if not text or "\0" in text or steps[0] == "" or ".." in steps or PureWindowsPath(text).drive or steps[-1] in ("", "."):
        raise ValueError(f"{text!r} is not a plain path below {root}: no '..', no leading '/', no drive, no NUL, and not empty")
    return os.path.split(text)


# ---- caches


def cache(kind):
    """The folder outputs/.cache/<kind>, made when missing; entries are named by the content they follow from."""
    folder = inside(root() / "outputs" / ".cache", kind)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prune(kind, budget_gb, keep=()):
    """Deletes the least recently used files of a cache, those of `keep` apart, until it fits; returns the bytes freed.

    A reader marks its hit by os.utime(path), since many disks note reads once a day at most.
    """
    entries, keep = [], {Path(path) for path in keep}
    for path in cache(kind).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process may prune too
            status = path.lstat()
            if not path.is_dir():
                entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in entries) - budget_gb * 1e9
    freed = 0
    for _, size, path in sorted(entries, key=lambda entry: entry[0]):
        if freed >= excess:
            break
        if path in keep:
            continue
        path.unlink(missing_ok=True)
        freed += size
    return freed


def copy(src, dst):
    """A copy of a file's content at `dst`, its folder made; atomic."""
    Path(dst).parent.mkdir(parents=True, exist_ok=True)
    with replacing(dst) as temporary:
        shutil.copyfile(src, temporary)
    return Path(dst)


def link(src, dst):
    """Makes `dst` the same file as `src` (a hard link), or a copy where links cannot be; atomic either way."""
    src, dst = Path(src).resolve(), Path(dst)
    if dst.exists() and dst.samefile(src):
        return dst
    with replacing(dst) as temporary:
        try:
            os.link(src, temporary)
        except OSError:
            shutil.copy2(src, temporary)
    return dst
