"""Label dropout and sums over rows: against the reference, whatever the layout and the split of the batch."""

import pytest
import torch
from fastasync_kernels import reference, triton_ops
from fastasync_kernels.column_sums import column_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("count", [0, 1, 127, 300])
def test_drops_the_same_labels_as_the_reference(seed, count):
    samples = torch.arange(count, device=DEVICE) * 3 + 5
    y = samples % 10
    for step in (3, 2**31 + 9):
        expected = reference.drop_labels(y, 10, 0.3, seed, step, samples)
        assert torch.equal(triton_ops.drop_labels(y, 10, 0.3, seed, step, samples), expected)
        at = torch.tensor([step], device=DEVICE)
        assert torch.equal(triton_ops.drop_labels(y, 10, 0.3, seed, at, samples), expected)
    if count == 300:
        assert 50 < int((expected == 10).sum()) < 130  # 90 expected, 8 a standard deviation
        parts = [triton_ops.drop_labels(y[s], 10, 0.3, seed, at, samples[s]) for s in (slice(0, 7), slice(7, None))]
        assert torch.equal(torch.cat(parts), expected)


def test_label_dropout_at_the_ends_and_compiled():
    samples = torch.arange(200, device=DEVICE)
    y = samples % 4
    assert torch.equal(triton_ops.drop_labels(y, 4, 0.0, 1, 2, samples), y)
    assert (triton_ops.drop_labels(y, 4, 1.0, 1, 2, samples) == 4).all()
    compiled = torch.compile(triton_ops.drop_labels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, 4, 0.5, 1, 2, samples), triton_ops.drop_labels(y, 4, 0.5, 1, 2, samples))
    with pytest.raises(TypeError, match="y must be"):
        triton_ops.drop_labels(y.int(), 4, 0.5, 1, 2, samples)
    with pytest.raises(ValueError, match="samples must have"):
        triton_ops.drop_labels(y, 4, 0.5, 1, 2, samples[1:])


def test_registration_of_label_dropout():
    y, samples = torch.arange(5, device=DEVICE), torch.arange(5, device=DEVICE)
    for step, tensor in ((3, None), (0, torch.tensor([3], device=DEVICE))):
        torch.library.opcheck(torch.ops.fastasync.drop_labels, (y, 10, 0.5, 1, step, tensor, samples))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 5, 3), (1, 128, 16), (3, 131, 72), (1, 1000, 17), (2, 0, 9), (0, 4, 4)]
)
def test_sums_over_rows(shape):
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(shape[0], shape[1], 3, shape[2], generator=generator).to(DEVICE)
    x = wide[:, :, 1]  # rows with others between them
    found = column_sums(x)
    exact = x.double().sum(1)
    assert found.shape == exact.shape
    assert found.is_contiguous()
    scale = x.double().abs().sum(1)
    assert ((found - exact).abs() <= 2.0**-20 * scale).all()  # 16 roundings of float32
    assert torch.equal(found, column_sums(x))
    assert torch.equal(column_sums(x, torch.float16), found.half())
