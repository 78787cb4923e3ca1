"""Running sums on the device, and where records go."""

import json
import math

import pytest
import torch

from fastasync.training.metrics import MetricsLog, Stopwatch, Tally, TallyReading, peak_flops


def read(tally):
    return TallyReading(tally.names, tally.values.tolist())


def test_tally_counts_and_averages():
    tally = Tally(["loss", "grad_norm"], torch.device("cpu"))
    assert read(tally).means == {"loss": None, "grad_norm": None}
    nan = math.nan
    for step, (loss, norm) in enumerate(
        [(1, 1), (nan, nan), (3, 2), (5, nan), (nan, math.inf), (7, 9), (nan, nan)], start=1
    ):
        tally.add([torch.tensor([float(loss)]), torch.tensor(float(norm))], step)
    reading = read(tally)
    assert reading.means == {"loss": pytest.approx(11 / 3), "grad_norm": pytest.approx(4.0)}
    assert (reading.skipped, reading.skipped_in_a_row, reading.first_skipped) == (4, 2, 4)
    assert math.isnan(tally.offending[1])
    tally.restart()
    assert read(tally).means["loss"] is None
    assert read(tally).skipped == 4


def test_tally_continues_from_its_values():
    one, other = (Tally(["loss", "grad_norm"], torch.device("cpu")) for _ in range(2))
    rows = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    rows[3:5] = math.nan
    for step, row in enumerate(rows):
        one.add([row], step)
    for step, row in enumerate(rows[:4]):
        other.add([row], step)
    third = Tally(["loss", "grad_norm"], torch.device("cpu"))
    third.load(json.loads(json.dumps(other.values.tolist())))
    for step, row in enumerate(rows[4:], start=4):
        third.add([row], step)
    assert third.values.tolist() == one.values.tolist()


def test_infinite_term_with_a_finite_norm_does_not_stop_the_log():
    tally = Tally(["loss", "grad_norm"], torch.device("cpu"))
    tally.add([torch.tensor([math.inf, 1.0])], 1)
    tally.add([torch.tensor([2.0, 3.0])], 2)
    assert read(tally).means == {"loss": 2.0, "grad_norm": 3.0}
    assert read(tally).skipped == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),  # another card than the A10
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Unknown 3000", None),
    ],
)
def test_peak_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_stopwatch_leaves_out_what_is_not_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastasync.training.metrics.time.perf_counter", lambda: now[0])
    watch = Stopwatch(batch=8)
    watch.steps, now[0] = 5, 104.0
    began, now[0] = now[0], 110.0
    watch.leave_out(began)
    assert watch.read() == (pytest.approx(5 * 8 / 4), 0.0)
    with watch.waiting():
        now[0] = 110.5
    watch.steps, now[0] = 1, 112.0
    assert watch.read() == (pytest.approx(4.0), pytest.approx(0.25))
    now[0] = 113.0
    assert watch.read() == (0.0, 0.0)


def test_log_drops_later_steps_and_torn_lines(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": None})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 1, "lo')
    (tmp_path / ".metrics.jsonl.123.partial").write_text("of a killed process")
    with MetricsLog(tmp_path, 2) as log:
        log.write({"step": 3, "loss": 1.5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.5}]
    with MetricsLog(tmp_path, 0):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_has_the_records(tmp_path, tiny, run, board):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny(), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("loss/semantic")] == [2, 4, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([r["loss"] for r in records], rel=1e-6)
    assert "mfu" not in events.Tags()["scalars"]  # null without a known peak


def test_progress_bar_shows_rate_and_remaining_time(tmp_path, tiny, run, capsys):
    run(tiny(), tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "step/s" in shown
    assert "loss=" in shown
