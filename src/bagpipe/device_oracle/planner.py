"""Plans the steps of a stream on a device: keeps the window full, and tells the host what moves.

One thread does it, beside the trainer's. It issues the next batch and the next step on a stream of
its own, waits for the device, looks whether the batch could enter, and reads what the step moves.
So it waits for the device, and the trainer for neither. It shares Python's lock with the trainer's
thread: each call of torch costs both of them, so a step takes it few, and one wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch

from bagpipe.cache.device_plan import PlanOnDevice
from bagpipe.cache.overlap import Staging
from bagpipe.device_oracle import alerts
from bagpipe.device_oracle.alerts import Alert
from bagpipe.device_oracle.answers import Answers, GroupAnswer
from bagpipe.device_oracle.made import Kind, plan_on_device
from bagpipe.device_oracle.oracle import DeviceOracle, which_know_all_rows
from bagpipe.device_oracle.staged import StagedIds, stage
from bagpipe.device_oracle.state import BATCH_SIZE, NUM_USED_SLOTS, PLANS_BEYOND, STEP, Window
from bagpipe.errors import BagpipeError, ConfigError, DataError
from bagpipe.feed.stream import StreamOptions
from bagpipe.native.spans import span
from bagpipe.plan import StepPlan
from bagpipe.types import Jagged

PayloadT = TypeVar("PayloadT")
_Waiting: TypeAlias = tuple[tuple[Kind, ...], PayloadT]
"""A batch that has entered and is not yet planned, and what goes with it."""

_BYTES_A_LOOKUP = 14
"""In the ring of batches: 8 of each lookup, and 12 of each unique row, of which there is room for
half as many. Slots and rows count for nothing here."""
_BYTES_A_LOOKUP_IN_MAP = 26
"""Beyond these, where the index of rows is a map: 52 of each place."""
_MAX_AUTO_LOOKAHEAD = 256
"""Batches that `lookahead="auto"` looks ahead at most."""


@dataclass(frozen=True, kw_only=True)
class MadePlan(Generic[PayloadT]):
    """A step that has been planned, and its batch.

    Its tensors and arrays lie in rings: they hold the plan until another one is made in its place.
    """

    plan: StepPlan[PlanOnDevice]
    payload: PayloadT
    peak_slots: tuple[int, ...]  # by group


class Planner:
    """The oracle of all groups on one device. `plan` runs in one thread."""

    def __init__(
        self,
        options: StreamOptions,
        device: torch.device,
        batch_size: int | None = None,
        know_all_rows: Sequence[bool] | None = None,
    ) -> None:
        """Makes nothing yet on the device: how far it looks, the first batch decides.

        Args:
            options: How to plan.
            device: Where.
            batch_size: Samples of most batches, if that is known. The first one may have fewer.
            know_all_rows: By group, as in `Window`. By default what the device has room for.
        """
        self._know_all_rows = know_all_rows or which_know_all_rows(options.groups, device)
        self.options, self._device, self._batch_size = options, device, batch_size
        is_cuda = device.type == "cuda"
        self.num_plans = options.prefetch_depth + PLANS_BEYOND
        """Plans that may be in use at a time."""
        self._staging = Staging(device)
        # The priority is the lowest unless another one is asked for.
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        # Recorded anew each time: its thread waits for it before.
        self._event = torch.cuda.Event(blocking=True) if is_cuda else None
        self._answers = Answers(device)
        self.oracles: tuple[DeviceOracle, ...] = ()
        """By group; empty before the first batch."""
        self._unconfirmed: tuple[StagedIds, ...] = ()
        """The batch that was let in last, while nobody knows whether it could enter."""

    def stage(self, shares: Sequence[Jagged]) -> tuple[StagedIds, ...]:
        """Packs a batch's ids for each group. Any thread may call it."""
        (batch,) = shares
        return tuple(stage(group, batch, self._staging) for group in self.options.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that hold rows, slots, batches and plans."""
        return sum(oracle.state.nbytes for oracle in self.oracles)

    def capture_if_due(self) -> None:
        """Captures graphs where it is time; see `DeviceOracle.capture_if_due`."""
        for oracle in self.oracles:
            oracle.capture_if_due()

    def plan(
        self,
        batches: Iterable[tuple[tuple[StagedIds, ...], PayloadT]],
        wait_for_place: Callable[[], bool],
    ) -> Iterator[MadePlan[PayloadT]]:
        """Yields each batch with its plan, in order.

        Args:
            batches: Ids as `stage` packs them, and what goes with them.
            wait_for_place: Waits until another plan may be made, where those of `num_plans` steps
                are still in use. False ends the plans.

        Raises:
            DataError: A batch has an id outside its table. What `batches` raises, and this, is
                raised after the plans of all batches before.
            CacheTooSmallError: A batch needs more slots than the cache has.
        """
        source = iter(batches)
        step = self.options.first_step
        waiting: deque[_Waiting[PayloadT]] = deque()
        failure: BaseException | None = None
        try:
            while wait_for_place():
                with self._on_stream():  # once a step, and not while the plan is handed out
                    while failure is None and len(waiting) <= self._lookahead_at(step):
                        failure = self._confirm_alone(waiting)
                        failure = failure or self._let_in_next(source, waiting)
                    if not waiting:
                        break
                    answers = self._plan(step, self.oracles)
                    # That of a batch before is told instead of any other failure.
                    failure = self._confirm(waiting, [each.alert for each in answers]) or failure
                    if not waiting:
                        break
                    answers = self._complete(step, answers)
                    kinds, payload = waiting.popleft()
                    made = self._made(step, answers, kinds, payload, num_ahead=len(waiting))
                yield made
                step += 1
        except torch.OutOfMemoryError as error:
            raise self._told(error) from error
        finally:
            self._wait()
        if failure is not None and not isinstance(failure, StopIteration):
            try:
                raise failure
            finally:
                failure = None  # it holds this frame, which holds what the device keeps

    def _lookahead_at(self, step: int) -> int:
        """How many batches beyond a step are seen when it is planned."""
        if not self.oracles:  # the first batch tells
            return 0
        longest = self.oracles[0].window.lookahead
        if self.options.lookahead == "auto":  # one batch more with each step
            return min(longest, self.options.prefetch_depth + step - self.options.first_step)
        return longest

    def _let_in_next(
        self,
        source: Iterator[tuple[tuple[StagedIds, ...], PayloadT]],
        waiting: deque[_Waiting[PayloadT]],
    ) -> BaseException | None:
        """Lets the next batch in, or returns why there is none: the end of the batches, too."""
        try:
            staged, payload = next(source)
            if not self.oracles:
                self.oracles = self._make_oracles(staged)
            with span("oracle.enter"):
                for oracle, each in zip(self.oracles, staged, strict=True):
                    oracle.enter(each)
        except StopIteration as end:
            return end.with_traceback(None)  # as in `plan`
        except BaseException as error:
            return self._told(error)
        self._unconfirmed = staged
        waiting.append((tuple(map(Kind.of, staged)), payload))
        return None

    def _confirm_alone(self, waiting: deque[_Waiting[PayloadT]]) -> BaseException | None:
        """As `_confirm`, where no plan has been asked for since."""
        if not self._unconfirmed:
            return None
        self._wait()
        return self._confirm(waiting, [oracle.alert() for oracle in self.oracles])

    def _plan(self, step: int, oracles: Sequence[DeviceOracle]) -> list[GroupAnswer]:
        """Plans a step for some groups; returns what the device says of it for all."""
        with span("oracle.plan"):
            for oracle in oracles:
                oracle.plan()
            self._answers.ask([oracle.state for oracle in self.oracles], step)
            self._wait()
        return self._answers.read(step)

    def _complete(self, step: int, answers: list[GroupAnswer]) -> list[GroupAnswer]:
        """Answers that are all of this step, and whole."""
        # What was the batch that lacked room could not be planned.
        late = [
            oracle
            for oracle, answer in zip(self.oracles, answers, strict=True)
            if answer.header[STEP] != step
        ]
        if late:
            answers = self._plan(step, late)
        if any(answer.is_cut for answer in answers):
            answers = self._plan(step, ())
        return answers

    def _confirm(
        self, waiting: deque[_Waiting[PayloadT]], found: Sequence[Alert | None]
    ) -> BaseException | None:
        """Looks whether the last batch could enter, and lets it in again where it lacked room.

        Args:
            waiting: The batches that have entered.
            found: What has stopped the device since it was asked to let the batch in, by group.

        Returns:
            Why it can't be used. It no longer waits then.
        """
        try:
            self._check_entered(found)
        except BaseException as error:
            waiting.pop()
            return self._told(error)
        return None

    def _check_entered(self, found: Sequence[Alert | None]) -> None:
        staged, self._unconfirmed = self._unconfirmed, ()
        for oracle, each, alert in zip(self.oracles, staged, found, strict=bool(staged)):
            while alert is not None and alert.reason == alerts.NO_ROOM:
                oracle.grow(alert)
                oracle.enter(each)
                alert = oracle.alert()
            if alert is not None:
                error = alert.as_error(oracle.group, oracle.window, each.batch, each.lookups)
                raise _naming_step(alert.batch, error)
        for each in staged:
            each.buffer.give_back()

    def _made(
        self,
        step: int,
        answers: Sequence[GroupAnswer],
        kinds: tuple[Kind, ...],
        payload: PayloadT,
        *,
        num_ahead: int,
    ) -> MadePlan[PayloadT]:
        """Puts the plan together."""
        options = self.options
        groups = tuple(
            plan_on_device(oracle.state, oracle.cuts, step, kind, answer, oracle.rings_for(kind))
            for oracle, kind, answer in zip(self.oracles, kinds, answers, strict=True)
        )
        plan = StepPlan(
            step=step,
            issue_tick=max(options.first_step, step - options.prefetch_depth),
            batch_size=answers[0].header[BATCH_SIZE],
            groups=groups,
            lookahead=num_ahead,
        )
        peak_slots = tuple(answer.header[NUM_USED_SLOTS] for answer in answers)
        return MadePlan(plan=plan, payload=payload, peak_slots=peak_slots)

    def _make_oracles(self, staged: tuple[StagedIds, ...]) -> tuple[DeviceOracle, ...]:
        options = self.options
        if options.lookahead != "auto":
            lookahead = options.lookahead
        else:
            num_bytes = sum(
                each.num_lookups * (_BYTES_A_LOOKUP + (not known) * _BYTES_A_LOOKUP_IN_MAP)
                for each, known in zip(staged, self._know_all_rows, strict=True)
            )
            num_samples = max(1, staged[0].batch.batch_size)
            size = max(num_samples, self._batch_size or 0)
            bytes_a_batch = num_bytes * size // num_samples
            fitting = options.lookahead_bytes // max(bytes_a_batch, 1)
            lookahead = max(options.prefetch_depth, min(fitting, _MAX_AUTO_LOOKAHEAD))
        return tuple(
            DeviceOracle(
                group,
                Window(
                    num_slots=num_slots,
                    lookahead=lookahead,
                    prefetch_depth=options.prefetch_depth,
                    first_step=options.first_step,
                    knows_all_rows=knows_all_rows,
                ),
                self._device,
            )
            for group, num_slots, knows_all_rows in zip(
                options.groups, options.num_slots, self._know_all_rows, strict=True
            )
        )

    def _told(self, error: BaseException) -> BaseException:
        """The error to raise for one of the device's."""
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        return ConfigError(
            f"{self._device} has no memory left for the oracle, which keeps "
            f"{self.nbytes / 2**30:.1f} GiB of rows, slots and batches there: take a shorter "
            "lookahead, a smaller cache or smaller batches, or plan on the host (oracle = "
            f"'process'): {error}"
        )

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        """Waits for what was issued on the stream, without a core of its own."""
        if self._event is not None:
            self._event.record(self._stream)
            self._event.synchronize()


def _naming_step(step: int, error: BagpipeError) -> BagpipeError:
    return DataError(f"step {step}: {error}") if isinstance(error, DataError) else error
