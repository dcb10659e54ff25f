"""Lets a GPU write rows into the memory of the others of its host, and wait for theirs.

One launch sends this rank's rows and receives the others'. Part q of a message between two ranks is
the work of one program on each of them, which are twins: it copies its tiles of rows into the
other's region, raises its twin's flag, waits for its own, and copies what has come to where it is
needed. If the message is larger than a region, it does so round by round. So a program waits for
its twin alone. Nothing here waits for a program of its own launch, so no number of programs can
keep itself from running.

A flag holds the number of the last round that has come, and has one writer. The writes before it
are released to the whole system, and acquired with it. A round's number follows from the numbers of
rows, which both ranks know: a round of no rows in either direction is none. What the regions hold
and when they may be written again is told in `peer_memory`.

A launch finds its message in arrays of its own, or in rings by a clock on the device: then a graph
can hold it for any step. Launches count themselves, so they need no number of the host.

A loop that waits asks at times for a word in the host's memory, by which the host ends it: another
rank may never raise the flag. All threads of a program must leave the loop together, but each loads
a number for itself, and the host may write between two loads. What an atomic operation returns, one
thread has asked for and all are given. So the host's word goes into one on the device by such an
operation, and the loop ends by what that returns.

All warps of all programs load the host's word, which no cache may answer, and meanwhile no program
sees its flag. By traces that seems to have cost a millisecond (docs/lab/several-trainers.md). So
programs ask the host seldom and at different times. The word on the device costs little, and they
ask for it more often.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import triton
import triton.language as tl
from torch import Tensor

from bagpipe.cache.device_plan import DeviceRows
from bagpipe.cache.ring import RowsByClock
from bagpipe.cache.triton_launch import (
    Argument,
    Kernel,
    Tile,
    Tiling,
    device_function,
    on_device_of,
)

_TILE = Tiling(elements=4096, per_thread=16)
_NO_END = (1 << 31) - 1
_POLLS_A_LOOK = tl.constexpr(64)
"""Polls of a flag after which a program asks whether another one knows that waiting has ended."""
_POLLS_A_CALL = tl.constexpr(8192)
"""Polls after which it asks the host, some milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One rank's side of all messages of one moment; sizes and places are in bytes."""

    rank: int
    num_trainers: int
    num_parts: int
    """Into how many parts the rows of two ranks are cut."""
    region_bytes: int
    flags_at: int
    """Where flags begin in each rank's memory."""
    regions_at: int
    addresses: Tensor
    """Of each rank's memory: (num_trainers,) int64."""
    rounds: Tensor
    """So far: (num_trainers, num_parts) int64."""
    launches: Tensor
    """So far, of the shape of `rounds`."""
    done: Tensor
    """In the host's memory: how many launches are over, of the shape of `rounds`."""
    stop: Tensor
    """In the host's memory: what ends all waiting, once it is not zero; (1,) int32."""
    stopped: Tensor
    """What waiting programs have seen of it: (1,) int32."""

    @cached_property
    def fixed(self) -> tuple[int, ...]:
        """What is the same in all launches, for the kernel."""
        return self.region_bytes, self.flags_at, self.regions_at, self.rank

    @cached_property
    def on_host(self) -> tuple[int, int]:
        """The addresses of `stop` and `done`."""
        return self.stop.data_ptr(), self.done.data_ptr()

    def rows_per_round(self, values: Tensor) -> int:
        """How many rows of `values` a region holds."""
        return self.region_bytes // (values.element_size() * values.shape[1])


def exchange_rows(
    lane: Lane,
    values: Tensor,
    rows: DeviceRows | RowsByClock,
    first_received: int = 0,
    *,
    first: int = 0,
    end: int = _NO_END,
    sends: bool = True,
    receives: bool = True,
    ends: bool = True,
    only_loads: bool = False,
) -> None:
    """Takes part in a message, by one launch.

    Args:
        lane: The rank's, of the message's moment.
        values: (n, W) float32, from which rows are sent and into which they are received.
        rows: Which are sent, and how many to and from each rank. What a rank would send itself is
            passed over, where it is sent from and where it is received.
        first_received: The row of `values` from which on they are received, unless `rows` tells it.
        first: The first row of each two ranks' that is exchanged; a round begins there.
        end: No round begins here or later.
        sends: Whether this launch sends.
        receives: Whether this launch waits and receives.
        ends: Whether the message's launches are over with this one.
        only_loads: Whether the kernel is but made ready, and nothing launched.
    """
    width = values.shape[1]
    tile, constants = _constants(width, lane.num_trainers, lane.num_parts, sends, receives, ends)
    num_programs = 0 if only_loads else (lane.num_trainers - 1) * lane.num_parts
    with on_device_of(values):
        travel.launch(
            num_programs,
            (
                values,
                rows.send,
                rows.send_counts,
                rows.receive_counts,
                lane.addresses,
                lane.rounds,
                lane.launches,
                lane.stopped,
                *lane.on_host,
                first_received,
                first,
                end,
                lane.rows_per_round(values),
                *lane.fixed,
                *_ring_arguments(rows),
            ),
            constants,
            tile.num_warps,
        )


def _ring_arguments(rows: DeviceRows | RowsByClock) -> tuple[Argument, ...]:
    """What the kernel needs to find its message in rings."""
    if isinstance(rows, DeviceRows):
        return (None,) * 7
    arrays = (rows.send, rows.send_counts, rows.receive_counts, rows.firsts)
    return (rows.clock, rows.firsts, len(rows.firsts), *(array.stride(0) for array in arrays))


@cache
def _constants(
    width: int, num_trainers: int, num_parts: int, sends: bool, receives: bool, ends: bool
) -> tuple[Tile, Mapping[str, object]]:
    tile = _TILE.of(width)
    return tile, {
        "WIDTH": width,
        "RANKS": num_trainers,
        "RANKS_TILE": triton.next_power_of_2(num_trainers),
        "PARTS": num_parts,
        "SENDS": sends,
        "RECEIVES": receives,
        "ENDS": ends,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }


@Kernel
def travel(
    values: tl.tensor,
    moved_rows: tl.tensor,
    send_counts: tl.tensor,
    receive_counts: tl.tensor,
    addresses: tl.tensor,
    rounds: tl.tensor,
    launches: tl.tensor,
    stopped: tl.tensor,
    stop_address: tl.tensor,
    done_address: tl.tensor,
    first_slot: tl.tensor,
    first_row: tl.tensor,
    end_row: tl.tensor,
    num_rows: tl.tensor,
    region_bytes: tl.tensor,
    flags_at: tl.tensor,
    regions_at: tl.tensor,
    rank: tl.tensor,
    clock: tl.tensor,
    firsts: tl.tensor,
    num_plans: tl.tensor,
    send_stride: tl.tensor,
    to_stride: tl.tensor,
    from_stride: tl.tensor,
    firsts_stride: tl.tensor,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    RANKS_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    SENDS: tl.constexpr,
    RECEIVES: tl.constexpr,
    ENDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    if clock is not None:
        place = tl.load(clock) % num_plans
        moved_rows += place * send_stride
        send_counts += place * to_stride
        receive_counts += place * from_stride
        first_slot = tl.load(firsts + place * firsts_stride)
    index, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    peer = index + (index >= rank).to(tl.int32)
    others, columns = tl.arange(0, RANKS_TILE), tl.arange(0, COLUMNS)
    to_all = tl.load(send_counts + others, mask=others < RANKS, other=0)
    from_all = tl.load(receive_counts + others, mask=others < RANKS, other=0)
    send_begin = tl.sum(tl.where(others < peer, to_all, 0))
    receive_begin = tl.sum(tl.where(others < peer, from_all, 0)) + first_slot
    num_sent = tl.sum(tl.where(others == peer, to_all, 0))
    num_received = tl.sum(tl.where(others == peer, from_all, 0))
    own, theirs = tl.load(addresses + rank), tl.load(addresses + peer)
    twin = peer * PARTS + part
    in_round = tl.load(rounds + twin)
    end = tl.minimum(tl.maximum(num_sent, num_received), end_row)
    for first in range(first_row, end, num_rows):
        in_round += 1
        # Regions take turns.
        regions = regions_at + (in_round % 2) * RANKS * region_bytes
        if SENDS:
            region = theirs + regions + rank * region_bytes
            into = tl.multiple_of(region.to(tl.pointer_type(tl.float32)), 16)
            num_here = tl.minimum(num_sent - first, num_rows)
            for tile in range(part, tl.cdiv(num_here, ROWS), PARTS):
                row = tile * ROWS + tl.arange(0, ROWS)
                slot = tl.load(moved_rows + send_begin + first + row, mask=row < num_here, other=0)
                inside = (row < num_here)[:, None] & (columns < WIDTH)[None, :]
                at = values + slot.to(tl.int64)[:, None] * WIDTH + columns[None, :]
                tl.store(
                    into + row[:, None] * WIDTH + columns[None, :],
                    tl.load(at, mask=inside),
                    mask=inside,
                )
            # All threads' writes come before the flag of one, as do their reads of the last round.
            tl.debug_barrier()
            flag = theirs + flags_at + (rank * PARTS + part) * 8
            tl.atomic_xchg(flag.to(tl.pointer_type(tl.int64)), in_round, sem="release", scope="sys")
        if RECEIVES:
            flag_here = own + flags_at + twin * 8
            has_come = _wait(flag_here, in_round, stop_address, stopped, tl.program_id(0))
            tl.debug_barrier()
            come_here = tl.minimum(num_received - first, num_rows)
            come_here = tl.where(has_come < in_round, 0, come_here)
            region = own + regions + peer * region_bytes
            come = tl.multiple_of(region.to(tl.pointer_type(tl.float32)), 16)
            for tile in range(part, tl.cdiv(come_here, ROWS), PARTS):
                row = tile * ROWS + tl.arange(0, ROWS)
                inside = (row < come_here)[:, None] & (columns < WIDTH)[None, :]
                at = values + (receive_begin + first + row)[:, None] * WIDTH + columns[None, :]
                # past the L1 cache, which does not see what another device writes
                record = tl.load(
                    come + row[:, None] * WIDTH + columns[None, :],
                    mask=inside,
                    cache_modifier=".cg",
                )
                tl.store(at, record, mask=inside)
    if RECEIVES:
        tl.store(rounds + twin, in_round)
    if ENDS:
        number = tl.load(launches + twin) + 1
        tl.store(launches + twin, number)
        tl.store(done_address.to(tl.pointer_type(tl.int64)) + twin, number)


@device_function
def _wait(
    flag_address: tl.tensor,
    in_round: tl.tensor,
    stop_address: tl.tensor,
    stopped: tl.tensor,
    program: tl.tensor,
) -> tl.tensor:
    """The number of the last round that has come: `in_round` at least, unless the host ends it."""
    flag = flag_address.to(tl.pointer_type(tl.int64))
    stop = stop_address.to(tl.pointer_type(tl.int32))
    has_come = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    is_stopped, num_polls = 0, program * 2 * _POLLS_A_LOOK
    while (has_come < in_round) & (is_stopped == 0):
        has_come = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        num_polls += 1
        if num_polls % _POLLS_A_CALL == 0:
            is_stopped = tl.atomic_max(stopped, tl.load(stop, volatile=True))
        elif num_polls % _POLLS_A_LOOK == 0:
            is_stopped = tl.atomic_max(stopped, 0)
    return has_come
