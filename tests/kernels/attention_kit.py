"""What the tests of our attention kernels share: inputs in the model's memory order, a run with gradients."""

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAMES = ["out", "dq", "dk", "dv"]


def draw(shape, dtype=torch.float32, seed=0, scale=1.0):
    """q, k in memory order B, N, heads, Dh and v a slice of a packed tensor, as qknorm_rope returns them; dout."""
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)
    packed = scale * torch.randn(batch, tokens, 3, heads, width, generator=generator)
    q, k, v = (part.transpose(1, 2) for part in packed.to(DEVICE, dtype).unbind(2))
    upstream = torch.randn(batch, tokens, heads, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    return (q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2), v), upstream


def run(function, tensors, upstream, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def same_precision(q, k, v):
    """The formula with every step in the tensors' own dtype."""
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def orders(t):
    """The same values in other memory orders with a contiguous last axis."""
    batch, heads, tokens, width = t.shape
    yield t.contiguous()
    yield t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # N, B, heads, Dh
    wide = t.new_full((batch, heads, tokens + 2, width + 3), torch.nan)
    wide[:, :, 1:-1, 2:-1] = t
    yield wide[:, :, 1:-1, 2:-1]


def check_differences(kernel, shape):
    """Gradients against (f(x + e d) - f(x - e d)) / 2 e in random directions d, f in fp64: independent of autograd."""
    tensors, upstream = draw(shape, seed=2)
    generator = torch.Generator().manual_seed(3)
    for index, gradient in enumerate(run(kernel, tensors, upstream)[1:]):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        ends = []
        for step in (1e-4, -1e-4):
            moved = [t.double() for t in tensors]
            moved[index] = moved[index] + step * direction
            ends.append(float((same_precision(*moved) * upstream).sum()))
        expected = (ends[0] - ends[1]) / 2e-4
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4)
