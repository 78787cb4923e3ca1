"""A stand-in for recorded steps, on any device."""

from unittest import mock

import torch

from fastasync.model import LightningDiT
from fastasync.training.graph import GraphedStep, Memory


class Pretend(GraphedStep):
    """A recording that runs its function again, on the fixed memory, where a CUDA graph would replay it."""

    recorded = 0
    memory = Memory(100, 125)
    forgotten = 0  # the call before which the peak was

    def _forget_peak(self):
        self.forgotten = self._calls

    def _wait(self):
        pass

    def _memory(self):
        return self.memory

    def _aside(self, run):
        return run()

    def _record(self, run):
        type(self).recorded += 1
        return run


class Replayed(Pretend):
    """Of a function that changes nothing: a replay fills the recording's tensors, and the host has seen no gradient."""

    room = True
    memory = Memory(2**20, 2**21)

    def _record(self, run):
        super()._record(run)
        if not self.room:
            full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            with mock.patch.object(LightningDiT, "conditioning", side_effect=full):
                run()  # ends in the forward pass
        out = tuple(value.clone() for value in run())
        self._undo()

        def replay():
            for fixed, value in zip(out, run()):
                fixed.copy_(value)
            self._undo()
            return out

        return replay
