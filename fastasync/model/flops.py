"""What a model costs: parameters, FLOPs and memory, from its shapes alone (a model on the meta device is enough).

Convention: one multiply-add is 2 FLOPs; every matrix product is counted (patch embedding, qkv, attention, projections,
MLP, adaLN, time MLPs, output layer, REPA projector), element-wise work and norms are not.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastasync.model.dit import REPA_HIDDEN, LightningDiT
from fastasync.model.recompute import kept_numbers

_ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}  # fp8 products still keep bf16 activations


def parameter_count(model: LightningDiT) -> int:
    """Number of parameters as the peers count them: all weights and the fixed position table, not the RoPE tables."""
    return sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()


def forward_flops(model: LightningDiT, repa: bool = False) -> int:
    """FLOPs of one image's forward pass; ``repa`` adds the projector, which only training runs."""
    tokens = (model.grid // model.patch) ** 2
    multiply_adds = tokens * model.x_embedder.proj.weight.numel()
    multiply_adds += model.depth * 2 * tokens * tokens * model.width  # q k^T and the product with v
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (repa or not name.startswith("repa_projector")):
            per_image = name.startswith("t_embedder") or ".adaLN_modulation." in name
            multiply_adds += (1 if per_image else tokens) * module.weight.numel()
    return 2 * multiply_adds


def train_flops(model: LightningDiT) -> int:
    """FLOPs of one image's training step: three forward passes (the backward pass counts twice), REPA if present."""
    return 3 * forward_flops(model, repa=model.repa_projector is not None)


class MemoryEstimate(NamedTuple):
    """Bytes on one device during training, by use."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def activation_memory(model: LightningDiT, batch: int, precision: str = "bf16", recompute: str = "none") -> int:
    """Estimated bytes that one training step keeps for its backward pass.

    Counts per token and block what a compiled block saves: 12 tensors of the width (two norm outputs, qkv as three,
    rotated q and k, the attention's output, two branches, two states of the residual stream) and 3 of the MLP's
    hidden width (2 where quack computes it); then the projector's.  An eager block saves more (the norms' float32
    copies).  Where blocks are ``recompute``d (fastasync.model.recompute) the one at work is counted in full.
    """
    tokens = (model.grid // model.patch) ** 2
    hidden = model.product_hidden
    numbers = model.depth * kept_numbers(recompute, model.width, hidden, model.chosen_mlp)
    if recompute != "none":
        numbers += kept_numbers("none", model.width, hidden, model.chosen_mlp)
    if model.repa_projector is not None:
        numbers += 4 * REPA_HIDDEN + model.width
    return batch * tokens * numbers * _ACTIVATION_BYTES[precision]


def memory_estimate(
    model: LightningDiT, batch: int, precision: str = "bf16", recompute: str = "none"
) -> MemoryEstimate:
    """Estimated memory of training on one device: float32 weights, gradients, two AdamW moments and EMA, activations.

    ``precision`` is ``fp32``, ``bf16`` or ``fp8``; the latter two add a bf16 copy of the weights.  (Where that copy is
    what is trained, its gradients are bf16 too, and 2 bytes a parameter less are needed than said here.)
    """
    count = parameter_count(model)
    copy = 0 if precision == "fp32" else 2 * count
    activations = activation_memory(model, batch, precision, recompute)
    return MemoryEstimate(4 * count + copy, 4 * count, 8 * count, 4 * count, activations)


class Zero(NamedTuple):
    """How a run divides what it holds: ZeRO's ``stage`` (0 to 3) among ``world`` devices.

    ``working``: in stages 1 and 2 the bf16 copy is what is trained (``build.use_working_weights``).
    """

    stage: int = 0
    world: int = 1
    working: bool = False


UNDIVIDED = Zero()


def memory_with_zero(estimate: MemoryEstimate, zero: Zero) -> int:
    """Bytes on each device; ``estimate`` is for one device's share of the batch.

    Stage 1 shards the optimizer's state (moments, EMA), 2 also the gradients, 3 also the weights.  Where working
    weights are trained the float32 weights are sharded too, and stage 1's gradients are bf16.  Between the backward
    pass and the update, when activations are gone, stage 1 holds its gradients in float32 besides.
    """
    stage, world, working = zero
    copy = estimate.weights - estimate.gradients  # bf16; the gradients are as large as the float32 weights
    if working and copy and stage in (1, 2):
        sharded = estimate.gradients + estimate.optimizer + estimate.ema
        if stage == 2:
            return estimate.activations + copy + (sharded + estimate.gradients) // world
        return estimate.activations + 2 * copy + sharded // world
    shard = [estimate.optimizer + estimate.ema, estimate.gradients, estimate.weights][:stage]
    return estimate.total - sum(shard) + sum(shard) // world
