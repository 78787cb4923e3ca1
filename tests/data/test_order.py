"""The training order: each image exactly once per epoch, whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastasync.data import batch_indices, draw_flips, epoch_order, flips_by_step
from fastasync.errors import UserError


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), count=st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed, epoch, count):
    assert torch.equal(epoch_order(seed, epoch, count).sort().values, torch.arange(count))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), count=st.integers(1, 60), data=st.data())
def test_batches_walk_through_the_epochs_without_gap_or_repeat(seed, count, data):
    batch = data.draw(st.integers(1, count))
    steps = -(-3 * count // batch)
    walked = torch.cat([batch_indices(step, batch, count, seed) for step in range(steps)])
    epochs = torch.cat([epoch_order(seed, epoch, count) for epoch in range(5)])
    assert torch.equal(walked, epochs[: steps * batch])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), step=st.integers(0, 500), ranks=st.sampled_from([1, 2, 4]))
def test_the_order_does_not_depend_on_the_world_size(seed, step, ranks):
    """A rank's batch of B / ranks images is its slice of the global batch: the same positions as smaller batches."""
    whole = batch_indices(step, 8, 37, seed)
    parts = [batch_indices(step * ranks + rank, 8 // ranks, 37, seed) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)


def test_seeds_and_epochs_differ_and_the_result_may_be_changed_by_the_caller():
    first = epoch_order(0, 0, 500)
    assert not torch.equal(first, epoch_order(0, 1, 500))
    assert not torch.equal(first, epoch_order(1, 0, 500))
    first.zero_()
    assert epoch_order(0, 0, 500).unique().numel() == 500


def test_the_permutation_is_uniform():
    """Where image 0 lands over 3,000 epochs of 10: chi-square, 9 degrees of freedom, below its 0.1 % point."""
    places = torch.stack([(epoch_order(5, epoch, 10) == 0).nonzero()[0, 0] for epoch in range(3000)])
    counts = torch.bincount(places, minlength=10).double()
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.88


@pytest.mark.parametrize("batch", [0, -1, 11])
def test_a_batch_larger_than_the_set_is_refused(batch):
    with pytest.raises(UserError, match=r"batch: .*between 1 and the 10 images"):
        batch_indices(0, batch, 10, 0)


def test_flips_are_fair_and_independent_of_the_batch_split():
    samples = torch.arange(20000)
    flips = draw_flips(3, 7, samples)
    assert torch.equal(torch.cat([draw_flips(3, 7, part) for part in samples.split(777)]), flips)
    assert abs(float(flips.float().mean()) - 0.5) < 4 * 0.5 / 20000**0.5
    assert not torch.equal(flips, draw_flips(3, 8, samples))


def test_flips_of_many_steps_at_once_are_those_of_each():
    samples = torch.tensor([0, 5, 3, 255])
    at = flips_by_step(3, samples, block=8)
    for step in (0, 1, 9, 7, 2**33 + 5):
        assert torch.equal(at(step), draw_flips(3, step, samples))
