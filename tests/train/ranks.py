"""Several trainers as threads of this process, which talk by gloo."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tests.ordered import TablesOfRanks
from tests.soon import TIMEOUT_S

from bagpipe.distributed.communicator import Communicator


def run_ranks(
    num_trainers: int,
    work: Callable[[Communicator], Any],
    *,
    num_hosts: int = 1,
    with_servers: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """What `work` returns on each rank; raises the first failure once all have ended. All hosts are
    this one, some with a rank more than others. Tables are in this process, unless `with_servers`.
    """
    kv_store, timeout = dist.HashStore(), timedelta(seconds=timeout_s)
    results: list[Any] = [None] * num_trainers
    failures: list[BaseException] = []
    groups: list[list[Any]] = [[] for _ in range(num_trainers)]
    tables = None if with_servers else TablesOfRanks(num_trainers)

    def run(rank: int) -> None:
        try:
            groups[rank] += (
                dist.ProcessGroupGloo(dist.PrefixStore(name, kv_store), rank, num_trainers, timeout)
                for name in ("urgent", "overlapped", "alike")
            )
            now, overlapped, alike = groups[rank]
            communicator = Communicator(
                rank=rank,
                num_trainers=num_trainers,
                now=now,
                overlapped=overlapped,
                alike=alike,
                kv_store=kv_store,
                host_name=f"host {rank * num_hosts // num_trainers}",
                open_tables=tables,
                timeout=timeout,
            )
            results[rank] = work(communicator)
        except BaseException as failure:
            failures.append(failure)

    def hang_up(rank: int) -> None:
        """Drops a rank's connections when it has ended, as the end of its process would."""
        threads[rank].join()
        groups[rank].clear()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_trainers)]
    ends = [
        threading.Thread(target=hang_up, args=(rank,), daemon=True) for rank in range(num_trainers)
    ]
    with connections_end():
        for thread in threads + ends:
            thread.start()
        for thread in threads:
            thread.join()
    for thread in ends:
        # A dropped group of gloo was once seen to wait for its own thread for minutes. What is
        # tested has ended by now.
        thread.join(timeout=10.0)
    if failures:
        raise failures[0]
    return results


@contextmanager
def connections_end() -> Iterator[None]:
    """Cuts all connections that are made inside, at the end.

    Who drops one of gloo's process groups waits for its messages under way, up to the timeout. An
    error leaves groups to the garbage collector, of several ranks together. It would wait there for
    messages of a rank whose connections it drops next, in whatever thread it comes.
    """
    before = connections()
    gc.disable()
    try:
        yield
    finally:
        for file in connections() - before:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(file)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        gc.enable()


def connections() -> set[int]:
    """The descriptors of this process's TCP connections."""
    found = set[int]()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # gone meanwhile, or it listens and has no peer
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.getpeername()
                        found.add(int(name))
    return found


def forget_frames(error: BaseException | None) -> None:
    """They hold a rank's connections, for which others would wait; those of a process end with
    it.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
