"""``fastasync convert`` and ``fastasync verify``: checkpoints in and out of the published layout, and checked."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from fastasync.config import Config, apply_settings, config_from_dict
from fastasync.errors import UserError
from fastasync.files import atomic_path, save_tensors
from fastasync.model import export_state, load_into, load_state
from fastasync.model.importer import check_fits
from fastasync.probe.learn import ERRORS
from fastasync.run import Run, begin_config
from fastasync.training import checkpoint
from fastasync.training.build import build_model
from fastasync.training.start import START

TARGETS = ("published", "ours")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``convert`` and ``verify``; their namespaces have ``handler`` = the functions below."""
    convert = commands.add_parser("convert", help="a checkpoint to the published layout, or weights into a run")
    text = "of ours (or a run); with --to ours a published file, or a probe's"
    convert.add_argument("checkpoint", type=Path, help=text)
    convert.add_argument("out", type=Path, help="the file to write, or with --to ours the run directory")
    convert.add_argument("--to", choices=TARGETS, default="published")
    convert.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights")
    convert.add_argument("--preset", help="with --to ours: the named run that a new run directory is made from")
    text = "with --to ours: change a field"
    convert.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=text)
    convert.set_defaults(handler=convert_command)
    verify = commands.add_parser("verify", help="check a checkpoint, or all of a run: hashes, shapes, finite numbers")
    verify.add_argument("checkpoint", type=Path)
    verify.set_defaults(handler=verify_command)


def convert_command(args: argparse.Namespace) -> int:
    """``fastasync convert``; returns the exit code."""
    ema = args.weights == "ema"
    if args.to == "published" and (args.preset or args.set):
        raise UserError("--preset" if args.preset else "--set", args.preset or args.set[0], "goes with --to ours")
    print(export(args.checkpoint, args.out, ema) if args.to == "published" else adopt(args, ema))
    return 0


def export(source: Path, out: Path, ema: bool = True) -> Path:
    """Write ``{'ema': state_dict}`` in the published layout from a checkpoint or a run; returns ``out``.

    The entry is called ``ema`` for raw weights too, since that is what the peers' code loads.
    Of a run the newest complete checkpoint; which one, and what is skipped, is said on stderr.
    Raises UserError when the checkpoint is not complete or the file cannot be written.
    """
    if out.is_dir():
        raise UserError("OUT", out, "is a folder: give the file to write")
    if out.exists():
        raise UserError("OUT", out, "is there already: remove it, or give another name")
    loaded = checkpoint.load_model(source, ema=ema, say=lambda line: print(line, file=sys.stderr))
    # a stream: given a path, torch reports what the system refuses as a RuntimeError
    with atomic_path(out) as partial, open(partial, "wb") as stream:
        torch.save(export_state(loaded.model), stream)
    print(f"{'EMA' if ema else 'raw'} weights of step {loaded.info.step:,}", file=sys.stderr)
    return out


def adopt(args: argparse.Namespace, ema: bool = True) -> Path:
    """Put the weights of a published file, or of a probe, into a run's folder; returns the file that training reads.

    The run is the folder's own, or a new one of ``--preset``, with the changes of ``--set``.
    Raises UserError when it is missing, has trained already or other settings, or is of another architecture.
    """
    config = begin_config(args.out, args.preset)
    if config is None:
        raise UserError("OUT", args.out, "holds no run: give --preset, or make it first with `fastasync prepare`")
    config = apply_settings(config, args.set)
    if checkpoint.steps(args.out / checkpoint.FOLDER):
        raise UserError("OUT", args.out, "this run has checkpoints, which it continues from: choose a new one")
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    source = str(args.checkpoint)
    state = completed(load_state(args.checkpoint, "ema" if ema else "model"), model, config, source)
    load_into(model, state, source=source)
    Run(args.out, config).create()
    save_tensors(args.out / START, model.state_dict())
    return args.out / START


def completed(state: dict[str, Tensor], model: nn.Module, config: Config, source: str) -> dict[str, Tensor]:
    """What ``model``, the run's network (on any device), is to start from: ``state``, or where that is a probe's its
    weights without the errors beside them, and with the run's own new REPA projector.

    Raises UserError for a probe of another shape than the network.
    """
    if not set(ERRORS) <= state.keys():
        return state
    weights = {name: value for name, value in state.items() if name not in ERRORS}
    if projector := [name for name in model.state_dict() if name.startswith("repa_projector.")]:
        torch.manual_seed(config.data.seed)
        fresh = build_model(config).state_dict()
        weights |= {name: fresh[name] for name in projector}
    try:
        check_fits(model, weights, source)
    except UserError:
        remedy = (
            "is of another shape than the run's network: learn the schedule in a new --out with probe.depth, "
            "probe.width and probe.heads as the network's"
        )
        raise UserError("the probe", source, remedy) from None
    return weights


def verify_command(args: argparse.Namespace) -> int:
    """``fastasync verify``; returns the exit code, 0 when everything found is complete.

    Raises UserError for a checkpoint that is not, after a look at all of them; of several the last, the others are
    printed.
    """
    path = args.checkpoint
    root = path / checkpoint.FOLDER if (path / checkpoint.FOLDER).is_dir() else path
    found = [each for _, each in checkpoint.steps(root)] or [path]
    broken: tuple[Path, UserError] | None = None
    for each in found:
        try:
            print(f"{each}: {describe(each)}")
        except UserError as error:
            if broken is not None:
                print(f"{broken[0]}: {broken[1].remedy}")
            broken = each, error
    if broken is not None:
        raise broken[1]
    return 0


def describe(path: Path) -> str:
    """One line about a complete checkpoint.

    Raises UserError when a file is missing or altered, a tensor does not fit the network, or a number is not finite.
    Holds one tensor at a time.
    """
    step = checkpoint.verify(path)
    state = checkpoint.read_state(path)
    config = config_from_dict(state.config)
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in build_model(config).state_dict().items()}
    files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
    for name in sorted(file for file in files if file.endswith(".safetensors")):
        with safetensors.safe_open(path / name, framework="pt") as file:
            keys = set(file.keys())
            if name in (checkpoint.EMA, checkpoint.MODEL) and keys != set(shapes):
                differing = ", ".join(sorted(keys ^ set(shapes))[:3])
                raise UserError("checkpoint", path, f"{name} is of another network: {differing} differ")
            for key in sorted(keys):
                value = file.get_tensor(key)
                wanted = [] if key.endswith("/step") else shapes.get(key.rpartition("/")[0] or key)
                if list(value.shape) != wanted:
                    raise UserError("checkpoint", path, f"{name}: {key} has shape {list(value.shape)}, not {wanted}")
                if not bool(value.isfinite().all()):
                    raise UserError("checkpoint", path, f"{name}: {key} holds numbers that are not finite")
    size = sum(entry["bytes"] for entry in files.values()) / 2**20
    return f"step {step}, preset {config.preset}, {len(files)} files, {size:.1f} MiB, complete"
