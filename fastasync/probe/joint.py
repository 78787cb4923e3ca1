"""Estimator A: the gradient of the corrected loss in the schedule, through a probe trained along it.

For representation k with local time tau ~ rho, global time as a function of the schedule's parameters is the implicit

    s = s0 - (tau_k(s0) - sg[tau_k(s0)]) / sg[tau_k'(s0)],        tau_k(s0) = tau  (sg: stop gradient)

so that tau_k stays put and the other local times move.  Only term k of the loss is used, with
weight lam_k / pi_k.  The signal comes through the noised input x, never detached; the time inputs of the network are:
at the optimal velocity their expected gradient is zero, and off its path a probe knows nothing about them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import fastasync_kernels
import torch
from torch import Tensor
from tqdm import tqdm

from fastasync.config import Config
from fastasync.data import Latents
from fastasync.densities import Density
from fastasync.model import LightningDiT
from fastasync.objective import draw_times, mixture_component, stratified
from fastasync.probe.budget import JOINT_WARMUP
from fastasync.probe.network import Trainer, adam_state, autocast, check_finite, drop_some, training_batch
from fastasync.probe.resume import Progress
from fastasync.probe.surface import starting_points
from fastasync.schedule import ConvexSchedule, Schedule, kinetic_energy

SCHEDULE_LR = 0.05
AVERAGED = 0.25  # the last part of the schedule's steps, over which logits and losses are averaged
STARTS = ("synchronous", "far apart")
_PHI_SEED = 0x5EED  # keeps the schedule's draws apart from the network's


class Draw(NamedTuple):
    """``component`` k int64 [B]; ``tau`` float64 [B, K], with gradient to the schedule; ``weight`` lam_k / pi_k [B]."""

    component: Tensor
    tau: Tensor
    weight: Tensor


def implicit_times(schedule: Schedule, component: Tensor, goal: Tensor) -> Tensor:
    """Local times [B, K] at which representation ``component`` [B] has reached ``goal`` [B].

    Values are exact; gradients to the schedule's parameters are those of the implicit function, zero for tau_k itself.
    """
    s0 = torch.empty_like(goal, dtype=torch.float64)
    for k in range(schedule.count):
        chosen = component == k
        s0[chosen] = schedule.invert(k, goal[chosen])
    tau, dtau = schedule(s0)
    at = component[:, None]
    own, speed = tau.gather(1, at)[:, 0], dtau.gather(1, at)[:, 0].detach()
    return schedule(s0 - (own - own.detach()) / speed).tau


def draw_for_schedule(
    schedule: Schedule, density: Density, lam: Sequence[float], *, seed: int, step: int, samples: Tensor, total: int
) -> Draw:
    """Component k ~ pi with pi proportional to lam (which makes every weight the same), tau ~ rho, stratified."""
    shares = torch.tensor(lam, dtype=torch.float64)
    active = [k for k, weight in enumerate(lam) if weight > 0]
    component, inner = mixture_component(stratified(seed, step, samples, total), [lam[k] for k in active])
    component = torch.tensor(active)[component]
    tau = implicit_times(schedule, component, density.quantile(inner))
    return Draw(component, tau, torch.full_like(inner, float(shares.sum())))


def schedule_losses(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    draw: Draw,
    z: Tensor,
    y: Tensor,
    channels: Sequence[int],
    *,
    seed: int,
    step: int,
    samples: Tensor,
    ops: Any,
) -> Tensor:
    """Per-sample ``lam_k / pi_k error_k`` [B]: the mean estimates the corrected loss, its gradient that of the loss."""
    tau = draw.tau.to(z.device, torch.promote_types(z.dtype, torch.float32))
    x = ops.noising(z, tau, channels, seed, step, samples)
    v = velocity(x, tau.detach(), y)
    errors, _ = ops.flow_errors(v, z, channels, seed, step, samples)
    own = errors.gather(1, draw.component.to(z.device)[:, None])[:, 0]
    return own * draw.weight.to(own)


class JointResult(NamedTuple):
    """The chosen schedule, and for each start its averaged loss, J and schedule."""

    schedule: ConvexSchedule
    rows: list[dict[str, Any]]


class ScheduleLearner:
    """Adam on the logits of one schedule; keeps the averages over the last part of its ``steps``."""

    def __init__(self, start: ConvexSchedule, steps: int, lr: float = SCHEDULE_LR):
        self.schedule = ConvexSchedule(start.names, start.roles, start.logits.detach(), start.knots, start.floor)
        self.optimizer = torch.optim.Adam(self.schedule.parameters(), lr=lr, betas=(0.9, 0.99))
        self.steps, self.done, self.averaged = steps, 0, 0
        self.logits, self.loss = torch.zeros_like(start.logits.detach()), 0.0
        self.last = 0.0

    def objective(self, losses: Tensor, beta: float) -> Tensor:
        """Mean of ``losses`` [B] plus ``beta KE`` (exact, equal weights c_k); remembers the mean for ``update``."""
        energy = kinetic_energy(self.schedule, points=512)
        mean = losses.mean().to("cpu", torch.float64)
        self.last = float(mean.detach())
        return mean + beta * energy

    def update(self) -> None:
        """One optimizer step on the gradients that a backward pass has left."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.done > (1 - AVERAGED) * self.steps:
            self.averaged += 1
            with torch.no_grad():
                self.logits += (self.schedule.logits - self.logits) / self.averaged
            self.loss += (self.last - self.loss) / self.averaged

    def state(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, by name."""
        logits = self.schedule.logits
        numbers = torch.tensor([self.done, self.averaged, self.loss, self.last], dtype=torch.float64)
        kept = {"logits": logits.detach(), "average": self.logits, "numbers": numbers}
        return kept | {f"adam.{name}": value for name, value in self.optimizer.state[logits].items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take in what `state` gave, before the first update."""
        done, averaged, self.loss, self.last = state["numbers"].tolist()
        self.done, self.averaged, self.logits = int(done), int(averaged), state["average"]
        with torch.no_grad():
            self.schedule.logits.copy_(state["logits"])
        if self.done:
            self.optimizer.state[self.schedule.logits] = adam_state(state, "adam.", "cpu")

    def result(self) -> ConvexSchedule:
        """The schedule of the averaged logits."""
        start = self.schedule
        logits = self.logits if self.averaged else start.logits.detach()
        return ConvexSchedule(start.names, start.roles, logits, start.knots, start.floor)


def learn_jointly(
    model: LightningDiT,
    config: Config,
    density: Density,
    lam: Sequence[float],
    beta: float,
    latents: Latents,
    steps: int,
    device: torch.device | str,
    progress: bool = True,
    states: Progress | None = None,
) -> JointResult:
    """Train the probe along the schedules and the schedules through the probe, alternately, for ``steps`` steps.

    One network serves all starts: each has its share of every batch.  The network's loss has weight 1 for each
    representation (lam may be zero for some, and their velocities must be learned too).  The start with the least J
    wins.  Goes on from the newest of ``states``.
    """
    probe, reps = config.probe, config.representations
    channels = reps.channels
    ops = fastasync_kernels.select(config.model.kernels, device)
    warmup = round(JOINT_WARMUP * steps)
    all_starts = starting_points(reps.names, reps.roles)
    chosen = [*STARTS, *(name for name in all_starts if name.endswith(" first"))]
    learners = {name: ScheduleLearner(all_starts[name], steps - warmup) for name in chosen}
    trainer = Trainer(model.train(), probe.lr, steps)
    samples = torch.arange(probe.batch, device=device)
    groups = [part.cpu() for part in samples.tensor_split(len(learners))]

    def velocity(x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
        with autocast(device):
            return model(x, tau, y)

    stateful: list[Trainer | ScheduleLearner] = [trainer, *learners.values()]

    def state() -> dict[str, Tensor]:
        return {
            f"{number}/{name}": value for number, part in enumerate(stateful) for name, value in part.state().items()
        }

    if states is not None and (kept := states.load()) is not None:
        for number, part in enumerate(stateful):
            prefix = f"{number}/"
            part.restore({name.removeprefix(prefix): kept[name] for name in kept if name.startswith(prefix)})
    begin = trainer.done
    bar = tqdm(range(begin, steps), desc="joint probe", unit="step", initial=begin, total=steps, disable=not progress)
    for step in bar:
        if states is not None and step > begin:
            states.save(state, step)
        z, y = training_batch(config, latents, step, device)
        y = drop_some(ops, y, config, step, samples)
        # 1. the network, along every schedule as it is now: corrected loss, mixture proposal
        times = [
            draw_times(
                learner.schedule,
                density,
                seed=probe.seed,
                step=step,
                samples=torch.arange(len(group)),
                total=len(group),
            )
            for learner, group in zip(learners.values(), groups)
        ]
        tau = torch.cat([part.tau for part in times]).to(device, torch.float32)
        weight = torch.cat([part.weight for part in times]).to(device, torch.float32)
        v = velocity(ops.noising(z, tau, channels, probe.seed, step, samples), tau, y)
        errors = ops.flow_errors(v, z, channels, probe.seed, step, samples)[0]
        loss = (errors * weight).sum(1).mean()
        trainer.step(loss)
        if step % 20 == 0 or step == steps - 1:
            value = float(loss.detach())
            check_finite(value, step)
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        # 2. the schedules, through the network as it is now
        if step < warmup:
            continue
        model.requires_grad_(False)
        draws = [
            draw_for_schedule(
                learner.schedule,
                density,
                lam,
                seed=probe.seed ^ _PHI_SEED,
                step=step,
                samples=torch.arange(len(group)),
                total=len(group),
            )
            for learner, group in zip(learners.values(), groups)
        ]
        draw = Draw(*(torch.cat(parts) for parts in zip(*draws)))
        losses = schedule_losses(
            velocity, draw, z, y, channels, seed=probe.seed ^ _PHI_SEED, step=step, samples=samples, ops=ops
        )
        parts = losses.split([len(group) for group in groups])
        sum(learner.objective(part, beta) for learner, part in zip(learners.values(), parts)).backward()  # type: ignore[union-attr]
        for learner in learners.values():
            learner.update()
        model.requires_grad_(True)
    trainer.finish()
    model.eval()

    rows = []
    for name, learner in learners.items():
        schedule = learner.result()
        with torch.no_grad():
            energy = float(kinetic_energy(schedule))
        rows.append(
            {
                "start": name,
                "beta": beta,
                "objective": learner.loss + beta * energy,
                "loss": learner.loss,
                "kinetic_energy": energy,
                "lead": schedule.lead(),
                "schedule": schedule.to_json(),
            }
        )
    objectives = [float(row["objective"]) for row in rows]  # type: ignore[arg-type]
    best = objectives.index(min(objectives))
    return JointResult(list(learners.values())[best].result(), rows)
