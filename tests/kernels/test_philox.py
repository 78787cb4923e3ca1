"""The generator: Random123's known answers, and the kernels' words and normals against the reference's."""

import math

import pytest
import torch
import triton
import triton.language as tl
from fastasync_kernels import _common, reference
from scipy import stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit(do_not_specialize=["seed", "step", "sample", "first"])
def _words_kernel(out_ptr, seed, step, sample, first, STREAM: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    w0, w1, w2, w3 = _common.philox_words(seed, step, sample, first + i, STREAM)
    tl.store(out_ptr + 4 * i, w0.to(tl.int64))
    tl.store(out_ptr + 4 * i + 1, w1.to(tl.int64))
    tl.store(out_ptr + 4 * i + 2, w2.to(tl.int64))
    tl.store(out_ptr + 4 * i + 3, w3.to(tl.int64))


@triton.jit(do_not_specialize=["seed", "step", "sample"])
def _normals_kernel(
    out_ptr, seed, step, sample, STREAM: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr
):
    first = tl.program_id(0) * BLOCK
    element = first + tl.arange(0, BLOCK)
    if ROW == 1:
        value = _common.normals_at(seed, step, sample, element, STREAM)
    elif ROW == 8:
        value = _common.normals_by_eight(seed, step, sample, first // 8 + tl.arange(0, BLOCK // 8), STREAM)
    else:
        value = _common.normals(seed, step, sample, first // 4 + tl.arange(0, BLOCK // 4), STREAM)
    tl.store(out_ptr + element, value, mask=element < COUNT)


def kernel_words(seed, step, sample, stream, count, first=0):
    out = torch.zeros(4 * count, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](out, seed, step, sample, first, STREAM=stream, COUNT=count)
    return out.cpu().reshape(count, 4)


def kernel_normals(seed, step, sample, count, block=4096, stream=0, row=4):
    out = torch.zeros(count, device=DEVICE)
    grid = (triton.cdiv(count, block),)
    _normals_kernel[grid](out, seed, step, sample, STREAM=stream, COUNT=count, BLOCK=block, ROW=row)
    return out.cpu()


def exact_normals(seed, step, sample, count):
    """float64 Box-Muller of the reference's words, and the radius of each number."""
    words = reference._words(seed, step, torch.tensor([sample]), count, 0)
    u = [((word[0] >> 9).double() + 0.5) * 2.0**-23 for word in words]
    out, radii = [], []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = torch.sqrt(-2 * torch.log(a)), 2 * math.pi * b
        out += [radius * torch.cos(angle), radius * torch.sin(angle)]
        radii += [radius, radius]
    return torch.stack(out, -1).flatten()[:count], torch.stack(radii, -1).flatten()[:count]


KNOWN = [  # Random123's kat_vectors, philox4x32 10
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_reference_gives_known_answers(counter, key, words):
    assert tuple(int(word) for word in reference.philox(key, [torch.tensor(c) for c in counter])) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN[:1] + KNOWN[2:])
def test_kernel_gives_known_answers(counter, key, words):
    first, sample, step, stream = counter
    out = kernel_words(_common.signed64(key), step, sample, stream, 1, first)
    assert tuple(out[0].tolist()) == words


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, 2**32 + 7, 2**63 - 1, 2**63 + 5, 2**64 - 1])
def test_words_are_bit_equal(seed):
    step, sample, stream, count = 399_999, 1_281_166, 3, 256
    words = torch.stack(reference._words(seed, step, torch.tensor([sample]), 4 * count, stream), -1)[0]
    assert torch.equal(kernel_words(_common.signed64(seed), step, sample, stream, count), words)


@pytest.mark.parametrize("row", [1, 4, 8])
def test_normals_are_as_near_to_the_truth_as_the_reference(row):
    count = 1 << 16
    ours = kernel_normals(11, 5, 77, count, row=row).double()
    theirs = reference.philox_normal(11, 5, torch.tensor([77]), count)[0].double()
    exact, radius = exact_normals(11, 5, 77, count)
    ulp = 2.0**-23 * radius  # an error of the angle shows as one of the radius' size, whatever the cosine
    assert float(((ours - exact).abs() / ulp).max()) < 2.5
    assert float(((theirs - exact).abs() / ulp).max()) < 5  # half an ulp of an angle up to 2 pi, and 2 pi's own error
    assert float((ours - exact).abs().max()) <= float((theirs - exact).abs().max())


def test_normals_do_not_depend_on_block_size():
    count = 3001
    expected = kernel_normals(3, 1, 9, count, block=4096)
    for block in (64, 512, 1024):
        assert torch.equal(kernel_normals(3, 1, 9, count, block=block), expected)
    for row in (1, 8):
        assert torch.equal(kernel_normals(3, 1, 9, count, block=2048, row=row), expected)


def test_normals_are_normal_and_streams_independent():
    count = 1 << 18
    x = kernel_normals(2024, 0, 0, count, block=1 << 16).double()
    n = math.sqrt(count)
    assert abs(float(x.mean())) < 4 / n
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2) / n
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15) / n
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96) / n
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert abs(float((x[0::2] * x[1::2]).mean())) < 4 * math.sqrt(2) / n  # cosine and sine of one pair
    assert abs(float((x[:-4] * x[4:]).mean())) < 4 / n  # neighbouring counter blocks
    for other in (dict(step=1), dict(sample=1), dict(stream=1), dict(seed=2025)):
        key = {"seed": 2024, "step": 0, "sample": 0, "stream": 0, **other}
        y = kernel_normals(key["seed"], key["step"], key["sample"], 1 << 16, 1 << 16, key["stream"]).double()
        assert abs(float((x[: 1 << 16] * y).mean())) < 4 / 256


def test_uniforms_never_reach_zero_or_one():
    cells = reference._unit(torch.tensor([0, 2**32 - 1, 2**32 - 512, 2**31]))
    assert float(cells.min()) == 2.0**-24
    assert float(cells.max()) == 1 - 2.0**-24
    assert bool(torch.isfinite(torch.logit(cells)).all())


def test_step_may_be_a_tensor():
    samples = torch.tensor([4, 2**32 - 1])
    expected = reference.philox_normal(7, 123, samples, 10)
    assert torch.equal(reference.philox_normal(7, torch.tensor(123), samples, 10), expected)
    assert torch.equal(reference.philox_normal(7, torch.tensor([123]), samples, 10), expected)


@pytest.mark.gpu
def test_inductor_draws_the_references_numbers():
    """It must not compute the counters in its indices' int32: the product with a multiplier needs 64 bits."""
    samples, step = torch.arange(3, device=DEVICE), torch.tensor([2**31 + 9], device=DEVICE)
    torch.compiler.reset()
    uniform = torch.compile(lambda s, step: reference.philox_uniform(7, step, s, 12_289), fullgraph=True, dynamic=False)
    normal = torch.compile(lambda s, step: reference.philox_normal(7, step, s, 12_289), fullgraph=True, dynamic=False)
    assert torch.equal(uniform(samples, step), reference.philox_uniform(7, step, samples, 12_289))
    torch.testing.assert_close(normal(samples, step), reference.philox_normal(7, step, samples, 12_289))
