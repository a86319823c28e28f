"""All that 08_fidelity found, as results.json holds it, and the short table for those who read its results and not its page."""

import json
from dataclasses import dataclass

import pandas as pd

from histokit.core import files
from histokit.fidelity import copy_detection, membership, perceptual, sanity, toy_structures

VERSION = 1


def digest(made):
    """What tells one set of synthetic tiles from another: a hash over their contents."""
    return files.digest(sorted(made["sha256"]))


@dataclass(frozen=True)
class Findings:
    """What each part of the page measured; DataFrames but for `copies`, a `copy_detection.Report`."""

    made: pd.DataFrame  # manifest of the tiles that were looked at
    encoder: str  # whose features the page is about
    likeness: pd.DataFrame
    frechet: pd.DataFrame
    signs: pd.DataFrame
    stained: pd.DataFrame
    lpips: pd.DataFrame
    probe: pd.DataFrame
    copies: object
    membership: pd.DataFrame
    structures: pd.DataFrame

    def plain(self):
        """As results.json holds it; `copies` has the gate of each class, which `export` asks."""
        tables = {name: json.loads(getattr(self, name).to_json(orient="records")) for name in ("likeness", "frechet", "probe")}
        return tables | {
            "encoder": self.encoder,
            "made": {"tiles": len(self.made), "digest": digest(self.made)},
            "copies": self.copies.plain() | {"lines": list(copy_detection.sentences(self.copies))},
            "membership": {"rows": self.membership.to_dict("records"), "lines": list(membership.remarks(self.membership))},
            "lpips": {"rows": self.lpips.to_dict("records"), "lines": list(perceptual.remarks(self.lpips))},
            "structures": {"rows": self.structures.to_dict("records"), "lines": list(toy_structures.remarks(self.structures))},
            **sanity.plain(self.signs, self.stained),
        }


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
