"""What can be told about a folder of tiles before anybody describes it: which tables and folders say what, and where they disagree."""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

import pandas as pd

from histokit.core import files
from histokit.tiles.ingest import case_patterns, label_tables, levels, masks, remarks, tile_names, walk

VERSION = 1
FIRST_WORD = r"[^/_\-\s.(]*"  # of a file name
WHOLE = 0.9  # share of the tiles that a table must name to be believed before class folders


def look(root):
    """What can be told about a folder of tiles: dict with layout, names {class: [file names]}, sizes, case_of {file name: case} ..."""
    found = walk.look(root)
    twice = _twice(found.pictures)
    found.pictures = [name for name in found.pictures if not name.startswith(f"{twice}/")] if twice else found.pictures
    apart = masks.apart(found.pictures)
    guessed = levels.guess(apart.tiles)
    if guessed.masks:
        apart = masks.apart(found.pictures, guessed)
    names = tile_names.Names(root, apart.tiles if found.tables else [])
    tables = [label_tables.judge(root, name, names) for name in found.tables]
    guess = {"table": "", "columns": {}, "levels": [], "kinds": [], "unlabelled": "", "skipped": {}, "refused": [], "case_of": {}}
    guess |= {"found": found, "tables": tables, "masks": apart, "facts": [], "pattern": "", "label_pattern": ""}
    folders = _look_at_folders(apart.tiles, guessed)
    guess |= _look_at_tables(tables, apart.tiles, folders) or folders
    every = [name for names in guess["names"].values() for name in names]
    if not every:
        there = "".join(f" {line}." for line in (*remarks.tables_said(tables), *remarks.left_out(guess)))
        raise ValueError(
            f"no tiles below {root}; expected CLASS/tile.png, train/CLASS/tile.png, or a CSV with a column of file names.{there}"
        )
    if twice:
        guess["refused"].append(twice)
        guess["said"].append(
            f"THE FOLDER {twice} REPEATS THE NAMES OF WHAT LIES BESIDE IT, and is left out: a copy, or the tiles in another form"
        )
    if not set(every) <= set(apart.tiles) or set(every) & set(apart.bare):
        apart.template = ""
    guess["names"], guess["also"] = _one_spelling(guess["names"])
    guess["sizes"] = _sizes(root, every)
    _join_tiles(guess, every)
    if not guess["case_of"]:
        guess["pattern"] = case_patterns.guess(guess["names"], 0 if guess["table"] else len(guess["kinds"]))
        if guess["pattern"]:
            guess["case_of"] = {name: re.search(guess["pattern"], name)["case_id"] for name in every}
    _join_cases(guess)
    return guess


# --- tables ----------------------------------------------------------------------------------------------------------


def _look_at_tables(tables, tiles, folders):
    """The guess from the tables that list tiles: one, one for each split, or several with tiles of their own; None without such tables."""
    good = [table for table in tables if not table.why_not]
    if not good:
        return None
    used = _of_splits(good) or _together(good)
    data = pd.concat([table.data for table in used], ignore_index=True)
    for table in good:
        if table not in used:
            table.why_not = _beside(table, used, data)
    labels = dict(zip(data["file_name"], data["label"], strict=True))
    of_folders = {name: label for label, names in folders["names"].items() if label for name in names}
    both = [name for name in labels if name in of_folders]
    other = [name for name in both if _key(labels[name]) != _key(of_folders[name])]
    same_words = {_key(label) for label in labels.values() if label} <= {_key(label) for label in folders["names"]}
    sure = label_tables.is_sure(used[0].columns["label"])
    named = len(labels) * (2 if "mask" in used[0].columns else 1)  # each with its mask
    if of_folders and (named < WHOLE * len(of_folders) or not (same_words or sure)):
        for table in used:
            if same_words or sure:
                differ = f"; {len(other)} of its rows name another class than the folder" if other else ""
                table.why_not = f"it names {table.files} of {len(of_folders)} tiles, whose folders all name a class{differ}"
            else:
                table.why_not = (
                    f"its column {used[0].columns['label']!r} ({_few(labels.values())}) may be no class, and the folders name one; if it "
                    "is, give the table in `table` and the column in `columns`"
                )
        return None
    said = []
    if other and same_words:
        first = other[0]
        said.append(
            f"{len(other)} OF {len(both)} ROWS NAME ANOTHER CLASS THAN THE FOLDER, first {first}: {labels[first]}. The table is believed"
        )
    elif both and not same_words:
        said.append(
            f"THE TABLE CALLS THE CLASSES {_few(labels.values())}, THE FOLDERS {_few(of_folders.values())}. The table is believed; take it "
            "out of `table` if the folders are right"
        )
    if missed := len(tiles) - len(labels):
        said.append(f"{missed} of {len(tiles)} pictures are in no table that is used, and stay out")
    return _of_tables(used, data) | {"said": said}


def _few(labels):
    known = sorted({label for label in labels if label})
    return ", ".join(known[:4]) + " ..." * (len(known) > 4)


def _of_tables(used, data):
    labelled = data[data["label"].ne("")]
    case = next((c for c in remarks.CASES if c in data and data[c].notna().all()), None)
    splits = len(used) > 1 and "split" not in data and all(table.split for table in used) and len({table.split for table in used}) > 1
    table = [table.name for table in used]
    if splits:
        of = {split: [one.name for one in used if one.split == split] for split in dict.fromkeys(one.split for one in used)}
        table = {split: held[0] if len(held) == 1 else held for split, held in of.items()}
    splits |= "split" not in data and bool(levels.splits_of(data["file_name"]))
    shown = ", ".join(table.name for table in used[:3]) + (f" and {len(used) - 3} more" if len(used) > 3 else "")
    return {
        "table": table if len(used) > 1 else used[0].name,
        "columns": used[0].columns,
        "layout": f"{'tables' if len(used) > 1 else 'table'} {shown}" + (" with its own split" if splits or "split" in data else ""),
        "names": {name: list(rows) for name, rows in labelled.groupby("label")["file_name"]},
        "case_of": dict(zip(labelled["file_name"], labelled[case], strict=True)) if case else {},
        "without": len(data) - len(labelled),
    }


def _of_splits(good):
    """The tables of one folder that are called train, val and test; of several such folders, the folds, the one with most tiles."""
    folders = {}
    for table in good:
        if table.split and "split" not in table.columns:
            folders.setdefault(table.name.rpartition("/")[0], []).append(table)
    every = [table for some in folders.values() for table in some]
    sets = [held for held in folders.values() if _is_split(held)]
    if not sets and len(folders) > 1 and _is_split(every):  # train/metadata.csv beside test/metadata.csv
        sets = [every]
    return max(sets, key=lambda held: sum(table.files for table in held), default=None)


def _is_split(tables):
    """Whether tables are the splits of one data set: two splits or more, the same columns, no tile in two of them."""
    names = [name for table in tables for name in table.data["file_name"].unique()]
    same = all(table.columns == tables[0].columns for table in tables)
    return same and len({table.split for table in tables}) > 1 and len(names) == len(set(names))


def _together(good):
    """The largest table, and every other of the same columns whose tiles no other has: one a case, one a fold."""
    used, taken = [], set()
    for table in sorted(good, key=lambda table: -table.files):
        names = set(table.data["file_name"])
        if not used or (table.columns == used[0].columns and not names & taken):
            used.append(table)
            taken |= names
    return sorted(used, key=lambda table: table.name)


def _beside(table, used, data):
    """Why a table that lists tiles is not used: others name them already; and how often it says otherwise."""
    told = dict(zip(data["file_name"], data["label"], strict=True))
    both = [(told[name], label) for name, label in zip(table.data["file_name"], table.data["label"], strict=True) if name in told]
    differ = sum(a != b for a, b in both)
    also = f"; it names another class for {differ} of {len(both)} tiles, so decide whose word counts" if differ else ""
    shown = ", ".join(one.name for one in used[:3]) + (" ..." if len(used) > 3 else "")
    return f"{shown} name{'s' * (len(used) == 1)} {len(both)} of its {table.files} tiles already{also}"


def _join_tiles(guess, every):
    """Tables without classes that say a case, a split or a group of each tile."""
    for table in guess["tables"]:
        given = _given(guess)
        brings = {ours: table.columns[ours] for ours in label_tables.JOINED if ours in table.columns and ours not in given}
        if not table.why_not or table.data is None or not brings:
            continue
        missing = sorted(set(every) - set(table.data["file_name"]))
        if missing or table.data["file_name"].duplicated().any():
            told = ", ".join(brings)
            lack = f"of {len(every) - len(missing)} of {len(every)} tiles, not of {missing[0]}" if missing else "more than once for a tile"
            table.why_not += f"; it gives {told} {lack}, so that is not joined"
            continue
        guess["facts"].append({"table": table.name, "on": "file_name", "columns": {"file_name": table.columns["file_name"], **brings}})
        table.joined, table.why_not = guess["facts"][-1]["columns"], "" if "label" not in table.columns else table.why_not
        if not guess["case_of"] and (case := next((c for c in remarks.CASES if c in brings), None)):
            of = dict(zip(table.data["file_name"], table.data[case], strict=True))
            guess["case_of"] = {name: of[name] for name in every}


def _given(guess):
    """What is said already of every tile, by a table, by folders or by facts."""
    joined = {ours for fact in guess["facts"] for ours in fact["columns"] if ours != fact["on"]}
    return set(guess["columns"]) | {kind for kind in guess["kinds"] if kind != "-"} | joined


def _join_cases(guess):
    """Tables with one row a case or slide that say its patient, split or group; patients may then lead to further tables."""
    waiting = [table for table in guess["tables"] if table.cells is not None]
    while joined := next((table for table in waiting if _join_case(guess, table)), None):
        waiting.remove(joined)


def _join_case(guess, table):
    """Joins one table by the case or slide, where its rows name them all and it says something new; whether it did."""
    cells, cases, given = table.cells, set(guess["case_of"].values()), _given(guess)
    key = next((c for c in cells if _names_all(cells[c], cases)), None) if cases else None
    if key is None:
        return False
    brings = label_tables.roles(cells.drop(columns=key))
    brings = {ours: theirs for ours, theirs in brings.items() if ours in ("patient", "split", "group") and ours not in given}
    by = next((ours for ours in remarks.CASES if ours in given), "case_id")
    if not brings or (by == "patient" and "patient" in brings):
        return False
    if "patient" in brings and by == "case_id" and "slide" not in given:  # what was taken for the case is a slide or biopsy of a patient
        by = "slide"
        guess["pattern"] = guess["pattern"].replace("(?P<case_id>", "(?P<slide>")
        for kinds in (guess["kinds"], guess["levels"]):
            kinds[:] = ["slide" if kind == "case_id" else kind for kind in kinds]
        guess["columns"] = {"slide" if ours == "case_id" else ours: theirs for ours, theirs in guess["columns"].items()}
    guess["facts"].append({"table": table.name, "on": by, "columns": {by: key, **brings}})
    table.why_not, table.joined, table.files = "", guess["facts"][-1]["columns"], len(cells)
    if "patient" in brings:
        of = dict(zip(cells[key], cells[brings["patient"]], strict=True))
        guess["case_of"] = {name: of[case] for name, case in guess["case_of"].items()}
    return True


def _names_all(column, cases):
    return cases <= set(column) and not column[column.isin(cases)].duplicated().any()


# --- folders ---------------------------------------------------------------------------------------------------------


def _look_at_folders(tiles, guessed):
    kinds = guessed.kinds
    names, skipped, cases, refused = {}, Counter(), {}, []
    for name in tiles:
        folders = name.split("/")[:-1]
        told = levels.read(name, kinds) if "class" in kinds else None
        if told is None or levels.plain(told["class"]) in (*levels.MASKS, *levels.ASIDE, *levels.UNLABELLED):
            skipped["/".join(folders[: kinds.index("class") + 1 if "class" in kinds else 1]) or "."] += 1
            refused += [told["class"]] if told else []
            continue
        names.setdefault(told["class"], []).append(name)
        if told.get("case_id"):
            cases[name] = told["case_id"]
    loose = next((folder for folder in skipped if levels.plain(folder) in levels.UNLABELLED), "")
    skipped.pop(loose, None)
    if not names and tiles:
        return _by_name(tiles, guessed.said)
    plain = kinds in (["class"], ["split", "class"])
    told = "class folders" if plain else f"folders of {' / '.join(kinds)}"
    bases = sorted({name.split("/")[0] for name in tiles if levels.split_of(name.split("/")[0])}) if kinds[:1] == ["split"] else []
    return {
        "layout": f"{'/'.join(bases)} above class folders" if bases and plain else told,
        "names": dict(sorted(names.items())),
        "unlabelled": loose,
        "skipped": dict(skipped),
        "refused": list(dict.fromkeys(name for name in refused if name not in names and name != loose)),
        "kinds": kinds,
        "levels": [] if plain else kinds,
        "case_of": cases if len(cases) == sum(map(len, names.values())) else {},
        "said": guessed.said,
    }


def _twice(pictures):
    """The top folder that holds again what lies beside it, under the same names; "" where there is none."""
    every = set(pictures)
    for top in sorted({name.partition("/")[0] for name in pictures if "/" in name}):
        if levels.plain(top) in levels.MASKS:
            continue
        below = [name.partition("/")[2] for name in pictures if name.startswith(f"{top}/")]
        if "/" in below[0] and len(every & set(below)) >= 0.9 * len(below):
            return top
    return ""


def _by_name(tiles, said):
    """Tiles without class folders: their classes where file names begin with them, else none."""
    found = {}
    for name in tiles:
        found.setdefault(re.match(FIRST_WORD, name.rpartition("/")[2])[0], []).append(name)
    words = [word for word in found if word.isalpha() and levels.split_of(word) is None]
    few = 2 <= len(found) <= 20 and len(words) == len(found) and min(map(len, found.values())) > 1
    medical = sum(levels.MEDICAL.search(word) is not None for word in words) >= 0.5 * len(words)
    pattern = f"(?:^|/)(?P<label>{FIRST_WORD})[^/]*$"
    if few and medical:
        said = [*said, f"the file names begin with {_few(found)}: they are taken as the classes (`label_pattern`)"]
        return {
            "layout": "file names that begin with the class",
            "names": dict(sorted(found.items())),
            "label_pattern": pattern,
            "said": said,
        }
    if few:
        said = [*said, f"the file names begin with {_few(found)}: if these are the classes, write `label_pattern: {pattern}` and `classes`"]
    return {"layout": "tiles without labels", "names": {"": tiles}, "unlabelled": ".", "said": said}


@lru_cache(10_000)
def _key(label):
    """A class's name without what spellings of one name differ in: letters' case, accents' code, blanks and dashes."""
    spaced = re.sub(r"(?<=\w)[_\-\s]+(?=\w)", " ", unicodedata.normalize("NFC", label).strip())
    return re.sub(r"(?<=\w)_|_(?=\w)", " ", spaced).strip().casefold()


def _one_spelling(names):
    """(names with one class for all spellings of it, the commonest; {class: its other spellings})."""
    alike = {}
    for label in sorted(names, key=lambda label: (-len(names[label]), label)):
        alike.setdefault(_key(label), []).append(label)
    also = {held[0]: held[1:] for held in alike.values() if len(held) > 1}
    merged = {held[0]: [name for label in held for name in names[label]] for held in alike.values()}
    return {label: merged[label] for label in names if label in merged}, also


def _sizes(root, names, most=300):
    """Counter of (width, height) of at most `most` tiles spread over the list, read from their headers."""
    from PIL import Image

    sizes = Counter()
    for name in names[:: max(1, len(names) // most)]:
        try:
            with Image.open(files.inside(root, name.replace("\\", "/"))) as image:
                sizes[image.size] += 1
        except (OSError, ValueError, Image.DecompressionBombError):
            sizes[(0, 0)] += 1
    return sizes
