"""Whole-state checkpoints: written aside, hashed, renamed last; resumed by step; never half-written.

A checkpoint is a directory ``step_00001000`` (1000 steps are done):

    model.safetensors      weights and fixed tables, under the model's state-dict names
    ema.safetensors        the same with the weights' moving averages: what is sampled from
    optimizer.safetensors  the optimizer's other tensors (optimizer.json: its numbers)
    state.json             step, position in the data, schedule, configuration, random generators, versions, statistics
    manifest.json          size and SHA-256 of every other file; written last

Every engine writes these files, with whole tensors: a checkpoint fits any engine, ZeRO stage and number of ranks.
"""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastasync import __version__
from fastasync.config import Config, config_from_dict, differences, flatten
from fastasync.distributed import OtherRankFailed
from fastasync.errors import UserError
from fastasync.files import error_number, sha256_file
from fastasync.model import LightningDiT
from fastasync.schedule import Schedule, schedule_from_json
from fastasync.training.build import build_model

FOLDER = "checkpoints"
MANIFEST, STATE, MODEL, EMA = "manifest.json", "state.json", "model.safetensors", "ema.safetensors"
FORMAT = 1
PART, OLD = ".part", ".old"  # suffixes of a directory that is being written, or removed
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class RunState:
    """Everything of a run but its tensors, as JSON values.

    ``step``: steps done.  ``position``: the same, as the data's order counts it.  ``schedule``: ``Schedule.to_json``.
    ``statistics``: fingerprint of the latents' statistics.  ``tally``: running sums of the metrics.
    """

    step: int
    position: int
    config: dict[str, Any]
    schedule: dict[str, Any]
    statistics: str
    tally: list[float]
    random: dict[str, Any]
    versions: dict[str, str]


class Writer(Protocol):
    """The part of an engine that saves: all ranks take part, the main rank writes and completes the directory."""

    is_main: bool

    def any(self, flag: bool) -> bool: ...

    def save(self, directory: Path) -> None: ...


class Loaded(NamedTuple):
    """A network to sample from, and where it comes from."""

    model: LightningDiT
    schedule: Schedule
    config: Config
    info: RunState


# --- random generators and versions -----------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Put the generators back (CUDA's only where there is one)."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))


def versions() -> dict[str, str]:
    """What computed this: Python, torch, CUDA and the packages that training goes through, as far as they are here."""
    found = {"fastasync": __version__}
    for package in ("triton", "deepspeed"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def run_state(step: int, config: Config, schedule: Schedule, statistics: str, tally: list[float]) -> RunState:
    """The state of a run after ``step`` steps, with the random generators as they are now."""
    return RunState(
        step=step,
        position=step,
        config=config.to_dict(),
        schedule=schedule.to_json(),
        statistics=statistics,
        tally=tally,
        random=random_state(),
        versions=versions(),
    )


# --- directories ------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file from tensors on any device."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def stream_tensors(
    path: Path,
    fixed: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a safetensors file of float32 tensors as they come: ``fixed``, then ``tensors`` in the order of ``shapes``.

    So that whoever gathers the tensors one by one holds one at a time.  Raises OSError.
    """
    sizes = {name: list(tensor.shape) for name, tensor in fixed.items()} | {k: list(v) for k, v in shapes.items()}
    header: dict[str, Any] = {}
    start = 0
    for name, shape in sizes.items():
        end = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in itertools.chain(fixed.items(), tensors):
            if list(tensor.shape) != sizes[name]:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, announced {sizes[name]}")
            stream.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())


@contextmanager
def read_tensors(path: Path) -> Iterator[Callable[..., Tensor]]:
    """A function that reads one tensor of a verified safetensors file by name; ``missing=None`` allows it to be absent.

    Raises UserError when the file cannot be read or lacks a tensor.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())

            def read(name: str, **options: Any) -> Tensor:
                if name in names:
                    return file.get_tensor(name)
                if "missing" in options:
                    return options["missing"]
                raise UserError("checkpoint", path, f"holds no {name}: it is of another network")

            yield read
    except (OSError, SafetensorError) as error:
        raise UserError("checkpoint", path, f"cannot be read ({error})") from None


def _together(engine: Writer, work: Callable[[], None]) -> None:
    """Do a part of saving on every rank; when it fails on one, it fails on all: nobody waits for who has given up."""
    error: Exception | None = None
    try:
        work()
    except Exception as caught:  # whatever it is, it is raised again below
        error = caught
    if engine.any(error is not None):
        raise error or OtherRankFailed(2)


def save(root: Path, state: RunState, engine: Writer, *, keep: int, milestone_every: int = 0) -> Path:
    """Write the checkpoint of ``state.step`` under ``root``, then remove all but the newest ``keep`` and milestones.

    Every rank calls this.  Steps that are multiples of ``milestone_every`` (0: none) are kept for ever.
    Raises UserError when the disk is full or fails: what was there before is intact, the part is removed.
    """
    final = root / f"step_{state.step:08d}"
    part = final.with_name(final.name + PART)

    def begin() -> None:
        if engine.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def complete() -> None:
        if engine.is_main:
            (part / STATE).write_text(json.dumps(asdict(state), allow_nan=False))
            _write_manifest(part, state.step)
            if final.exists():  # a damaged one: a complete one would have been resumed from
                _remove(final)
            os.rename(part, final)
            _fsync(root)
            _prune(root, state.step, keep, milestone_every)

    with _explained(root, part) if engine.is_main else nullcontext():
        for work in (begin, lambda: engine.save(part), complete):
            _together(engine, work)
    return final


def _write_manifest(part: Path, step: int) -> None:
    files = {}
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(part).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (part / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n")
    for path in [part / MANIFEST, *(path for path in part.rglob("*") if path.is_dir()), part]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(root: Path, part: Path) -> Iterator[None]:
    """Remove the part when anything goes wrong, and turn an error of the disk into one line."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        number = error_number(error)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left on the device" if full else os.strerror(number) if number else str(error)
        remedy = "free some and run again" if full else "choose a folder that can be written to, or check the disk"
        good = newest(root).path
        kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise UserError(str(part), what, f"{remedy}; {kept}") from None


def _remove(path: Path) -> None:
    """Remove a directory so that a process killed meanwhile leaves no half of it under its name."""
    aside = path.with_name(path.name + OLD)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what killed processes left: parts, and checkpoints that were being removed."""
    for suffix in (PART, OLD):
        for leftover in root.glob(f"step_*{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)


def _step_of(path: Path) -> int | None:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def steps(root: Path) -> list[tuple[int, Path]]:
    """The checkpoints under ``root``, complete or not, oldest step first."""
    if not root.is_dir():
        return []
    return sorted((step, path) for path in root.iterdir() if (step := _step_of(path)) is not None)


def _prune(root: Path, saved: int, keep: int, milestone_every: int) -> None:
    """Of the steps up to the one just ``saved``: later ones are damaged (it would have been resumed from one that is
    not), and must not stand for a complete one."""
    for step, path in [each for each in steps(root) if each[0] <= saved][:-keep]:
        if not milestone_every or step % milestone_every:
            _remove(path)


# --- checking and finding ---------------------------------------------------------------------------------------


def fault(path: Path, hashes: bool = True) -> str | None:
    """Why a checkpoint is not complete, or None: every file there, with the size (and hash) of the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        written, step = int(manifest["format"]), int(manifest["step"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if written != FORMAT:
        return f"format {written} (this version reads {FORMAT})"
    if step != _step_of(path):
        return f"holds step {step}"
    for name in (STATE, EMA):
        if name not in files:
            return f"{name} is not in {MANIFEST}"
    for name, (size, sha256) in files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if hashes and sha256_file(path / name) != sha256:
                return f"{name} was altered (its hash is not the manifest's)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def verify(path: str | Path) -> int:
    """Check a checkpoint, without a GPU and without loading it; returns its step.  UserError says what is wrong."""
    path = Path(path)
    if not path.is_dir():
        a_file = "is a file: give a run, its checkpoints, or one of them (step_...)"
        raise UserError("checkpoint", path, a_file if path.exists() else "no such folder")
    reason = fault(path)
    if reason and _step_of(path) is None and not (path / MANIFEST).exists():
        raise UserError("checkpoint", path, "holds none: give a run, its checkpoints, or one of them (step_...)")
    if reason:
        raise UserError("checkpoint", path, f"damaged: {reason}; use another one")
    step = _step_of(path)
    assert step is not None  # fault() compared it
    return step


def saved_at(root: Path, step: int) -> Path | None:
    """The checkpoint of ``step`` if it is whole; its hashes, which take seconds, are not compared."""
    path = root / f"step_{step:08d}"
    return path if fault(path, hashes=False) is None else None


def whole(root: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints under ``root``, oldest step first; hashes are not compared."""
    return [each for each in steps(root) if fault(each[1], hashes=False) is None]


class Newest(NamedTuple):
    """The newest complete checkpoint (None: none), and one line for each newer one that was skipped."""

    path: Path | None
    skipped: list[str]


def newest(root: Path) -> Newest:
    """The complete checkpoint of the highest step: never by date, never by size."""
    skipped: list[str] = []
    for _, path in reversed(steps(root)):
        reason = fault(path)
        if reason is None:
            return Newest(path, skipped)
        skipped.append(f"skipped checkpoint {path}: {reason}")
    return Newest(None, skipped)


def resumable(root: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from (None: a new run); says what was skipped and why.

    Raises UserError when there are checkpoints but all are damaged: starting over would overwrite them.
    """
    found = newest(root)
    for line in found.skipped:
        say(line)
    if found.path is None and found.skipped:
        raise UserError(str(root), "no checkpoint is complete", "restore one, or remove this folder to start over")
    return found.path


def find(source: str | Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """A checkpoint from its own path, a ``checkpoints`` folder's or a run's (then the newest complete one).

    ``say`` receives a line for each newer one that is damaged.
    """
    source = Path(source)
    if _step_of(source) is not None:
        verify(source)
        return source
    root = source / FOLDER if (source / FOLDER).is_dir() else source
    found = newest(root)
    if found.path is None:
        remedy = f"none is complete ({found.skipped[0]})" if found.skipped else "train first, or give another path"
        raise UserError("checkpoint", f"none in {source}", remedy)
    for line in found.skipped:
        say(line)
    return found.path


def read_state(path: Path) -> RunState:
    """The state of a complete checkpoint."""
    try:
        return RunState(**json.loads((path / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("checkpoint", path, f"{STATE} cannot be read ({error})") from None


def check_same_run(state: RunState, config: Config, schedule: Schedule, statistics: str, where: Path) -> None:
    """Raise UserError unless the checkpoint belongs to this configuration, schedule and these statistics."""
    saved = config_from_dict(state.config)
    before, now = flatten(saved), flatten(config)
    changed = [f"{name} = {before[name]} (now {now[name]})" for name in differences(saved, config)]
    if changed:
        raise UserError(str(where), f"was trained with {', '.join(changed)}", "set them back, or use another --out")
    if state.statistics != statistics:
        raise UserError(
            str(where),
            f"was trained on latents with statistics {state.statistics}, these have {statistics}",
            "use the same encoders and data, or another --out",
        )
    if state.schedule != json.loads(json.dumps(schedule.to_json())):
        other = f"{state.schedule.get('kind')} schedule, not {schedule.kind} {schedule.fingerprint}"
        raise UserError(str(where), f"was trained on another {other}", f"use the one in its {STATE}, or another --out")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of a verified checkpoint, on the CPU."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError("checkpoint", path, f"cannot be read ({error})") from None


def load_model(
    source: str | Path,
    ema: bool = True,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Loaded:
    """The network of a checkpoint, of a run's newest complete one, with its schedule, configuration and state.

    ``ema``: the weights' moving averages (what scores are quoted for) or the raw weights.  In evaluation mode.
    ``say``: as for ``find``.
    Raises UserError when it is missing, damaged or of another architecture.
    """
    path = find(source, say)
    state = read_state(path)
    config = config_from_dict(state.config)
    if not (path / (EMA if ema else MODEL)).is_file():
        raise UserError("checkpoint", path, f"holds no {MODEL}: use its moving averages (sample.ema=true)")
    with torch.device("meta"):
        model = build_model(config)
    weights = load_tensors(path / (EMA if ema else MODEL))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in weights or expected.get(name) != tuple(weights[name].shape)
    )
    if differing:
        raise UserError("checkpoint", path, f"is of another architecture: {', '.join(differing[:3])} differ")
    model.load_state_dict(weights, assign=True)
    schedule = schedule_from_json(state.schedule, config.representations.names, source=f"checkpoint {path}")
    return Loaded(model.to(device).eval().requires_grad_(False), schedule, config, state)
