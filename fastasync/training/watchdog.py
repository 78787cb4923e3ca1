"""Says where a run stands still: a thread that prints the main thread's stack when no step ends for minutes."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable

FIRST = 6  # the first step compiles, loads and connects: it may take this many times as long
_COMPILING = ("convert_frame.py", "compile_fx.py", "async_compile.py")  # frames of torch.compile at work

_REMEDY = "if that does not end: train.compile=off, or TORCHINDUCTOR_COMPILE_THREADS=1 in the environment"


class Watchdog:
    """``with Watchdog(minutes, say) as watchdog:`` and ``watchdog.beat(step)`` after every step.  0 minutes: off.

    It only reports, once for each stall: whether to stop is the user's (or a collective's time limit) to decide.
    A main thread that compiles is not stalled; of a first step that has compiled for the whole limit it says so.
    """

    def __init__(self, minutes: float, say: Callable[[str], None], rank: int = 0):
        self._limit, self._say, self._rank = 60.0 * minutes, say, rank
        self._watched = threading.get_ident()
        self._end = threading.Event()
        self._last, self._step, self._beats, self._told = time.monotonic(), -1, 0, False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """A step ended."""
        self._last, self._step, self._told = time.monotonic(), step, False
        self._beats += 1

    def _watch(self) -> None:
        while not self._end.wait(self._limit / 10):
            quiet = time.monotonic() - self._last
            if self._told or quiet < self._limit:
                continue
            frame = sys._current_frames().get(self._watched)
            stack = traceback.extract_stack(frame)
            compiling = any(entry.filename.endswith(_COMPILING) for entry in stack)
            if compiling and self._beats:
                continue
            if not compiling and quiet < self._limit * (1 if self._beats else FIRST):
                continue
            self._told = True
            after = f"after step {self._step}" if self._beats else "before the first step's end"
            if compiling:
                after += f"; it compiles ({_REMEDY})"
            where = "".join(traceback.format_list(stack[-12:]))
            self._say(f"watchdog: rank {self._rank}: no step for {quiet / 60:.3g} minutes, {after}; it is at\n{where}")

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
