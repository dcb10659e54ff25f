"""Compiled loops that cut a step of the joint cache into the steps of its trainers.

`bagpipe.oracle.ranks` hands out the parts. One call serves all ranks, because each call that
returns to Python waits for the GIL, for which the threads of an oracle process queue.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.types import BoolArray, Int32Array, Int64Array, UInt8Array, UInt64Array


class Exchanges(NamedTuple):
    """All that N trainers exchange and apply in one step of one group.

    The axis of length 2 is the *moment*: 0 for what is overlapped, 1 for what is urgent. Counts are
    (N, 2, N) by rank, moment and owner, or (N, 2) by owner and moment. Flat arrays are sorted by
    what their comments name.
    """

    # (R,) by rank: where a rank finds its unique rows, in its own slots or in those of replicas
    unique_slots: Int32Array
    replica_counts: Int64Array  # (N, 2, N)
    replicas: Int32Array  # the owner's slots to send, by owner, moment and rank
    grad_counts: Int64Array  # (N, 2, N)
    grads: Int32Array  # which of a rank's unique rows, by rank, moment and owner
    row_counts: Int64Array  # (N, 2)
    rows: Int32Array  # (U,) the owner's slots to update, by owner and moment
    # (U + 2 * N,) of the rows' contributions, by owner and moment, each of these from 0 on
    offsets: Int32Array
    contribution_counts: Int64Array  # (N, 2)
    contributions: Int32Array  # (R,) by owner and moment, those of a row in the order of ranks


_Exchanges: TypeAlias = tuple[
    Int32Array,
    Int64Array,
    Int32Array,
    Int64Array,
    Int32Array,
    Int64Array,
    Int32Array,
    Int32Array,
    Int64Array,
    Int32Array,
]

_OWNER_MASK, _COMES_URGENT_BIT, _GOES_URGENT_BIT = np.uint32(63), np.uint32(6), np.uint32(7)
"""Parts of a row's code: its owner, and whether its replicas and its gradients are urgent.

An owner is one of up to `MAX_TRAINERS`, hence six bits.
"""
_NUM_CODES = 256
_PLACE, _CONTRIBUTION, _SLOT, _CODE = range(4)
"""What is noted of a rank's row that another rank owns, here called a traveller.

That is its place among the ranks' rows, the place of its contribution, the owner's slot, and its
code.
"""


@jit
def plan_exchanges(
    joint_slots: Int32Array,
    users: UInt64Array,
    comes_urgent: BoolArray,
    goes_urgent: BoolArray,
    places: Int32Array,
    ends: Int64Array,
    first_replica: int,
) -> _Exchanges:
    """Plans what N ranks, which together use the unique rows (U,) of a batch, send each other.

    Args:
        joint_slots: (U,) each row's slot in the joint cache.
        users: (U,) the set of ranks that use each row.
        comes_urgent: (U,) whether a row's replicas are urgent.
        goes_urgent: (U,) whether a row's gradients are urgent.
        places: (R,) which of the rows each rank uses, rank by rank.
        ends: (N,) where in `places` each rank's part ends.
        first_replica: The slot of a rank's first replica.

    Returns:
        The parts of `Exchanges`, as a plain tuple: numba must hand Python no named one.
    """
    num_trainers = len(ends)
    slots, codes, kinds, num_users, row_counts, contribution_counts = _describe_rows(
        joint_slots, users, comes_urgent, goes_urgent, num_trainers
    )
    rows, offsets, nexts = _lay_out_rows(slots, kinds, num_users, row_counts, contribution_counts)
    unique_slots, contributions = np.empty(len(places), np.int32), np.empty(len(places), np.int32)
    travellers, firsts = _place_own(slots, codes, nexts, places, ends, unique_slots, contributions)
    replica_counts, grad_counts = _count_travellers(travellers, firsts)
    next_replicas, next_grads = _firsts(replica_counts), _firsts(grad_counts)
    # by owner, moment and rank
    next_sent = _firsts(replica_counts.transpose(2, 1, 0).copy())
    replicas, grads = np.empty(len(travellers), np.int32), np.empty(len(travellers), np.int32)
    # by moment and owner: behind an owner's own sums lie those that it receives, by rank
    received = np.empty(2 * num_trainers, np.int64)
    received[:num_trainers] = received[num_trainers:] = np.diff(np.append(0, ends))
    begin = 0
    for rank in range(num_trainers):
        # Flat, by moment and owner. A row's place among what the owner sends lies at a fixed
        # distance from its place among this rank's replicas, and likewise for gradients, so one
        # cursor serves both sides.
        to_replica, to_grad = next_replicas[rank].ravel(), next_grads[rank].ravel()
        sent_distance = next_sent[:, :, rank].T.copy().ravel() - to_replica
        received_distance = received - to_grad
        replica_distance = first_replica - next_replicas[rank, 0, 0]
        for index in range(firsts[rank], firsts[rank + 1]):
            place = travellers[index, _PLACE]
            contribution = travellers[index, _CONTRIBUTION]
            slot = travellers[index, _SLOT]
            code = np.uint32(travellers[index, _CODE])
            comes = (code & _OWNER_MASK) + (code >> _COMES_URGENT_BIT & np.uint32(1)) * np.uint32(
                num_trainers
            )
            goes = (code & _OWNER_MASK) + (code >> _GOES_URGENT_BIT) * np.uint32(num_trainers)
            replica, grad = to_replica[comes], to_grad[goes]
            unique_slots[place] = replica + replica_distance
            replicas[replica + sent_distance[comes]] = slot
            grads[grad] = place - begin
            contributions[contribution] = grad + received_distance[goes]
            to_replica[comes], to_grad[goes] = replica + 1, grad + 1
        received += grad_counts[rank].ravel()
        begin = ends[rank]
    return (
        unique_slots,
        replica_counts,
        replicas,
        grad_counts,
        grads,
        row_counts.reshape(num_trainers, 2),
        rows,
        offsets,
        contribution_counts.reshape(num_trainers, 2),
        contributions,
    )


@jit
def sort_by_rank(
    rows: Int64Array, joint_slots: Int32Array, num_trainers: int
) -> tuple[Int64Array, Int64Array, Int32Array]:
    """Sorts rows (n,) that are fetched or evicted by the rank that has their slot.

    Returns:
        How many rows each rank has (N,); by rank the rows (n,) and their slots in that rank's own
        cache (n,).
    """
    counts = np.zeros(num_trainers, np.int64)
    for slot in joint_slots:
        counts[slot % num_trainers] += 1
    nexts = np.cumsum(counts) - counts
    sorted_rows, slots = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    for index in range(len(rows)):
        rank = joint_slots[index] % num_trainers
        sorted_rows[nexts[rank]], slots[nexts[rank]] = (
            rows[index],
            joint_slots[index] // num_trainers,
        )
        nexts[rank] += 1
    return counts, sorted_rows, slots


@jit
def count_bits(bits: np.uint64) -> np.uint64:
    """Counts the bits that are set, by sums of ever wider fields.

    Source: Knuth, The Art of Computer Programming, 7.1.3.
    """
    bits -= bits >> np.uint64(1) & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + (
        bits >> np.uint64(2) & np.uint64(0x3333333333333333)
    )
    bits = bits + (bits >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return bits * np.uint64(0x0101010101010101) >> np.uint64(56)


@jit
def _firsts(counts: Int64Array) -> Int64Array:
    """Returns where each part begins, given how long the parts are, in the same shape."""
    flat = counts.ravel()
    return (np.cumsum(flat) - flat).reshape(counts.shape)


@jit
def _describe_rows(
    joint_slots: Int32Array,
    users: UInt64Array,
    comes_urgent: BoolArray,
    goes_urgent: BoolArray,
    num_trainers: int,
) -> tuple[Int32Array, UInt8Array, UInt8Array, UInt8Array, Int64Array, Int64Array]:
    """Describes each row in small numbers, which later loops read at random places.

    Returns:
        For each row (U,) its slot in the owner's cache; its code; its kind, which is twice the
        owner, and one more where the owner's update of it is urgent; and its number of users. For
        each kind (2 * N,) the number of rows, and of contributions to them.
    """
    slots, codes = np.empty(len(joint_slots), np.int32), np.empty(len(joint_slots), np.uint8)
    kinds, num_users = np.empty(len(joint_slots), np.uint8), np.empty(len(joint_slots), np.uint8)
    row_counts = np.zeros(2 * num_trainers, np.int64)
    contribution_counts = np.zeros(2 * num_trainers, np.int64)
    for row in range(len(joint_slots)):
        slots[row] = np.uint32(joint_slots[row]) // np.uint32(num_trainers)
        owner = np.uint32(joint_slots[row] - slots[row] * num_trainers)
        codes[row] = (
            owner
            | np.uint32(comes_urgent[row]) << _COMES_URGENT_BIT
            | np.uint32(goes_urgent[row]) << _GOES_URGENT_BIT
        )
        # A row that only its owner uses waits for nobody, so it can be updated at once.
        is_updated_urgent = goes_urgent[row] | (users[row] == np.uint64(1) << np.uint64(owner))
        kind = 2 * owner + np.uint32(is_updated_urgent)
        kinds[row] = kind
        num_users[row] = count_bits(users[row])
        row_counts[kind] += 1
        contribution_counts[kind] += num_users[row]
    return slots, codes, kinds, num_users, row_counts, contribution_counts


@jit
def _lay_out_rows(
    slots: Int32Array,
    kinds: UInt8Array,
    num_users: UInt8Array,
    row_counts: Int64Array,
    contribution_counts: Int64Array,
) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Lays out the owners' updates.

    Returns:
        `rows` and `offsets` of `Exchanges`, and where among all contributions those of each row
        begin (U,).
    """
    rows, offsets = np.empty(len(slots), np.int32), np.empty(len(slots) + len(row_counts), np.int32)
    begins = np.empty(len(slots), np.int32)
    next_rows, first_contributions = _firsts(row_counts), _firsts(contribution_counts)
    nexts = np.zeros_like(contribution_counts)
    for row in range(len(slots)):
        kind = kinds[row]
        place = np.uint64(next_rows[kind])
        next_rows[kind] += 1
        rows[place] = slots[row]
        # Each kind has one offset more than rows: its end.
        offsets[place + kind] = nexts[kind]
        begins[row] = first_contributions[kind] + nexts[kind]
        nexts[kind] += num_users[row]
    for kind in range(len(row_counts)):
        offsets[next_rows[kind] + kind] = nexts[kind]
    return rows, offsets, begins


@jit
def _place_own(
    slots: Int32Array,
    codes: UInt8Array,
    nexts: Int32Array,
    places: Int32Array,
    ends: Int64Array,
    unique_slots: Int32Array,
    contributions: Int32Array,
) -> tuple[Int32Array, Int64Array]:
    """Fills `unique_slots` and `contributions` (R,) for rows that ranks own; notes the travellers.

    Returns:
        The travellers (T, 4), rank by rank, and where each rank's begin, with the end of all
        (N + 1,).
    """
    # Every row is written as if its rank owned it and as if it travelled, and what is wrong is
    # overwritten: the CPU could not predict a branch.
    travellers, num_travellers = np.empty((len(places) + 1, 4), np.int32), 0
    firsts = np.zeros(len(ends) + 1, np.int64)
    begin = 0
    for rank in range(len(ends)):
        for place in range(begin, ends[rank]):
            row = np.uint32(places[place])
            contribution = nexts[row]
            nexts[row] = contribution + 1
            unique_slots[place] = slots[row]
            contributions[np.uint32(contribution)] = place - begin
            travellers[num_travellers, _PLACE] = place
            travellers[num_travellers, _CONTRIBUTION] = contribution
            travellers[num_travellers, _SLOT] = slots[row]
            travellers[num_travellers, _CODE] = codes[row]
            num_travellers += (codes[row] & _OWNER_MASK) != rank
        begin, firsts[rank + 1] = ends[rank], num_travellers
    return travellers[:num_travellers], firsts


@jit
def _count_travellers(travellers: Int32Array, firsts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Counts the replicas and the gradients of travellers, (N, 2, N) each."""
    num_trainers = len(firsts) - 1
    replica_counts = np.zeros((num_trainers, 2, num_trainers), np.int64)
    grad_counts = np.zeros((num_trainers, 2, num_trainers), np.int64)
    for rank in range(num_trainers):
        counts = np.zeros(_NUM_CODES, np.int64)
        for code in travellers[firsts[rank] : firsts[rank + 1], _CODE]:
            counts[np.uint32(code)] += 1
        for code in range(_NUM_CODES):
            owner = code & _OWNER_MASK
            if owner < num_trainers:
                replica_counts[rank, code >> _COMES_URGENT_BIT & 1, owner] += counts[code]
                grad_counts[rank, code >> _GOES_URGENT_BIT, owner] += counts[code]
    return replica_counts, grad_counts
