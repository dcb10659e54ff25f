"""The dense part's gradients averaged over trainers by peer memory, so that a graph can hold it.

Each rank owns a part of the numbers, all parts of one size. A mean is two messages:

    each rank's parts -> their owners, who add them up in the order of ranks
    the owners' sums  -> all ranks

Both are exchanges of rows like any other on the critical path, so they are in one order with those
of embeddings: a step's come behind its urgent gradients, on all ranks. Their lists never change,
which are rings of one place by a clock that stands still.

Numbers are divided before they are added up, as `Communicator.average` does. So two ranks get the
same bits either way. All ranks always do, since each number has one owner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from bagpipe.cache.ring import RowsByClock
from bagpipe.cache.ways import Launcher
from bagpipe.distributed.communicator import Communicator, Moment

_WIDTH: Final = 256
"""Of the rows that numbers travel as: short enough for the smallest region of peer memory."""
_MOMENT: Final[Moment] = "urgent"
_WHAT: Final = "the dense part's gradients"
_Exchange: TypeAlias = Callable[[Tensor, RowsByClock, Moment], None]


@dataclass(frozen=True, kw_only=True)
class _Room:
    """Where so many numbers are averaged; graphs keep its addresses."""

    rows: Tensor
    """(num_trainers * P + (num_trainers - 1) * P, W) float32: all ranks' parts of P rows, then this
    rank's part as the others have sent it. What is beyond the numbers is zero."""
    numbers: Tensor
    """(n,), the beginning of `rows`."""
    parts: tuple[Tensor, ...]
    """(P, W) each, by rank: what is added up."""
    own: Tensor
    """(P, W), the one of `parts` where the sum belongs."""
    to_owners: RowsByClock
    to_all: RowsByClock


class PeerAverage:
    """Averages numbers over the trainers of one stream; all ranks do it as often."""

    def __init__(self, launcher: Launcher, rank: int, num_trainers: int) -> None:
        """Takes no memory yet."""
        self._launcher: Launcher | None = launcher  # up to `let_go`
        self._rank, self._num_trainers = rank, num_trainers
        self._rooms: dict[int, _Room] = {}  # by how many numbers
        self.step = -1
        """The current one, which errors name."""

    @classmethod
    def by(cls, launcher: Launcher | None, communicator: Communicator) -> PeerAverage | None:
        """The average of a stream that begins; None where no graph can hold messages."""
        if launcher is None:
            return None
        return cls(launcher, communicator.rank, communicator.num_trainers)

    def __call__(self, values: Tensor) -> None:
        """Replaces `values` (n,), float32, by their mean over ranks, on the current stream.

        Raises:
            LostError: the device has ended its waiting for another rank.
        """
        self._make_room(values)
        self.note()
        self.launch(values)

    def launch(self, values: Tensor) -> None:
        """The same, which a graph that is captured now holds.

        `warm_up` must come before. Each time that the device does it must be noted.
        """
        assert self._launcher is not None
        self._average(values, self._launcher.launch)

    def warm_up(self, values: Tensor) -> None:
        """Compiles and loads what `launch` launches, and sends nothing.

        What is in `values` afterwards means nothing.
        """
        assert self._launcher is not None
        self._make_room(values)
        self._average(values, self._launcher.warm_up)

    def note(self) -> None:
        """Notes that the device has been asked for one mean, as by a replay of a graph.

        Raises:
            LostError: as a call.
        """
        assert self._launcher is not None
        for _ in range(2):
            self._launcher.note(_MOMENT, self.step, _WHAT)

    def let_go(self) -> None:
        """Frees what it holds; no graph is replayed again."""
        self._launcher = None
        self._rooms.clear()

    def _average(self, values: Tensor, exchange: _Exchange) -> None:
        room = self._rooms[values.numel()]
        torch.div(values, self._num_trainers, out=room.numbers)
        exchange(room.rows, room.to_owners, _MOMENT)
        total, *between, last = room.parts
        for part in between:
            total.add_(part)
        torch.add(total, last, out=room.own)
        exchange(room.rows, room.to_all, _MOMENT)
        values.copy_(room.numbers)

    def _make_room(self, values: Tensor) -> None:
        """Makes room for so many numbers, unless there is some.

        It waits for the device's current stream, so not in a capture.
        """
        assert values.dtype == torch.float32
        if values.numel() not in self._rooms:
            self._rooms[values.numel()] = self._room_for(values)

    def _room_for(self, values: Tensor) -> _Room:
        rank, num_trainers, device = self._rank, self._num_trainers, values.device
        part = -(-values.numel() // (_WIDTH * num_trainers))  # rows
        end = num_trainers * part
        rows = torch.zeros(end + (num_trainers - 1) * part, _WIDTH, device=device)
        own = rows[rank * part : (rank + 1) * part]
        come = list(rows[end:].split(part))
        clock = torch.zeros(1, dtype=torch.int64, device=device)
        numbers = torch.arange(end, dtype=torch.int32, device=device)
        # A count of rows for itself leaves room for a rank's own part, which travels nowhere.
        all_parts = torch.full((1, num_trainers), part, device=device)
        of_others = all_parts.clone()
        of_others[0, rank] = 0
        return _Room(
            rows=rows,
            numbers=rows.flatten()[: values.numel()],
            parts=(*come[:rank], own, *come[rank:]),
            own=own,
            to_owners=RowsByClock(
                clock=clock,
                send=numbers[None],
                send_counts=all_parts,
                receive_counts=of_others,
                firsts=torch.full((1,), end, device=device),
            ),
            to_all=RowsByClock(
                clock=clock,
                send=numbers[rank * part : (rank + 1) * part].repeat(num_trainers - 1)[None],
                send_counts=of_others,
                receive_counts=all_parts,
                firsts=torch.zeros(1, dtype=torch.int64, device=device),
            ),
        )
