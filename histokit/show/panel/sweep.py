"""The sweep beneath a panel: pictures over a range of one slider, in rows over a second one, drawn once each and remembered.

Which settings a point has, which are drawn, which cannot be; who draws them, and when, is the panel's business.
"""

from collections import namedtuple

Rung = namedtuple("Rung", "image values true_steps")  # image None where these settings draw nothing


class Sweep:
    """The points of one panel.

    Args:
        previewer: see `widgets.tuner`.
        limits: {slider: widgets.Limits}.
        over: slider along a row; "" for no sweep. across: slider of the rows, "" for one row.
        count: points in a row.
    """

    def __init__(self, previewer, limits, over, across, count):
        self.previewer, self.limits, self.over, self.count, self.climbed = previewer, limits, over, count, {}
        self.across = across if over and across != over else ""

    def settings(self, values):
        """The settings of all points [dict], the row of `values` first, in each row the cheapest first."""
        if not self.over:
            return []
        along = self.limits[self.over]
        columns = [rounded(along, along.low + (along.high - along.low) * k / self.count) for k in range(1, self.count + 1)]
        rows = [{}]
        if self.across:
            limits, at = self.limits[self.across], values[self.across]
            others = [rounded(limits, (at + end) / 2) for end in (limits.low, limits.high)]
            rows = [{self.across: value} for value in dict.fromkeys([at, *others])]
        return [{**values, **row, self.over: column} for row in rows for column in columns]

    def climb(self, values, job, on_step=None):
        """Draw the point of these settings for one job (index label of the table), and remember it; also that there is none."""
        steps = getattr(self.previewer, "steps", None)
        others = {name: value for name, value in values.items() if name != self.over}
        try:
            image = self.previewer.sweep([values[self.over]], job=job, on_step=on_step, **others)[0]
            point = Rung(image, values, steps_said(steps(**values)) if steps else "")
        except ValueError:
            point = Rung(None, values, "no step at all")
        self.climbed[job, tuple(sorted(values.items()))] = point
        return point

    def point(self, values, job):
        """What `climb` found, None where nobody climbed yet."""
        return self.climbed.get((job, tuple(sorted(values.items()))))

    def lacking(self, values, job):
        """The settings nobody climbed yet, those of the row at hand first, the cheapest first."""
        found = [point for point in self.settings(values) if self.point(point, job) is None]
        return sorted(found, key=lambda point: (point.get(self.across) != values.get(self.across), point[self.over]))


def typed(limits, value):
    """A slider's value as its parameter wants it: a whole number where value, ends and step are whole numbers."""
    return round(value) if all(isinstance(part, int) for part in limits) else round(float(value), 6)


def rounded(limits, value):
    """`value` on the slider's grid, without the dust of floats."""
    return typed(limits, round(limits.low + round((value - limits.low) / limits.step) * limits.step, 10))


def steps_said(count):
    return f"{count} step" if count == 1 else f"{count} steps"
