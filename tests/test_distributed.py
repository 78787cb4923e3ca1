"""Ranks of a run as forked processes: they meet, wait for rank 0's work, and say in one line who is missing or gone."""

import hashlib
import os
import signal
import socket
import time

import pytest
import torch

from fastasync import rendezvous, stages
from fastasync.config import config_from_dict
from fastasync.distributed import RankLost, Session, cpus_of_rank
from fastasync.distributed import session as this_session
from fastasync.errors import UserError
from fastasync.images.pil_loader import PilLoader
from fastasync.model import LightningDiT
from fastasync.representations import train_semvae
from fastasync.representations.semvae import SemVAESettings
from fastasync.representations.train_semvae import SemVAETraining
from fastasync.sampling import generate_images
from fastasync.training import build_model


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """``ranks(world, work, limit)``: forks ``world`` processes that call ``work(session)``; what each says of it."""
    children: list[int] = []

    def rank_main(rank, world, work):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in variables.items()})
        this_session.cache_clear()
        here = this_session()
        try:
            said = f"done {work(here)}"
        except (UserError, SystemExit) as error:
            said = f"{type(error).__name__} {error}"
        (tmp_path / f"said{rank}").write_text(said)
        here.leave()

    def start(world, work, limit=30, only=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), (rendezvous.LIMIT, limit)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        for rank in range(world) if only is None else only:
            pid = os.fork()
            if pid == 0:
                try:
                    rank_main(rank, world, work)
                finally:
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        children.clear()
        files = [tmp_path / f"said{rank}" for rank in range(world)]
        return [file.read_text() if file.exists() else None for file in files]

    yield start
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def test_a_late_rank_is_waited_for(ranks, tmp_path):
    """Rank 0 does not begin before all are there."""

    def work(here):
        if here.rank == 2:
            time.sleep(1.0)
            (tmp_path / "came").touch()
        return here.from_main(lambda: (tmp_path / "came").exists())

    assert ranks(3, work) == ["done True"] * 3


def test_a_rank_that_never_comes_is_named_before_any_work(ranks, tmp_path):
    began = time.monotonic()
    said = ranks(3, lambda here: here.from_main((tmp_path / "worked").touch), limit=2, only=(0, 1))
    assert said[0].startswith("UserError hosts: rank 2 of 3 did not come within 2 s: is each host up and reachable")
    assert said[1].startswith("RankLost rank 1: another process of this run ended or does not answer")
    assert said[2] is None
    assert not (tmp_path / "worked").exists()
    assert time.monotonic() - began < 20


def test_rank_0_killed_while_the_others_wait(ranks):
    """In long work of rank 0's, such as preparing: nobody waits for ever."""

    def work(here):
        here.barrier()
        return here.from_main(lambda: os.kill(os.getpid(), signal.SIGKILL))

    said = ranks(3, work)
    assert said[0] is None
    for rank in (1, 2):
        assert said[rank].startswith(f"RankLost rank {rank}: another process of this run ended or does not answer")


def test_an_error_of_rank_0_ends_the_others_with_its_code(ranks):
    def work(here):
        def fail():
            raise UserError("disk", "full", "free some")

        return here.from_main(fail)

    assert ranks(2, work) == ["UserError disk: full: free some", "OtherRankFailed 2"]


def test_a_rank_killed_while_a_semvae_is_trained(ranks, tmp_path):
    """The other one says so; the last checkpoint is whole, and one process goes on from it."""
    shape = SemVAESettings(8, 1, 2, steps=30, batch=8)
    training = SemVAETraining(shape, channels=2, held_out=4, log_every=10, save_every=4, evaluate_every=0)

    class Source:
        feature_dim, grid, fingerprint, data = 6, 2, None, "noise"
        labels = torch.arange(40) % 2

        def stream(self, batches):
            features = torch.randn(40, 6, 2, 2, generator=torch.Generator().manual_seed(0))
            for number, indices in enumerate(batches):
                if number == 10 and this_session().rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield features[indices]

    out = tmp_path / "out"

    def work(here):
        return train_semvae.train(Source(), out, training, {"name": "x"}, progress=False)

    said = ranks(2, work)
    assert said[0].startswith("RankLost rank 0: another process of this run ended or does not answer"), said
    assert (out / "checkpoint-00000008.safetensors").exists()
    assert not list(out.glob(".*.partial"))
    assert "quality" in work(None)


@pytest.mark.parametrize("possible", [True, False])
def test_ranks_sample_with_rank_0s_backends(ranks, monkeypatch, possible):
    """Each has measured for itself; or with PyTorch's own, where rank 1 cannot run those of rank 0."""
    shape = dict(depth=1, width=16, heads=2, classes=3)
    config = config_from_dict({"representations": dict(channels=[2, 2], grid=2), "model": shape})
    choose, cpu = LightningDiT.choose_attention, torch.device("cpu")

    def attention(model, batch, dtype, gradient=True, backend=""):
        assert not gradient
        if backend == "reference" and this_session().rank == 1 and not possible:
            raise UserError("model.attention", backend, "this test says that it cannot run here")
        return choose(model, batch, dtype, gradient, backend or ("reference", "sdpa")[this_session().rank])

    def images(backend=None):
        torch.manual_seed(0)
        model = build_model(config).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        with torch.no_grad():
            velocity = stages._velocity(config, model, cpu, "").velocity
            if backend:
                choose(model, 4, torch.float32, False, backend)
            found = velocity(torch.randn(4, 4, 2, 2), torch.full((4, 2), 0.5), torch.arange(4) % 3)
        return hashlib.sha256(found.numpy().tobytes()).hexdigest()

    expected = [images("sdpa"), images("reference")]
    assert expected[0] != expected[1]
    monkeypatch.setattr(LightningDiT, "choose_attention", attention)
    assert ranks(2, lambda here: images()) == [f"done {expected[possible]}"] * 2


def test_what_each_rank_says_in_their_order(ranks):
    def work(here):
        first = here.gather((here.rank, "é"))
        return first == [(rank, "é") for rank in range(3)] and here.gather(here.rank) == [0, 1, 2]

    assert ranks(3, work) == ["done True"] * 3
    assert Session({}).gather(1) == [1]


def test_more_ranks_than_batches_of_samples(tmp_path):
    """Ranks without a batch have nothing to do, and say so by ending."""
    parts = [torch.arange(3)]

    def make(indices):
        return torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8), indices, 1

    for rank in (2, 1, 0):
        spread = dict(rank=rank, world=3, label="", progress=False)
        generate_images(make, parts, 3, tmp_path, join=False, **spread)
    generate_images(make, parts, 3, tmp_path)
    assert (tmp_path / "samples.npz").is_file()


def test_environments_that_make_no_sense():
    for variables in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "first"}, {"RANK": "0", "LOCAL_RANK": "-1"}):
        with pytest.raises(UserError, match="RANK, LOCAL_RANK, WORLD_SIZE"):
            Session(variables)
    assert issubclass(RankLost, UserError)
    assert RankLost.exit_code == 75


@pytest.mark.parametrize(
    ("environment", "cpus", "threads"),
    [
        ({}, 64, 64),
        ({"LOCAL_WORLD_SIZE": "8"}, 64, 8),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1"}, 64, 8),  # torchrun in srun
        ({"LOCAL_SIZE": "4"}, 6, 1),  # deepspeed
        ({"LOCAL_WORLD_SIZE": "8"}, 2, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, 64, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 64, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8, 8),  # Slurm has divided them
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 64, 8),  # or has not
        ({"LOCAL_WORLD_SIZE": "many"}, 64, 64),
    ],
)
def test_ranks_of_a_host_share_its_cpus(monkeypatch, environment, cpus, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
    assert cpus_of_rank(environment) == threads
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert PilLoader(None, 8, (), 1).workers == threads
    assert PilLoader(None, 8, (), 1, workers=3).workers == 3
