"""The command line: ``fastasync prepare | probe | train | sample | evaluate | report | run`` and a few helpers."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from fastasync import __version__
from fastasync.distributed import session
from fastasync.errors import UserError

STAGES = {
    "prepare": "encode the images: train encoder and SemVAE, store latents and statistics",
    "probe": "learn the schedule (or take the named one) and write schedule.json",
    "train": "train the network along the schedule",
    "sample": "generate images",
    "evaluate": "score them",
    "report": "write the pictures and report.html",
    "run": "all of these in order, then the baselines",
}

# The stages that a command may have to do: what is checked before it starts.
_WORK = {
    "prepare": ("prepare",),
    "probe": ("prepare", "probe"),
    "train": ("prepare", "probe", "train"),
    "sample": ("prepare", "sample"),
    "evaluate": ("prepare", "sample", "evaluate"),
    "run": ("prepare", "probe", "train", "sample", "evaluate"),
}

_SIGPIPE = 13

# What needs less memory, where nobody nearer to the failure has said so better.
_LESS_IN_STAGES = "lower train.batch, sample.batch, sample.count or the model's size"
_LESS_MEMORY = {
    "probe": "lower probe.batch, or sample.batch, which C samples with (another probe.batch needs a new --out)",
    "encode": "lower --batch, --shard-size, or the chunk of a representation (--option autoencoder.chunk=8)",
    "train-semvae": "lower --batch (with a new --out)",
}

# What a file or its disk refuses, where nobody nearer to it has said so better.
_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP)
_NAME = errno.ENAMETOOLONG

# Commands of other modules: what --help says here, and the module whose add_parser knows their options.  It is imported
# only when its command is asked for, so that `fastasync --help` is quick and needs no optional package.
TOOLS = {
    "check-images": ("find the images that cannot be decoded", "fastasync.images.check"),
    "encode": ("images -> shards of latents", "fastasync.encode"),
    "check-latents": ("verify encoded latents", "fastasync.encode"),
    "train-semvae": ("train the SemVAE on a frozen ViT's features", "fastasync.representations.train_semvae"),
    "convert": ("a checkpoint to the published layout, or a published one into a run", "fastasync.training.tools"),
    "verify": ("check a checkpoint: hashes, shapes, finite numbers", "fastasync.training.tools"),
}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The argument parser; with all options of ``command`` where that is one of TOOLS."""
    top = argparse.ArgumentParser(prog="fastasync", description="Learns when to denoise each representation.")
    top.add_argument("--version", action="version", version=f"fastasync {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in STAGES.items():
        stage = commands.add_parser(name, help=text, description=text)
        stage.add_argument("--preset", help="a named run (see `fastasync presets`)")
        stage.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a field")
        stage.add_argument("--data", metavar="DIR", help="the latents or images: short for --set data.root=DIR")
        stage.add_argument("--out", type=Path, help="the run directory (default runs/PRESET)")
        stage.add_argument("--dry-run", action="store_true", help="print the configuration and its cost, and stop")
        stage.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
        if name in ("probe", "run"):
            stage.add_argument("--oracle", action="store_true", help="add the exact optimum over the fitted surface")
    commands.add_parser("presets", help="list the presets")
    asked_for = TOOLS.get(command or "", ("", ""))[1]
    for name, (text, module) in TOOLS.items():
        if module != asked_for:
            commands.add_parser(name, help=text)
    if asked_for:
        importlib.import_module(asked_for).add_parser(commands)
    fetch = commands.add_parser("fetch", help="download what a preset needs: cifar10 or inception")
    fetch.add_argument("what", choices=("cifar10", "inception"))
    fetch.add_argument("--to", type=Path, help="folder (default data or weights)")
    fetch.add_argument(
        "--verify", action="store_true", help="inception: check the known CIFAR-10 value (slow on a CPU)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted.

    141, in silence, when whoever read the output has gone (``fastasync presets | head -1``), as for other programs.
    """
    # CPU threads that spin for long while they wait stall everything on a machine that does something else too
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported
    if not sys.stderr.isatty():  # a file keeps every state of a bar; read when tqdm is imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    argv = sys.argv[1:] if argv is None else list(argv)
    while argv and argv[0].startswith(("--local_rank=", "--local-rank=")):  # of `deepspeed --module fastasync COMMAND`
        del argv[0]
    arguments = parser(argv[0] if argv else None).parse_args(argv)
    try:
        code = _command(arguments)
        sys.stdout.flush()  # here, and not when Python ends, where nobody could say anything about its failure
        return code
    except BrokenPipeError:
        if not _reader_gone():
            raise
        return 128 + _SIGPIPE
    except UserError as error:
        line = " ".join(str(error).split())
        if session().says_first(line):
            print(f"fastasync: error: {line}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (*_DISK, _NAME):
            raise
        line = f"{error.filename or 'a file'}: {error.strerror}: check its permissions, its disk and the space there"
        if session().says_first(line):
            print(f"fastasync: error: {line}", file=sys.stderr)
        return UserError.exit_code
    except Exception as error:
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if on_cpu:
            line = f"out of memory: {_LESS_MEMORY.get(arguments.command, _LESS_IN_STAGES)}"
            if session().says_first(line):
                print(f"fastasync: error: {line}", file=sys.stderr)
            return UserError.exit_code
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by name: torch may not be imported
            raise
        in_stages = "raise train.accumulate (same results), set train.memory=selective or full, or lower the batch"
        remedy = _LESS_MEMORY.get(arguments.command, in_stages)
        if session().says_first("out of memory"):
            print(f"fastasync: error: out of memory on the device: {remedy}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        if session().says_first("interrupted"):
            print("fastasync: interrupted; the same command continues", file=sys.stderr)
        return 130
    finally:
        session().leave()


def _command(arguments: argparse.Namespace) -> int:
    if arguments.command in TOOLS:
        return arguments.handler(arguments)
    if arguments.command == "presets":
        return _presets()
    if arguments.command == "fetch":
        return _fetch(arguments)
    return _stage(arguments)


def _reader_gone() -> bool:
    """Whether nobody reads our output any more; what is left of it then goes nowhere, also when Python ends."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file
        return False
    look = select.poll()
    look.register(output, 0)  # errors are always reported
    if not look.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


def _presets() -> int:
    from fastasync.presets import PRESETS

    for name, row in PRESETS.items():
        print(f"{name:20s} {row.summary}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    if arguments.what == "cifar10":
        from fastasync.data.cifar10 import fetch

        print(fetch(arguments.to or Path("data")))
        return 0
    from fastasync.evaluation import inception

    path = inception.fetch(arguments.to or Path("weights"))
    print(path)
    if arguments.verify:
        import torch

        from fastasync.data import load_images

        extractor = inception.InceptionFeatures(path, "cuda" if torch.cuda.is_available() else "cpu")
        train, test = (load_images("cifar10", "data", split).images for split in ("train", "test"))
        print(f"CIFAR-10 train against test: FID {inception.verify_on_cifar10(extractor, train, test):.3f}")
    return 0


def _stage(arguments: argparse.Namespace) -> int:
    from fastasync.config import apply_settings
    from fastasync.run import Run, begin_config, existing_config

    out = arguments.out or Path("runs") / (arguments.preset or "digits")
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError("--out", repr(str(out)), "is not UTF-8: choose another name") from None
    config = begin_config(out, arguments.preset)
    if config is None:
        raise UserError(
            "--preset", "(not given)", f"{out} holds no run: give a preset (`fastasync presets` lists them)"
        )
    config = apply_settings(config, _settings(arguments))
    if arguments.data is not None and config.data.dataset == "digits":
        raise UserError("--data", arguments.data, "data.dataset=digits reads no folder: add --set data.dataset=latents")

    from fastasync import stages
    from fastasync.training import check_engine, checkpoint
    from fastasync.training.engine import split_positions

    if arguments.dry_run:
        stages.check_schedules(Run(out, config))
        split_positions(config.train.batch, 1, 0, config.train.accumulate)
        print(config.to_yaml())
        for name, value in stages.summary(config).items():
            print(f"{name}: {_readable(value)}")
        return 0
    if getattr(arguments, "oracle", False) and config.schedule.name == "learned" and config.probe.estimator == "A":
        raise UserError("--oracle", "probe.estimator=A", "fits no loss surface to find the optimum on: use B, C or D")
    if getattr(arguments, "oracle", False) and config.schedule.name != "learned":
        raise UserError(
            "--oracle", f"schedule.name={config.schedule.name}", "belongs to a probe: use schedule.name=learned"
        )
    if arguments.command == "report":
        if existing_config(out) is None:
            raise UserError("--out", out, "holds no run to report on")
        stages.check_schedules(Run(out, config))
    else:
        stages.preflight(Run(out, config), _WORK[arguments.command])
        stages.check_begun_probes(Run(out, config))  # here too, so that config.yaml does not hold what is refused
        stages.check_same_latents(Run(out, config))
    if arguments.command in ("sample", "evaluate"):
        stages.check_sampling(Run(out, config))
    if arguments.command in ("train", "run"):
        check_engine(config)
        done = checkpoint.whole(out / checkpoint.FOLDER)
        if done and done[-1][0] > config.train.steps:
            raise UserError(
                "train.steps", config.train.steps, f"the run is at step {done[-1][0]} already; give at least that"
            )
    run = session().main_first(Run(out, config).create)
    if arguments.command == "run":
        stages.run_all(run, oracle=arguments.oracle)
        return 0
    if arguments.command == "report":
        stages.report_stage(run)
        return 0
    inputs = stages.prepare_stage(run)
    if arguments.command == "probe":
        stages.probe_stage(run, inputs, oracle=arguments.oracle)
    elif arguments.command == "train":
        stages.train_stage(run, inputs, stages.probe_stage(run, inputs))
    elif arguments.command == "sample":
        stages.sample_stage(run, inputs)
    elif arguments.command == "evaluate":
        stages.evaluate_stage(run, inputs, stages.sample_stage(run, inputs))
    return 0


def _settings(arguments: argparse.Namespace) -> list[str]:
    """What --set and --data change.  UserError where both give data.root."""
    if arguments.data is None:
        return arguments.set
    for setting in arguments.set:
        if setting.partition("=")[0].strip() == "data.root":
            raise UserError("--data", arguments.data, f"--set {setting} says it too: give one of them")
    return [*arguments.set, f"data.root={arguments.data}"]


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
