"""Which level of folders says what: split, class, case. Guessed by comparing levels, never by position alone.

A tile's folders are `train/tumour/P07`: level 0 is a split by its words, level 1 the class, level 2 the case. Where the same names come
back below every folder of a level (PATIENT/CLASS, SET/CLASS), these are the classes.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

from histokit.tiles.description import SPLITS

VERSION = 2
ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"} | {s: s for s in SPLITS}
PICTURES = (
    "image",
    "images",
    "img",
    "imgs",
    "picture",
    "pictures",
    "tile",
    "tiles",
    "patch",
    "patches",
    "tissue images",
    "raw",
    "original",
)
MASKS = (
    "mask", "masks", "label", "labels", "annotation", "annotations", "anno", "segmentation", "segmentations", "seg", "gt", "ground truth",
    "groundtruth", "labelled", "labeled", "overlay", "overlays", "contour", "contours",
)  # fmt: skip
ASIDE = (
    "thumb", "thumbs", "thumbnail", "thumbnails", "preview", "previews", "gt thumbnails", "figure", "figures", "plot", "plots", "result",
    "results", "screenshot", "screenshots", "heatmap", "heatmaps", "doc", "docs", "log", "logs",
)  # fmt: skip
UNLABELLED = ("unlabelled", "unlabeled", "unannotated")
MAGNIFICATION = re.compile(r"(x?\d{1,3}(\.\d+)?x|mag_?\d+|\d{1,3}_?(um|mpp)|level_?\d+)", re.IGNORECASE)
STAIN = re.compile(r"(HE|H&E|IHC|MASSON|PAS|CD\d+|KI-?67|HER-?2|ER|PR|P53|PD-?L?1|SOX\d+|CK\d+|GATA\d+)", re.IGNORECASE)
YEAR = re.compile(r"(19|20)\d\d")
BARCODE = re.compile(r"TCGA-\w{2}-\w{4}.*", re.IGNORECASE)
PERSON = re.compile(  # what patients and slides are called when they are numbered
    r"(p|pt|pat|patient|case|subj|subject|sample|s|slide|specimen|biopsy|donor|id|block|wsi|image|img)[_\-\s]?\d+[a-z]?"
    r"([_\-\s](node|block|slide|section)[_\-\s]?\d+)?", re.IGNORECASE,
)  # fmt: skip
GRADE = re.compile(r"(g|grade|class|type|stage|score|label|isup|gleason)[_\-\s]?\d+", re.IGNORECASE)
MEDICAL = re.compile(  # stems of what tissue is called, to tell classes from hospitals where both are words
    r"tumou?r|cancer|carcin|adenom|sarcom|lymph|melanom|benign|malign|normal|healthy|lesion|dysplas|neoplas|hyperplas|metasta|polyp|stroma|"
    r"adipos|fat|muc|necro|debris|inflam|epithel|gland|muscle|grade|invasive|situ|serrated|tubular|fibro|positive|negative|background",
    re.IGNORECASE,
)  # fmt: skip
POSITION = re.compile(r"([xy]|row|col|column)[_=\-]?\d+", re.IGNORECASE)
FOLD = re.compile(r"(fold|part|batch|chunk|cv|run)[_\-\s]?\d+", re.IGNORECASE)
KINDS = ("split", "class", "case_id", "patient", "slide", "group", "-")  # "-" says nothing
WORDS, CODES, NUMBERED = 2, 1, 0
NUMBERS = 20  # more folders that are numbers alone are patients or slides, and no classes


@dataclass
class Levels:
    """What the folders of tiles say, from the top down."""

    kinds: list = field(default_factory=list)  # of `KINDS`, or the name of the one folder whose files are tiles
    said: list = field(default_factory=list)  # what the owner should know
    masks: str = ""  # name of the folder that holds masks, beside `tiles`
    tiles: str = ""
    aside: list = field(default_factory=list)  # other folders of masks and overlays at their level
    at: int = 0  # level of these two


@lru_cache(100_000)
def split_of(name):
    """`train`, `val` or `test` where a folder's or file's name says so (`Training_set`, `val_images`), else None."""
    lower = name.casefold()
    if lower in ALIASES:
        return ALIASES[lower]
    words = re.split(r"[_\-\s.]+", lower)
    words = [re.sub(r"(?<=[a-z]{3})\d+$", "", word) for word in words]  # test1, val2
    extra = {
        "set", "images", "image", "data", "tiles", "patches", "img", "imgs", "split", "folder", "part", "labels", "label", "internal",
        "external", "list", "file", "files",
    }  # fmt: skip
    known = [ALIASES[word] for word in words if word in ALIASES]
    rest = [word for word in words if word not in ALIASES and word not in extra and not word.isdigit() and len(word) > 1]
    return known[0] if len(set(known)) == 1 and not rest else None


def splits_of(names):
    """{name: split} where every picture lies below a folder of a split, and there are two splits or more; {} else."""
    found = {name: next((split for folder in name.split("/")[:-1] if (split := split_of(folder))), None) for name in names}
    return found if None not in found.values() and len(set(found.values())) > 1 else {}


@lru_cache(100_000)
def plain(name):
    """A folder's name in lower case, with single spaces."""
    return re.sub(r"[_\-\s]+", " ", name).strip().casefold()


def guess(names):
    """`Levels` of pictures [name, ...], relative to the root; kinds [] where there are no folders, or none that could be classes."""
    parts = [name.split("/")[:-1] for name in names]
    parts = [part for part in parts if not any(plain(folder) in UNLABELLED for folder in part)]
    deep = [part for part in parts if not part or any(split_of(folder) is None for folder in part)]
    depth = _depth(deep or parts)  # a split without class folders must not hide the classes of the others
    parts = [part[:depth] for part in parts if len(part) >= depth]
    kinds, found = ["-"] * depth, Levels()
    for k in range(depth):
        values = [part[k] for part in parts]
        if "split" not in kinds and sum(split_of(value) is not None for value in values) > len(values) / 2:
            kinds[k] = "split"
        elif {plain(value) for value in values} & set(PICTURES) and {plain(value) for value in values} & set(MASKS):
            found.tiles = kinds[k] = max((v for v in set(values) if plain(v) in PICTURES), key=values.count)
            found.masks, found.at = min((v for v in set(values) if plain(v) in MASKS), key=lambda v: (MASKS.index(plain(v)), v)), k
            found.aside = sorted({v for v in values if plain(v) in (*MASKS, *ASIDE)} - {found.masks})
    parts = [part for part in parts if _is_tile(part, kinds)]
    telling = [k for k in range(depth) if kinds[k] == "-" and _tells(parts, k)]
    if telling and (who := _persons(parts, telling)):
        found.said.append(who)
        telling = []
    if telling:
        chosen = _class_level(parts, telling)
        kinds[chosen] = "class"
        _case_level(parts, [k for k in telling if k != chosen], chosen, kinds, found)
    found.kinds = kinds if telling else []
    while found.kinds and found.kinds[-1] == "-":
        found.kinds.pop()
    return found


def _depth(parts):
    """Number of folders that nearly all tiles have above them."""
    lengths = sorted(map(len, parts))
    return lengths[len(lengths) // 20] if lengths else 0


def _is_tile(part, kinds):
    """Whether the folders of a picture are those of a tile: a split where there are splits, the folder of tiles and not of masks."""
    for name, kind in zip(part, kinds, strict=True):
        beside = split_of(name) is None if kind == "split" else kind not in KINDS and name != kind
        if beside or aside(name):
            return False
    return True


def aside(name):
    """Whether a folder holds thumbnails and the like."""
    return plain(name) in ASIDE


def _tells(parts, k):
    """Whether a level could say anything: more than one name, and no magnification, position or fold."""
    values = {part[k] for part in parts}
    odd = (MAGNIFICATION, POSITION, FOLD)
    return len(values) > 1 and not any(all(pattern.fullmatch(value) for value in values) for pattern in odd)


def persons(values, digits=3):
    """Whether these names are those of patients or slides: P07, patient_012, TCGA barcodes, many numbers or such of `digits` digits."""
    numbers = all(value.isdigit() for value in values) and (len(values) > NUMBERS or any(len(value) >= digits for value in values))
    return numbers or all(PERSON.fullmatch(value) or BARCODE.fullmatch(value) for value in values)


def _persons(parts, telling):
    """What to say where the only telling level holds patients or slides and no classes; "" where it does not."""
    values = sorted({part[telling[0]] for part in parts})
    if len(telling) > 1 or not persons(values):
        return ""
    kinds = ["-"] * telling[0] + ["class"]
    return (
        f"THE FOLDERS {', '.join(values[:3])} ... ARE TAKEN FOR PATIENTS OR SLIDES, so these tiles have no labels: give a table with one "
        f"row a tile, or, if they are classes, write `levels: [{', '.join(kinds)}]` and name them in `classes`"
    )


def _class_level(parts, telling):
    """The level of the classes: words before codes before numbers; of equals the lower one where its names come back, else the upper.

    Of two levels of numbers that cross, 0 and 1 and the numbers of patients, the one with fewer names.
    """
    kind = {k: look(sorted({part[k] for part in parts})) for k in telling}
    medical = [k for k in telling if _share(MEDICAL.search, {part[k] for part in parts}) >= 0.5]
    if len(medical) == 1:
        return medical[0]
    stains = [k for k in telling if _share(STAIN.fullmatch, {part[k] for part in parts}) == 1]
    telling = [k for k in telling if k not in stains] or telling
    kind = {k: kind[k] for k in telling}
    best = [k for k in telling if kind[k] == max(kind.values())]
    if max(kind.values()) == NUMBERED:
        crossing = [k for k in best if k == best[0] or comes_back(parts, k, telling) >= 0.8]
        return min(crossing, key=lambda k: len({part[k] for part in parts}))
    for k in reversed(best):
        if k != telling[0] and comes_back(parts, k, telling) >= 0.8:
            return k
    return best[0]


def _share(says, values):
    return sum(says(value) is not None for value in values) / len(values)


def comes_back(parts, k, telling):
    """Share of the names of level k that stand below two or more folders of the levels above."""
    above = defaultdict(set)
    for part in parts:
        above[plain(part[k])].add(tuple(part[j] for j in telling if j < k))
    return sum(len(where) > 1 for where in above.values()) / len(above)


def look(values):
    """`WORDS` (tumour, high-grade IN), `CODES` (ADI, Q7x) or `NUMBERED` (8863, P01, patient_012): what kind of names these are."""
    if all(GRADE.fullmatch(value) for value in values):
        return WORDS
    stems = {re.sub(r"\d+", "#", value.casefold()) for value in values}
    digits = sum(any(c.isdigit() for c in value) for value in values) / len(values)
    if len(stems) == 1 and digits == 1:
        return NUMBERED
    return WORDS if digits <= 0.5 else CODES


def _case_level(parts, rest, chosen, kinds, found):
    """Names the level of the cases, and of groups, among those that are neither split nor class."""
    classes = {part[chosen] for part in parts}
    for k in sorted(rest, key=lambda k: (k < chosen, abs(k - chosen))):
        values = {part[k] for part in parts}
        above = k < chosen
        if look(sorted(values)) == WORDS and not above:
            back = comes_back(parts, k, [chosen, k]) >= 0.8
            if back and len(values) <= 20 and "group" not in kinds:
                kinds[k] = "group"
            elif not back:
                finer = ["class" if j == k else "-" if j == chosen else kind for j, kind in enumerate(kinds[: k + 1])]
                few = ", ".join(sorted(values)[:4]) + " ..." * (len(values) > 4)
                found.said.append(
                    f"below the {len(classes)} classes stand folders of words, {few}: are these the classes? "
                    f"`levels: [{', '.join(finer)}]` takes them"
                )
            continue
        if (
            "case_id" not in kinds
            and _can_be_case(parts, k, chosen)
            and (not above or len(values) > max(5, len(classes)) or persons(values, 4))
        ):
            kinds[k] = "case_id"
        elif above and "group" not in kinds and len(values) <= 20:
            kinds[k] = "group"
        if above and kinds[k] in ("case_id", "group"):
            few = ", ".join(sorted(values)[:3])
            found.said.append(
                f"the same {len(classes)} names stand below every folder of the level {few}{' ...' * (len(values) > 3)}: they are taken as "
                f"the classes, and that level as {'the case' if kinds[k] == 'case_id' else 'a group'}; `levels` in the description says so"
            )


def _can_be_case(parts, k, chosen):
    """Whether a level can be the case: several in a class, and more tiles than cases."""
    cases = defaultdict(set)
    for part in parts:
        cases[part[chosen]].add(part[k])
    return max(map(len, cases.values())) > 1 and len(parts) >= 1.3 * len({part[k] for part in parts})


def read(name, kinds):
    """{kind: folder's name} of a picture by the levels of a description; None where its folders are not those of a tile."""
    folders = name.split("/")[:-1]
    if len(folders) < len(kinds):
        return None
    told = dict.fromkeys((kind for kind in kinds if kind in KINDS and kind != "-"), "")
    for folder, kind in zip(folders, kinds, strict=False):
        if kind not in KINDS:
            if folder != kind:
                return None
        elif kind == "split":
            if (split := split_of(folder)) is None:
                return None
            told["split"] = split
        elif kind != "-":
            told[kind] = folder
    return told
