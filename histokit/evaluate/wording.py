"""What a difference between two arms lets us say, in words.

One dataclass holds the numbers, `outcome` decides, the functions below word it; the same words stand in the notebook, in
results.json and on the terminal. "Helps" is reserved for a gain over several draws of the rare tiles, several generator seeds and
every arm without synthetic tiles. An interval that holds zero is no evidence, which is not evidence of no effect.
"""

from dataclasses import dataclass, field

import numpy as np

from histokit.metrics.stats import MIN_CASES, MIN_SEEDS

VERSION = 3
MIN_DRAWS, MIN_GENERATORS = 3, 2  # leaving out a draw effect of 3 points drops 95 % coverage to 64 % (simulated)
MARGIN = 0.01  # head balanced accuracy may fall by one point before it counts as a cost


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One endpoint of one arm against another, on the same test tiles; shares in [0, 1], higher is better."""

    endpoint: str  # a class, or a figure over several
    arm: str
    baseline: str
    classes: list  # names the figure is a mean over
    left_out: dict = field(default_factory=dict)  # class -> why it is not among them
    value: float  # mean over seeds
    base: float
    low: float  # ends of the interval of value - base; NaN without one
    high: float
    tiles: int
    cases: int
    seeds: int  # classifier seeds
    found: list  # tiles found, per run: a draw, a generator seed and a classifier seed
    base_found: list
    smallest: int = MIN_CASES  # test cases of the class with the fewest
    weakest: str = ""  # that class
    p: float = np.nan  # sign flips over cases
    same: bool = False  # both arms gave the same answer on every one of these tiles

    @property
    def difference(self):
        return self.value - self.base

    @property
    def outcome(self):
        """more | fewer | none | few cases | few seeds | absent; decided on what is printed, to a tenth of a point."""
        if not self.tiles:
            return "absent"
        if min(self.cases, self.smallest) < MIN_CASES:
            return "few cases"
        if self.seeds < MIN_SEEDS:
            return "few seeds"
        if np.isnan(self.low) or np.isnan(self.high):
            return "few cases"
        return "more" if _tenths(self.low) > 0 else "fewer" if _tenths(self.high) < 0 else "none"


READING = {
    "more": "found more often",
    "fewer": "found less often",
    "none": "no evidence",
    "few cases": "too few cases",
    "few seeds": "too few seeds",
    "absent": "no test tile",
}


def percent(share):
    return "unknown" if np.isnan(share) else f"{100 * share:.1f} %"


def points(difference, low=np.nan, high=np.nan):
    """A gap in points of a hundred: `+3.1 points [-2.0 to +8.2]`, or `+3.1 points` without the ends."""
    ends = "" if np.isnan(low) or np.isnan(high) else f" [{_tenths(low):+.1f} to {_tenths(high):+.1f}]"
    return f"{_tenths(difference):+.1f} points{ends}".replace("+0.0", "0.0")


def counts(found, tiles):
    """How many were found: `5 of 14`, or where runs differ `5.2 of 14 (4 to 7 over 6 runs)`."""
    if min(found) == max(found):
        return f"{found[0]:.0f} of {tiles}"
    return f"{np.mean(found):.1f} of {tiles} ({min(found):.0f} to {max(found):.0f} over {len(found)} runs)"


def scope(draws=1, generators=1):
    """For what the result was seen; `generators` is 0 where no synthetic tile is involved."""
    if not generators:
        return "for this one draw" if draws == 1 else f"over {draws} draws"
    if draws == generators == 1:
        return "for this one draw and generator"
    if draws >= MIN_DRAWS and generators >= MIN_GENERATORS:
        return f"over {draws} draws and {generators} generator seeds"
    one = "this one draw" if draws == 1 else f"these {draws} draws"
    return f"for {one} and " + ("one generator" if generators == 1 else f"{generators} generator seeds")


def line(d):
    """One endpoint in one line: `Polyp: augmented 61.0 %, real 58.0 %, +3.0 points [...] (...): no evidence`."""
    if d.outcome == "absent":
        return f"{d.endpoint}: no test tile, so it cannot be evaluated"
    if d.outcome == "few cases":
        return f"{d.endpoint}: {_found(d)} ({_n(d)}): {'too few cases for an interval' if d.cases < MIN_CASES else _few_cases(d)}"
    reached = f"{d.endpoint}: {d.arm} {percent(d.value)}, {d.baseline} {percent(d.base)}, {points(d.difference, d.low, d.high)} ({_n(d)})"
    return f"{reached}: {reading(d)}"


def reading(d):
    """The outcome in two or three words, for a table."""
    of_tiles = d.endpoint != "macro-F1"  # which nobody finds
    return READING[d.outcome] if of_tiles else {"more": "higher", "fewer": "lower"}.get(d.outcome, READING[d.outcome])


def sentence(tail, head, rivals=(), *, rare=True, draws=1, generators=1, demo=False, has_cases=True, lacking=(), leaked=""):
    """The verdict in one sentence.

    Args:
        tail: Difference of the judged arm and the baseline on the rare classes.
        head: the same on the common classes.
        rivals: Differences of the judged arm and every other arm without synthetic tiles, on the rare classes.
        rare: False where the dataset has no rare class.
        draws: draws of the rare tiles inside the interval; `generators`: generator seeds inside it, 0 where nothing was generated.
        demo: True stamps the sentence.
        has_cases: False where tiles have no case ids.
        lacking: rare classes of which the judged arm has no synthetic tile.
        leaked: of `leaked`.
    """
    rival = max(rivals, key=lambda r: r.base, default=None)
    if rival and not rival.base > tail.base:
        rival = None  # the baseline is the best of the arms without synthetic tiles
    parts = [_lead(tail, rival, rare, draws, generators, has_cases)]
    if rare and tail.outcome != "absent":
        parts += [_rival(tail.outcome, rival), _left_out(tail), _lacking(tail.arm, lacking)]
    parts += [_head(head), _left_out(head) if head.outcome != "absent" else "", leaked, "demo size, not evidence" if demo else ""]
    return "; ".join(part for part in parts if part) + "."


def _lead(tail, rival, rare, draws, generators, has_cases):
    where = scope(draws, generators)
    arm, base = tail.arm, tail.baseline
    if not rare:
        return "No class of this dataset is rare, so there is no verdict on rare classes"
    if tail.outcome == "absent":
        return "No verdict: the rare classes cannot be evaluated" + (f" ({_reasons(tail.left_out)})" if tail.left_out else "")
    numbers = _numbers(tail, has_cases)
    if tail.outcome == "more":
        beaten = rival is None or rival.outcome == "more"
        if draws >= MIN_DRAWS and generators >= MIN_GENERATORS and beaten:
            return f"{arm} helps: {where} it finds the rare classes more often than {base}: {numbers}"
        return f"{capital(where)}, {arm} finds the rare classes more often than {base}: {numbers}"
    if tail.outcome == "fewer":
        return f"{capital(where)}, {arm} hurts: it finds the rare classes less often than {base}: {numbers}"
    if tail.outcome == "none":
        same = "; both gave the same answer on every rare tile" if tail.same else ""
        return f"No evidence, {where}, that {arm} finds the rare classes more or less often than {base}: {numbers}{same}"
    few = "cases" if tail.outcome == "few cases" else "classifier seeds"
    return f"Too few {few} to say, {where}, whether {arm} finds the rare classes more often than {base}: {numbers}"


def _numbers(d, has_cases):
    if d.outcome == "few cases":
        return f"{_found(d)} ({_n(d, has_cases)}; {_few_cases(d)})"
    every = len(d.classes) + len(d.left_out)
    if len(d.classes) == 1:
        what = f"recall of {d.classes[0]}" + (f", one of the {every} rare classes," if every > 1 else "")
    else:
        what = f"balanced accuracy over {'the ' if not d.left_out else f'{len(d.classes)} of the '}{every} rare classes"
    reached = f"{what} {percent(d.value)} against {percent(d.base)}, {points(d.difference, d.low, d.high)}"
    if d.outcome == "few seeds":
        return f"{reached} ({_n(d, has_cases)}; no interval below {MIN_SEEDS} seeds, training again may turn it round)"
    unit = "95 % interval" if has_cases else "95 % interval that takes every tile for a case and so is too narrow"
    return f"{reached} ({unit}; {_n(d, has_cases)})"


def _rival(outcome, rival):
    """How the judged arm stands against the best of the other arms without synthetic tiles."""
    if rival is None or outcome == "fewer":
        return ""
    name, gap = rival.baseline, points(rival.difference, rival.low, rival.high)
    best = f"{name}, the best of the arms without synthetic tiles"
    if rival.outcome == "more":
        return f"more often {'also ' if outcome == 'more' else ''}than {best} ({gap})"
    if rival.outcome == "fewer":
        return f"{name}, without any synthetic tile, finds them more often ({rival.arm} minus {name} {gap})"
    if rival.outcome == "none":
        return f"not shown to beat {best} ({gap})" if outcome == "more" else f"no evidence either against {best} ({gap})"
    return f"{name}, without synthetic tiles, found {counts(rival.base_found, rival.tiles)}"


def _head(head):
    """What the common classes paid."""
    if head.outcome == "absent":
        return "no common class has a test tile, so the cost to them is unknown"
    gap = points(head.difference, head.low, head.high)
    if head.outcome in ("few cases", "few seeds"):
        few = f"{head.cases} cases" if head.cases < MIN_CASES else f"{head.seeds} classifier seed{'s' * (head.seeds != 1)}"
        weak = head.outcome == "few cases" and head.cases >= MIN_CASES
        return f"common classes {gap} ({_few_cases(head) if weak else f'{few}, no interval'})"
    if head.outcome == "more":
        return f"common classes found more often: {gap}"
    if _tenths(head.low) >= -100 * MARGIN:
        return f"common classes lose at most {100 * MARGIN:.0f} point: {gap}"
    if head.outcome == "fewer":
        return f"at a cost to the common classes: {gap}"
    return f"a cost of up to {-_tenths(head.low):.1f} points to the common classes is not excluded: {gap}"


def leaked(copies, tiles):
    """What pictures in two splits mean for a verdict on so many test tiles; "" where there is none. `copies`: `Dataset.copies`."""
    said = []
    if copies.get("test"):
        said.append(f"{copies['test']} of {tiles} test tiles are copies of training or validation tiles, so memory is rewarded")
    if copies.get("labels"):
        n = copies["labels"]
        said.append(f"{n} test tile{'s have' if n > 1 else ' has'} a copy with another label")
    return "; ".join(said)


def left_out_copies(copies):
    """A line about training tiles that 00 left out since the test, or the validation, has the same picture; [] without any."""
    n = copies.get("left_out", 0)
    return [f"{n} tile{'s' * (n != 1)} left out of training or validation: the test, or the validation, has the same picture"] if n else []


def _few_cases(d):
    """Why there is no interval: a mean is as sure as its weakest class, simulated in `stats.MIN_CASES`."""
    if d.cases < MIN_CASES or len(d.classes) == 1:
        return f"no interval below {MIN_CASES} cases"
    has = f"{d.smallest} test case{'s' * (d.smallest != 1)}"
    return f"no interval: {d.weakest or 'a class'} has {has}, and each class of a mean needs {MIN_CASES}"


def _left_out(d):
    return f"left out: {_reasons(d.left_out)}" if d.left_out else ""


def _reasons(left_out, most=4):
    named = [f"{name} ({why})" for name, why in list(left_out.items())[:most]]
    return ", ".join(named + ([f"and {len(left_out) - most} more"] if len(left_out) > most else []))


def _lacking(arm, classes):
    return f"{arm} has no synthetic tile of {' and '.join(classes)}" if classes else ""


def _found(d):
    return f"found {counts(d.found, d.tiles)} with {d.arm}, {counts(d.base_found, d.tiles)} with {d.baseline}"


def _n(d, has_cases=True):
    cases = f"{d.cases} case{'s' * (d.cases != 1)}" if has_cases else "no case ids"
    return f"{d.tiles} tile{'s' * (d.tiles != 1)}, {cases}, {d.seeds} classifier seed{'s' * (d.seeds != 1)}"


def _tenths(share):
    """Points to one decimal, the precision that is printed and therefore decided on; never -0.0."""
    return round(100 * share, 1) + 0.0


def capital(text):
    return text[0].upper() + text[1:]
