"""All that 07_evaluate found, part by part: the lines it ends in, and results.json."""

from dataclasses import dataclass, field

import pandas as pd

from histokit.evaluate import tail_detection

VERSION = 2


@dataclass(frozen=True)
class Results:
    """See `plain`; everything has been measured before."""

    conclusion: dict  # of verdict.conclude
    detected: pd.DataFrame  # of tail_detection.measure
    reported: pd.DataFrame  # of reported_metrics.measure
    bought: pd.DataFrame  # of learning_curve.worth
    look: object  # test_set_log.Look
    abroad: object  # question.Abroad
    fidelity: pd.DataFrame = field(default_factory=pd.DataFrame)  # of summary.read
    looked_at: str = ""  # step it comes from
    ceilings: pd.DataFrame = field(default_factory=pd.DataFrame)  # of learning_curve.ceilings
    ruler: tuple = ()  # of learning_curve.ruler

    @property
    def sentence(self):
        return self.conclusion["sentence"]

    @property
    def lines(self):
        """What follows the sentence: class by class, controls, ceilings, worth in real tiles, tiles from elsewhere."""
        told = [*self.conclusion["classes"].values(), *self.conclusion["controls"]]
        return [*told, *self.ruler, *self.bought["text"], *self.abroad.lines]

    def plain(self):
        """What results.json holds: the sentence first."""
        said = tail_detection.remarks(self.detected, self.conclusion["arm"], self.conclusion["baseline"])
        return self.conclusion | {
            "detection": {"rows": self.detected.to_dict("records"), "lines": said},
            "reported": self.reported.to_dict("records"),
            "looks": {
                "plan": self.look.plan, "opened_before": self.look.before, "plans": self.look.plans, "recipes": self.look.recipes
            },
            "external": self.abroad.plain,
            "worth": self.bought.to_dict("records"),
            "ceilings": {"arms": self.ceilings.to_dict("records"), "lines": list(self.ruler)},
            "fidelity": {"step": self.looked_at, "classes": self.fidelity.to_dict("records")},
        }  # fmt: skip
