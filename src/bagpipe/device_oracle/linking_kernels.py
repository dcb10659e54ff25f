"""The Triton kernels of `entering_triton` that lay out a batch's lookups and link its rows.

A lookup, a unique row or a bag has a thread. Of a batch that is not admitted nothing is right, so
nothing is written but the rows of its ring position.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import element_kernel
from bagpipe.device_oracle.entering_kernels import output_of
from bagpipe.device_oracle.row_index_triton import claim_entry
from bagpipe.device_oracle.sums_triton import put_count, sum_before


@element_kernel
def totals(
    counts: tl.tensor,
    admitted: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Counts each tile's lookups in first pieces and beyond, further pieces and long rows."""
    unique = tl.program_id(0) * TILE + tl.arange(0, TILE)
    count = tl.load(counts + unique, mask=unique < tl.load(admitted + 1), other=0)
    rest = tl.maximum(count - LONGEST, 0)
    further, is_long = (rest + LONGEST - 1) // LONGEST, (rest > 0).to(tl.int32)
    put_count(tiles, groups, num_tiles, tl.sum(count - rest, axis=0), 0, GROUP)
    put_count(tiles, groups, num_tiles, tl.sum(rest, axis=0), 1, GROUP)
    put_count(tiles, groups, num_tiles, tl.sum(further, axis=0), 2, GROUP)
    put_count(tiles, groups, num_tiles, tl.sum(is_long, axis=0), 3, GROUP)


@element_kernel
def uniques(
    counts: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    admitted: tl.tensor,
    planned: tl.tensor,
    entered: tl.tensor,
    batches: tl.tensor,
    unique_rows: tl.tensor,
    piece_offsets: tl.tensor,
    long_uniques: tl.tensor,
    long_offsets: tl.tensor,
    rest_begins: tl.tensor,
    further_begins: tl.tensor,
    keys: tl.tensor,
    slots_of_rows: tl.tensor,
    places_of_rows: tl.tensor,
    next_of_places: tl.tensor,
    next_uses: tl.tensor,
    alert: tl.tensor,
    room: tl.tensor,
    num_rows: tl.tensor,
    num_entries: tl.tensor,
    num_tiles: tl.tensor,
    max_pieces: tl.tensor,
    max_further: tl.tensor,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    NEVER: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Writes where pieces of unique rows begin, and tells their last uses of this one."""
    tile = tl.program_id(0)
    unique = tile * TILE + tl.arange(0, TILE)
    position = tl.load(admitted + 2)
    is_unique = unique < tl.load(admitted + 1)
    # linking, whose loads are the farthest away
    step = tl.load(entered).to(tl.int32)
    place = position * room + unique
    row = tl.load(unique_rows + place, mask=is_unique, other=num_rows).to(tl.int64)
    entry = claim_entry(keys, row, is_unique, num_entries, alert, step)
    previous = tl.load(places_of_rows + entry, mask=is_unique, other=-1)
    slot = tl.load(slots_of_rows + entry, mask=is_unique, other=-1)
    known = tl.maximum(previous, 0)
    was_here = tl.load(unique_rows + known, mask=is_unique, other=-1).to(tl.int64) == row
    # An old place may have been taken by a newer batch since; that is found by its row.
    is_kept = is_unique & (previous >= 0) & was_here & (known // room != position)
    is_planned = tl.load(batches + known // room, mask=is_unique, other=0) < tl.load(planned)
    never = tl.full((TILE,), NEVER, tl.int32)
    tl.store(next_of_places + place, never, mask=unique < room)
    nobody = (never * 0 + num_rows).to(unique_rows.dtype.element_ty)
    tl.store(unique_rows + place, nobody, mask=(unique < room) & (is_unique == 0))
    now = never * 0 + step
    tl.store(next_of_places + known, now, mask=is_kept)
    is_cached = is_unique & (slot >= 0) & (is_planned | (is_kept == 0))
    tl.store(next_uses + slot, now, mask=is_cached)
    tl.store(places_of_rows + entry, place.to(tl.int32), mask=is_unique)
    # pieces
    count = tl.load(counts + unique, mask=is_unique, other=0)
    rest = tl.maximum(count - LONGEST, 0)
    first = count - rest
    begin = sum_before(tiles, groups, num_tiles, tile, 0, GROUP) + tl.cumsum(first, axis=0) - first
    pieces = piece_offsets + position * (max_pieces + 1)
    tl.store(pieces + unique, begin, mask=is_unique)
    if tl.max(rest, axis=0) > 0:
        is_long = rest > 0
        further = (rest + LONGEST - 1) // LONGEST
        num_firsts = sum_before(tiles, groups, num_tiles, num_tiles, 0, GROUP)
        rests = num_firsts + sum_before(tiles, groups, num_tiles, tile, 1, GROUP)
        tl.store(rest_begins + unique, rests + tl.cumsum(rest, axis=0) - rest, mask=is_long)
        end = sum_before(tiles, groups, num_tiles, tile, 2, GROUP) + tl.cumsum(further, axis=0)
        tl.store(further_begins + unique, end - further, mask=is_long)
        index = sum_before(tiles, groups, num_tiles, tile, 3, GROUP)
        index += tl.cumsum(is_long.to(tl.int32), axis=0)
        tl.store(long_uniques + position * max_further + index - 1, unique, mask=is_long)
        tl.store(long_offsets + position * (max_further + 1) + index, end, mask=is_long)


@element_kernel
def lookups(
    order: tl.tensor,
    runs: tl.tensor,
    starts: tl.tensor,
    unique_of_run: tl.tensor,
    rest_begins: tl.tensor,
    further_begins: tl.tensor,
    outputs: tl.tensor,
    admitted: tl.tensor,
    sizes: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    lookup_weights: tl.tensor,
    inverse: tl.tensor,
    bags: tl.tensor,
    bag_weights: tl.tensor,
    kept_weights: tl.tensor,
    piece_offsets: tl.tensor,
    long_offsets: tl.tensor,
    headers: tl.tensor,
    batches: tl.tensor,
    entered: tl.tensor,
    size: tl.tensor,
    num_features: tl.tensor,
    num_tiles: tl.tensor,
    max_pieces: tl.tensor,
    max_further: tl.tensor,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADER: tl.constexpr,
) -> None:
    """Writes inverse, bags, weights and further pieces. One program writes the header, too."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_running, number = tl.load(admitted).to(tl.int32), tl.load(admitted + 1).to(tl.int32)
    position = tl.load(admitted + 2)
    num_lookups = tl.load(sizes).to(tl.int32) * is_running
    inside = place < num_lookups
    lookup = tl.load(order + place, mask=inside, other=0)
    run = tl.load(runs + place, mask=inside, other=0)
    unique = tl.load(unique_of_run + run, mask=inside, other=0)
    tl.store(inverse + position * size + lookup, unique, mask=inside)
    within = place - tl.load(starts + run, mask=inside, other=0)
    is_beyond = inside & (within >= LONGEST)
    pieces = piece_offsets + position * (max_pieces + 1)
    begin = tl.load(pieces + unique, mask=inside & (within < LONGEST), other=0)
    rest_begin = tl.load(rest_begins + unique, mask=is_beyond, other=0)
    target = tl.where(is_beyond, rest_begin + within - LONGEST, begin + within)
    if outputs is not None:
        output = tl.load(outputs + lookup, mask=inside, other=0)
    else:  # each bag has one lookup
        batch_size = tl.maximum(tl.load(sizes + 1).to(tl.int32), 1)
        output = output_of(lookup.to(tl.int32), batch_size, num_features)
    tl.store(bags + position * size + target, output, mask=inside)
    if lookup_weights is not None:
        weight = tl.load(lookup_weights + lookup, mask=inside, other=0.0)
        tl.store(bag_weights + position * size + target, weight, mask=inside)
        tl.store(kept_weights + position * size + lookup, weight, mask=inside)
    begins_piece = is_beyond & (within % LONGEST == 0)
    piece = tl.load(further_begins + unique, mask=begins_piece, other=0)
    piece += number + within // LONGEST - 1
    tl.store(pieces + piece, target, mask=begins_piece & (piece <= max_pieces))
    if (tl.program_id(0) == 0) & (is_running > 0):
        num_further = sum_before(tiles, groups, num_tiles, num_tiles, 2, GROUP)
        num_long = sum_before(tiles, groups, num_tiles, num_tiles, 3, GROUP)
        num_pieces, step = number + num_further, tl.load(entered)
        header = headers + position * HEADER
        tl.store(header, step)
        tl.store(header + 1, tl.load(sizes))
        tl.store(header + 2, tl.load(sizes + 1))
        tl.store(header + 3, number.to(tl.int64))
        tl.store(header + 4, num_pieces.to(tl.int64))
        tl.store(header + 5, num_long.to(tl.int64))
        tl.store(pieces + num_pieces, num_lookups)
        tl.store(long_offsets + position * (max_further + 1), 0)
        tl.store(batches + position, step)
        tl.store(entered, step + 1)


@element_kernel
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
        # In float64 and then rounded, as on the host.
        scale = 1.0 / tl.maximum(end - begin, 1).to(tl.float64)
        means = tl.load(is_mean + feature, mask=is_bag, other=0) != 0
        scale = tl.where(means, scale.to(tl.float32), 1.0)
        output = output_of(bag, batch_size, num_features)
        tl.store(bag_scales + position * (num_offsets - 1) + output, scale, mask=is_bag)
