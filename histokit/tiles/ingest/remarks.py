"""What the owner of a folder has to look at, in sentences: what was guessed, what is used, and all that is left out, with counts."""

import re
import shlex

from histokit.core import files
from histokit.tiles.description import SPLITS, own_name
from histokit.tiles.ingest import levels

VERSION = 1
CHECKED = "params/datasets/my_tiles.yaml"  # what params/check_tiles.yaml names
CASES = ("case_id", "patient", "slide")  # the first of these that is given says what a case is


def sizes_text(sizes):
    shown = [f"{w} x {h}" if w else "unreadable" for (w, h), _ in sizes.most_common(3)]
    return ", ".join(shown) + (f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")


def points(guess, cases, described):
    """What the owner has to look at."""
    given = [c for c in CASES if c in guess["columns"]]
    total, every = sum(map(len, guess["names"].values())), set().union(*cases.values()) if cases else set()
    if not cases:
        yield (
            "NO CASE IDS FOUND: every tile counts as its own case. Tiles of one patient may then be trained on and tested on, and "
            "every interval is too narrow. Give `case_pattern`, or a table with a case column"
        )
    else:
        by = "the folders" if "case_id" in guess["kinds"] else "the file names"
        joined = next((fact for fact in guess["facts"] if set(CASES) & set(fact["columns"]) - {fact["on"]}), None)
        source = joined["table"] if joined else f"column {guess['columns'][given[0]]!r}" if given else by
        yield f"{total} tiles, {len(every)} cases by {source}, as shown above: is the left part one patient, biopsy or slide?"
        if len(every) == 1:
            yield "ONE CASE ONLY: nothing can be held out for a test"
        if 1 < len(every) == total:
            yield (
                "EVERY TILE IS A CASE OF ITS OWN: right only if no two tiles come from one patient. Else tiles of one patient may be "
                "trained on and tested on, and every interval is too narrow; name another column, or give `case_pattern`"
            )
        yield from _odd_cases(guess, every)
        if lonely := [label for label, held in cases.items() if len(held) == 1]:
            yield f"from a single case, so trained on but never evaluated: {', '.join(lonely)}"
    for name in guess["names"]:
        if name != own_name(name):
            yield f"the class {name!r} is called {own_name(name)!r} in recipes and results, since {name!r} has a meaning of its own there"
    for copy, name in _copies(guess["names"]):
        yield f"the class {copy!r} is called like a copy of {name!r}: name it in `ignore`, or move its tiles"
    for name, others in guess["also"].items():
        yield f"{', '.join(map(repr, [name, *others]))} are taken as spellings of one class, {name!r} (`also`)"
    yield from guess["said"]
    yield from tables_said(guess["tables"])
    yield from left_out(guess)
    if len(guess["sizes"]) > 1:
        yield f"sizes differ ({sizes_text(guess['sizes'])}): is `fit: resize` right, or should the scale be kept?"
    yield _split_said(guess)
    yield "the order of `classes` (label ids), their `term` for prompts, and `mpp` if you know it"
    if described:
        work, path = files.root().resolve(), described.path.resolve()
        shown = path.relative_to(work).as_posix() if path.is_relative_to(work) else path
        other = "" if str(shown) == CHECKED else f" -p dataset={shlex.quote(str(shown))}"
        yield f"then look at it: histokit run params/check_tiles.yaml{other}, or open notebooks/00_dataset.ipynb"


def _odd_cases(guess, cases):
    """Cases that may be no cases: look-alike names, and such as lie in two of the splits that the data gives."""
    alike = sorted((case[:-1], case) for case in cases if case[-1:].isalpha() and case[:-1] in cases and case[-2:-1].isdigit())
    if alike:
        shown = ", ".join(f"{one} and {other}" for one, other in alike[:3])
        yield f"{len(alike)} case ids differ from another by a last letter alone: one patient or two? {shown}"
    yield from _same_numbers(cases)
    split_of = _given_splits(guess)
    lies = {}
    for name, case in guess["case_of"].items():
        if split := split_of.get(name):
            lies.setdefault(case, set()).add(split)
    twice = sorted(case for case, where in lies.items() if len(where) > 1)
    if twice:
        yield (
            f"{len(twice)} OF {len(lies)} CASES LIE IN TWO OF THE GIVEN SPLITS, first {twice[0]}: 00 will stop. Either the split was made "
            "tile by tile, or what is taken for the case is none; correct `case_pattern`, or leave the given split out"
        )


def _same_numbers(cases):
    """Cases whose ids differ in capitals, or in the letters before one long number: a split by case may part one patient."""
    spelt, numbered = {}, {}
    for case in sorted(cases):
        spelt.setdefault(case.casefold(), []).append(case)
        if found := re.fullmatch(r"\D*(\d{5,})", case):
            numbered.setdefault(found[1], []).append(case)
    capitals, letters = ([held for held in groups.values() if len(held) > 1] for groups in (spelt, numbered))
    if capitals:
        yield f"{len(capitals)} times case ids differ in capitals alone: {' and '.join(capitals[0])}. One patient or two?"
    if letters := [held for held in letters if len({case.casefold() for case in held}) > 1]:
        yield (
            f"{len(letters)} times case ids have one number and other letters: {' and '.join(letters[0])}. One patient or two? Where the "
            "number is the patient, `case_pattern: '(?P<case_id>\\d{5,})'` takes it alone"
        )


def _copies(names):
    """(class, the class of which its name says that it is a copy) of folders as file managers call them."""
    for name in names:
        bare = re.sub(r"(\s*[-_]\s*(copy|kopie|copie|copia)(\s*\(?\d+\)?)?|\s*\(\d+\))$", "", name, flags=re.IGNORECASE)
        if bare != name and bare in names:
            yield name, bare


def _given_splits(guess):
    """{file name: split} as the data gives it, by its folders, its tables or a table that is joined."""
    every = [name for names in guess["names"].values() for name in names]
    found = {name: (levels.read(name, guess["kinds"]) or {}).get("split") for name in every}
    by_split = guess["table"] if isinstance(guess["table"], dict) else {}
    listed = {name: split for split, held in by_split.items() for name in (held if isinstance(held, list) else [held])}
    used = listed or (guess["table"] if isinstance(guess["table"], list) else [guess["table"]])
    if guess["table"]:
        found = levels.splits_of(every) or dict.fromkeys(every)
    for table in guess["tables"]:
        if table.name in used and (listed or "split" in table.columns):
            column = [listed[table.name]] * len(table.data) if listed else table.data["split"].map(levels.split_of)
            found |= dict(zip(table.data["file_name"], column, strict=True))
        elif "split" in table.joined:
            found |= _joined_splits(table, every, guess["case_of"])
    return found


def _joined_splits(table, every, case_of):
    """{file name: split} of a table that is joined by the tile or by its case."""
    if table.cells is None:
        of = dict(zip(table.data["file_name"], table.data["split"], strict=True))
        return {name: levels.split_of(of[name]) for name in every if of.get(name)}
    by = next(iter(table.joined))
    of = dict(zip(table.cells[table.joined[by]], table.cells[table.joined["split"]], strict=True))
    return {name: levels.split_of(split) for name in every if (split := of.get(case_of.get(name)))}


def tables_said(tables, most=8):
    """Every table that was found, and why it is used or not; of many, the first."""
    if len(tables) > most:
        used = sum(not table.why_not for table in tables)
        yield f"{len(tables)} tables are there, {used} are used; the first of each kind:"
    shown = [some[i] for some in ([t for t in tables if not t.why_not], [t for t in tables if t.why_not]) for i in range(min(4, len(some)))]
    for table in tables if len(tables) <= most else shown:
        yield from (f"{table.name}: {line}" for line in table.said)
        if table.joined:
            told = ", ".join(f"{ours} = {theirs!r}" for ours, theirs in table.joined.items())
            how = "tile by tile" if "file_name" in table.joined else "by the case"
            yield f"{table.name} is joined {how}: {told}" + (f"; its classes are not used: {table.why_not}" if table.why_not else "")
        elif table.why_not:
            yield f"{table.name} is there and not used: {table.why_not}"
        else:
            told = ", ".join(f"{ours} = {theirs!r}" for ours, theirs in table.columns.items())
            lost = f"; {table.rows - table.files} rows name no file below the folder and stop 00" if table.files < table.rows else ""
            yield f"{table.name} is used: {table.files} of {table.rows} rows name a tile; {told}{lost}"


def left_out(guess):
    """What lies below the folder and is no tile, with counts."""
    found, apart = guess["found"], guess["masks"]
    if guess.get("without"):
        yield f"{guess['without']} rows have no class: unlabelled tiles"
    if guess["skipped"]:
        yield "not taken as classes: " + ", ".join(
            f"{name if name != '.' else 'the top folder'} ({count} picture{'s' * (count > 1)})" for name, count in guess["skipped"].items()
        )
    if apart.masks:
        whose = f"{apart.of} of {len(apart.tiles)} tiles have one"
        column = guess["columns"].get("mask", "")
        how = (
            f"named in the column {column!r}"
            if column
            else f"offered as `mask: {apart.template}`"
            if apart.template
            else "not offered as `mask`, which needs one for every tile"
        )
        yield f"{len(apart.masks)} pictures are masks and no tiles ({whose}): {how}"
    if found.litter:
        yield "left by systems and skipped: " + ", ".join(f"{name} ({count})" for name, count in found.litter.most_common(6))
    if found.links:
        name, target = next(iter(found.links.items()))
        more = f" and {len(found.links) - 1} more" if len(found.links) > 1 else ""
        yield (
            f"LINKS WERE NOT FOLLOWED: {name} leads to {target}{more}. `follow_links: true` in the description reads through them; "
            "nothing is ever written there"
        )
    if found.unread:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in found.unread.most_common(6))
        yield f"files that are not read as tiles: {kinds}; export pictures as PNG, TIFF or JPEG of one tile each"
    if found.polygons:
        yield (
            f"{len(found.polygons)} .geojson files hold polygons, such as {found.polygons[0]!r}: name them in `mask`, such as "
            "'{folder}/{stem}.geojson', and their classes in `layers`"
        )
    if found.notes:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in found.notes.most_common(6))
        yield f"files that may hold labels and are not read: {kinds}; a CSV with one row a tile (file_name, label, case_id) is"
    if found.empty:
        more = f" and {len(found.empty) - 4} more" if len(found.empty) > 4 else ""
        yield f"empty folders: {', '.join(found.empty[:4])}{more}"


def _split_said(guess):
    """Which splits the data brings, and where the others will come from."""
    given = set(_given_splits(guess).values()) - {None}
    lacking = [name for name in SPLITS if name not in given]
    if not given:
        return "the data brings no split; 00_dataset draws one by case (`split:` sets the fractions)"
    if not lacking:
        return "the data brings its own split into train, val and test, which is kept"
    return (
        f"the data brings no {' and no '.join(lacking)} split: 00_dataset cuts it by case from train, so fewer tiles are left to learn from"
    )
