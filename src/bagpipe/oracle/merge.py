"""One batch of all trainers together: which unique rows it uses, and which ranks use each.

It is stateless. With one trainer there is one share, and nothing is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.oracle.dedup import DedupedGroup, number_rows
from bagpipe.oracle.shards import shard_bounds
from bagpipe.topology import NUM_SHARDS
from bagpipe.types import Group, Int32Array, Int64Array, UInt64Array

_NO_USERS, _NO_PLACES = np.empty(0, np.uint64), np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class MergedGroup:
    """What a batch of all trainers asks of one group; each trainer has a share of its samples.

    With one trainer `users` and its `places` are empty: the share is the batch.
    """

    unique_rows: Int64Array  # (U,) shard by shard, in each in first-use order, rank by rank
    users: UInt64Array  # (U,) bit r: rank r uses the row
    shares: tuple[DedupedGroup, ...]  # by rank
    # by rank, (U_r,): where in unique_rows each of the share's unique rows is
    places: tuple[Int32Array, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that this value holds."""
        own = self.users.nbytes + sum(places.nbytes for places in self.places)
        if self.unique_rows is not self.shares[0].unique_rows:
            own += self.unique_rows.nbytes
        return own + sum(share.nbytes for share in self.shares)


def merge(group: Group, shares: Sequence[DedupedGroup]) -> MergedGroup:
    """Joins the trainers' shares of one batch of `group`, in the order of ranks."""
    if len(shares) == 1:
        return MergedGroup(
            unique_rows=shares[0].unique_rows,
            users=_NO_USERS,
            shares=tuple(shares),
            places=(_NO_PLACES,),
        )
    rows = np.concatenate([share.unique_rows for share in shares])
    ends = np.cumsum([len(share.unique_rows) for share in shares])
    places = np.empty(len(rows), np.int32)
    unique_rows, users = _merge(rows, ends, group.num_rows, places)
    return MergedGroup(
        unique_rows=unique_rows,
        users=users,
        shares=tuple(shares),
        places=tuple(np.split(places, ends[:-1])),
    )


@jit
def _merge(
    rows: Int64Array, ends: Int64Array, num_rows: int, places: Int32Array
) -> tuple[Int64Array, UInt64Array]:
    """Fills `places`, and returns `unique_rows` and `users`."""
    # The rows of a shard are numbered as ids of one table: its hash table stays in the CPU's cache.
    num_trainers = len(ends)
    begins, lengths = (
        np.empty((NUM_SHARDS, num_trainers), np.int64),
        np.empty((NUM_SHARDS, num_trainers), np.int64),
    )
    begin = 0
    for rank in range(num_trainers):
        bounds = begin + shard_bounds(rows[begin : ends[rank]], NUM_SHARDS)
        begins[:, rank], lengths[:, rank] = bounds[:-1], np.diff(bounds)
        begin = ends[rank]
    unique_rows = np.empty(min(len(rows), num_rows), np.int64)
    counts, numbers = np.empty(len(unique_rows), np.int32), np.empty(len(rows), np.int32)
    num_uniques, bad_feature, _ = number_rows(
        rows,
        begins.ravel(),
        lengths.ravel(),
        np.repeat(np.arange(NUM_SHARDS), num_trainers),
        np.zeros(NUM_SHARDS, np.int64),
        np.full(NUM_SHARDS, num_rows),
        numbers,
        unique_rows,
        counts,
    )
    assert bad_feature < 0
    users = np.zeros(num_uniques, np.uint64)
    first = 0
    for shard in range(NUM_SHARDS):
        for rank in range(num_trainers):
            begin, length, bit = (
                begins[shard, rank],
                lengths[shard, rank],
                np.uint64(1) << np.uint64(rank),
            )
            for index in range(length):
                number = numbers[first + index]
                places[begin + index] = number
                users[np.uint32(number)] |= bit
            first += length
    return unique_rows[:num_uniques].copy(), users
