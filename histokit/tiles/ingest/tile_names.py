"""Which picture a cell of a table means: relative, absolute or of another computer, by its name or its stem alone."""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import PurePosixPath

VERSION = 1
LOSSLESS = (".tif", ".tiff", ".png", ".bmp")


class Names:
    """The pictures below a root by every way a table may spell one.

    What two pictures could be is none: a stem that comes twice, another case of letters where both are there.
    """

    def __init__(self, root, pictures):
        self.root = os.path.realpath(root)
        self.own = set(pictures)
        folded = defaultdict(list)
        for name in pictures:
            folded[fold(name)].append(name)
        self.exact = {way: held[0] for way, held in folded.items() if len(held) == 1}
        self.folders = {folder for name in pictures for folder in name.split("/")[:-1]}
        self.loose, self.by_leaf, self.by_stem, self.by_number = (defaultdict(list) for _ in range(4))
        for name in pictures:
            plain = fold(name).casefold()
            leaf = plain.rpartition("/")[2]
            stem = leaf.rpartition(".")[0]
            self.loose[plain].append(name)
            self.by_leaf[leaf].append(name)
            self.by_stem[stem].append(name)
            if stem.isdecimal():
                self.by_number[int(stem)].append(name)

    def find(self, cells, beside="", numbered=False):
        """The picture of each cell, None where there is none or more than one.

        Args:
            beside: the table's folder, relative to the root.
            numbered: whether a bare number may mean a picture whose name is that number with zeros before it.
        """
        return [self._one(cell, beside, numbered) for cell in cells]

    def _one(self, cell, beside, numbered):
        text = cell.replace("\\", "/")
        if not text:
            return None
        if text in self.own:
            return text
        if found := self.exact.get(fold(text)):
            return found
        elsewhere = text.startswith("/") or re.match(r"[A-Za-z]:", text) or "://" in text
        if elsewhere:
            lies = os.path.realpath(text)
            inside = lies.startswith(self.root + os.sep)
            text = os.path.relpath(lies, self.root) if inside else re.sub(r"^([a-z0-9]+:)?/*", "", text, flags=re.IGNORECASE)
        text = os.path.normpath(text)
        parts = text.split("/")
        ways = [text, *([f"{beside}/{text}"] if beside else [])]
        ways += ["/".join(parts[i:]) for i in range(1, len(parts) - 1)]  # the root's own name, or the folders above it elsewhere
        for way in ways:
            if found := self.exact.get(fold(way)):
                return found
        for way in ways:
            if len(held := self.loose.get(fold(way).casefold(), ())) == 1:
                return held[0]
        if len(parts) > 1 and not elsewhere:
            return self.exact.get(fold(parts[-1])) if ".." not in parts else None  # tiles that lay in a folder and now lie at the top
        return self._by_leaf(parts[-1], beside, numbered)

    def _by_leaf(self, leaf, beside, numbered):
        plain = fold(leaf).casefold()
        number = int(leaf) if numbered and leaf.isdecimal() else None
        for held in (self.by_leaf.get(plain, ()), self.by_stem.get(plain, ()), self.by_number.get(number, ())):
            if beside:
                held = [name for name in held if name.startswith(beside + "/")] or held
            if held and len({name.rpartition(".")[0] for name in held}) == 1:  # one picture, maybe in several formats
                return min(held, key=_lossy)
        return None


def _lossy(name):
    suffix = PurePosixPath(name).suffix.lower()
    return LOSSLESS.index(suffix) if suffix in LOSSLESS else len(LOSSLESS)


def fold(name):
    """A name with one spelling of its accents and its suffix in lower case, as disks and programs mix them up."""
    stem, dot, suffix = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{suffix.lower()}" if dot else suffix
