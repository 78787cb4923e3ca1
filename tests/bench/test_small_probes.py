"""The experiment with D's cheap probes, on digits."""

import csv

from bench.experiments import small_probes


def test_every_budget_has_its_row_also_one_that_pays_for_nothing(tmp_path, capsys):
    """A probe of a twentieth of the run, and one of six steps, which is refused.  What has a row is not done again."""
    out, work = tmp_path / "out", tmp_path / "work"
    command = ["--preset", "digits", "--seeds", "0", "--out", str(out), "--work", str(work), "--budgets"]
    assert small_probes.main([*command, "0.05", "0.01"]) == 0
    said = capsys.readouterr().out
    assert small_probes.main([*command, "5e-2"]) == 0
    assert "chosen" not in capsys.readouterr().out
    with (out / "small_probes.csv").open() as stream:
        trained, refused = csv.DictReader(stream)
    assert (trained["budget"], refused["budget"]) == ("0.05", "0.01")
    assert f"chosen {trained['chosen']}, " in said
    assert 0 < float(trained["share"]) <= 0.05
    assert "probe.budget: 0.01: pays for 6 steps" in refused["error"]
    assert refused["chosen"] == ""
