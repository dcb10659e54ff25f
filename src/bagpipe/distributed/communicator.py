"""How one of several trainers talks to the others: `torch.distributed`'s process groups and its
key-value store.

One process group is for the critical path and one for what travels behind compute, so that neither
waits for the other's messages; a third one compares what ranks do (`lockstep`). Rows on GPUs travel
by NCCL, rows and numbers on CPUs by gloo. All sizes are known from the plan, so a message is the
rows and nothing else.

A rank that is gone shows as a failed message, or, where one waits for its entry in the key-value
store, by its process, which the others of its host watch. Every call ends after `timeout`, and says
what it waited for.

Trainers on several hosts are as many on each, ranks of one host beside each other. Each host has a
store of its own, for the rows whose home it is (`bagpipe.topology`): only its ranks fetch them and
write them back, so that nothing but rows of the exchange, and what an evaluation reads, travels
between hosts.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bagpipe.distributed.lockstep import Lockstep
from bagpipe.errors import BackgroundError, BagpipeError, ConfigError, UsageError
from bagpipe.plan import RowExchange
from bagpipe.store.base import EmbeddingStore
from bagpipe.store.shared import SharedFiles, SharedMemoryStore
from bagpipe.topology import check_hosts, home_hosts, host_of, neighbours_on
from bagpipe.types import Float32Array, Group, Int64Array

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Moment = Literal["urgent", "overlapped"]
TransferKind = Literal["overlapped", "urgent"]
_LOOK_AFTER = timedelta(seconds=1)
"""How long to wait for another rank before looking whether it lives."""
_STOPS_WITHIN = timedelta(seconds=30)
"""How long a rank may take to see that a step can't be planned, behind the first that does: a step
and a read."""
_KEPT_MARKS = 1024
"""Steps whose marks stay in the key-value store; the newest one stands for all before it."""


_numbers = itertools.count(1)


@dataclass(kw_only=True)
class Communicator:
    """One rank's connections, for one stream of plans at a time. The process groups hold all ranks
    in the same order.
    """

    rank: int
    num_trainers: int
    now: Any  # a ProcessGroup or one of its backends
    overlapped: Any
    alike: Any  # gloo's
    store: Any
    num_hosts: int = 1
    timeout: timedelta = field(default_factory=lambda: timedelta(minutes=5))
    number: int = 0
    """Tells the keys of several communicators of one key-value store apart."""
    _lockstep: Lockstep = field(init=False)
    _stream: int = field(init=False, default=0)
    _is_streaming: bool = field(init=False, default=False)
    _has_failed: bool = field(init=False, default=False)
    _num_texts: int = field(init=False, default=0)
    # a connection to the store of its own: one that waits can do nothing else
    _waiting: Any = field(init=False)
    # by kind and rank the step
    _known_written: dict[tuple[TransferKind, int], int] = field(init=False, default_factory=dict)
    # by rank a descriptor, readable when it has ended
    _processes: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_hosts(self.num_trainers, self.num_hosts)
        self._waiting = self.store.clone()
        self._lockstep = Lockstep(
            self.alike,
            self.store,
            rank=self.rank,
            num_trainers=self.num_trainers,
            key=f"bagpipe/{self.number}",
        )
        texts = self.gather_texts("the process", f"{os.getpid()} {self.num_hosts} {_machine()}")
        pids, nums_hosts, machines = zip(*(text.split(maxsplit=2) for text in texts), strict=True)
        on_hosts = [
            {machines[rank] for rank in neighbours_on(host, self.num_trainers, self.num_hosts)}
            for host in range(self.num_hosts)
        ]
        if len(set(nums_hosts)) > 1 or any(len(found) > 1 for found in on_hosts):
            told = ", ".join(sorted({f"num_hosts={number}" for number in nums_hosts}))
            where = "; ".join(
                " and ".join(name.split()[0] for name in sorted(found)) for found in on_hosts
            )
            raise ConfigError(
                f"{self.num_trainers} trainers were told {told}, but run, host by host, on "
                f"{where}: give all the number of hosts, "
                f"Communicator.from_default_group(num_hosts={len(set(machines))}), and start as "
                "many on each, beside each other"
            )
        # Of ranks that are threads of one process, or on another host, only messages tell.
        by_rank = {rank: int(pids[rank]) for rank in self.ranks_of_host}
        self._processes = {
            rank: os.pidfd_open(pid) for rank, pid in by_rank.items() if pid != os.getpid()
        }

    @classmethod
    def from_default_group(
        cls, *, num_hosts: int = 1, timeout: timedelta | None = None
    ) -> Communicator:
        """Of the process group that `torch.distributed.init_process_group` has made; all ranks must
        call it, in the same order.

        Raises ConfigError when there is none, or the ranks of a host are not neighbours, as many on
        each of 1, 2, 4 or 8.
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
            store=dist.distributed_c10d._get_default_store(),
            num_hosts=num_hosts,
            timeout=timeout,
            number=next(_numbers),
        )

    @property
    def host(self) -> int:
        """Which host this rank is on."""
        return host_of(self.rank, self.num_trainers, self.num_hosts)

    @property
    def ranks_of_host(self) -> range:
        """The ranks of this one's host."""
        return neighbours_on(self.host, self.num_trainers, self.num_hosts)

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank makes what those of its host share."""
        return self.rank == self.ranks_of_host[0]

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
        """Sends `rows` (num_sent, D), those for rank 0 first, and fills `received` (num_received,
        D), both contiguous.

        Raises BackgroundError, naming `what` and the step, when a rank can't be reached.
        """
        with self._naming(f"exchanging {what} of step {step}"):
            group = self.now if moment == "urgent" else self.overlapped
            message = group.alltoall_base(
                received, rows, plan.receive_counts.tolist(), plan.send_counts.tolist()
            )
            self._finish(message, received)

    def _finish(self, message: Any, values: Tensor) -> None:
        """Waits for `values`; those of a GPU its current stream waits for."""
        if values.is_cuda:
            message.wait()
        else:
            self._lockstep.wait_for(message)

    def tell(self, act: str, *, needed_at: int, note: str = "") -> None:
        """Tells the others what this rank does next, as they must in the same place; see
        `lockstep`.
        """
        with self._naming(f"telling that it {act}"):
            self._lockstep.tell(act, needed_at=needed_at, note=note)

    def compare_acts(self, step: int) -> None:
        """Waits until all have told what the messages of `step` depend on.

        Raises UsageError, or DataError for their batches, on every rank where ranks part.
        """
        with self._naming(f"comparing what ranks do before step {step}"):
            self._lockstep.compare(step)

    def do_together(self, act: str) -> None:
        """Tells an act and waits until all ranks do it; raises as `compare_acts`."""
        with self._naming(f"waiting until every rank {act}"):
            self._lockstep.do_together(act)

    def tell_failed(self, error: BaseException) -> None:
        """Ends the waiting of others for what this rank will not send any more."""
        self._lockstep.tell_failed(error)

    def gather(self, what: str, rows: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
        """What each rank gives as `rows`, (counts[rank], D) on the CPU, by rank on rank 0; nothing
        elsewhere. All must ask.
        """
        receive_counts = list(counts) if self.rank == 0 else [0] * self.num_trainers
        with self._naming(f"gathering {what}"):
            self._lockstep.do_together(f"gathers {what}")
            received = self._swap(rows, [len(rows)] + [0] * (self.num_trainers - 1), receive_counts)
        return torch.split(received, receive_counts) if self.rank == 0 else ()

    def fetch_from_homes(self, store: EmbeddingStore, rows: Int64Array, out: Float32Array) -> None:
        """As `store.fetch`, of rows (n,) of any host. With several hosts all ranks must ask, those
        without rows too.

        A rank asks the ranks in its own place on each host, and tells them first how many rows it
        wants: this is for evaluation.
        """
        if self.num_hosts == 1:
            store.fetch(rows, out)
            return
        homes = home_hosts(rows, self.num_hosts)
        order = np.argsort(homes, kind="stable")
        num_ranks, once = len(self.ranks_of_host), [1] * self.num_trainers
        wanted = torch.zeros(self.num_trainers, dtype=torch.int64)
        wanted[self.rank % num_ranks :: num_ranks] = torch.from_numpy(
            np.bincount(homes, minlength=self.num_hosts)
        )
        with self._naming(
            f"reading rows of {store.group.name} of all hosts, all ranks together (join_reading "
            "where one has none),"
        ):
            self._lockstep.do_together(f"reads rows of {store.group.name} of all hosts")
            wanted_from, wanted_by = wanted.tolist(), self._swap(wanted, once, once).tolist()
            asked = self._swap(torch.from_numpy(rows[order]), wanted_from, wanted_by).numpy()
            found = np.empty((len(asked), store.group.record_width), np.float32)
            store.fetch(asked, found)
            out[order] = self._swap(torch.from_numpy(found), wanted_by, wanted_from).numpy()

    def _swap(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """Sends rows (n, ...) of the CPU, those for rank 0 first; what all send here, by rank."""
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        message = self.now.alltoall_base(
            received, rows.contiguous(), list(receive_counts), list(send_counts)
        )
        self._finish(message, received)
        return received

    def average(self, values: Tensor) -> None:
        """Replaces `values`, float32 and of one shape on all ranks, by their mean over ranks; on
        CUDA the current stream does.
        """
        with self._naming("averaging the dense part's gradients"):
            values.div_(self.num_trainers)
            self._finish(self.now.allreduce([values]), values)

    def mean(self, value: float) -> float:
        """The mean of all ranks' values, the same on each."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.num_trainers

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, the same on each."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def ask_for_largest(self, value: float) -> Callable[[], float]:
        """As `largest`, without waiting: what is returned does."""
        return self._ask_to_reduce(value, dist.ReduceOp.MAX)

    def share_text(self, what: str, text: str | None) -> str:
        """What the first rank of a host gives as `text`, on every rank of it. All must ask, in the
        same order.
        """
        first = self.ranks_of_host[0]
        self._num_texts += 1
        key = f"bagpipe/{self.number}/text/{self._num_texts}/{first}"
        with self._naming(f"waiting for {what} of rank {first}"):
            if text is not None:
                self.store.set(key, text)
                return text
            return self._wait_for_text(key)

    def gather_texts(self, what: str, text: str) -> list[str]:
        """What each rank gives as `text`, by rank. All must ask, in the same order.

        As messages: a rank that has gone is seen at once, on another host, too.
        """
        content, once = (
            torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()),
            [1] * self.num_trainers,
        )
        with self._naming(f"waiting for {what} of all ranks"):
            self._lockstep.do_together(f"tells {what}")
            sizes = self._swap(torch.full((self.num_trainers,), len(content)), once, once).tolist()
            gathered = self._swap(
                content.repeat(self.num_trainers), [len(content)] * self.num_trainers, sizes
            )
        return [part.numpy().tobytes().decode() for part in torch.split(gathered, sizes)]

    def shared_store(self, group: Group, seed: int) -> SharedMemoryStore:
        """A group's store in memory that all ranks of a host share; the first of them makes it."""
        name = f"the store of {group.name}"
        if self.is_first_of_host:
            store = SharedMemoryStore(group, seed, host=self.host, num_hosts=self.num_hosts)
            self.share_text(name, f"{store.files.records} {store.files.touched}")
            return store
        records, touched = self.share_text(name, None).split()
        files = SharedFiles(records=records, touched=touched)
        return SharedMemoryStore(group, seed, files, host=self.host, num_hosts=self.num_hosts)

    def _reduce(self, value: float, operation: Any) -> float:
        self.do_together("compares a number")
        return self._ask_to_reduce(value, operation)()

    def _ask_to_reduce(self, value: float, operation: Any) -> Callable[[], float]:
        what = "comparing numbers of all ranks"
        values = torch.tensor([value], dtype=torch.float64)
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        with self._naming(what):
            asked = self.now.allreduce([values], options)

        def finish() -> float:
            with self._naming(what):
                self._lockstep.wait_for(asked)
                return float(values.item())

        return finish

    def barrier(self, what: str) -> None:
        """Waits for all ranks."""
        with self._naming(what):
            self._lockstep.do_together(f"is {what}")

    def all_stop_before(self, step: int) -> bool:
        """Whether all ranks say soon that they can't begin a step, for which nobody may send
        anything.

        Not as messages: a rank that has begun the step would take them for others.
        """
        keys = {
            rank: f"bagpipe/{self.number}/{self._stream}/stopped/{rank}/{step}"
            for rank in range(self.num_trainers)
        }
        try:
            self.store.set(keys[self.rank], b"")
            for key in keys.values():
                self._wait_for(key, min(self.timeout, _STOPS_WITHIN))
        except (RuntimeError, torch.distributed.DistError):
            return False
        return True

    def begin_stream(self) -> None:
        """Marks made from now on are of another stream of plans; all ranks begin streams in the
        same order.

        Raises UsageError where the stream before has not ended, or has failed.
        """
        if self._has_failed:
            raise UsageError(
                "an earlier stream of this communicator failed, its messages may be out of order: "
                "make another one"
            )
        if self._is_streaming:
            raise UsageError(
                "a communicator serves one stream at a time: end the other bagpipe.lookahead, call "
                "stop() on its embeddings, or "
                "give each embeddings a communicator of its own"
            )
        self._stream += 1
        self._known_written.clear()
        self._is_streaming = True

    def end_stream(self, *, has_failed: bool = False) -> None:
        """Says that no more messages of the stream are sent."""
        self._is_streaming = False
        self._has_failed = self._has_failed or has_failed

    def mark_written(self, kind: TransferKind, step: int) -> None:
        """Tells the others that this rank has written what the early, or the late, transfers up to
        `step` evict; steps in order.
        """
        with self._naming(f"telling that the {kind} transfers of step {step} are written back"):
            self.store.set(self._key(kind, self.rank, step), b"")
            self.store.set(self._key(kind, self.rank, None), str(step))
            if step >= _KEPT_MARKS:
                self.store.delete_key(self._key(kind, self.rank, step - _KEPT_MARKS))

    def wait_written(self, kind: TransferKind, step: int) -> None:
        """Returns once every other rank of the host has written what its early, or late, transfers
        up to `step` evict.
        """
        for rank in self.ranks_of_host:
            if rank == self.rank or self._known_written.get((kind, rank), -1) >= step:
                continue
            newest = self._key(kind, rank, None)
            with self._naming(
                f"waiting for rank {rank} to write back what the {kind} transfers of step {step} "
                "evict"
            ):
                written = int(self._waiting.get(newest)) if self._waiting.check([newest]) else -1
                if written < step:
                    self._wait_for(self._key(kind, rank, step))
            self._known_written[kind, rank] = max(written, step)

    def _key(self, kind: TransferKind, rank: int, step: int | None) -> str:
        which = "newest" if step is None else step
        return f"bagpipe/{self.number}/{self._stream}/{kind}/{rank}/{which}"

    def _wait_for_text(self, key: str) -> str:
        self._wait_for(key)
        return str(self._waiting.get(key).decode())

    def _wait_for(self, key: str, timeout: timedelta | None = None) -> None:
        """Waits until `key` is in the store. RuntimeError or DistError: it does not come, or a rank
        of this host has ended.
        """
        timeout = timeout or self.timeout
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            started = time.monotonic()
            try:
                self._waiting.wait([key], min(timeout, _LOOK_AFTER))
            except (RuntimeError, torch.distributed.DistError):
                waited = time.monotonic() - started
                if waited < _LOOK_AFTER.total_seconds() / 2 or time.monotonic() >= deadline:
                    raise
                self._raise_if_gone()
            else:
                return

    def _raise_if_gone(self) -> None:
        readable, _, _ = select.select(list(self._processes.values()), [], [], 0)
        for rank, process in self._processes.items():
            if process in readable:
                raise RuntimeError(f"the process of rank {rank} has ended")

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except BagpipeError:
            raise
        except (RuntimeError, torch.distributed.DistError) as error:
            raise BackgroundError(
                f"rank {self.rank}: {what} failed; another of the {self.num_trainers} trainers may "
                f"be gone: {error}"
            ) from error


def _machine() -> str:
    """The name of this machine, and what tells it from others of that name."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot_id}".strip()
