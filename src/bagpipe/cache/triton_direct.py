"""Moves records between the cache and tables in the host's memory that the device reaches itself.

A few programs go through all records, so that most of the device is left to the step's compute.
Reading waits for the link: a record takes a few microseconds, so a program asks for many at a time.
Writing does not wait. Who fills a slot notes its row, and who empties it notes that it has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.triton_launch import Kernel, Tiling, on_device_of
from bagpipe.types import Float32Array

_READ, _WRITE = Tiling(elements=4096, per_thread=16), Tiling(elements=2048, per_thread=8)
_NUM_READING, _NUM_WRITING = 8, 4


@dataclass(frozen=True, kw_only=True)
class CachedTable:
    """A group's table in the host's memory, and its cache."""

    records: Float32Array
    """(num_rows, record_width), in memory that the device reaches."""
    words: Tensor
    """(num_slots, weight_words) float32."""
    state: Tensor
    """(num_slots, S) float32."""
    rows_of_slots: Tensor
    """(num_slots,) int64, -1 where a slot holds none."""

    @classmethod
    def of(cls, records: Float32Array, cache: DeviceCache) -> CachedTable:
        """A table of which the cache holds nothing yet."""
        device = cache.device
        rows_of_slots = torch.full((cache.num_slots,), -1, dtype=torch.int64, device=device)
        return cls(
            records=records, words=cache.words, state=cache.state, rows_of_slots=rows_of_slots
        )


def fill_from(table: CachedTable, rows: Tensor, slots: Tensor) -> None:
    """Copies records from the host's memory.

    Args:
        table: From where, and into whose slots.
        rows: Which, (n,) of integers.
        slots: The slot of each, (n,) int32.
    """
    _move_all(table, rows, slots, is_fill=True)


def write_to(table: CachedTable, rows: Tensor, slots: Tensor) -> None:
    """Copies records to the host's memory and empties their slots; arguments as for `fill_from`."""
    _move_all(table, rows, slots, is_fill=False)


def write_all_to(table: CachedTable) -> None:
    """Copies the records of all slots that hold a row; they stay in their slots."""
    _move_all(table, table.rows_of_slots, None, is_fill=False)


def _move_all(table: CachedTable, rows: Tensor, slots: Tensor | None, *, is_fill: bool) -> None:
    num_records, width, state_width = len(rows), table.words.shape[1], table.state.shape[1]
    assert table.records.shape[1] == width + state_width
    if num_records == 0:
        return
    tile = (_READ if is_fill else _WRITE).of(width)
    num_programs = min(tile.count(num_records), _NUM_READING if is_fill else _NUM_WRITING)
    address = table.records.ctypes.data
    with on_device_of(table.words):
        _move.launch(
            num_programs,
            (address, rows, table.words, table.state, slots, table.rows_of_slots, num_records),
            {
                "WIDTH": width,
                "STATE_WIDTH": state_width,
                "IS_FILL": is_fill,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "STATE_COLUMNS": triton.next_power_of_2(max(state_width, 1)),
            },
            tile.num_warps,
        )


@Kernel
def _move(
    address: tl.tensor,
    moved_rows: tl.tensor,
    words: tl.tensor,
    state: tl.tensor,
    slots: tl.tensor,
    rows_of_slots: tl.tensor,
    num_records: tl.tensor,
    WIDTH: tl.constexpr,
    STATE_WIDTH: tl.constexpr,
    IS_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATE_COLUMNS: tl.constexpr,
) -> None:
    """Without `slots`, record i is in slot i, and slots are not emptied."""
    table = address.to(tl.pointer_type(tl.float32))
    columns, state_columns = tl.arange(0, COLUMNS), tl.arange(0, STATE_COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(num_records, ROWS), tl.num_programs(0)):
        record = tile * ROWS + tl.arange(0, ROWS)
        row = tl.load(moved_rows + record, mask=record < num_records, other=-1).to(tl.int64)
        is_row = row >= 0
        slot = record.to(tl.int64)
        if slots is not None:
            slot = tl.load(slots + record, mask=is_row, other=0).to(tl.int64)
        on_host = table + row[:, None] * (WIDTH + STATE_WIDTH)
        weights_there, state_there = on_host + columns[None, :], on_host + WIDTH
        state_there += state_columns[None, :]
        weights_here = words + slot[:, None] * WIDTH + columns[None, :]
        state_here = state + slot[:, None] * STATE_WIDTH + state_columns[None, :]
        is_weight = is_row[:, None] & (columns < WIDTH)[None, :]
        is_state = is_row[:, None] & (state_columns < STATE_WIDTH)[None, :]
        # Both are asked for before either is waited for.
        if IS_FILL:
            weight = tl.load(weights_there, mask=is_weight)
            if STATE_WIDTH > 0:
                tl.store(state_here, tl.load(state_there, mask=is_state), mask=is_state)
            tl.store(weights_here, weight, mask=is_weight)
            tl.store(rows_of_slots + slot, row, mask=is_row)
        else:
            weight = tl.load(weights_here, mask=is_weight)
            if STATE_WIDTH > 0:
                tl.store(state_there, tl.load(state_here, mask=is_state), mask=is_state)
            tl.store(weights_there, weight, mask=is_weight)
            if slots is not None:
                tl.store(rows_of_slots + slot, -1, mask=is_row)
