"""What the tests of DeepSpeed on several ranks share: launchers, the jobs of deepspeed_worker.py, comparisons."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("deepspeed_worker.py")
TRAIN = dict(log_every=1, accumulate=2, checkpoint_every=100, warmup=3, clip=1.0)


def load_tiny_run():
    """This folder's conftest as a module: ``tiny``, ``run``, ``gaussian_latents``."""
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("conftest.py"))
    tiny_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_run)
    return tiny_run


def environment(**variables):
    """For child processes: this repository first, and what this process finds its packages by."""
    paths = [str(REPOSITORY / folder) for folder in (".", "kernels", "tests/without")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    fixed = {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **fixed, **variables}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(kind, ranks=2, port=None):
    """The command that starts ``ranks`` processes: torchrun's or deepspeed's own."""
    port = str(port or free_port())
    if kind == "torchrun":
        run = ["torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    else:
        run = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    return [sys.executable, "-m", *run]


def launch(folder, jobs, ranks=2, **variables):
    """Run the worker on ``jobs``, with ``ranks`` None in one process without a launcher; each rank's results."""
    for job in jobs:
        job["out"] = str(job["out"])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    starts = [sys.executable] if ranks is None else launcher("torchrun", ranks)
    command = [*starts, str(WORKER), str(folder / "jobs.json"), str(folder / "rank")]
    variables = environment(**variables)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks or 1)]


def train_fields(**changes):
    return dict(train={**TRAIN, **changes}, data=dict(flip=True))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out):
    return torch.tensor([[record["loss"], record["grad_norm"]] for record in records(out)], dtype=torch.float64)


def tensors(out, step):
    folder = out / "checkpoints" / f"step_{step:08d}"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


def assert_same(out, other, step=6, rtol=2e-5, atol=2e-6):
    """Weights, averages, moments, step counts and the curve are equal but for the order of float32 sums."""
    found, wanted = tensors(out, step), tensors(other, step)
    for file in wanted:
        assert found[file].keys() == wanted[file].keys()
        for name in wanted[file]:
            torch.testing.assert_close(
                found[file][name], wanted[file][name], rtol=rtol, atol=atol, msg=f"{file} {name}"
            )
    torch.testing.assert_close(curve(out), curve(other), rtol=1e-5, atol=1e-6)
