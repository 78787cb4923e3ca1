"""Run by test_kill.py: trains in forked children, one checkpoint for each step, and kills them at random moments.

Usage: kill_script.py OUT SEED KILLS.  Prints one JSON line for each kill, and a last one for the run's end.
Forking after the imports makes a start take milliseconds.
"""

import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # what a first step would import, in every child

from fastasync.training import checkpoint

torch.set_num_threads(1)
_spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
tiny_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_run)
sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment] - seconds to import


def child(out: Path, steps: int) -> None:
    """Train; append each step to OUT/saved once its checkpoint is complete."""
    save = checkpoint.save

    def acknowledged(root, state, *args, **options):
        path = save(root, state, *args, **options)
        with (out / "saved").open("a") as stream:
            stream.write(f"{state.step}\n")
        return path

    checkpoint.save = acknowledged
    config = tiny_run.tiny(train=dict(steps=steps, checkpoint_every=1, log_every=1))
    tiny_run.run(config, out, say=lambda line: None)


def start(out: Path, steps: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(out, steps)
            code = 0
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        finally:
            os._exit(code)
    return pid


def acknowledged_steps(out: Path) -> list[int]:
    path = out / "saved"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def main() -> None:
    out, rng, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])
    root = out / checkpoint.FOLDER
    root.mkdir(parents=True)
    for _ in range(kills):
        count = len(acknowledged_steps(out))
        pid = start(out, 100_000)
        while len(acknowledged_steps(out)) == count:  # under way: the moment is not spent on starting
            if os.waitpid(pid, os.WNOHANG)[0]:
                sys.exit("the child ended by itself")
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        names = sorted(path.name for path in root.iterdir())
        found = checkpoint.newest(root)
        print(
            json.dumps(
                {
                    "acknowledged": acknowledged_steps(out)[-1],
                    "newest": int(found.path.name[5:]) if found.path else None,
                    "damaged": [str(path) for _, path in checkpoint.steps(root) if checkpoint.fault(path)],
                    "unfinished": [name for name in names if not name[5:].isdigit()],
                }
            ),
            flush=True,
        )
    # the last one is asked politely
    count = len(acknowledged_steps(out))
    pid = start(out, 100_000)
    while len(acknowledged_steps(out)) == count:
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps = acknowledged_steps(out)[-1] + 3
    done = os.waitstatus_to_exitcode(os.waitpid(start(out, steps), 0)[1])
    whole = Path(f"{out}-whole")
    whole.mkdir()
    done |= os.waitstatus_to_exitcode(os.waitpid(start(whole, steps), 0)[1])
    print(json.dumps({"sigterm": code, "done": done, "steps": steps}), flush=True)


main()
