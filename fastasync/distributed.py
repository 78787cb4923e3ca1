"""The processes of one run, as torchrun, deepspeed or Slurm started them: who is who, and waiting for the main one.

What must happen once (preparing, probing, scoring, printing) is done by rank 0 while the others poll a key of the
rendezvous store, for as long as it takes; the fast collectives of training are the engine's.  Nothing here is needed,
or contacted, in a run of one process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastasync.errors import UserError

if TYPE_CHECKING:  # the command line imports this module before it knows whether torch is needed
    import torch

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # a rank waits this long for another one in a collective
_LEAVE = 10.0  # seconds that rank 0, which may host the store, waits for the others to be done with it
_POLL = 0.2  # seconds between two looks at the store, at most
_LAST_WORDS = 10  # seconds that a failing rank goes on after its launcher's signal
# what gloo, NCCL and the store write when a peer is gone
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "socket", "store")


class RankLost(UserError):
    """Another process of the run ended or does not answer.  The exit code asks launchers to start again."""

    exit_code = 75


class OtherRankFailed(SystemExit):
    """Another rank met an error and reports it: this one ends silently, with the same exit code."""


class Session:
    """This process among those of its run.

    Args:
        environment: RANK, LOCAL_RANK and WORLD_SIZE, as every launcher sets them; none means one process.

    Raises:
        UserError: they are not numbers that fit together.
    """

    def __init__(self, environment: dict[str, str]):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        given = {name: environment.get(name, default) for name, default in zip(names, "001")}
        try:
            self.rank, self.local, self.world = (int(given[name]) for name in names)
        except ValueError:
            raise UserError("RANK, LOCAL_RANK, WORLD_SIZE", given, "a launcher sets these to whole numbers") from None
        if not 0 <= self.rank < self.world or self.local < 0:
            raise UserError("RANK, LOCAL_RANK, WORLD_SIZE", given, "RANK must be in [0, WORLD_SIZE)")
        self.by_deepspeed = "CROSS_SIZE" in environment  # deepspeed.launcher.launch sets it
        self.lost = False  # another rank is gone, and the store perhaps with it
        self._met = False  # all ranks have come
        self._calls = itertools.count()
        self._stores: list[Any] = []

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def store(self) -> Any:
        """The rendezvous store (connected once).  UserError when the port is taken or rank 0 cannot be reached."""
        if not self._stores:
            from torch import distributed

            from fastasync import rendezvous

            try:
                store = distributed.PrefixStore("fastasync", rendezvous.open_store(self.rank))
                store.set(f"came/{self.rank}", "")
            except UserError:
                self.lost = True  # there is nobody to agree with on who says so
                raise
            self._stores.append(store)
        return self._stores[0]

    def meet(self) -> Any:
        """The store, once all ranks have come: rank 0 waits for them.  UserError when one does not in time."""
        store = self.store()
        if self.is_main and not self._met:
            from fastasync import rendezvous

            hosts = rendezvous.hosts_of_ranks() if self.by_deepspeed else []
            try:
                rendezvous.wait_for_all(store, self.world, hosts)
            except UserError:
                self.lost = True
                raise
            self._met = True
        return store

    def from_main(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns on rank 0, on every rank (pickled).  All call it, in the same order.

        The others wait without a limit.  When it fails there, it raises there, and OtherRankFailed elsewhere.
        """
        if self.world == 1:
            return compute()
        key, store = f"main/{next(self._calls)}", self.meet()
        if self.is_main:
            try:
                result = compute()
            except BaseException as error:
                last_words()
                code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
                store.set(key, pickle.dumps((False, code)))
                raise
            store.set(key, pickle.dumps((True, result)))
            return result
        pause = 0.001
        with explained_loss():
            while not store.check([key]):
                time.sleep(pause)
                pause = min(2 * pause, _POLL)
            good, value = pickle.loads(store.get(key))
        if not good:
            raise OtherRankFailed(value)
        return value

    def main_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0; then, when it is done there, on the others, who find everything done."""
        result: list[T] = []
        self.from_main(lambda: result.append(work()))
        return result[0] if self.is_main else work()

    def main_only(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` on rank 0 while the others wait; None there."""
        result: list[T] = []
        self.from_main(lambda: result.append(work()))
        return result[0] if result else None

    def gather(self, own: T) -> list[T]:
        """Every rank's ``own`` (pickled), in their order.  All call it, in the same order, and wait without a limit."""
        if self.world == 1:
            return [own]
        key, store = f"gather/{next(self._calls)}", self.meet()
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        with explained_loss():
            store.set(keys[self.rank], pickle.dumps(own))
            while not store.check(keys):
                time.sleep(_POLL / 4)
            return [pickle.loads(store.get(each)) for each in keys]

    def barrier(self) -> None:
        """Wait for every rank, without a limit."""
        if self.world > 1:
            key, store = f"barrier/{next(self._calls)}", self.meet()
            with explained_loss():
                store.add(key, 1)
                while store.add(key, 0) < self.world:
                    time.sleep(_POLL / 4)

    def says_first(self, text: str) -> bool:
        """Whether no other rank has asked this about the same text: an error that all of them meet is printed once."""
        if self.world == 1:
            return True
        last_words()
        if self.lost:
            return True
        try:
            return self.store().add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1) == 1
        except Exception:  # the store is gone, with whoever hosted it: saying it twice is better than not at all
            return True

    def leave(self) -> None:
        """Say goodbye.  Rank 0, which may host the store, stays until the others have, for a few seconds at most."""
        if self.world == 1 or self.lost or not self._stores:
            return
        with suppress(Exception):  # the store is gone: nobody waits for us
            store = self.store()
            store.add("left", 1)
            end = time.monotonic() + _LEAVE
            while self.is_main and store.add("left", 0) < self.world and time.monotonic() < end:
                time.sleep(0.05)

    def start_group(self, device: torch.device, timeout: timedelta | None = None) -> Any:
        """Start torch.distributed (NCCL on CUDA, else gloo); returns the gloo group of the control messages.

        Control messages go over gloo on every device: they never wait for the GPU, and a lost rank is an exception
        there, where NCCL would end the process.
        """
        from torch import distributed

        timeout = timeout or TIMEOUT
        if not distributed.is_initialized():
            store = distributed.PrefixStore("group", self.meet()) if self.world > 1 else distributed.HashStore()
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        elif distributed.get_world_size() != self.world:  # of whoever forked this process, for example
            found = f"a group of {distributed.get_world_size()} exists in this process"
            raise UserError("torch.distributed", found, f"start the {self.world} ranks in processes of their own")
        return distributed.new_group(backend="gloo", timeout=timeout)


@cache
def session() -> Session:
    """This process's session, from its environment.  Exits with one line when that makes no sense."""
    try:
        return Session(dict(os.environ))
    except UserError as error:
        print(f"fastasync: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def cpus_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """How many CPUs each rank of this host may keep busy: those of this process, shared by the launcher's ranks here.

    At least 1.  torchrun and deepspeed say how many ranks they started here, srun how many on each host; its tasks
    share only CPUs that it has not divided itself (SLURM_CPUS_PER_TASK).
    """
    cpus = len(os.sched_getaffinity(0))
    number = re.compile(r"\d+").match  # srun's may go on: 8(x2)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if found := number(environment.get(name, "")):
            return max(cpus // max(int(found[0]), 1), 1)
    if found := number(environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        own = number(environment.get("SLURM_CPUS_PER_TASK", ""))
        return max(min(cpus, int(own[0])) if own else cpus // max(int(found[0]), 1), 1)
    return cpus


def last_words() -> None:
    """Let this rank, which fails, end by itself and say why: SIGTERM leaves it ``_LAST_WORDS`` seconds from now on.

    Launchers look at their ranks several times a second and send SIGTERM to all when one has ended; what led to that is
    often known to another one only, which has files to close before it can tell.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_WORDS))  # SIGALRM ends the process


@contextmanager
def explained_loss(last_good: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Turn the failure of a collective into one line: RankLost, with the checkpoint to continue from."""
    try:
        yield
    except RuntimeError as error:
        import torch
        from torch import distributed

        text = " ".join(str(error).split())
        lost = isinstance(error, distributed.DistError) or any(part in text.lower() for part in _LOST)
        if not lost or session().world == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise rank_lost(last_good(), text) from None


def rank_lost(last_good: Path | None, text: str) -> RankLost:
    """The error of a rank whose collective failed with ``text``, or does not end."""
    session().lost = True
    kept = f"the last good checkpoint is {last_good}" if last_good else "nothing was saved yet"
    return RankLost(
        f"rank {session().rank}",
        "another process of this run ended or does not answer",
        f"{kept}; start again to continue ({text[:120]})",
    )


def quiet_elsewhere(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say`` on rank 0, silence on the others."""
    return say if session().is_main else lambda line: None
