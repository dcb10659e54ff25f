"""The Cacher's eviction queues, compiled: slots of settled rows in the order in which they may go.

**The queue of rows without a next use** is an array of slots, `queue`, with its two ends, `queue_ends`. `places` (num_slots,) says
where a slot stands in it, `NOT_QUEUED` if it doesn't; taking a slot out is forgetting its place, and an entry whose slot says
otherwise is stale and passed over. `compact` drops stale entries when the array is full.

**The due queues**, one for each step of the window, hold the settled rows that the step needs: their slots, and their indices in
the step's batch. They are chains of chunks of `CHUNK` entries, so that filling and emptying them runs through memory in order.
`chunks` (num_chunks, CHUNK, 2) holds the entries, `chains` (num_chunks,) the next chunk of a chain, and `due`
(num_queues + 1, 4) of each queue its `FIRST` and `LAST` chunk, and where in them it `BEGIN`s and `END`s; the last line's `FIRST` is
the chain of free chunks. An entry leaves from the front, when its row is evicted, or with all others when its step comes. A slot
stands in one queue at a time, and only a queue's first and last chunk are not full, so `num_slots / CHUNK` chunks and two more for
each queue suffice.

Functions take whole arrays: a call from compiled code costs a reference count of every array that it passes, so one call a slot
took five times as long.
"""

from __future__ import annotations

import numpy as np

from bagpipe._jit import jit
from bagpipe.types import Int32Array, Int64Array

NOT_QUEUED = -1
CHUNK = 128
SLOT, INDEX = 0, 1
FIRST, LAST, BEGIN, END = range(4)
_NO_CHUNK = -1


@jit
def compact(queue: Int32Array, queue_ends: Int64Array, places: Int32Array) -> None:
    """Drops the stale entries of the queue of rows without a next use."""
    end = 0
    for place in range(queue_ends[0], queue_ends[1]):
        slot = queue[place]
        if places[slot] == place:
            places[slot] = end
            queue[end] = slot
            end += 1
    queue_ends[0] = 0
    queue_ends[1] = end


@jit
def push_unknown(queue: Int32Array, queue_ends: Int64Array, places: Int32Array, slots: Int32Array) -> None:
    """Puts slots (n,) at the end of the queue, which must have room for them."""
    end = queue_ends[1]
    for slot in slots:
        queue[end] = slot
        places[slot] = end
        end += 1
    queue_ends[1] = end


@jit
def pop_unknown(queue: Int32Array, queue_ends: Int64Array, places: Int32Array, freed: Int32Array) -> int:
    """Moves slots from the front of the queue to `freed` until it is full; returns how many."""
    num_freed = 0
    place = queue_ends[0]
    while num_freed < len(freed) and place < queue_ends[1]:
        slot = queue[place]
        is_current = places[slot] == place
        places[slot] = NOT_QUEUED if is_current else places[slot]
        freed[num_freed] = slot
        num_freed += is_current
        place += 1
    queue_ends[0] = place
    return num_freed


def make_due_queues(num_slots: int, num_queues: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Empty due queues: (chunks, chains, due)."""
    num_chunks = -(-num_slots // CHUNK) + 2 * num_queues
    chains = np.arange(1, num_chunks + 1, dtype=np.int32)
    chains[-1] = _NO_CHUNK
    due = np.full((num_queues + 1, 4), _NO_CHUNK, np.int32)
    due[num_queues, FIRST] = 0
    return np.empty((num_chunks, CHUNK, 2), np.int32), chains, due


@jit
def push_due(
    chunks: Int32Array, chains: Int32Array, due: Int32Array, steps: Int32Array, indices: Int32Array, slots: Int32Array
) -> None:
    """Puts each row (n,) at the end of the queue of the step (n,) that needs it. Step s has queue s modulo their number."""
    free = len(due) - 1
    # One division for all: the steps lie within one turn of the queues.
    first = np.int64(0) if len(steps) == 0 else np.int64(steps[0]) - np.int64(steps[0]) % free
    for entry in range(len(slots)):
        queue = steps[entry] - first
        if queue >= free:
            queue -= free
        elif queue < 0:
            queue += free
        last = due[queue, LAST]
        if due[queue, FIRST] == _NO_CHUNK or due[queue, END] == CHUNK:
            chunk = due[free, FIRST]
            due[free, FIRST] = chains[chunk]
            chains[chunk] = _NO_CHUNK
            if due[queue, FIRST] == _NO_CHUNK:
                due[queue, FIRST] = chunk
                due[queue, BEGIN] = 0
            else:
                chains[last] = chunk
            due[queue, LAST] = chunk
            due[queue, END] = 0
            last = chunk
        end = np.uint32(due[queue, END])
        chunks[np.uint32(last), end, SLOT] = slots[entry]
        chunks[np.uint32(last), end, INDEX] = indices[entry]
        due[queue, END] = end + 1


@jit
def pop_due(chunks: Int32Array, chains: Int32Array, due: Int32Array, queue: int, freed: Int32Array) -> int:
    """Moves slots from the front of a due queue to `freed` until it is full; returns how many."""
    num_freed = 0
    while num_freed < len(freed) and due[queue, FIRST] != _NO_CHUNK:
        chunk = due[queue, FIRST]
        end = due[queue, END] if chunk == due[queue, LAST] else CHUNK
        count = min(end - due[queue, BEGIN], len(freed) - num_freed)
        for entry in range(count):
            freed[num_freed + entry] = chunks[chunk, due[queue, BEGIN] + entry, SLOT]
        num_freed += count
        due[queue, BEGIN] += count
        if due[queue, BEGIN] == end:
            _free_first_chunk(chains, due, queue)
    return num_freed


@jit
def take_due(chunks: Int32Array, chains: Int32Array, due: Int32Array, queue: int, slots: Int32Array) -> None:
    """Empties a due queue, its step has come: writes its slots to their indices in `slots`."""
    while due[queue, FIRST] != _NO_CHUNK:
        chunk = due[queue, FIRST]
        end = due[queue, END] if chunk == due[queue, LAST] else CHUNK
        for entry in range(due[queue, BEGIN], end):
            slots[np.uint32(chunks[chunk, entry, INDEX])] = chunks[chunk, entry, SLOT]
        _free_first_chunk(chains, due, queue)


@jit
def _free_first_chunk(chains: Int32Array, due: Int32Array, queue: int) -> None:
    free = len(due) - 1
    chunk = due[queue, FIRST]
    due[queue, FIRST] = chains[chunk]
    due[queue, BEGIN] = 0
    chains[chunk] = due[free, FIRST]
    due[free, FIRST] = chunk
