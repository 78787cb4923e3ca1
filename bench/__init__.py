"""Benchmarks: correctness first, then time.  ``python -m bench.run`` or ``make bench``; see NOTES.md."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fastasync_kernels") is None:  # a checkout that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
