"""Every kernel compiles for sm_90 without a GPU and spills no registers; every launcher gets as far as its launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_kernels_compile_without_spills_and_launchers_bind_their_arguments(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = HERE.parents[1]
    environment |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "offline.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line[3:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("ok "))
    modules = {label.split(".")[0] for label in lines if "." in label}
    assert {
        "noising",
        "flow_errors",
        "guided_update",
        "adaln",
        "adaln_tops",
        "tops",
        "fp8_casts",
        "qknorm_rope",
        "swiglu",
        "column_sums",
        "label_dropout",
        "short_attention",
        "medium_attention",
    } <= modules
    # forward and backward; the loss: errors and gradient, their sum, the scaling that a factor of one skips
    assert lines["noising 1"] == lines["flow_errors 1"] == "2 launches"
    assert lines["corrected_loss 1"] == "3 launches"
    # forward, backward and the sums over its partial results; a bias costs no more than a sum of its own
    assert lines["gated"] == lines["rmsnorm_modulate"] == "4 launches"
    assert lines["gated, bias"] == "5 launches"
    assert (lines["qknorm_rope"], lines["qknorm_rope, bias"]) == ("3 launches", "4 launches")
    assert (lines["swiglu"], lines["swiglu, bias"]) == ("2 launches", "3 launches")
    assert (lines["short_attention"], lines["medium_attention"]) == ("2 launches", "3 launches")
    assert lines["drop_labels 1"] == "1 launches"
