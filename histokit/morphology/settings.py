"""What is rarely turned of 10_morphology_prompts: each setting has its name, default and check here."""

from dataclasses import dataclass, field, fields

from histokit.morphology import clusters, junk_tiles
from histokit.runs import recipe

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """Options of the notebook.

    Args:
        scaling, pca, families, least: see `clusters.fit`.
        ks: numbers of clusters that are tried where `k` is 0; [] tries as many as there are tiles for, see `cluster_number.candidates`.
        junk_rules, junk_most: see `junk_tiles.find`.
        label_vectors: each class is called by a learned word of so many vectors too, after its own words; 0 leaves it at these.
        shuffled: deals the forms of a class anew among its tiles, a control: words that say nothing must not help.
        total, cap, least_prompts, alpha: see `balance.weights`.
    """

    scaling: str = "l2"
    pca: int = 64
    families: int = 0
    least: int = clusters.LEAST
    ks: list = field(default_factory=list)
    junk_rules: dict = field(default_factory=dict)
    junk_most: float = junk_tiles.MOST
    label_vectors: int = 0
    shuffled: bool = False
    total: int = 0
    cap: int = 0
    least_prompts: int = 0
    alpha: float = 0.5

    @classmethod
    def of(cls, options):
        """Settings from a dict; ValueError for a name that is none, or a number below 0."""
        known = [one.name for one in fields(cls)]
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"10_morphology_prompts has no option {name!r}{recipe.nearest(name, known)}")
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        return cls(**options)
