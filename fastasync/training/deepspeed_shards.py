"""The reduction and the update of ZeRO 1 and 2 in as few passes as there can be, on the layout that DeepSpeed makes.

DeepSpeed holds each group's weights in one flat tensor, of which every rank owns an equal part (its shard).  What it
does between the backward pass and the next step reads and writes all gradients five times, and sums them on every rank
although each needs its own part.  Here, of a parameter's gradient,

    ZeRO 1: one copy into a flat tensor as all gradients are there, one reduce-scatter into the shard
    ZeRO 2: one copy in the backward pass, bucket by bucket, and a reduction to the rank that owns it

then the update and one all-gather of the weights.  Sums are float32 whatever the gradients are; that they are to be
means is left to the update, which scales gradients anyway.  Groups may differ in dtype: the weights of one in bf16
(`build.use_working_weights`) halve its all-gather.  To go on with the backward pass while a bucket is reduced gained
nothing (bench/NOTES.md): the products have fewer multiprocessors then.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from fastasync.errors import UserError

# methods of DeepSpeed's optimizer that ZeRO 2 replaces, and what they work on
_COLLECTING = ("process_gradients", "overlapping_partition_gradients_reduce_epilogue")
BUCKET = 2**26  # parameters whose gradients ZeRO 2 collects before it reduces them


@contextmanager
def whole_packs() -> Iterator[None]:
    """Let DeepSpeed lay out shards of whole 16 bytes here: NCCL copies what begins elsewhere number by number."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    flatten = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = lambda self, tensors, alignment, **options: flatten(
        self, tensors, 4 * alignment, **options
    )
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = flatten


class _Place(NamedTuple):
    """Where a parameter lies: its group, and its first number in the group's flat tensor."""

    group: int
    start: int


class Shards:
    """Takes over from ``sharded``, DeepSpeed's optimizer of ZeRO 1 or 2 of ``world`` ranks, this one being ``rank``.

    ``update`` updates this rank's shards from their gradients, which are sums over the ranks.
    """

    def __init__(self, sharded: Any, stage: int, world: int, rank: int, update: Callable[[], None]):
        replaced = ["reduce_gradients"] if stage == 1 else _COLLECTING
        missing = [name for name in (*replaced, "step", "bit16_groups_flat") if not hasattr(sharded, name)]
        if missing:
            remedy = f"its optimizer of ZeRO {stage} has no {', '.join(missing)}: pip install 'fastasync[deepspeed]'"
            raise UserError("package deepspeed", importlib.metadata.version("deepspeed"), remedy)
        self._sharded, self._world, self._rank, self._update = sharded, world, rank, update
        self._stage = stage
        self._places: dict[nn.Parameter, _Place] = {}
        for group, params in enumerate(sharded.bit16_groups):
            start = 0
            for p in params:
                self._places[p] = _Place(group, start)
                start += p.numel()
        self._shards: list[Tensor | None] = [None] * len(sharded.bit16_groups)
        self._kept: list[tuple[Tensor, Tensor]] = []  # ZeRO 1: what all gradients and a shard's sums fill
        self._waiting: list[nn.Parameter] = []  # ZeRO 2: with a gradient that is not reduced yet
        self._reduced: set[nn.Parameter] = set()  # ZeRO 2: since the last update
        if stage == 1:
            sharded.reduce_gradients = self.reduce
        else:
            sharded.process_gradients = self._collect
            sharded.overlapping_partition_gradients_reduce_epilogue = self._reduce_waiting
        sharded.step = self._step

    def keep(self, kept: bool = True) -> None:
        """ZeRO 1: take the memory of a reduction now, for good, or give it back."""
        self._kept = [self._room(group) for group in range(len(self._shards))] if kept else []

    @property
    def kept_bytes(self) -> int:
        """What ``keep`` takes."""
        numbers = sum(self._flat(group).numel() for group in range(len(self._shards)))
        return 4 * numbers if self._world == 1 else 4 * numbers + 4 * numbers // self._world

    def _room(self, group: int) -> tuple[Tensor, Tensor]:
        whole = torch.empty_like(self._flat(group), dtype=torch.float32)
        return whole, whole if self._world == 1 else whole.new_empty(whole.numel() // self._world)

    @torch.no_grad()
    def reduce(self, pipeline_parallel: bool = False) -> None:
        """ZeRO 1: sum all gradients of a step."""
        for group, params in enumerate(self._sharded.bit16_groups):
            whole, shard = self._kept[group] if self._kept else self._room(group)
            used = sum(p.numel() for p in params)
            _fill(whole[:used].split([p.numel() for p in params]), [p.grad for p in params])
            whole[used:].zero_()
            for p in params:
                p.grad = None
            self._shards[group] = shard
            if self._world > 1:
                distributed.reduce_scatter_tensor(shard, whole)

    def _collect(self, p: nn.Parameter, group: int) -> None:
        """ZeRO 2: the gradient of one parameter is there."""
        self._waiting.append(p)
        if sum(each.numel() for each in self._waiting) >= BUCKET:
            self._reduce_waiting()

    @torch.no_grad()
    def _reduce_waiting(self) -> None:
        """ZeRO 2: sum what was collected on the ranks that own it.  All ranks collect in the same order."""
        waiting, self._waiting = sorted(self._waiting, key=self._places.__getitem__), []
        for run in self._runs(waiting):
            (group, start), last = self._places[run[0]], run[-1]
            stop = self._places[last].start + last.numel()
            size = self._flat(group).numel() // self._world
            first = not self._reduced.intersection(run)
            for owner in range(start // size, (stop - 1) // size + 1):
                low, high = max(start, owner * size), min(stop, (owner + 1) * size)
                part = self._shard(group)[low - owner * size : high - owner * size] if owner == self._rank else None
                total = part if part is not None and first else torch.empty(high - low, device=run[0].device)
                sizes, grads = [], []
                for p in run:
                    begin = self._places[p].start
                    a, b = max(low - begin, 0), min(high - begin, p.numel())
                    if a < b:
                        sizes.append(b - a)
                        grads.append(None if p.grad is None else p.grad.reshape(-1)[a:b])
                _fill(total.split(sizes), grads)
                if self._world > 1:
                    distributed.reduce(total, owner)
                if part is not None and not first:
                    part.add_(total)
        for p in waiting:
            p.grad = None
        self._reduced.update(waiting)

    def _runs(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Sorted parameters in lists of neighbours: without gaps, of one group, all reduced before or none of them."""
        runs: list[list[nn.Parameter]] = []
        for p in params:
            place = self._places[p]
            if runs:
                last = runs[-1][-1]
                group, start = self._places[last]
                follows = place == (group, start + last.numel()) and (last in self._reduced) == (p in self._reduced)
                if follows:
                    runs[-1].append(p)
                    continue
            runs.append([p])
        return runs

    def _step(self) -> None:
        """Update this rank's shards, and send the weights to all."""
        sharded = self._sharded
        if any(shard is None for shard in self._shards) if self._stage == 1 else not self._reduced:
            raise RuntimeError("DeepSpeed has not handed over any gradient since the last update")
        masters = sharded.single_partition_of_fp32_groups
        for group, master in enumerate(masters):
            master.grad = self._shard(group)
        self._update()
        self._shards = [None] * len(masters)
        self._reduced.clear()
        for master, parts, flat in zip(masters, sharded.parallel_partitioned_bit16_groups, sharded.bit16_groups_flat):
            master.grad = None
            parts[self._rank].copy_(master.detach())  # nothing where they are the same memory
            if self._world > 1:
                distributed.all_gather_into_tensor(flat, parts[self._rank])

    def _flat(self, group: int) -> Tensor:
        flat: Tensor = self._sharded.bit16_groups_flat[group]
        return flat

    def _shard(self, group: int) -> Tensor:
        """The sums that this rank owns; zero where no gradient was."""
        shard = self._shards[group]
        if shard is None:
            flat = self._flat(group)
            shard = self._shards[group] = torch.zeros(flat.numel() // self._world, device=flat.device)
        return shard


def _fill(parts: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Copy flat gradients into the parts of a float32 tensor, zeros for those that are None."""
    given = [(part, grad.reshape(-1)) for part, grad in zip(parts, grads) if grad is not None]
    if given:
        torch._foreach_copy_([part for part, _ in given], [grad for _, grad in given])
    missing = [part for part, grad in zip(parts, grads) if grad is None]
    if missing:
        torch._foreach_zero_(missing)
