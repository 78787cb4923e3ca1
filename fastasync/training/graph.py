"""One training step as a CUDA graph: a network so small that launching its kernels takes longer than running them.

Everything that the device does in a step is recorded once and replayed.  What changes from step to step reaches it
through fixed memory: the batch, the times (drawn on the CPU), the learning rate, and the step number, from which the
kernels draw their noise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastasync.errors import UserError
from fastasync.optim import EmaInterface, FusedAdamW

WARM_UP = 3  # steps before the recording: compilation, autotuning, the optimizer's state
LAUNCH_BOUND = 5e12  # FLOPs of a step below which `auto` records it: a few milliseconds of work on a large GPU


class Part(NamedTuple):
    """What one part of a step's batch needs on the device: latents, labels, local times, weights, REPA's features."""

    z: Tensor
    y: Tensor
    tau: Tensor
    weight: Tensor
    features: Tensor | None = None


StepFunction = Callable[[int | Tensor, Sequence[Part]], tuple[Tensor, ...]]


def launch_bound(choice: str, step_flops: float) -> bool:
    """Whether ``train.cuda_graph`` = ``choice`` asks for a recording of steps of so many FLOPs."""
    return choice == "on" or (choice == "auto" and step_flops < LAUNCH_BOUND)


def wants_graph(choice: str, device: torch.device, optimizer: EmaInterface, step_flops: float) -> bool:
    """Whether a run's steps are recorded: ``choice`` is ``off``, ``on``, or ``auto`` (small steps, where it can be).

    Raises UserError for ``on`` without CUDA or without the compiled optimizer: the others read numbers on the host.
    """
    possible = device.type == "cuda" and isinstance(optimizer, FusedAdamW) and optimizer.backend == "cuda"
    if choice == "on" and not possible:
        remedy = "needs a CUDA device and the compiled AdamW (train.optimizer=fused, built with nvcc); use off or auto"
        raise UserError("train.cuda_graph", choice, remedy)
    return possible and launch_bound(choice, step_flops)


class GraphedStep:
    """Calls ``function(step, parts)``: as it is for the first steps, which are real ones, then from a recording.

    ``function`` must do the same work at every step, wait for nothing, and depend on what changes only through its
    arguments (shapes are fixed).  The returned tensors are overwritten by the next call.
    """

    def __init__(self, function: StepFunction, device: torch.device):
        self._function, self._device, self._calls = function, device, 0
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._parts: list[Part] = []
        self._replay: Callable[[], tuple[Tensor, ...]] | None = None

    def __call__(self, step: int, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        self._step.fill_(step)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._aside(lambda: self._function(self._step, parts))
        if self._replay is None:
            self._parts = [Part(*(None if value is None else value.clone() for value in part)) for part in parts]  # type: ignore[arg-type]
            self._replay = self._record(lambda: self._function(self._step, self._parts))
        else:
            for fixed, part in zip(self._parts, parts, strict=True):
                for target, value in zip(fixed, part):
                    if target is not None and value is not None:
                        target.copy_(value)
        return self._replay()

    def _aside(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run on a side stream, as a recording will: gradients remember the stream that they were first made on."""
        here, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            out = run()
        here.wait_stream(aside)
        for tensor in out:
            tensor.record_stream(here)
        return out

    def _record(self, run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        # what the garbage collector ends (an older recording, say) may call the device, which would end this recording
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            # records, and runs nothing; a loader's thread may use CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = run()
        finally:
            if collecting:
                gc.enable()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return out

        return replay
