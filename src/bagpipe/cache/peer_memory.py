"""Rows travel between GPUs of one host by peer memory: a sender writes into a receiver's memory.

A message is one launch on each rank (`triton_peer`), in several rounds if it is larger than a
region. Neither the host nor another stream waits: who waits for rows is the kernel that puts them
where they are needed, on the stream on which they are needed.

    each rank's memory      urgent: flags | regions of rank 0, 1, ... | the same once more
                            overlapped: the same

A region holds the rows that one rank sends to this one in one round. There are two for each sender,
which take turns, and a pair of them for each moment, since urgent and overlapped messages are on
different streams and nothing orders them.

When may a region be written again? Ranks go in lockstep: messages of one moment are the same on all
ranks, in the same order, and a launch begins once all programs of the one before have ended, as on
one stream. Both ranks of a pair know how many rows go each way, so they count the same rounds; a
round raises both ranks' flags, however few rows go one way. Part q of a round is the work of one
program on each rank, twins of the same number in all launches. Within a message a program writes
the same bytes of the region in every round and its twin reads them. The next message may have
wider rows: then other programs write those bytes.

Take ranks a and b, and a program of a in round k + 2, which writes where round k wrote.

    it follows its own round k + 1, which has seen its twin's flag k + 1
    its twin raised that in its round k + 1, after it had itself copied its rows of round k
    round k of the same message: it was the twin who read those bytes
    round k of an earlier message, round k + 1 of this one: the twin's launch began after all
        programs of b had ended round k
    round k + 1 of an earlier message: a's launch began after all programs of a had seen the flags
        k + 1 of their twins, so all programs of b had copied their rows of round k

So the region is free, and nobody tells so. With one region in place of two a's round k + 1 would
write what b's round k may still be reading. A flag is a number that only grows, and a rank may find
it one round ahead of its own.

A CUDA graph can hold launches (`PeerMemory.launch`): they find their rows in rings. The host keeps
the books of those, too, since it looks after launches that are not over: it notes each replay.

The order of sums is that of ranks, as by messages: rows from rank 0 come first, whoever came first.
So all results are the same to the bit.

A rank that is gone raises no flag. A thread looks twice a second for launches that are not over: it
ends all waiting on the device once a rank has failed, or its process has ended, or nothing has come
for as long as the communicator's timeout. What is computed from then on is void: the next call here
raises. A stream that fails for another reason ends its waiting, too. Memory that others may still
write to is then left behind, up to the end of the process.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DeviceRows
from bagpipe.cache.peer_buffers import PeerBuffers, open_buffers
from bagpipe.cache.ring import RowsByClock
from bagpipe.cache.triton_peer import Lane, exchange_rows, travel
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.plan import RowExchange

_logger = logging.getLogger("bagpipe.lookahead")
_MAX_BYTES: Final = 256 << 20
"""Of a rank's memory for the others' rows; what does not fit goes in more rounds."""
_ALIGNMENT: Final = 4096
_NUM_PROGRAMS: Final[dict[Moment, int]] = {"urgent": 64, "overlapped": 16}
"""Of a launch, about. Those that wait take room from compute, which urgent ones hold up anyway."""
_LOOK_AFTER_S: Final = 0.5
_LOOK_FOR_FAILED_AFTER_S: Final = 2.0
_left_behind: list[object] = []


@dataclass(frozen=True, kw_only=True)
class PeerLayout:
    """Where flags and regions begin in each rank's memory, in bytes; the same on all ranks."""

    num_trainers: int
    region_bytes: int

    @classmethod
    def of(cls, caches: Sequence[DeviceCache], num_trainers: int) -> PeerLayout:
        """Regions for all that a step may send, but no more than `_MAX_BYTES` of them.

        What a rank sends another one are replicas that the other has room for, or the sums of its
        own replicas. Of the dense part's gradients nobody knows the number yet.
        """
        row_bytes = [4 * max(cache.words.shape[1], cache.group.embedding_dim) for cache in caches]
        most = max(
            cache.num_replica_slots // 2 * num_bytes
            for cache, num_bytes in zip(caches, row_bytes, strict=True)
        )
        limit = _MAX_BYTES // (2 * len(_NUM_PROGRAMS) * num_trainers)
        region_bytes = max(min(most, limit), max(row_bytes))
        return cls(num_trainers=num_trainers, region_bytes=_aligned(region_bytes))

    def num_parts(self, moment: Moment) -> int:
        """Into how many parts a round of two ranks is cut."""
        return max(1, _NUM_PROGRAMS[moment] // (self.num_trainers - 1))

    def flags_at(self, moment: Moment) -> int:
        """Where flags begin: (num_trainers, num_parts) int64."""
        return list(_NUM_PROGRAMS).index(moment) * self._moment_bytes

    def regions_at(self, moment: Moment) -> int:
        """Where regions begin: (2, num_trainers), of `region_bytes` each."""
        return self.flags_at(moment) + self._flags_bytes

    @property
    def num_bytes(self) -> int:
        """Of each rank's memory."""
        return len(_NUM_PROGRAMS) * self._moment_bytes

    @property
    def _flags_bytes(self) -> int:
        return _aligned(8 * self.num_trainers * max(map(self.num_parts, _NUM_PROGRAMS)))

    @property
    def _moment_bytes(self) -> int:
        return self._flags_bytes + 2 * self.num_trainers * self.region_bytes


class _Launch(NamedTuple):
    """A launch that may not be over; they are numbered from 1."""

    number: int
    step: int
    what: str


@dataclass(kw_only=True)
class _Traffic:
    """All messages of one moment."""

    lane: Lane
    issued: deque[_Launch] = field(default_factory=deque)
    num_issued: int = 0
    looked_at: int = 0  # the oldest launch that was not over
    since_s: float = 0.0

    def note(self, step: int, what: str) -> None:
        self.num_issued += 1
        self.issued.append(_Launch(self.num_issued, step, what))


class PeerMemory:
    """One rank's messages by peer memory. Each moment's are asked for by one thread."""

    def __init__(
        self,
        communicator: Communicator,
        layout: PeerLayout,
        buffers: PeerBuffers,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Takes buffers of `layout`.

        Rows may be waited for as long as `timeout_s`, by default the communicator's timeout.
        """
        self._communicator = communicator
        self._buffers: PeerBuffers | None = buffers  # until it is closed
        self._timeout_s = communicator.timeout.total_seconds() if timeout_s is None else timeout_s
        self._device = buffers.own.device
        self._stop = self._on_host(1, dtype=torch.int32)
        addresses = torch.tensor(buffers.addresses, device=self._device)
        self._traffic: dict[Moment, _Traffic] = {
            moment: _Traffic(lane=self._lane(layout, moment, addresses)) for moment in _NUM_PROGRAMS
        }
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what is there now is read on other streams
        self._failure: tuple[_Launch, str] | None = None
        self._closing = threading.Event()
        threading.Thread(
            target=_keep_looking,
            args=(weakref.ref(self), self._closing),
            name="bagpipe-peer-memory",
            daemon=True,
        ).start()

    @property
    def launcher(self) -> PeerMemory:
        """See `Way.launcher`."""
        return self

    @classmethod
    def open(
        cls, communicator: Communicator, caches: Sequence[DeviceCache], device: torch.device
    ) -> PeerMemory:
        """Makes the buffers of all ranks, which call it together; raises as `open_buffers`."""
        layout = PeerLayout.of(caches, communicator.num_trainers)
        buffers = open_buffers(communicator, device, layout.num_bytes)
        _logger.info(
            "rows travel between GPUs by peer memory, %d MiB on each", layout.num_bytes >> 20
        )
        return cls(communicator, layout, buffers)

    def exchange(
        self,
        values: Tensor,
        first_received: int,
        on_device: DeviceRows,
        rows: RowExchange,
        *,
        moment: Moment,
        step: int,
        what: str,
    ) -> None:
        """See `Way.exchange`."""
        self.check()
        # numpy takes longer
        if max(*rows.send_counts.tolist(), *rows.receive_counts.tolist()) > 0:
            traffic = self._traffic[moment]
            traffic.note(step, what)
            _exchange(traffic.lane, values, on_device, first_received)

    def launch(self, values: Tensor, rings: RowsByClock, moment: Moment) -> None:
        """Exchanges rows of the step that the device's clock tells, on the current stream.

        A graph that is captured now holds it. Each time that the device does it must be noted. The
        graph holds addresses only: it may be replayed as long as tensors stay and this is open.

        Args:
            values: (n, W) float32, contiguous, from which rows are sent and into which they are
                received.
            rings: where the kernel finds which rows.
            moment: whether they are on the critical path. On the device all its messages are one
                after the other, in the same order on all ranks.
        """
        _exchange(self._traffic[moment].lane, values, rings)

    def warm_up(self, values: Tensor, rings: RowsByClock, moment: Moment) -> None:
        """Compiles and loads what `launch` launches, and launches nothing: nothing to note."""
        exchange_rows(self._traffic[moment].lane, values, rings, only_loads=True)

    def note(self, moment: Moment, step: int, what: str) -> None:
        """Notes that the device has been asked for one `launch`, as by a replay of a graph.

        Args:
            moment: of the launch.
            step: named in errors, as is `what`.
            what: is exchanged.

        Raises:
            LostError: as `check`.
        """
        self.check()
        self._traffic[moment].note(step, what)

    def check(self) -> None:
        """Raises LostError if the device has ended its waiting for rows that did not come."""
        if self._failure is None:
            return
        launch, reason = self._failure
        with self._communicator.naming(f"exchanging {launch.what} of step {launch.step}"):
            raise RuntimeError(reason)

    def finish(self) -> None:
        """Waits until all that was asked for is over on the device; raises as `check`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.check()

    def close(self, *, wait: bool) -> None:
        """Ends all waiting; without `wait` nobody knows what others still write."""
        self._closing.set()
        if wait:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        else:
            self._stop.fill_(1)
            _left_behind.append((self._buffers, self._traffic))
        self._buffers = None

    def look(self) -> None:
        """Ends all waiting if what a launch waits for can't come, or does not."""
        now = time.monotonic()
        for traffic in self._traffic.values():
            over = int(traffic.lane.done.min())
            while traffic.issued and traffic.issued[0].number <= over:
                traffic.issued.popleft()
            if not traffic.issued:
                continue
            oldest = traffic.issued[0]
            if traffic.looked_at != oldest.number:
                traffic.looked_at, traffic.since_s = oldest.number, now
            waited_s = now - traffic.since_s
            if waited_s >= self._timeout_s:
                late = (
                    (traffic.lane.done.min(1).values < oldest.number).nonzero().flatten().tolist()
                )
                ranks = " and ".join(map(str, late))
                self._give_up(oldest, f"nothing has come from rank {ranks} for {waited_s:.0f} s")
            elif waited_s >= _LOOK_FOR_FAILED_AFTER_S:
                try:
                    self._communicator.lockstep.raise_if_failed()
                    self._communicator.waiter.raise_if_gone()
                except RuntimeError as error:
                    self._give_up(oldest, str(error))

    def _give_up(self, launch: _Launch, reason: str) -> None:
        self._failure = self._failure or (launch, reason)
        self._stop.fill_(1)

    def _lane(self, layout: PeerLayout, moment: Moment, addresses: Tensor) -> Lane:
        rank, shape = self._communicator.rank, (layout.num_trainers, layout.num_parts(moment))
        done = self._on_host(*shape, dtype=torch.int64)
        done[rank] = torch.iinfo(torch.int64).max  # it sends itself nothing
        return Lane(
            rank=rank,
            num_trainers=layout.num_trainers,
            num_parts=shape[1],
            region_bytes=layout.region_bytes,
            flags_at=layout.flags_at(moment),
            regions_at=layout.regions_at(moment),
            addresses=addresses,
            rounds=torch.zeros(shape, dtype=torch.int64, device=self._device),
            launches=torch.zeros(shape, dtype=torch.int64, device=self._device),
            done=done,
            stop=self._stop,
            stopped=torch.zeros(1, dtype=torch.int32, device=self._device),
        )

    def _on_host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros that the device reaches, too."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._device.type == "cuda")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _exchange(
    lane: Lane, values: Tensor, rows: DeviceRows | RowsByClock, first_received: int = 0
) -> None:
    if travel.is_compiled:
        exchange_rows(lane, values, rows, first_received)
        return
    # In Triton's interpreter programs run one after the other: all send before one waits.
    most = int(max(rows.send_counts.max(), rows.receive_counts.max()))
    num_rows = lane.rows_per_round(values)
    for first in range(0, most, num_rows):
        for sends in (True, False):
            exchange_rows(
                *(lane, values, rows, first_received),
                first=first,
                end=first + num_rows,
                sends=sends,
                receives=not sends,
                ends=False,
            )
    exchange_rows(lane, values, rows, first_received, end=0, sends=False, receives=False)


def _keep_looking(memory: weakref.ReferenceType[PeerMemory], closing: threading.Event) -> None:
    """Not a method: a thread that holds the communicator keeps its connections open."""
    while not closing.wait(_LOOK_AFTER_S):
        looking = memory()
        if looking is None:
            return
        looking.look()
        del looking
