"""Every operation's gradients against differences of its fp64 formula, along random directions: no autograd between."""

import pytest
import torch
from fastasync_kernels import reference, selfcheck, triton_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a bias's values are not read by the operations that return its gradient: their differences say nothing
CASES = {name: case for name, case in selfcheck._cases(DEVICE).items() if "bias" not in name}
STEP = 1e-5
# inputs that have gradients, where not all do: a case detaches what has none in training
WITH_GRADIENTS = {"corrected_loss": [0], "guided_update": [0, 1, 2]}


def probe(output, generator):
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(DEVICE)


def loss(call, inputs):
    """The outputs' sum with random weights, by the reference in float64."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for output in call(reference, inputs):
        total += float((output * probe(output, generator)).sum())
    return total


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_differences_of_the_formula(name):
    inputs, call = CASES[name]
    inputs = [value.float().double() for value in inputs]
    leaves = [value.float().requires_grad_() for value in inputs]
    generator, total = torch.Generator().manual_seed(1), 0.0
    for output in call(triton_ops, leaves):
        total = total + (output.double() * probe(output, generator)).sum()
    total.backward()
    with_gradients = [index for index, leaf in enumerate(leaves) if leaf.grad is not None]
    assert with_gradients == WITH_GRADIENTS.get(name, list(range(len(leaves))))
    for index in with_gradients:
        leaf = leaves[index]
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        direction = direction.to(DEVICE)
        ends = [
            loss(call, [v + s * direction if i == index else v for i, v in enumerate(inputs)]) for s in (STEP, -STEP)
        ]
        expected = (ends[0] - ends[1]) / (2 * STEP)
        scale = float(leaf.grad.double().norm() * direction.norm())
        assert abs(float((leaf.grad.double() * direction).sum()) - expected) <= 1e-5 * scale
