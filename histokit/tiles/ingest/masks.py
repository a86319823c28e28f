"""Which pictures below a folder are masks of others: in a folder beside that of the tiles, in a mirror of all, or with a suffix."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from histokit.tiles.ingest import levels

VERSION = 1
WORD = r"(mask|masks|seg|segm|segmentation|anno|annotation|annotated|label|labels|labelled|labeled|gt|groundtruth|ground_truth|overlay|bw)"
SUFFIX = re.compile(rf"[ _.\-]+{WORD}([ _\-]?\d+)?$", re.IGNORECASE)
PREFIX = re.compile(rf"^{WORD}[ _.\-]+", re.IGNORECASE)


@dataclass
class Masks:
    """Pictures apart from their masks."""

    tiles: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    template: str = ""  # of the description's `mask`; "" where tiles lack one or names follow no rule
    ignore: list = field(default_factory=list)  # patterns of file names that are masks and no tiles
    of: int = 0  # tiles that have a mask
    bare: list = field(default_factory=list)  # pictures without one, where the template is offered all the same


def apart(pictures, found=None):
    """`Masks` of the pictures [name, ...]; `found`: `levels.Levels` of them, whose `masks` is the folder beside that of the tiles."""
    if found is not None and found.masks:
        return _by_folder(pictures, found)
    return _by_mirror(pictures) or _by_name(pictures)


def _by_mirror(pictures):
    """Masks in folders of their own at the top that repeat the folders and names of the tiles; None where there are none."""
    tops = sorted({name.partition("/")[0] for name in pictures if "/" in name}, key=_order)
    apart = [top for top in tops if levels.plain(top) in levels.MASKS]
    tiles = [name for name in pictures if name.partition("/")[0] not in apart]
    found = {}
    for top in apart:
        own = {name.rpartition(".")[0]: name for name in pictures if name.startswith(f"{top}/")}
        of = [name for name in tiles if f"{top}/{name.rpartition('.')[0]}" in own]
        if len(of) > 0.5 * len(own):
            found[top] = (own, of)
    if not found:
        return None
    tiles = [name for name in pictures if name.partition("/")[0] not in found]
    top, (own, of) = next(iter(found.items()))
    suffixes = Counter(PurePosixPath(name).suffix for name in own.values())
    template = f"{top}/{{path}}{next(iter(suffixes))}" if len(suffixes) == 1 else ""
    every = [name for held, _ in found.values() for name in held.values()]
    return Masks(tiles, every, template, list(found), len(of), sorted(set(tiles) - set(of)))


def _order(top):
    plain = levels.plain(top)
    return levels.MASKS.index(plain) if plain in levels.MASKS else len(levels.MASKS), top


def _by_folder(pictures, found):
    k, tiles, masks = found.at, [], {}
    for name in pictures:
        folders = name.split("/")[:-1]
        if len(folders) > k and folders[k] == found.masks:
            stem = PurePosixPath(name).stem
            held = masks.setdefault(tuple(folders), {})
            held |= {bare: name for bare in _bare(stem) if bare not in held} | {stem: name}
        elif len(folders) > k and folders[k] == found.tiles:
            tiles.append(name)
    rules, of = Counter(), 0
    for name in tiles:
        folders = name.split("/")[:-1]
        beside = masks.get((*folders[:k], found.masks, *folders[k + 1 :]), {})
        stem = PurePosixPath(name).stem
        if mask := beside.get(stem):
            of += 1
            places = [f"{{{i}}}" for i in range(k)] + [found.masks] + [f"{{{i}}}" for i in range(k + 1, len(folders))]
            rules["/".join([*places, PurePosixPath(mask).name.replace(stem, "{stem}", 1)])] += 1
    every = list(dict.fromkeys(name for held in masks.values() for name in held.values()))
    return Masks(tiles, every, next(iter(rules)) if len(rules) == 1 and of == len(tiles) else "", [found.masks, *found.aside], of)


def _by_name(pictures):
    stems = {name.rpartition(".")[0]: name for name in pictures}
    masks, rules, owners = [], Counter(), set()
    for bare_name in stems:
        folder, slash, stem = bare_name.rpartition("/")
        owner = next((stems[folder + slash + bare] for bare in _bare(stem) if folder + slash + bare in stems), None)
        if owner is None:
            continue
        name = stems[bare_name]
        masks.append(name)
        owners.add(owner)
        rules[PurePosixPath(name).name.replace(PurePosixPath(owner).stem, "{stem}", 1)] += 1
    lost = set(masks)
    tiles = [name for name in pictures if name not in lost]
    plain = [rule for rule in rules if not re.search(r"\d", rule.replace("{stem}", ""))]
    whole = len(plain) == 1 and rules[plain[0]] == len(tiles)
    ignore = list(dict.fromkeys(re.sub(r"\d+", "*", rule).replace("{stem}", "*") for rule in rules))
    return Masks(tiles, masks, f"{{folder}}/{plain[0]}" if whole else "", ignore, len(owners))


def _bare(stem):
    """What a mask's stem is without the word that makes it one."""
    for pattern in (SUFFIX, PREFIX):
        if pattern.search(stem):
            yield pattern.sub("", stem)
