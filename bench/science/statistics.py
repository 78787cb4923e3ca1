"""The study's arithmetic: mean and spread over seeds, differences paired by seed, rank correlation, steps to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

TARGET = 0.10  # of the best fixed schedule's FID: what the project aims at (PROTOCOL.md, "What counts")


class Summary(NamedTuple):
    """Mean, standard deviation over seeds (n - 1; 0 for one), range, and number of seeds."""

    mean: float
    deviation: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}" if self.seeds > 1 else f"{self.mean:.3f}"


def summary(values: Sequence[float]) -> Summary:
    """The summary of at least one value."""
    array = np.asarray(values, dtype=float)
    if not array.size:
        raise ValueError("a summary needs at least one value")
    deviation = float(array.std(ddof=1)) if array.size > 1 else 0.0
    return Summary(float(array.mean()), deviation, float(array.min()), float(array.max()), array.size)


class Paired(NamedTuple):
    """``ours`` against ``theirs`` over the seeds that both have.

    ``change``: relative differences (ours - theirs) / theirs, one for each seed, negative is better.  ``separated``:
    even our worst seed is better than their best (at least two seeds).
    """

    change: Summary
    better: int
    separated: bool

    @property
    def verdict(self) -> str:
        """In the words that PROTOCOL.md fixes."""
        if self.change.seeds < 2:
            return "one seed: no verdict"
        error = self.change.deviation / math.sqrt(self.change.seeds)
        clear = abs(self.change.mean) > 2 * error
        if clear and self.better == self.change.seeds:
            if self.separated and self.change.mean <= -TARGET and self.change.seeds >= 3:
                return "wins"
            return "better"
        if clear and self.better == 0 and self.change.mean > 0:
            return "worse"
        return "no difference shown"

    def __str__(self) -> str:
        spread = f" ± {100 * self.change.deviation:.1f}" if self.change.seeds > 1 else ""
        return f"{100 * self.change.mean:+.1f}{spread} %, {self.better} of {self.change.seeds} seeds better"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """Differences by seed of two sets of figures {seed: value}, lower is better; None without a common seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    change = [(ours[seed] - theirs[seed]) / theirs[seed] for seed in seeds]
    separated = len(seeds) > 1 and max(ours[seed] for seed in seeds) < min(theirs[seed] for seed in seeds)
    return Paired(summary(change), sum(value < 0 for value in change), separated)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN for fewer than three pairs or a constant."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: give pairs")
    if len(first) < 3:
        return math.nan
    ranks = [_ranks(values) for values in (first, second)]
    spread = [values.std() for values in ranks]
    if min(spread) == 0:
        return math.nan
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1]))


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def steps_to_reach(steps: Sequence[int], values: Sequence[float], goal: float) -> float | None:
    """The first training step at which a curve is at most ``goal``: straight lines in log step and log value.

    None when it never gets there.  The first point counts as reached at its own step, not before.
    """
    for index, (step, value) in enumerate(zip(steps, values)):
        if value > goal:
            continue
        if index == 0:
            return float(step)
        before, above = steps[index - 1], values[index - 1]
        share = 1.0 if value <= 0 or goal <= 0 else math.log(above / goal) / math.log(above / value)
        return float(before * (step / before) ** share)
    return None
