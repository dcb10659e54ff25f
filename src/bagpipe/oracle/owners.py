"""Which trainer owns a row, from the time that it is fetched to the time that it is evicted.

A slot of the joint cache belongs to the rank that its number says (see
`bagpipe.oracle.eviction.cacher.CachePlan`). So ranks own equally many rows once the cache is full,
and rows are evicted as from one cache, by Belady's rule. What is left to choose is which missing
row gets which of the freed slots. A row that only one rank uses goes to that rank where it can, and
does not travel as long as nobody else uses it. A row of several users goes to the one of them with
most slots left.
"""

from __future__ import annotations

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.oracle.rank_loops import count_bits
from bagpipe.types import Int32Array, Int64Array, UInt64Array


@jit
def choose_owners(
    missing: Int32Array, users: UInt64Array, freed: Int32Array, num_trainers: int
) -> Int32Array:
    """Orders the missing rows so that the i-th of them gets the i-th freed slot.

    Args:
        missing: (n,) indices of the missing rows among the batch's.
        users: (U,) for each row of the batch the set of ranks that use it.
        freed: (n,) slots of the joint cache.
        num_trainers: How many ranks there are.

    Returns:
        `missing` in another order.
    """
    left, ends, positions = _by_rank(freed, num_trainers)
    chosen = np.empty(len(missing), np.int32)
    rest, num_rest = np.empty(len(missing), np.int32), 0
    # Rows of one rank choose first: with another owner they would travel without need.
    for index in missing:
        rank = _only_user(users[index])
        if rank >= 0 and left[rank] > 0:
            chosen[positions[ends[rank] - left[rank]]] = index
            left[rank] -= 1
        else:
            rest[num_rest] = index
            num_rest += 1
    num_left_over = 0
    for index in rest[:num_rest]:
        best = _best_user(users[index], left)
        if best < 0:
            rest[num_left_over] = index
            num_left_over += 1
        else:
            chosen[positions[ends[best] - left[best]]] = index
            left[best] -= 1
    for index in rest[:num_left_over]:
        best = 0
        for other in range(len(left)):
            if left[other] > left[best]:
                best = other
        chosen[positions[ends[best] - left[best]]] = index
        left[best] -= 1
    return chosen


@jit
def _by_rank(slots: Int32Array, num_trainers: int) -> tuple[Int64Array, Int64Array, Int32Array]:
    """Sorts the positions of slots (n,) by the rank that has them.

    Returns:
        How many each rank has (N,), where its own end (N,), and the positions (n,).
    """
    counts = np.zeros(num_trainers, np.int64)
    for slot in slots:
        counts[slot % num_trainers] += 1
    nexts, ends = np.zeros(num_trainers, np.int64), np.empty(num_trainers, np.int64)
    for before in range(num_trainers):
        ends[before] = nexts[before] + counts[before]
        if before + 1 < num_trainers:
            nexts[before + 1] = ends[before]
    positions = np.empty(len(slots), np.int32)
    for position in range(len(slots)):
        rank = slots[position] % num_trainers
        positions[nexts[rank]] = position
        nexts[rank] += 1
    return counts, ends, positions


@jit
def _only_user(users: np.uint64) -> np.int64:
    """Returns the rank in a set of one rank, -1 for a larger set; no set is empty."""
    lowest = users & (~users + np.uint64(1))
    return np.int64(count_bits(lowest - np.uint64(1))) if users == lowest else np.int64(-1)


@jit
def _best_user(users: np.uint64, left: Int64Array) -> int:
    """Returns the one of a row's users that has most slots left, -1 if none has any."""
    best = -1
    for rank in range(len(left)):
        if (
            (users >> np.uint64(rank)) & np.uint64(1)
            and left[rank] > 0
            and (best < 0 or left[rank] > left[best])
        ):
            best = rank
    return best
