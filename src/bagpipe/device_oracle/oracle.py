"""One group's oracle on one device: its state, and the two functions that run on it.

`enter` and `plan` are called once for each batch and step, in order, with `lookahead` batches
between them. They only issue work on the current stream, on CUDA as graphs once these are captured.
`bagpipe.device_oracle.answers` brings to the host what it must know.

One thread issues. Another one, the trainer's, captures graphs: a capture forbids others to wait for
the whole device, as the trainer's thread may.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from bagpipe.cache.captured import captured_graph
from bagpipe.cache.device_plan import PlanRings
from bagpipe.device_oracle import alerts, entering, planning
from bagpipe.device_oracle.alerts import Alert, grown
from bagpipe.device_oracle.cuts import Cuts
from bagpipe.device_oracle.made import Kind, rings_of
from bagpipe.device_oracle.staged import StagedIds, write
from bagpipe.device_oracle.state import Capacity, State, Window, make_state
from bagpipe.errors import ConfigError, UsageError
from bagpipe.types import Group

MAX_SHARE_OF_ROWS = 0.125
"""Share of the device's memory that what is kept of each row may take."""
_BYTES_A_ROW = 8
_PLANS_BEFORE_CAPTURE = 8
"""Plans with one capacity before graphs are captured for it: the first batches make it grow."""
Function: TypeAlias = Callable[[State], None]
_logger = logging.getLogger("bagpipe.lookahead")


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
        self._enter, self._plan = functions_for(device)
        self.num_capacities = 1
        """How many capacities it has had."""
        self._graphs: dict[Function, torch.cuda.CUDAGraph] = {}
        self._rings: dict[Kind, PlanRings] = {}
        self._can_capture = device.type == "cuda"
        self._num_plans = 0  # with this capacity
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
            self._run(self._enter)

    def plan(self) -> None:
        """Plans the next step, whose batch must have entered."""
        with self._issuing:
            self._run(self._plan)
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
            self._replace(grown(self.capacity, num_uniques=alert.detail))
            self.state.alert.zero_()

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
                for function in (self._enter, self._plan):
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
        self.state = make_state(self.group, self.window, capacity, self._device, self.state)
        self.cuts = Cuts(self.state)

    def _run(self, function: Function) -> None:
        graph = self._graphs.get(function)
        if graph is None:
            function(self.state)
        else:
            graph.replay()


def functions_for(device: torch.device) -> tuple[Function, Function]:
    """`enter` and `plan` for a device: in Triton for CUDA, else of torch operations."""
    if device.type == "cuda":
        from bagpipe.device_oracle import entering_triton, planning_triton

        return entering_triton.enter, planning_triton.plan
    return entering.enter, planning.plan


def has_room_for_rows(groups: Sequence[Group], device: torch.device) -> bool:
    """Whether a device may keep what the oracle knows of each row."""
    return not _excess_of_rows(groups, device)


def check_rows(groups: Sequence[Group], device: torch.device) -> None:
    """Raises ConfigError if what is kept of each row takes too much of the device's memory."""
    excess = _excess_of_rows(groups, device)
    if excess:
        raise ConfigError(excess)


def _excess_of_rows(groups: Sequence[Group], device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    num_rows = sum(group.num_rows for group in groups)
    needed = _BYTES_A_ROW * num_rows
    if needed <= MAX_SHARE_OF_ROWS * total:
        return ""
    return (
        f"the oracle on the device keeps {_BYTES_A_ROW} bytes of each of {num_rows:,} rows of "
        f"all tables, {needed / 2**30:.1f} GiB, which is more than {MAX_SHARE_OF_ROWS:.1%} of "
        f"the device's {total / 2**30:.1f} GiB: plan on the host (oracle = 'process')"
    )
