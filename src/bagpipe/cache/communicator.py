"""How one of several trainers talks to the others: `torch.distributed`'s process groups and its key-value store.

One process group is for the critical path and one for what travels behind compute, so that neither waits for the other's messages.
All sizes are known from the plan, so a message is the rows and nothing else.

A rank that is gone shows as a failed or late message: every call ends after `timeout`, and says what it waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bagpipe.errors import BackgroundError, ConfigError
from bagpipe.store.shared import SharedFiles, SharedMemoryStore
from bagpipe.types import Group, RowExchange

Moment = Literal["now", "later"]
TransferKind = Literal["early", "late"]
_KEPT_MARKS = 1024
"""Steps whose marks stay in the key-value store; the newest one stands for all before it."""


@dataclass(kw_only=True)
class Communicator:
    """One rank's connections. The process groups hold all ranks in the same order."""

    rank: int
    num_trainers: int
    now: Any  # a ProcessGroup or one of its backends
    later: Any
    store: Any
    timeout: timedelta = field(default_factory=lambda: timedelta(minutes=5))
    _stream: int = 0
    _waiting: Any = field(init=False)  # a connection to the store of its own: one that waits can do nothing else

    def __post_init__(self) -> None:
        self._waiting = self.store.clone()

    @classmethod
    def from_default_group(cls, *, timeout: timedelta | None = None) -> Communicator:
        """Of the process group that `torch.distributed.init_process_group` has made; all ranks must call it.

        Raises ConfigError when there is none.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialized: call torch.distributed.init_process_group, or start with torchrun"
            )
        timeout = timeout or timedelta(minutes=5)
        groups = [dist.new_group(timeout=timeout) for _ in range(2)]
        store = dist.distributed_c10d._get_default_store()
        rank, num_trainers = dist.get_rank(), dist.get_world_size()
        return cls(rank=rank, num_trainers=num_trainers, now=groups[0], later=groups[1], store=store, timeout=timeout)

    def exchange(self, rows: Tensor, received: Tensor, plan: RowExchange, *, moment: Moment, step: int, what: str) -> None:
        """Sends `rows` (num_sent, D), those for rank 0 first, and fills `received` (num_received, D), both contiguous.

        Raises BackgroundError, naming `what` and the step, when a rank can't be reached.
        """
        with self._naming(f"exchanging {what} of step {step}"):
            group = self.now if moment == "now" else self.later
            group.alltoall_base(received, rows, plan.receive_counts.tolist(), plan.send_counts.tolist()).wait()

    def mean(self, value: float) -> float:
        """The mean of all ranks' values, the same on each."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.num_trainers

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, the same on each."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def share_text(self, name: str, text: str | None) -> str:
        """What rank 0 gives as `text`, on every rank; `name` is used once a stream of plans."""
        with self._naming(f"waiting for {name} of rank 0"):
            key = f"bagpipe/{self._stream}/text/{name}"
            if text is not None:
                self.store.set(key, text)
                return text
            self._waiting.wait([key], self.timeout)
            return str(self._waiting.get(key).decode())

    def shared_store(self, group: Group, seed: int) -> SharedMemoryStore:
        """A group's store in memory that all ranks share; rank 0 makes it. All ranks must be on one host."""
        name = f"the store of {group.name}"
        if self.rank == 0:
            store = SharedMemoryStore(group, seed)
            self.share_text(name, f"{store.files.records} {store.files.touched}")
            return store
        records, touched = self.share_text(name, None).split()
        return SharedMemoryStore(group, seed, SharedFiles(records=records, touched=touched))

    def _reduce(self, value: float, operation: Any) -> float:
        with self._naming("comparing numbers of all ranks"):
            values = torch.tensor([value], dtype=torch.float64)
            options = dist.AllreduceOptions()
            options.reduceOp = operation
            self.now.allreduce([values], options).wait()
            return float(values.item())

    def barrier(self, what: str) -> None:
        """Waits for all ranks."""
        with self._naming(what):
            self.now.barrier().wait()

    def begin_stream(self) -> None:
        """Marks made from now on are of another stream of plans; all ranks begin streams in the same order."""
        self._stream += 1

    def mark_written(self, kind: TransferKind, step: int) -> None:
        """Tells the others that this rank has written what the early, or the late, transfers up to `step` evict; steps in order."""
        with self._naming(f"telling that the {kind} transfers of step {step} are written back"):
            self.store.set(self._key(kind, self.rank, step), b"")
            self.store.set(self._key(kind, self.rank, None), str(step))
            if step >= _KEPT_MARKS:
                self.store.delete_key(self._key(kind, self.rank, step - _KEPT_MARKS))

    def wait_written(self, kind: TransferKind, step: int) -> None:
        """Returns once every other rank has written what its early, or late, transfers up to `step` evict."""
        for rank in range(self.num_trainers):
            if rank == self.rank:
                continue
            newest = self._key(kind, rank, None)
            with self._naming(f"waiting for rank {rank} to write back what the {kind} transfers of step {step} evict"):
                if not self._waiting.check([newest]) or int(self._waiting.get(newest)) < step:
                    self._waiting.wait([self._key(kind, rank, step)], self.timeout)

    def _key(self, kind: TransferKind, rank: int, step: int | None) -> str:
        return f"bagpipe/{self._stream}/{kind}/{rank}/{'newest' if step is None else step}"

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, torch.distributed.DistError) as error:
            raise BackgroundError(
                f"rank {self.rank}: {what} failed; another of the {self.num_trainers} trainers may be gone: {error}"
            ) from error
