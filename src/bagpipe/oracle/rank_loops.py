"""How a step of the joint cache falls apart into those of several trainers, compiled;
`bagpipe.oracle.ranks` gives out the parts.

One call for all ranks: each returns into Python's lock, for which the threads of an oracle process
queue.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.types import BoolArray, Int32Array, Int64Array, UInt8Array, UInt64Array


class Exchanges(NamedTuple):
    """All that N trainers exchange and apply in one step of one group.

    Counts are (N, 2, N) by rank, now and owner, or (N, 2) by owner and now, where 0 is later and 1
    now; flat arrays are ordered in the way that each says.
    """

    # (R,) by rank: where a rank finds its unique rows, own slots or those of replicas
    unique_slots: Int32Array
    replica_counts: Int64Array  # (N, 2, N)
    replicas: Int32Array  # own slots to send, by owner, now and rank
    grad_counts: Int64Array  # (N, 2, N)
    grads: Int32Array  # which of a rank's unique rows, by rank, now and owner
    row_counts: Int64Array  # (N, 2)
    rows: Int32Array  # (U,) own slots to update, by owner and now
    offsets: (
        Int32Array  # (U + 2 * N,) of their contributions, by owner and now, each of these from 0 on
    )
    contribution_counts: Int64Array  # (N, 2)
    contributions: Int32Array  # (R,) by owner and now, those of a row in the order of ranks


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
"""In a row's code: its owner, one of up to `MAX_TRAINERS`, and whether its replicas and its
gradients travel now."""
_NUM_CODES = 256
_PLACE, _CONTRIBUTION, _SLOT, _CODE = range(4)
"""What is noted of a rank's row that another owns: its place, that of its contribution, the owner's
slot and the row's code."""


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
    """Of the unique rows (U,) that N ranks use together, `places` (R,) says, by rank up to `ends`
    (N,), which each uses. Returns the parts of `Exchanges`.

    `comes_urgent` and `goes_urgent` (U,) say whether a row's replicas and its gradients travel on
    the critical path."""
    num_trainers = len(ends)
    slots, codes, kinds, num_users, row_counts, contribution_counts = _describe_rows(
        joint_slots, users, comes_urgent, goes_urgent, num_trainers
    )
    rows, offsets, nexts = _lay_out_rows(slots, kinds, num_users, row_counts, contribution_counts)
    unique_slots, contributions = np.empty(len(places), np.int32), np.empty(len(places), np.int32)
    travellers, firsts = _place_own(slots, codes, nexts, places, ends, unique_slots, contributions)
    replica_counts, grad_counts = _count_travellers(travellers, firsts)
    next_replicas, next_grads = _firsts(replica_counts), _firsts(grad_counts)
    next_sent = _firsts(replica_counts.transpose(2, 1, 0).copy())  # by owner, now and rank
    replicas, grads = np.empty(len(travellers), np.int32), np.empty(len(travellers), np.int32)
    # by now and owner: behind its own sums lie those that it receives, by rank
    received = np.empty(2 * num_trainers, np.int64)
    received[:num_trainers] = received[num_trainers:] = np.diff(np.append(0, ends))
    begin = 0
    for rank in range(num_trainers):
        # By now and owner, flat. What is sent and received lies at a fixed distance from what is
        # replicated and handed in.
        to_replica, to_grad = next_replicas[rank].ravel(), next_grads[rank].ravel()
        sent_distance = next_sent[:, :, rank].T.copy().ravel() - to_replica
        received_distance = received - to_grad
        replica_distance = first_replica - next_replicas[rank, 0, 0]
        for index in range(firsts[rank], firsts[rank + 1]):
            place, contribution, slot = (
                travellers[index, _PLACE],
                travellers[index, _CONTRIBUTION],
                travellers[index, _SLOT],
            )
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
    """Moves (n,) by the rank whose slot it is: how many each rank has, and by rank the rows and the
    own slots.
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
    """How many are set, by sums of ever wider fields (Knuth, The Art of Computer Programming,
    7.1.3).
    """
    bits -= bits >> np.uint64(1) & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + (
        bits >> np.uint64(2) & np.uint64(0x3333333333333333)
    )
    bits = bits + (bits >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return bits * np.uint64(0x0101010101010101) >> np.uint64(56)


@jit
def _firsts(counts: Int64Array) -> Int64Array:
    """Where each of so many begins, of the same shape."""
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
    """Of each row (U,) the own slot; the code, for what travels; the kind, for what its owner does:
    twice the owner and whether it updates the row now; and how many users it has. Then how many
    rows there are of each kind, and contributions to them: (2 * N,).
    """
    slots, codes = np.empty(len(joint_slots), np.int32), np.empty(len(joint_slots), np.uint8)
    kinds, num_users = np.empty(len(joint_slots), np.uint8), np.empty(len(joint_slots), np.uint8)
    row_counts, contribution_counts = (
        np.zeros(2 * num_trainers, np.int64),
        np.zeros(2 * num_trainers, np.int64),
    )
    for row in range(len(joint_slots)):
        slots[row] = np.uint32(joint_slots[row]) // np.uint32(num_trainers)
        owner = np.uint32(joint_slots[row] - slots[row] * num_trainers)
        codes[row] = (
            owner
            | np.uint32(comes_urgent[row]) << _COMES_URGENT_BIT
            | np.uint32(goes_urgent[row]) << _GOES_URGENT_BIT
        )
        # A row that its owner alone uses waits for nobody.
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
    """`rows` and `offsets` of `Exchanges`, and where among all contributions those of each row (U,)
    begin.
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
        offsets[place + kind] = nexts[kind]  # one more for each kind before
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
    """Fills `unique_slots` and `contributions` (R,) as far as ranks own their rows, and notes the
    others: (T, 4), and each rank's first and the end of all (N + 1,). Without branches, which could
    not be foreseen.
    """
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
    """How many rows of each rank others own, by rank, now and owner: (N, 2, N), for replicas and
    for gradients.
    """
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
