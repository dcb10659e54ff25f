"""The Triton kernels of `entering_triton` that find a batch's unique rows, in its order.

A lookup, or 32 of them, has a thread. A *place* among the lookups is one as sorted by row.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import device_function, element_kernel
from bagpipe.device_oracle.sums_triton import put_count, sum_before


@element_kernel
def rows(
    ids: tl.tensor,
    sizes: tl.tensor,
    bag_offsets: tl.tensor,
    first_rows: tl.tensor,
    table_sizes: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    bad: tl.tensor,
    size: tl.tensor,
    num_features: tl.tensor,
    num_rows: tl.tensor,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    lookup = tl.program_id(0) * TILE + tl.arange(0, TILE)
    num_lookups = tl.load(sizes).to(tl.int32)
    batch_size = tl.maximum(tl.load(sizes + 1).to(tl.int32), 1)
    is_lookup = (lookup < size) & (lookup < num_lookups)
    bag = tl.where(is_lookup, lookup, 0)
    if outputs is not None:
        # the last bag that begins at the lookup or before it
        low = tl.zeros((TILE,), tl.int32)
        high = low + tl.load(sizes + 1).to(tl.int32) * num_features  # 0 without samples
        for _ in tl.static_range(STEPS):
            middle = (low + high + 1) // 2
            begins = tl.load(bag_offsets + middle) <= bag
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle - 1)
        bag = low
        tl.store(outputs + lookup, output_of(bag, batch_size, num_features), mask=is_lookup)
    feature = tl.minimum(bag // batch_size, num_features - 1)
    given = tl.load(ids + lookup, mask=is_lookup, other=0).to(tl.int64)
    is_bad = is_lookup & ((given < 0) | (given >= tl.load(table_sizes + feature)))
    row = tl.where(is_lookup & (is_bad == 0), given + tl.load(first_rows + feature), num_rows)
    tl.store(rows + lookup, row.to(rows.dtype.element_ty), mask=lookup < size)
    # The first bad one is the farthest from the end.
    farthest = tl.max(tl.where(is_bad, size - lookup, 0), axis=0)
    tl.atomic_max(bad, farthest, mask=farthest > 0, sem="relaxed")


@device_function
def output_of(bag: tl.tensor, batch_size: tl.tensor, num_features: tl.tensor) -> tl.tensor:
    """The output row of a bag, which are feature by feature."""
    feature = tl.minimum(bag // batch_size, num_features - 1)
    return (bag - feature * batch_size) * num_features + feature


@device_function
def is_first_of_row(
    sorted_rows: tl.tensor, place: tl.tensor, row: tl.tensor, inside: tl.tensor, num_rows: tl.tensor
) -> tl.tensor:
    """Whether a place inside, which has that row, is the first one of it."""
    before = tl.load(sorted_rows + place - 1, mask=inside & (place > 0), other=-1).to(tl.int64)
    return inside & (row < num_rows) & (row != before)


@device_function
def mark_of(
    row: tl.tensor,
    lookup: tl.tensor,
    size: tl.tensor,
    LINE_BITS: tl.constexpr,
    SHARD_BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> tl.tensor:
    """The bit at (shard, lookup), the shard as of `bagpipe.topology.shard_of`; rows are int64."""
    hashed = (row >> LINE_BITS) * MULTIPLIER
    return ((hashed >> (64 - SHARD_BITS)) & ((1 << SHARD_BITS) - 1)) * size + lookup


@device_function
def num_bits(bits: tl.tensor) -> tl.tensor:
    """How many bits of an int32 are 1."""
    low, high = bits & 0xFFFF, (bits >> 16) & 0xFFFF
    low, high = low - ((low >> 1) & 0x5555), high - ((high >> 1) & 0x5555)
    low, high = (low & 0x3333) + ((low >> 2) & 0x3333), (high & 0x3333) + ((high >> 2) & 0x3333)
    both = low + high  # at most 8 of each 4 bits
    both = (both & 0x0F0F) + ((both >> 4) & 0x0F0F)
    return (both & 0xFF) + (both >> 8)


@element_kernel
def firsts(
    sorted_rows: tl.tensor,
    order: tl.tensor,
    marks: tl.tensor,
    runs: tl.tensor,
    run_tiles: tl.tensor,
    run_groups: tl.tensor,
    size: tl.tensor,
    num_rows: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    LINE_BITS: tl.constexpr,
    SHARD_BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < size
    row = tl.load(sorted_rows + place, mask=inside, other=0).to(tl.int64)
    first = is_first_of_row(sorted_rows, place, row, inside, num_rows)
    lookup = tl.load(order + place, mask=first, other=0)
    mark = mark_of(row, lookup, size, LINE_BITS, SHARD_BITS, MULTIPLIER)
    bit = tl.full((TILE,), 1, tl.int32) << (mark & 31).to(tl.int32)
    tl.atomic_or(marks + (mark >> 5), bit, mask=first, sem="relaxed")
    is_first = first.to(tl.int32)
    tl.store(runs + place, tl.cumsum(is_first, axis=0), mask=inside)
    put_count(run_tiles, run_groups, num_tiles, tl.sum(is_first, axis=0), 0, GROUP)


@element_kernel
def words(
    marks: tl.tensor, before: tl.tensor, tiles: tl.tensor, num_words: tl.tensor, TILE: tl.constexpr
) -> None:
    """Writes how many marks there are in the words before each one of its tile, and in tiles."""
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    count = num_bits(tl.load(marks + word, mask=word < num_words, other=0))
    tl.store(before + word, tl.cumsum(count, axis=0) - count, mask=word < num_words)
    tl.store(tiles + tl.program_id(0), tl.sum(count, axis=0))


@element_kernel
def admit(
    tiles: tl.tensor,
    bad: tl.tensor,
    alert: tl.tensor,
    entered: tl.tensor,
    admitted: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    RING: tl.constexpr,
    BAD_ID: tl.constexpr,
    NO_ROOM: tl.constexpr,
    TOO_MANY_ROWS: tl.constexpr,
) -> None:
    """Writes whether the batch enters, how many unique rows of it do, and its ring position.

    Tiles of words get the number of marks before them in place of their own.
    """
    counted = tl.zeros((), tl.int32)
    for start in range(0, num_tiles, TILE):
        tile = start + tl.arange(0, TILE)
        count = tl.load(tiles + tile, mask=tile < num_tiles, other=0)
        tl.store(tiles + tile, counted + tl.cumsum(count, axis=0) - count, mask=tile < num_tiles)
        counted += tl.sum(count, axis=0)
    number, farthest, step = counted.to(tl.int64), tl.load(bad), tl.load(entered)
    reason = tl.where(number > room, NO_ROOM, 0)
    reason = tl.where(number > NUM_SLOTS, TOO_MANY_ROWS, reason)
    reason = tl.where(farthest > 0, BAD_ID, reason)
    before = tl.load(alert)
    is_new = (before == 0) & (reason != 0)
    tl.store(alert, reason.to(tl.int64), mask=is_new)
    tl.store(alert + 1, step, mask=is_new)
    tl.store(alert + 2, tl.where(farthest > 0, size - farthest, number), mask=is_new)
    is_running = (before == 0) & (reason == 0)
    tl.store(admitted, is_running.to(tl.int64))
    tl.store(admitted + 1, tl.where(is_running, number, 0))
    tl.store(admitted + 2, step % RING)


@element_kernel
def runs(
    sorted_rows: tl.tensor,
    order: tl.tensor,
    marks: tl.tensor,
    before: tl.tensor,
    tiles: tl.tensor,
    runs: tl.tensor,
    run_tiles: tl.tensor,
    run_groups: tl.tensor,
    admitted: tl.tensor,
    starts: tl.tensor,
    unique_of_run: tl.tensor,
    unique_rows: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    num_rows: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    LINE_BITS: tl.constexpr,
    SHARD_BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # Of a batch that is not admitted nothing fits, so nothing is written.
    inside = place < size * tl.load(admitted).to(tl.int32)
    row = tl.load(sorted_rows + place, mask=inside, other=0).to(tl.int64)
    first = is_first_of_row(sorted_rows, place, row, inside, num_rows)
    run = tl.load(runs + place, mask=inside, other=0) - 1
    run += sum_before(run_tiles, run_groups, num_tiles, tl.program_id(0), 0, GROUP)
    tl.store(runs + place, run, mask=inside)
    # Which unique row it is: as many as there are marks before that of its first lookup.
    lookup = tl.load(order + place, mask=first, other=0)
    mark = mark_of(row, lookup, size, LINE_BITS, SHARD_BITS, MULTIPLIER)
    word = mark >> 5
    lower = ~(tl.full((TILE,), -1, tl.int32) << (mark & 31).to(tl.int32))
    unique = num_bits(tl.load(marks + word, mask=first, other=0) & lower)
    unique += tl.load(before + word, mask=first, other=0)
    unique += tl.load(tiles + word // TILE, mask=first, other=0)
    tl.store(starts + run, place, mask=first)
    tl.store(unique_of_run + run, unique, mask=first)
    kept = unique_rows + tl.load(admitted + 2) * room + unique
    tl.store(kept, row.to(unique_rows.dtype.element_ty), mask=first)


@element_kernel
def counts(
    starts: tl.tensor,
    unique_of_run: tl.tensor,
    admitted: tl.tensor,
    sizes: tl.tensor,
    counts: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Writes how many lookups each unique row has."""
    run = tl.program_id(0) * TILE + tl.arange(0, TILE)
    number = tl.load(admitted + 1)
    # The last run ends behind the last lookup.
    end = tl.load(starts + run + 1, mask=run + 1 < number, other=tl.load(sizes).to(tl.int32))
    count = end - tl.load(starts + run, mask=run < number, other=0)
    unique = tl.load(unique_of_run + run, mask=run < number, other=0)
    tl.store(counts + unique, count, mask=run < number)
