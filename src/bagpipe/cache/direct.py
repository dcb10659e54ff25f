"""Moves records between the cache and tables that the device reads and writes itself.

    evict   slots -> the host's table     on the stream `out`, behind the compute issued so far
    fetch   the host's table -> slots     on the stream `into`, behind the evictions before it

A kernel copies each way, so no thread of the host touches a record and none is staged. The host
only looks at the rows to fetch, some steps ahead: those that were never written it writes first.
Order is that of the streams: a row is fetched again behind the eviction that wrote it, and evicted
behind the compute that used it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DeviceTransfers
from bagpipe.cache.issued import IssuedTransfers
from bagpipe.cache.managed import ManagedStore
from bagpipe.cache.overlap import Buffer, Streams
from bagpipe.cache.triton_direct import CachedTable, fill_from, write_all_to, write_to
from bagpipe.distributed.communicator import Moment
from bagpipe.native.spans import span
from bagpipe.native.workers import Workers
from bagpipe.plan import HostStepPlan, Transfers


class DirectMover:
    """`RecordMover` for tables in managed memory. The trainer's thread calls it."""

    with_rows = True

    def __init__(
        self, caches: Sequence[DeviceCache], stores: Sequence[ManagedStore], streams: Streams
    ) -> None:
        """Takes both by group."""
        self._stores, self._streams, self._device = tuple(stores), streams, caches[0].device
        self._tables = [
            CachedTable.of(store.records, cache)
            for store, cache in zip(stores, caches, strict=True)
        ]
        # They are being made on this stream, and steps may be on another one. What leaves waits for
        # them, and what enters follows that.
        streams.out.wait_event(streams.record_compute())
        self._first_uses = Workers("bagpipe-first-use")

    def issue(
        self,
        plan: HostStepPlan,
        transfers: Sequence[Transfers],
        tick: int,
        to_device: Callable[[], tuple[DeviceTransfers, ...]],
    ) -> IssuedTransfers:
        """Evicts, and looks for rows that were never written."""
        out = self._streams.out
        with span("evict"), self._streams.on(out):
            on_device = to_device()
            self._streams.let_out_follow()
            for index, moved in enumerate(on_device):
                assert moved.evict_rows is not None
                write_to(self._tables[index], moved.evict_rows, moved.evict_slots)
            evicted = out.record_event()
        gathered = self._first_uses.submit(self._materialize, transfers)
        return IssuedTransfers(on_device=on_device, gathered=gathered, evicted=evicted)

    def fill(self, issued: IssuedTransfers) -> None:
        """Copies records into their slots, once; waits until they are written."""
        if issued.is_filled:
            return
        assert issued.evicted is not None
        issued.gathered.result()
        into = self._streams.into
        with span("fetch"), self._streams.on(into):
            into.wait_event(issued.evicted)
            for index, moved in enumerate(issued.on_device):
                assert moved.fetch_rows is not None
                fill_from(self._tables[index], moved.fetch_rows, moved.fetch_slots)
            issued.filled = into.record_event()
        issued.is_filled = True

    def give_back(self, issued: IssuedTransfers) -> None:
        """Nothing to give back: nothing is staged."""

    def mark(self, kind: Moment, step: int) -> None:
        """Nobody else reads or writes these tables."""

    def raise_failed_writes(self) -> None:
        """The device writes, which raises its own errors."""

    def finish_writes(self) -> None:
        """`write_all` waits."""

    def write_all(self) -> None:
        """Writes every resident record to its table; no transfer may be under way."""
        assert len(self._tables) == len(self._stores), "the memory is given back"
        for table in self._tables:
            write_all_to(table)
        torch.cuda.synchronize(self._device)

    def give_memory_back(self) -> None:
        """Lets go of the tables, or they would outlive stores that are cleared or closed."""
        self._tables.clear()

    def close(self, *, wait: bool = True) -> None:
        """Ends the thread."""
        self._first_uses.close(wait=wait)

    def _materialize(self, transfers: Sequence[Transfers]) -> list[Buffer]:
        """Runs on a thread: writes the rows to fetch that were never written."""
        with span("first_use"):
            for store, moved in zip(self._stores, transfers, strict=True):
                store.materialize(moved.fetch_rows)
        return []
