"""Stopping a run from outside: signals that are honoured at the end of a step, and one process for each run."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fastasync.distributed import last_words
from fastasync.errors import UserError

_ECHO = 3.0  # seconds within which a launcher repeats a signal
STUCK = 20.0  # seconds without taking a signal after which a rank hangs: launchers kill after 30
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again", what a launcher should restart


class Interrupted(SystemExit):
    """A signal ended the run after a checkpoint was saved.  Uncaught, the process exits with code 75."""

    def __init__(self, step: int, checkpoint: Path):
        self.step, self.checkpoint = step, checkpoint
        super().__init__(EXIT_CODE)


class StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one acts as if nobody listened (Ctrl-C twice stops at once).

    Python lets only the main thread set handlers: used elsewhere, nothing is caught.

    ``launched``: launchers pass a signal on to processes that the terminal has sent it to already, and deepspeed sends
    two different ones: then only a second SIGINT, seconds later, stops at once.  A rank that leaves with an error has
    ``last_words``.  One that waits in a collective for a rank that is gone may never see an error, nor Python the
    signal: when the main thread takes none for ``STUCK`` seconds after it, ``stuck()`` is called, from a thread that
    then ends the process with code 75.  Not inside ``patient()``, where ranks wait for one that writes to a disk.
    """

    def __init__(self, launched: bool = False, stuck: Callable[[], None] | None = None) -> None:
        self.received: int | None = None
        self._launched, self._stuck, self._when = launched, stuck, 0.0
        self._previous: dict[int, Any] = {}
        self._woken: tuple[int, int] | None = None  # what the wake-up descriptor was, and the end we gave it
        self._left, self._moved, self._patient = threading.Event(), 0.0, False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
            if self._launched and self._stuck is not None:
                reading, writing = os.pipe()
                os.set_blocking(writing, False)
                self._woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False), writing
                arguments = (reading, threading.get_ident(), self._stuck)
                self._thread = threading.Thread(target=self._watch, args=arguments, name="signals", daemon=True)
                self._thread.start()
        return self

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, a call may take as long as it does."""
        self._patient = True
        try:
            yield
        finally:
            self._patient, self._moved = False, time.monotonic()

    def _watch(self, reading: int, main: int, stuck: Callable[[], None]) -> None:
        """Wait for SIGTERM; repeat it from then on, to see whether the main thread still takes signals."""
        while received := os.read(reading, 64):
            if signal.SIGTERM in received:
                break
        self._moved = time.monotonic()
        while received and not self._left.wait(STUCK / 8) and signal.getsignal(signal.SIGTERM) == self._remember:
            if self._patient:
                self._moved = time.monotonic()
                continue
            if time.monotonic() - self._moved > STUCK:
                stuck()
                os._exit(EXIT_CODE)
            signal.pthread_kill(main, signal.SIGTERM)
        os.close(reading)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        if self._woken is not None:
            previous, writing = self._woken
            signal.set_wakeup_fd(previous)
            os.close(writing)  # ends the thread that reads it
            self._woken = None
        if self._thread is not None:
            self._thread.join(1.0)  # or it would send a signal to whoever handles it next
        if self._launched and kind is not None and self._previous:
            last_words()
            del self._previous[signal.SIGTERM]
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._moved = time.monotonic()
        if self.received is None:
            self.received, self._when = number, time.monotonic()
            if not self._launched:
                self._restore()
        elif number == signal.SIGINT and time.monotonic() - self._when > _ECHO:
            self._restore()
            raise KeyboardInterrupt

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: a handler that was not set from Python cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def only_process(out_dir: Path, doing: str = "training") -> Iterator[None]:
    """Hold the folder's lock; the system frees it however the process ends.  UserError while another one holds it.

    A POSIX record lock, not flock: worker processes that outlive a killed parent do not inherit it.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(str(out_dir), error.strerror, "choose a folder that can be written to") from None
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            busy = f"another process is {doing} here"
            raise UserError(str(out_dir), busy, "wait for it, or use another --out") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
