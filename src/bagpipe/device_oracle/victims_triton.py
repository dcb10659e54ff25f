"""`victims.choose_victims` in Triton: three passes over the slots, and two tiny programs between.

    keys     each slot's key, and the histogram of the keys' upper halves
    bin      (one program) the upper half of the key down to which slots go
    lower    the histogram of the lower halves of the keys in that bin
    bin      (one program) its lower half
    count    how many slots of each tile go, for sure or if there is room
    write    the slots, once running sums over tiles say where

Slots are a few megabytes, so each pass takes microseconds. Sums are of integers: their order
decides nothing.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import Kernel, Tiling, device_function, on_device_of
from bagpipe.device_oracle.state import NEVER, State
from bagpipe.device_oracle.victims import EMPTY, HALF_BITS, MAX_AGE, NUM_BINS, UNUSED

_TILING = Tiling(elements=4096, per_thread=16)
_WARPS_OF_BINS = 4


def choose_victims(state: State, number: Tensor) -> Tensor:
    """See `victims.choose_victims`."""
    num_slots, device = state.window.num_slots, state.planned.device
    tile = _TILING.of(1)
    num_tiles = tile.count(num_slots)
    keys = torch.empty(num_slots, dtype=torch.int32, device=device)
    histograms = torch.zeros((2, NUM_BINS), dtype=torch.int32, device=device)
    bins = torch.zeros((2, 2), dtype=torch.int64, device=device)
    counts = torch.empty((2, num_tiles), dtype=torch.int32, device=device)
    victims = torch.zeros(state.capacity.max_uniques, dtype=torch.int64, device=device)
    sizes = {"TILE": tile.rows, "BITS": HALF_BITS}
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
            sizes | {"NEVER": NEVER, "UNUSED": UNUSED, "EMPTY": EMPTY, "MAX_AGE": MAX_AGE},
            tile.num_warps,
        )
        _bin.launch(1, (histograms[0], number, None, bins[0]), {"BITS": HALF_BITS}, _WARPS_OF_BINS)
        _lower.launch(num_tiles, (keys, bins[0], histograms[1], num_slots), sizes, tile.num_warps)
        _bin.launch(
            1, (histograms[1], number, bins[0], bins[1]), {"BITS": HALF_BITS}, _WARPS_OF_BINS
        )
        _count.launch(num_tiles, (keys, bins, counts, num_slots, num_tiles), sizes, tile.num_warps)
        ends = running_sums(counts)
        _write.launch(
            num_tiles,
            (keys, bins, number, counts, ends, victims, num_slots, num_tiles),
            sizes,
            tile.num_warps,
        )
    return victims


def running_sums(counts: Tensor) -> Tensor:
    """The running sum of each of a few long rows, (k, n) int32.

    Torch gives a row to one block of threads; all rows as one take a twentieth of the time.
    """
    sums = torch.cumsum(counts.view(-1), 0, dtype=torch.int32).view(counts.shape)
    sums[1:] -= sums[:-1, -1:].clone()
    return sums


@device_function
def _add_histogram(
    histogram: tl.tensor, values: tl.tensor, is_counted: tl.tensor, BITS: tl.constexpr
) -> None:
    """Counts values below 2**BITS where it holds."""
    counts = tl.histogram(values, 1 << BITS, mask=is_counted)
    tl.atomic_add(histogram + tl.arange(0, 1 << BITS), counts, mask=counts > 0)


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
    NEVER: tl.constexpr,
    UNUSED: tl.constexpr,
    EMPTY: tl.constexpr,
    MAX_AGE: tl.constexpr,
) -> None:
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = slot < num_slots
    step = tl.load(planned).to(tl.int32)
    next_use = tl.load(next_uses + slot, mask=inside, other=0)
    last_use = tl.load(last_uses + slot, mask=inside, other=0)
    row = tl.load(rows_of_slots + slot, mask=inside, other=0)
    age = tl.minimum(tl.maximum(step - last_use, 1), MAX_AGE)
    ahead = tl.minimum(tl.maximum(next_use - step, 1), UNUSED - 1)
    key = tl.where(next_use == NEVER, UNUSED + age, ahead)
    key = tl.where(last_use < tl.load(settled).to(tl.int32), key, 0)
    key = tl.where(row == num_rows, EMPTY, key)
    tl.store(keys + slot, key, mask=inside)
    # Threads that count in one bin take turns. Most keys are in two: those with a known next use,
    # in bin 0, which `_bin` finds without its count; and those used not long ago.
    upper = key >> BITS
    is_unused = inside & (upper == (UNUSED >> BITS))
    num_unused = tl.sum(is_unused.to(tl.int32), axis=0)
    tl.atomic_add(histogram + (UNUSED >> BITS), num_unused, mask=num_unused > 0)
    _add_histogram(histogram, upper, inside & (upper != 0) & (is_unused == 0), BITS)


@Kernel
def _lower(
    keys: tl.tensor,
    upper: tl.tensor,
    histogram: tl.tensor,
    num_slots: tl.tensor,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.load(keys + slot, mask=slot < num_slots, other=0)
    is_in_bin = (slot < num_slots) & ((key >> BITS) == tl.load(upper))
    _add_histogram(histogram, key & ((1 << BITS) - 1), is_in_bin, BITS)


@Kernel
def _bin(
    histogram: tl.tensor,
    number: tl.tensor,
    upper: tl.tensor,
    found: tl.tensor,
    BITS: tl.constexpr,
) -> None:
    """Writes the greatest bin down to which there are enough values, and how many lie above it.

    If all above bin 0 are too few, it is bin 0, however many it has.
    """
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + bins)
    from_bin = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    needed = tl.load(number).to(tl.int64)
    if upper is not None:
        needed -= tl.load(upper + 1)
    bin = tl.max(tl.where(from_bin >= needed, bins, 0), axis=0)
    tl.store(found, bin.to(tl.int64))
    tl.store(found + 1, tl.sum(tl.where(bins > bin, counts, 0), axis=0).to(tl.int64))


@Kernel
def _count(
    keys: tl.tensor,
    bins: tl.tensor,
    counts: tl.tensor,
    num_slots: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.load(keys + slot, mask=slot < num_slots, other=-1)
    last = (tl.load(bins) << BITS) + tl.load(bins + 2)
    tl.store(counts + tl.program_id(0), tl.sum((key > last).to(tl.int32), axis=0))
    tl.store(counts + num_tiles + tl.program_id(0), tl.sum((key == last).to(tl.int32), axis=0))


@Kernel
def _write(
    keys: tl.tensor,
    bins: tl.tensor,
    number: tl.tensor,
    counts: tl.tensor,
    ends: tl.tensor,
    victims: tl.tensor,
    num_slots: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    slot = tile * TILE + tl.arange(0, TILE)
    key = tl.load(keys + slot, mask=slot < num_slots, other=-1)
    last = (tl.load(bins) << BITS) + tl.load(bins + 2)
    greater_before = tl.load(ends + tile) - tl.load(counts + tile)
    equal_before = tl.load(ends + num_tiles + tile) - tl.load(counts + num_tiles + tile)
    # Of the slots with the last key the lower ones go, as many as are still wanted.
    num_equal = (tl.load(number) - tl.load(bins + 1) - tl.load(bins + 3)).to(tl.int32)
    is_equal = key == last
    is_taken = (key > last) | (
        is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) + equal_before <= num_equal)
    )
    before = greater_before + tl.minimum(equal_before, num_equal)
    place = before + tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
    tl.store(victims + place, slot.to(tl.int64), mask=is_taken)
