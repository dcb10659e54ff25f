"""Whether messages arrive, and whether each gradient reaches its row's owner once (invariant 8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from bagpipe.oracle.checks.rows import Rows
from bagpipe.oracle.checks.rules import Rules
from bagpipe.oracle.checks.steps import Step
from bagpipe.plan import GradientSchedule, RowExchange
from bagpipe.types import Group, Int64Array

_NOBODY = np.uint64(0)


def delivered(
    rules: Rules, exchanges: Sequence[RowExchange], sent: Sequence[Int64Array], name: str
) -> list[Int64Array]:
    """By receiver what has been sent to it, by sender; both must count alike."""
    parts = []
    for rank, exchange in enumerate(exchanges):
        is_of_all = len(exchange.send_counts) == len(exchange.receive_counts) == len(exchanges)
        rules.expect(8, f"{name} has counts of other ranks than there are", is_of_all, rank)
    for rank, exchange in enumerate(exchanges):
        expect, counts = partial(rules.expect, rank=rank), exchange.send_counts
        expect(8, f"{name} has other counts than rows", counts.sum() == len(exchange.send))
        expect(8, f"{name} sends rows to itself", counts[rank] == 0)
        expected = [int(theirs.receive_counts[rank]) for theirs in exchanges]
        is_expected = counts.tolist() == expected
        expect(8, f"{name} sends other numbers of rows than are expected", is_expected)
        parts.append(np.split(sent[rank], np.cumsum(counts)[:-1]))
    return [np.concatenate([part[rank] for part in parts]) for rank in range(len(exchanges))]


class Gradients:
    """Who uses the rows of the step at hand, and who gets whose gradients."""

    def __init__(self, rules: Rules, group: Group, rows: Rows) -> None:
        self._rules, self._rows = rules, rows
        self._users = np.zeros(group.num_rows, np.uint64)  # of the step at hand, a bit a rank

    def check(self, now: Step) -> Int64Array:
        """Checks that all gradients of a step are applied.

        Returns:
            The rows whose gradients travel behind compute.
        """
        for rank, rows in enumerate(now.rows):
            self._users[rows] |= np.uint64(1) << np.uint64(rank)
        urgent, overlapped = (self._updated(now, moment) for moment in ("urgent", "overlapped"))
        updated = np.concatenate([urgent, overlapped])
        num_used = np.count_nonzero(self._users[updated])
        is_once = len(np.unique(updated)) == len(updated) == num_used
        self._rules.expect(8, "a row is updated twice, or unused", is_once)
        self._users[updated] = _NOBODY
        for rank, rows in enumerate(now.rows):
            is_done = not self._users[rows].any()
            self._rules.expect(8, "a row that it uses is not updated", is_done, rank)
        return overlapped

    def _updated(self, now: Step, moment: str) -> Int64Array:
        """The rows that all ranks update at one moment.

        Each must get the gradients of all its users, in the order of ranks.
        """
        exchanges = now.sent("sync", moment)
        for rank, exchange in enumerate(exchanges):
            self._rules.expect_places(exchange.send, len(now.rows[rank]), rank)
        sent = [rows[each.send] for rows, each in zip(now.rows, exchanges, strict=True)]
        received = delivered(self._rules, exchanges, sent, f"sync_{moment}")
        found = []
        for rank, own in enumerate(now.rows):
            schedule = getattr(now.exchanges[rank], f"apply_{moment}")
            senders = np.repeat(range(len(exchanges)), exchanges[rank].receive_counts)
            senders = np.concatenate([np.full(len(own), rank), senders])
            rows = np.concatenate([own, received[rank]])
            found.append(self._check_schedule(rank, schedule, rows, senders, len(own)))
        return np.concatenate(found)

    def _check_schedule(
        self,
        rank: int,
        schedule: GradientSchedule,
        rows: Int64Array,
        senders: Int64Array,
        num_own: int,
    ) -> Int64Array:
        """The rows that a rank updates.

        Its gradients are of `rows` (n,), by `senders` (n,); the first `num_own` are its own.
        """
        expect = partial(self._rules.expect, rank=rank)
        slots, places, ends = schedule.unique_slots, schedule.bags, schedule.piece_offsets
        self._rules.expect_places(slots, self._rows.num_slots, rank)
        self._rules.expect_places(places, len(rows), rank)
        counts = np.diff(ends)
        is_whole = len(ends) == len(slots) + 1 and ends[0] == 0 and ends[-1] == len(places)
        is_whole = is_whole and (counts > 0).all() and len(schedule.long_uniques) == 0
        expect(8, "gradients and the rows that they are for do not fit", is_whole)
        is_all = np.count_nonzero(places >= num_own) == len(rows) - num_own
        expect(8, "a gradient sent to it is not applied", is_all)
        updated, by = self._rows.at(rank, slots), senders[places]
        is_own = np.array_equal(rows[places], np.repeat(updated, counts))
        expect(8, "a row gets the gradient of another", is_own)
        is_ascending = by[1:] > by[:-1]
        is_ascending[ends[1:-1] - 1] = True  # between rows
        expect(8, "gradients are not added in the order of ranks", is_ascending.all())
        if len(slots):
            users = np.bitwise_or.reduceat(np.uint64(1) << by.astype(np.uint64), ends[:-1])
            is_of_all = np.array_equal(users, self._users[updated])
            expect(8, "a row does not get the gradients of all its users", is_of_all)
        return updated
