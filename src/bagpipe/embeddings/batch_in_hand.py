"""The batch that `bagpipe.lookahead` handed out last: its rows are in the cache, for one update."""

from __future__ import annotations

from typing import Protocol

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.executor import Executor
from bagpipe.cache.graph_rows import GraphRows
from bagpipe.embeddings.executor_part import ExecutorPart
from bagpipe.errors import UsageError
from bagpipe.jagged import as_jagged, same_ids


class Stream(Protocol):
    """What embeddings know of the `bagpipe.lookahead` that serves them."""

    def flush_between_steps(self) -> None:
        """See `Lookahead.flush_between_steps`."""


class BatchInHand:
    """What one collection remembers of the batch that is being trained.

    A module takes 20 us to set an attribute of its own, so this is no module.
    """

    def __init__(self) -> None:
        self.step = 0
        """Steps trained so far."""
        self.to_update: tuple[DevicePlan, ...] = ()
        """Plans of the last `lookup`, up to its update."""
        self._sparse: object = None
        self.was_asked = False
        """Whether anybody has asked for its embeddings."""
        self.was_served = False
        """Whether they were given out for an update, which may come once."""

    def expect(self, sparse: object) -> None:
        """Takes `sparse` as the ids of the batch that has just been handed out."""
        self._sparse, self.was_asked, self.was_served = sparse, False, False

    def let_go(self) -> None:
        """Keeps no batch alive whose step is over."""
        self._sparse = None

    def plans_of(
        self, sparse: object, executor: Executor | ExecutorPart | None
    ) -> tuple[DevicePlan, ...]:
        """The current step's plans, after a look at whether they can be those of `sparse`.

        Raises:
            UsageError: no batch is being trained, it was served already, or `sparse` has other ids.
        """
        plans = self._check(sparse, executor).current
        assert plans is not None
        return plans

    def _check(
        self, sparse: object, executor: Executor | ExecutorPart | None
    ) -> Executor | ExecutorPart:
        if executor is None or not executor.is_in_step:
            raise UsageError(
                "no batch is being trained: iterate over bagpipe.lookahead(loader, embeddings) and "
                "pass each batch's sparse part, or call eval() to read rows without training"
            )
        if self.was_served:
            raise UsageError(
                f"step {self.step}: forward was called twice for one batch; its rows can be "
                "updated only once"
            )
        if sparse is not self._sparse and not same_ids(as_jagged(sparse), as_jagged(self._sparse)):
            raise UsageError(
                f"step {self.step}: forward was given other ids than those of the batch that "
                "bagpipe.lookahead handed out last; its plan is for that batch alone"
            )
        self.was_asked = True
        return executor

    def rows_in_graph(
        self, sparse: object, executor: Executor | ExecutorPart | None
    ) -> GraphRows | None:
        """The current step's rows for a graph, if it can hold them; raises as `plans_of`."""
        executor = self._check(sparse, executor)
        # of several collections none has all groups
        rows = executor.rows_in_graph() if isinstance(executor, Executor) else None
        if rows is not None:
            self.was_served = True
        return rows
