"""The embedding store protocol: where all records of one group live.

Ordering, which every store promises and `tests/store_contract.py` holds:

- a `fetch` that starts after a `write` has returned sees what it wrote;
- any number of `fetch` and `write` may run at the same time in different threads as long as the
  rows of a `write` are disjoint from the others' (the plan's fences see to that); both release the
  GIL during the copying;
- a row never written reads as its initial record, the same in every store (`bagpipe.store.init`),
  and reading it does not make it touched;
- `snapshot` and `clear` run alone: no fetch or write at the same time;
- a fetch or write that is under way when another thread calls `close` either completes or raises
  StoreError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from bagpipe.types import Float32Array, Group, Int64Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """A step of each kind of transfers, -1 for none.

    As a *mark* it says that one trainer has written all that its transfers up to these steps evict.
    As a *fence* it says how far every trainer's marks must have come before rows are read.
    """

    overlapped: int = -1
    urgent: int = -1


NO_STEPS = Steps()


class EmbeddingStore(Protocol):
    """All records of one group: `num_rows` x `record_width` float32.

    A record is its row's weights and then their optimizer state. Two weights of 16 bits share the
    bits of one float32 (`Group.weight_words`): records are copied, never computed with.
    """

    @property
    def group(self) -> Group:
        """The group whose records these are."""

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        """Reads the records of `rows` into `out`.

        Both arrays are the caller's again when this returns.

        Args:
            rows: (n,) int64; a row may be given twice.
            out: (n, record_width) float32, C-contiguous.

        Raises:
            StoreError: a row is out of range or an array does not fit, and nothing was read; or
                the medium failed.
        """

    def ask(
        self, rows: Int64Array, out: Float32Array, fence: Steps = NO_STEPS
    ) -> Callable[[], None]:
        """As `fetch`, but returns a function that waits for it, so that several can be under way.

        Call that function once; the arrays are borrowed until it returns. A store of several
        trainers reads once the marks of all of them have reached `fence`. A store of a single
        trainer reads in that function, and leaves fences to its caller.

        Raises:
            StoreError: as for `fetch`, at once or from that function.
        """

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        """Writes `records` to `rows`.

        Both arrays are the caller's again when this returns.

        Args:
            rows: (n,) int64, each row once.
            records: (n, record_width) float32, C-contiguous.

        Raises:
            StoreError: as for `fetch`; nothing was written.
        """

    def snapshot(self, block_rows: int = 65_536) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Yields every touched row once, ascending, with its record.

        Args:
            block_rows: the most rows that one block has.

        Returns:
            Blocks of rows (n,) int64 and their records (n, record_width) float32.

        Raises:
            StoreError: at the call, `block_rows` is below 1 or the store is closed.
        """

    def clear(self) -> None:
        """Forgets all that was written: every row reads as its initial record again.

        Raises:
            StoreError: the medium failed, and the store is closed.
        """

    def close(self) -> None:
        """Releases files and memory; further calls are an error. Closing twice is allowed."""


@runtime_checkable
class OrderedStore(EmbeddingStore, Protocol):
    """A store of several trainers that orders what they write and read, by marks and fences.

    It has the records of all hosts, so any trainer may own any row. Once a call has failed, all
    further calls fail.
    """

    def send(self, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        """As `write`, but returns a function that waits for it.

        The arrays are borrowed until that function returns.

        Raises:
            StoreError: as for `write`, at once or from that function.
        """

    def mark(self, steps: Steps) -> None:
        """Says how far this trainer has sent what it evicts, of all groups; steps only grow.

        It goes behind all that was sent before to the stores of any group, and nobody waits for it.

        Raises:
            StoreError: the medium failed.
        """


class RecordMemory(Protocol):
    """Memory of the trainer's that a store's process has, too. Any thread may call it."""

    def take(self, num_records: int, record_width: int) -> Float32Array:
        """An array for records, the taker's until it is given back.

        Returns:
            (num_records, record_width) float32, C-contiguous, with undefined content.

        Raises:
            StoreError: there is no room for it.
        """

    def give_back(self, array: Float32Array) -> None:
        """Takes an array back that nobody uses any more."""


def memory_of(store: EmbeddingStore) -> RecordMemory | None:
    """What a trainer shares with a store, whose records are copied once less there; or nothing."""
    memory: RecordMemory | None = getattr(store, "memory", None)
    return memory


def sender_to(
    store: EmbeddingStore,
) -> Callable[[Int64Array, Float32Array], Callable[[], None]]:
    """What sends records (n, record_width) to rows (n,) of a store, and returns what waits for it.

    Stores that are not ordered write when waited for.
    """
    if isinstance(store, OrderedStore):
        return store.send
    return lambda rows, records: partial(store.write, rows, records)
