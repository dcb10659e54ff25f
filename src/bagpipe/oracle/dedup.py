"""De-duplication: from the ids of one batch to its unique rows and its gradient schedule.

It is stateless, so any number of batches run at a time on any number of threads (the compiled code
releases the GIL), and pure: the same ids give the same arrays on any machine. One pass over the
lookups finds the unique rows. They are then put shard by shard (`bagpipe.oracle.shards`). A second
pass groups the bags by row (`bagpipe.oracle.pieces`). Nothing is sorted by comparison.

Tables are taken one after the other, so that the hash table in use holds one table's ids and stays
in the CPU's cache. A table whose ids all fit the hash table is addressed directly. Cost: about 5 ms
for 425,984 lookups on one core (docs/results.md).

While its batch is in the window, a `DedupedGroup` keeps 12 bytes a lookup (8 where all bags hold
one id) and about 16 a unique row. A running call needs 4 to 8 bytes a lookup more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bagpipe.errors import DataError
from bagpipe.lookups import group_lookups, id_outside_table
from bagpipe.native.jit import jit
from bagpipe.native.prefetch import prefetch
from bagpipe.oracle.pieces import cut_pieces, group_bags
from bagpipe.oracle.shards import order_by_shard
from bagpipe.plan import MAX_PIECE_LENGTH, GradientSchedule
from bagpipe.types import Float32Array, Group, Int32Array, Int64Array, Jagged, UInt32Array

_MAX_LOOKUPS = 2**31 - 1
_MULTIPLIER = np.uint32(0x9E3779B1)  # 2**32 over the golden ratio, made prime
_BLOCK = 256
"""Lookups whose places in the hash table are found and asked for at a time."""


@dataclass(frozen=True, kw_only=True)
class DedupedGroup:
    """What one batch asks of one group, before slots are known.

    The arrays from `bags` on are those of `GradientSchedule`.
    """

    unique_rows: Int64Array  # (U,) shard by shard, in each in first-use order
    inverse: Int32Array  # (L,) for each lookup the index of its row in unique_rows
    bag_offsets: Int32Array | None  # (F * B + 1,)
    bag_scales: Float32Array | None  # (B * F,)
    bags: Int32Array  # (L,)
    piece_offsets: Int32Array  # (num_pieces + 1,)
    long_uniques: Int32Array  # (num_long,)
    long_offsets: Int32Array  # (num_long + 1,)
    lookup_weights: Float32Array | None = None  # (L,)
    bag_weights: Float32Array | None = None  # (L,)

    @property
    def nbytes(self) -> int:
        """Bytes that this value holds."""
        return sum(array.nbytes for array in vars(self).values() if array is not None)

    def schedule(self, unique_slots: Int32Array) -> GradientSchedule:
        """Returns the gradient schedule, now that the unique rows have slots (U,)."""
        return GradientSchedule(
            unique_slots=unique_slots,
            bags=self.bags,
            piece_offsets=self.piece_offsets,
            long_uniques=self.long_uniques,
            long_offsets=self.long_offsets,
            bag_weights=self.bag_weights,
        )


def dedup(group: Group, batch: Jagged) -> DedupedGroup:
    """Finds the unique rows of a batch in one group, and its gradient schedule.

    Raises:
        DataError: A feature of the group is missing, an id lies outside its table, the offsets are
            inconsistent, or there are 2**31 lookups or more.
    """
    lookups = group_lookups(group, batch)
    num_lookups = lookups.num_lookups
    if num_lookups > _MAX_LOOKUPS:
        raise DataError(
            f"{group.name}: a batch has {num_lookups:,} lookups, the limit is {_MAX_LOOKUPS:,}: "
            "use smaller batches"
        )
    inverse = np.empty(num_lookups, np.int32)
    bags = np.empty(num_lookups, np.int32)
    weights = np.empty(0, np.float32) if lookups.weights is None else lookups.weights
    bag_weights = np.empty_like(weights)
    unique_rows, piece_offsets, long_uniques, long_offsets, bad_feature, bad_lookup = _dedup(
        _as_compiled_for(batch.values),
        lookups.feature_starts,
        lookups.feature_lengths,
        np.asarray(group.feature_tables, np.int64),
        group.row_offsets,
        np.empty(0, np.int32) if lookups.bag_offsets is None else lookups.bag_offsets,
        batch.batch_size,
        weights,
        inverse,
        bags,
        bag_weights,
    )
    if bad_feature >= 0:
        raise id_outside_table(group, batch, lookups, bad_feature, bad_lookup)
    return DedupedGroup(
        unique_rows=unique_rows,
        inverse=inverse,
        bag_offsets=lookups.bag_offsets,
        bag_scales=lookups.bag_scales,
        bags=bags,
        piece_offsets=piece_offsets,
        long_uniques=long_uniques,
        long_offsets=long_offsets,
        lookup_weights=lookups.weights,
        bag_weights=None if lookups.weights is None else bag_weights,
    )


def _as_compiled_for(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Ids as one of the two kinds of arrays for which `_dedup` is compiled: int32 or int64.

    Others are copied: to compile for them, too, would stop a running loop for seconds. An id of
    2**63 or more becomes negative, which is as bad.
    """
    is_short = ids.dtype == np.int32
    if (is_short or ids.dtype == np.int64) and ids.flags.c_contiguous and ids.flags.writeable:
        return ids
    return ids.astype(np.int32) if is_short else ids.astype(np.int64)


@jit
def _dedup(
    values: npt.NDArray[np.integer],
    feature_starts: Int64Array,
    feature_lengths: Int64Array,
    feature_tables: Int64Array,
    row_offsets: Int64Array,
    bag_offsets: Int32Array,
    batch_size: int,
    weights: Float32Array,
    inverse: Int32Array,
    bags: Int32Array,
    bag_weights: Float32Array,
) -> tuple[Int64Array, Int32Array, Int32Array, Int32Array, int, int]:
    """Does all of it in one call, since each call waits for the GIL when it returns.

    Fills `inverse`, `bags` and `bag_weights` (L,).

    Returns:
        unique_rows, piece_offsets, long_uniques, long_offsets, and what `number_rows` says of bad
        ids.
    """
    table_lookups = np.zeros(len(row_offsets) - 1, np.int64)
    for feature in range(len(feature_tables)):
        table_lookups[feature_tables[feature]] += feature_lengths[feature]
    first_rows, sizes = row_offsets[:-1], np.empty(len(table_lookups), np.int64)
    max_uniques = 0
    for table in range(len(table_lookups)):
        sizes[table] = row_offsets[table + 1] - row_offsets[table]
        max_uniques += min(table_lookups[table], sizes[table])
    unique_rows = np.empty(max_uniques, np.int64)
    counts = np.empty(max_uniques, np.int32)
    num_uniques, bad_feature, bad_lookup = number_rows(
        values,
        feature_starts,
        feature_lengths,
        feature_tables,
        first_rows,
        sizes,
        inverse,
        unique_rows,
        counts,
    )
    ordered_rows, ordered_counts, places = order_by_shard(
        unique_rows[:num_uniques], counts[:num_uniques]
    )
    piece_offsets, long_uniques, long_offsets, cursors = cut_pieces(
        ordered_counts, MAX_PIECE_LENGTH
    )
    if bad_feature < 0:
        _renumber(inverse, places)
        group_bags(
            inverse,
            bag_offsets,
            batch_size,
            len(feature_tables),
            weights,
            cursors,
            bags,
            bag_weights,
        )
    return ordered_rows, piece_offsets, long_uniques, long_offsets, bad_feature, bad_lookup


@jit
def number_rows(
    values: npt.NDArray[np.integer],
    feature_starts: Int64Array,
    feature_lengths: Int64Array,
    feature_tables: Int64Array,
    first_rows: Int64Array,
    sizes: Int64Array,
    inverse: Int32Array,
    unique_rows: Int64Array,
    counts: Int32Array,
) -> tuple[int, int, int]:
    """Numbers the unique rows in first-use order; fills `inverse`, `unique_rows` and `counts`.

    The hash tables are powers of two and at most half full, with open addressing, linear probing
    and multiplicative hashing (Knuth, The Art of Computer Programming, 6.4).

    Args:
        values: The ids of all lookups.
        feature_starts: (F,) where in `values` the lookups of each feature begin.
        feature_lengths: (F,) how many there are.
        feature_tables: (F,) each feature's table; features of one table follow each other.
        first_rows: (T,) the first row of each table.
        sizes: (T,) how many ids each table has.
        inverse: (L,) is filled with the number of each lookup's row.
        unique_rows: (at least U,) is filled with the rows.
        counts: (at least U,) is filled with the number of lookups of each row.

    Returns:
        The number of unique rows; the feature and lookup of the first id outside its table, or -1
        and -1.
    """
    num_features = len(feature_starts)
    num_uniques = 0
    position = 0
    feature = 0
    places = np.empty(_BLOCK, np.uint32)
    while feature < num_features:
        table = feature_tables[feature]
        last = feature
        num_lookups = 0
        while last < num_features and feature_tables[last] == table:
            num_lookups += feature_lengths[last]
            last += 1
        bits = 4
        while bits < 31 and (1 << bits) < 2 * min(num_lookups, sizes[table]):
            bits += 1
        # A table whose ids all have a place needs no hash, which the shift says: 0.
        shift = np.uint32(0 if sizes[table] <= (1 << bits) else 32 - bits)
        heads = np.empty((1 << bits, 1), np.int32)
        heads[:] = -1
        for current in range(feature, last):
            start = feature_starts[current]
            stop = start + feature_lengths[current]
            for begin in range(start, stop, _BLOCK):
                block = values[begin : min(begin + _BLOCK, stop)]
                if _place_block(block, sizes[table], shift, heads, places):
                    bad = 0
                    while 0 <= np.int64(block[bad]) < sizes[table]:
                        bad += 1
                    return num_uniques, current, begin + bad - start
                num_uniques = _number_block(
                    block,
                    places,
                    first_rows[table],
                    shift,
                    heads,
                    unique_rows,
                    counts,
                    num_uniques,
                    inverse[position:],
                )
                position += len(block)
        feature = last
    return num_uniques, -1, -1


@jit
def _place_block(
    values: npt.NDArray[np.integer],
    size: int,
    shift: np.uint32,
    heads: Int32Array,
    places: UInt32Array,
) -> bool:
    """Writes each id's first place in the hash table and prefetches it; tells whether an id is bad.

    Work is cut into blocks because these loops compile to vector code, and so that `_number_block`
    finds its places in the CPU's cache.
    """
    is_bad = False
    if shift == 0:
        for index in range(len(values)):
            identifier = np.int64(values[index])
            is_bad |= bool(identifier < 0) | bool(identifier >= size)
            places[index] = np.uint32(identifier)
    else:
        for index in range(len(values)):
            identifier = np.int64(values[index])
            is_bad |= bool(identifier < 0) | bool(identifier >= size)
            places[index] = np.uint32(np.uint32(identifier) * _MULTIPLIER) >> shift
    for index in range(0 if is_bad else len(values)):
        prefetch(heads, places[index], 0)
    return is_bad


@jit
def _number_block(
    values: npt.NDArray[np.integer],
    places: UInt32Array,
    first_row: int,
    shift: np.uint32,
    heads: Int32Array,
    unique_rows: Int64Array,
    counts: Int32Array,
    num_uniques: int,
    inverse: Int32Array,
) -> int:
    """Numbers the rows of a block; returns how many unique rows there are so far."""
    mask = np.uint32(len(heads) - 1)
    for index in range(len(values)):
        row = first_row + np.int64(values[index])
        place = places[index]
        unique = heads[place, 0]
        # Without a hash there are no collisions: only a hashed place may hold another row.
        while unique >= 0 and shift != 0 and unique_rows[np.uint32(unique)] != row:
            place = np.uint32(place + np.uint32(1)) & mask
            unique = heads[place, 0]
        if unique < 0:
            unique = np.int32(num_uniques)
            heads[place, 0] = unique
            unique_rows[num_uniques] = row
            counts[num_uniques] = 0
            num_uniques += 1
        counts[np.uint32(unique)] += 1
        inverse[index] = unique
    return num_uniques


@jit
def _renumber(inverse: Int32Array, places: Int32Array) -> None:
    """Replaces each u of `inverse` by `places[u]`."""
    # A loop of its own is nearly free; within `group_bags` this would take a third of its time.
    for lookup in range(len(inverse)):
        inverse[lookup] = places[np.uint32(inverse[lookup])]
