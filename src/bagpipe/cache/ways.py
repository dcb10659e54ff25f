"""How rows travel between ranks: by messages of process groups, or by peer memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DeviceRows
from bagpipe.cache.overlap import Streams
from bagpipe.cache.ring import RowsByClock
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.plan import RowExchange

_logger = logging.getLogger("bagpipe.lookahead")


class Launcher(Protocol):
    """What a graph that is captured can exchange rows by."""

    def launch(self, values: Tensor, rings: RowsByClock, moment: Moment) -> None:
        """Exchanges rows of the step that the device's clock tells, on the current stream.

        Args:
            values: as for `Way.exchange`.
            rings: where the device finds which rows.
            moment: as for `Way.exchange`.
        """

    def warm_up(self, values: Tensor, rings: RowsByClock, moment: Moment) -> None:
        """Compiles and loads what `launch` launches, and launches nothing."""

    def note(self, moment: Moment, step: int, what: str) -> None:
        """Notes that the device has been asked for a `launch`, as by a replay of a graph.

        Raises:
            BackgroundError: as `Way.exchange`.
        """


class Way(Protocol):
    """How rows travel. All ranks exchange the same in the same order, for each moment."""

    @property
    def launcher(self) -> Launcher | None:
        """What graphs use; None: they can't hold messages."""

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
        """Sends each rank its rows and receives this rank's, on the current stream.

        Args:
            values: (n, W) float32, contiguous, from which rows are sent.
            first_received: the row of `values` from which on they are received, those of rank 0
                first.
            on_device: which rows are sent.
            rows: the same on the host.
            moment: whether they are on the critical path.
            step: named in errors, as is `what`.

        Raises:
            BackgroundError: a rank can't be reached.
        """

    def finish(self) -> None:
        """Waits until what was received is there, or raises."""

    def close(self, *, wait: bool) -> None:
        """Ends it, without `wait` whatever is under way."""


class Messages:
    """By process groups: NCCL's for rows on GPUs, gloo's for those of CPUs."""

    launcher = None

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

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
        self._communicator.exchange(
            values.index_select(0, on_device.send),
            values[first_received : first_received + rows.num_received],
            rows,
            moment=moment,
            step=step,
            what=what,
        )

    def finish(self) -> None:
        """Process groups raise their own errors."""

    def close(self, *, wait: bool) -> None:
        """Nothing to end: the process groups are the communicator's."""


def way_for(
    communicator: Communicator, caches: Sequence[DeviceCache], streams: Streams | None
) -> Way:
    """Peer memory where the GPUs of all ranks reach each other; all ranks call it together."""
    if streams is None:
        return Messages(communicator)
    from bagpipe.cache.peer_buffers import NoPeerMemoryError
    from bagpipe.cache.peer_memory import PeerMemory  # loads Triton

    try:
        return PeerMemory.open(communicator, caches, caches[0].weights.device)
    except NoPeerMemoryError as reason:
        _logger.info("rows travel between GPUs by NCCL, not by peer memory, since %s", reason)
        return Messages(communicator)
