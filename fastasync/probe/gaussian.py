"""The exactly solvable case: Gaussian z, where the optimal velocity and its errors have closed forms.

With ``T = diag(tau)``, ``S = Cov z``, ``C = T S T + (I - T)^2 = Cov x`` and
``G = S T - (I - T) = Cov(u, x)``:

    v*(x, tau) = G C^-1 x,        l_k(tau) = tr[(S + I - G C^-1 G^T)_kk] / d_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastasync.densities import Density
from fastasync.sampling.integrators import integrate
from fastasync.schedule import Schedule


class GaussianCase:
    """Latents z [B, C, H, W] ~ N(0, S) over the channels, independent at each grid position.

    Args:
        cov: S, [C, C], symmetric positive definite; computed with in float64.
        channels: channels of each representation, summing to C.
    """

    def __init__(self, cov: Tensor | Sequence[Sequence[float]], channels: Sequence[int]):
        self.cov = torch.as_tensor(cov, dtype=torch.float64)
        self.channels = tuple(channels)
        if self.cov.shape != (sum(channels), sum(channels)) or float(torch.linalg.eigvalsh(self.cov)[0]) <= 0:
            raise ValueError(f"cov {list(self.cov.shape)} must be positive definite with {sum(channels)} channels")

    def _repeat(self, tau: Tensor) -> Tensor:
        """[..., K] -> [..., C]."""
        return torch.cat([tau[..., k : k + 1].expand(*tau.shape[:-1], c) for k, c in enumerate(self.channels)], -1)

    def _moments(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """C = Cov x and G = Cov(u, x), both [..., C, C] float64."""
        t = self._repeat(tau.to(torch.float64))
        state = t[..., :, None] * self.cov * t[..., None, :] + torch.diag_embed((1 - t).square())
        return state, self.cov * t[..., None, :] - torch.diag_embed(1 - t)

    def matrix(self, tau: Tensor) -> Tensor:
        """G C^-1: tau [..., K] -> [..., C, C] float64, differentiable."""
        state, cross = self._moments(tau)
        return torch.linalg.solve(state, cross.mT).mT

    def velocity(self, x: Tensor, tau: Tensor, y: Tensor | None = None) -> Tensor:
        """v*(x, tau): x [B, C, H, W], tau [B, K] -> [B, C, H, W] in x's dtype; labels are ignored."""
        return torch.einsum("bij,bjhw->bihw", self.matrix(tau), x.to(torch.float64)).to(x.dtype)

    def errors(self, tau: Tensor) -> Tensor:
        """l_k(tau), the mean squared error of v* for each representation: [..., K] -> [..., K] float64."""
        state, cross = self._moments(tau)
        explained = (torch.linalg.solve(state, cross.mT) * cross.mT).sum(-2)  # diagonal of G C^-1 G^T
        left = torch.diagonal(self.cov) + 1 - explained
        return torch.stack([part.mean(-1) for part in left.split(self.channels, dim=-1)], -1)

    def posterior(self, tau: Tensor) -> Tensor:
        """Cov(z | x) = S - S T C^-1 T S: [..., K] -> [..., C, C]."""
        state, _ = self._moments(tau)
        known = self._repeat(tau.to(torch.float64))[..., :, None] * self.cov  # T S
        return self.cov - known.mT @ torch.linalg.solve(state, known)

    def curl(self, tau: Tensor, i: int, j: int, lam: Sequence[float], density: Density) -> Tensor:
        """``d_i P_j - d_j P_i`` of ``P_k = lam_k rho l_k`` in closed form: [..., K] -> [...].

        Defined inside the cube; positive means that j before i is cheaper.
        """
        ends = torch.tensor([0, *self.channels]).cumsum(0).tolist()
        block = self.posterior(tau)[..., ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
        ti, tj = tau[..., i].to(torch.float64), tau[..., j].to(torch.float64)
        pull = [lam[k] / self.channels[k] * density.pdf(t) * (1 - t) / t for k, t in ((i, ti), (j, tj))]
        size = 2 * block.square().sum((-2, -1)) * ti * tj / ((1 - ti) * (1 - tj)) ** 3
        return size * (pull[0] - pull[1])

    def sample(self, count: int, generator: torch.Generator, grid: int = 1) -> Tensor:
        """z ~ N(0, S), float64 [count, C, grid, grid]."""
        white = torch.randn(count, len(self.cov), grid, grid, generator=generator, dtype=torch.float64)
        return torch.einsum("ij,bjhw->bihw", torch.linalg.cholesky(self.cov), white)

    def generated_cov(self, schedule: Schedule, grid: Tensor, method: str = "heun") -> Tensor:
        """Covariance [C, C] of what the sampler generates with v* along a schedule; S in the limit of fine grids.

        The flow is linear, so the C unit vectors are pushed through the integrator itself.
        """
        units = torch.eye(len(self.cov), dtype=torch.float64)[:, :, None, None]
        labels = torch.zeros(len(units), dtype=torch.int64)
        flow = integrate(self.velocity, schedule, units, labels, grid, method, channels=self.channels)[:, :, 0, 0].T
        return flow @ flow.T
