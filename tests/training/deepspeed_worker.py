"""One rank of test_deepspeed.py, started by torchrun: runs the jobs of a JSON file one after the other.

Usage: deepspeed_worker.py JOBS.json RESULTS_PREFIX.  A job is {"out", "config": sections, "event": name,
"bucket": of ZeRO 2}; a result is {"resumed_from", "messages", "seconds", "waits", "warnings", "kinds", "shards",
"backends", "recorded": how often, "replays", "wanted": what was asked about recording, "nodes"}, {"error", "code"},
{"code"} or {"other": code}, a file for each rank.
"""

import errno
import gc
import importlib.util
import json
import logging
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from fastasync_kernels import gated_mlp, weight_gradient
from torch.autograd.graph import get_gradient_edge

from fastasync.distributed import OtherRankFailed, session
from fastasync.errors import UserError
from fastasync.model.dit import LightningDiT
from fastasync.model.linears import BlockLinear
from fastasync.training import deepspeed_engine, deepspeed_shards, graph
from fastasync.training.interrupt import Interrupted

torch.set_num_threads(1)


def load(path):
    """A module of tests/, which is no package: another one may be installed under that name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_run = load(Path(__file__).with_name("conftest.py"))
graph_kit = load(Path(__file__).with_name("graph_kit.py"))
quack_kit = load(Path(__file__).parents[1] / "kernels" / "quack_kit.py")
sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment] - seconds to import


def full_disk(path, *arguments):
    """In place of stream_tensors: fails in the middle of the second file."""
    if "ema" in path.name:
        next(iter(arguments[-1]))
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return _stream_tensors(path, *arguments)


@contextmanager
def ranks_that_measure_differently(possible):
    """Rank 0 finds attention by the formula, quack's MLP and whole gradients fastest, rank 1 PyTorch's and halves.

    ``possible``: whether rank 1 can run what rank 0 chose.
    """
    rank = session().rank
    choose_attention, choose_mlp = LightningDiT.choose_attention, LightningDiT.choose_mlp

    def attention(model, batch, dtype, gradient=True, backend=""):
        if backend == "reference" and rank == 1 and not possible:
            raise UserError("model.attention", backend, "this test says that it cannot run here")
        return choose_attention(model, batch, dtype, gradient, backend or ("reference", "sdpa")[rank])

    def mlp(model, batch, dtype, gradient=True, backend=""):
        return choose_mlp(model, batch, dtype, gradient, backend or ("quack", "plain")[rank])

    with pytest.MonkeyPatch.context() as patch, quack_kit.installed():
        patch.setattr(LightningDiT, "choose_attention", attention)
        patch.setattr(LightningDiT, "choose_mlp", mlp)
        patch.setattr(gated_mlp, "resolve_mlp", lambda wanted, *_: wanted)  # also without a GPU
        patch.setattr(weight_gradient, "choose_parts", lambda *_: rank + 1)
        yield


RECORDING = {  # event: what rank 1 has that rank 0 does not
    "recorded": "nothing",
    "full memory": "no room for a recording",
    "little memory": "room for a step and a quarter, and not for a reduction's memory besides",
    "busy device": "a step that launches do not bind (both are watched)",
    "no library": "an optimizer that cannot be recorded",
}


@contextmanager
def recorded_steps(event):
    """Steps of DeepSpeed's engine from fixed memory."""
    pretend, other, wanted = graph_kit.Replayed, session().rank == 1, []

    def wants(choice, device, optimizer, part_flops, precision):
        wanted.append([choice, part_flops, precision])
        return not (event == "no library" and other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretend, "recorded", 0)
        patch.setattr(deepspeed_engine, "GraphedStep", pretend)
        patch.setattr(deepspeed_engine, "wants_graph", wants)
        if event == "full memory" and other:
            patch.setattr(pretend, "room", False)
        if event == "little memory" and other:
            patch.setattr(pretend, "memory", graph.Memory(2**20, 5 * 2**18))
        if event == "busy device":
            patch.setattr(deepspeed_engine, "to_be_watched", lambda *_: True)
            patch.setattr(graph, "watched", lambda run, wait: (run(), 0.5 if other else 0.0))
        yield
        _layout["recorded"], _layout["wanted"] = pretend.recorded, wanted


_bucket = deepspeed_shards.BUCKET
_stream_tensors = deepspeed_engine.stream_tensors


def count_waits():
    """A list that grows with every time that DeepSpeed, on the CPU, waits for the device."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at the first import
    from deepspeed.accelerator import get_accelerator

    waits, accelerator = [], get_accelerator()
    accelerator.synchronize = lambda device_index=None: waits.append(device_index)
    return waits


_make_state = deepspeed_engine.DeepSpeedEngine._make_state
_layout = {}  # of the last engine: its parameters' dtypes, the bytes of its shards, its network's backends


def note_layout(engine):
    _layout["engine"] = engine
    flats = getattr(engine._sharded, "bit16_groups_flat", [])
    _layout["kinds"] = sorted({str(p.dtype) for p in engine.model.parameters()})
    _layout["shards"] = [flat.numel() * flat.element_size() // engine.world for flat in flats]
    parts = [module.parts for module in engine.model.modules() if isinstance(module, BlockLinear)]
    _layout["backends"] = [engine.model.chosen_attention, engine.model.chosen_mlp, *parts]
    _make_state(engine)


deepspeed_engine.DeepSpeedEngine._make_state = note_layout


def nodes_kept(model):
    """How many parameters' nodes of autograd something keeps alive."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        get_gradient_edge(p).node.metadata["seen"] = True
    gc.collect()
    return sum("seen" in get_gradient_edge(p).node.metadata for p in trained)


class Warnings(logging.Handler):
    """What the package has warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger("fastasync").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


warned = Warnings()


def run(job):
    warned.lines.clear()
    data = tiny_run.gaussian_latents(mirror=True)
    if job.get("event") == "nan":  # on one rank only, and on all of its images
        data = tiny_run.Disturbed(data, lambda step: float("nan") if session().rank == 1 else None)
    if job.get("event") == "stop":  # as the batch of the third step is read
        third = 2 * job["config"]["train"]["accumulate"]
        data = tiny_run.Disturbed(data, lambda part: os.kill(os.getpid(), signal.SIGTERM) if part == third else None)
    deepspeed_engine.stream_tensors = full_disk if job.get("event") == "full disk" else _stream_tensors
    deepspeed_shards.BUCKET = job.get("bucket", _bucket)
    _layout.pop("engine", None)
    gc.collect()  # an engine of a job before waits as it goes
    waits = count_waits() if job["config"]["train"].get("device", "cpu") == "cpu" else []
    began = time.perf_counter()
    differently = job.get("event") in ("differently", "impossibly")
    measured = ranks_that_measure_differently(job["event"] == "differently") if differently else nullcontext()
    if job.get("event") in RECORDING:
        measured = recorded_steps(job["event"])
    try:
        with measured:
            done = tiny_run.run(tiny_run.tiny(**job["config"]), Path(job["out"]), data, say=lambda line: None)
    except OtherRankFailed as error:
        return {"other": error.code}
    except Interrupted as error:
        return {"code": error.code}
    except UserError as error:
        return {"error": str(error), "code": error.exit_code}
    seconds = time.perf_counter() - began
    told = {"resumed_from": done.resumed_from, "messages": done.messages, "seconds": seconds, "waits": len(waits)}
    told["warnings"] = list(warned.lines)
    if "engine" in _layout:
        engine = _layout.pop("engine")
        told["replays"], told["nodes"] = engine.recorded, nodes_kept(engine.model)
    return told | _layout


def main():
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        results.append(run(job))
        Path(f"{sys.argv[2]}{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
    session().leave()


main()
