"""Where an interrupted training of the probe goes on: its whole state every few minutes, in the probe's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastasync.errors import UserError
from fastasync.files import load_tensors, save_tensors, write_json

TRAINING = "training.json"  # names the file of the newest state
EVERY = 120.0  # seconds between two states; writing a large probe's takes one


def read_facts(path: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """The JSON of ``path`` with its ``fingerprint``, or None when there is nothing.

    Raises UserError when it is damaged or belongs to another configuration than ``fingerprint``.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        found = content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "remove it and run the probe again") from None
    if fingerprint is not None and found != fingerprint:
        raise UserError(
            str(path), f"made by another configuration ({found})", "choose another --out, or remove the probe's folder"
        )
    return content


class Progress:
    """The states of one training.  Without a folder it keeps nothing.

    Args:
        folder: the probe's.
        about: what ``training.json`` says besides (``fingerprint`` among it).

    Attributes:
        seconds_before: seconds that the loaded state took.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]):
        self._folder, self._about, self.seconds_before = folder, dict(about), 0.0
        self._begun = self._saved = time.monotonic()

    def load(self) -> dict[str, Tensor] | None:
        """The newest state, or None.  Raises UserError when it is damaged or of another configuration."""
        if self._folder is None:
            return None
        facts = read_facts(self._folder / TRAINING, self._about["fingerprint"])
        if facts is None:
            return None
        remedy = f"remove {self._folder / TRAINING}: the probe's training then starts again"
        self.seconds_before = facts["seconds"]
        return load_tensors(self._folder / facts["file"], facts["sha256"], remedy)

    def save(self, state: Callable[[], Mapping[str, Tensor]], step: int) -> None:
        """Keep ``state()`` of ``step`` and drop the one before, if it is time.

        Interrupted at any point, the one or the other is whole: the file that names it comes last.
        """
        if self._folder is None or time.monotonic() - self._saved < EVERY:
            return
        name = f"training-{step:08d}.safetensors"
        digest = save_tensors(self._folder / name, state())
        seconds = self.seconds_before + time.monotonic() - self._begun
        facts = {"file": name, "sha256": digest, "step": step, "seconds": seconds}
        write_json(self._folder / TRAINING, {**self._about, **facts})
        self._clear(but=name)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Remove what is not needed any more, once the trained probe is kept."""
        if self._folder is not None:
            (self._folder / TRAINING).unlink(missing_ok=True)
            self._clear()

    def _clear(self, but: str = "") -> None:
        assert self._folder is not None
        for path in self._folder.glob("training-*.safetensors"):
            if path.name != but:
                path.unlink(missing_ok=True)
