"""One global batch of several trainers: which distinct rows they use together, and who uses which. Stateless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagpipe._jit import jit
from bagpipe._prefetch import prefetch
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.types import Int32Array, Int64Array, UInt64Array

MAX_TRAINERS = 64
"""Bits of a row's set of users."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
_AHEAD = 16


@dataclass(frozen=True, kw_only=True)
class MergedGroup:
    """What a global batch asks of one group: the distinct rows of all its shares, one share a trainer."""

    unique_rows: Int64Array  # (U,) in first-use order, rank by rank
    users: UInt64Array  # (U,) bit r: rank r uses the row
    shares: tuple[DedupedGroup, ...]  # by rank
    places: tuple[Int32Array, ...]  # by rank, (U_r,): where in unique_rows each of the share's distinct rows is

    @property
    def nbytes(self) -> int:
        """Bytes that this value holds."""
        own = self.unique_rows.nbytes + self.users.nbytes + sum(places.nbytes for places in self.places)
        return own + sum(share.nbytes for share in self.shares)


def merge(shares: Sequence[DedupedGroup]) -> MergedGroup:
    """Joins the trainers' shares of one batch, in the order of ranks."""
    rows = np.concatenate([share.unique_rows for share in shares])
    ends = np.cumsum([len(share.unique_rows) for share in shares])
    places = np.empty(len(rows), np.int32)
    unique_rows, users = _merge(rows, ends, places)
    return MergedGroup(unique_rows=unique_rows, users=users, shares=tuple(shares), places=tuple(np.split(places, ends[:-1])))


@jit
def _merge(rows: Int64Array, ends: Int64Array, places: Int32Array) -> tuple[Int64Array, UInt64Array]:
    """Numbers the distinct rows as de-duplication does (`bagpipe.oracle.dedup`); fills `places`."""
    bits = 4
    while (1 << bits) < 2 * len(rows):
        bits += 1
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(64 - bits)
    heads = np.full((1 << bits, 1), -1, np.int32)
    unique_rows, users = np.empty(len(rows), np.int64), np.zeros(len(rows), np.uint64)
    num_uniques, index = 0, 0
    for rank in range(len(ends)):
        bit = np.uint64(1) << np.uint64(rank)
        while index < ends[rank]:
            ahead = np.uint64(rows[min(index + _AHEAD, len(rows) - 1)])
            prefetch(heads, np.int64((ahead * _MULTIPLIER) >> shift), 0)
            row = rows[index]
            place = (np.uint64(row) * _MULTIPLIER) >> shift
            unique = heads[place, 0]
            while unique >= 0 and unique_rows[np.uint32(unique)] != row:
                place = (place + np.uint64(1)) & mask
                unique = heads[place, 0]
            if unique < 0:
                unique = np.int32(num_uniques)
                heads[place, 0] = unique
                unique_rows[num_uniques] = row
                num_uniques += 1
            users[np.uint32(unique)] |= bit
            places[index] = unique
            index += 1
    return unique_rows[:num_uniques].copy(), users[:num_uniques].copy()
