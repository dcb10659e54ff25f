"""Where things are: the shards of a group's rows, and the trainers.

A hash of a row's number says to which of any number of shards the row belongs. The oracle cuts
large caches into `NUM_SHARDS` by it. It also says which shard server has a row's record: stores
and checkpoints are divided by it. The hash is multiplied by the number of shards and its upper half
is the shard (Lemire, "Fast random integer generation in an interval", ACM TOMACS 2019), so a cut
into fewer shards joins neighbours where one number divides the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagpipe.errors import ConfigError
from bagpipe.native.jit import jit
from bagpipe.types import Group, Int32Array, Int64Array

NUM_SHARDS = 8
"""Into how many shards the oracle cuts a large cache."""
LINE_BITS = 4
"""Binary logarithm of how many neighbouring rows share a shard.

Those are the rows whose 4-byte states share a cache line, lest threads that plan different shards
take lines from each other.
"""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
_HALF = np.uint64(32)


@jit
def shard_of(row: int, num_shards: int) -> np.int64:
    """The row's shard, from 0 to `num_shards`, of which there are fewer than 2**32."""
    upper = (np.uint64(row >> LINE_BITS) * _MULTIPLIER) >> _HALF
    return np.int64((upper * np.uint64(num_shards)) >> _HALF)


@jit
def shards_of(rows: Int64Array, num_shards: int) -> Int64Array:
    """The shard of each row (n,): (n,)."""
    shards = np.empty(len(rows), np.int64)
    for index in range(len(rows)):
        shards[index] = shard_of(rows[index], num_shards)
    return shards


@jit
def by_shard(rows: Int64Array, num_shards: int) -> tuple[Int64Array, Int64Array]:
    """Groups rows (n,) by shard.

    Returns:
        `order` (n,): `rows[order]` stands shard by shard, in the order given within a shard; and
        how many rows each shard has: (num_shards,).
    """
    shards = shards_of(rows, num_shards)
    counts = np.zeros(num_shards, np.int64)
    for shard in shards:
        counts[shard] += 1
    nexts = np.cumsum(counts) - counts
    order = np.empty(len(rows), np.int64)
    for index in range(len(rows)):
        shard = shards[index]
        order[nexts[shard]] = index
        nexts[shard] += 1
    return order, counts


@jit
def lines_of_shard(num_rows: int, shard: int, num_shards: int) -> tuple[Int32Array, int]:
    """Which lines of neighbouring rows are a shard's; a line is `2**LINE_BITS` rows.

    Returns:
        For each line of the group's rows its number among the shard's own lines, from 0 on, or -1
        where it is another shard's: (num_lines,); and how many lines are the shard's own.
    """
    lines = np.empty(-(-num_rows >> LINE_BITS), np.int32)
    num_own = 0
    for line in range(len(lines)):
        is_own = shard_of(line << LINE_BITS, num_shards) == shard
        lines[line] = num_own if is_own else -1
        num_own += is_own
    return lines, num_own


MAX_TRAINERS = 64
"""The bits of a uint64, in which the oracle keeps which trainers use a row."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How many trainers there are, and for which of them plans are made.

    Trainers share the batches and the caches.
    """

    num_trainers: int
    ranks: tuple[int, ...]
    """The ranks for which this process plans."""
    ranks_of_host: tuple[int, ...] = ()
    """The ranks of this process's host, who share an oracle process; none: all ranks."""
    num_replica_slots: tuple[int, ...] = ()
    """For each group how many replicas one trainer can hold for one step."""
    overlap: bool = True
    """Whether what can travel behind compute does.

    False puts all that travels between trainers on the critical path, to measure what it saves.
    """

    def num_replicas(self, index: int) -> int:
        """How many replicas of the group at `index` one trainer can hold; 0 where none is used."""
        return self.num_replica_slots[index] if self.num_replica_slots else 0

    def check(self, groups: Sequence[Group]) -> None:
        """Raises ConfigError for values out of range."""
        if not 1 <= self.num_trainers <= MAX_TRAINERS:
            raise ConfigError(f"{self.num_trainers} trainers, must be from 1 to {MAX_TRAINERS}")
        if not self.ranks or not all(0 <= rank < self.num_trainers for rank in self.ranks):
            raise ConfigError(f"ranks {self.ranks}, must be some of 0 to {self.num_trainers - 1}")
        if self.num_trainers > 1 and len(self.num_replica_slots) != len(groups):
            raise ConfigError(
                f"num_replica_slots has {len(self.num_replica_slots)} entries for {len(groups)} "
                "groups"
            )


ONE_TRAINER = Topology(num_trainers=1, ranks=(0,))
