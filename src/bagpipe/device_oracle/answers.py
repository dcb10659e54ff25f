"""What the host learns of a step: alerts, headers, and which rows move. One copy brings it all.

How many rows move the host knows only then. So it asks for as many as recent steps moved, and some
more; where that was too few, it asks again.

Why no memory is written too early. On the device all is packed into one tensor: the packing of the
next step is issued behind the copy of this one, on the same stream. On the host each place of the
ring of plans has pinned memory of its own. The copy into it is over when the planner's thread has
waited for it, which it does before anyone reads. The next copy into it is asked for when a plan is
made in the same place: after the step that had it was released, so that nobody reads its rows.
Memory of another size is new memory: the old one lives on while plans have views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagpipe.device_oracle.alerts import Alert
from bagpipe.device_oracle.state import (
    ALERT_LENGTH,
    EVICTED,
    FETCHED,
    HEADER_LENGTH,
    STEP,
    State,
)
from bagpipe.types import Int32Array, Int64Array

_SMALLEST = 1024
"""Rows of each kind that are asked for at least; and what numbers of them are multiples of."""
_STEPS_OF_ROOM = 64
"""Steps after which less is asked for, if all of them moved less than half."""
_MOVED = ("evict_rows", "fetch_rows", "evict_slots", "fetch_slots")


@dataclass(frozen=True, kw_only=True)
class GroupAnswer:
    """What the device told of a step for one group.

    The arrays are views of pinned memory, which is used again once the step is released.
    """

    alert: Alert | None
    header: list[int]
    evict_rows: Int64Array  # (EVICTED,), the overlapped ones first; and so on
    fetch_rows: Int64Array  # (FETCHED,)
    evict_slots: Int32Array  # (EVICTED,)
    fetch_slots: Int32Array  # (FETCHED,)
    is_cut: bool
    """Whether more rows move than were asked for."""


class Answers:
    """Asks the device, and reads what it said. One thread uses it, with one stream."""

    def __init__(self, device: torch.device) -> None:
        """Asks for nothing yet."""
        self._device = device
        self._states: list[State] = []
        self._rooms: list[_Room] = []
        self._sizes: tuple[int, ...] = ()
        self._copies: dict[int, _Copy] = {}
        """By place in the ring of plans, for these states and sizes."""

    def ask(self, states: Sequence[State], step: int) -> None:
        """Asks for the answer of each group, on the current stream.

        `step` is the last one that was planned.
        """
        if len(self._rooms) != len(states):
            self._rooms = [_Room() for _ in states]
        sizes = tuple(
            min(room.size, state.capacity.max_uniques)
            for room, state in zip(self._rooms, states, strict=True)
        )
        if sizes != self._sizes or any(
            state is not other for state, other in zip(states, self._states, strict=True)
        ):
            self._states, self._sizes = list(states), sizes
            self._copies.clear()
            self._packed = torch.empty(
                sum(map(_num_words, sizes)), dtype=torch.int32, device=self._device
            )
        place = step % states[0].window.num_plans
        if place not in self._copies:
            self._copies[place] = _Copy(states, sizes, place, self._packed)
        self._copies[place].issue()

    def read(self, step: int) -> list[GroupAnswer]:
        """The answers by group, once the device is there."""
        copy = self._copies[step % self._states[0].window.num_plans]
        answers = copy.read()
        for room, answer in zip(self._rooms, answers, strict=True):
            if answer.header[STEP] == step:
                room.note(max(answer.header[EVICTED], answer.header[FETCHED]))
        return answers


class _Room:
    """How many moved rows of a step are asked for."""

    def __init__(self) -> None:
        self.size = _SMALLEST
        self._most, self._num_steps = 0, 0

    def note(self, number: int) -> None:
        """A step has moved so many."""
        self._most, self._num_steps = max(self._most, number), self._num_steps + 1
        is_over = self._num_steps == _STEPS_OF_ROOM
        if number > self.size or (is_over and 2 * self._most < self.size):
            wanted = self._most + self._most // 4
            self.size = max(1, -(-wanted // _SMALLEST)) * _SMALLEST
        if is_over:
            self._most, self._num_steps = 0, 0


class _Copy:
    """The copy of one place's answers: what is packed, where to, and how to read it."""

    def __init__(
        self, states: Sequence[State], sizes: Sequence[int], place: int, packed: Tensor
    ) -> None:
        self._packed, self._sizes, self._sources = packed, sizes, list[Tensor]()
        self._pinned = torch.empty(
            len(packed), dtype=torch.int32, pin_memory=packed.device.type == "cuda"
        )
        words, begin = self._pinned.numpy(), 0
        self._arrays: list[list[np.ndarray[Any, Any]]] = []
        for state, size in zip(states, sizes, strict=True):
            moved = [getattr(state, name)[place, :size] for name in _MOVED]
            # 64 bits before 32, so that each begins at a multiple of its size
            sources = [state.alert, state.plan_headers[place], *moved]
            arrays = []
            for source in sources:
                end = begin + source.nbytes // 4
                is_wide = source.dtype == torch.int64
                arrays.append(words[begin:end].view(np.int64 if is_wide else np.int32))
                begin = end
            self._sources += [source.view(torch.int32) for source in sources]
            self._arrays.append(arrays)

    def issue(self) -> None:
        torch.cat(self._sources, out=self._packed)
        self._pinned.copy_(self._packed, non_blocking=True)

    def read(self) -> list[GroupAnswer]:
        answers = []
        for size, (alert, numbers, *moved) in zip(self._sizes, self._arrays, strict=True):
            header = numbers.tolist()
            num_evicted, num_fetched = header[EVICTED], header[FETCHED]
            evict_rows, fetch_rows, evict_slots, fetch_slots = moved
            answers.append(
                GroupAnswer(
                    alert=Alert.of(alert.tolist()),
                    header=header,
                    evict_rows=evict_rows[:num_evicted],
                    fetch_rows=fetch_rows[:num_fetched],
                    evict_slots=evict_slots[:num_evicted],
                    fetch_slots=fetch_slots[:num_fetched],
                    is_cut=max(num_evicted, num_fetched) > size,
                )
            )
        return answers


def _num_words(size: int) -> int:
    return 2 * (ALERT_LENGTH + HEADER_LENGTH) + 6 * size
