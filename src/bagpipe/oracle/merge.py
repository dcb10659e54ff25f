"""One global batch of several trainers: which distinct rows they use together, and who uses which. Stateless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagpipe._jit import jit
from bagpipe.oracle.dedup import DedupedGroup, number_rows
from bagpipe.oracle.shards import order_by_shard
from bagpipe.types import Group, Int32Array, Int64Array, UInt64Array

MAX_TRAINERS = 64
"""Bits of a row's set of users."""


@dataclass(frozen=True, kw_only=True)
class MergedGroup:
    """What a global batch asks of one group: the distinct rows of all its shares, one share a trainer."""

    unique_rows: Int64Array  # (U,) shard by shard, in each in first-use order, rank by rank
    users: UInt64Array  # (U,) bit r: rank r uses the row
    shares: tuple[DedupedGroup, ...]  # by rank
    places: tuple[Int32Array, ...]  # by rank, (U_r,): where in unique_rows each of the share's distinct rows is

    @property
    def nbytes(self) -> int:
        """Bytes that this value holds."""
        own = self.unique_rows.nbytes + self.users.nbytes + sum(places.nbytes for places in self.places)
        return own + sum(share.nbytes for share in self.shares)


def merge(group: Group, shares: Sequence[DedupedGroup]) -> MergedGroup:
    """Joins the trainers' shares of one batch of `group`, in the order of ranks."""
    rows = np.concatenate([share.unique_rows for share in shares])
    ends = np.cumsum([len(share.unique_rows) for share in shares])
    places = np.empty(len(rows), np.int32)
    unique_rows, users = _merge(rows, ends, group.num_rows, places)
    return MergedGroup(unique_rows=unique_rows, users=users, shares=tuple(shares), places=tuple(np.split(places, ends[:-1])))


@jit
def _merge(rows: Int64Array, ends: Int64Array, num_rows: int, places: Int32Array) -> tuple[Int64Array, UInt64Array]:
    """Numbers the distinct rows as those of one feature of one table, in which a row's id is its number; fills `places`."""
    unique_rows = np.empty(min(len(rows), num_rows), np.int64)
    counts = np.empty(len(unique_rows), np.int32)
    zero = np.zeros(1, np.int64)
    num_uniques, bad_feature, _ = number_rows(
        rows, zero, np.array([len(rows)]), zero, np.array([0, num_rows]), places, unique_rows, counts
    )
    assert bad_feature < 0
    ordered_rows, _, ordered_places = order_by_shard(unique_rows[:num_uniques], counts[:num_uniques])
    users = np.zeros(num_uniques, np.uint64)
    begin = 0
    for rank in range(len(ends)):
        end, bit = ends[rank], np.uint64(1) << np.uint64(rank)
        for index in range(begin, end):
            place = ordered_places[np.uint32(places[index])]
            places[index] = place
            users[np.uint32(place)] |= bit
        begin = end
    return ordered_rows, users
