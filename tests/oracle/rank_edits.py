"""Edits of one step's plans, to plant faults.

An edit changes what travels and what is applied. The places and counts that follow from it are made
anew: the edited plans agree with each other everywhere else, so that only the fault itself can be
found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tests.oracle.rank_replay import Messages, Planned, applied, exchange_of, messages

from bagpipe.plan import GradientSchedule, RowExchange, StepPlan

WHEN = ("urgent", "overlapped")
Edit = Callable[["Step"], bool]
"""Edits a step; tells whether the step had a place for the edit."""


class Step:
    """One step's exchanges, to be edited."""

    def __init__(self, planned: Planned, index: int) -> None:
        self.plans, self.ranks = planned.plans[index], range(len(planned.plans[index]))
        self.rows = [planned.rows(index, rank) for rank in self.ranks]
        self.sends = {
            f"{kind}_{when}": messages(self.plans, f"{kind}_{when}")
            for kind in ("replicas", "sync")
            for when in WHEN
        }
        self.applies = {when: [self._apply(rank, when) for rank in self.ranks] for when in WHEN}
        self.before, self.after = (
            {row for share in planned.lookups[beside] for row in share}
            for beside in (index - 1, index + 1)
        )
        self.urgent = {
            row for plan in self.plans for row in plan.groups[0].urgent.fetch_rows.tolist()
        }
        self.is_urgent_next = planned.plans[index + 1][0].has_urgent
        self._before_edit = [self._replicas(rank) for rank in self.ranks]
        self.rows_of_replicas = {
            place: self.rows[rank][
                plan.groups[0]
                .schedule.unique_slots.tolist()
                .index(exchange_of(plan).first_replica + number)
            ]
            for rank, plan in enumerate(self.plans)
            for number, place in enumerate((by, rank, slot) for by, slot in self._before_edit[rank])
        }

    def encoded(self) -> tuple[StepPlan, ...]:
        return tuple(self._plan(rank) for rank in self.ranks)

    def move_replica(self, origin: str, to: str, is_meant: Callable[[int], bool]) -> bool:
        for (by, user), slots in self.sends[f"replicas_{origin}"].items():
            for slot in slots:
                if is_meant(self.rows_of_replicas[by, user, slot]):
                    slots.remove(slot)
                    self.sends[f"replicas_{to}"][by, user].append(slot)
                    return True
        return False

    def find_update(
        self, when: str, is_meant: Callable[[int], bool] = lambda row: True
    ) -> tuple[int, int] | None:
        """Finds the (owner, slot) of a row updated with gradients of its owner and of others."""
        for rank in self.ranks:
            for slot, parts in self.applies[when][rank].items():
                by, unique = parts[0]
                if len(parts) > 1 and rank in dict(parts) and is_meant(self.rows[by][unique]):
                    return rank, slot
        return None

    def move_update(self, origin: str, to: str, is_meant: Callable[[int], bool]) -> bool:
        if (found := self.find_update(origin, is_meant)) is None:
            return False
        owner, slot = found
        parts = self.applies[to][owner][slot] = self.applies[origin][owner].pop(slot)
        for by, unique in parts:
            if by != owner:
                self.sends[f"sync_{origin}"][by, owner].remove(unique)
                self.sends[f"sync_{to}"][by, owner].append(unique)
        return True

    def _replicas(self, rank: int) -> list[tuple[int, int]]:
        """The (sender, its slot) of all that the rank receives, in order."""
        return [
            (by, slot)
            for when in ("overlapped", "urgent")
            for by in self.ranks
            for slot in self.sends[f"replicas_{when}"][by, rank]
        ]

    def _sums(self, rank: int, when: str) -> list[tuple[int, int]]:
        """The (sender, index of its row) of all gradients that the rank has when it applies."""
        received = [
            (by, unique) for by in self.ranks for unique in self.sends[f"sync_{when}"][by, rank]
        ]
        return [(rank, unique) for unique in range(len(self.rows[rank]))] + received

    def _apply(self, rank: int, when: str) -> dict[int, list[tuple[int, int]]]:
        """By slot what is added up."""
        schedule, sums = applied(self.plans[rank], when), self._sums(rank, when)
        parts = np.split(schedule.bags, schedule.piece_offsets[1:-1])
        return {
            slot: [sums[place] for place in part]
            for slot, part in zip(schedule.unique_slots.tolist(), parts, strict=False)
        }

    def _plan(self, rank: int) -> StepPlan:
        group = self.plans[rank].groups[0]
        exchange, slots = exchange_of(self.plans[rank]), group.schedule.unique_slots.copy()
        for index, slot in enumerate(slots.tolist()):
            if slot >= exchange.first_replica:
                replica = self._before_edit[rank][slot - exchange.first_replica]
                slots[index] = exchange.first_replica + self._replicas(rank).index(replica)
        changed: dict[str, Any] = {
            name: self._rows(rank, sent) for name, sent in self.sends.items()
        }
        changed |= {f"apply_{when}": self._schedule(rank, when) for when in WHEN}
        exchange = replace(exchange, **changed)
        group = replace(
            group, exchange=exchange, schedule=replace(group.schedule, unique_slots=slots)
        )
        return replace(self.plans[rank], groups=(group,))

    def _rows(self, rank: int, sent: Messages) -> RowExchange:
        return RowExchange(
            send=np.array([item for to in self.ranks for item in sent[rank, to]], np.int32),
            send_counts=np.array([len(sent[rank, to]) for to in self.ranks], np.int64),
            receive_counts=np.array([len(sent[by, rank]) for by in self.ranks], np.int64),
        )

    def _schedule(self, rank: int, when: str) -> GradientSchedule:
        sums, parts_by_slot = self._sums(rank, when), self.applies[when][rank]
        return GradientSchedule(
            unique_slots=np.array(list(parts_by_slot), np.int32),
            bags=np.array(
                [sums.index(part) for parts in parts_by_slot.values() for part in parts], np.int32
            ),
            piece_offsets=np.cumsum([0, *(len(parts) for parts in parts_by_slot.values())]).astype(
                np.int32
            ),
            long_uniques=np.empty(0, np.int32),
            long_offsets=np.zeros(1, np.int32),
        )


def drop_gradient(step: Step, *, is_own: bool, is_sent: bool) -> bool:
    """Drops the owner's or another rank's contribution from an apply schedule.

    `is_sent` says whether another rank's is sent all the same.
    """
    if (found := step.find_update("urgent")) is None:
        return False
    owner, slot = found
    parts = step.applies["urgent"][owner][slot]
    part = next(part for part in parts if (part[0] == owner) == is_own)
    parts.remove(part)
    if not is_own and not is_sent:
        step.sends["sync_urgent"][part[0], owner].remove(part[1])
    return True


def swap_gradients(step: Step) -> bool:
    """Adds up a row's gradients in the order of ranks from last to first."""
    if (found := step.find_update("urgent")) is None:
        return False
    owner, slot = found
    step.applies["urgent"][owner][slot].reverse()
    return True


def update_twice(step: Step) -> bool:
    """Applies a row's gradients twice, urgently and overlapped."""
    if (found := step.find_update("urgent")) is None:
        return False
    owner, slot = found
    parts = step.applies["overlapped"][owner][slot] = step.applies["urgent"][owner][slot]
    for by, unique in parts:
        if by != owner:
            step.sends["sync_overlapped"][by, owner].append(unique)
    return True


def send_for_nothing(step: Step) -> bool:
    """Rank 0 sends rank 1 one more of its rows, which rank 1 does not use."""
    sent = {slot for when in WHEN for slot in step.sends[f"replicas_{when}"][0, 1]}
    slots = step.plans[0].groups[0].schedule.unique_slots.tolist()
    unneeded = [
        slot
        for slot in slots
        if slot < exchange_of(step.plans[0]).first_replica and slot not in sent
    ]
    step.sends["replicas_urgent"][0, 1] += unneeded[:1]
    return bool(unneeded)


_CHANGES = "what is sent behind compute changes meanwhile"

_OLD = "a replica travels behind the compute that updates its row"
_BEHIND = r"a replica is sent before its gradients are applied \(overlapped\)"
_EMPTY = r"an empty slot is sent as a replica \(overlapped\)"
_NOT_ALL = "a row does not get the gradients of all its users"

FAULTS: dict[str, tuple[Edit, str, str]] = {
    "a replica a step early": (
        lambda step: step.move_replica("urgent", "overlapped", lambda row: row in step.before),
        rf"{_CHANGES}|a lookup of row",
        rf"{_OLD}|{_BEHIND}",
    ),
    "a replica before its fetch": (
        lambda step: step.move_replica(
            "urgent", "overlapped", lambda row: row in step.urgent and row not in step.before
        ),
        rf"{_CHANGES}|a lookup of row",
        rf"{_EMPTY}|{_OLD}|{_BEHIND}|a row is not in its slot",
    ),
    "a gradient a step too late": (
        lambda step: (
            not step.is_urgent_next
            and step.move_update("urgent", "overlapped", lambda row: row in step.after)
        ),
        rf"{_CHANGES}|a lookup of row \d+ finds \(",
        r"a replica is sent before its gradients are applied \(urgent\)"
        r"|a row is looked up before its gradients are applied",
    ),
    "another's gradient dropped": (
        lambda step: drop_gradient(step, is_own=False, is_sent=True),
        "a gradient sent is not applied",
        "a gradient sent to it is not applied",
    ),
    "another's gradient not sent": (
        lambda step: drop_gradient(step, is_own=False, is_sent=False),
        "gets gradients of ranks",
        _NOT_ALL,
    ),
    "its own gradient dropped": (
        lambda step: drop_gradient(step, is_own=True, is_sent=True),
        "gets gradients of ranks",
        _NOT_ALL,
    ),
    "gradients out of order": (
        swap_gradients,
        "gets gradients of ranks",
        "gradients are not added in the order of ranks",
    ),
    "a row updated twice": (
        update_twice,
        "a row is not updated once",
        "a row is updated twice, or unused",
    ),
    "a replica for nobody": (
        send_for_nothing,
        "it is sent rows that it does not use",
        "it is sent rows that it does not use",
    ),
}
"""By name the edit, what the tests' replay must say of it, and what the package's."""

HARMLESS: dict[str, Edit] = {
    "nothing": lambda step: True,
    "a replica later than it could be": lambda step: step.move_replica(
        "overlapped", "urgent", lambda row: True
    ),
    "a gradient sooner than it need be": lambda step: step.move_update(
        "overlapped", "urgent", lambda row: True
    ),
}
"""Edits that cost time alone."""
