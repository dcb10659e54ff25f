"""Plans that the host has made, in rings on the device, where kernels in graphs find them.

A plan's arrays travel by one copy, and one kernel puts them into place step % K of their rings. It
finds them by a header in the host's memory, of which it copies what others read. The capacity of a
ring is what plans so far needed, and a quarter more. A plan that needs more gets new rings: those
of steps before live on in their plans.

A place is written again K steps later. What moves there follows the compute of earlier steps
(`Streams.computed`), and K is enough for the steps that are known ahead and for those whose last
gradients are still on their way. So nothing reads the place any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import MOVES, DeviceGroup, DeviceTransfers, plan_to_device
from bagpipe.cache.moved import MovedArray, cut_out, words_to_device
from bagpipe.cache.overlap import Streams
from bagpipe.cache.plan_layout import (
    PlanShape,
    arrays_of,
    kind_of,
    no_layout,
    numbers_of,
    places_for,
    put_sums_at,
)
from bagpipe.distributed.alone import Peers
from bagpipe.plan import GroupPlan, HostStepPlan
from bagpipe.types import Int64Array

_PLANS_BEFORE_STAY = 8
"""Rings in which so many plans have found room are taken to be there to stay."""


class HostRings:
    """The rings of one group of one executor. The trainer's thread calls it."""

    def __init__(
        self,
        *,
        num_features: int,
        num_trainers: int,
        device: torch.device,
        with_rows: bool = False,
        follow: Callable[[], None] = lambda: None,
    ) -> None:
        """Has no rings yet.

        Args:
            num_features: of the group.
            num_trainers: whose plans have exchanges; 0 for one alone.
            device: where the rings are.
            with_rows: whether the rows to move go there, too, with their slots.
            follow: lets the stream on which plans move follow the compute of steps up to the last
                tick.
        """
        from bagpipe.cache.triton_unpack import unpack  # loads Triton

        self._unpack, self._follow = unpack, follow
        self._moves = MOVES if with_rows else MOVES[:2]
        self._shape = PlanShape(num_features=num_features, num_trainers=num_trainers, device=device)
        self._layout = no_layout(self._shape)
        # Pinned rows for headers. A row comes back when the device has computed its step, and not K
        # steps later: the host may be more steps ahead of the device.
        self._free: deque[tuple[Tensor, Int64Array]] = deque()

    def move(
        self,
        plan: GroupPlan,
        *,
        step: int,
        issue_tick: int,
        batch_size: int,
        along: Sequence[MovedArray] = (),
    ) -> DeviceGroup:
        """Moves a plan into rings on the current stream.

        Args:
            plan: with its overlapped transfers and its exchanges, if it has any.
            step: the number of the step.
            issue_tick: the tick from which on it may move.
            batch_size: the number of samples.
            along: further arrays for the same copy.
        """
        shape, arrays = self._shape, arrays_of(plan)
        beside: list[MovedArray] = [getattr(plan.overlapped, name) for name in self._moves]
        beside += along
        present = [array for array in arrays if array is not None]
        words, begins = words_to_device(present + beside, shape.device)
        lengths = [0 if array is None else len(array) for array in arrays]
        kind, (sizes, numbers) = kind_of(arrays), numbers_of(plan.exchange, lengths, shape)
        layout, num_places = self._layout, places_for(step - issue_tick)
        if not layout.fits(sizes, kind, num_places):
            layout = self._layout = layout.grown(sizes, kind, num_places)
        layout.num_plans += 1
        place, first_sum = step % layout.num_places, layout.first_sum(step)
        if plan.exchange is not None:
            put_sums_at(first_sum, numbers)
        of_present = iter(begins)
        numbers += [0 if array is None else next(of_present) for array in arrays]
        numbers += lengths
        row = self._free.pop() if self._free else self._new_row()
        row[1][: len(numbers)] = numbers
        row[1][len(numbers) :] = layout.ends[place]
        self._follow()  # behind the first copy, which need not wait: only the place must be free
        self._unpack(
            *(words, row[0], layout.header_rows[place], layout.words),
            num_arrays=len(arrays),
            longest=max(lengths),
        )
        moved = cut_out(words, begins[len(present) :], beside)
        return DeviceGroup(
            overlapped=DeviceTransfers(**dict(zip(self._moves, moved, strict=False))),
            along=tuple(moved[len(self._moves) :]),
            plan_of=partial(layout.plan, step, batch_size, lengths, kind),
            exchange_of=partial(layout.exchange, step, lengths),
            rings=layout.rings(kind) if layout.num_plans > _PLANS_BEFORE_STAY else None,
            sums_rows=layout.sums_rows,
            first_sum=first_sum,
            give_back=partial(self._free.append, row),
        )

    def _new_row(self) -> tuple[Tensor, Int64Array]:
        is_pinned = self._shape.device.type == "cuda"
        row = torch.empty(self._shape.width, dtype=torch.int64, pin_memory=is_pinned)
        return row, row.numpy()


class PlanMover:
    """Moves one executor's plans to its device. On a GPU those that the host made go into rings."""

    def __init__(
        self,
        caches: Sequence[DeviceCache],
        peers: Peers,
        streams: Streams | None,
        *,
        with_rows: bool,
    ) -> None:
        """Has no rings yet.

        Args:
            caches: by group.
            peers: with whom plans exchange rows.
            streams: those of a CUDA device.
            with_rows: whether the rows to move go to the device, too, with their slots.
        """
        self._device, self._with_rows = caches[0].device, with_rows
        self._num_features = [len(cache.group.features) for cache in caches]
        self._rings = [
            HostRings(
                num_features=num_features,
                num_trainers=peers.num_trainers if peers.has_others else 0,
                device=self._device,
                with_rows=with_rows,
                follow=(lambda: None) if streams is None else streams.let_out_follow,
            )
            for num_features in self._num_features
            if caches[0].reads_rings
        ]

    def move(self, plan: HostStepPlan, along: Sequence[MovedArray]) -> tuple[DeviceGroup, ...]:
        """A plan's groups on the device; `along` moves with the last, as they lie in memory."""
        last = len(plan.groups) - 1
        return tuple(
            self._group_to_device(plan, index, along if index == last else ())
            for index in range(len(plan.groups))
        )

    def _group_to_device(
        self, plan: HostStepPlan, index: int, along: Sequence[MovedArray]
    ) -> DeviceGroup:
        group = plan.groups[index]
        if self._rings and isinstance(group, GroupPlan):
            return self._rings[index].move(
                group,
                step=plan.step,
                issue_tick=plan.issue_tick,
                batch_size=plan.batch_size,
                along=along,
            )
        return plan_to_device(
            group,
            step=plan.step,
            batch_size=plan.batch_size,
            num_features=self._num_features[index],
            device=self._device,
            along=along,
            with_rows=self._with_rows,
        )
