"""The short table of what 08_fidelity found, for those who read its results and not its page."""

import pandas as pd

from histokit.core import files

VERSION = 1


def digest(made):
    """What tells one set of synthetic tiles from another: a hash over their contents."""
    return files.digest(sorted(made["sha256"]))


def read(folder=None, made=None):
    """The classes of a finished 08 in one row each: tiles, copy gate and why, KID at n beside its floor in the page's encoder, told apart.

    Args:
        folder: of the run; None for no rows.
        made: manifest of the tiles that an arm was trained on; `remarks` tells when the page looked at others.

    Returns:
        DataFrame class, tiles, copies (pass | blocked | uncalibrated), why, kid, floor, reading, probe (AUROC of telling made from real).
    """
    rows, same = [], True
    held = files.read_json(folder / "results.json") if folder else {"likeness": [], "probe": [], "encoder": ""}
    if folder and made is not None:
        same = held["made"]["digest"] == digest(made)
    told = {(row["class"], row["encoder"]): row["auroc"] for row in held["probe"]}
    for row in held["likeness"]:
        gate = held["copies"]["gates"].get(row["class"])
        if row["encoder"] == held["encoder"] and gate:
            seen = {
                "kid": row["kid_at_n"],
                "floor": row["floor"],
                "reading": row["reading"],
                "probe": told.get((row["class"], row["encoder"])),
            }
            rows.append(
                {"class": row["class"], "tiles": row["synthetic"], "copies": gate["state"], "why": "; ".join(gate["reasons"])} | seen
            )
    found = pd.DataFrame(rows, columns=["class", "tiles", "copies", "why", "kid", "floor", "reading", "probe"])
    found.attrs["same"] = same
    return found


def remarks(found):
    """What a reader of `read` must know, in sentences."""
    if not found.attrs.get("same", True):
        yield "These are other tiles than the judged arm was trained on; name its step, status and dose in 08 to see those."


def table(found):
    """`read` for reading."""
    rows = []
    for row in found.to_dict("records"):
        kid = "" if pd.isna(row["kid"]) else f"{1000 * row['kid']:.0f}, real {1000 * row['floor']:.0f}"
        copies = row["copies"] + (f": {row['why']}" if row["why"] else "")
        shown = {"class": row["class"], "made tiles": row["tiles"], "copies of training tiles": copies, "KID x 1000 at n": kid}
        rows.append(shown | {"reading": row["reading"], "told from real (AUROC)": "" if pd.isna(row["probe"]) else f"{row['probe']:.2f}"})
    return pd.DataFrame(rows)
