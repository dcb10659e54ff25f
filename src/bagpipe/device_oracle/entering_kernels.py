"""The Triton kernels of `entering_triton`, which says what they are for and calls them in order.

A lookup, a unique row or a bag has a thread. A *place* among the lookups is one as sorted by row.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import Kernel, device_function


@Kernel
def rows(
    ids: tl.tensor,
    sizes: tl.tensor,
    bag_offsets: tl.tensor,
    first_rows: tl.tensor,
    table_sizes: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    first_bad: tl.tensor,
    size: tl.tensor,
    num_features: tl.tensor,
    num_rows: tl.tensor,
    TILE: tl.constexpr,
    IS_JAGGED: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    lookup = tl.program_id(0) * TILE + tl.arange(0, TILE)
    num_lookups = tl.load(sizes).to(tl.int32)
    batch_size = tl.maximum(tl.load(sizes + 1).to(tl.int32), 1)
    is_lookup = (lookup < size) & (lookup < num_lookups)
    bag = tl.where(is_lookup, lookup, 0)
    if IS_JAGGED:
        # the last bag that begins at the lookup or before it
        low = tl.zeros((TILE,), tl.int32)
        high = low + batch_size * num_features
        for _ in tl.static_range(STEPS):
            middle = (low + high + 1) // 2
            begins = tl.load(bag_offsets + middle) <= bag
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle - 1)
        bag = low
    feature = tl.minimum(bag // batch_size, num_features - 1)
    tl.store(
        outputs + lookup,
        (bag - feature * batch_size) * num_features + feature,
        mask=lookup < size,
    )
    given = tl.load(ids + lookup, mask=is_lookup, other=0).to(tl.int64)
    is_bad = is_lookup & ((given < 0) | (given >= tl.load(table_sizes + feature)))
    row = tl.where(is_lookup & (is_bad == 0), given + tl.load(first_rows + feature), num_rows)
    tl.store(rows + lookup, row.to(rows.dtype.element_ty), mask=lookup < size)
    bad = tl.min(tl.where(is_bad, lookup, size), axis=0)
    tl.atomic_min(first_bad, bad.to(tl.int64), mask=bad < size)


@device_function
def shard_of(
    row: tl.tensor, LINE_BITS: tl.constexpr, SHARD_BITS: tl.constexpr, MULTIPLIER: tl.constexpr
) -> tl.tensor:
    """That of `bagpipe.topology.shard_of`, of int64 rows."""
    return (((row >> LINE_BITS) * MULTIPLIER) >> (64 - SHARD_BITS)) & ((1 << SHARD_BITS) - 1)


@Kernel
def firsts(
    sorted_rows: tl.tensor,
    order: tl.tensor,
    marks: tl.tensor,
    is_first: tl.tensor,
    size: tl.tensor,
    num_rows: tl.tensor,
    TILE: tl.constexpr,
    LINE_BITS: tl.constexpr,
    SHARD_BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < size
    row = tl.load(sorted_rows + place, mask=inside, other=0).to(tl.int64)
    before = tl.load(sorted_rows + place - 1, mask=inside & (place > 0), other=-1).to(tl.int64)
    first = inside & (row < num_rows) & (row != before)
    tl.store(is_first + place, first.to(tl.int32), mask=inside)
    shard = shard_of(row, LINE_BITS, SHARD_BITS, MULTIPLIER)
    mark = shard * size + tl.load(order + place, mask=inside, other=0)
    tl.store(marks + mark, tl.full((TILE,), 1, tl.int32), mask=first)


@Kernel
def runs(
    sorted_rows: tl.tensor,
    order: tl.tensor,
    is_first: tl.tensor,
    runs: tl.tensor,
    numbers: tl.tensor,
    starts: tl.tensor,
    unique_of_run: tl.tensor,
    unique_rows: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    num_rows: tl.tensor,
    TILE: tl.constexpr,
    LINE_BITS: tl.constexpr,
    SHARD_BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < size
    row = tl.load(sorted_rows + place, mask=inside, other=num_rows).to(tl.int64)
    run = tl.load(runs + place, mask=inside, other=0) - 1
    first = inside & (tl.load(is_first + place, mask=inside, other=0) != 0)
    shard = shard_of(row, LINE_BITS, SHARD_BITS, MULTIPLIER)
    mark = shard * size + tl.load(order + place, mask=inside, other=0)
    number = tl.load(numbers + mark, mask=first, other=1) - 1
    tl.store(starts + run, place, mask=first & (run < room))
    tl.store(unique_of_run + run, tl.minimum(number, room - 1), mask=first & (run < room))
    tl.store(
        unique_rows + number, row.to(unique_rows.dtype.element_ty), mask=first & (number < room)
    )
    # Behind the last lookup ends the last run.
    after = tl.load(sorted_rows + place + 1, mask=place + 1 < size, other=num_rows).to(tl.int64)
    is_last = inside & (row < num_rows) & (after >= num_rows)
    tl.store(starts + run + 1, place + 1, mask=is_last & (run + 1 <= room))


@Kernel
def admit(
    runs: tl.tensor,
    first_bad: tl.tensor,
    alert: tl.tensor,
    entered: tl.tensor,
    admitted: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    NUM_SLOTS: tl.constexpr,
    RING: tl.constexpr,
    BAD_ID: tl.constexpr,
    NO_ROOM: tl.constexpr,
    TOO_MANY_ROWS: tl.constexpr,
) -> None:
    """Writes whether the batch enters, how many unique rows of it do, and its ring position."""
    number = tl.load(runs + size - 1).to(tl.int64)
    bad = tl.load(first_bad)
    step = tl.load(entered)
    reason = tl.where(number > room, NO_ROOM, 0)
    reason = tl.where(number > NUM_SLOTS, TOO_MANY_ROWS, reason)
    reason = tl.where(bad < size, BAD_ID, reason)
    before = tl.load(alert)
    is_new = (before == 0) & (reason != 0)
    tl.store(alert, reason.to(tl.int64), mask=is_new)
    tl.store(alert + 1, step, mask=is_new)
    tl.store(alert + 2, tl.where(bad < size, bad, number), mask=is_new)
    is_running = (before == 0) & (reason == 0)
    tl.store(admitted, is_running.to(tl.int64))
    tl.store(admitted + 1, tl.where(is_running, number, 0))
    tl.store(admitted + 2, step % RING)


@Kernel
def counts(
    runs: tl.tensor,
    starts: tl.tensor,
    unique_of_run: tl.tensor,
    counts: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
) -> None:
    run = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_run = (run < room) & (run < tl.load(runs + size - 1))
    count = tl.load(starts + run + 1, mask=is_run, other=0) - tl.load(
        starts + run, mask=is_run, other=0
    )
    unique = tl.load(unique_of_run + run, mask=is_run, other=0)
    rest = tl.maximum(count - LONGEST, 0)
    tl.store(counts + unique, tl.minimum(count, LONGEST), mask=is_run)
    tl.store(counts + room + unique, rest, mask=is_run)
    tl.store(counts + 2 * room + unique, (rest + LONGEST - 1) // LONGEST, mask=is_run)
    tl.store(counts + 3 * room + unique, (rest > 0).to(tl.int32), mask=is_run)


@Kernel
def lookups(
    sorted_rows: tl.tensor,
    order: tl.tensor,
    runs: tl.tensor,
    starts: tl.tensor,
    unique_of_run: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    outputs: tl.tensor,
    admitted: tl.tensor,
    lookup_weights: tl.tensor,
    inverse: tl.tensor,
    bags: tl.tensor,
    bag_weights: tl.tensor,
    kept_weights: tl.tensor,
    piece_offsets: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    num_rows: tl.tensor,
    max_pieces: tl.tensor,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # Of a batch that is not admitted nothing is right, so nothing is written.
    limit = size * tl.load(admitted).to(tl.int32)
    position = tl.load(admitted + 2)
    number = tl.load(admitted + 1).to(tl.int32)
    inside = place < limit
    row = tl.load(sorted_rows + place, mask=inside, other=num_rows).to(tl.int64)
    is_lookup = inside & (row < num_rows)
    lookup = tl.load(order + place, mask=is_lookup, other=0)
    run = tl.load(runs + place, mask=is_lookup, other=1) - 1
    unique = tl.load(unique_of_run + run, mask=is_lookup, other=0)
    tl.store(inverse + position * size + lookup, unique, mask=is_lookup)
    beyond = place - tl.load(starts + run, mask=is_lookup, other=0) - LONGEST
    first_begin = tl.load(sums + unique, mask=is_lookup, other=0) - tl.load(
        counts + unique, mask=is_lookup, other=0
    )
    rest_begin = (
        tl.load(sums + room - 1)
        + tl.load(sums + room + unique, mask=is_lookup, other=0)
        - tl.load(counts + room + unique, mask=is_lookup, other=0)
    )
    target = tl.where(beyond < 0, first_begin + beyond + LONGEST, rest_begin + beyond)
    tl.store(
        bags + position * size + target,
        tl.load(outputs + lookup, mask=is_lookup, other=0),
        mask=is_lookup,
    )
    if lookup_weights is not None:
        weight = tl.load(lookup_weights + lookup, mask=is_lookup, other=0.0)
        tl.store(bag_weights + position * size + target, weight, mask=is_lookup)
        tl.store(kept_weights + position * size + lookup, weight, mask=is_lookup)
    begins_piece = is_lookup & (beyond >= 0) & (beyond % LONGEST == 0)
    piece = (
        number
        + tl.load(sums + 2 * room + unique, mask=begins_piece, other=0)
        - tl.load(counts + 2 * room + unique, mask=begins_piece, other=0)
        + beyond // LONGEST
    )
    tl.store(
        piece_offsets + position * (max_pieces + 1) + piece,
        target,
        mask=begins_piece & (piece <= max_pieces),
    )


@Kernel
def uniques(
    found_rows: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    admitted: tl.tensor,
    planned: tl.tensor,
    entered: tl.tensor,
    batches: tl.tensor,
    unique_rows: tl.tensor,
    piece_offsets: tl.tensor,
    long_uniques: tl.tensor,
    long_offsets: tl.tensor,
    slots_of_rows: tl.tensor,
    places_of_rows: tl.tensor,
    next_of_places: tl.tensor,
    next_uses: tl.tensor,
    room: tl.tensor,
    num_rows: tl.tensor,
    max_pieces: tl.tensor,
    max_further: tl.tensor,
    TILE: tl.constexpr,
    NEVER: tl.constexpr,
) -> None:
    unique = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(admitted + 2)
    is_unique = (unique < room) & (unique < tl.load(admitted + 1))
    first_begin = tl.load(sums + unique, mask=is_unique, other=0) - tl.load(
        counts + unique, mask=is_unique, other=0
    )
    tl.store(piece_offsets + position * (max_pieces + 1) + unique, first_begin, mask=is_unique)
    is_long = is_unique & (tl.load(counts + 3 * room + unique, mask=is_unique, other=0) != 0)
    index = tl.load(sums + 3 * room + unique, mask=is_long, other=1) - 1
    tl.store(long_uniques + position * max_further + index, unique, mask=is_long)
    tl.store(
        long_offsets + position * (max_further + 1) + index + 1,
        tl.load(sums + 2 * room + unique, mask=is_long, other=0),
        mask=is_long,
    )
    # linking
    step = tl.load(entered).to(tl.int32)
    row = tl.load(found_rows + unique, mask=is_unique, other=num_rows).to(tl.int64)
    row = tl.where(is_unique, row, num_rows)
    place = position * room + unique
    tl.store(unique_rows + place, row.to(unique_rows.dtype.element_ty), mask=unique < room)
    previous = tl.load(places_of_rows + row, mask=is_unique, other=-1)
    known = tl.maximum(previous, 0)
    was_here = tl.load(unique_rows + known, mask=is_unique, other=-1).to(tl.int64) == row
    # An old place may have been taken by a newer batch since; that is found by its row.
    is_kept = is_unique & (previous >= 0) & was_here & (known // room != position)
    is_planned = tl.load(batches + known // room, mask=is_unique, other=0) < tl.load(planned)
    never = tl.full((TILE,), NEVER, tl.int32)
    tl.store(next_of_places + place, never, mask=unique < room)
    now = never * 0 + step
    tl.store(next_of_places + known, now, mask=is_kept)
    slot = tl.load(slots_of_rows + row, mask=is_unique, other=-1)
    is_cached = is_unique & (slot >= 0) & (is_planned | (is_kept == 0))
    tl.store(next_uses + slot, now, mask=is_cached)
    tl.store(places_of_rows + row, place.to(tl.int32), mask=is_unique)


@Kernel
def bags(
    bag_offsets: tl.tensor,
    sizes: tl.tensor,
    is_mean: tl.tensor,
    admitted: tl.tensor,
    kept_offsets: tl.tensor,
    bag_scales: tl.tensor,
    num_offsets: tl.tensor,
    num_features: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    bag = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(admitted + 2)
    batch_size = tl.maximum(tl.load(sizes + 1).to(tl.int32), 1)
    num_bags = tl.load(sizes + 1).to(tl.int32) * num_features
    is_offset = (bag < num_offsets) & (bag <= num_bags)
    begin = tl.load(bag_offsets + bag, mask=is_offset, other=0)
    tl.store(kept_offsets + position * num_offsets + bag, begin, mask=is_offset)
    if bag_scales is not None:
        is_bag = is_offset & (bag < num_bags)
        end = tl.load(bag_offsets + bag + 1, mask=is_bag, other=0)
        feature = tl.minimum(bag // batch_size, num_features - 1)
        output = (bag - feature * batch_size) * num_features + feature
        # In float64 and then rounded, as on the host.
        scale = 1.0 / tl.maximum(end - begin, 1).to(tl.float64)
        means = tl.load(is_mean + feature, mask=is_bag, other=0) != 0
        scale = tl.where(means, scale.to(tl.float32), 1.0)
        tl.store(bag_scales + position * (num_offsets - 1) + output, scale, mask=is_bag)


@Kernel
def finish(
    sums: tl.tensor,
    sizes: tl.tensor,
    admitted: tl.tensor,
    entered: tl.tensor,
    headers: tl.tensor,
    batches: tl.tensor,
    piece_offsets: tl.tensor,
    long_offsets: tl.tensor,
    room: tl.tensor,
    max_pieces: tl.tensor,
    max_further: tl.tensor,
    HEADER: tl.constexpr,
) -> None:
    is_running = tl.load(admitted) != 0
    number, position = tl.load(admitted + 1), tl.load(admitted + 2)
    step = tl.load(entered)
    num_pieces = number + tl.load(sums + 3 * room - 1)
    header = headers + position * HEADER
    tl.store(header, step, mask=is_running)
    tl.store(header + 1, tl.load(sizes), mask=is_running)
    tl.store(header + 2, tl.load(sizes + 1), mask=is_running)
    tl.store(header + 3, number, mask=is_running)
    tl.store(header + 4, num_pieces, mask=is_running)
    tl.store(header + 5, tl.load(sums + 4 * room - 1).to(tl.int64), mask=is_running)
    end = tl.load(sums + room - 1) + tl.load(sums + 2 * room - 1)
    tl.store(piece_offsets + position * (max_pieces + 1) + num_pieces, end, mask=is_running)
    tl.store(long_offsets + position * (max_further + 1), end * 0, mask=is_running)
    tl.store(batches + position, step, mask=is_running)
    tl.store(entered, step + 1, mask=is_running)
