"""How file names tell the case: a regular expression guessed from many of them at once."""

import re

from histokit.tiles.ingest import levels

VERSION = 1


def guess(names, told=1):
    """A regular expression with the group case_id that fits every file name, or "" when none is plausible.

    File names are cut at - _ and spaces. The case is taken to be the leftmost part that holds a digit, takes several values
    within a class, and comes back on several tiles of a class; a running number does not come back, a scanner's name has
    no digit, a class's name takes one value per class. Folders below the class are tried first, TCGA barcodes by their rule.

    Args:
        names: {class: [file names relative to the root]}.
        told: levels of folders that say something else, a class or a split; a folder below them may be the case.
    """
    every = [name for group in names.values() for name in group]
    for pattern in _candidates(names, told):
        search = re.compile(pattern).search
        if not all(map(search, every)):
            continue
        values = [{search(name)["case_id"] for name in group} for group in names.values()]
        every_value = set.union(*values)
        digits = all(any(c.isdigit() for c in value) for value in every_value)
        digits |= pattern.endswith("/[^/]+$") and levels.look(sorted(every_value)) != levels.WORDS
        plausible = digits and max(map(len, values)) > 1 and len(every) >= 1.3 * sum(map(len, values))
        if plausible and not _is_place(names, search, values):
            return pattern
    return ""


def _is_place(names, search, values):
    """Whether what a pattern finds is where a tile lay, when or how it was seen, and no case: x12, row_3, 40X, CD3, 2019, or a grid.

    Numbers of a grid come back in every class, and in a class nearly every pair of them and another number of the name is there.
    """
    every = set.union(*values)
    odd = (levels.POSITION, levels.MAGNIFICATION, levels.STAIN, levels.YEAR)
    if any(all(pattern.fullmatch(value) for value in every) for pattern in odd):
        return True
    if not all(value.isdigit() for value in every) or len(values) < 2 or any(value != values[0] for value in values):
        return False
    for group in names.values():
        pairs = set()
        for name in group:
            leaf, (start, end) = name.rpartition("/")[2], search(name).span("case_id")
            before = len(name) - len(leaf)
            pairs.add((name[start:end], leaf[: max(0, start - before)] + "#" + leaf[end - before :]))
        ones, others = (set(part) for part in zip(*pairs, strict=True))
        if len(pairs) < 0.6 * len(ones) * len(others) or not all(re.search(r"\d", other) for other in others):
            return False
    return True


def _candidates(names, told, most=8):
    yield r"(?P<case_id>TCGA-\w{2}-\w{4})"  # project, site, participant
    if min(name.count("/") for group in names.values() for name in group) > told:
        yield r"(?P<case_id>[^/]+)/[^/]+$"
    for skipped in range(most):
        before = rf"(?:[^/_\-\s]+[_\-\s]+){{{skipped}}}" if skipped else ""
        yield rf"(?:^|/){before}(?P<case_id>[^/_\-\s.]+)(?=[_\-\s.])[^/]*$"
