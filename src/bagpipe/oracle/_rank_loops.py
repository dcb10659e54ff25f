"""How a step of the joint cache falls apart into those of several trainers, compiled; `bagpipe.oracle.ranks` gives out the parts.

One call for all ranks: each returns into Python's lock, for which the threads of an oracle process queue.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bagpipe._jit import jit
from bagpipe.types import BoolArray, Int32Array, Int64Array, UInt64Array


class Exchanges(NamedTuple):
    """All that N trainers exchange and apply in one step of one group.

    Counts are (N, 2, N) by rank, now and owner, or (N, 2) by owner and now, where 0 is later and 1 now; flat arrays are ordered in
    the way that each says.
    """

    unique_slots: Int32Array  # (R,) by rank: where a rank finds its distinct rows, own slots or those of replicas
    replica_counts: Int64Array  # (N, 2, N)
    replicas: Int32Array  # own slots to send, by owner, now and rank
    grad_counts: Int64Array  # (N, 2, N)
    grads: Int32Array  # which of a rank's distinct rows, by rank, now and owner
    row_counts: Int64Array  # (N, 2)
    rows: Int32Array  # (U,) own slots to update, by owner and now
    offsets: Int32Array  # (U + 2 * N,) of their contributions, by owner and now, each of these from 0 on
    contribution_counts: Int64Array  # (N, 2)
    contributions: Int32Array  # (R,) by owner and now, those of a row in the order of ranks


@jit
def plan_exchanges(
    joint_slots: Int32Array,
    users: UInt64Array,
    comes_now: BoolArray,
    goes_now: BoolArray,
    places: Int32Array,
    ends: Int64Array,
    first_replica: int,
) -> Exchanges:
    """Of the distinct rows (U,) that N ranks use together, `places` (R,) says, by rank up to `ends` (N,), which each uses.

    `comes_now` and `goes_now` (U,) say whether a row's replicas and its gradients travel on the critical path.
    """
    num_trainers = len(ends)
    slots, owners = np.empty(len(joint_slots), np.int32), np.empty(len(joint_slots), np.int32)
    is_applied_now, num_users = np.empty(len(joint_slots), np.bool_), np.empty(len(joint_slots), np.int32)
    row_counts, contribution_counts = np.zeros((num_trainers, 2), np.int64), np.zeros((num_trainers, 2), np.int64)
    for row in range(len(joint_slots)):
        slots[row] = np.uint32(joint_slots[row]) // np.uint32(num_trainers)
        owner = owners[row] = joint_slots[row] - slots[row] * num_trainers
        # A row that its owner alone uses waits for nobody.
        is_applied_now[row] = goes_now[row] | (users[row] == np.uint64(1) << np.uint64(owner))
        num_users[row] = _count_bits(users[row])
        row_counts[owner, int(is_applied_now[row])] += 1
        contribution_counts[owner, int(is_applied_now[row])] += num_users[row]

    rows, offsets, nexts = _lay_out_rows(slots, owners, is_applied_now, num_users, row_counts, contribution_counts)
    replica_counts = _count_travellers(owners, comes_now, places, ends)
    grad_counts = _count_travellers(owners, goes_now, places, ends)
    next_replicas, next_grads = _firsts(replica_counts), _firsts(grad_counts)
    first_replicas = next_replicas[:, 0, 0].copy()
    next_sent = _firsts(replica_counts.transpose(2, 1, 0).copy())  # by owner, now and rank
    unique_slots, contributions = np.empty(len(places), np.int32), np.empty(len(places), np.int32)
    replicas, grads = np.empty(replica_counts.sum(), np.int32), np.empty(grad_counts.sum(), np.int32)
    # Behind an owner's own sums lie those that it receives, by rank.
    received = np.empty((num_trainers, 2), np.int64)
    for owner in range(num_trainers):
        received[owner] = ends[owner] - (ends[owner - 1] if owner > 0 else 0)
    begin = 0
    for rank in range(num_trainers):
        for place in range(begin, ends[rank]):
            row = places[place]
            owner = owners[row]
            if owner == rank:
                unique_slots[place] = slots[row]
                contribution = place - begin
            else:
                now = int(comes_now[row])
                unique_slots[place] = first_replica + next_replicas[rank, now, owner] - first_replicas[rank]
                next_replicas[rank, now, owner] += 1
                replicas[next_sent[owner, now, rank]] = slots[row]
                next_sent[owner, now, rank] += 1
                now = int(goes_now[row])
                grads[next_grads[rank, now, owner]] = place - begin
                next_grads[rank, now, owner] += 1
                contribution = received[owner, now]
                received[owner, now] += 1
            contributions[nexts[row]] = contribution
            nexts[row] += 1
        begin = ends[rank]
    return Exchanges(
        unique_slots,
        replica_counts,
        replicas,
        grad_counts,
        grads,
        row_counts,
        rows,
        offsets,
        contribution_counts,
        contributions,
    )


@jit
def sort_by_rank(rows: Int64Array, joint_slots: Int32Array, num_trainers: int) -> tuple[Int64Array, Int64Array, Int32Array]:
    """Moves (n,) by the rank whose slot it is: how many each rank has, and by rank the rows and the own slots."""
    counts = np.zeros(num_trainers, np.int64)
    for slot in joint_slots:
        counts[slot % num_trainers] += 1
    nexts = np.cumsum(counts) - counts
    sorted_rows, slots = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    for index in range(len(rows)):
        rank = joint_slots[index] % num_trainers
        sorted_rows[nexts[rank]], slots[nexts[rank]] = rows[index], joint_slots[index] // num_trainers
        nexts[rank] += 1
    return counts, sorted_rows, slots


@jit
def _count_bits(bits: np.uint64) -> int:
    count = 0
    while bits != np.uint64(0):
        bits = bits & (bits - np.uint64(1))  # clears the lowest
        count += 1
    return count


@jit
def _firsts(counts: Int64Array) -> Int64Array:
    """Where each of so many begins, of the same shape."""
    flat = counts.ravel()
    return (np.cumsum(flat) - flat).reshape(counts.shape)


@jit
def _lay_out_rows(
    slots: Int32Array,
    owners: Int32Array,
    is_applied_now: BoolArray,
    num_users: Int32Array,
    row_counts: Int64Array,
    contribution_counts: Int64Array,
) -> tuple[Int32Array, Int32Array, Int32Array]:
    """`rows` and `offsets` of `Exchanges`, and where among all contributions those of each row (U,) begin."""
    rows, offsets = np.empty(len(slots), np.int32), np.empty(len(slots) + row_counts.size, np.int32)
    begins = np.empty(len(slots), np.int32)
    next_rows, first_contributions = _firsts(row_counts), _firsts(contribution_counts)
    nexts = np.zeros_like(contribution_counts)
    for row in range(len(slots)):
        owner, now = owners[row], int(is_applied_now[row])
        place = next_rows[owner, now]
        next_rows[owner, now] += 1
        rows[place] = slots[row]
        offsets[place + 2 * owner + now] = nexts[owner, now]  # one more for each owner and moment before
        begins[row] = first_contributions[owner, now] + nexts[owner, now]
        nexts[owner, now] += num_users[row]
    for owner in range(len(row_counts)):
        for now in range(2):
            offsets[next_rows[owner, now] + 2 * owner + now] = nexts[owner, now]
    return rows, offsets, begins


@jit
def _count_travellers(owners: Int32Array, travels_now: BoolArray, places: Int32Array, ends: Int64Array) -> Int64Array:
    """How many rows of each rank others own, by rank, now and owner: (N, 2, N)."""
    counts = np.zeros((len(ends), 2, len(ends)), np.int64)
    begin = 0
    for rank in range(len(ends)):
        for place in range(begin, ends[rank]):
            row = places[place]
            counts[rank, int(travels_now[row]), owners[row]] += 1
        counts[rank, :, rank] = 0
        begin = ends[rank]
    return counts
