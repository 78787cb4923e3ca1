"""The schedule-corrected objective, SFD's objective, and the naive one.

    L = sum_k lam_k E_{s ~ p}[ w_k(s) ||v_k - u_k||^2 / d_k ],    w_k(s) = rho_k(tau_k(s)) tau_k'(s) / p(s)

is a line integral over the path of the schedule in the unit cube: it does not depend on how fast s runs along it, so a
learned schedule cannot game it.  Noise and times come from the counter-based generator, keyed by (seed, step, sample):
a step is the same on any batch split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastasync_kernels.reference import philox_uniform
from torch import Tensor

from fastasync.densities import Density
from fastasync.schedule import Schedule

TIME_STREAM = 1  # stream of the counter-based generator that times are drawn from (0 is the noise)
MODES = ("corrected", "naive", "sfd")
PROPOSALS = ("mixture", "uniform")


class Times(NamedTuple):
    """A batch of times: s [B], local times tau [B, K], weights w_k(s) [B, K]; float64 on the CPU unless moved."""

    s: Tensor
    tau: Tensor
    weight: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Times:
        """The same times on a device, without waiting for the copy."""
        return Times(*(part.to(device, dtype, non_blocking=True) for part in self))


def stratified(seed: int, step: int | Tensor, samples: Tensor, total: int) -> Tensor:
    """One uniform per sample, float64 [B]: sample i of ``total`` falls in cell [i / total, (i + 1) / total).

    ``step``: a number, or [B, 1], one for each sample.
    """
    jitter = philox_uniform(seed, step, samples.cpu(), 1, stream=TIME_STREAM)[:, 0].to(torch.float64)
    return (samples.cpu().to(torch.float64) + jitter) / total


def mixture_component(u: Tensor, pi: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Split a uniform u [B] into a representation k ~ pi (int64 [B]) and a uniform that is independent of k."""
    shares = torch.tensor(pi, dtype=u.dtype)
    edges = torch.cat([torch.zeros(1, dtype=u.dtype), (shares / shares.sum()).cumsum(0)])
    component = torch.searchsorted(edges[1:-1].contiguous(), u, right=True)
    inner = (u - edges[component]) / (edges[component + 1] - edges[component])
    return component, inner.clamp(1e-12, 1 - 1e-12)


@torch.no_grad()
def draw_times(
    schedule: Schedule,
    density: Density,
    *,
    seed: int,
    step: int,
    samples: Tensor,
    total: int,
    mode: str = "corrected",
    proposal: str = "mixture",
    pi: Sequence[float] | None = None,
) -> Times:
    """Draw the times of the samples (integer [B], their positions in the batch of ``total``) at one training step.

    - corrected, mixture: ``p(s) = sum_k pi_k rho(tau_k) tau_k'``, drawn as k ~ pi, tau ~ rho, s = the inverse of tau_k;
      then ``sum_k pi_k w_k = 1``, so ``w_k <= 1 / pi_k``.  ``pi`` defaults to equal shares.
    - corrected, uniform: s uniform, ``w_k = rho(tau_k) tau_k'``.
    - naive, sfd: s ~ rho and weight 1 everywhere.
    """
    u = stratified(seed, step, samples, total)
    return times_of(u, schedule, density, mode, proposal, pi)


def times_of(
    u: Tensor,
    schedule: Schedule,
    density: Density,
    mode: str = "corrected",
    proposal: str = "mixture",
    pi: Sequence[float] | None = None,
) -> Times:
    """The times that uniforms u [N] stand for; arguments as in ``draw_times``."""
    if mode in ("naive", "sfd"):
        s = density.quantile(u)
        tau = schedule(s).tau
        return Times(s, tau, torch.ones_like(tau))
    if proposal == "uniform":
        tau, dtau = schedule(u)
        return Times(u, tau, density.pdf(tau) * dtau)
    shares = torch.tensor(pi or [1.0] * schedule.count, dtype=torch.float64)
    shares = shares / shares.sum()
    component, inner = mixture_component(u, shares.tolist())
    goal = density.quantile(inner)
    s = torch.empty_like(u)
    for k in range(schedule.count):
        chosen = component == k
        s[chosen] = schedule.invert(k, goal[chosen])
    tau, dtau = schedule(s)
    flow = density.pdf(tau) * dtau  # rho_k(tau_k) tau_k'
    return Times(s, tau, flow / (flow @ shares)[:, None])


class LossTerms(NamedTuple):
    """``total``: scalar, differentiable.  ``errors``: unweighted mean squared error of each representation [K],
    detached.  ``cosine``, ``repa``: the unweighted terms (0 when off), detached."""

    total: Tensor
    errors: Tensor
    cosine: Tensor
    repa: Tensor


@dataclass(frozen=True)
class Objective:
    """How a network is trained along a schedule.

    Args:
        channels: channels of each representation, in the bundle's order.
        loss_weights: lam_k, on per-representation means.
        density: rho, the same for every representation.
        mode: ``corrected``; ``sfd`` (s ~ rho, weight 1; SFD's objective when ``cosine_weight`` is 1 and the loss
            weights are ``sfd_loss_weights``); ``naive`` (the same without the cosine: for comparison).
        proposal: ``mixture`` or ``uniform`` (corrected only).
        cosine_weight: weight of the mean over positions of ``1 - cos(v, u)`` over all channels jointly.
        repa_weight: weight of REPA's ``1 - cos`` between projected tokens and frozen features.
    """

    channels: tuple[int, ...]
    loss_weights: tuple[float, ...]
    density: Density
    mode: str = "corrected"
    proposal: str = "mixture"
    cosine_weight: float = 0.0
    repa_weight: float = 0.0

    def times(self, schedule: Schedule, *, seed: int, step: int, samples: Tensor, total: int) -> Times:
        """``draw_times`` with this objective's density, mode and proposal."""
        return draw_times(
            schedule,
            self.density,
            seed=seed,
            step=step,
            samples=samples,
            total=total,
            mode=self.mode,
            proposal=self.proposal,
        )

    def times_by_step(
        self, schedule: Schedule, *, seed: int, samples: Tensor, total: int, block: int = 32
    ) -> Callable[[int], Times]:
        """``step -> Times``, the same as ``times``, drawn for ``block`` steps at once.

        Inverting the schedule for many steps costs about as much as for one: beside a step of a few milliseconds on a
        GPU, the difference is what a learned schedule would cost.
        """
        drawn: dict[int, Times] = {}

        def at(step: int) -> Times:
            if step not in drawn:
                first = step - step % block
                steps = (first + torch.arange(block)).repeat_interleave(len(samples))[:, None]
                u = stratified(seed, steps, samples.cpu().repeat(block), total)
                with torch.no_grad():
                    times = times_of(u, schedule, self.density, self.mode, self.proposal, None)
                drawn.clear()
                parts = zip(*(part.split(len(samples)) for part in times))
                drawn.update({first + i: Times(*part) for i, part in enumerate(parts)})
            return drawn[step]

        return at

    def __call__(
        self,
        model: Callable[..., Any],
        z: Tensor,
        y: Tensor,
        times: Times,
        *,
        seed: int,
        step: int | Tensor,
        samples: Tensor,
        ops: Any,
        features: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> LossTerms:
        """The loss of a batch: mean over samples of ``sum_k lam_k w_k error_k`` plus the optional terms.

        z [B, C, H, W]; y [B] labels (null class included); times on z's device; samples [B] positions in the batch,
        the noise's key with ``seed`` and ``step`` (an int, or an int64 tensor of one number on the device);
        ``ops``: the fused operations or their reference; features [B, N, D] for REPA; ``dtype``: what the noised state
        is rounded to (default: z's).  The target is formed from z and the noise, so it is not rounded with it.
        ``model(x, tau, y)`` -> v, or ``model(x, tau, y, return_repa=True)`` -> (v, tokens) when ``features`` are given.
        """
        x = ops.noising(z, times.tau, self.channels, seed, step, samples, dtype)
        zero = torch.zeros((), device=z.device)
        repa = zero
        if features is not None and self.repa_weight:
            v, tokens = model(x, times.tau, y, return_repa=True)
            repa = 1 - F.cosine_similarity(tokens.float(), features.float(), dim=-1).mean()
        else:
            v = model(x, times.tau, y)
        # one number at a time: a tensor of them would be copied from the host, which a recorded step must not do
        columns = times.weight.to(torch.float32).unbind(1)
        weight = torch.stack([column * lam for column, lam in zip(columns, self.loss_weights, strict=True)], dim=1)
        flow, errors, cosines = ops.corrected_loss(v, z, weight, self.channels, seed, step, samples, self.cosine_weight)
        total = flow if repa is zero else flow + self.repa_weight * repa
        return LossTerms(total, errors.mean(0), cosines.mean(), repa.detach())


def sfd_loss_weights(channels: Sequence[int], roles: Sequence[str], lead_weight: float = 2.0) -> tuple[float, ...]:
    """SFD's weights in per-representation means: its mean over all channels with ``lead_weight`` on what leads.

    For 32 texture and 16 semantic channels: ``(32 / 48, 2 * 16 / 48)``.
    """
    total = sum(channels)
    return tuple(count / total * (lead_weight if role == "leads" else 1.0) for count, role in zip(channels, roles))
