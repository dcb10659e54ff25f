"""The messages of a step that pass between trainers, each counted and named in errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DeviceExchange
from bagpipe.cache.exchange_step import ExchangeStep
from bagpipe.cache.ways import Way
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.native.spans import span
from bagpipe.plan import GroupExchange, RowExchange

_WORD_BYTES = 4
_ExchangeT = TypeVar("_ExchangeT", GroupExchange, DeviceExchange)


class RowMessages:
    """Sends one stream's messages, on the current stream of a device."""

    def __init__(self, communicator: Communicator, caches: Sequence[DeviceCache], way: Way) -> None:
        """Sends nothing yet.

        Args:
            communicator: counts bytes.
            caches: by group.
            way: how rows travel.
        """
        self._communicator, self._caches, self._way = communicator, tuple(caches), way

    def send_replicas(self, step: ExchangeStep, moment: Moment) -> None:
        """Sends a step's replicas to their users and receives this rank's, of all groups."""
        for index, cache in enumerate(self._caches):
            exchange = of_plan(step.plan.groups[index].exchange)
            begin = exchange.first_replica
            if moment == "urgent":
                begin += exchange.replicas_overlapped.num_received
            with span(f"replicas_{moment}"):
                self._exchange(step, index, f"replicas_{moment}", cache.words, begin)

    def sync(self, step: ExchangeStep, moment: Moment) -> None:
        """Sends gradients to the rows' owners, receives those of own rows, and applies what is due.

        It does so for all groups that have gradients. What is received lies behind this rank's own
        sums.
        """
        for index in sorted(step.sums):  # none where no rank has called backward
            sums, exchange = step.sums[index], of_plan(step.on_device[index].exchange)
            apply = exchange.apply_urgent if moment == "urgent" else exchange.apply_overlapped
            with span(f"sync_{moment}"):
                begin = sums.first + step.plan.groups[index].num_uniques
                self._exchange(step, index, f"sync_{moment}", sums.values, begin)
                self._caches[index].apply(apply, sums.values, rate=step.rates[index])

    def note_launched(self, step: ExchangeStep, name: str) -> None:
        """Notes rows that a graph exchanges: those that a `GroupExchange` calls `name`."""
        assert self._way.launcher is not None
        for index in range(len(self._caches)):
            _, what = self._note_sent(step, index, name)
            self._way.launcher.note(_moment_of(name), step.plan.step, what)

    def _exchange(
        self, step: ExchangeStep, index: int, name: str, values: Tensor, first_received: int
    ) -> None:
        rows, what = self._note_sent(step, index, name)
        self._way.exchange(
            values,
            first_received,
            getattr(of_plan(step.on_device[index].exchange), name),
            rows,
            moment=_moment_of(name),
            step=step.plan.step,
            what=what,
        )

    def _note_sent(self, step: ExchangeStep, index: int, name: str) -> tuple[RowExchange, str]:
        """Counts a message; returns its rows, and what errors call it."""
        rows: RowExchange = getattr(of_plan(step.plan.groups[index].exchange), name)
        cache, is_replicas = self._caches[index], name.startswith("replicas")
        width = cache.words.shape[1] if is_replicas else cache.group.embedding_dim
        self._communicator.note_sent(
            _WORD_BYTES * len(rows.send) * width, moment=_moment_of(name), step=step.plan.step
        )
        return rows, f"{'replicas' if is_replicas else 'gradients'} of {cache.group.name}"


def of_plan(exchange: _ExchangeT | None) -> _ExchangeT:
    """The exchange of a plan for several trainers."""
    assert exchange is not None
    return exchange


def _moment_of(name: str) -> Moment:
    return "urgent" if name.endswith("urgent") else "overlapped"
