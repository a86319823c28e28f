"""What lies below a folder of tiles: pictures and tables by name, and everything else counted. Nothing is opened here."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field

from histokit.tiles.decode import SUFFIXES

VERSION = 3
TABLES = (".csv", ".tsv", ".tab", ".xlsx", ".xls", ".parquet")
# Folders that systems and programs leave beside files: thumbnails of network disks, recycle bins, what an archive of another system brings.
LITTER = (
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found", "$recycle.bin", "recycler", "recycled",
    "system volume information", "network trash folder", "temporary items", "__macosx", "__pycache__", "_gsdata_", "thumbs",
)  # fmt: skip
UNREAD = (".jp2", ".j2k", ".jpx", ".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".czi", ".lif", ".dcm", ".gif", ".heic",
          ".npy", ".npz", ".h5", ".hdf5", ".mat", ".pt", ".zip", ".tar", ".gz", ".rar", ".7z")  # fmt: skip


NOTES = (".json", ".jsonl", ".ndjson", ".xml", ".txt")  # what annotation tools write, and what is not read


@dataclass
class Found:
    """Names relative to the root, sorted."""

    pictures: list = field(default_factory=list)
    polygons: list = field(default_factory=list)  # annotations as GeoJSON, masks of the tiles beside them
    tables: list = field(default_factory=list)
    litter: Counter = field(default_factory=Counter)  # folder or kind of file that systems leave -> how many
    unread: Counter = field(default_factory=Counter)  # suffix of files that hold pictures or archives and are not read -> how many
    notes: Counter = field(default_factory=Counter)  # suffix of files that may hold labels and are not read -> how many
    empty: list = field(default_factory=list)  # folders with nothing in them
    links: dict = field(default_factory=dict)  # link that was not followed -> where it leads


def look(root, folder="", follow=False):
    """Everything below root/folder.

    Args:
        root: absolute Path.
        follow: read through links, wherever they lead; a folder that is met twice is read once.

    Raises ValueError for a name that is not UTF-8, with the command that mends it.
    """
    found, todo, met = Found(), [folder], {os.path.realpath(os.path.join(root, folder))}
    while todo:
        here = todo.pop()
        entries = os.scandir(os.path.join(root, here) if here else root)
        entries = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))  # what lies here before what is linked
        if here and all(is_litter(entry.name) for entry in entries):
            found.empty.append(here)
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            _check_name(root, name)
            if is_litter(entry.name):
                found.litter[entry.name if entry.name[0] != "." else "hidden files"] += 1
            elif entry.is_symlink() and not _readable(root, entry, follow):
                found.links[name] = os.path.realpath(os.path.join(root, name))
            elif entry.is_dir():
                place = os.path.realpath(os.path.join(root, name)) if follow else name
                if place not in met:
                    met.add(place)
                    todo.append(name)
            else:
                _sort(found, name)
    for names in (found.pictures, found.polygons, found.tables):
        names.sort()
    return found


def _readable(root, entry, follow):
    """Whether a link is read through: any that leads somewhere where that is wished, else one to a file below the root."""
    target = os.path.realpath(entry.path)
    return os.path.exists(target) and (follow or (os.path.isfile(target) and target.startswith(os.path.realpath(root) + os.sep)))


def is_litter(name):
    """Whether a file or folder of this name is nobody's data: hidden, or left by a system."""
    return name.startswith((".", "~$")) or name.casefold() in LITTER


def _sort(found, name):
    lower = name.lower()
    if lower.endswith(SUFFIXES):
        found.pictures.append(name)
    elif lower.endswith(TABLES):
        found.tables.append(name)
    elif lower.endswith(".geojson"):
        found.polygons.append(name)
    else:
        suffix = os.path.splitext(lower)[1]
        if suffix in UNREAD:
            found.unread[suffix] += 1
        elif suffix in NOTES and not re.match(r"(readme|licen[cs]e|notice|citation|changelog)", os.path.basename(lower)):
            found.notes[suffix] += 1


def _check_name(root, name):
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise ValueError(
            f"{root}: the name {shown} is not UTF-8, as archives of older systems make them; rename the files first, for example with "
            "`convmv -f cp850 -t utf8 -r --notest FOLDER` (convmv is a package of every Linux), or unpack with `unzip -O cp850 FILE.zip`"
        ) from None
