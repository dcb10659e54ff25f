"""The Cacher's eviction queues, compiled: slots of settled rows in the order in which they may go.

Each shard of a cache (`bagpipe.oracle.shards`) has its own queues, and the compiled functions are
given those of one shard. They take many slots in one call, because each call from compiled code
counts references to every array that it passes. A call for each slot took five times as long.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.native.prefetch import prefetch
from bagpipe.types import Int32Array, Int64Array

NOT_QUEUED = -1
"""The place of a slot that stands in no `UnknownQueue`."""
_AHEAD = 16
"""How many entries ahead of its use a slot's place is prefetched."""
CHUNK = 64
"""Entries in a chunk of `DueQueues`."""
SLOT, INDEX = 0, 1
"""What an entry of a chunk holds: a slot, and the index of its row in the batch that needs it."""
FIRST, LAST, BEGIN, END = range(4)
"""What is kept of a queue: its first and last chunk, where it begins in the one and ends in the
other."""
_NO_CHUNK = -1


class UnknownQueue(NamedTuple):
    """Slots of rows without a known next use, the longest unused first.

    `places` says where each slot stands in the ring. To take a slot out of the queue is to forget
    its place. An entry that is not at its slot's place is stale, and is passed over. Stale entries
    are dropped when the ring is full.
    """

    slots: Int32Array  # (a power of two, at least twice the shard's slots,) a ring
    ends: Int64Array  # (2,) where the queue begins and ends; the low bits are places in the ring
    places: Int32Array  # (num_slots, 1) of all shards


class DueQueues(NamedTuple):
    """For each step of the window a queue of the settled rows that it needs.

    An entry is a row's slot and the row's index in the step's batch. Queues are chains of chunks,
    so that filling and emptying them runs through memory in order. An entry leaves from the front,
    when its row is evicted, or with all others when its step comes. A slot stands in one queue at a
    time, and only the first and the last chunk of a queue may be partly filled. So the chunks that
    the shard's slots fill, and two more for each queue, always suffice.
    """

    chunks: Int32Array  # (num_chunks, CHUNK, 2) entries: SLOT, INDEX
    chains: Int32Array  # (num_chunks,) the next chunk of a chain
    queues: Int32Array  # (num_queues + 1, 4) FIRST, LAST, BEGIN, END; the last is the free chunks


def make_unknown_queues(num_shards: int, shard_slots: int, num_slots: int) -> UnknownQueue:
    """Makes empty queues for shards of up to `shard_slots` slots.

    Each array but `places` has a first axis of shards.
    """
    size = 1 << (2 * shard_slots - 1).bit_length()
    return UnknownQueue(
        np.empty((num_shards, size), np.int32),
        np.zeros((num_shards, 2), np.int64),
        np.full((num_slots, 1), NOT_QUEUED, np.int32),
    )


def make_due_queues(num_shards: int, shard_slots: int, num_queues: int) -> DueQueues:
    """Makes empty queues for shards of up to `shard_slots` slots; the first axis is of shards."""
    num_chunks = -(-shard_slots // CHUNK) + 2 * num_queues
    chains = np.arange(1, num_chunks + 1, dtype=np.int32)
    chains[-1] = _NO_CHUNK
    queues = np.full((num_shards, num_queues + 1, 4), _NO_CHUNK, np.int32)
    queues[:, num_queues, FIRST] = 0
    return DueQueues(
        np.empty((num_shards, num_chunks, CHUNK, 2), np.int32),
        np.tile(chains, (num_shards, 1)),
        queues,
    )


@jit
def push_unknown(unknown: UnknownQueue, slots: Int32Array) -> None:
    """Puts slots (n,) at the end of the queue."""
    queue, ends, places = unknown.slots, unknown.ends, unknown.places
    if ends[1] - ends[0] + len(slots) > len(queue):
        _compact(queue, ends, places)
    mask, first = len(queue) - 1, ends[1]
    for index in range(len(slots)):
        prefetch(places, slots[min(index + _AHEAD, len(slots) - 1)], 0)
        place = (first + index) & mask
        queue[place] = slots[index]
        places[np.uint32(slots[index]), 0] = place
    ends[1] = first + len(slots)


@jit
def _compact(queue: Int32Array, ends: Int64Array, places: Int32Array) -> None:
    """Drops the stale entries of an `UnknownQueue`."""
    mask, end = len(queue) - 1, ends[0]
    for entry in range(ends[0], ends[1]):
        slot = queue[entry & mask]
        if places[slot, 0] == entry & mask:
            places[slot, 0] = end & mask
            queue[end & mask] = slot
            end += 1
    ends[1] = end


@jit
def forget_unknown(places: Int32Array, slots: Int32Array) -> None:
    """Takes slots (n,) out of an `UnknownQueue`; some of them may not stand in it."""
    for index in range(len(slots)):
        prefetch(places, slots[min(index + _AHEAD, len(slots) - 1)], 0)
        places[np.uint32(slots[index]), 0] = NOT_QUEUED


@jit
def pop_unknown(unknown: UnknownQueue, freed: Int32Array) -> int:
    """Moves slots from the front of the queue into `freed` until that is full; returns how many."""
    queue, ends, places = unknown.slots, unknown.ends, unknown.places
    mask, num_freed, entry = len(queue) - 1, 0, ends[0]
    while num_freed < len(freed) and entry < ends[1]:
        # Of no more entries than slots are still wanted, all that are not stale can be taken.
        last = min(entry + len(freed) - num_freed, ends[1])
        while entry < last:
            prefetch(places, queue[min(entry + _AHEAD, last - 1) & mask], 0)
            slot = queue[entry & mask]
            is_current = places[np.uint32(slot), 0] == entry & mask
            if is_current:
                places[np.uint32(slot), 0] = NOT_QUEUED
            # Always written, but kept only if current: a branch here could not be predicted.
            freed[num_freed] = slot
            num_freed += is_current
            entry += 1
    ends[0] = entry
    return num_freed


@jit
def push_due(due: DueQueues, steps: Int32Array, indices: Int32Array, slots: Int32Array) -> None:
    """Puts each slot (n,) at the end of the queue of the step (n,) that needs its row.

    Step s has queue s modulo the number of queues.
    """
    chunks, chains, queues = due.chunks, due.chains, due.queues
    free = len(queues) - 1
    # One division serves all, because the steps lie within one turn of the queues.
    first = np.int64(0) if len(steps) == 0 else np.int64(steps[0]) - np.int64(steps[0]) % free
    for entry in range(len(slots)):
        queue = steps[entry] - first
        if queue >= free:
            queue -= free
        elif queue < 0:
            queue += free
        last = queues[queue, LAST]
        if queues[queue, FIRST] == _NO_CHUNK or queues[queue, END] == CHUNK:
            chunk = queues[free, FIRST]
            queues[free, FIRST] = chains[chunk]
            chains[chunk] = _NO_CHUNK
            if queues[queue, FIRST] == _NO_CHUNK:
                queues[queue, FIRST] = chunk
                queues[queue, BEGIN] = 0
            else:
                chains[last] = chunk
            queues[queue, LAST] = chunk
            queues[queue, END] = 0
            last = chunk
        end = np.uint32(queues[queue, END])
        chunks[np.uint32(last), end, SLOT] = slots[entry]
        chunks[np.uint32(last), end, INDEX] = indices[entry]
        queues[queue, END] = end + 1


@jit
def pop_due(due: DueQueues, step: int, freed: Int32Array) -> int:
    """Moves slots from a step's queue into `freed` until that is full; returns how many."""
    chunks, chains, queues = due.chunks, due.chains, due.queues
    queue = step % (len(queues) - 1)
    num_freed = 0
    while num_freed < len(freed) and queues[queue, FIRST] != _NO_CHUNK:
        chunk = queues[queue, FIRST]
        end = queues[queue, END] if chunk == queues[queue, LAST] else CHUNK
        count = min(end - queues[queue, BEGIN], len(freed) - num_freed)
        for entry in range(count):
            freed[num_freed + entry] = chunks[chunk, queues[queue, BEGIN] + entry, SLOT]
        num_freed += count
        queues[queue, BEGIN] += count
        if queues[queue, BEGIN] == end:
            _free_first_chunk(chains, queues, queue)
    return num_freed


@jit
def take_due(due: DueQueues, step: int, slots: Int32Array) -> None:
    """Empties a step's queue: writes each slot to its row's index in `slots`."""
    chunks, chains, queues = due.chunks, due.chains, due.queues
    queue, free = step % (len(queues) - 1), len(queues) - 1
    first, last = queues[queue, FIRST], queues[queue, LAST]
    begin, chunk = queues[queue, BEGIN], first
    while chunk != _NO_CHUNK:
        entries = chunks[chunk]
        for entry in range(begin, queues[queue, END] if chunk == last else CHUNK):
            slots[np.uint32(entries[entry, INDEX])] = entries[entry, SLOT]
        begin, chunk = 0, chains[chunk]
    if first != _NO_CHUNK:
        # The whole chain goes before the other free chunks.
        chains[last], queues[free, FIRST] = queues[free, FIRST], first
        queues[queue, FIRST], queues[queue, BEGIN] = _NO_CHUNK, 0


@jit
def _free_first_chunk(chains: Int32Array, queues: Int32Array, queue: int) -> None:
    """Moves a queue's first chunk to the free ones."""
    free = len(queues) - 1
    chunk = queues[queue, FIRST]
    queues[queue, FIRST] = chains[chunk]
    queues[queue, BEGIN] = 0
    chains[chunk] = queues[free, FIRST]
    queues[free, FIRST] = chunk
