"""One interface over the four estimators: latents in, a schedule and everything the report needs out.

A folder holds ``probe.json`` (schedule, tables, budget), ``surface.npz`` (the fitted loss surface) and the trained
probe network (B, C, D), from which an interrupted run goes on; while it is trained, its state every few minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import fastasync_kernels
import numpy as np
import torch
from torch import Tensor

from fastasync.config import Config
from fastasync.data import Latents
from fastasync.densities import DENSITIES, Density
from fastasync.errors import UserError
from fastasync.files import atomic_path, digest_tensors, load_tensors, save_tensors, write_json
from fastasync.model import LightningDiT, forward_flops
from fastasync.probe.budget import FIT_SHARE, JOINT_STEP, Budget, Plan, plan_probe
from fastasync.probe.diagnostics import curl_report, describe
from fastasync.probe.generation import (
    FREE,
    LEAST_SAMPLES,
    Scorer,
    Selection,
    candidate_family,
    rank_by_loss,
    search,
)
from fastasync.probe.joint import learn_jointly
from fastasync.probe.network import Errors, PathTimes, autocast, build_probe, surface_errors, train_surface_probe
from fastasync.probe.oracle import best_path
from fastasync.probe.resume import TRAINING, Progress, read_facts
from fastasync.probe.surface import LEAST_ERRORS, LossSurface, sweep
from fastasync.sampling.generate import initial_noise, sample_labels
from fastasync.sampling.integrators import evaluations, integrate, time_grid
from fastasync.schedule import Schedule, schedule_from_json
from fastasync.training.interrupt import only_process
from fastasync.training.out_of_memory import explained_batch

RESULT, SURFACE, NETWORK, NETWORK_FACTS = "probe.json", "surface.npz", "network.safetensors", "network.json"
ERRORS = ("errors.tau", "errors.errors")  # in NETWORK, beside the weights
PLANNED = "train.steps"  # whose share the budget is
MAX_FIT = 200_000  # errors to fit a surface of a few dozen coefficients to: more would not change it
MIN_FIT = 512
INDEPENDENT = 0.25  # of the samples of a probe that is trained along paths: they make its loss surface
_LATTICE = {1: 65, 2: 33, 3: 17}  # points on each axis of the stored surface, by K
_ORACLE_CELLS = {1: 128, 2: 128, 3: 32}


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found.

    Attributes:
        schedule: the learned schedule.
        estimator: A, B, C or D.
        diagnostics: ``chosen`` (J, KE, lead, ...), ``curl`` (one row per pair), ``jumped``; ``noise`` of C's scores;
            ``oracle`` on request.
        candidates: C's and D's table: label, score, lead, KE, schedule; samples, distance, history (C) or loss (D).
        sweep: B's table, one row per beta (for A the starts at its one beta).
        budget: FLOPs and seconds by purpose.
        surface: arrays for plotting: ``tau`` [n] axis, ``errors`` [n, ..., n, K] (empty for A).
    """

    schedule: Schedule
    estimator: str
    diagnostics: dict[str, Any]
    candidates: list[dict[str, Any]] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    budget: dict[str, Any] = field(default_factory=dict)
    surface: dict[str, np.ndarray] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """What to print: the choice, what decided it, and what it cost."""
        chosen, spent = self.diagnostics["chosen"], self.budget["flops"]
        loss = "" if chosen["objective"] is None else f"J {chosen['objective']:.4f} = loss {chosen['loss']:.4f} + "
        label = f"{self.diagnostics['label']}, kind " if "label" in self.diagnostics else "kind "
        lines = [
            f"estimator {self.estimator}: {label}{self.schedule.kind}, lead {self.schedule.lead():.3f}",
            f"{loss}beta {chosen['beta']:g} x KE {chosen['kinetic_energy']:.3f}, lam {chosen['lam']}",
        ]
        for row in self.diagnostics["curl"] or []:
            first = row["first"] or "neither"
            lines.append(f"curl of {' and '.join(row['pair'])}: {row['integral']:+.4f}, the loss wants {first} first")
        if "oracle" in self.diagnostics:
            least = f"{self.diagnostics['oracle']['value']:.4f}, the least over all monotone lattice paths"
            lines.append(f"oracle: loss {least} on the fitted surface; this schedule's is {chosen['loss']:.4f}")
        for row in self.sweep:
            jump = ", JUMP from the smaller beta" if row.get("jump") else ""
            name = f"start {row['start']}" if "start" in row else f"beta {row['beta']:g}"
            lines.append(
                f"{name}: J {row['objective']:.4f}, KE {row['kinetic_energy']:.3f}, lead {row['lead']:.3f}{jump}"
            )
        for row in self.candidates:
            what = f"loss {row['loss']:.4f}, KE {row['kinetic_energy']:.3f}" if "loss" in row else ""
            what = what or f"distance {row['distance']:.4g} of {row['samples']} samples"
            lines.append(f"{row['label']}: score {row['score']:.4f}, {what}")
        if "noise" in self.diagnostics:
            lines.append(f"noise of a difference in distance: {self.diagnostics['noise']:.2g}")
        parts = ", ".join(f"{what} {flops / self.budget['limit_flops']:.1%}" for what, flops in spent.items())
        lines.append(f"budget {self.budget['label']}: {parts}; {self.budget['total_seconds']:.1f} s")
        return lines

    def save(self, folder: str | Path, fingerprint: str, about: dict[str, Any] | None = None) -> None:
        """Write surface.npz, then probe.json (whose presence means done), each atomically.

        ``about``: what it is to say of the configuration besides the fingerprint.
        """
        folder = Path(folder)
        if self.surface:
            with atomic_path(folder / SURFACE) as partial, open(partial, "wb") as stream:
                np.savez(stream, allow_pickle=False, **self.surface)
        content = {name: getattr(self, name) for name in ("estimator", "diagnostics", "candidates", "sweep", "budget")}
        facts = {**(about or {}), "fingerprint": fingerprint}
        write_json(folder / RESULT, {**facts, "schedule": self.schedule.to_json(), **content})

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str | None = None) -> ProbeResult | None:
        """What ``save`` wrote, or None when there is nothing.

        Raises UserError when the file is damaged or belongs to another configuration than ``fingerprint``.
        """
        folder = Path(folder)
        content = read_facts(folder / RESULT, fingerprint)
        if content is None:
            return None
        content = {name: value for name, value in content.items() if name not in ("fingerprint", PLANNED)}
        surface: dict[str, np.ndarray] = {}
        if (folder / SURFACE).exists():
            try:
                with np.load(folder / SURFACE, allow_pickle=False) as arrays:
                    surface = dict(arrays)
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                remedy = f"remove {folder} and run the probe again"
                raise UserError(str(folder / SURFACE), f"cannot be read ({error})", remedy) from None
        schedule = schedule_from_json(content.pop("schedule"), source=str(folder / RESULT))
        return cls(schedule, surface=surface, **content)


def probe_loss_weights(config: Config) -> tuple[float, ...]:
    """lam of A, B and D: ``probe.loss_weights``, or 1 for what lags or is free and 0 for what leads.

    When everything leads there is nothing else to weigh: 1 for each.
    """
    lam = config.probe.loss_weights or tuple(0.0 if role == "leads" else 1.0 for role in config.representations.roles)
    return lam if any(lam) else (1.0,) * len(lam)


def chosen_beta(betas: Sequence[float]) -> float:
    """The middle of ``probe.beta`` (the smaller of the two middle ones): the one that decides for A and B."""
    return sorted(betas)[(len(betas) - 1) // 2]


def probe_plan(config: Config, planned_flops: float, selection: Selection = FREE) -> Plan:
    """How the budget of this configuration would be divided; UserError when it is too small.

    ``selection``: what C's scoring costs.
    """
    return _plan(config, forward_flops(build_probe(config, "meta")), planned_flops, selection)


def search_method(config: Config) -> str:
    """C's sampler: the run's own, or Heun's in the place of an adaptive one, which has no fixed cost."""
    return config.sample.integrator if evaluations(config.sample.integrator, 1) else "heun"


def _sample_flops(config: Config, forward: float) -> float:
    return forward * (evaluations(search_method(config), config.probe.sampling_steps) or 0)


def _plan(config: Config, forward: float, planned_flops: float, selection: Selection) -> Plan:
    """``plan_probe``; B and D must keep errors enough to fit a surface to, C samples enough to compare schedules."""
    least = LEAST_ERRORS * len(config.representations.names) * forward if config.probe.estimator in "BD" else 0.0
    if config.probe.estimator == "C":
        samples = LEAST_SAMPLES * (_sample_flops(config, forward) + selection.sample) + selection.reference
        least = max(samples + MIN_FIT * forward, samples / (1 - FIT_SHARE))
    return plan_probe(config.probe, forward, planned_flops, least)


class _Job(NamedTuple):
    """What the estimators share."""

    config: Config
    latents: Latents
    device: torch.device
    folder: Path | None
    about: dict[str, Any]  # what the trained network depends on: its fingerprint, the planned steps
    progress: bool
    plan: Plan
    budget: Budget
    density: Density
    lam: tuple[float, ...]
    beta: float
    network: LightningDiT
    forward: float

    def velocity(self, x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
        """The probe's velocity, without gradient."""
        with torch.no_grad(), autocast(self.device):
            return self.network(x, tau, y)  # type: ignore[return-value]


def learn_schedule(
    config: Config,
    latents: Latents,
    *,
    planned_flops: float,
    score: Scorer | None = None,
    device: torch.device | str = "cpu",
    out_dir: str | Path | None = None,
    progress: bool = True,
    oracle: bool = False,
) -> ProbeResult:
    """Learn a schedule with ``config.probe.estimator`` within ``probe.budget * planned_flops``.

    Args:
        latents: the training set (a ``fastasync.data.LatentSet``).
        planned_flops: of the run that the schedule is for, as ``model.train_flops`` counts them.
        score: how C scores samples; its features must not be those that the report scores with.
        out_dir: where the result and the trained probe are kept; done -> reloaded, interrupted -> continued.
        oracle: add the optimum over all monotone lattice paths on the fitted surface (B, C, D; K <= 3).

    Raises:
        UserError: the budget is too small, C without a scorer, a folder of another configuration, a diverging probe,
            another process that probes in ``out_dir``.
    """
    probe, device = config.probe, torch.device(device)
    folder = Path(out_dir) if out_dir is not None else None
    trained = {"fingerprint": _fingerprint(config, latents, planned_flops), PLANNED: config.train.steps}
    sample = config.sample
    fingerprint = digest_tensors({}, trained, oracle, sample.integrator, sample.grid_power, sample.last_step)[:16]
    if folder is not None and (done := ProbeResult.load(folder, fingerprint)) is not None:
        return done
    if probe.estimator == "C" and score is None:
        raise UserError("probe.estimator", "C", "needs features to score samples with; give them, or choose D")
    network = build_probe(config, device)
    forward = forward_flops(network)
    job = _Job(
        config=config,
        latents=latents,
        device=device,
        folder=folder,
        about=trained,
        progress=progress,
        plan=_plan(config, forward, planned_flops, score.cost if score else FREE),
        budget=Budget(probe.budget * planned_flops, f"probe.budget {probe.budget:g} of {planned_flops:.3g} FLOPs"),
        density=DENSITIES[config.objective.density],
        lam=probe_loss_weights(config),
        beta=chosen_beta(probe.beta),
        network=network,
        forward=forward,
    )
    with nullcontext() if folder is None else only_process(folder, "probing"):
        if folder is not None and (done := ProbeResult.load(folder, fingerprint)) is not None:
            return done  # by another process, since
        result = _joint(job) if probe.estimator == "A" else _independent(job, score, oracle)
        if folder is not None:
            result.save(folder, fingerprint, trained)
            Progress(folder, trained).finish()
    return result


def _fingerprint(config: Config, latents: Latents, planned_flops: float) -> str:
    """Of everything that the trained probe depends on."""
    z, y = latents.batch(torch.arange(min(len(latents), 64)))
    sections = (replace(config.representations, decoder=""), config.probe)
    model = (config.model.classes, config.model.patch, config.model.mlp_multiple, config.model.label_dropout)
    facts = [asdict(section) for section in sections]
    if config.probe.estimator != "D":  # probes from before there was D are still theirs
        del facts[1]["loss_energy"]
    density, flip = config.objective.density, config.data.flip
    return digest_tensors({"z": z, "y": y}, facts, model, density, flip, len(latents), planned_flops)[:16]


def check_begun(folder: Path, train_steps: int) -> None:
    """Raises UserError where an unfinished probe in ``folder`` was planned for another run than ``train_steps``.

    Its budget is a share of that run.  Everything else that it depends on cannot change in a run's folder.
    """
    for name in (RESULT, NETWORK_FACTS, TRAINING):
        facts = read_facts(folder / name, None) or {}
        planned = facts.get(PLANNED, train_steps)
        if planned != train_steps:
            remedy = (
                f"{folder} holds a probe for a run of {planned} steps that was interrupted: finish it with "
                f"`fastasync probe` and train.steps={planned} first, or remove that folder to begin it again"
            )
            raise UserError(PLANNED, train_steps, remedy)


def _joint(job: _Job) -> ProbeResult:
    """Estimator A."""
    states = Progress(job.folder, job.about)
    with job.budget.timed("training"):
        # everything is planned: see JOINT_STEP for what a step costs
        job.budget.spend("training", job.plan.steps * JOINT_STEP * 3 * job.forward * job.config.probe.batch)
        found = learn_jointly(
            job.network,
            job.config,
            job.density,
            job.lam,
            job.beta,
            job.latents,
            job.plan.steps,
            job.device,
            job.progress,
            states,
        )
    job.budget.seconds["training"] += states.seconds_before
    chosen = min(found.rows, key=lambda row: row["objective"])
    diagnostics = {
        "chosen": {"lam": list(job.lam), **{key: value for key, value in chosen.items() if key != "schedule"}},
        "curl": None,
        "jumped": None,
        "steps": job.plan.steps,
    }
    return ProbeResult(found.schedule, "A", diagnostics, sweep=found.rows, budget=job.budget.to_json())


def _independent(job: _Job, score: Scorer | None, oracle: bool) -> ProbeResult:
    """Estimators B, C and D: one probe, its loss surface, and for C what it generates."""
    config, probe, reps, budget = job.config, job.config.probe, job.config.representations, job.budget
    errors = _trained(job)
    surface = LossSurface.fit(errors.tau, errors.errors)
    with budget.timed("minimising"):
        rows = sweep(surface, job.density, job.lam, probe.beta, reps.names, reps.roles)
    middle = next(row for row in rows if row.beta == job.beta)
    schedule: Schedule = middle.minimum.schedule
    table = [row.to_json(surface, job.density, job.lam) for row in rows]
    diagnostics: dict[str, Any] = {
        "curl": curl_report(surface, len(reps.names), job.lam, job.density, reps.names),
        "jumped": any(row.jumped for row in rows),
        "surface_noise": surface.noise.tolist(),
        "surface_samples": len(errors.tau),
        "steps": job.plan.steps,
    }
    candidates: list[dict[str, Any]] = []
    family = candidate_family(reps.names, reps.roles)
    if len(reps.names) == 1:  # only its speed can be chosen, which is B's matter
        family |= {f"B beta {row.beta:g}": row.minimum.schedule for row in rows}
    if probe.estimator == "D":
        candidates = rank_by_loss(family, surface, job.density, job.lam, probe.loss_energy)
        diagnostics["label"] = candidates[0]["label"]
        schedule = family[candidates[0]["label"]]
    if probe.estimator == "C" and score is not None:
        method = search_method(config)
        smaller = explained_batch("sample.batch", config.sample.batch, job.device, " (the same samples)")
        with budget.timed("sampling"), smaller:
            found = search(
                family,
                reps.roles,
                lambda schedule, indices: _generate(job, schedule, indices, method),
                score,
                sample_flops=_sample_flops(config, job.forward),
                budget=budget,
                allowance=min(job.plan.sample_flops, budget.left),
                energy=probe.energy,
                progress=job.progress,
            )
        schedule, candidates = found.schedule, found.rows
        diagnostics |= {
            "noise": found.noise,
            "label": found.label,
            "method": method,
            "steps_of_sampler": probe.sampling_steps,
        }
    diagnostics["chosen"] = describe(schedule, surface, job.density, job.lam, job.beta)
    if oracle and len(reps.names) in _ORACLE_CELLS:
        best = best_path(surface, job.density, job.lam, reps.names, _ORACLE_CELLS[len(reps.names)])
        diagnostics["oracle"] = {"value": best.value, "path": best.path.tolist(), "schedule": best.schedule.to_json()}
    return ProbeResult(schedule, probe.estimator, diagnostics, candidates, table, budget.to_json(), _plotted(surface))


def _trained(job: _Job) -> Errors:
    """Train the probe and draw its errors, or take both from an interrupted run."""
    probe, budget = job.config.probe, job.budget
    facts = None if job.folder is None else read_facts(job.folder / NETWORK_FACTS, job.about["fingerprint"])
    if job.folder is not None and facts is not None:
        tensors = load_tensors(job.folder / NETWORK, facts["sha256"], f"remove {job.folder} and run the probe again")
        errors = Errors(*(tensors.pop(name) for name in ERRORS))
        job.network.load_state_dict(tensors)
        job.network.eval()
        budget.flops, budget.seconds = dict(facts["flops"]), dict(facts["seconds"])
        return errors
    states = Progress(job.folder, job.about)
    with budget.timed("training"):
        budget.spend("training", 3 * job.forward * probe.batch * job.plan.steps)
        train_surface_probe(
            job.network,
            job.config,
            job.latents,
            job.plan.steps,
            job.device,
            job.progress,
            states,
            _path_times(job),
        )
    budget.seconds["training"] += states.seconds_before
    # where C's share of a tiny budget is less than a fit needs, it is taken from the samples
    count = max(min(int(job.plan.fit_flops / job.forward), MAX_FIT), min(MIN_FIT, int(budget.left / job.forward)))
    with budget.timed("surface"):
        budget.spend("surface", count * job.forward)
        errors = surface_errors(
            job.velocity,
            job.latents,
            job.config.representations.channels,
            count,
            seed=probe.seed,
            batch=max(probe.batch, 256),
            device=job.device,
            ops=fastasync_kernels.select(job.config.model.kernels, job.device),
            progress=job.progress,
        )
    if job.folder is not None:
        kept = {**job.network.state_dict(), **dict(zip(ERRORS, errors))}
        digest = save_tensors(job.folder / NETWORK, kept)
        write_json(
            job.folder / NETWORK_FACTS,
            {**job.about, "sha256": digest, "flops": budget.flops, "seconds": budget.seconds},
        )
    return errors


def _path_times(job: _Job) -> PathTimes | None:
    """Times along the candidates of C and D, or None for independent ones."""
    probe, reps = job.config.probe, job.config.representations
    if probe.estimator not in "CD" or probe.times == "independent" or len(reps.names) == 1:
        return None
    family = list(candidate_family(reps.names, reps.roles).values())
    return PathTimes(family, job.density, probe.batch, probe.seed, INDEPENDENT)


def _generate(job: _Job, schedule: Schedule, indices: Tensor, method: str) -> Tensor:
    """Latents of the samples ``indices`` along a schedule: the same noise and labels for every schedule."""
    config, reps = job.config, job.config.representations
    ops = fastasync_kernels.select(config.model.kernels, job.device)
    sample, parts = config.sample, []
    grid = time_grid(schedule, config.probe.sampling_steps, sample.grid_power, sample.last_step)
    for part in indices.split(sample.batch):
        labels = sample_labels(part, range(config.model.classes), "balanced", config.probe.seed)
        noise = initial_noise(part.to(job.device), (sum(reps.channels), reps.grid, reps.grid), config.probe.seed)
        parts.append(
            integrate(
                job.velocity, schedule, noise, labels.to(job.device), grid, method, channels=reps.channels, ops=ops
            )
        )
    return torch.cat(parts)


def _plotted(surface: LossSurface) -> dict[str, np.ndarray]:
    """The surface on a lattice: ``tau`` [n] and ``errors`` [n, ..., n, K]; nothing for K > 3."""
    if surface.count not in _LATTICE:
        return {}
    axis = torch.linspace(0, 1, _LATTICE[surface.count], dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(*[axis] * surface.count, indexing="ij"), -1)
    return {"tau": axis.numpy(), "errors": surface(lattice).numpy()}
