"""Builds the compiled AdamW through setup.py once a session (the CUDA one only where there is a GPU to run it)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastasync.optim import library

ROOT = Path(__file__).resolve().parents[2]


def build(target: Path, cuda: bool) -> Path:
    """Runs setup.py and returns the folder with the libraries."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target), "--build-temp", str(target)]
    environment = {**os.environ, "FASTASYNC_BUILD_CUDA": "1" if cuda else "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    return target / "fastasync" / "optim"


@pytest.fixture(scope="session")
def build_libraries():
    return build


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("libraries"), torch.cuda.is_available())
    found = {kind: folder / f"_adamw_{kind}.so" for kind in ("cpu", "cuda")}
    return {kind: library.Library(path) for kind, path in found.items() if path.exists()}


@pytest.fixture(
    params=[("cpu", False), ("cpu", True), pytest.param(("cuda", True), marks=pytest.mark.gpu)],
    ids=["pytorch", "cpp", "cuda"],
)
def place(request, monkeypatch, libraries):
    """(device, native): the three implementations of FusedAdamW's step."""
    device, native = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(library, "load", libraries.get)
    return device, native
