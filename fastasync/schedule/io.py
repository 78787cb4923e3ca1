"""Schedules as text: JSON files with validation, and the short names of the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastasync.errors import UserError
from fastasync.files import write_json
from fastasync.schedule.base import Schedule, check_monotone
from fastasync.schedule.convex import ConvexSchedule
from fastasync.schedule.fixed import OffsetSchedule, PowerSchedule, TableSchedule, cascade, offset, power, synchronous

KINDS: dict[str, type[Schedule]] = {
    cls.kind: cls for cls in (OffsetSchedule, PowerSchedule, TableSchedule, ConvexSchedule)
}
NAMED = "synchronous, offset:D, cascade, power:P"


def schedule_from_json(data: Any, names: Sequence[str] | None = None, source: str = "schedule") -> Schedule:
    """The schedule that ``Schedule.to_json`` wrote.  ``names``: the representations that it must be for.

    Raises UserError when it is of an unknown kind, for other representations, not finite, or not monotone from 0 to 1.
    """
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str) or data["kind"] not in KINDS:
        kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise UserError(source, f"kind {kind!r}", f"use one of {', '.join(KINDS)}")
    arguments = {key: value for key, value in data.items() if key != "kind"}
    if not _finite(arguments):
        raise UserError(source, "holds NaN, infinity or null", "every number must be finite")
    try:
        schedule = KINDS[data["kind"]](**arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(source, f"{data['kind']} schedule", str(error)) from None
    if names is not None and schedule.names != tuple(names):
        raise UserError(
            source,
            f"K = {schedule.count} ({', '.join(schedule.names)})",
            f"this run needs K = {len(names)} ({', '.join(names)}), in this order",
        )
    fault = check_monotone(schedule)
    if fault:
        raise UserError(source, fault, "each tau must be nondecreasing from 0 at s = 0 to 1 at s = 1")
    return schedule


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    if isinstance(value, list):
        return all(_finite(item) for item in value)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def load_schedule(path: str | Path, names: Sequence[str] | None = None) -> Schedule:
    """Read a schedule file.  Raises UserError that names the file when it is missing, not JSON, or not a schedule."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("schedule file", path, f"cannot be read ({error})") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "bring it back (a run's checkpoints hold theirs in state.json)"
        raise UserError("schedule file", path, f"is not JSON ({error}): {remedy}") from None
    return schedule_from_json(data, names, source=f"schedule file {path}")


def save_schedule(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule file atomically."""
    write_json(path, schedule.to_json())


def named_schedule(text: str, names: Sequence[str], roles: Sequence[str]) -> Schedule:
    """``synchronous``, ``offset:0.3``, ``cascade``, ``power:3`` or the path of a schedule file -> the schedule."""
    kind, _, argument = text.partition(":")
    if text == "synchronous":
        return synchronous(names)
    if text == "cascade":
        return cascade(names, roles)
    if kind in ("offset", "power"):
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        low, high = (0.0, 1e3) if kind == "offset" else (1.0, 100.0)  # beyond, float32 has no such times
        if not low <= value <= high:
            raise UserError("schedule", text, f"write {kind}:NUMBER with a number from {low:g} to {high:g}")
        return offset(names, value, roles) if kind == "offset" else power(names, value, roles)
    if text.endswith(".json"):
        return load_schedule(text, names)
    raise UserError("schedule", text, f"use one of {NAMED}, or a .json file")
