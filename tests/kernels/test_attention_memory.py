"""Where the inputs and the results of our attention kernels lie in memory, and which gradients are asked for."""

import pytest
import torch
from fastasync_kernels.medium_attention import medium_attention
from fastasync_kernels.short_attention import short_attention

from tests.kernels.attention_kit import DEVICE, all_equal, draw, orders, run


@pytest.fixture(params=[short_attention, medium_attention], ids=["short", "medium"])
def kernel(request):
    return request.param


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (3, 0, 5, 8)])
def test_empty_launches_nothing(kernel, shape):
    tensors, upstream = draw(shape, torch.float16)
    assert [t.shape for t in run(kernel, tensors, upstream)] == [shape] * 4


def test_the_memory_order_of_inputs_and_gradients_does_not_matter(kernel):
    tensors, upstream = draw((2, 3, 21, 20), torch.float16, seed=6)
    first = run(kernel, tensors, upstream)
    for same in zip(*map(orders, (*tensors, upstream))):
        leaves = [t.detach().requires_grad_() for t in same[:3]]
        out = kernel(*leaves)
        assert all_equal([out, *torch.autograd.grad(out, leaves, same[3])], first)
    packed = torch.stack(tensors, 0).permute(1, 3, 0, 2, 4).contiguous()  # B, N, 3, heads, Dh
    q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in packed.unbind(2))
    out = kernel(q, k, v)
    assert all_equal([out, *torch.autograd.grad(out, (q, k, v), upstream)], first)


def test_gradients_without_a_layout(kernel):
    """Broadcast over everything (a sum's), over the batch, or with another last axis."""
    tensors, upstream = draw((2, 2, 7, 8), torch.float16, seed=7)
    one = torch.ones((), device=DEVICE, dtype=torch.float16).expand(upstream.shape)
    swapped = upstream.transpose(-1, -2).contiguous().transpose(-1, -2)
    for gradient in (one, upstream[:1].expand(upstream.shape), swapped):
        expected = run(kernel, tensors, gradient.contiguous())
        assert all_equal(run(kernel, tensors, gradient), expected)


def test_output_and_gradients_lie_in_memory_as_the_projection_reads_them(kernel):
    tensors, upstream = draw((2, 3, 17, 8), torch.float16, seed=8)
    for result in run(kernel, tensors, upstream):
        assert result.transpose(1, 2).is_contiguous()
    out = kernel(*tensors)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_only_one_gradient_is_asked_for(kernel):
    (q, k, v), upstream = draw((1, 2, 6, 8), torch.float16, seed=11)
    leaf = k.detach().requires_grad_()
    (dk,) = torch.autograd.grad(kernel(q, leaf, v), leaf, upstream)
    assert torch.equal(dk, run(kernel, (q, k, v), upstream)[2])
