"""Run by test_kill_ranks.py: two DeepSpeed ranks, killed at random moments, started again under another ZeRO stage.

Usage: kill_ranks_script.py OUT SEED KILLS.  Prints one JSON line for each kill, and a last one for the run's end.
Ranks are forked after the imports, so that a start takes a second; each plays its launcher's part by its environment.
"""

import importlib.util
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch._dynamo  # what a first step would import, in every child

from fastasync.distributed import session
from fastasync.errors import UserError
from fastasync.training import checkpoint, deepspeed_engine

torch.set_num_threads(1)
_spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
tiny_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_run)
sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment] - seconds to import
imported = deepspeed, deepspeed_engine


def rank_main(out: Path, steps: int, zero: int) -> int:
    """Train on one rank; rank 0 appends each step to OUT/saved once its checkpoint is complete.  The exit code."""
    save = checkpoint.save

    def acknowledged(root, state, *args, **options):
        path = save(root, state, *args, **options)
        if session().is_main:
            with (out / "saved").open("a") as stream:
                stream.write(f"{state.step}\n")
        return path

    checkpoint.save = acknowledged
    fields = dict(steps=steps, checkpoint_every=2, log_every=1, zero=zero, accumulate=2, keep_checkpoints=2, warmup=3)
    try:
        tiny_run.run(tiny_run.tiny(train=fields), out, say=lambda line: None)
    except UserError as error:
        with (out / f"said{session().rank}").open("a") as stream:
            stream.write(f"{error}\n")
        return error.exit_code
    finally:
        session().leave()
    return 0


def start(out: Path, steps: int, world: int, zero: int) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
                os.environ.update(dict(zip(names, map(str, (rank, rank, world, port)))), MASTER_ADDR="127.0.0.1")
                code = rank_main(out, steps, zero)
            except SystemExit as end:
                code = end.code  # type: ignore[assignment]
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        children.append(pid)
    return children


def acknowledged_steps(out: Path) -> list[int]:
    path = out / "saved"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def ended(children: list[int], seconds: float) -> list[int]:
    """The exit codes, once all have ended; whoever has not by then is killed, and counts as 999."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children):
        for pid in children:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = 999
        time.sleep(0.002)
    return [codes[pid] for pid in children]


def main() -> None:
    out, rng, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])
    root = out / checkpoint.FOLDER
    root.mkdir(parents=True)
    for turn in range(kills):
        count = len(acknowledged_steps(out))
        children = start(out, 100_000, 2, zero=turn % 4)
        while len(acknowledged_steps(out)) == count:  # under way: the moment is not spent on starting
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        inside = turn % 2 == 0
        while inside and not list(root.glob("*.part")):
            pass
        time.sleep(rng.random() * 0.01)
        victims = rng.choice([[0], [1], [1], [0, 1]])
        for victim in victims:
            os.kill(children[victim], signal.SIGKILL)
        began = time.monotonic()
        codes = ended(children, 60)
        names = sorted(path.name for path in root.iterdir())
        found = checkpoint.newest(root)
        report = {
            "victims": victims,
            "zero": turn % 4,
            "codes": codes,
            "seconds": time.monotonic() - began,
            "acknowledged": acknowledged_steps(out)[-1],
            "newest": int(found.path.name[5:]) if found.path else None,
            "damaged": [str(path) for _, path in checkpoint.steps(root) if checkpoint.fault(path)],
            "unfinished": [name for name in names if not name[5:].isdigit()],
        }
        print(json.dumps(report), flush=True)
    steps = acknowledged_steps(out)[-1] + 3
    whole = Path(f"{out}-whole")
    whole.mkdir()
    done = ended(start(out, steps, 1, 1), 120) + ended(start(whole, steps, 1, 1), 300)
    print(json.dumps({"done": done, "steps": steps}), flush=True)


main()
