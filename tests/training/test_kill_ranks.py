"""kill -9 of one or both of two ranks at random moments, half of them inside a checkpoint, never loses the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastasync.training.checkpoint import newest, read_state

pytest.importorskip("deepspeed")

KILLS = 30


@pytest.mark.slow
def test_killed_ranks_never_lose_the_run(tmp_path):
    """ZeRO 0, 1, 2 and 3 in turn; then one process to the end: the curve is that of a run that nobody killed."""
    script, out = Path(__file__).with_name("kill_ranks_script.py"), tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(script), str(out), "0", str(KILLS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *kills, end = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kills) == KILLS
    for kill in kills:
        assert kill["damaged"] == [], kill
        assert kill["newest"] >= kill["acknowledged"], kill
        # who survived ended by itself, with the code that asks for another start
        for rank in {0, 1} - set(kill["victims"]):
            assert kill["codes"][rank] == 75, kill
    assert sum(bool(kill["unfinished"]) or kill["newest"] > kill["acknowledged"] for kill in kills) >= KILLS // 6
    assert end["done"] == [0, 0], done.stderr

    curves = []
    for folder in (out, tmp_path / "run-whole"):
        path = newest(folder / "checkpoints").path
        assert path.name == f"step_{end['steps']:08d}"
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, end["steps"] + 1))
        assert read_state(path).position == end["steps"]
        curves.append(torch.tensor([[record["loss"], record["grad_norm"]] for record in records]))
    torch.testing.assert_close(*curves, rtol=5e-3, atol=1e-3)
    assert all(path.name[5:].isdigit() for path in (out / "checkpoints").iterdir())
    said = {line for rank in (0, 1) for line in (out / f"said{rank}").read_text().splitlines()}
    assert all("another process of this run ended or does not answer" in line for line in said)
