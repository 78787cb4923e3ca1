"""The experiment that takes DALI's costs apart: its variants run, and none that is far from Pillow's crop is timed."""

import pytest
import torch

from bench.experiments import dali_variants
from bench.experiments.dali_variants import Setting, compare, main, variants, verdict
from bench.harness import Bench, Row
from fastasync.images import dali_loader

pytest.importorskip("nvidia.dali")
TINY = Setting(4, 2, 1, 1, 1)
NAMES = ["before, pipeline", "decoder alone", "pipeline", "pipeline, half the batch", "files", "loader"]


def run(names):
    lines = []
    bench = Bench(torch.device("cpu"), say=lines.append)
    return compare(bench, TINY, names), bench.rows, lines


def test_it_names_the_rates():
    failures, rows, _ = run(NAMES)
    assert failures == []
    assert {row.variant for row in rows} == set(NAMES)
    rates = {row.variant: row for row in rows}
    assert rates["pipeline"].shape == "[2, 3, 256, 256]"
    assert rates["pipeline, half the batch"].shape == "[1, 3, 256, 256]"
    assert all(("PSNR" in rates[name].note) == (name not in ("files", "decoder alone")) for name in NAMES)
    assert verdict(rows).startswith("loader ")
    assert verdict(rows[:1]).startswith("no verdict")
    rates = (("before, pipeline", 5500.0), ("pipeline", 2e4), ("pipeline, depth 3", 19e3), ("loader", 16e3))
    made = [Row(*"dcdtt", "s", "c", name, "", "", 1, 1, 1, 1, images_per_s=rate) for name, rate in rates]
    assert verdict(made) == "loader 16,000 img/s, before 5,500; fastest: pipeline 20,000"


def test_wrong_crops_are_not_timed(monkeypatch):
    def shifted(files, size):
        feed = dali_loader.feed_of(files, size)
        return feed._replace(start=feed.start + 2, stop=feed.stop + 2)

    monkeypatch.setattr(dali_variants, "feed_of", shifted)
    failures, rows, lines = run(["pipeline", "files"])
    assert [row.variant for row in rows] == ["files"]  # one failure does not hide the others
    assert len(failures) == 1
    assert "pipeline: WrongResult" in failures[0]
    assert any("FAILED" in line for line in lines)


def test_the_command(capsys):
    assert len({variant.name for variant in variants()}) == len(variants())
    if not torch.cuda.is_available():
        assert main([]) == 2
    assert main(["--rehearse", "--variants", "nonsense"]) == 2
    assert main(["--rehearse", "--seconds", "0"]) == 0  # everything is skipped, and says so
    assert "no verdict" in capsys.readouterr().out
