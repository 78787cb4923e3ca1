"""The probe network: trained with independent local times, it can sample along any schedule, and be scored on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fastasync_kernels
import torch
from fastasync_kernels.reference import philox_uniform
from torch import Tensor, nn
from tqdm import tqdm

from fastasync.compat import shorten_compiler_messages
from fastasync.config import Config
from fastasync.data import Latents, batch_indices, draw_flips
from fastasync.data.verify import damage
from fastasync.densities import Density
from fastasync.errors import UserError
from fastasync.model import LightningDiT, train_flops
from fastasync.objective import TIME_STREAM, times_of
from fastasync.probe.resume import Progress
from fastasync.schedule import Schedule
from fastasync.training.graph import GraphedStep, Part, launch_bound

CLIP = 1.0  # largest gradient norm
WARMUP = 0.05  # of the steps, linear; then the rate falls to zero along a cosine
RECORDED = 5e12  # FLOPs of a step below which it is recorded and not compiled (ImageNet's takes 9e12, cifar10's 9e10)
EVALUATION_STEP = 2**31  # steps from here on key the noise of evaluations: never that of a training step


class Errors(NamedTuple):
    """Per-sample errors [N, K] at local times [N, K], float32 on the CPU: what a loss surface is fitted to."""

    tau: Tensor
    errors: Tensor


def build_probe(config: Config, device: torch.device | str) -> LightningDiT:
    """The probe network of ``config.probe``, initialised from its seed alone."""
    probe, reps = config.probe, config.representations
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(probe.seed)
        model = LightningDiT(
            channels=reps.channels,
            names=reps.names,
            grid=reps.grid,
            classes=config.model.classes,
            depth=probe.depth,
            width=probe.width,
            heads=probe.heads,
            patch=config.model.patch,
            mlp_multiple=config.model.mlp_multiple,
            kernels=config.model.kernels,
            attention=config.model.attention,
        )
    return model.to(device)


def independent_times(count: int, total: int, seed: int, step: int) -> Tensor:
    """K independent uniform local times for a batch of ``total``: float64 [total, count], a Latin hypercube.

    Each coordinate has one time in each of ``total`` equal cells, in an order drawn for it; a pure function of
    (seed, step).
    """
    words = philox_uniform(seed, step, torch.arange(total), 2 * count, stream=TIME_STREAM).to(torch.float64)
    cell = words[:, count:].argsort(0).argsort(0)
    return (cell + words[:, :count]) / total


class PathTimes:
    """Times along a family of schedules: each sample of a batch on one of them, its times drawn as training draws them.

    ``times(step)`` -> local times and weights, float64 [total, K] each: with them the probe's loss is the corrected
    objective (mixture proposal) averaged over the family.  A share ``independent`` of the samples has independent
    uniform times and weight 1 instead.  A pure function of (seed, step); drawn for ``block`` steps at once, as
    inverting a schedule for many costs about as much as for one.
    """

    def __init__(
        self,
        family: Sequence[Schedule],
        density: Density,
        total: int,
        seed: int,
        independent: float = 0.0,
        block: int = 32,
    ):
        self.family, self.density, self.total, self.seed, self.block = family, density, total, seed, block
        self.independent = round(independent * total)
        self._first, self._drawn = -1, (torch.empty(0), torch.empty(0))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        first = step - step % self.block
        if first != self._first:
            self._first, self._drawn = first, self._draw(first)
        rows = slice((step - first) * self.total, (step - first + 1) * self.total)
        return self._drawn[0][rows], self._drawn[1][rows]

    def _draw(self, first: int) -> tuple[Tensor, Tensor]:
        steps = (first + torch.arange(self.block)).repeat_interleave(self.total)[:, None]
        samples = torch.arange(self.total).repeat(self.block)
        words = philox_uniform(self.seed, steps, samples, 2, stream=TIME_STREAM).to(torch.float64)
        u = (samples.to(torch.float64) + words[:, 0]) / self.total  # one in each of ``total`` cells
        order = words[:, 1].reshape(self.block, self.total).argsort(1).argsort(1).reshape(-1)
        # paths dealt evenly, in an order of its own for every step; -1: none
        member = torch.where(order < self.independent, -1, order % len(self.family))
        tau = torch.empty(len(u), self.family[0].count, dtype=torch.float64)
        weight = torch.ones_like(tau)
        if self.independent:
            free = [independent_times(tau.shape[1], self.independent, self.seed, first + i) for i in range(self.block)]
            tau[member < 0] = torch.cat(free)
        for number, schedule in enumerate(self.family):
            chosen = member == number
            with torch.no_grad():
                times = times_of(u[chosen], schedule, self.density)
            tau[chosen], weight[chosen] = times.tau, times.weight
        return tau, weight


@contextmanager
def autocast(device: torch.device | str) -> Iterator[None]:
    """bf16 autocast on CUDA, nothing elsewhere."""
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        yield


class Trainer:
    """AdamW, a warm-up and cosine of the learning rate, gradient clipping and an EMA over about the last tenth.

    ``step(loss)`` after each backward-able loss; ``finish()`` puts the EMA into the model.
    """

    def __init__(self, model: nn.Module, lr: float, steps: int):
        self.model, self.steps, self.done = model, steps, 0
        self.weights: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.lr, self.warmup = lr, max(1, round(WARMUP * steps))
        # on CUDA everything that changes from step to step lies in memory, so that a step can be recorded
        cuda = self.weights[0].is_cuda
        rate: Any = torch.zeros((), device=self.weights[0].device) if cuda else 0.0
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda, capturable=cuda
        )

    def prepare(self) -> None:
        """Set this step's learning rate."""
        rest = min(max((self.done - self.warmup) / max(1, self.steps - self.warmup), 0.0), 1.0)
        rate = self.lr * min(1.0, (self.done + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * rest))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def update(self, loss: Tensor) -> None:
        """Gradients, clipping, AdamW: what the device does."""
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def average_weights(self) -> None:
        """The EMA takes in the updated weights."""
        self.done += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 9.0 / (self.done + 9.0))

    def step(self, loss: Tensor) -> None:
        self.prepare()
        self.update(loss)
        self.average_weights()

    def finish(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.average)

    def state(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, by name."""
        kept = {"done": torch.tensor(self.done)}
        for number, (weight, average) in enumerate(zip(self.weights, self.average)):
            kept |= {f"{number}.weight": weight.detach(), f"{number}.average": average}
            kept |= {f"{number}.adam.{name}": value for name, value in self.optimizer.state[weight].items()}
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take in what `state` gave, before the first step."""
        self.done = int(state["done"])
        with torch.no_grad():
            for number, (weight, average) in enumerate(zip(self.weights, self.average)):
                weight.copy_(state[f"{number}.weight"])
                average.copy_(state[f"{number}.average"])
                self.optimizer.state[weight] = adam_state(state, f"{number}.adam.", weight.device)


def adam_state(state: Mapping[str, Tensor], prefix: str, device: torch.device | str) -> dict[str, Tensor]:
    """The optimizer's tensors of one weight: those of ``state`` whose names begin with ``prefix``."""
    return {name.removeprefix(prefix): value.to(device) for name, value in state.items() if name.startswith(prefix)}


def training_batch(config: Config, latents: Latents, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Latents and labels of one of the probe's steps; pure in (probe.seed, step).

    Raises the UserError of a damaged shard, once their verification has found one.
    """
    if (error := damage(latents)) is not None:
        raise error
    probe = config.probe
    samples = torch.arange(probe.batch)
    flips = draw_flips(probe.seed, step, samples) if config.data.flip else None
    z, y = latents.batch(batch_indices(step, probe.batch, len(latents), probe.seed), flips)
    return z.to(device, non_blocking=True), y.to(device, non_blocking=True)


def drop_some(ops: Any, y: Tensor, config: Config, step: int | Tensor, samples: Tensor) -> Tensor:
    """Labels [B] with some replaced by the null class, for guidance; pure in (probe.seed, step, sample)."""
    return ops.drop_labels(y, config.model.classes, config.model.label_dropout, config.probe.seed, step, samples)


def check_finite(loss: float, step: int) -> None:
    """Raises UserError when the probe's loss is not a number any more."""
    if not loss < float("inf"):
        raise UserError("probe.lr", None, f"the probe's loss is {loss} at step {step}: use a smaller learning rate")


def is_recorded(config: Config, model: LightningDiT) -> bool:
    """Whether the probe's steps are recorded on CUDA: where compiling takes longer than a small probe's training."""
    return launch_bound(config.train.cuda_graph, train_flops(model) * config.probe.batch, RECORDED)


def surface_step(
    model: LightningDiT, trainer: Trainer, config: Config, device: torch.device | str
) -> Callable[[int, Sequence[Part]], tuple[Tensor]]:
    """What the device does in one of the probe's steps: (step, [latents, labels, local times]) -> the loss.

    On CUDA recorded where it is bound by launches, otherwise compiled unless ``train.compile`` is off.
    Raises UserError for a named attention backend that cannot run here or is wrong here.
    """
    channels, seed, batch = config.representations.channels, config.probe.seed, config.probe.batch
    ops = fastasync_kernels.select(config.model.kernels, device)
    network: Any = model
    cuda = torch.device(device).type == "cuda"
    if model.attention != "auto":  # a compiled network does not look at it again
        model.choose_attention(batch, torch.bfloat16 if cuda else torch.float32)
    recorded = cuda and is_recorded(config, model)
    if cuda and config.train.compile != "off" and not recorded:
        shorten_compiler_messages()
        network = torch.compile(model)
    samples = torch.arange(batch, device=device)

    def compute(step: int | Tensor, parts: Sequence[Part]) -> tuple[Tensor]:
        z, y, tau, weight = parts[0][:4]
        y = drop_some(ops, y, config, step, samples)
        with autocast(device):
            v = network(ops.noising(z, tau, channels, seed, step, samples), tau, y)
        loss = (ops.flow_errors(v, z, channels, seed, step, samples)[0] * weight).sum(1).mean()
        trainer.update(loss)
        return (loss.detach(),)

    if not recorded:
        return compute
    return GraphedStep(compute, torch.device(device), lambda: trainer.optimizer.zero_grad(set_to_none=True))  # type: ignore[return-value]


def train_surface_probe(
    model: LightningDiT,
    config: Config,
    latents: Latents,
    steps: int,
    device: torch.device | str,
    progress: bool = True,
    states: Progress | None = None,
    times: PathTimes | None = None,
) -> float:
    """Train ``model`` in place for ``steps`` steps of ``config.probe.batch`` at independent local times, or ``times``.

    The loss is the sum over representations of the mean squared error, weighted as ``times`` say.  The model ends with
    its EMA weights, in evaluation mode.  Same seed, same result on any CPU, also when it goes on from one of
    ``states``.  Returns the last loss.
    """
    probe, channels = config.probe, config.representations.channels
    trainer = Trainer(model.train(), probe.lr, steps)
    if states is not None and (kept := states.load()) is not None:
        trainer.restore(kept)
    run = surface_step(model, trainer, config, device)
    begin = trainer.done
    bar = tqdm(range(begin, steps), desc="probe", unit="step", initial=begin, total=steps, disable=not progress)
    value = float("nan")
    for step in bar:
        z, y = training_batch(config, latents, step, device)
        if times is None:
            tau = independent_times(len(channels), probe.batch, probe.seed, step)
            weight = torch.ones_like(tau)
        else:
            tau, weight = times(step)
        trainer.prepare()
        (loss,) = run(step, [Part(z, y, *(t.to(device, torch.float32) for t in (tau, weight)))])
        trainer.average_weights()
        if step % 20 == 0 or step == steps - 1:
            value = float(loss)
            check_finite(value, step)
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        if states is not None:
            states.save(trainer.state, step + 1)
    trainer.finish()
    model.eval()
    return value


@torch.no_grad()
def surface_errors(
    velocity: Any,
    latents: Latents,
    channels: Sequence[int],
    count: int,
    *,
    seed: int,
    batch: int,
    device: torch.device | str,
    ops: Any,
    progress: bool = True,
) -> Errors:
    """Per-sample errors of ``velocity(x, tau, y)`` on ``count`` draws with independent local times."""
    taus, errors = [], []
    batch = min(batch, len(latents))
    with tqdm(total=count, desc="surface", unit="img", disable=not progress) as bar:
        for number, start in enumerate(range(0, count, batch)):
            step, size = EVALUATION_STEP + number, min(batch, count - start)
            samples = torch.arange(size, device=device)
            z, y = latents.batch(batch_indices(number, batch, len(latents), seed)[:size])
            z, y = z.to(device), y.to(device)
            tau = independent_times(len(channels), size, seed, step)
            local = tau.to(device, torch.promote_types(z.dtype, torch.float32))
            v = velocity(ops.noising(z, local, channels, seed, step, samples), local, y)
            taus.append(tau.float())
            errors.append(ops.flow_errors(v, z, channels, seed, step, samples)[0].float().cpu())
            bar.update(size)
    return Errors(torch.cat(taus), torch.cat(errors))
