"""Times of recordings: what cannot be recorded, and what does not fit."""

import contextlib
import logging

import pytest
import torch
from fastasync_kernels._timing import out_of_memory, recorded_milliseconds


def test_out_of_memory_is_found_behind_other_errors():
    lack = torch.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(lack) is lack
    assert out_of_memory(RuntimeError("operation not permitted when stream is capturing")) is None
    hidden = RuntimeError("the recording cannot be ended")
    hidden.__context__ = lack  # as where the one is raised while the other is handled
    assert out_of_memory(hidden) is lack


class Pretend:
    """A device of which the recording alone fails, and torch then hides the reason."""

    def __init__(self, error):
        self.error, self.capturing = error, False

    @contextlib.contextmanager
    def graph(self, *_, **__):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            raise RuntimeError("operation failed due to a previous error during capture")

    def run(self):
        if self.capturing:
            raise self.error


class Quiet:
    """A stream, an event or a graph that does nothing."""

    def __init__(self, **_):
        pass

    def nothing(self, *_):
        return 1.0

    wait_stream = record = synchronize = elapsed_time = nothing


@pytest.fixture
def pretend(monkeypatch):
    def install(error):
        device = Pretend(error)
        for name in ("Stream", "Event", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, Quiet)
        monkeypatch.setattr(torch.cuda, "current_stream", Quiet)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", device.graph)
        return device

    return install


def test_what_cannot_be_recorded_is_timed_with_its_launches(pretend, caplog):
    caplog.set_level(logging.INFO)
    assert recorded_milliseconds({"waits": pretend(RuntimeError("not permitted")).run}) == {"waits": 1.0}
    assert "waits cannot be recorded" in caplog.text


def test_out_of_memory_is_not_taken_for_what_cannot_be_recorded(pretend):
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        recorded_milliseconds({"large": pretend(torch.OutOfMemoryError("CUDA out of memory")).run})


@pytest.mark.gpu
def test_a_recording_that_runs_out_of_memory_on_the_gpu():
    def run():
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**46, dtype=torch.uint8, device="cuda")

    with pytest.raises(torch.OutOfMemoryError):
        recorded_milliseconds({"large": run})
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
