"""What one of several collections sees of the executor that they share: its own groups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.executor import Executor


class ExecutorPart:
    """An `Executor` to the collection that has the groups from `first` on, `num_groups` of them."""

    dense_average = None
    """A single trainer's, as are all parts."""

    def __init__(
        self,
        executor: Executor,
        first: int,
        num_groups: int,
        *,
        end_step: Callable[[], None],
        close: Callable[[bool], None],
    ) -> None:
        """`end_step` and `close`, which is told of a failure, do so for all collections."""
        self._executor, self._first = executor, first
        self._own = slice(first, first + num_groups)
        self._end_step, self._close = end_step, close
        self.caches = executor.caches[self._own]
        self._whole: tuple[DevicePlan, ...] | None = None
        self._current: tuple[DevicePlan, ...] | None = None

    @property
    def current(self) -> tuple[DevicePlan, ...] | None:
        """The plans of the step that is being computed, by own group; the same value throughout."""
        whole = self._executor.current
        if whole is not self._whole:
            self._whole, self._current = whole, None if whole is None else whole[self._own]
        return self._current

    @property
    def is_in_step(self) -> bool:
        """Whether a step is being computed."""
        return self._executor.is_in_step

    @property
    def step(self) -> int:
        """The number of the step that is being computed, or comes next."""
        return self._executor.step

    def is_current(self, plan: DevicePlan) -> bool:
        """Whether `plan` belongs to the step that is being computed."""
        return self._executor.is_current(plan)

    def update(self, index: int, plan: DevicePlan, grads: Tensor) -> None:
        """Applies one optimizer step of the collection's group `index`."""
        self._executor.update(self._first + index, plan, grads)

    def undivided(self) -> AbstractContextManager[None]:
        """For work in which no interrupt may come."""
        return self._executor.undivided()

    def end_step(self) -> None:
        """Ends the step of all collections."""
        self._end_step()

    def flush(self) -> None:
        """Writes the resident records of all collections to their stores."""
        self._executor.flush()

    def close(self, *, has_failed: bool = False) -> None:
        """Ends the stream of all collections."""
        self._close(has_failed)
