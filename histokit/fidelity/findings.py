"""All that 08_fidelity found, as results.json holds it."""

import json
from dataclasses import dataclass

import pandas as pd

from histokit.fidelity import copy_detection, membership, perceptual, sanity, summary, toy_structures

VERSION = 1


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
            "made": {"tiles": len(self.made), "digest": summary.digest(self.made)},
            "copies": self.copies.plain() | {"lines": list(copy_detection.sentences(self.copies))},
            "membership": {"rows": self.membership.to_dict("records"), "lines": list(membership.remarks(self.membership))},
            "lpips": {"rows": self.lpips.to_dict("records"), "lines": list(perceptual.remarks(self.lpips))},
            "structures": {"rows": self.structures.to_dict("records"), "lines": list(toy_structures.remarks(self.structures))},
            **sanity.plain(self.signs, self.stained),
        }
