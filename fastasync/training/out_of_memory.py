"""One line for a device that is out of memory: what should fit, and which field to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastasync.config import Config, Sample
from fastasync.distributed import session
from fastasync.errors import UserError
from fastasync.model import UNDIVIDED, LightningDiT, Zero, activation_memory, memory_estimate, memory_with_zero
from fastasync.model.recompute import RECOMPUTE
from fastasync.sampling.generate import ADAPTIVE_GROUP
from fastasync.training.build import USABLE, build_model, choose_autocast
from fastasync.training.deepspeed_json import zero_of
from fastasync.training.engine import choose_engine


def usable_memory(device: torch.device) -> int:
    """Bytes of the device that this process can have: what is free, and what it holds already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


@contextmanager
def explained_training(config: Config, model: LightningDiT, device: torch.device) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into the UserError of ``training_error``."""
    try:
        yield
    except torch.OutOfMemoryError:
        recompute = next((str(block.recompute) for block in model.blocks), "none")
        here = session()
        zero = zero_of(config, device, here.world) if choose_engine(config, here) == "deepspeed" else UNDIVIDED
        raise training_error(config, usable_memory(device), device, recompute, zero) from None


def training_error(
    config: Config, usable: int, device: torch.device, recompute: str, zero: Zero = UNDIVIDED
) -> UserError:
    """What to say when a part of the batch did not fit: how many images should, and the fields that make it so.

    The network's memory estimate says what weights, gradients and optimizer take and what each image adds; ``usable``
    bytes were there.  Where the estimate says that the part would have fitted, the failure knows better: an image adds
    at least the room over the part.  A tenth of the room stays free, as in ``choose_memory``.

    Args:
        recompute: what the backward pass recomputed.
        zero: how many devices the run has, and how they divide what it holds.
    """
    train, world = config.train, zero.world
    part = train.batch // (world * train.accumulate)
    with torch.device("meta"):
        model = build_model(config)
    precision = "bf16" if choose_autocast(train.precision, device) else "fp32"
    fixed = memory_with_zero(memory_estimate(model, 0, precision), zero)
    room = max(usable - fixed, 0)
    too_low = max(1.0, room / (part * activation_memory(model, 1, precision, recompute)))

    def fits(what: str) -> int:
        return int(USABLE * room / (too_low * activation_memory(model, 1, precision, what)))

    def accumulate(largest: int) -> int:
        """The smallest split of the batch into equal parts of at most ``largest``; 1 image is always one."""
        return next(n for n in range(1, part + 1) if part % n == 0 and part // n <= largest) * train.accumulate

    least = next((what for what in RECOMPUTE[RECOMPUTE.index(recompute) :] if fits(what)), None)
    said = f"out of memory: {part} images at a time do not fit into the {usable / 2**30:.3g} GiB that a device has"
    if least is None:
        more = "more GPUs with train.zero=3" if zero.stage < 3 else "more GPUs"
        remedy = f"{said}, of which weights, gradients and optimizer take about {fixed / 2**30:.3g}"
        return UserError("train.batch", train.batch, f"{remedy}: choose a smaller model.size, or {more}")
    largest = fits(least)
    parts = accumulate(largest)
    if least != recompute:
        split = f" and train.accumulate={parts}" if parts > train.accumulate else ""
        remedy = f"set train.memory={least}{split} (same results, slower)"
        return UserError("train.batch", train.batch, f"{said}; with train.memory={least} about {largest} do: {remedy}")
    remedy = f"set train.accumulate={parts} (parts of {train.batch // (world * parts)}, same results)"
    enough = next((what for what in RECOMPUTE[RECOMPUTE.index(recompute) + 1 :] if fits(what) >= part), None)
    if enough is not None:
        remedy += f", or train.memory={enough} (about {fits(enough)} fit, slower)"
    remedy += f", or train.batch={largest * world * train.accumulate} (another run: give a new --out)"
    return UserError("train.batch", train.batch, f"{said}, about {largest} do: {remedy}")


@contextmanager
def explained_sampling(sample: Sample, device: torch.device) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into a UserError that names ``sample.batch``."""
    try:
        yield
    except torch.OutOfMemoryError:
        said = f"out of memory with the {usable_memory(device) / 2**30:.3g} GiB that a device has"
        if sample.integrator == "dopri5":
            remedy = f"dopri5 steps {ADAPTIVE_GROUP} images together: use heun, or a device with more memory"
            raise UserError("sample.integrator", "dopri5", f"{said}: {remedy}") from None
        remedy = "use a device with more memory"
        if sample.batch > 1:
            remedy = f"try sample.batch={sample.batch // 2} (the images stay the same)"
        raise UserError("sample.batch", sample.batch, f"{said}: {remedy}") from None


@contextmanager
def explained_batch(
    field: str, batch: int, device: torch.device, note: str = "", ways: Sequence[str] = (), parts: int = 1
) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into a UserError that names ``field`` with half of the ``batch``.

    Args:
        field: an option, ``--batch``, or a field, ``section.name``.
        note: what another batch means.
        ways: other settings that need less, named before the batch.
        parts: what the batch must divide into.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        said = f"out of memory with the {usable_memory(device) / 2**30:.3g} GiB that a device has"
        half = batch // 2 // parts * parts
        smaller = [f"{field}{' ' if field.startswith('--') else '='}{half}{note}"] if half else []
        remedy = "try " + ", or ".join([*ways, *smaller]) if ways or half else "use a device with more memory"
        raise UserError(field, batch, f"{said}: {remedy}") from None
