"""How long something takes on a CUDA device: for choices that are measured."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch

_log = logging.getLogger(__name__)


def recorded_milliseconds(run: Callable[[], Any], what: str) -> float:
    """Median milliseconds of 10 runs on the current CUDA device, after 3 to warm up.

    Replays of a recording: from Python small shapes take as long as their launches, which a recorded step does not pay.
    ``what`` names it where it cannot be recorded.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph, times = torch.cuda.CUDAGraph(), []
    repeat: Callable[[], Any] = graph.replay
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        _log.info("%s cannot be recorded (%s), so its time has its launches in it", what, error)
        repeat = run
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        repeat()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
