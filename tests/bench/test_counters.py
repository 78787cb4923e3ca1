"""The table of counters, from a page as ncu writes it; which operations are counted."""

import csv
import io

import torch

from bench import counters
from bench.harness import Operation

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NAMES = ["ID", "Kernel Name", "thread Domain:Push/Pop_Range", counters.METRICS["us"], counters.METRICS["memory %"]]
NAMES += [STALLED.format(name) for name in ("barrier", "long_scoreboard", "selected")]
UNITS = ["", "", "", "us", "%", "inst", "inst", "inst"]
RANGE = '"<default domain>:case: loss, with cosine, [256], float32:none:none:none"'
VALUES = ["0", "_loss_kernel", RANGE, "1,026.5", "31.5", "3.00", "6.00", "1.00"]
BACKWARD = ["1", "_scale_kernel", "", "2", "0.03", "1.00", "1.00", "1.00"]


def page():
    """As ncu prints it, after what the program printed."""
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([NAMES, UNITS, VALUES, BACKWARD])
    return "==PROF== Connected to process 7\nloss:\n" + stream.getvalue() + "==PROF== Disconnected\n"


def test_a_kernel_of_the_page():
    row, backward = counters.kernels(page())
    assert row["operation"] == "loss, with cosine, [256], float32"
    assert (row["kernel"], row["us"], row["memory %"], row["warps"]) == ("_loss_kernel", "1.03e+03", "31.5", "")
    assert (backward["operation"], backward["kernel"]) == (row["operation"], "_scale_kernel")  # of autograd's thread
    assert row["wait for"] == "long_scoreboard 60%, barrier 30%"


def test_only_our_kernels_are_counted(monkeypatch):
    events = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", events.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: events.append("pop"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bench = counters.Counted(torch.device("cpu"))
    variants = {"reference": lambda x: events.append("reference"), "triton": lambda x: events.append(f"ours {x}")}
    bench.operation(Operation("loss", "both", "[4]", "float32", variants, lambda seed, batch: [batch], 4))
    bench.operation(Operation("loss", "none", "[4]", "float32", {"reference": None}, lambda *_: [0], 4))
    counted = ["case: loss, both, [4], float32", "start", "ours 4", "stop", "pop"]
    assert events == ["ours 4", "ours 4", *counted]


def test_what_is_missing_is_said(capsys):
    assert counters.main(["step"]) == 2
    assert "no subject 'step'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert counters.main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
