"""What our reduction refuses of a DeepSpeed that is not as it should be; the rest runs in test_deepspeed."""

from types import SimpleNamespace

import pytest
import torch

from fastasync.errors import UserError
from fastasync.training.deepspeed_shards import Shards

pytest.importorskip("deepspeed")
METHODS = ("reduce_gradients", "process_gradients", "overlapping_partition_gradients_reduce_epilogue", "step")


def stand_in(without: str = "") -> SimpleNamespace:
    """One group of one weight, as DeepSpeed's optimizer holds it."""
    weight = torch.nn.Parameter(torch.ones(4))
    made = SimpleNamespace(**{name: None for name in METHODS if name != without})
    made.bit16_groups, made.bit16_groups_flat = [[weight]], [weight.data]
    made.single_partition_of_fp32_groups = [weight.detach().clone()]
    made.parallel_partitioned_bit16_groups = [[weight.data]]
    return made


@pytest.mark.parametrize(("stage", "name"), [(1, METHODS[0]), (2, METHODS[1]), (2, METHODS[2]), (1, METHODS[3])])
def test_a_method_that_is_not_there_is_not_replaced(stage, name):
    with pytest.raises(UserError, match=f"package deepspeed: .*its optimizer of ZeRO {stage} has no {name}"):
        Shards(stand_in(name), stage, 1, 0, lambda: None)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_update_without_any_gradient_is_refused(stage):
    sharded, updates = stand_in(), []
    Shards(sharded, stage, 1, 0, lambda: updates.append(1))
    with pytest.raises(RuntimeError, match="has not handed over any gradient"):
        sharded.step()
    sharded.bit16_groups[0][0].grad = torch.ones(4)
    if stage == 1:
        sharded.reduce_gradients()
    else:
        sharded.process_gradients(sharded.bit16_groups[0][0], 0)
        sharded.overlapping_partition_gradients_reduce_epilogue()
    sharded.step()
    assert updates == [1]
