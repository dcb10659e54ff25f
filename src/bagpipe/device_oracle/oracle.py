"""One group's oracle on one device: its state, and the functions that run on it.

`enter` and `plan` are called once for each batch and step, in order, with `lookahead` batches
between them. They only issue work on the current stream, on CUDA as graphs once these are captured.
`bagpipe.device_oracle.answers` brings to the host what it must know.

One thread issues. Another one, the trainer's, captures graphs: a capture forbids others to wait for
the whole device, as the trainer's thread may.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch

from bagpipe.cache.captured import captured_graph
from bagpipe.cache.device_plan import PlanRings
from bagpipe.device_oracle import alerts, entering, planning, row_index
from bagpipe.device_oracle.alerts import Alert, grown
from bagpipe.device_oracle.cuts import Cuts
from bagpipe.device_oracle.made import Kind, rings_of
from bagpipe.device_oracle.staged import StagedIds, write
from bagpipe.device_oracle.state import Capacity, State, Window, make_state
from bagpipe.errors import UsageError
from bagpipe.types import Group

_MAX_SHARE_OF_ROWS = 0.125
"""Share of the device's memory that indexes of all rows may take; beyond it they are maps."""
_BYTES_A_ROW = 8
_BYTES_A_SLOT = 52
"""Where the index of rows is a map, which takes 40 of them: see `state`."""
_PLANS_BEFORE_CAPTURE = 8
"""Plans with one capacity before graphs are captured for it: the first batches make it grow."""
Function: TypeAlias = Callable[[State], None]
_logger = logging.getLogger("bagpipe.lookahead")


class Functions(NamedTuple):
    """What runs on the device."""

    enter: Function
    plan: Function
    rebuild: Callable[[State, State], None]

    def forget(self, state: State) -> None:
        """Rebuilds the index of rows in its place."""
        self.rebuild(state, state)


class DeviceOracle:
    """The oracle of one group on one device."""

    def __init__(
        self, group: Group, window: Window, device: torch.device, capacity: Capacity | None = None
    ) -> None:
        """Makes an empty cache and an empty window.

        Args:
            group: The tables.
            window: The cache, and how far the oracle sees.
            device: Where it runs.
            capacity: The largest batch to expect; by default it grows with the batches.
        """
        self.group, self.window, self._device = group, window, device
        small = Capacity(
            max_lookups=1,
            max_bags=1,
            max_uniques=1,
            is_jagged=False,
            is_weighted=False,
            is_wide=False,
        )
        self.state = make_state(group, window, capacity or small, device)
        self.cuts = Cuts(self.state)
        """For the thread that issues."""
        self._functions = functions_for(device)
        self.num_capacities = 1
        """How many capacities it has had."""
        self._graphs: dict[Function, torch.cuda.CUDAGraph] = {}
        self._rings: dict[Kind, PlanRings] = {}
        self._can_capture = device.type == "cuda"
        self._num_plans = 0  # with this capacity
        self._num_entered = 0  # since the index of rows was rebuilt
        self._issuing = threading.Lock()

    @property
    def capacity(self) -> Capacity:
        """The largest batch that there is room for."""
        return self.state.capacity

    def enter(self, staged: StagedIds) -> None:
        """Lets the next batch enter the window, growing first if the host knows it must.

        Whether it could, `alert` says. `staged` must stay until the device has copied it.
        """
        capacity = self._with_room_for(staged)
        with self._issuing:
            if capacity != self.capacity:
                self._replace(capacity)
            write(self.state, self.cuts, staged)
            if not self.window.knows_all_rows:
                self._forget_if_due()
            self._run(self._functions.enter)

    def plan(self) -> None:
        """Plans the next step, whose batch must have entered."""
        with self._issuing:
            self._run(self._functions.plan)
            self._num_plans += 1

    def alert(self) -> Alert | None:
        """Why the device has stopped, if it has; waits for what the current stream has to do."""
        return Alert.of(self.state.alert.tolist())

    def grow(self, alert: Alert) -> None:
        """Makes room for the batch that stopped the device, and lets it go on.

        Batches from that one on must then enter again.

        Raises:
            UsageError: It stopped for another reason.
        """
        if alert.reason != alerts.NO_ROOM:
            raise UsageError(f"{self.group.name}: more room does not help with {alert}")
        with self._issuing:
            self.state.alert.zero_()  # first, so that one of rebuilding the index stays
            self._replace(grown(self.capacity, num_uniques=alert.detail))

    def capture_if_due(self) -> None:
        """Captures graphs if the capacity has held for some steps.

        No other thread may wait for the whole device meanwhile, so the trainer's thread calls it.
        """
        if not self._is_capture_due:
            return
        with self._issuing:
            if not self._is_capture_due:  # it has grown since
                return
            stream = torch.cuda.Stream(self._device)
            try:
                for function in self._captured_functions():
                    with captured_graph(stream) as graph:
                        function(self.state)
                    self._graphs[function] = graph
            except RuntimeError as error:
                self._graphs.clear()
                self._can_capture = False
                _logger.warning(
                    "%s: the oracle's graphs could not be captured, so its work is issued call by "
                    "call, which takes the host longer: %s",
                    self.group.name,
                    error,
                )

    def rings_for(self, kind: Kind) -> PlanRings | None:
        """The rings of plans for batches of a kind, once the capacity has held for some steps.

        They are the same object as long as the capacity holds.
        """
        if not self._is_settled:
            return None
        if kind not in self._rings:
            self._rings[kind] = rings_of(self.state, kind)
        return self._rings[kind]

    @property
    def _is_settled(self) -> bool:
        return self._num_plans >= _PLANS_BEFORE_CAPTURE

    @property
    def _is_capture_due(self) -> bool:
        return self._is_settled and self._can_capture and not self._graphs

    def _captured_functions(self) -> tuple[Function, ...]:
        enter, plan, _ = self._functions
        return (enter, plan, *(() if self.window.knows_all_rows else (self._functions.forget,)))

    def _with_room_for(self, staged: StagedIds) -> Capacity:
        capacity = grown(
            self.capacity,
            num_lookups=staged.num_lookups,
            num_bags=staged.num_bags,
            is_jagged=staged.bag_offsets is not None,
            is_weighted=staged.weights is not None,
            is_wide=staged.is_wide,
        )
        if capacity.max_uniques == 1:  # the first batch: a guess, which may grow
            guess = min(capacity.max_lookups // 2 + 1, self.group.num_rows)
            capacity = grown(capacity, num_uniques=guess)
        return capacity

    def _replace(self, capacity: Capacity) -> None:
        """Goes on with a state of another capacity."""
        self._graphs.clear()
        self._rings.clear()
        self._num_plans = 0
        self.num_capacities += 1
        self._num_entered = 0
        old = self.state
        self.state = make_state(self.group, self.window, capacity, self._device, old)
        self._functions.rebuild(self.state, old)
        self.cuts = Cuts(self.state)

    def _forget_if_due(self) -> None:
        """Rebuilds a map before its entries may become too few. It counts all that may enter."""
        if self._num_entered == self.window.batches_between:
            self._num_entered = 0
            self._run(self._functions.forget)
        self._num_entered += 1

    def _run(self, function: Function) -> None:
        graph = self._graphs.get(function)
        if graph is None:
            function(self.state)
        else:
            graph.replay()


def functions_for(device: torch.device) -> Functions:
    """What runs on a device: Triton for CUDA, else torch operations."""
    if device.type == "cuda":
        from bagpipe.device_oracle import entering_triton, planning_triton, row_index_triton

        return Functions(entering_triton.enter, planning_triton.plan, row_index_triton.rebuild)
    return Functions(entering.enter, planning.plan, row_index.rebuild)


def which_know_all_rows(groups: Sequence[Group], device: torch.device) -> tuple[bool, ...]:
    """By group, whether its index of rows is an array of all of them: see `Window`.

    Arrays of all groups take at most a share of the device's memory. Groups of few rows come first.
    """
    budget = _MAX_SHARE_OF_ROWS * _total_memory(device) / _BYTES_A_ROW
    known = [True] * len(groups)
    for place in sorted(range(len(groups)), key=lambda place: groups[place].num_rows):
        budget -= groups[place].num_rows
        known[place] = budget >= 0
    return tuple(known)


def bytes_beside_slots(groups: Sequence[Group], device: torch.device) -> tuple[int, ...]:
    """What the oracle keeps for each slot of a group whose index of rows is a map; else 0."""
    return tuple(0 if known else _BYTES_A_SLOT for known in which_know_all_rows(groups, device))


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
