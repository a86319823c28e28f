"""Why a selection did not keep a tile: codes and numbers in the column `reason` of a manifest, and the words for them where they are shown.

The column holds a JSON list, one object a reason: its `code` and the fields named beside it in `CODES`; "" for a tile that was kept for its
scores. Who counts or asks looks at codes, never at words. `select.selection` decides; here is only how that is written, read and said.
"""

import json

CODES = {  # code -> its caption, which names no tile; the fields of such a reason
    "blank": "blank or black",  # contrast, cut
    "copy": "copy of a training tile",  # of (tile_id), space (feature or picture), similarity, cut
    "repeat": "repeats another",  # of (tile_id of a better synthetic tile), space, similarity, cut
    "judge": "judge disagrees",  # asked and seen (class names), cut, and what is compared: place (from 1) or probability
    "stain": "stained unlike real tiles",  # deviation, cut
    "blurred": "blurred",  # sharpness, cut
    "centroid": "nearer to another class",  # asked, place, cut
    "realism": "outside the real tiles",  # realism, cut
    "cluster": "not the form that was asked for",  # asked, seen (clusters)
    "person": "a person's verdict",  # verdict (keep or reject), note ("" for none)
    "quota": "beyond the quota",  # place, by (the score), most (that are kept)
    "earlier": "told by an earlier version",  # text: manifests of earlier versions hold sentences; no selection writes this code
}


def write(found):
    """The column's text for a list of reasons, floats to six digits; ValueError for one that `sentence` has no words for."""
    for reason in found:
        sentence(reason)
    short = [{name: _short(value) for name, value in reason.items()} for reason in found]
    return json.dumps(short, ensure_ascii=False, allow_nan=False) if found else ""


def _short(value):
    return json.loads(f"{value:.6g}") if isinstance(value, float) else value


def read(text):
    """The list of reasons in a cell of the column; what an earlier version wrote there as text is one reason, said as it is."""
    if text and not text.startswith("["):
        return [{"code": "earlier", "text": text}]
    return json.loads(text or "[]")


def sentence(reason):
    """One reason in words, every name and number from its fields; ValueError where a code or its fields are not those of `CODES`."""
    match reason:
        case {"code": "blank", "contrast": contrast, "cut": cut}:
            return f"blank or black: contrast {contrast:.1f} below {cut:.1f}"
        case {"code": "copy", "of": of, "space": space, "similarity": similarity, "cut": cut}:
            return f"copy of {of}: {space} {similarity:.3f}, cut {cut:.3f}"
        case {"code": "repeat", "of": of, "space": space, "similarity": similarity, "cut": cut}:
            return f"repeats {of}: {space} {similarity:.3f}, cut {cut:.3f}"
        case {"code": "judge", "asked": asked, "seen": seen, "place": place, "cut": cut}:
            return f"judge sees {seen}: {asked} in place {place}, cut {cut:.0f}"
        case {"code": "judge", "asked": asked, "seen": seen, "probability": probability, "cut": cut}:
            sees = "judge unsure" if seen == asked else f"judge sees {seen}"
            return f"{sees}: {asked} only {probability:.2g}, cut {cut:.2g}"
        case {"code": "stain", "deviation": deviation, "cut": cut}:
            return f"stain: {deviation:.1f} deviations from real tiles, cut {cut:.1f}"
        case {"code": "blurred", "sharpness": sharpness, "cut": cut}:
            return f"blurred: sharpness {sharpness:.1f}, cut {cut:.1f}"
        case {"code": "centroid", "asked": asked, "place": place, "cut": cut}:
            return f"centroid: {asked} in place {place:.0f}, cut {cut:.0f}"
        case {"code": "realism", "realism": realism, "cut": cut}:
            return f"realism: {realism:.2f}, cut {cut:.2f}"
        case {"code": "cluster", "asked": asked, "seen": seen}:
            return f"cluster: falls into {seen:.0f}, asked for {asked:.0f}"
        case {"code": "person", "verdict": verdict, "note": note}:
            return f"person: {verdict}" + (f", {note}" if note else "")
        case {"code": "quota", "place": place, "by": by, "most": most}:
            return f"quota: place {place} by {by}, {most} are kept"
        case {"code": "earlier", "text": text}:
            return text
    raise ValueError(f"no words for the reason {reason}; expected a code of {', '.join(CODES)}, with its fields")


def said(text):
    """A cell of the column in words, "" for a tile that was kept for its scores."""
    return "; ".join(map(sentence, read(text)))


def caption(code):
    """A code in words that name no tile; those that an earlier version wrote in its place stay as they are."""
    return CODES.get(code, code)


def captions(text):
    """The captions of a cell, each once."""
    return list(dict.fromkeys(caption(reason["code"]) for reason in read(text)))
