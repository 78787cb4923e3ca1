"""The hashes of shards, compared in the background while what they hold is in use already."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fastasync.data.shards import MappedFile, check_hash, unreadable
from fastasync.errors import UserError


class Verification:
    """Compares the hashes of ``files`` with the SHA-256 beside each, in a thread that begins at once.

    Up to ``at_once`` bytes take seconds, for which to ``wait``.  Of more, which are in use meanwhile, it rests as long
    as it works, so that it takes half of a disk and of a CPU core at most, and ``say`` gets a line, from the thread,
    when all are right.
    """

    def __init__(self, files: Sequence[tuple[MappedFile, str]], at_once: int, say: Callable[[str], None]):
        self.count, self.verified = len(files), 0
        self.bytes = sum(file.size for file, _ in files)
        self.large = self.bytes > at_once
        self.error: UserError | None = None  # of the first file that is not what was written
        self._files, self._say = files, say
        self._worked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="verify latents", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether every file was right."""
        return self.verified == self.count

    def wait(self) -> None:
        """Until all is compared, or the first file is wrong."""
        self._thread.join()

    def _rest(self) -> None:
        if self.large:
            time.sleep(time.monotonic() - self._worked)
        self._worked = time.monotonic()

    def _run(self) -> None:
        began = time.monotonic()
        for file, sha256 in self._files:
            try:
                check_hash(file, sha256, self._rest)
            except UserError as error:
                self.error = error
                return
            except OSError as error:  # it was there when it was opened
                self.error = unreadable(file.path, error)
                return
            self.verified += 1
        if self.large:
            took = time.monotonic() - began
            what = f"the hashes of this process's {self.count} shards are right"
            self._say(f"latents: {what} ({self.bytes:,} bytes, {took:.0f} s)")


def damage(latents: object) -> UserError | None:
    """What the verification of ``latents`` has found so far; None also where there is none."""
    verification: Verification | None = getattr(latents, "verification", None)
    return None if verification is None else verification.error
