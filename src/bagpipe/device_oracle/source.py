"""Plans for a trainer whose embeddings are on the device that makes them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch

from bagpipe.device_oracle.planner import Planner
from bagpipe.device_oracle.read_back import checked_on_device
from bagpipe.device_oracle.staged import StagedIds
from bagpipe.feed.seals import OpenBatches
from bagpipe.feed.source import ThreadSource
from bagpipe.feed.stream import (
    BatchAdapter,
    Deferred,
    NumberedBatch,
    Planned,
    ReadBatch,
    StreamOptions,
    read_batch,
    sealed,
)
from bagpipe.native.pipeline import BackgroundIterator, ordered_map
from bagpipe.native.workers import Workers

BatchT = TypeVar("BatchT")

_READ_AHEAD = 2
"""Batches that are read beyond the window."""


class PackedPart(Protocol):
    """What a trainer is given of a batch, some of it copied to where the device copies it from."""

    def give_back(self) -> None:
        """Nothing reads that memory any more."""


class Places:
    """How many plans may still be made before the trainer releases one."""

    def __init__(self, number: int) -> None:
        self._tokens = SimpleQueue[None]()
        self._has_ended = False
        for _ in range(number):
            self.release()

    def take(self) -> bool:
        """Waits for a place; False at the end."""
        self._tokens.get()
        return not self._has_ended

    def release(self) -> None:
        """Gives a place back."""
        self._tokens.put(None)

    def end(self) -> None:
        """Ends what waits."""
        self._has_ended = True
        self.release()


class DeviceSource(ThreadSource[BatchT]):
    """Reads in threads of this process, and plans on a device. It is for one trainer."""

    def __init__(
        self,
        batches: Iterable[BatchT | Deferred[BatchT]],
        options: StreamOptions,
        adapter: BatchAdapter,
        device: torch.device,
        pack: Callable[[BatchT, int], PackedPart] | None = None,
    ) -> None:
        """Starts the threads.

        Args:
            batches: What to read.
            options: How to plan.
            adapter: How batches are read.
            device: Where plans are made.
            pack: Copies what goes to the device of a batch to be handed out, given its step, where
                the device copies it from. Threads that read call it.
        """
        size = getattr(batches, "batch_size", None)  # as torch's DataLoader has it
        self._planner = Planner(options, device, size if isinstance(size, int) else None)
        self._places = Places(self._planner.num_plans)
        super().__init__(
            batches, options, adapter, partial(plan_stream, self._planner, self._places, pack)
        )

    def next_if_ready(self) -> Planned[BatchT] | None:
        self._planner.capture_if_due()
        return super().next_if_ready()

    def stop(self, *, timeout_s: float) -> bool:
        self._places.end()
        return super().stop(timeout_s=timeout_s)


def plan_stream(
    planner: Planner,
    places: Places,
    pack: Callable[[BatchT, int], PackedPart] | None,
    batches: Iterable[BatchT | Deferred[BatchT]],
    options: StreamOptions,
    adapter: BatchAdapter,
    open_batches: OpenBatches | None = None,
) -> Generator[tuple[Planned[BatchT], ...]]:
    """As `bagpipe.feed.stream.plan_stream`, with plans that the device makes."""
    num_threads = options.num_dedup_threads
    with Workers("bagpipe-read", num_threads) as workers:
        numbered = sealed(batches, options.first_step, open_batches)
        read = ordered_map(
            partial(_read, planner, options, adapter, pack),
            numbered,
            workers,
            ahead=2 * num_threads,
        )
        ahead = BackgroundIterator(read, ahead=_READ_AHEAD, name="reader")
        staged = ((each.ids, each) for each in ahead)
        try:
            made_plans = planner.plan(staged, places.take)
            if options.check:
                made_plans = checked_on_device(planner, made_plans)
            for made in made_plans:
                ((part, sparse, seal),) = made.payload.parts
                yield (
                    Planned(
                        plan=made.plan,
                        batch=part,
                        sparse=sparse,
                        peak_slots=made.peak_slots,
                        oracle_bytes=planner.nbytes,
                        seal=seal,
                        release=partial(_release, places, None if pack is None else part),
                    ),
                )
        finally:
            ahead.close()


def _read(
    planner: Planner,
    options: StreamOptions,
    adapter: BatchAdapter,
    pack: Callable[[BatchT, int], PackedPart] | None,
    numbered: NumberedBatch[BatchT],
) -> ReadBatch[Any, tuple[StagedIds, ...]]:
    """Reads a batch, and copies what goes to the device of it to pinned memory."""
    read = read_batch(options, adapter, planner.stage, numbered)
    if pack is None:
        return read
    ((part, sparse, seal),) = read.parts
    packed: Any = pack(part, numbered[0])
    return replace(read, parts=[(packed, sparse, seal)])


def _release(places: Places, part: PackedPart | None) -> None:
    if part is not None:
        part.give_back()
    places.release()
