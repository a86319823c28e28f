"""Whether a generator copied the tiles it was trained on, and whether what it made may leave the house.

Works on distances to the nearest training tile, the least over the 8 flips and turns, in two spaces at least: one that sees content and
one that sees pixels. What counts as near is taken from held-out real tiles of other cases, checked on a second half of them, and the
detector has to find planted copies before it may say that there are none. Never "private": "no copies found by this detector at this
sensitivity". Dar et al. (2025), doi 10.1038/s41551-025-01468-8, found most samples of medical diffusion models to be copies; Somepalli
et al. (2023), arXiv:2212.03860, compare with training tiles among themselves as here. Arrays in, numbers out; `screening` measures.
"""

from dataclasses import dataclass

import numpy as np

from histokit.metrics import distributions, stats

VERSION = 3
FALSE_ALARMS = 0.05  # share of held-out real tiles that the cut calls copies
STRICT = 0.01  # the same for the planted controls, which must be found with hardly a false alarm
FOUND = 0.95  # share of each kind of planted copy that a fit detector finds
ENOUGH = 20  # held-out tiles of a class below which nothing is calibrated on it
TOO_FEW = f"fewer than {ENOUGH} held-out tiles of two cases"
EXCESS = 0.05  # the excess copy rate, by the upper end of its interval, that still passes


@dataclass(frozen=True)
class Detector:
    """A cut on the distance in one space, and what it does to real tiles and planted copies."""

    space: str
    cut: float  # below it a tile counts as a copy
    strict: float  # the same at one false alarm in a hundred
    real_rate: float  # share of a second half of the held-out tiles below the cut; about 0.05 where the cut holds
    strict_rate: float  # the same below the strict cut
    real_tiles: int
    real_cases: int
    found: dict  # kind of planted copy -> share below the strict cut

    def fit(self, kind):
        return self.found.get(kind, 0.0) >= FOUND


def calibrate(space, held_out, cases, planted, seed=0):
    """The Detector of one space.

    Args:
        held_out: [H] distance of held-out real tiles to the nearest training tile; none may share a case with those.
        cases: [H] case of each.
        planted: {kind: [P] distance of planted copies of training tiles}: exact, flip, crop, JPEG ...

    Raises:
        set_metrics.TooSmall: fewer than 20 held-out tiles, or all of one case.
    """
    held_out, cases = np.asarray(held_out, float), np.asarray(cases)
    if len(held_out) < ENOUGH or len(set(cases)) < 2:
        raise distributions.TooSmall(
            f"n too small to say: {len(held_out)} held-out tiles of {len(set(cases))} cases; a copy detector cannot be calibrated below "
            f"{ENOUGH} tiles of two cases"
        )
    [(first, second)] = distributions.halves(cases, repeats=1, seed=seed)
    cut, strict = (float(np.quantile(held_out[first], share, method="lower")) for share in (FALSE_ALARMS, STRICT))
    rate, strict_rate = (float((held_out[second] < limit).mean()) for limit in (cut, strict))
    found = {kind: float((np.asarray(distance) < strict).mean()) for kind, distance in planted.items()}
    return Detector(space, cut, strict, rate, strict_rate, len(second), len(set(cases[second])), found)


def unfit(detectors):
    """Kinds of planted copies that no detector finds; while there are any, "no copies" may not be said."""
    kinds = dict.fromkeys(kind for detector in detectors for kind in detector.found)
    return [kind for kind in kinds if not any(detector.fit(kind) for detector in detectors)]


def excess(copied, tiles, real_rate, real_tiles, level=0.95):
    """Copy rate of synthetic tiles minus that of held-out real ones, and its interval; Newcombe (1998), method 10.

    Args:
        copied, tiles: synthetic tiles below the cut, and all.
        real_rate, real_tiles: of a Detector; give its cases for tiles where tiles of a case are alike, and the interval stays honest.
    """
    one, other = copied / tiles, real_rate
    low, high = stats.wilson(copied, tiles, level)
    real_low, real_high = stats.wilson(round(real_rate * real_tiles), real_tiles, level)
    difference = one - other
    down, up = np.hypot(one - low, max(real_high - other, 0)), np.hypot(high - one, max(other - real_low, 0))
    return difference, max(-1.0, difference - down), min(1.0, difference + up)


def copied_from(distance, nearest, cut, training):
    """How copies spread over the training tiles: (share of training tiles with a copy, most copied row or -1, its copies).

    Args:
        distance: [M] of each synthetic tile to its nearest training tile; nearest: [M] row of that tile.
        training: number of training tiles.
    """
    sources = np.asarray(nearest)[np.asarray(distance) < cut]
    if not len(sources):
        return 0.0, -1, 0
    counts = np.bincount(sources, minlength=training)
    return float((counts > 0).mean()), int(counts.argmax()), int(counts.max())


def ratio(distance, neighbours):
    """Distance to the nearest training tile over the mean distance to the 50 nearest real tiles of any case; small means a copy.

    For classes with too few held-out tiles to calibrate on: a dense class is not called copied because its tiles are alike.

    Args:
        distance: [M]. neighbours: [M, K] distances to real tiles, the nearest K = 50 or as many as there are; NaN where there are fewer.

    Returns:
        [M], about 1 or more for a new tile, 0 for a copy; infinite for a tile without neighbours.
    """
    neighbours = np.asarray(neighbours, float)
    known = np.isfinite(neighbours)
    around = np.divide(np.where(known, neighbours, 0).sum(1), known.sum(1), out=np.full(len(known), np.nan), where=known.any(1))
    return np.divide(distance, around, out=np.where(known.any(1), 1.0, np.inf), where=around > 0)


@dataclass(frozen=True)
class Gate:
    """Whether the synthetic tiles of a class may be exported: pass, blocked or uncalibrated, and why."""

    state: str
    reasons: list


def certain(real, copied):
    """The distance below which a pair is no coincidence: nearer than any two real tiles of different cases, and as near as copies are.

    The first alone would block honest generators: of 400 honest synthetic and 40 real tiles the nearest is synthetic ten times in eleven.

    Args:
        real: distances between real tiles of different cases; NaN where a tile has none.
        copied: distances of planted copies to their originals.
    """
    real, copied = np.asarray(real, float), np.asarray(copied, float)
    ends = [*real[np.isfinite(real)], *(np.quantile(copied, [FOUND]) if len(copied) else [])]
    return float(min(ends, default=0.0))


def gate(detectors, bounds, closest, limit, pooled=False):
    """The Gate of one class: blocked where copies are shown, uncalibrated where they cannot be ruled out, else pass.

    Args:
        detectors: of every space; empty where none could be calibrated.
        bounds: (low, high) of the excess copy rate at the strict cut in each of their spaces; at the other cut a few hundred honest
            tiles could not pass.
        closest: {space: least distance of a synthetic tile to a training tile}.
        limit: {space: `certain`}.
        pooled: the detectors were calibrated on tiles of other classes, by the `ratio`: they can show copies and rule out none.
    """
    shown = [
        f"a pair in {space} is as near as copies are, and as no two real tiles of different cases"
        for space in closest
        if closest[space] < limit[space]
    ]
    unsure = [] if detectors and not pooled else [TOO_FEW]
    unsure += [f"detector not fit: planted copies by {kind} are not found" for kind in unfit(detectors)]
    for detector, (low, high) in zip(detectors, bounds, strict=True):
        rates = f"more copies in {detector.space} than among real tiles"
        if low > 0:
            shown.append(f"{100 * low:.1f} to {100 * high:.1f} points {rates}")
        elif high > EXCESS:
            n = f"{detector.real_tiles} held-out tiles to compare with"
            unsure.append(f"up to {100 * high:.1f} points {rates} cannot be ruled out with {n}; {100 * EXCESS:.0f} pass")
    return Gate("blocked", shown + unsure) if shown else Gate("uncalibrated", unsure) if unsure else Gate("pass", [])
