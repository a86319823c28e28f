"""All that 07_evaluate found, part by part: the lines it ends in, and results.json."""

from dataclasses import dataclass, field

import pandas as pd

from histokit.evaluate import tail_detection

VERSION = 1


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

    @property
    def sentence(self):
        return self.conclusion["sentence"]

    @property
    def lines(self):
        """What follows the sentence: class by class, controls, worth in real tiles, tiles from elsewhere."""
        return [*self.conclusion["classes"].values(), *self.conclusion["controls"], *self.bought["text"], *self.abroad.lines]

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
            "fidelity": {"step": self.looked_at, "classes": self.fidelity.to_dict("records")},
        }  # fmt: skip
