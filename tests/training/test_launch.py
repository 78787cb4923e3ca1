"""What the README shows for several nodes, with this machine in the part of all of them: hostfiles, Slurm, and hosts
that cannot be reached.  Where a launcher needs ssh, pdsh or Slurm, a script of a few lines on PATH stands for it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastasync.errors import UserError
from fastasync.rendezvous import LIMIT, name_ranks, open_store, start_limit
from fastasync.training import checkpoint
from tests.training.deepspeed_kit import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = [
    "representations.encoder_steps=10", "representations.semvae_steps=10", "schedule.name=offset:0.3", "model.depth=1",
    "model.width=32", "train.batch=16", "train.steps=4", "train.log_every=1", "train.checkpoint_every=3",
    "train.device=cpu",
]  # fmt: skip
SSH = """#!/usr/bin/env bash
[[ "$*" == *"hostname -I"* ]] && echo 127.0.0.1
exit 0
"""
# pdsh -S -f FANOUT -w HOST,HOST WORDS: the words are one command, in which %n is the number of the host
PDSH = r"""#!/usr/bin/env bash
hosts=${5//,/ } n=0
for host in $hosts; do
    if [[ $host == *.invalid ]]; then
        echo "pdsh@here: $host: ssh exited with exit code 255" >&2
    else
        words="${*:6}"
        bash -c "${words//%n/$n}" &
    fi
    n=$((n + 1))
done
wait
"""
SRUN = """#!/usr/bin/env bash
[[ " $* " == *" --cpus-per-task=$SLURM_CPUS_PER_TASK "* ]] || exit 9
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for ((n = 0; n < SLURM_NNODES; n++)); do "$@" & done
wait
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "${status:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2" == "show hostnames" ]] && printf '%s\\n' ${3//,/ }
[[ $1 == requeue ]] && echo "$2" >> "$REQUEUED"
exit 0
"""


@pytest.fixture
def stand_ins(tmp_path):
    """A folder for PATH with ssh, pdsh, srun, scontrol, and this Python's torchrun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    torchrun = f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    programs = {"ssh": SSH, "pdsh": PDSH, "srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def program(out, *more):
    return ["train.py", "--preset=digits", f"--out={out}", *(f"--set={setting}" for setting in (*SETTINGS, *more))]


def steps_of(out):
    file = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def errors_in(said):
    """Our error lines, without the prefix that launchers may put before them."""
    return [line[line.index("fastasync: error") :] for line in said.splitlines() if "fastasync: error" in line]


# --- hostfiles ------------------------------------------------------------------------------------------------------


def deepspeed(hosts, *options):
    pytest.importorskip("deepspeed")
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hosts, *options]


def test_a_hostfile_of_two_nodes(tmp_path, stand_ins, started):
    """``deepspeed --hostfile hosts train.py ...`` from one node: it starts the launcher on each, over pdsh."""
    hosts, out = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("# all of them are this machine\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
    with started([*deepspeed(hosts, "--master_port", free_port()), *program(out)], PATH=path) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("train: 4 steps done") == 1
    assert steps_of(out) == [1, 2, 3, 4]
    assert "nnodes=2, num_local_procs=1, node_rank=1" in said


def test_the_probe_under_deepspeed(tmp_path, started):
    """Two ranks on this machine: the first one learns the schedule, both end well."""
    out = tmp_path / "run"
    launcher = deepspeed(tmp_path / "no hostfile", "--num_gpus", 2, "--master_port", free_port())
    settings = [*SETTINGS, "schedule.name=learned", "train.steps=400", "probe.estimator=B", "probe.budget=1.0"]
    settings += ["probe.depth=1", "probe.width=16", "probe.heads=1"]
    probe = ["--module", "fastasync", "probe", "--preset=digits", f"--out={out}"]
    with started([*launcher, *probe, *(f"--set={setting}" for setting in settings)]) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert json.loads((out / "schedule.json").read_text())["kind"] == "convex"
    assert len(re.findall("exits successfully", said)) == 2


def test_a_hostfile_without_ssh(tmp_path, started):
    """The same command started on every node by hand, with its number; the run that is there is done at once."""
    hosts, out, port = tmp_path / "hosts", tmp_path / "run", free_port()
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    options = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    with (
        started([*deepspeed(hosts, *options, 1), *program(out)]) as second,
        started([*deepspeed(hosts, *options, 0), *program(out)]) as first,
    ):
        said = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert steps_of(out) == [1, 2, 3, 4]


def test_a_host_that_cannot_be_reached_is_named(tmp_path, stand_ins, started):
    """Rank 0 says who did not come, after the time it is given and before it does or writes anything."""
    hosts, out = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("localhost slots=1\nnode7.invalid slots=2\n")
    path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
    command = [*deepspeed(hosts, "--master_port", free_port()), *program(out, "train.batch=15")]
    with started(command, PATH=path, **{LIMIT: 4}) as process:
        said, _ = process.communicate(timeout=120)
    (line,) = errors_in(said)
    assert line.startswith(
        "fastasync: error: hosts: ranks 1, 2 (node7.invalid, a name that does not resolve) of 3 did not come within 4 s"
    ), said
    assert "exits with return code = 2" in said
    assert not out.exists()


# --- one rank alone -------------------------------------------------------------------------------------------------


@pytest.fixture
def rank_alone(started):
    def run(out, rank, host, port, limit=3):
        """What rank ``rank`` of 2 says, its exit code and the seconds it took."""
        variables = {
            "RANK": rank,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            LIMIT: limit,
        }
        began = time.monotonic()
        with started([sys.executable, *program(out)], **variables) as process:
            said, _ = process.communicate(timeout=90)
        assert not out.exists()
        return said.strip().splitlines(), process.returncode, time.monotonic() - began

    return run


def test_a_closed_port_is_one_line(tmp_path, rank_alone):
    port = free_port()
    lines, code, _ = rank_alone(tmp_path / "run", 1, "127.0.0.254", port)
    assert code == 2
    (line,) = lines
    assert f"127.0.0.254:{port}: rank 0 did not answer within 3 s (Connection refused): is the first host up" in line


def test_a_name_that_does_not_resolve_is_one_line_at_once(tmp_path, rank_alone):
    lines, code, _ = rank_alone(tmp_path / "run", 1, "node7.invalid", 29500, limit=600)
    assert code == 2
    (line,) = lines
    assert "MASTER_ADDR:MASTER_PORT: node7.invalid:29500: node7.invalid does not resolve on " in line


def test_another_program_behind_the_port_is_one_line(tmp_path, rank_alone):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        lines, code, _ = rank_alone(tmp_path / "run", 1, "127.0.0.1", port)
    assert code == 2
    (line,) = lines
    assert f"127.0.0.1:{port}: another program answers there: give the launcher another port" in line


def test_an_address_that_makes_no_sense(tmp_path, rank_alone, monkeypatch):
    said = "a launcher sets these to a host and a port"
    lines, code, _ = rank_alone(tmp_path / "run", 1, "127.0.0.1", "http")
    assert (code, len(lines)) == (2, 1), lines
    assert said in lines[0]
    for host, port in (("127.0.0.1", 70000), ("", 29500)):  # the same path, without starting a process for each
        monkeypatch.setenv("MASTER_ADDR", host)
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=said):
            open_store(1)


def test_the_limit_and_names(monkeypatch):
    monkeypatch.setenv(LIMIT, "soon")
    with pytest.raises(UserError, match=f"{LIMIT}: soon: must be a positive number"):
        start_limit()
    monkeypatch.delenv(LIMIT)
    assert start_limit() == 600
    assert name_ranks([3], []) == "rank 3"
    assert name_ranks(list(range(1, 12)), []) == "ranks 1, 2, 3, 4, 5, 6, 7, 8, ..."
    assert name_ranks([1, 2], ["a", "localhost", "localhost"]) == "ranks 1, 2 (localhost)"


# --- Slurm ----------------------------------------------------------------------------------------------------------


def test_the_slurm_script_is_valid():
    script = ROOT / "docs" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    directives = re.findall(r"^#SBATCH (--[a-z-]+)(?:=\S+)?$", text, re.MULTILINE)
    assert len(directives) == text.count("#SBATCH") == len(set(directives))
    assert text.index("#SBATCH") < text.index("\nset -euo")  # Slurm reads them up to the first command
    assert text.rindex("#SBATCH") < text.index("\nset -euo")


def test_the_slurm_script_trains_stops_and_queues_again(tmp_path, stand_ins, started):
    """Two nodes of one rank.  Slurm's signal goes to the script alone; the job is queued again, and goes on."""
    out, requeued = tmp_path / "run", tmp_path / "requeued"
    slurm = {
        "SLURM_JOB_ID": 77, "SLURM_JOB_NODELIST": "localhost,127.0.0.1", "SLURM_NNODES": 2, "SLURM_GPUS_ON_NODE": 1,
        "SLURM_CPUS_PER_TASK": 3,
        "REQUEUED": requeued, "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    script = ["bash", ROOT / "docs" / "slurm.sh"]
    with started([*script, *program(out, "train.steps=100000")[1:]], PORT=free_port(), **slurm) as process:
        end = time.monotonic() + 200
        while len(steps_of_so_far(out)) < 5:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "no steps"
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert said.count("stopped by a signal at step") == 1, said
    assert process.returncode != 0
    assert requeued.read_text() == "77\n"
    kept = checkpoint.newest(out / "checkpoints")
    assert not kept.skipped
    last = int(kept.path.name[5:]) + 2
    with started([*script, *program(out, f"train.steps={last}")[1:]], PORT=free_port(), **slurm) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count(f"resumed from {kept.path}") == 1
    assert steps_of(out) == list(range(1, last + 1))
    assert requeued.read_text() == "77\n"


def steps_of_so_far(out):
    """As ``steps_of``, of a file that is being written."""
    with suppress(ValueError):
        return steps_of(out)
    return []
