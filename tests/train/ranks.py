"""Several trainers as threads of this process, which talk by gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bagpipe.distributed.communicator import Communicator


def run_ranks(
    num_trainers: int,
    work: Callable[[Communicator], Any],
    *,
    num_hosts: int = 1,
    timeout_s: float = 60.0,
) -> list[Any]:
    """What `work` returns on each rank; raises the first failure once all have ended. All hosts are
    this one.
    """
    kv_store, timeout = dist.HashStore(), timedelta(seconds=timeout_s)
    results: list[Any] = [None] * num_trainers
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            now, overlapped, alike = (
                dist.ProcessGroupGloo(dist.PrefixStore(name, kv_store), rank, num_trainers, timeout)
                for name in ("urgent", "overlapped", "alike")
            )
            communicator = Communicator(
                rank=rank,
                num_trainers=num_trainers,
                now=now,
                overlapped=overlapped,
                alike=alike,
                kv_store=kv_store,
                num_hosts=num_hosts,
                timeout=timeout,
            )
            results[rank] = work(communicator)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_trainers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
