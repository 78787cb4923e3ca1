"""What can be run: one line of training (Spec), its points, and the two studies (CIFAR-10 and its CPU miniature)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from fastasync.config import Config, apply_settings
from fastasync.errors import unknown_name
from fastasync.presets import preset
from fastasync.sampling import evaluations
from fastasync.schedule import Schedule, TableSchedule
from fastasync.schedule.convex import KNOTS, ConvexSchedule

LEARNED = ("A", "B", "C", "D")
BEST_FIXED = "best fixed"  # stands for what the scan finds, until it has
OBJECTIVES = {
    "corrected": ("objective.mode=corrected", "objective.proposal=mixture"),
    "corrected, uniform s": ("objective.mode=corrected", "objective.proposal=uniform"),
    "uncorrected": ("objective.mode=naive",),
}
SAMPLE_SEED, PROBE_SEED = 1000, 2000  # added to a run's seed: selection and scoring never share noise
SCAN_SEED = 100  # the best fixed schedule is found on seeds from here on


@dataclass(frozen=True)
class Spec:
    """One network trained along one schedule.  ``probe``: the variant that learned it; ``start``: or "probe"."""

    schedule: str
    seed: int
    size: str = "base"
    objective: str = "corrected"
    representations: str = "pair"
    probe: str = "base"
    start: str = "scratch"

    @property
    def label(self) -> str:
        """What tables call it, without the seed."""
        usual = Spec(self.schedule, self.seed)
        parts = [self.schedule]
        parts += [getattr(self, f.name) for f in fields(Spec)[2:] if getattr(self, f.name) != getattr(usual, f.name)]
        return ", ".join("from the probe's weights" if part == "probe" else part for part in parts)

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}"


SPEC_FIELDS = tuple(f.name for f in fields(Spec))


@dataclass(frozen=True)
class Study:
    """One preset's study: everything that PROTOCOL.md fixes.

    Samplers are ``heun10`` (Heun, 10 function evaluations) or ``dopri5``; those of ``integrators`` (groups of about the
    same number of evaluations) also ``heun_euler9@0.12`` and ``heun10^1.5`` (see ``sampler``).  ``settings``
    change the preset; ``sizes``, ``probes`` and ``third`` change that.  ``rank_samples``: samples by which a probe
    ranks the fixed schedules.
    """

    preset: str
    settings: tuple[str, ...]
    steps: int
    headline: tuple[str, ...]
    curve: tuple[str, ...]
    fixed: tuple[str, ...]
    scan_seeds: int
    rank_samples: int
    sizes: dict[str, tuple[str, ...]]
    probes: dict[str, tuple[str, ...]]
    few_steps: tuple[int, ...]  # step counts that question 5 chooses schedules for
    third: tuple[str, ...]
    integrators: tuple[tuple[str, ...], ...]
    rules: tuple[str, ...] = LEARNED
    members: int = 0  # random members of the learned class that question 9 trains
    shapes: tuple[str, ...] = ()  # "lead:L@m" that it trains (``shaped_schedule``)
    longer: int = 4
    serves: int = 0  # steps of the run whose FLOPs the probe's budget is a share of; 0: ``steps``
    sample_batch: int = 2500

    @property
    def samplers(self) -> tuple[str, ...]:
        """All of them, by number of evaluations."""
        names = dict.fromkeys((*self.headline, *self.curve, *(name for group in self.integrators for name in group)))
        return tuple(sorted(names, key=lambda name: nfe(name) or 10**6))

    @property
    def milestones(self) -> tuple[int, ...]:
        """Training steps at which long runs are scored: half and three quarters of the budget, then its doublings."""
        early = [self.steps // 2, 3 * self.steps // 4]
        late = []
        step = self.steps
        while step <= self.longer * self.steps:
            late.append(step)
            step *= 2
        return (*early, *late)

    def config(self, spec: Spec, steps: int | None = None, every: int = 0) -> Config:
        """The configuration of a line of training up to ``steps`` with checkpoints kept at multiples of ``every``."""
        steps = steps or self.steps
        changes = [
            f"data.seed={spec.seed}",
            f"train.steps={steps}",
            f"train.checkpoint_every={steps}",
            f"train.milestone_every={every}",
            "train.keep_checkpoints=1",
            f"train.log_every={max(steps // 20, 1)}",
            f"sample.seed={SAMPLE_SEED + spec.seed}",
            f"sample.batch={self.sample_batch}",
        ]
        return apply_settings(self.common(spec.representations), [*self.sizes[spec.size], *changes, *_objective(spec)])

    def common(self, representations: str = "pair") -> Config:
        """What all runs on these representations share; its seed is that of the encoders."""
        third = self.third if representations == "triple" else ()
        return apply_settings(preset(self.preset), [*self.settings, *third, f"train.steps={self.steps}"])

    def probe_config(self, estimator: str, variant: str, seed: int, representations: str = "pair") -> Config:
        """The configuration that a probe learns with: it always serves the base network and budget."""
        if variant not in self.probes:
            raise unknown_name("probe", variant, self.probes)
        changes = (
            f"probe.estimator={estimator}",
            f"probe.seed={PROBE_SEED + seed}",
            f"train.steps={self.serves or self.steps}",
            *self.probes[variant],
        )
        return apply_settings(self.common(representations), changes)

    def with_settings(self, settings: tuple[str, ...]) -> Study:
        """The same with more changes to the preset."""
        return replace(self, settings=(*self.settings, *settings))


def _objective(spec: Spec) -> tuple[str, ...]:
    if spec.objective not in OBJECTIVES:
        raise unknown_name("objective", spec.objective, OBJECTIVES)
    return OBJECTIVES[spec.objective]


class Way(NamedTuple):
    """How samples are made: the method, intervals of time, the power of their grid, the last step's length."""

    method: str
    intervals: int
    power: float = 1.0
    last_step: float = 0.0


def sampler(name: str) -> Way:
    """``heun18`` -> heun, 9 intervals; ``heun_euler17^1.5`` -> 9 intervals on a grid of power 1.5; ``dopri5``.

    ``heun_euler17@0.12``: the last step takes 0.12 of local time (``sample.last_step``).
    """
    if name == "dopri5":
        return Way(name, 1)
    found = re.fullmatch(r"(heun|heun_euler)(\d+)(?:\^([\d.]+))?(?:@([\d.]+))?", name)
    if not found:
        raise ValueError(f"no sampler {name!r}")
    return Way(found[1], (int(found[2]) + 1) // 2, float(found[3] or 1), float(found[4] or 0))


def random_schedule(name: str, names: Sequence[str], roles: Sequence[str]) -> ConvexSchedule:
    """``random:7`` -> a member of the learned class with a lead of 0.1 to 0.5, its weights drawn from the number.

    What is straight has a share from 0 to 1 in each representation, and with probability 1/2 all of one that leads; the
    rest is divided among the knots.
    """
    draw = np.random.default_rng([int(name.removeprefix("random:")), len(names)])
    while True:
        rows = []
        for role in roles:
            straight = 1.0 if role == "leads" and draw.random() < 0.5 else draw.random()
            rows.append([straight, *(1 - straight) * draw.dirichlet(np.full(len(KNOTS), 0.5))])
        schedule = ConvexSchedule(names, roles, torch.tensor(rows, dtype=torch.float64).clamp(min=1e-9).log())
        if 0.1 <= schedule.lead() <= 0.5:
            return schedule


def shaped_schedule(name: str, names: Sequence[str], roles: Sequence[str]) -> TableSchedule:
    """``lead:0.3@0.25`` -> what leads is ahead of what lags by at most 0.3, at a mean local time of 0.25.

    The mean m of both goes from 0 to 1 evenly, and they lie ``g(m) / 2`` above and below it.  g is ``m^a (1 - m)^b``,
    scaled to that largest lead, with a / (a + b) its place and 1 the smaller exponent: smooth, and not always convex.
    """
    lead, place = map(float, name.removeprefix("lead:").split("@"))
    a, b = (1.0, (1 - place) / place) if place <= 0.5 else (place / (1 - place), 1.0)
    m = np.linspace(0, 1, 513)
    gap = lead * m**a * (1 - m) ** b / (place**a * (1 - place) ** b)
    side = {"leads": 0.5, "lags": -0.5, "free": 0.0}
    return TableSchedule(names, m.tolist(), np.stack([m + side[role] * gap for role in roles], 1).tolist())


# by the first part of their names
MEMBERS: dict[str, Callable[[str, Sequence[str], Sequence[str]], Schedule]] = {
    "random": random_schedule,
    "lead": shaped_schedule,
}


def nfe(name: str) -> int | None:
    """Function evaluations of a sampler; None for dopri5, which adapts."""
    way = sampler(name)
    return evaluations(way.method, way.intervals)


LAST_STEP = 0.2  # of CIFAR-10's samplers, by question 8's rule (PROTOCOL.md, changes)

# SFD's clock at offset 1.0 is the cascade (K = 2): the eighth point, run once
_OFFSETS = ("offset:0.1", "offset:0.2", "offset:0.3", "offset:0.4", "offset:0.5", "offset:0.6", "offset:0.8", "cascade")
_POWERS = ("power:1.5", "power:2", "power:3", "power:4", "power:5")
_THIRD_ROLES = "representations.roles=lags,free,leads"


def _integrators(intervals: int, last_steps: Sequence[float] = (0.2, 0.3, 0.4)) -> tuple[str, ...]:
    """What question 8 compares at so many intervals: the grid's own last step, and those that every schedule shares."""
    name = f"heun_euler{2 * intervals - 1}"
    return (name, *(f"{name}@{last}" for last in last_steps))


STUDIES = {
    "cifar10": Study(
        preset="cifar10",
        # of the base probe; the presets' is a quarter of that since
        settings=("sample.count=10000", f"sample.last_step={LAST_STEP}", "probe.budget=0.1"),
        steps=6000,
        headline=tuple(f"heun_euler{count}@{LAST_STEP}" for count in (17, 49)),
        curve=tuple(f"heun_euler{count}@{LAST_STEP}" for count in (5, 9, 17, 29, 49, 99)),
        fixed=("synchronous", *_OFFSETS, *_POWERS),
        scan_seeds=3,
        rank_samples=5000,
        sizes={"base": (), "large": ("model.depth=12", "model.width=384", "model.heads=12")},
        probes={
            "base": (),
            # C as it was: with independent times, and along the paths but by the distance alone (PROTOCOL.md, changes)
            "independent": ("probe.times=independent", "probe.energy=0"),
            "by distance alone": ("probe.energy=0",),
            "a tenth of the budget": ("probe.budget=0.01",),
            "quarter of the budget": ("probe.budget=0.025",),
            "half the budget": ("probe.budget=0.05",),
            "small": ("probe.depth=2", "probe.width=64", "probe.heads=2"),
            "wide": ("probe.depth=4", "probe.width=256", "probe.heads=8"),
            "main shape": ("probe.depth=8", "probe.width=256", "probe.heads=8", "probe.budget=0.1"),
            "for 3 steps": ("probe.sampling_steps=3",),
            "for 25 steps": ("probe.sampling_steps=25",),
        },
        few_steps=(3, 25),
        integrators=(_integrators(9), _integrators(25)),
        third=("representations.names=texture,lowfreq,semantic", "representations.channels=48,3,16", _THIRD_ROLES),
        members=12,
        shapes=(
            *("lead:0.1@0.25", "lead:0.18@0.25", "lead:0.1@0.35", "lead:0.2@0.35", "lead:0.28@0.35"),
            *("lead:0.1@0.5", "lead:0.2@0.5", "lead:0.3@0.5", "lead:0.4@0.5"),
            *("lead:0.1@0.65", "lead:0.2@0.65", "lead:0.28@0.65", "lead:0.1@0.75", "lead:0.18@0.75"),
        ),
    ),
    # 1,500 images saturate the preset: a smaller network is compared far before that.  Its probe costs more
    # than a run: 1 % of one is three steps (PROTOCOL.md)
    "digits": Study(
        preset="digits",
        settings=(
            *("model.depth=3", "model.width=64", "model.heads=4", "train.ema=0.98", "train.warmup=20"),
            *(
                "sample.count=1000",
                "evaluate.metrics=fid",
                "probe.budget=1.0",
                "train.batch=64",
            ),
        ),
        steps=300,
        serves=1200,
        headline=("heun10", "heun18"),
        curve=("heun6", "heun10", "heun18", "heun30", "heun50", "heun100"),
        fixed=("synchronous", "offset:0.15", "offset:0.3", "offset:0.6", "cascade", "power:2", "power:3"),
        scan_seeds=3,
        rank_samples=1000,
        sizes={"base": (), "large": ("model.depth=4", "model.width=96", "model.heads=4")},
        probes={
            "base": (),
            "half": ("probe.budget=0.5",),
            "small": ("probe.depth=1", "probe.width=32", "probe.heads=1"),
            "main shape": ("probe.depth=3", "probe.width=64", "probe.heads=4", "probe.train_share=0.1"),
            "for 3 steps": ("probe.sampling_steps=3",),
        },
        few_steps=(3,),
        integrators=(_integrators(5), _integrators(9)),
        third=("representations.names=texture,lowfreq,semantic", "representations.channels=4,1,8", _THIRD_ROLES),
        rules=("B", "C", "D"),
        sample_batch=100,
    ),
}
_CIFAR10 = STUDIES["cifar10"]
STUDIES["cifar10-components"] = replace(
    _CIFAR10,
    preset="cifar10-components",
    fixed=("synchronous", *(f"offset:0.{tenths}" for tenths in (2, 3, 4, 6, 8)), *_POWERS[:4]),
    integrators=tuple(_integrators(intervals, (0.06, 0.12, 0.2)) for intervals in (9, 25)),
    third=("representations.names=texture,lowfreq,semantic", "representations.channels=24,3,16", _THIRD_ROLES),
    members=0,  # question 9 trains its shapes alone
)
