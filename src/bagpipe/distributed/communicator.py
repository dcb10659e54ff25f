"""How one of several trainers talks to the others: process groups and a key-value store.

Both are `torch.distributed`'s. One process group is for the critical path and one for what travels
behind compute, so that neither waits for the other's messages; a third one compares what ranks do
(`lockstep`). Rows on GPUs travel by NCCL, rows and numbers on CPUs by gloo. All sizes are known
from the plan, so a message is the rows and nothing else.

A rank that is gone shows as a failed message. Where one waits for its entry in the key-value store,
it shows by its process, which the others of its host watch (`waiting`). Every call ends after
`timeout`, and says what it waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bagpipe.distributed.lockstep import Lockstep
from bagpipe.distributed.machines import Hosts, describe_process, processes_and_hosts
from bagpipe.distributed.waiting import KeyWaiter, naming_failures
from bagpipe.errors import ConfigError, UsageError
from bagpipe.plan import RowExchange
from bagpipe.store.base import OrderedStore
from bagpipe.types import Group

Moment: TypeAlias = Literal["urgent", "overlapped"]
"""Whether something is on the critical path or travels behind compute."""
_STOPS_WITHIN = timedelta(seconds=30)
"""How long a rank may take to see that a step can't be planned, behind the first that does: a step
and a read."""

_numbers = itertools.count(1)


class SharedTables(Protocol):
    """Tables of several trainers, as one of them has them open."""

    stores: Sequence[OrderedStore]
    """By group."""

    def close(self) -> None:
        """Says that this trainer needs them no more."""


OpenTables: TypeAlias = Callable[["Communicator", Sequence[Group], int], SharedTables]
"""Opens tables, which are new, of groups and a seed; all ranks call it."""


@dataclass(kw_only=True)
class Communicator:
    """One rank's connections, for one stream of plans at a time.

    The process groups hold all ranks in the same order. Users make one by `from_default_group`.
    """

    rank: int
    num_trainers: int
    now: Any  # a ProcessGroup or one of its backends
    overlapped: Any
    alike: Any  # gloo's
    kv_store: Any
    host_name: str | None = None
    """Ranks with the same one are on one host; None: that of the machine."""
    open_tables: OpenTables | None = None
    """What opens tables for which the user names no store; None: shard servers are started."""
    timeout: timedelta = field(default_factory=lambda: timedelta(minutes=5))
    by_peer_memory: bool = True
    """Whether rows travel between GPUs of one host by peer memory where they can; else by NCCL."""
    number: int = 0
    """Tells the keys of several communicators of one key-value store apart."""
    lockstep: Lockstep = field(init=False)
    waiter: KeyWaiter = field(init=False)
    """Waits for entries of the key-value store."""
    hosts: Hosts = field(init=False)
    """On which host each rank is."""
    _stream: int = field(init=False, default=0)
    _is_streaming: bool = field(init=False, default=False)
    _has_failed: bool = field(init=False, default=False)
    _num_texts: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.waiter = KeyWaiter(self.kv_store, self.timeout)
        self.lockstep = Lockstep(
            self.alike,
            self.kv_store,
            rank=self.rank,
            num_trainers=self.num_trainers,
            key=self._key,
        )
        told = self.gather_texts("the process", describe_process(self.host_name))
        pids, of_ranks = processes_and_hosts(told)
        self.hosts = Hosts(rank=self.rank, of_ranks=of_ranks)
        self.waiter.watch({rank: pids[rank] for rank in self.hosts.own_ranks})

    @property
    def _key(self) -> str:
        return f"bagpipe/{self.number}"

    @property
    def stream_key(self) -> str:
        """How all keys begin that belong to the stream of plans that was begun last."""
        return f"{self._key}/{self._stream}"

    @classmethod
    def from_default_group(
        cls, *, host: str | None = None, timeout: timedelta | None = None
    ) -> Communicator:
        """The communicator of the group that `torch.distributed.init_process_group` has made.

        All ranks must call it, in the same order.

        Args:
            host: what this rank's host is called. Ranks of one host have one shard server and one
                oracle process together. By default the machine's name, and under torchrun the
                agent's number.
            timeout: how long one may wait for another rank; by default 5 minutes.

        Raises:
            ConfigError: there is no process group.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialized: call torch.distributed.init_process_group, "
                "or start with torchrun"
            )
        timeout = timeout or timedelta(minutes=5)
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        now, overlapped, alike = (
            dist.new_group(timeout=timeout, backend=each) for each in (backend, backend, "gloo")
        )
        return cls(
            rank=dist.get_rank(),
            num_trainers=dist.get_world_size(),
            now=now,
            overlapped=overlapped,
            alike=alike,
            kv_store=dist.distributed_c10d._get_default_store(),
            host_name=host,
            timeout=timeout,
            number=next(_numbers),
        )

    @property
    def has_others(self) -> bool:
        """Whether there is another rank."""
        return self.num_trainers > 1

    def exchange(
        self,
        rows: Tensor,
        received: Tensor,
        plan: RowExchange,
        *,
        moment: Moment,
        step: int,
        what: str,
    ) -> None:
        """Sends each rank its rows and receives this rank's.

        Args:
            rows: (num_sent, D), those for rank 0 first; contiguous.
            received: (num_received, D), filled, those of rank 0 first; contiguous.
            plan: how many rows go to each rank and come from each.
            moment: which process group they travel by.
            step: named in errors, as is `what`.

        Raises:
            BackgroundError: a rank can't be reached.
        """
        with self.naming(f"exchanging {what} of step {step}"):
            group = self.now if moment == "urgent" else self.overlapped
            message = group.alltoall_base(
                received, rows, plan.receive_counts.tolist(), plan.send_counts.tolist()
            )
            self._finish(message, received)

    def note_sent(self, num_bytes: int, *, moment: Moment, step: int) -> None:
        """Is told how much `step` sends to other ranks, by whatever way; benchmarks count it."""

    def _finish(self, message: Any, values: Tensor) -> None:
        """Waits for `values`; those of a GPU its current stream waits for."""
        if values.is_cuda:
            message.wait()
        else:
            self.lockstep.wait_for(message)

    def tell(self, act: str, *, needed_at: int, note: str = "") -> None:
        """Tells the others what this rank does next, and returns at once; see `lockstep`."""
        with self.naming(f"telling that it {act}"):
            self.lockstep.tell(act, needed_at=needed_at, note=note)

    def compare_acts(self, step: int) -> None:
        """Waits until all have told what the messages of `step` depend on.

        Raises:
            UsageError: ranks do different things; every rank raises it.
            DataError: ranks read different batches; every rank raises it.
        """
        with self.naming(f"comparing what ranks do before step {step}"):
            self.lockstep.compare(step)

    def do_together(self, act: str) -> None:
        """Tells an act and waits until all ranks do it; raises as `compare_acts`."""
        with self.naming(f"waiting until every rank {act}"):
            self.lockstep.do_together(act)

    def tell_failed(self, error: BaseException) -> None:
        """Ends the waiting of others for what this rank will not send any more."""
        self.lockstep.tell_failed(error)

    def gather(
        self, what: str, parts: Iterable[Tensor], sizes: Sequence[Sequence[int]]
    ) -> Sequence[Iterable[Tensor]]:
        """Gathers on rank 0 the parts of each rank, (sizes[rank][i], D) float32 on the CPU.

        All must call it. Rank 0 gets the parts by rank, and must have at least one itself. The
        others get nothing.
        """
        rows = torch.cat(list(parts) or [torch.empty(0)])
        counts = [sum(each) if self.rank == 0 else 0 for each in sizes]
        with self.naming(f"gathering {what}"):
            self.lockstep.do_together(f"gathers {what}")
            received = self.swap(rows, [len(rows)] + [0] * (self.num_trainers - 1), counts)
        if self.rank > 0:
            return ()
        by_rank = torch.split(received, counts)
        return [torch.split(rows, list(each)) for rows, each in zip(by_rank, sizes, strict=True)]

    def swap(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """Sends rows (n, ...) of the CPU, those for rank 0 first; returns what all send here."""
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        message = self.now.alltoall_base(
            received, rows.contiguous(), list(receive_counts), list(send_counts)
        )
        self._finish(message, received)
        return received

    def average(self, values: Tensor) -> None:
        """Replaces `values`, float32 and of one shape on all ranks, by their mean over ranks.

        On CUDA it is queued on the current stream, and the caller does not wait.
        """
        with self.naming("averaging the dense part's gradients"):
            values.div_(self.num_trainers)
            self._finish(self.now.allreduce([values]), values)

    def mean(self, value: float) -> float:
        """The mean of all ranks' values, the same on each."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.num_trainers

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, the same on each."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def ask_for_largest(self, value: float) -> Callable[[], float]:
        """As `largest`, but returns at once a function that waits for the result."""
        return self._ask_to_reduce(value, dist.ReduceOp.MAX)

    def share_text(self, what: str, text: str | None) -> str:
        """What the first rank of a host gives as `text`, on every rank of that host.

        All must call it, in the same order.
        """
        first = self.hosts.own_ranks[0]
        self._num_texts += 1
        key = f"{self._key}/text/{self._num_texts}/{first}"
        with self.naming(f"waiting for {what} of rank {first}"):
            if text is not None:
                self.kv_store.set(key, text)
                return text
            return self.waiter.text_of(key)

    def gather_texts(self, what: str, text: str) -> list[str]:
        """What each rank gives as `text`, by rank; all must call it, in the same order.

        Texts travel as messages, so a rank that is gone is seen at once, on another host too.
        """
        content = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())
        once = [1] * self.num_trainers
        with self.naming(f"waiting for {what} of all ranks"):
            self.lockstep.do_together(f"tells {what}")
            sizes = self.swap(torch.full((self.num_trainers,), len(content)), once, once).tolist()
            gathered = self.swap(
                content.repeat(self.num_trainers), [len(content)] * self.num_trainers, sizes
            )
        return [part.numpy().tobytes().decode() for part in torch.split(gathered, sizes)]

    def _reduce(self, value: float, operation: Any) -> float:
        self.do_together("compares a number")
        return self._ask_to_reduce(value, operation)()

    def _ask_to_reduce(self, value: float, operation: Any) -> Callable[[], float]:
        what = "comparing numbers of all ranks"
        values = torch.tensor([value], dtype=torch.float64)
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        with self.naming(what):
            asked = self.now.allreduce([values], options)

        def finish() -> float:
            with self.naming(what):
                self.lockstep.wait_for(asked)
                return float(values.item())

        return finish

    def barrier(self, what: str) -> None:
        """Waits for all ranks."""
        with self.naming(what):
            self.lockstep.do_together(f"is {what}")

    def all_stop_before(self, step: int) -> bool:
        """Whether all ranks soon say that they can't begin `step`, so that nobody sends anything.

        They say so in the key-value store, since a rank that has begun the step would take messages
        for others.
        """
        keys = {
            rank: f"{self.stream_key}/stopped/{rank}/{step}" for rank in range(self.num_trainers)
        }
        try:
            self.kv_store.set(keys[self.rank], b"")
            for key in keys.values():
                self.waiter.wait_for(key, min(self.timeout, _STOPS_WITHIN))
        except (RuntimeError, torch.distributed.DistError):
            return False
        return True

    def begin_stream(self) -> None:
        """Begins a stream of plans.

        All ranks begin streams in the same order.

        Raises:
            UsageError: the stream before has not ended, or has failed.
        """
        if self._has_failed:
            raise UsageError(
                "an earlier stream of this communicator failed, its messages may be out of order: "
                "make another one"
            )
        if self._is_streaming:
            raise UsageError(
                "a communicator serves one stream at a time: end the other bagpipe.lookahead, call "
                "stop() on its embeddings, or give each embeddings a communicator of its own"
            )
        self._stream += 1
        self._is_streaming = True

    def end_stream(self, *, has_failed: bool = False) -> None:
        """Says that no more messages of the stream are sent."""
        self._is_streaming = False
        self._has_failed = self._has_failed or has_failed

    def naming(self, what: str) -> AbstractContextManager[None]:
        """Raises a failure inside as a BackgroundError that says `what` was being done."""
        return naming_failures(self.rank, self.num_trainers, what)
