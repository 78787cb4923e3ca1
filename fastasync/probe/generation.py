"""Estimator C: score candidate schedules by what the probe generates along them, and search the class.

One probe can sample along any schedule.  Its samples have a Frechet distance to the training set, in a frozen encoder's
features, with common random numbers: sample i starts from the same noise, with the same label, for every candidate.  It
counts discretisation and model error and needs no lam and no beta.  The candidate with the least
``log distance + energy x KE`` wins (KE: kinetic energy, 1 for the synchronous schedule): of schedules that the probe
can hardly tell apart, the gentlest.  A probe is far from trained when it judges, and prefers longer leads than longer
training rewards (bench/NOTES.md, 2026-11-26).

What leads is the clock of every candidate: straight, so that only what lags is bent.  A path can be run through at any
speed, and with a leader that runs ahead of its own clock the probe liked what trained networks did not reward.  B's
schedules bend both, and are no candidates of C.

Estimator D takes the same candidates and needs no samples: the least ``log L + loss_energy x KE``, L the corrected loss
along the candidate on the probe's loss surface.  The log leaves L's scale out, which differs from data to data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastasync.data import Latents
from fastasync.densities import Density
from fastasync.errors import UserError
from fastasync.evaluation.frechet import GaussianStatistics, StatisticsAccumulator, frechet_distance, frechet_influence
from fastasync.probe.budget import Budget
from fastasync.probe.surface import Errors, line_loss
from fastasync.schedule import (
    ConvexSchedule,
    OffsetSchedule,
    PowerSchedule,
    Schedule,
    cascade,
    kinetic_energy,
    offset,
    synchronous,
)

MIN_SAMPLES = 192  # of the first round, per candidate: on digits fewer no longer rank as 800 do
MAX_SAMPLES = 10_000  # of the last round: more would not change the choice
MIN_CANDIDATES = 4
REFINE_SHARE = 0.25  # of the samples, for the local refinement
LEAST_SAMPLES = math.ceil(1.5 * MIN_CANDIDATES * MIN_SAMPLES / (1 - REFINE_SHARE))  # that a search can do with
REFERENCE_SAMPLES = 10_000
_TINY = 1e-12  # a distance below this is its rounding


def gaussian_statistics(features: Tensor) -> GaussianStatistics:
    """Mean and covariance of features [N, D]."""
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    return accumulator.statistics()


class Selection(NamedTuple):
    """What C's scoring costs, FLOPs: of one sample, and of the reference once."""

    sample: float = 0.0
    reference: float = 0.0


FREE = Selection()


@dataclass(frozen=True)
class Scorer:
    """How samples are scored.

    Args:
        features: normalised latents [N, C, H, W] -> features [N, D] of a frozen encoder (not the one that reports).
        reference: statistics of the training set's features.
        cost: FLOPs of ``features``, counted against the budget.
    """

    features: Callable[[Tensor], Tensor]
    reference: GaussianStatistics
    cost: Selection = FREE

    @classmethod
    def of(cls, features: Callable[[Tensor], Tensor], latents: Latents, flops: float = 0.0, batch: int = 500) -> Scorer:
        """The reference from the latents themselves: all of them, or 10,000 spread evenly over the set.

        Evenly, so that a set which is sorted by class is represented with all its classes.  ``flops``: of one sample.
        """
        count = min(len(latents), REFERENCE_SAMPLES)
        spread = torch.arange(count) * len(latents) // count
        parts = [features(latents.batch(part)[0]).double().cpu() for part in spread.split(batch)]
        return cls(features, gaussian_statistics(torch.cat(parts)), Selection(flops, count * flops))


def _signed(value: float) -> float:
    """A coordinate on the line -> PowerSchedule's exponent: 0 is straight, positive lags, negative leads."""
    return 1 + value if value >= 0 else value - 1


def _coordinate(exponent: float) -> float:
    return exponent - 1 if exponent > 0 else exponent + 1


def power_family(
    names: Sequence[str], roles: Sequence[str], strengths: Sequence[float], floor: float
) -> list[Schedule]:
    """Power schedules: what lags goes as ``s^(1 + strength)``, what leads is straight, ``free`` may do either, or the
    mirror image of what lags.
    """
    family: list[Schedule] = []
    for strength in strengths:
        options = {"lags": (strength,), "leads": (0.0,), "free": (strength, 0.0, -strength)}
        for coordinates in itertools.product(*(options[role] for role in roles)):
            # all in one direction is a change of speed, not of path
            if len(set(coordinates)) > 1:
                family.append(PowerSchedule(names, [_signed(value) for value in coordinates], floor))
    return family


def candidate_family(names: Sequence[str], roles: Sequence[str]) -> dict[str, Schedule]:
    """The candidates, most informative first (a small budget drops the last): synchronous always, then one of each
    kind (an offset, power curves), then the rest.  Of one representation: synchronous alone."""
    family: dict[str, Schedule] = {"synchronous": synchronous(names)}

    def add_power(strengths: Sequence[float], floor: float) -> None:
        for schedule in power_family(names, roles, strengths, floor):
            family.setdefault(label(schedule), schedule)

    def add_offsets(*deltas: float) -> None:
        if len(set(roles)) > 1:
            family.update({f"offset {delta:g}": offset(names, delta, roles) for delta in deltas})

    if len(names) == 1:
        return family
    add_offsets(0.3)
    add_power((2.0,), 0.1)
    add_offsets(0.6)
    add_power((1.0,), 0.1)
    add_offsets(0.15, 0.45, 0.8)
    add_power((0.5, 4.0), 0.1)
    add_power((1.0, 2.0), 0.3)
    family["cascade"] = cascade(names, roles)
    return family


def label(schedule: Schedule) -> str:
    """A short name of a candidate for tables."""
    if isinstance(schedule, PowerSchedule):
        return f"power {'/'.join(f'{p:.3g}' for p in schedule.exponents)} floor {schedule.floor:.3g}"
    if isinstance(schedule, OffsetSchedule):
        return f"offset {'/'.join(f'{o:.3g}' for o in schedule.offsets)}"
    return f"{schedule.kind} {schedule.fingerprint[:6]}"


def neighbours(schedule: Schedule, roles: Sequence[str], step: float) -> list[Schedule]:
    """Schedules near one, for the local refinement; ``step`` (1, then smaller) scales the distance."""
    names = schedule.names
    near: list[Schedule] = []
    if isinstance(schedule, PowerSchedule):
        start = [_coordinate(p) for p in schedule.exponents]
        for k, role in enumerate(roles):
            if role == "leads":
                continue
            low = 0.0 if role == "lags" else -math.inf
            for change in (-step, step):
                moved = list(start)
                moved[k] = max(start[k] + change * max(0.5, abs(start[k]) / 2), low)
                near.append(PowerSchedule(names, [_signed(value) for value in moved], schedule.floor))
        for change in (-0.1 * step, 0.1 * step):
            floor = min(max(schedule.floor + change, 0.02), 0.9)
            near.append(PowerSchedule(names, schedule.exponents, floor))
    elif isinstance(schedule, OffsetSchedule):
        for k in range(len(names)):
            for change in (-0.1 * step, 0.1 * step):
                moved = list(schedule.offsets)
                moved[k] = max(moved[k] + change, 0.0)
                near.append(OffsetSchedule(names, [value - min(moved) for value in moved]))
    elif isinstance(schedule, ConvexSchedule):
        weights = schedule.weights().detach()
        straight = torch.zeros_like(weights)
        straight[:, 0] = 1.0
        for change in (-0.2 * step, 0.2 * step):  # towards the straight line, and away from it
            moved_weights = ((1 - change) * weights + change * straight).clamp(min=1e-4)
            logits = (moved_weights / moved_weights.sum(1, keepdim=True)).log()
            near.append(ConvexSchedule(names, schedule.roles, logits, schedule.knots, schedule.floor))
    return [other for other in near if other.to_json() != schedule.to_json()]


class Rounds(NamedTuple):
    """Successive halving: ``rounds[r] = (candidates, samples)``; ``total``: samples generated in all."""

    rounds: list[tuple[int, int]]
    total: int


def plan_rounds(candidates: int, samples: int) -> Rounds | None:
    """All candidates at n samples, the better half at 2 n, ... the last two; earlier samples are kept.

    ``samples``: how many may be generated in all.  None when not even MIN_SAMPLES per candidate fit.
    """
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    first = samples
    while first >= MIN_SAMPLES:
        counts = [min(first * 2**r, MAX_SAMPLES) for r in range(len(sizes))]
        new = [after - before for before, after in zip([0, *counts], counts)]
        total = sum(size * extra for size, extra in zip(sizes, new))
        if total <= samples:
            return Rounds(list(zip(sizes, counts)), total)
        first = min(first - 1, int(first * samples / total))
    return None


def gentle_score(distance: float, kinetic: float, energy: float) -> float:
    """``log distance + energy x KE``, the less the better, of a candidate of kinetic energy ``kinetic``."""
    return math.log(max(distance, _TINY)) + energy * kinetic


@torch.no_grad()
def rank_by_loss(
    candidates: dict[str, Schedule], errors: Errors, density: Density, lam: Sequence[float], energy: float
) -> list[dict[str, Any]]:
    """D's table, the best first: of each candidate its loss on the surface ``errors``, KE and ``gentle_score``.

    A candidate whose loss is not positive is left out: a fit to few errors may dip below 0, which nothing else is.
    Raises UserError where none is left.
    """
    rows = []
    for name, schedule in candidates.items():
        loss, kinetic = float(line_loss(errors, schedule, density, lam)), float(kinetic_energy(schedule))
        if not loss > 0:
            continue
        rows.append(
            {
                "label": name,
                "loss": loss,
                "score": gentle_score(loss, kinetic, energy),
                "lead": schedule.lead(),
                "kinetic_energy": kinetic,
                "schedule": schedule.to_json(),
            }
        )
    if not rows:
        remedy = "leaves too few errors (the fitted loss is negative along every candidate): raise it"
        raise UserError("probe.budget", None, remedy)
    return sorted(rows, key=lambda row: row["score"])


@dataclass
class _Candidate:
    label: str
    schedule: Schedule
    features: list[Tensor] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(part) for part in self.features)

    @cached_property
    def kinetic(self) -> float:
        with torch.no_grad():
            return float(kinetic_energy(self.schedule))

    @property
    def distance(self) -> float:
        return self.history[-1]["distance"]

    @property
    def score(self) -> float:
        return self.history[-1]["score"]


class GenerationResult(NamedTuple):
    """The chosen schedule and its label; one row per candidate (score after each round); ``noise``: standard deviation
    of the difference in distance between the last round's winner and runner-up (to the first order, pair by pair)."""

    schedule: Schedule
    label: str
    rows: list[dict[str, Any]]
    noise: float


def difference_noise(first: Tensor, second: Tensor, reference: GaussianStatistics) -> float:
    """Standard error of the difference of two candidates' distances, features [N, D] of the same samples."""
    difference = frechet_influence(first, reference) - frechet_influence(second, reference)
    return float(difference.std()) / math.sqrt(len(difference))


def search(
    candidates: dict[str, Schedule],
    roles: Sequence[str],
    generate: Callable[[Schedule, Tensor], Tensor],
    scorer: Scorer,
    *,
    sample_flops: float,
    budget: Budget,
    allowance: float,
    energy: float = 0.0,
    progress: bool = True,
) -> GenerationResult:
    """Successive halving over ``candidates``, then a local refinement around the winner.

    Args:
        generate: (schedule, sample indices int64 [B]) -> latents [B, C, H, W]; must depend on nothing else.
        sample_flops: FLOPs of generating one sample; the scorer's come on top.
        allowance: FLOPs of ``budget`` that may be spent here.
        energy: weight of the kinetic energy in the score (``gentle_score``); 0: the distance alone decides.

    Raises:
        UserError: the allowance is too small for even four candidates (names ``probe.budget``).
    """
    each = sample_flops + scorer.cost.sample
    affordable = max(int((allowance - scorer.cost.reference) / each), 0)
    halving = int(affordable * (1 - REFINE_SHARE))
    pool = list(candidates.items())
    plan = plan_rounds(len(pool), halving)
    while plan is None and len(pool) > MIN_CANDIDATES:
        pool.pop()  # the least informative
        plan = plan_rounds(len(pool), halving)
    if plan is None:
        raise UserError(
            "probe.budget",
            None,
            f"leaves {affordable} samples to compare schedules with, {LEAST_SAMPLES} are needed: multiply it by "
            f"{1.1 * LEAST_SAMPLES / max(affordable, 1):.2g}, lower probe.train_share, or set probe.estimator to D",
        )
    if scorer.cost.reference:
        budget.spend("reference", scorer.cost.reference)
    with tqdm(total=affordable, desc="schedules", unit="img", disable=not progress) as bar:

        def extend(candidate: _Candidate, count: int) -> None:
            if count > candidate.count:
                budget.spend("sampling", (count - candidate.count) * sample_flops)
                if scorer.cost.sample:
                    budget.spend("scoring", (count - candidate.count) * scorer.cost.sample)
                latents = generate(candidate.schedule, torch.arange(candidate.count, count))
                bar.update(len(latents))
                candidate.features.append(scorer.features(latents).detach().double().cpu())
            distance = frechet_distance(gaussian_statistics(torch.cat(candidate.features)), scorer.reference)
            score = gentle_score(distance, candidate.kinetic, energy)
            candidate.history.append({"samples": candidate.count, "distance": distance, "score": score})
            bar.set_postfix(distance=f"{distance:.3f}", refresh=False)

        everyone = [_Candidate(name, schedule) for name, schedule in pool]
        alive = everyone
        for size, count in plan.rounds:
            alive = sorted(alive, key=lambda c: c.score if c.history else 0.0)[:size]
            for candidate in alive:
                extend(candidate, count)
        alive = sorted(alive, key=lambda c: c.score)
        winner, count = alive[0], plan.rounds[-1][1]

        def noise_against(other: _Candidate) -> float:
            return difference_noise(torch.cat(winner.features), torch.cat(other.features), scorer.reference)

        noise = noise_against(alive[1]) if len(alive) > 1 else 0.0

        # local refinement: a step in each coordinate at the last round's sample count, halved when nothing improves
        left, step, seen = affordable - plan.total, 1.0, {c.schedule.fingerprint for c in everyone}
        while left >= count and step > 0.2:
            improved = False
            for schedule in neighbours(winner.schedule, roles, step):
                if left < count:
                    break
                if schedule.fingerprint in seen:
                    continue
                seen.add(schedule.fingerprint)
                trial = _Candidate(label(schedule), schedule)
                everyone.append(trial)
                left -= count
                extend(trial, count)
                gain, least = winner.score - trial.score, max(winner.distance, _TINY)
                if gain > 0 and gain > noise_against(trial) / least:  # a luckier draw is not a better schedule
                    winner, improved = trial, True
                    break
            if not improved:
                step /= 2
    rows = [
        {
            "label": c.label,
            "samples": c.count,
            "distance": c.distance,
            "score": c.score,
            "history": c.history,
            "lead": c.schedule.lead(),
            "kinetic_energy": c.kinetic,
            "schedule": c.schedule.to_json(),
        }
        for c in sorted(everyone, key=lambda c: (-c.count, c.score))
    ]
    return GenerationResult(winner.schedule, winner.label, rows, noise)
