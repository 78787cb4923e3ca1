"""The gradients' norm over ranks: every rank joins it, with gradients or without."""

import datetime
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastasync.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[2]


def rank(number, meeting, impl):
    """Rank 1 never has a gradient; both take the norm of all, and the second one is not finite."""
    wait = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=2, timeout=wait)

    def combine(norm):
        total = norm.square()
        dist.all_reduce(total)
        return total.sqrt()

    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([weight], impl, lr=0.5, ema_decay=0.5)
    norms = []
    for gradient in ([3.0, 4.0], [math.inf, 0.0]):
        if number == 0:
            weight.grad = torch.tensor(gradient)
        norms.append(float(optimizer.clip_and_step(1.0, combine=combine)))
    dist.destroy_process_group()
    print(json.dumps([norms, weight.tolist()]))


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_a_rank_without_gradients_joins(tmp_path, impl):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    commands = [[sys.executable, __file__, number, str(tmp_path / "meeting"), impl] for number in "01"]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    (one, moved), (two, kept) = map(json.loads, said)
    assert one == two == [5.0, math.inf]
    assert kept == [0.0, 0.0]  # no gradient: left alone
    assert moved == pytest.approx([-0.5, -0.5], rel=1e-4)  # one step of AdamW, not two


if __name__ == "__main__":
    rank(int(sys.argv[1]), *sys.argv[2:])
