"""Attention of short sequences: against its formula and fp64, odd shapes, any memory order, refusals, torch.compile."""

import functools

import pytest
import torch
from fastasync_kernels import short_attention as module
from fastasync_kernels._common import Launch
from fastasync_kernels.attention import _reference, attention, available_backends
from fastasync_kernels.short_attention import short_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.attention_kit import CUDA, DEVICE, NAMES, all_equal, check_differences, draw, run, same_precision

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [
    *[(2, 2, tokens, 8) for tokens in (5, 16, 17, 100)],
    *[(1, 3, 17, width) for width in (1, 20, 32, 72, 128)],
    *[(2, 1, 64, 32), (1, 1, 128, 20), (1, 2, 100, 72)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_no_worse_than_twice_the_reference(shape, dtype, no_worse):
    if CUDA and dtype == torch.float32 and shape[2] > 64:
        pytest.skip("compiled, float32's products are for tests, and the big ones do not fit")
    tensors, upstream = draw(shape, dtype)
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse(run(short_attention, tensors, upstream), run(same_precision, tensors, upstream), truth, NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharp_softmax(dtype, no_worse):
    """Scores of +-100: no overflow, in rows and columns that exist or not."""
    tensors, upstream = draw((1, 2, 20, 24), dtype, seed=1, scale=6.0)
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse(run(short_attention, tensors, upstream), run(same_precision, tensors, upstream), truth, NAMES)


def test_scores_far_below_zero(no_worse):
    """Where a padded key's score of zero would be the largest by far."""
    (q, k, v), upstream = draw((1, 2, 5, 8), seed=2)
    tensors = (40 + q, -40 + k, v)
    assert (tensors[0] @ tensors[1].mT).max() < -10_000
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse(run(short_attention, tensors, upstream), run(same_precision, tensors, upstream), truth, NAMES)


def test_gradients_against_differences_of_the_loss():
    check_differences(short_attention, (1, 2, 9, 12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_attends_to_itself(dtype):
    tensors, upstream = draw((2, 2, 1, 8), dtype)
    out, dq, dk, dv = run(short_attention, tensors, upstream)
    torch.testing.assert_close(out, tensors[2])
    torch.testing.assert_close(dv, upstream)
    # the true gradient is zero: P (dP - P dP), where P is one to the rounding of a reciprocal
    bound = 2.0**-22 * float(upstream.norm() * tensors[2].norm() * max(tensors[0].norm(), tensors[1].norm()))
    assert max(dq.abs().max(), dk.abs().max()) <= bound


def test_one_sample_of_many_alone():
    tensors, upstream = draw((3, 2, 20, 16), torch.float16, seed=5)
    whole = run(short_attention, tensors, upstream)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = run(short_attention, [t[one] for t in tensors], upstream[one])
        assert all_equal(alone, [t[one] for t in whole])


def test_the_same_bits_every_time_and_for_every_number_of_warps(monkeypatch):
    tensors, upstream = draw((2, 2, 40, 24), torch.float16, seed=9)
    first = run(short_attention, tensors, upstream)
    assert all_equal(first, run(short_attention, tensors, upstream))
    if not CUDA:  # another number of warps divides the rows' sums otherwise, which may round otherwise
        monkeypatch.setattr(module, "FORWARD", Launch(warps=8))
        monkeypatch.setattr(module, "BACKWARD", Launch(warps=8))
        assert all_equal(first, run(short_attention, tensors, upstream))


def test_a_warp_for_every_sixteen_rows():
    warps = {n: module._meta(1, n, 32, module.FORWARD)["num_warps"] for n in (1, 16, 17, 33, 64, 65, 128)}
    assert warps == {1: 1, 16: 1, 17: 2, 33: 4, 64: 4, 65: 8, 128: 8}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_only_the_inputs_are_kept_and_nothing_else_is_called():
    tensors, upstream = draw((1, 2, 6, 8), seed=10)
    leaves = [t.detach().requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Calls() as calls:
        out = short_attention(*leaves)
        torch.autograd.grad(out, leaves, upstream)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in leaves]
    called = [name for name in calls.names if name != "aten.detach.default"]
    assert called == [f"fastasync.short_attention{end}.default" for end in ("", "_backward")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_a_backend_compiled_whole_equals_eager(dtype):
    if CUDA and dtype == torch.float32:
        pytest.skip("not a backend for float32 on CUDA")
    tensors, upstream = draw((2, 2, 20, 8), dtype, seed=12)
    assert available_backends(DEVICE, dtype, tensors[0].shape)["triton"] == ""
    call = functools.partial(attention, backend="triton")
    function = lambda q, k, v: call(2 * q, k, v).transpose(1, 2).flatten(2)  # noqa: E731
    upstream = upstream.transpose(1, 2).flatten(2)
    expected = run(function, tensors, upstream)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert all_equal(run(compiled, tensors, upstream), expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors), expected[0])


@pytest.mark.gpu
def test_inductor_equals_eager():
    tensors, upstream = draw((256, 8, 64, 32), torch.bfloat16, seed=13)
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(attention, backend="triton"), fullgraph=True)
    assert all_equal(run(compiled, tensors, upstream), run(short_attention, tensors, upstream))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 8, 64, 32), (64, 16, 128, 72), (8, 4, 128, 128), (16, 16, 49, 64)])
def test_shapes_of_networks(shape, dtype, no_worse):
    tensors, upstream = draw(shape, dtype, seed=14)
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse(run(short_attention, tensors, upstream), run(same_precision, tensors, upstream), truth, NAMES)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    batch = 2**31 // (64 * 8 * 32) + 2
    q = torch.randn(batch, 64, 8, 32, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    out = short_attention(q, q, q)
    (gradient,) = torch.autograd.grad(out, q, out.detach())
    last = q.detach()[-2:].requires_grad_()
    alone = short_attention(last, last, last)
    assert torch.equal(alone, out[-2:])
    assert torch.equal(torch.autograd.grad(alone, last, alone.detach())[0], gradient[-2:])


@pytest.mark.gpu
def test_tokens_2_to_the_30_elements_apart():
    tensors, upstream = draw((1, 1, 3, 8), torch.bfloat16, seed=15)
    space = torch.empty(2**31 + 24, device=DEVICE, dtype=torch.bfloat16)
    apart = [space.as_strided((1, 1, 3, 8), (24, 8, 2**30, 1), 8 * i) for i in range(3)]
    for far, near in zip(apart, tensors):
        far.copy_(near)
    assert all_equal(run(short_attention, apart, upstream), run(short_attention, tensors, upstream))


def test_registration_of_the_operators():
    (q, k, v), upstream = draw((2, 2, 5, 8), seed=16)
    torch.library.opcheck(torch.ops.fastasync.short_attention_backward, (upstream, q, k, v))
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.fastasync.short_attention, leaves)


@pytest.mark.parametrize(
    ("q", "k", "error", "words"),
    [
        (torch.zeros(1, 2, 129, 8), None, ValueError, "needs 1 to 128 tokens, not 129"),
        (torch.zeros(1, 2, 0, 8), None, ValueError, "needs 1 to 128 tokens, not 0"),
        (torch.zeros(1, 2, 5, 129), None, ValueError, "head dimension of 1 to 128, not 129"),
        (torch.zeros(1, 2, 5, 8, dtype=torch.float64), None, TypeError, "q must be .* not torch.float64"),
        (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8).half(), TypeError, "k must be torch.float32"),
        (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 6, 8), ValueError, r"k must have shape \[1, 2, 5, 8\]"),
        (torch.zeros(2, 5, 8), None, ValueError, "q must have shape"),
        (torch.zeros(1, 2, 8, 5).mT, None, ValueError, "q has stride 5 over its last axis"),
        (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 8, 5).mT, ValueError, "k has stride 5 over its last axis"),
    ],
)
def test_refusals(q, k, error, words):
    q = q.to(DEVICE)
    k = q if k is None else k.to(DEVICE)
    with pytest.raises(error, match=words):
        short_attention(q, k, q)
