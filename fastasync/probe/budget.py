"""The probe's FLOP ledger: everything that learning a schedule costs, counted against a share of the planned run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastasync.config import Probe
from fastasync.errors import UserError

MIN_STEPS = 20  # fewer steps do not train a probe


class BudgetExceeded(RuntimeError):
    """Spending went past the limit: a planning error, never a user's."""


class Budget:
    """Counts FLOPs by purpose and refuses to pass ``limit`` (FLOPs).  ``label`` says what the limit is."""

    def __init__(self, limit: float, label: str):
        self.limit, self.label = float(limit), label
        self.flops: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @property
    def spent(self) -> float:
        return sum(self.flops.values())

    @property
    def left(self) -> float:
        return self.limit - self.spent

    def spend(self, what: str, flops: float) -> None:
        """Count ``flops`` for ``what``, before they are used.  Raises BudgetExceeded when they do not fit."""
        if flops > self.left * (1 + 1e-12):
            raise BudgetExceeded(
                f"{what} needs {flops:.3g} FLOPs; {self.left:.3g} of {self.limit:.3g} are left ({self.label})"
            )
        self.flops[what] = self.flops.get(what, 0.0) + flops

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the wall time of the block to ``what``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def to_json(self) -> dict[str, Any]:
        """The breakdown for the report; ``share_used`` is of the limit."""
        return {
            "label": self.label,
            "limit_flops": self.limit,
            "spent_flops": self.spent,
            "share_used": self.spent / self.limit,
            "flops": dict(self.flops),
            "seconds": {what: round(seconds, 3) for what, seconds in self.seconds.items()},
            "total_seconds": round(sum(self.seconds.values()), 3),
        }


class Plan(NamedTuple):
    """How the budget is divided.  ``steps`` of the probe's training, then FLOPs to fit the surface and to sample."""

    steps: int
    fit_flops: float
    sample_flops: float


FIT_SHARE = 0.1  # of what C has left after training: its surface only supplies candidates
JOINT_WARMUP = 0.2  # of A's steps train the network only: an untrained one has no gradient to give
JOINT_STEP = 2.0 - JOINT_WARMUP  # cost of one of A's steps, in steps of the network


def plan_probe(probe: Probe, forward_flops: float, planned_flops: float, least_rest: float = 0.0) -> Plan:
    """Divide ``probe.budget * planned_flops`` for a probe network of ``forward_flops`` per image.

    A training step costs three forward passes per image (the backward pass counts twice).  ``least_rest``: FLOPs that
    must be left after training (for B's and D's errors, C's samples).  Raises UserError that names ``probe.budget`` and
    the value that would do, when it pays for fewer than 20 steps or leaves less than that.
    """
    limit = probe.budget * planned_flops
    # A spends everything on training: a step of the network, and after the warm-up one of the schedule
    share = 1.0 if probe.estimator == "A" else probe.train_share
    step = 3 * forward_flops * probe.batch * (JOINT_STEP if probe.estimator == "A" else 1.0)
    steps = int(share * limit / step)
    rest = limit - steps * step
    if steps < MIN_STEPS or rest < least_rest:
        if share <= 0 or (share >= 1 and least_rest):
            remedy = "leaves nothing for a part of the probe's work: give a number between 0 and 1, like 0.7"
            raise UserError("probe.train_share", probe.train_share, remedy)
        needed = 1.01 * MIN_STEPS * step / (share * planned_flops)
        if least_rest:
            needed = max(needed, 1.01 * least_rest / ((1 - share) * planned_flops))
        problem = f"pays for {steps} steps of the probe, at least {MIN_STEPS} are needed"
        if steps >= MIN_STEPS:
            work = "compare schedules by their samples" if probe.estimator == "C" else "fit a loss surface"
            problem = f"leaves {rest / least_rest:.0%} of what it takes to {work}"
        remedy = "make the probe smaller (probe.depth, probe.width, probe.batch)"
        if steps >= MIN_STEPS:
            if probe.estimator == "C" and least_rest:
                remedy += ", or set probe.estimator to D"
            remedy = f"lower probe.train_share, or {remedy}"
        if needed <= 1:
            remedy = f"set probe.budget to {needed:.3g}, or {remedy}"
        raise UserError("probe.budget", f"{probe.budget:g}", f"{problem}: {remedy}")
    if probe.estimator == "C":
        return Plan(steps, FIT_SHARE * rest, (1 - FIT_SHARE) * rest)
    return Plan(steps, 0.0 if probe.estimator == "A" else rest, 0.0)
