"""Ranks tell each other step by step what they do, so that they see where they part.

Messages fit together only if all ranks read the same batches, plan them alike and do the same with
each. Otherwise gloo ends a process that is sent more than it waits for, or a rank waits for a
message that another never sends. So before a rank sends anything, it tells in one sentence what it
does next: its *act*. All ranks tell their acts in the same order. Acts have one size and a process
group of their own, so they fit whatever a rank does, and a rank whose act differs is named on all.

    tick t          tells that step t begins; compares what all did up to the end of step t - 1
    backward of t   tells what is updated, and at which rate
    end of step t   tells where there was no backward, or through some of the tables alone
    anything else that all ranks do together    tells it, and compares at once

What the tick compares was told a step ago, so it waits only for a rank that is far behind. A rank
that waits for any message compares meanwhile, and sees whether another one has failed.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from bagpipe.errors import BagpipeError, DataError, UsageError

_ACT_BYTES, _NOTE_BYTES = 192, 128
_BYTES = _ACT_BYTES + _NOTE_BYTES
_LOOK_AFTER = timedelta(seconds=0.5)
"""How long to wait for a message before looking whether it can still come."""
_PLAN = re.compile(
    r"plans step (?P<step>\d+), sees (?P<ahead>\d+) batches behind it, ids (?P<ids>\w+), as \w+"
)
_SAME_BATCHES = (
    "Every rank's loader yields the batches of all trainers together, as many and in the same "
    "order (no DistributedSampler, the same seed for shuffling); each rank is then handed its share"
)


def plan_act(step: int, num_ahead: int, ids_hash: str, plan_hash: str) -> str:
    """The act of a rank that plans for itself."""
    return f"plans step {step}, sees {num_ahead} batches behind it, ids {ids_hash}, as {plan_hash}"


@dataclass(kw_only=True)
class _Told:
    """An act that is on its way."""

    number: int
    needed_at: int  # the first tick whose messages depend on it
    message: Any  # the work of a process group
    acts: bytearray  # of all ranks, one after the other, once the message is there
    has_come: bool = False


class Lockstep:
    """One rank's acts.

    `tell` and `compare` are called by the thread that trains, `wait_for` by any thread.
    """

    def __init__(
        self, group: Any, kv_store: Any, *, rank: int, num_trainers: int, key: str
    ) -> None:
        """Takes a gloo process group that is used for nothing else.

        A rank that failed leaves word under `key` in the key-value store.
        """
        self._group, self._kv_store, self._key = group, kv_store, f"{key}/failed"
        self._rank, self._num_trainers = rank, num_trainers
        self._told: deque[_Told] = deque()
        self._num_told = 0
        self._looking = threading.Lock()
        self._parted: BagpipeError | None = None

    def tell(self, act: str, *, needed_at: int, note: str = "") -> None:
        """Sends an act and returns at once.

        Args:
            act: one sentence, the same on all ranks.
            needed_at: the first tick whose messages depend on it.
            note: explains the act in errors; it is not compared.

        Raises:
            RuntimeError: a rank is gone.
        """
        text = _padded(act, _ACT_BYTES) + _padded(note, _NOTE_BYTES)
        sent = bytearray(text * self._num_trainers)
        acts = bytearray(len(sent))
        message = self._group.alltoall_base(_tensor(acts), _tensor(sent), [], [])
        self._num_told += 1
        self._told.append(
            _Told(number=self._num_told, needed_at=needed_at, message=message, acts=acts)
        )

    def compare(self, tick: int | None = None) -> None:
        """Waits for all acts up to the last that is needed at `tick`, by default for all.

        Raises:
            UsageError: ranks do different things.
            DataError: ranks read different batches.
            RuntimeError: a rank has failed or is gone.
        """
        told = list(self._told)
        while told and tick is not None and told[-1].needed_at > tick:
            told.pop()
        for each in told:
            # One call of the message, not several: each gives Python's lock up, for which the
            # threads of a process that trains queue.
            self.wait_for(each.message)
            each.has_come = True
        # Later acts may be there or not, and all ranks must part at the same tick.
        self._look(told[-1].number if told else 0)

    def do_together(self, act: str) -> None:
        """Tells an act and waits until all ranks do it; raises as `compare`."""
        self.tell(act, needed_at=0)
        self.compare()

    def wait_for(self, message: Any) -> None:
        """Waits for a message on the CPU; raises as `compare` where it will never come."""
        while True:
            try:
                message.wait(_LOOK_AFTER)
            except RuntimeError:
                is_over = message.is_completed()  # it has failed, or come meanwhile
                self._look()
                self.raise_if_failed()  # asked last: who fails leaves word before it goes
                if is_over:
                    message.wait()
                    return
            else:
                return

    def tell_failed(self, error: BaseException) -> None:
        """Leaves word for those that wait for this rank; the first that fails is the one named."""
        text = f"rank {self._rank} has failed: {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the key-value store's process may be gone, too
            self._kv_store.compare_set(self._key, "", text)

    def _look(self, last: int | None = None) -> None:
        """Compares what has come, up to number `last`."""
        with self._looking:
            while self._parted is None and self._told:
                told = self._told[0]
                if last is not None and told.number > last:
                    break
                if not told.has_come:
                    if not told.message.is_completed():
                        break
                    try:
                        told.message.wait()
                    except RuntimeError:
                        self.raise_if_failed()
                        raise
                self._told.popleft()
                if told.acts == told.acts[:_BYTES] * self._num_trainers:
                    continue
                told_by_rank = [
                    told.acts[begin : begin + _BYTES] for begin in range(0, len(told.acts), _BYTES)
                ]
                acts = [each[:_ACT_BYTES] for each in told_by_rank]
                if any(act != acts[0] for act in acts):
                    notes = [each[_ACT_BYTES:] for each in told_by_rank]
                    self._parted = _difference(_texts(acts), _texts(notes))
        if self._parted is not None:
            raise self._parted

    def raise_if_failed(self) -> None:
        """Raises RuntimeError if a rank has left word that it failed; any thread may call it."""
        reason = ""
        with contextlib.suppress(RuntimeError):  # the key-value store's process may be gone, too
            if self._kv_store.check([self._key]):
                reason = self._kv_store.get(self._key).decode()
        if reason:
            raise RuntimeError(reason)


def _padded(text: str, num_bytes: int) -> bytes:
    return text.encode()[:num_bytes].ljust(num_bytes)


def _texts(padded: Sequence[bytearray]) -> list[str]:
    return [each.decode(errors="replace").strip() for each in padded]


def _tensor(memory: bytearray) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def _difference(acts: Sequence[str], notes: Sequence[str]) -> BagpipeError:
    """What to say of acts, by rank, that are not all the same."""
    rank = next(rank for rank, act in enumerate(acts) if act != acts[0])
    plans = [_PLAN.match(act) for act in (acts[0], acts[rank])]
    if plans[0] is None or plans[1] is None or plans[0]["step"] != plans[1]["step"]:
        return UsageError(
            f"trainers part: rank 0 {acts[0]}, but rank {rank} {acts[rank]}. All must do the same "
            "in the same order: train on every batch or skip it, set the learning rate, flush, "
            "evaluate, save and end"
        )
    step, aheads = plans[0]["step"], [int(plan["ahead"]) for plan in plans if plan is not None]
    if plans[0]["ids"] != plans[1]["ids"]:
        return DataError(
            f"ranks read other batches: the ids of step {step} on rank {rank} are not those on "
            f"rank 0. {_SAME_BATCHES}"
        )
    if aheads[0] != aheads[1]:
        fewer = (0, rank)[aheads[1] < aheads[0]]
        why = f": {notes[fewer]}" if notes[fewer] else f". {_SAME_BATCHES}"
        return DataError(
            f"ranks read other batches: behind step {step} rank 0 sees {aheads[0]} more, rank "
            f"{rank} sees {aheads[1]}, so those of rank {fewer} end sooner{why}"
        )
    return DataError(
        f"ranks read other batches: rank {rank} plans step {step} otherwise than rank 0, so one of "
        f"the {aheads[0]} batches that it sees behind that step is another one. {_SAME_BATCHES}"
    )
