"""What the device does in a training step before the update; the loop, recorded steps and the benchmarks share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastasync.config import Config
from fastasync.objective import Objective, Times
from fastasync.training.build import choose_autocast
from fastasync.training.engine import Compute, Engine
from fastasync.training.graph import Part


def step_function(engine: Engine, config: Config, objective: Objective, ops: Any, samples: Sequence[Tensor]) -> Compute:
    """``compute(step, parts)``: forward and backward of every part of the batch.

    ``samples``: for each part the positions in the batch, integer on the device: with seed and step they key the noise
    and the label dropout.  ``compute`` returns the step's terms, float32 [1 + K + 2]: loss, errors, cosine, REPA.
    """
    dtype = choose_autocast(config.train.precision, engine.device)  # the network would round its input to it
    seed, null_class, rate = config.data.seed, config.model.classes, config.model.label_dropout

    def compute(step: int | Tensor, parts: Sequence[Part]) -> Tensor:
        sums = []
        for at_model, part in zip(samples, parts, strict=True):
            y = ops.drop_labels(part.y, null_class, rate, seed, step, at_model)
            times = Times(part.tau, part.tau, part.weight)  # the global time has done its work
            keys = {"seed": seed, "step": step, "samples": at_model}
            terms = objective(engine.forward, part.z, y, times, **keys, ops=ops, features=part.features, dtype=dtype)
            engine.backward(terms.total)
            values = (terms.total.detach()[None], terms.errors, terms.cosine[None], terms.repa[None])
            sums.append(torch.cat([value.to(torch.float32) for value in values]))
        return torch.stack(sums).mean(0)

    return compute
