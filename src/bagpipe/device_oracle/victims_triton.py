"""`victims.choose_victims` in Triton: four passes over the slots.

    keys     each slot's key, and the histogram of the keys' first digits
    narrow   (twice) the histogram of the next digit, of the keys that begin as the last one does
    count    how many slots of each tile go, for sure or if there is room
    write    the slots, once sums over the tiles before say where

The *last key* is that down to which slots go. Each pass finds one digit more of it, from the
histogram of the pass before. `tl.histogram` takes work for each pair of an element and 32 bins,
whatever the keys are. So digits are short: 2,048 bins took eight times as long as 256.

Slots are a few megabytes, so each pass takes microseconds. Sums are of integers: their order
decides nothing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import Kernel, Tiling, device_function, on_device_of
from bagpipe.device_oracle.state import NEVER, State
from bagpipe.device_oracle.sums_triton import (
    GROUP,
    make_counts,
    num_groups,
    put_count,
    sum_before,
)
from bagpipe.device_oracle.victims import EMPTY, HALF_BITS, MAX_AGE, UNUSED

_TILING = Tiling(elements=2048, per_thread=16)
_DIGITS = (8, 7, 7)
"""Bits of the digits of a key, the first one first."""
assert sum(_DIGITS) == 2 * HALF_BITS


def choose_victims(state: State, number: Tensor) -> Tensor:
    """See `victims.choose_victims`."""
    num_slots, device = state.window.num_slots, state.planned.device
    tile = _TILING.of(1)
    num_tiles = tile.count(num_slots)

    def ints(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int32, device=device)

    keys, found = ints(num_tiles * tile.rows), [ints(2) for _ in _DIGITS]
    lengths = [*(1 << bits for bits in _DIGITS), 2 * num_groups(num_tiles)]
    zeros = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
    *histograms, groups = zeros.split_with_sizes(lengths)
    counts = make_counts(num_tiles, 2, groups)
    victims = torch.empty(state.capacity.max_uniques, dtype=torch.int64, device=device)
    sizes, warps, rest = {"TILE": tile.rows}, tile.num_warps, sum(_DIGITS) - _DIGITS[0]
    with on_device_of(keys):
        _keys.launch(
            num_tiles,
            (
                state.next_uses,
                state.last_uses,
                state.rows_of_slots,
                state.planned,
                state.settled,
                keys,
                histograms[0],
                num_slots,
                state.num_rows,
            ),
            sizes
            | {"BITS": _DIGITS[0], "REST": rest}
            | {"NEVER": NEVER, "UNUSED": UNUSED, "EMPTY": EMPTY, "MAX_AGE": MAX_AGE},
            warps,
        )
        last: Tensor | None = None
        for digit, (before, bits) in enumerate(pairwise(_DIGITS)):
            rest -= bits
            _narrow.launch(
                num_tiles,
                (keys, number, last, histograms[digit], histograms[digit + 1], found[digit]),
                sizes | {"BEFORE": before, "BITS": bits, "REST": rest},
                warps,
            )
            last = found[digit]
        _count.launch(
            num_tiles,
            (keys, number, last, histograms[-1], found[-1], counts.tiles, counts.groups, num_tiles),
            sizes | {"BEFORE": _DIGITS[-1], "GROUP": GROUP},
            warps,
        )
        _write.launch(
            num_tiles,
            (keys, found[-1], counts.tiles, counts.groups, victims, num_tiles),
            sizes | {"GROUP": GROUP},
            warps,
        )
    return victims


@device_function
def _add_histogram(
    histogram: tl.tensor, values: tl.tensor, is_counted: tl.tensor, BITS: tl.constexpr
) -> None:
    """Counts values below 2**BITS where it holds."""
    counts = tl.histogram(values, 1 << BITS, mask=is_counted)
    tl.atomic_add(histogram + tl.arange(0, 1 << BITS), counts, mask=counts > 0, sem="relaxed")


@device_function
def _next_digit(
    histogram: tl.tensor,
    number: tl.tensor,
    last: tl.tensor,
    found: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The last key's digits up to that of the histogram: the greatest with enough keys from it on.

    If all above bin 0 are too few, the digit is 0. One program writes the digits to `found`, and
    how many slots of the keys that begin with them go; `last` is what it wrote a digit before.
    """
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + bins)
    from_bin = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    if last is not None:
        digits, needed = tl.load(last), tl.load(last + 1)
    else:
        digits, needed = 0, tl.load(number).to(tl.int32)
    digit = tl.max(tl.where(from_bin >= needed, bins, 0), axis=0)
    above = tl.sum(tl.where(bins > digit, counts, 0), axis=0)
    digits = (digits << BITS) + digit
    is_writer = tl.program_id(0) == 0
    tl.store(found, digits, mask=is_writer)
    tl.store(found + 1, needed - above, mask=is_writer)
    return digits


@Kernel
def _keys(
    next_uses: tl.tensor,
    last_uses: tl.tensor,
    rows_of_slots: tl.tensor,
    planned: tl.tensor,
    settled: tl.tensor,
    keys: tl.tensor,
    histogram: tl.tensor,
    num_slots: tl.tensor,
    num_rows: tl.tensor,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    REST: tl.constexpr,
    NEVER: tl.constexpr,
    UNUSED: tl.constexpr,
    EMPTY: tl.constexpr,
    MAX_AGE: tl.constexpr,
) -> None:
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = slot < num_slots
    # Four slots at a time, of 16 bytes. There are spare ones behind the last.
    near = (slot // 4) <= ((num_slots - 1) // 4)
    step = tl.load(planned).to(tl.int32)
    next_use = tl.load(next_uses + slot, mask=near, other=0)
    last_use = tl.load(last_uses + slot, mask=near, other=0)
    row = tl.load(rows_of_slots + slot, mask=near, other=0)
    age = tl.minimum(tl.maximum(step - last_use, 1), MAX_AGE)
    ahead = tl.minimum(tl.maximum(next_use - step, 1), UNUSED - 1)
    key = tl.where(next_use == NEVER, UNUSED + age, ahead)
    key = tl.where(last_use < tl.load(settled).to(tl.int32), key, 0)
    key = tl.where(row == num_rows, EMPTY, key)
    # Keys go on to the end of the last tile: behind the last slot they are like no other.
    tl.store(keys + slot, tl.where(inside, key, -1))
    _add_histogram(histogram, key >> REST, inside, BITS)


@Kernel
def _narrow(
    keys: tl.tensor,
    number: tl.tensor,
    last: tl.tensor,
    before: tl.tensor,
    histogram: tl.tensor,
    found: tl.tensor,
    TILE: tl.constexpr,
    BEFORE: tl.constexpr,
    BITS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    key = tl.load(keys + tl.program_id(0) * TILE + tl.arange(0, TILE))
    digits = _next_digit(before, number, last, found, BEFORE)
    value = (key >> REST) & ((1 << BITS) - 1)
    _add_histogram(histogram, value, (key >> (REST + BITS)) == digits, BITS)


@Kernel
def _count(
    keys: tl.tensor,
    number: tl.tensor,
    last: tl.tensor,
    before: tl.tensor,
    found: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    BEFORE: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    key = tl.load(keys + tl.program_id(0) * TILE + tl.arange(0, TILE))
    last_key = _next_digit(before, number, last, found, BEFORE)
    num_greater = tl.sum((key > last_key).to(tl.int32), axis=0)
    num_equal = tl.sum((key == last_key).to(tl.int32), axis=0)
    put_count(tiles, groups, num_tiles, num_greater, 0, GROUP)
    put_count(tiles, groups, num_tiles, num_equal, 1, GROUP)


@Kernel
def _write(
    keys: tl.tensor,
    found: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    victims: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    slot = tile * TILE + tl.arange(0, TILE)
    key = tl.load(keys + slot)
    last_key, num_equal = tl.load(found), tl.load(found + 1)
    greater_before = sum_before(tiles, groups, num_tiles, tile, 0, GROUP)
    equal_before = sum_before(tiles, groups, num_tiles, tile, 1, GROUP)
    # Of the slots with the last key the lower ones go, as many as are still wanted. Both running
    # sums in one: a tile has fewer than 2**16 slots.
    is_greater, is_equal = key > last_key, key == last_key
    sums = tl.cumsum(is_greater.to(tl.int32) + (is_equal.to(tl.int32) << 16), axis=0)
    equal_up_to = equal_before + (sums >> 16)
    is_taken = is_greater | (is_equal & (equal_up_to <= num_equal))
    place = greater_before + (sums & 0xFFFF) + tl.minimum(equal_up_to, num_equal) - 1
    tl.store(victims + place, slot.to(tl.int64), mask=is_taken)
