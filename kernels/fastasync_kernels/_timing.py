"""How long something takes on a CUDA device: for choices that are measured."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

_log = logging.getLogger(__name__)


def out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The error of the device's memory running out that this one is or came from, if any."""
    if error is None or isinstance(error, torch.OutOfMemoryError):
        return error
    return out_of_memory(error.__context__)


def recorded_milliseconds(runs: Mapping[str, Callable[[], Any]], rounds: int = 10) -> dict[str, float]:
    """Median milliseconds of each run on the current CUDA device, by turns, after 3 of each to warm up.

    Replays of a recording: from Python small shapes take as long as their launches, which a recorded step does not pay.
    Raises torch.OutOfMemoryError where one runs out of memory, recorded or not.
    """
    replays = {name: _recorded(name, run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, replay in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def _recorded(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        # the outer context: a recording that cannot even be ended would leave its stream the current one
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        if lack := out_of_memory(error):
            raise lack from None  # and not what torch hides it behind: that the recording cannot be ended
        _log.info("%s cannot be recorded (%s), so its time has its launches in it", name, error)
        return run
    return graph.replay
