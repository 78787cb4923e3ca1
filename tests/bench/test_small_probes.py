"""The experiment with D's cheap probes, on digits."""

import csv

from bench.experiments import small_probes


def test_every_budget_has_its_row_also_one_that_pays_for_nothing(tmp_path, capsys):
    """A probe of a twentieth of the run, and one of six steps, which is refused; begun twice, nothing is lost."""
    out, work = tmp_path / "out", tmp_path / "work"
    command = ["--preset", "digits", "--seeds", "0", "--out", str(out), "--work", str(work), "--budgets"]
    assert small_probes.main([*command, "0.05", "0.01"]) == 0
    assert small_probes.main([*command, "0.05"]) == 0  # found, not trained again
    with (out / "small_probes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["budget"] for row in rows] == ["0.05", "0.01", "0.05"]
    trained, refused, again = rows
    assert trained["chosen"] == again["chosen"] != ""
    assert float(trained["share"]) <= 0.05
    assert float(again["seconds"]) < float(trained["seconds"])
    assert "probe.budget: 0.01: pays for 6 steps" in refused["error"]
    assert refused["chosen"] == ""
    assert "budget 0.05, seed 0" in capsys.readouterr().out
