"""Positions, times, patches and label dropout, each against a direct evaluation."""

import math

import numpy as np
import pytest
import torch
from fastasync_kernels import reference
from fastasync_kernels.reference import drop_labels

from fastasync.model.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    position_table,
    rope_tables,
    short_name,
    time_sinusoid,
    unpatchify,
)


def test_time_sinusoid():
    tau = torch.tensor([0.0, 0.25, 1.0])
    table = time_sinusoid(tau)
    for row, time in enumerate(tau.tolist()):
        for i in (0, 1, 64, 127):
            angle = time * math.exp(-math.log(10_000) * i / 128)
            assert table[row, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert table[row, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert time_sinusoid(tau.double()).dtype == torch.float64
    assert time_sinusoid(tau.bfloat16()).dtype == torch.float32


def test_position_table():
    table = position_table(16, 3)
    assert (table.shape, table.dtype) == ((1, 9, 16), torch.float32)
    for row in range(3):
        for column in range(3):
            frequency = 10_000.0 ** (-np.arange(4) / 4)
            expected = [f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)]
            np.testing.assert_allclose(table[0, row * 3 + column], np.concatenate(expected), atol=1e-7)


def test_rope_depends_on_relative_position_only():
    """<R_a q, R_b k> is the same for all pairs of positions with the same row and column difference."""
    grid, head = 5, 24
    cos, sin = rope_tables(head, grid)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, head, generator=generator, dtype=torch.float64)
    turned_q = q * cos + reference.rotate_pairs(q) * sin
    turned_k = k * cos + reference.rotate_pairs(k) * sin
    product = (turned_q @ turned_k.T).reshape(grid, grid, grid, grid)
    values: dict[tuple[int, int], float] = {}
    for r1, c1, r2, c2 in np.ndindex(grid, grid, grid, grid):
        value = product[r1, c1, r2, c2].item()
        assert values.setdefault((r1 - r2, c1 - c2), value) == pytest.approx(value, abs=1e-5)
    assert values[(0, 0)] == pytest.approx((q @ k).item(), abs=1e-6)
    assert len({round(value, 3) for value in values.values()}) > 70  # of 81 differences


def test_rope_rows_first():
    cos, sin = rope_tables(8, 4)
    row, column = 3, 2
    expected = [row, row, row / 100, row / 100, column, column, column / 100, column / 100]
    torch.testing.assert_close(torch.atan2(sin, cos)[row * 4 + column], torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_and_back(patch):
    """A patch embedding that is the identity in (row, column, channel) order is undone by unpatchify."""
    channels, grid = 3, 6
    width = patch * patch * channels
    embedding = PatchEmbedding(channels, width, patch)
    with torch.no_grad():
        embedding.proj.bias.zero_()
        index = torch.arange(width).reshape(patch, patch, channels).permute(2, 0, 1)
        embedding.proj.weight.copy_(torch.nn.functional.one_hot(index, width).permute(3, 0, 1, 2))
    x = torch.randn(2, channels, grid, grid, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unpatchify(embedding(x), patch, channels), x, rtol=0, atol=0)


def test_null_class_is_the_last_row():
    table = LabelEmbedding(4, 8)
    assert table.embedding_table.weight.shape == (5, 8)
    assert torch.equal(table(torch.tensor([4])), table.embedding_table.weight[4:5])


def test_label_dropout_rate_and_reproducibility():
    samples = torch.arange(20_000)
    y = samples % 10
    dropped = drop_labels(y, 10, 0.1, 7, 3, samples)
    share = (dropped == 10).double().mean().item()
    assert share == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20_000))  # four standard errors
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    split = torch.cat([drop_labels(y[part], 10, 0.1, 7, 3, samples[part]) for part in samples.split(777)])
    assert torch.equal(split, dropped)
    for other in (drop_labels(y, 10, 0.1, 8, 3, samples), drop_labels(y, 10, 0.1, 7, 4, samples)):
        both = ((other == 10) & (dropped == 10)).double().mean().item()
        assert both == pytest.approx(0.01, abs=4 * math.sqrt(0.0099 / 20_000))  # independent of seed and step


def test_label_dropout_at_the_ends():
    samples = torch.arange(1000)
    y = samples % 10
    assert torch.equal(drop_labels(y, 10, 0.0, 0, 0, samples), y)
    assert (drop_labels(y, 10, 1.0, 0, 0, samples) == 10).all()
    assert drop_labels(y[:0], 10, 0.5, 0, 0, samples[:0]).shape == (0,)


def test_short_names():
    assert [short_name(name) for name in ("texture", "semantic", "lowfreq")] == ["tex", "sem", "lowfreq"]
