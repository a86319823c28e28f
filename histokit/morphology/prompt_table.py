"""Prompts and captions of a finished 10_morphology_prompts: who reads them, and how many images are asked for of each.

The step writes prompts.csv (prompt_id, label, cluster, text, tiles) and captions.csv (tile_id, prompt_id, text, cluster, weight). A
fine-tuning takes the captions, a generating step the prompts with a budget; nobody reads a text back.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from histokit.core import files
from histokit.morphology import clusters

VERSION = 1
TABLES = "captions.csv", "prompts.csv"
NEW_WORDS = "new_words.json"
BUDGETS = {
    "equal": "all prompts of a class equally often",
    "proportional": "as often as the class's real tiles have them",
    "inverse": "the rarer among the real tiles, the more often",
}


@dataclass(frozen=True)
class Called:
    """How a finished step calls tiles; without one, nothing is said and classes go by their own words."""

    table: pd.DataFrame | None = None  # tile_id, prompt_id, text, cluster, weight
    prompts: pd.DataFrame | None = None  # prompt_id, label, cluster (-1 where captions name none), text, tiles
    new_words: dict = field(default_factory=dict)  # of words to be learned, see `captions.new_words`

    @classmethod
    def read(cls, run, step):
        """What the step wrote; nothing where it is ""."""
        if not step:
            return cls()
        folder = Path(run.parent(step, ""))
        if not (folder / TABLES[0]).is_file():
            raise FileNotFoundError(f"{folder} holds no {TABLES[0]}; name a finished step of 10_morphology_prompts")
        table, asked = (files.read_table(folder / name).astype({"prompt_id": int}) for name in TABLES)
        return cls(table, asked, files.read_json(folder / NEW_WORDS))

    def among(self):
        """{class: clusters its tiles count for}; those of a cluster that holds too few of it count for another, see `captions.gathered`."""
        label = self.prompts.set_index("prompt_id")["label"]
        pairs = self.table.assign(label=self.table["prompt_id"].map(label))[["label", "cluster"]].drop_duplicates()
        return {name: sorted(own["cluster"].astype(int)) for name, own in pairs.groupby("label", sort=False)}

    def captioned(self):
        """The classes that have captions."""
        return list(dict.fromkeys(self.prompts["label"]))

    def classes(self, names, class_name="all", rare=()):
        """The classes to work on: `names`, or where "all" is asked for those that have captions, the rare ones of them if any is.

        Raises ValueError for one without captions.
        """
        if self.prompts is None:
            return names
        held = self.captioned()
        if class_name == "all":
            return [name for name in held if name in rare] or held
        if lost := [name for name in names if name not in held]:
            raise ValueError(f"no tile of {lost[0]!r} has a caption; there are some of {', '.join(held)}")
        return names

    def shown(self, most=24):
        """The prompts as a page shows them; None without any."""
        return None if self.prompts is None else self.prompts[["label", "cluster", "text", "tiles"]].head(most)


def applied(run, step, options):
    """`options` of 03_img2img as its job table takes them: prompts with their shares in the place of `budget`, see `prompted`."""
    rest = {name: value for name, value in options.items() if name != "budget"}
    return rest | prompted(run, step, options.get("budget", ""))


def prompted(run, step, budget=""):
    """What `policies.job_table` takes of a step: `prompts` with the share each has of its class's images, and who has which.

    Args:
        step: a 10_morphology_prompts, or "" where prompts are a template.
        budget: see `shares`; "" asks for all prompts of a class equally often.
    """
    if not step:
        if budget:
            raise ValueError("a budget is of prompts, and no step that made any is named; give `captions`")
        return {}
    called = Called.read(run, step)
    shared = called.prompts.assign(share=shares(run, step, called.prompts, budget or "equal"))
    return {"prompts": shared, "captioned": called.table.set_index("tile_id")["prompt_id"]}


def shares(run, step, table, budget):
    """How large a share [P] of its class's images each prompt gets.

    Args:
        table: prompts, see `Called`.
        budget: one of `BUDGETS`; {prompt: number} by id or text; or {"recall_of": a 06_classifier, "arm": name}, the closed loop: in
            proportion to how often real validation tiles of the class and cluster are missed, (misses + 1) / (tiles + 2).

    Raises ValueError for a prompt, or a budget, that there is not.
    """
    if isinstance(budget, dict) and "recall_of" in budget:
        weight = _missed(run, step, table, **budget)
    elif isinstance(budget, dict):
        weight = _by_hand(table, budget)
    elif budget in BUDGETS:
        tiles = table["tiles"].to_numpy(float)
        weight = {"equal": np.ones(len(table)), "proportional": tiles, "inverse": 1 / np.maximum(tiles, 1)}[budget]
    else:
        raise ValueError(f"budget is {budget!r}; use {', '.join(BUDGETS)}, {{prompt: number}} or {{recall_of: STEP, arm: NAME}}")
    total = pd.Series(weight).groupby(table["label"].to_numpy()).transform("sum").to_numpy()
    return np.divide(weight, total, out=np.zeros(len(weight)), where=total > 0)


def _by_hand(table, budget):
    known = {str(row.prompt_id): i for i, row in enumerate(table.itertuples())} | {row.text: i for i, row in enumerate(table.itertuples())}
    weight = np.zeros(len(table))
    for name, number in budget.items():
        if str(name) not in known:
            near = difflib.get_close_matches(str(name), [str(text) for text in known], n=1, cutoff=0.3)
            raise ValueError(f"the budget names the prompt {name!r}, which there is not" + (f"; did you mean {near[0]!r}?" if near else ""))
        if not isinstance(number, (int, float)) or number < 0:
            raise ValueError(f"the budget of {name!r} is {number!r}; expected a number, 0 or more")
        weight[known[str(name)]] += number
    return weight


def _missed(run, step, table, recall_of, arm=""):
    """Weight [P] of each prompt by what an arm's classifiers miss of real validation tiles of its class and cluster."""
    folder = run.parent(recall_of, "")
    arms = sorted({path.parent.parent.name for path in folder.glob("*/*/predictions.parquet")})
    if arm not in arms and (arm or len(arms) != 1):
        raise ValueError(f"{recall_of} has no arm {arm!r}; name one of {', '.join(arms)}")
    found = pd.concat([files.read_table(path) for path in sorted(folder.glob(f"{arm or arms[0]}/*/predictions.parquet"))])
    return missed(table, hits(found[found["split"].eq("val")]), _validation(run, step))


def hits(predictions):
    """DataFrame tile_id, label, hit (share of seeds that name the tile's own class first) of predictions (y, and p_* in the ids' order)."""
    names = [name for name in predictions if name.startswith("p_")]
    y = predictions["y"].to_numpy(int)
    told = predictions.assign(hit=predictions[names].to_numpy().argmax(axis=1) == y, y=[names[i].removeprefix("p_") for i in y])
    return told.groupby("tile_id", as_index=False).agg(label=("y", "first"), hit=("hit", "mean"))


def missed(table, hit, cluster):
    """(misses + 1) / (tiles + 2) [P] of each prompt's real validation tiles; a half where there is none.

    Args:
        table: prompts, see `Called`. hit: of `hits`. cluster: Series tile_id -> cluster of validation tiles.
    """
    seen = hit.assign(cluster=hit["tile_id"].map(cluster))
    out = np.full(len(table), 0.5)
    for i, row in enumerate(table.itertuples()):
        own = seen[seen["label"].eq(row.label) & (seen["cluster"].eq(row.cluster) if row.cluster >= 0 else True)]
        out[i] = (float((1 - own["hit"]).sum()) + 1) / (len(own) + 2)
    return out


def _validation(run, step):
    from histokit.tiles import data

    tiles = data.load(run)
    held = clusters.load(run.parent(step, ""))
    rows = tiles[tiles["split"].eq("val") & tiles["use"].eq("labelled") & tiles["source"].eq("real")]
    called = Called.read(run, step)
    rows = rows[rows["label"].isin(called.captioned())]
    found = clusters.assign_tiles(held, rows, run.device, called.among()).cluster if len(rows) else []
    return pd.Series(found, index=rows["tile_id"], dtype=int)
