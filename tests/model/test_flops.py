"""Costs against PyTorch's own counter and against published or measured figures."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastasync.model import (
    SIZES,
    LightningDiT,
    MemoryEstimate,
    Zero,
    forward_flops,
    memory_estimate,
    memory_with_zero,
    parameter_count,
    train_flops,
)


def xl() -> LightningDiT:
    with torch.device("meta"):
        size = SIZES["XL"]._asdict()
        return LightningDiT(
            channels=(32, 16), names=("texture", "semantic"), grid=16, classes=1000, repa_width=768, **size
        )


@pytest.mark.parametrize("repa", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forward_flops_against_torch(build, batch, count, patch, repa):
    model = build(count, patch=patch, repa_width=12)
    # the counter does not know the CPU's fused attention; the math backend is plain matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*batch(model, 2), return_repa=repa)
    assert 2 * forward_flops(model, repa) == counter.get_total_flops()


def test_train_flops_against_torch(build, batch):
    """The rule of three passes leaves out that nothing needs the gradient of the input: a little less is done."""
    model = build(2, repa_width=12, depth=6)
    x, tau, y = batch(model, 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        v, repa = model(x, tau, y, return_repa=True)
        (v.square().mean() + repa.square().mean()).backward()
    assert 0.97 < counter.get_total_flops() / (2 * train_flops(model)) <= 1
    assert train_flops(build(2)) == 3 * forward_flops(build(2))


def test_xl_flops_by_hand():
    """Dominated by 2 x 256 tokens x the block weights, plus 4 N^2 width of attention in each of 28 blocks."""
    width, tokens = 1152, 256
    blocks = 28 * (2 * tokens * (4 * width**2 + 3 * width * 3072) + 4 * tokens**2 * width + 12 * width**2)
    assert forward_flops(xl()) == pytest.approx(blocks, rel=0.002)


def test_memory_of_xl():
    """The measured peak of a compiled plain block at batch 256 in bf16, REPA on, is 96 to 100 GB."""
    estimate = memory_estimate(xl(), 256)
    count = parameter_count(xl())
    assert estimate.optimizer == 8 * count
    assert estimate.total == sum(
        (estimate.weights, estimate.gradients, estimate.optimizer, estimate.ema, estimate.activations)
    )
    assert 93e9 < estimate.total < 106e9
    assert memory_estimate(xl(), 128).activations * 2 == estimate.activations
    assert memory_estimate(xl(), 256, "fp32").activations == 2 * estimate.activations
    assert memory_estimate(xl(), 256, "fp32").weights == 4 * count


def test_zero_shards_what_its_stage_says():
    estimate = MemoryEstimate(weights=6, gradients=4, optimizer=8, ema=4, activations=10)
    assert [memory_with_zero(estimate, Zero(stage, 4)) for stage in range(4)] == [32, 23, 20, 15]
    assert memory_with_zero(estimate, Zero(3, 1)) == 32
    # bf16 weights and gradients; float32 weights, moments and EMA in four parts; stage 2: gradients in float32 too
    assert [memory_with_zero(estimate, Zero(stage, 4, working=True)) for stage in range(4)] == [
        32,
        10 + 4 + 4,
        10 + 2 + 5,
        15,
    ]


def test_memory_of_xl_under_zero():
    """Measured on two H200, 256 images each: 88.5 GiB (bench/results, scaling, 6188f95)."""
    assert memory_with_zero(memory_estimate(xl(), 256), Zero(1, 2, working=True)) / 2**30 == pytest.approx(
        88.5, rel=0.03
    )
