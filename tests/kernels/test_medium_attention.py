"""Attention of up to 256 tokens against the formula and fp64, with several tiles, in any memory order."""

import pytest
import torch
from fastasync_kernels import medium_attention as module
from fastasync_kernels.attention import _reference
from fastasync_kernels.medium_attention import Tile, medium_attention

from tests.kernels.attention_kit import CUDA, DEVICE, NAMES, all_equal, check_differences, draw, run, same_precision

# compiled, float32's products are for tests of small shapes: big ones do not fit
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)] + [torch.float32] * (not CUDA)
SHAPES = [
    *[(1, 1, 256, 72), (1, 1, 200, 72), (2, 1, 130, 32), (1, 1, 256, 64), (1, 1, 129, 100), (2, 2, 17, 72)],
    *[(1, 1, 65, width) for width in (1, 20, 33, 128)],
]
TILES = {  # forward, backward for queries, backward for keys
    "default": (module.FORWARD, module.FOR_QUERIES, module.FOR_KEYS),
    "32": (Tile(32, 32), Tile(32, 32), Tile(32, 32)),
    "uneven": (Tile(64, 32, 4, 3), Tile(128, 64, 8, 1), Tile(64, 128, 8, 2)),
    "128": (Tile(64, 128), Tile(64, 128), Tile(128, 64)),
    "whole": (Tile(64, 256), Tile(64, 256), Tile(256, 64)),
}


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_another_kernels_log_sum_exp_serves_the_backward_pass(shape, no_worse):
    """What ``mixed_attention`` keeps of cuDNN's forward pass, here from the formula."""
    tensors, upstream = draw(shape, torch.float16)
    q, k, v = tensors
    lse = ((q.double() @ k.double().mT) * shape[3] ** -0.5).logsumexp(-1).float()
    out = _reference(q, k, v)
    gradients = module._backward_op(upstream, q, k, v, out, module.rows_of(lse, shape[3]))
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse([out, *gradients], run(same_precision, tensors, upstream), truth, NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 256, 72), (2, 3, 200, 64), (1, 2, 64, 32)])
def test_mixed_attention(shape, dtype, no_worse):
    tensors, upstream = draw(shape, dtype)
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse(run(module.mixed_attention, tensors, upstream), run(same_precision, tensors, upstream), truth, NAMES)


def judge(tensors, upstream, no_worse):
    truth = run(_reference, tensors, upstream, torch.float64)
    no_worse(run(medium_attention, tensors, upstream), run(same_precision, tensors, upstream), truth, NAMES)


@pytest.fixture
def chosen(monkeypatch):
    def choose(name):
        for constant, tile in zip(("FORWARD", "FOR_QUERIES", "FOR_KEYS"), TILES[name], strict=True):
            monkeypatch.setattr(module, constant, tile)

    return choose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_no_worse_than_twice_the_reference(shape, dtype, no_worse):
    judge(*draw(shape, dtype), no_worse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 256, 72), (1, 3, 65, 20)])
@pytest.mark.parametrize("tiles", [name for name in TILES if name != "default"])
def test_other_tiles(tiles, shape, dtype, no_worse, chosen):
    chosen(tiles)
    if tiles == "whole" and CUDA:
        with pytest.raises(ValueError, match="is wrong when compiled: at most 128 queries and keys"):
            medium_attention(*draw(shape, dtype, seed=1)[0])
    else:
        judge(*draw(shape, dtype, seed=1), no_worse)


def test_tiles_that_are_wrong_when_compiled_are_refused(monkeypatch):
    monkeypatch.setattr(module, "INTERPRET", False)
    for tile in (Tile(256, 64), Tile(64, 256)):
        with pytest.raises(ValueError, match="is wrong when compiled: at most 128 queries and keys"):
            module._meta(16, 256, 72, tile)
    assert module._meta(16, 256, 72, Tile())["KEYS"] == 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharp_softmax(dtype, no_worse):
    """Scores of hundreds: no overflow, in rows and columns that exist or not."""
    judge(*draw((1, 1, 80, 24), dtype, seed=3, scale=6.0), no_worse)


@pytest.mark.skipif(CUDA, reason="float32")
def test_gradients_against_differences_of_the_loss():
    check_differences(medium_attention, (1, 2, 67, 20))


@pytest.mark.skipif(CUDA, reason="float32")
def test_scores_far_below_zero(no_worse):
    """Where a padded key's score of zero would be the largest by far: no infinity, no NaN."""
    (q, k, v), upstream = draw((1, 1, 70, 8), seed=4)
    tensors = (40 + q, -40 + k, v)
    truth = run(_reference, tensors, upstream, torch.float64)
    results = run(medium_attention, tensors, upstream)
    reference = run(same_precision, tensors, upstream)
    # dq is a sum of keys around -40 with coefficients that cancel: what remains is D's rounding, where D is its own sum
    kept = (0, 2, 3)
    no_worse(*([group[i] for i in kept] for group in (results, reference, truth)), [NAMES[i] for i in kept])
    assert float((results[1].double() - truth[1]).norm()) <= 1e-3 * float(truth[1].norm())


def test_one_token_attends_to_itself():
    tensors, upstream = draw((2, 2, 1, 8), torch.float16)
    out, dq, dk, dv = run(medium_attention, tensors, upstream)
    torch.testing.assert_close(out, tensors[2])
    torch.testing.assert_close(dv, upstream)
    assert max(dq.abs().max(), dk.abs().max()) <= 1e-5  # the true gradient is zero


def test_one_sample_of_many_alone_and_the_same_bits_every_time():
    tensors, upstream = draw((3, 1, 66, 16), torch.float16, seed=5)
    whole = run(medium_attention, tensors, upstream)
    assert all_equal(whole, run(medium_attention, tensors, upstream))
    one = slice(2, 3)
    alone = run(medium_attention, [t[one] for t in tensors], upstream[one])
    assert all_equal(alone, [t[one] for t in whole])


def test_compiled_whole_equals_eager():
    tensors, upstream = draw((2, 2, 20, 8), torch.float16, seed=12)
    function = lambda q, k, v: medium_attention(2 * q, k, v).transpose(1, 2).flatten(2)  # noqa: E731
    upstream = upstream.transpose(1, 2).flatten(2)
    expected = run(function, tensors, upstream)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert all_equal(run(compiled, tensors, upstream), expected)
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), expected[0])


def test_columns():
    """Two tiles where these have fewer columns than the next power of two."""
    expected = {1: (16, 0), 16: (16, 0), 20: (32, 0), 33: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16)}
    expected |= {96: (64, 32), 97: (128, 0), 128: (128, 0)}
    assert {width: module._columns(width) for width in expected} == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 16, 256, 72), (16, 16, 200, 72), (8, 4, 256, 64), (16, 8, 144, 32)])
def test_shapes_of_networks(shape, dtype, no_worse):
    tensors, upstream = draw(shape, dtype, seed=14)
    results = run(medium_attention, tensors, upstream)
    assert all_equal(results, run(medium_attention, tensors, upstream))
    few = slice(-4, None)
    part, upstream = [t[few] for t in tensors], upstream[few]
    truth = run(_reference, part, upstream, torch.float64)
    no_worse([t[few] for t in results], run(same_precision, part, upstream), truth, NAMES)


def test_registration_of_the_operators():
    (q, k, v), upstream = draw((2, 2, 5, 8), torch.float16, seed=16)
    out, rows = torch.ops.fastasync.medium_attention(q, k, v)
    torch.library.opcheck(torch.ops.fastasync.medium_attention_backward, (upstream, q, k, v, out, rows))
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.fastasync.medium_attention, leaves)


@pytest.mark.gpu
def test_registration_of_cudnns_forward_pass():
    leaves = tuple(t.requires_grad_() for t in draw((2, 2, 64, 32), torch.bfloat16, seed=16)[0])
    torch.library.opcheck(torch.ops.fastasync.cudnn_attention, leaves)


@pytest.mark.parametrize(
    ("q", "k", "error", "words"),
    [
        (torch.zeros(1, 2, 257, 8), None, ValueError, "needs 1 to 256 tokens, not 257"),
        (torch.zeros(1, 2, 0, 8), None, ValueError, "needs 1 to 256 tokens, not 0"),
        (torch.zeros(1, 2, 5, 129), None, ValueError, "head dimension of 1 to 128, not 129"),
        (torch.zeros(1, 2, 5, 8, dtype=torch.float64), None, TypeError, "q must be .* not torch.float64"),
        (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8).half(), TypeError, "k must be torch.float32"),
        (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 6, 8), ValueError, r"k must have shape \[1, 2, 5, 8\]"),
        (torch.zeros(2, 5, 8), None, ValueError, "q must have shape"),
        (torch.zeros(1, 2, 8, 5).mT, None, ValueError, "q has stride 5 over its last axis"),
    ],
)
def test_refusals(q, k, error, words):
    q = q.to(DEVICE)
    k = q if k is None else k.to(DEVICE)
    with pytest.raises(error, match=words):
        medium_attention(q, k, q)
