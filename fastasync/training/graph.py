"""A training step, or a pass of sampling, as a CUDA graph: where launching kernels takes time that running them does
not hide.

Everything that the device does in a step is recorded once and replayed.  What changes from step to step reaches it
through fixed memory: the batch, the times (drawn on the CPU), the learning rate, and the step number, from which the
kernels draw their noise.

A recording keeps the memory of a whole step for itself.  So ``train.cuda_graph=auto`` records what gains by it (small
networks, fp8 with its many short kernels, and between the two what a look at one step shows to be bound by launches)
after the first steps, if the memory that they were seen to need is free with a quarter to spare.  Where a recording
runs out of memory all the same, steps go on as they were.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from fastasync_kernels._timing import out_of_memory
from torch import Tensor

from fastasync.config import Train
from fastasync.errors import UserError
from fastasync.optim import EmaInterface, FusedAdamW, library

WARM_UP = 3  # steps before the recording: compilation, autotuning, the optimizer's state
# FLOPs of a step, or of one part of an accumulated one, which has as many launches:
LAUNCH_BOUND = 2e13  # below which `auto` records it: S's is 40 % shorter so, B's (3.8e13) is not
MAYBE_BOUND = 1e14  # below which `auto` looks at a step: XL's at batch 64 is 4.6e13, at 256 1.9e14
HIDDEN = 0.1  # of a step is left to the device when all is launched: less than that, and launches bind it
SPARE = 1.25  # free memory that `auto` wants, in units of what a step needs: other work remains, and fragments
_NEEDS = "needs a CUDA device and the compiled AdamW (train.optimizer=fused, built with nvcc); use off or auto"
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What one part of a step's batch needs on the device: latents, labels, local times, weights, REPA's features."""

    z: Tensor
    y: Tensor
    tau: Tensor
    weight: Tensor
    features: Tensor | None = None


StepFunction = Callable[[int | Tensor, Sequence[Part]], tuple[Tensor, ...]]


def launch_bound(choice: str, flops: float, bound: float) -> bool:
    """Whether ``train.cuda_graph`` = ``choice`` asks for a recording: ``on``, or ``auto`` below ``bound``."""
    return choice == "on" or (choice == "auto" and flops < bound)


def wants_graph(choice: str, device: torch.device, optimizer: EmaInterface, part_flops: float, precision: str) -> bool:
    """Whether a run's steps may be recorded: ``choice`` is ``off``, ``on``, or ``auto`` (small steps, and fp8).

    Those of ``auto`` that are not certain to gain (``to_be_watched``) are looked at first.

    Raises UserError for ``on`` without CUDA or without the compiled optimizer: the others read numbers on the host.
    """
    possible = device.type == "cuda" and isinstance(optimizer, FusedAdamW) and optimizer.backend == "cuda"
    if choice == "on" and not possible:
        raise UserError("train.cuda_graph", choice, _NEEDS)
    return possible and (launch_bound(choice, part_flops, MAYBE_BOUND) or (choice == "auto" and precision == "fp8"))


def ranks_may_record(train: Train) -> bool:
    """Whether steps of several ranks may be recorded where ``wants_graph``: ZeRO 1's, by ``auto`` only without settings
    of DeepSpeed's, which may ask for what only its engine does."""
    return train.zero == 1 and (train.cuda_graph == "on" or not train.deepspeed_config)


def check_recording(choice: str, device: torch.device, optimizer: str) -> None:
    """Raises UserError, before there is anything to record, for what ``wants_graph`` will refuse."""
    if choice != "on":
        return
    if device.type != "cuda" or optimizer not in ("auto", "fused") or library.load("cuda") is None:
        raise UserError("train.cuda_graph", choice, _NEEDS)


def to_be_watched(choice: str, part_flops: float, precision: str) -> bool:
    """Whether a step has to show that launches bind it before it is recorded."""
    return choice == "auto" and part_flops >= LAUNCH_BOUND and precision != "fp8"


def watched(run: Callable[[], T], wait: Callable[[], None]) -> tuple[T, float]:
    """What ``run`` returns, run alone on the device, and the share of its time that the device still works when the
    host has launched everything; ``wait``: for the device."""
    wait()
    start = time.perf_counter()
    out = run()
    launched = time.perf_counter() - start
    wait()
    return out, 1 - launched / (time.perf_counter() - start)


def gains(hidden: float, what: str, section: str) -> bool:
    """Whether launches bind what left the device ``hidden`` of its time (``watched``); the log says so."""
    said = f"when all of one is launched, {hidden:.0%} of its time is left"
    if hidden >= HIDDEN:
        _log.info("%s are not recorded: %s (%s.cuda_graph=on records all the same)", what, said, section)
        return False
    _log.info("launches bind %s: %s", what, said)
    return True


class Memory(NamedTuple):
    """Bytes of a device: what a step needs besides what stays (at most), and what is free between two steps."""

    needed: int
    free: int

    @property
    def enough(self) -> bool:
        """Whether a recording has room."""
        return self.free >= SPARE * self.needed


def measured_memory(device: torch.device) -> Memory:
    """``Memory`` as the last step before has shown it; what the allocator only holds in reserve counts as free."""
    stays = torch.cuda.memory_allocated(device)
    reserve = torch.cuda.memory_reserved(device) - stays
    return Memory(torch.cuda.max_memory_allocated(device) - stays, torch.cuda.mem_get_info(device)[0] + reserve)


class GraphedStep:
    """Calls ``function(step, parts)``: as it is for the first steps, which are real ones, then from a recording.

    ``function`` must do the same work at every step, wait for nothing, and depend on what changes only through its
    arguments (shapes are fixed).  The returned tensors are overwritten by the next call.

    It is not recorded where a recording runs out of memory; ``undo`` is called then, and must take back what the host
    remembers of a call that ended half way (gradients).  With ``careful`` it is not even tried unless
    ``measured_memory`` is enough, with ``watch`` unless launching the last step before took nearly all of its time.
    ``before`` is called before it is recorded, to take ``beside`` bytes that a recording must leave.
    """

    def __init__(
        self,
        function: StepFunction,
        device: torch.device,
        undo: Callable[[], None] = lambda: None,
        careful: bool = False,
        watch: bool = False,
        before: Callable[[], None] = lambda: None,
        beside: int = 0,
    ):
        self._function, self._device, self._undo = function, device, undo
        self._careful, self._watch = careful, watch
        self._before, self._beside = before, beside
        self._calls = 0
        self._hidden = 1.0  # the share of the step that was watched in which all had been launched
        self.refused = False  # steps go on as they are: there is no use in this object any more
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._parts: list[Part] = []
        self._replay: Callable[[], tuple[Tensor, ...]] | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def replays(self) -> bool:
        """Whether calls are replayed."""
        return self._replay is not None

    def __call__(self, step: int, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        self._step.fill_(step)
        self._calls += 1
        if self._calls == WARM_UP and self._careful:
            self._forget_peak()
        if self._calls == WARM_UP + 1:
            self._replay = self._recording(parts)
            self.refused = self._replay is None
        elif self._replay is not None:
            for fixed, part in zip(self._parts, parts, strict=True):
                for target, value in zip(fixed, part):
                    if target is not None and value is not None:
                        target.copy_(value)
        if self._replay is not None:
            return self._replay()
        if self._calls == WARM_UP and self._watch:
            out, self._hidden = watched(lambda: self._aside(lambda: self._function(self._step, parts)), self._wait)
            return out
        return self._aside(lambda: self._function(self._step, parts))

    def _recording(self, parts: Sequence[Part]) -> Callable[[], tuple[Tensor, ...]] | None:
        """What replays a step, recorded on copies of ``parts``; None where it gains nothing or has no room."""
        if self._watch and not gains(self._hidden, "steps", "train"):
            return None
        if self._careful:
            memory = self._memory()
            memory = memory._replace(needed=memory.needed + self._beside)
            said = f"a step needs up to {memory.needed / 2**30:.1f} GiB, {memory.free / 2**30:.1f} GiB are free"
            if not memory.enough:
                _log.info("steps are not recorded: %s (train.cuda_graph=on records all the same)", said)
                return None
            _log.info("steps are recorded as a CUDA graph: %s", said)
        fixed = [[None if value is None else value.clone() for value in part] for part in parts]
        self._parts = [Part(*values) for values in fixed]  # type: ignore[arg-type]
        replay = unless_out_of_memory(self._make)
        if replay is not None:
            return replay
        self._parts = []
        self._undo()
        self._release()
        _log.warning("steps are not recorded: a recording ran out of memory (train.cuda_graph=off does not try)")
        return None

    def _make(self) -> Callable[[], tuple[Tensor, ...]]:
        self._before()
        return self._record(lambda: self._function(self._step, self._parts))

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()  # other streams' work (a loader's) is not a step's

    def _forget_peak(self) -> None:
        """The peak until now is of compiling and measuring, or of other work: one more step will show a step's own."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def _memory(self) -> Memory:
        return measured_memory(self._device)

    def _release(self) -> None:
        """Give back what a recording that failed has held."""
        gc.collect()
        torch.cuda.empty_cache()

    def _aside(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run on a side stream, as a recording will: gradients remember the stream that they were first made on."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # one: the allocator keeps memory for each stream apart
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            out = run()
        here.wait_stream(self._stream)
        for tensor in out:
            tensor.record_stream(here)
        return out

    def _record(self, run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        return record(run, self._device)


def record(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """What replays ``run`` on the memory that it was recorded with; records, and runs nothing."""
    graph = torch.cuda.CUDAGraph()
    # what the garbage collector ends (an older recording, say) may call the device, which would end this recording
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        # a loader's thread may use CUDA meanwhile.  The outer context: a recording that cannot even be ended would
        # leave its stream the current one
        here = torch.cuda.stream(torch.cuda.current_stream(device))
        with here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()
    finally:
        if collecting:
            gc.enable()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return out

    return replay


def unless_out_of_memory(make: Callable[[], T]) -> T | None:
    """What ``make`` returns, or None where the memory ends.  What it held is free then: no handler keeps it alive."""
    try:
        return make()
    except RuntimeError as error:
        if out_of_memory(error) is None:
            raise
    return None


def wants_forward_graph(choice: str, device: torch.device) -> bool:
    """Whether passes of sampling (``sample.cuda_graph``) may be recorded: ``on``, or ``auto``, which watches one first.

    Raises UserError for ``on`` without CUDA.
    """
    if choice == "on" and device.type != "cuda":
        raise UserError("sample.cuda_graph", choice, f"needs a CUDA device, this is {device.type}: use off or auto")
    return choice != "off" and device.type == "cuda"


class GraphedForward:
    """Calls ``function(x, tau, y)``; the first shape that has come ``WARM_UP`` times is replayed from a recording.

    Other shapes (the last batch is smaller) run as they are, and so do all where a recording runs out of memory.  With
    ``watch`` a shape is passed over whose last pass before was not spent on launching, nearly all of it.
    ``function`` must depend on nothing but its arguments and weights that stay.  What is returned is the caller's.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, watch: bool = False):
        self._function, self._device, self._watch = function, device, watch
        self._seen: Counter[Hashable] = Counter()
        self._hidden: dict[Hashable, float] = {}  # the share of a watched pass in which all had been launched
        self._recorded: Hashable = None  # the key of what is recorded
        self._fixed: tuple[Tensor, ...] = ()
        self._replay: Callable[[], tuple[Tensor, ...]] | None = None
        self._tried = False

    @property
    def replays(self) -> bool:
        """Whether one shape's calls are replayed."""
        return self._replay is not None

    def __call__(self, x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
        arguments = (x, tau, y)
        key = tuple((each.shape, each.dtype, each.device) for each in arguments)
        due = not self._tried and self._seen[key] == WARM_UP
        if due and (not self._watch or gains(self._hidden.get(key, 1.0), "passes", "sample")):
            self._tried = True
            self._replay = self._recording(arguments)
            self._recorded = key if self._replay else None
        if self._replay is None or key != self._recorded:
            self._seen[key] += 1
            if self._watch and not self._tried and self._seen[key] == WARM_UP:
                out, self._hidden[key] = watched(lambda: self._function(*arguments), self._wait)
                return out
            return self._function(*arguments)
        for target, value in zip(self._fixed, arguments):
            target.copy_(value)
        return self._replay()[0].clone()

    def _recording(self, arguments: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]] | None:
        self._fixed = tuple(each.clone() for each in arguments)
        replay = unless_out_of_memory(lambda: self._record(lambda: (self._function(*self._fixed),)))
        if replay is not None:
            return replay
        self._fixed = ()
        gc.collect()
        torch.cuda.empty_cache()
        _log.warning("passes are not recorded: a recording ran out of memory (sample.cuda_graph=off does not try)")
        return None

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def _record(self, run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        with torch.no_grad():
            return record(run, self._device)
