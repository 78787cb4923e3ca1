"""kill -9 at random moments, most of them inside a checkpoint, never loses the run."""

import json
import subprocess
import sys
from pathlib import Path

from fastasync.training.checkpoint import newest, read_state

KILLS = 20


def test_kill_9_never_loses_the_run(tmp_path):
    script = Path(__file__).with_name("kill_script.py")
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(script), str(out), "0", str(KILLS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *kills, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == KILLS
    for kill in kills:
        # every checkpoint under its own name is complete, and nothing that was reported as saved is gone
        assert kill["damaged"] == [], kill
        assert kill["newest"] >= kill["acknowledged"], kill
    assert sum(bool(kill["unfinished"]) for kill in kills) >= 3, (
        "the kills missed the checkpoints: the test tests nothing"
    )

    # SIGTERM exits with the documented code; the run then ends exactly where one that nobody killed does
    assert (end["sigterm"], end["done"]) == (75, 0)
    files = []
    for folder in (out, tmp_path / "run-whole"):
        path = newest(folder / "checkpoints").path
        assert path is not None
        assert path.name == f"step_{end['steps']:08d}"
        manifest = json.loads((path / "manifest.json").read_text())
        # state.json holds the generators of Python and numpy, which a new process starts anew
        tensors = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "state.json"}
        files.append({**tensors, "tally": read_state(path).tally})
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, end["steps"] + 1))
        files[-1]["metrics"] = [(record["loss"], record["grad_norm"]) for record in records]
    assert files[0] == files[1]
    # nothing is left of what was being written when a process was killed
    assert all(path.name[5:].isdigit() for path in (out / "checkpoints").iterdir())
