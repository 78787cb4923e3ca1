"""How the processes of one run find each other: rank 0's store, and one line that names who is missing.

A launcher gives every rank MASTER_ADDR and MASTER_PORT.  torchrun's agent serves a store there before it starts any
rank; under other launchers (deepspeed, Slurm's srun) rank 0 serves it, and a host that cannot be reached is a rank that
never comes.  torch would wait for it without a word.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastasync.errors import UserError

LIMIT = "FASTASYNC_START_SECONDS"  # in the environment: how long to wait for all ranks to be started
_DEFAULT = 600.0
_QUIET = 15.0  # seconds after which it is said whom one waits for
_POLL = 0.2
_ANSWER = 60.0  # seconds within which whoever listens there must answer as a store does
_ADDRESS = "MASTER_ADDR:MASTER_PORT"


def start_limit() -> float:
    """Seconds that ranks wait for each other to be started.  UserError when the environment's value is no number."""
    text = os.environ.get(LIMIT, str(_DEFAULT))
    try:
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    except ValueError:
        pass
    raise UserError(LIMIT, text, "must be a positive number of seconds")


def open_store(rank: int) -> Any:
    """The store of this run.  Rank 0 does not wait for the others here: see ``wait_for_all``.

    Raises UserError: the address makes no sense, its name does not resolve, nobody answers there in time, another
    program does, or (rank 0) the port is in use.
    """
    from torch import distributed

    host, port = _address()
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serving = rank == 0 and not by_agent
    limit, address = start_limit(), f"{host}:{port}"
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        here = f"{host} does not resolve on {socket.gethostname()} ({error.strerror})"
        raise UserError(_ADDRESS, address, f"{here}: give the launcher an address that every host knows") from None
    if not serving:
        _wait_until_open(host, port, limit)
    found: list[Any] = []
    failed: list[Exception] = []

    def connect() -> None:
        options: dict[str, Any] = {"is_master": serving, "timeout": timedelta(seconds=limit)}
        try:
            found.append(distributed.TCPStore(host, port, None, wait_for_workers=False, multi_tenant=True, **options))
        except (RuntimeError, ValueError) as error:
            failed.append(error)

    # in a thread: it waits without a limit for an answer from a program that is no store
    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(min(limit, _ANSWER))
    if failed:
        text = " ".join(str(failed[0]).split())
        if "EADDRINUSE" in text or "in use" in text:
            remedy = "the port is in use: give the launcher another (--master_port), or end what uses it"
        else:
            remedy = f"the ranks did not find each other ({text[:160]})"
        raise UserError(_ADDRESS, address, remedy)
    if not found:
        raise UserError(
            _ADDRESS, address, "another program answers there: give the launcher another port (--master_port)"
        )
    return found[0]


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(_ADDRESS, f"{host or '?'}:{port or '?'}", "a launcher sets these to a host and a port")
    return host, int(port)


def _wait_until_open(host: str, port: int, limit: float) -> None:
    """Return once somebody listens there: rank 0 may start later.  UserError after ``limit`` seconds."""
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=min(limit, 5.0)).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        waited = time.monotonic() - began
        if waited >= limit:
            what = f"rank 0 did not answer within {limit:g} s ({why})"
            remedy = "is the first host up and reachable, its port open, and did rank 0 start there?"
            raise UserError(_ADDRESS, f"{host}:{port}: {what}", remedy)
        if waited > _QUIET and not told:
            told = _say(f"waiting for rank 0 at {host}:{port} ({why}), for {limit:g} s at most")
        time.sleep(_POLL)


def wait_for_all(store: Any, world: int, hosts: Sequence[str] = ()) -> None:
    """Rank 0: return once every rank has set ``came/RANK``.  UserError, naming who is missing, when the time is over.

    ``hosts``: of each rank, where they are known.
    """
    began, limit, told = time.monotonic(), start_limit(), False
    missing = list(range(world))
    while missing := [rank for rank in missing if not store.check([f"came/{rank}"])]:
        waited = time.monotonic() - began
        who = name_ranks(missing, hosts)
        if waited >= limit:
            remedy = "is each host up and reachable from here, and could the launcher start its ranks there?"
            raise UserError("hosts", f"{who} of {world} did not come within {limit:g} s", remedy)
        if waited > _QUIET and not told:
            told = _say(f"waiting for {who} of {world}, for {limit:g} s at most")
        time.sleep(_POLL)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``rank 3``, ``ranks 2, 3``, and where their hosts are known ``ranks 2, 3 (node2)``; those that do not resolve
    are said to."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    text = f"rank{'s' if len(ranks) > 1 else ''} {shown}"
    if not hosts:
        return text
    parts = []
    for host in dict.fromkeys(hosts[rank] for rank in ranks):
        try:
            socket.getaddrinfo(host, None)
            parts.append(host)
        except OSError:
            parts.append(f"{host}, a name that does not resolve")
    return f"{text} ({'; '.join(parts)})"


def hosts_of_ranks() -> list[str]:
    """The host of each rank, from the command line of the deepspeed launcher that started this process; [] if unknown.

    It tells its children how many hosts there are, but not which.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        encoded = next(word for word in words if word.startswith(b"--world_info="))
        slots = json.loads(base64.urlsafe_b64decode(encoded.partition(b"=")[2]))
        return [host for host, devices in slots.items() for _ in devices]
    except (OSError, StopIteration, ValueError, AttributeError, TypeError):
        return []


def _say(line: str) -> bool:
    print(f"fastasync: {line}", file=sys.stderr, flush=True)
    return True
