"""Waits for entries of the key-value store, as long as the ranks of this host live."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch

from bagpipe.errors import BagpipeError, LostError

_LOOK_AFTER = timedelta(seconds=1)
"""How long to wait for another rank before looking whether it lives."""


class KeyWaiter:
    """One rank's waiting for entries of the key-value store.

    It has a connection of its own, since one that waits can do nothing else. Where an entry does
    not come, it looks whether the processes that it was told to watch still run. It can't see ranks
    that are threads of this process, or on another host; for these only failed messages tell.
    """

    def __init__(self, kv_store: Any, timeout: timedelta) -> None:
        self.connection = kv_store.clone()
        self._timeout = timeout
        # by rank a descriptor, readable when the process has ended
        self._processes: dict[int, int] = {}

    def watch(self, pids: Mapping[int, int]) -> None:
        """Watches the processes of ranks, by rank; this process itself needs no watching."""
        self._processes = {
            rank: os.pidfd_open(pid) for rank, pid in pids.items() if pid != os.getpid()
        }

    def wait_for(self, key: str, timeout: timedelta | None = None) -> None:
        """Waits until `key` is in the key-value store, by default as long as a message may take.

        Raises:
            RuntimeError or DistError: the entry does not come, or a rank of this host has ended.
        """
        timeout = timeout or self._timeout
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            started = time.monotonic()
            try:
                self.connection.wait([key], min(timeout, _LOOK_AFTER))
            except (RuntimeError, torch.distributed.DistError):
                # An error that comes at once is no timeout.
                waited = time.monotonic() - started
                if waited < _LOOK_AFTER.total_seconds() / 2 or time.monotonic() >= deadline:
                    raise
                self.raise_if_gone()
            else:
                return

    def text_of(self, key: str) -> str:
        """What stands under `key`, once it is there; raises as `wait_for`."""
        self.wait_for(key)
        return str(self.connection.get(key).decode())

    def raise_if_gone(self) -> None:
        """Raises RuntimeError if a process that is watched has ended."""
        readable, _, _ = select.select(list(self._processes.values()), [], [], 0)
        for rank, process in self._processes.items():
            if process in readable:
                raise RuntimeError(f"the process of rank {rank} has ended")


def naming_failures(rank: int, num_trainers: int, what: str) -> AbstractContextManager[None]:
    """Raises a failure inside as a LostError that says `what` was being done, on which rank.

    A function, not a method: what holds a communicator in a circle keeps its connections open after
    its last use, and other ranks do not see that it is gone.
    """
    return _Naming(rank, num_trainers, what)


class _Naming:
    """No generator, which would take the trainer's thread three times as long."""

    __slots__ = ("_num_trainers", "_rank", "_what")

    def __init__(self, rank: int, num_trainers: int, what: str) -> None:
        self._rank, self._num_trainers, self._what = rank, num_trainers, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        is_ours = isinstance(error, BagpipeError)
        if not is_ours and isinstance(error, RuntimeError | torch.distributed.DistError):
            raise LostError(
                f"rank {self._rank}: {self._what} failed; another of the {self._num_trainers} "
                f"trainers may be gone, or stand still: {error}"
            ) from error
