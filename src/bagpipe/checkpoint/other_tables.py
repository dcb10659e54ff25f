"""Tables of another run, put into stores of tables that are larger, more, or trained otherwise.

A row's record is copied where both runs have one optimizer. Else its weights are, and its optimizer
state is fresh. A row that the other run never wrote has the record that it had there. Rows that the
other run does not have are not written: they read as rows of a table of their size always do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bagpipe.checkpoint.checkpoints import SavedRun
from bagpipe.store.base import EmbeddingStore
from bagpipe.store.init import RowInitializer
from bagpipe.store.record_files import check_num_records, read_records
from bagpipe.types import Float32Array, Group, Int64Array

_BLOCK_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class Move:
    """Where the rows of one table come from, and where they go."""

    table: str
    source: Group
    first: int
    """The table's first row in `source`."""
    num_rows: int
    target: Group
    target_first: int

    @property
    def keeps_state(self) -> bool:
        """Whether optimizer state goes along."""
        return (
            type(self.source.optimizer) is type(self.target.optimizer)
            and self.source.record_width == self.target.record_width
        )

    @property
    def is_as_new(self) -> bool:
        """Whether a row that was never written has the same weights in both, given one seed."""
        here = self.target.tables[self._index(self.target)]
        there = self.source.tables[self._index(self.source)]
        return (self.source.index, self.first) == (
            self.target.index,
            self.target_first,
        ) and here.initializer == there.initializer

    def _index(self, group: Group) -> int:
        return [table.name for table in group.tables].index(self.table)


def moves_between(sources: Sequence[Group], targets: Sequence[Group]) -> tuple[Move, ...]:
    """Where each table of `sources` goes, of those that `targets` have."""
    places = {
        table.name: (group, int(first))
        for group in targets
        for table, first in zip(group.tables, group.row_offsets, strict=False)
    }
    return tuple(
        Move(
            table=table.name,
            source=group,
            first=int(first),
            num_rows=table.num_embeddings,
            target=places[table.name][0],
            target_first=places[table.name][1],
        )
        for group in sources
        for table, first in zip(group.tables, group.row_offsets, strict=False)
        if table.name in places
    )


def differences(sources: Sequence[Group], targets: Sequence[Group]) -> Iterator[str]:
    """Sentences on all tables whose rows can't go where they are to go."""
    here = {table.name: table for group in targets for table in group.tables}
    for group in sources:
        for there in group.tables:
            table = here.get(there.name)
            if table is None:
                yield f"table {there.name!r} is there, and not here"
                continue
            for what, old, new in (
                ("embedding_dim", there.embedding_dim, table.embedding_dim),
                ("data_type", there.data_type, table.data_type),
            ):
                if old != new:
                    yield f"table {there.name!r} has {what} {old!r} there and {new!r} here"
            if table.num_embeddings < there.num_embeddings:
                yield (
                    f"table {there.name!r} has {there.num_embeddings:,} rows there and "
                    f"{table.num_embeddings:,} here, which has no room for them"
                )


def load_moved(
    saved: SavedRun,
    moves: Sequence[Move],
    stores: Sequence[EmbeddingStore],
    *,
    source_seed: int,
    seed: int,
) -> None:
    """Puts the records of a verified checkpoint into stores that nothing was written to.

    Memory is a block of records, and a byte for each row of the group at hand.

    Args:
        saved: The other run's checkpoint.
        moves: What `moves_between` has found.
        stores: This run's, by group.
        source_seed: The other run's.
        seed: This run's.

    Raises:
        CheckpointError: A file is not what the manifest says.
        StoreError: A store can't be written.
    """
    for index, files in enumerate(saved.record_files):
        of_group = [move for move in moves if move.source.index == index]
        if not of_group:
            continue
        source = of_group[0].source
        is_written = np.zeros(source.num_rows, np.bool_)
        writers = [(move, _Writer(move, stores[move.target.index], seed)) for move in of_group]
        for file in files:
            num_read = 0
            for rows, records in read_records(saved.path / file.name, source.record_width):
                num_read += len(rows)
                is_written[rows] = True
                for move, writer in writers:
                    chosen = (rows >= move.first) & (rows < move.first + move.num_rows)
                    if chosen.any():
                        writer.write(rows[chosen], records[chosen])
            check_num_records(saved.path, file, num_read)
        initial = RowInitializer(source, source_seed)
        for move, writer in writers:
            if not (move.is_as_new and seed % 2**64 == source_seed % 2**64):
                _write_unwritten(move, is_written, initial, writer)


class _Writer:
    """Writes records of the source's rows to a target, in its form."""

    def __init__(self, move: Move, store: EmbeddingStore, seed: int) -> None:
        self._move, self._store = move, store
        self._initial = RowInitializer(move.target, seed)

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        """Writes records (n, record_width of the source) of its rows (n,)."""
        move = self._move
        rows = rows - (move.first - move.target_first)
        if not move.keeps_state:
            weights = records[:, : move.target.weight_words]
            records = np.empty((len(rows), move.target.record_width), np.float32)
            self._initial.fill(rows, records)
            records[:, : move.target.weight_words] = weights
        self._store.write(rows, np.ascontiguousarray(records))


def _write_unwritten(move: Move, is_written: Any, initial: RowInitializer, writer: _Writer) -> None:
    """Writes what the source's rows read as that were never written there."""
    for begin in range(move.first, move.first + move.num_rows, _BLOCK_ROWS):
        end = min(begin + _BLOCK_ROWS, move.first + move.num_rows)
        rows = begin + np.flatnonzero(~is_written[begin:end])
        if len(rows):
            records = np.empty((len(rows), move.source.record_width), np.float32)
            initial.fill(rows, records)
            writer.write(rows, records)
