"""From an iterable of batches to plans, all stages running beside each other.

    reader -> de-duplication (pool) -in order-> linker -bounded queue-> Cacher -> (plan, batch)
    '------------------ one thread -----------------'               '- the caller's thread -'

What must be in order has a thread of its own. Between reading and linking a pool de-duplicates
several batches at a time; a `Deferred` batch is read there, too. `plan_stream` never loads torch,
and all that it takes can be pickled, so that it also runs in a process of its own
(`bagpipe.feed.process`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from bagpipe.errors import DataError
from bagpipe.feed.seals import OpenBatches, Seal
from bagpipe.jagged import (
    as_jagged,
    check_ids,
    find_sparse,
    hash_ids,
    is_share,
    share_batch,
    share_bounds,
    share_of,
)
from bagpipe.lookups import check_features
from bagpipe.native.pipeline import BackgroundIterator, ordered_map
from bagpipe.native.spans import span
from bagpipe.native.workers import Workers
from bagpipe.oracle.checks import checked
from bagpipe.oracle.dedup import dedup
from bagpipe.oracle.merge import MergedGroup, merge
from bagpipe.oracle.oracle import DEFAULT_LOOKAHEAD_BYTES, DedupedBatch, Oracle, check_window
from bagpipe.plan import HostStepPlan
from bagpipe.topology import ONE_TRAINER, Topology
from bagpipe.types import Group, Jagged

BatchT = TypeVar("BatchT")
IdsT = TypeVar("IdsT")

_LINKED_AHEAD = 2
"""Batches read, de-duplicated and linked beyond the oracle's window."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a stream is planned; see `bagpipe.lookahead`."""

    groups: tuple[Group, ...]
    num_slots: tuple[int, ...]
    lookahead: int | Literal["auto"] = "auto"
    lookahead_bytes: int = DEFAULT_LOOKAHEAD_BYTES
    prefetch_depth: int = 2
    first_step: int = 0
    dedup_threads: int | None = None  # None: see `num_dedup_threads`
    check: bool = False
    policy: str = "min"  # one of `bagpipe.oracle.policy.POLICIES`
    topology: Topology = ONE_TRAINER
    """The trainers. With several a batch is global, and each of `ranks` gets its share of it."""

    def __post_init__(self) -> None:
        self.topology.check(self.groups)
        check_window(
            self.groups,
            num_slots=self.num_slots,
            lookahead=self.lookahead,
            prefetch_depth=self.prefetch_depth,
            num_trainers=self.topology.num_trainers,
            policy=self.policy,
        )

    @property
    def num_dedup_threads(self) -> int:
        """How many threads de-duplicate: by default a quarter of the cores.

        With several trainers it is three eighths, since these threads also merge the shares of a
        batch and part plans by rank. No more than keep up: threads share memory with the sequential
        stages, which set the pace, and slow them.
        """
        return self.dedup_threads or max(
            1, (2 + (self.topology.num_trainers > 1)) * (os.cpu_count() or 1) // 8
        )

    def make_oracle(self) -> Oracle:
        """The oracle that these options describe; if plans are checked it plans for all ranks."""
        topology = self.topology
        if self.check:
            topology = replace(topology, ranks=tuple(range(topology.num_trainers)))
        return Oracle(
            self.groups,
            num_slots=self.num_slots,
            lookahead=self.lookahead,
            lookahead_bytes=self.lookahead_bytes,
            prefetch_depth=self.prefetch_depth,
            first_step=self.first_step,
            topology=topology,
            policy=self.policy,
            hash_plans=self.is_planned_elsewhere,
        )

    @property
    def is_planned_elsewhere(self) -> bool:
        """Whether plans of other trainers are made elsewhere, from batches that are read there."""
        return len(self.topology.ranks) < self.topology.num_trainers


@dataclass(frozen=True, kw_only=True)
class BatchAdapter:
    """How batches of the user's type are read.

    `sparse` finds a batch's jagged ids, `share(batch, rank, num_trainers)` takes a trainer's
    samples, and `hand_out` makes of those what the trainer is given, by default the samples
    themselves, with their ids. All three run where batches are planned, and are sent there.
    """

    sparse: Callable[[Any], Any] = find_sparse
    share: Callable[[Any, int, int], Any] = share_batch
    hand_out: Callable[[Any], Any] | None = None

    def handed_out(self, batch: Any, sparse: Any) -> tuple[Any, Any]:
        """What a trainer is given of its samples `batch` of ids `sparse`, and the ids in that."""
        if self.hand_out is None:
            return batch, sparse
        batch = self.hand_out(batch)
        return batch, self.sparse(batch)


DEFAULT_ADAPTER = BatchAdapter()


@dataclass(frozen=True)
class Deferred(Generic[BatchT]):
    """A batch that is not read yet; `read` may run in any thread, beside others."""

    read: Callable[[], BatchT]


NumberedBatch: TypeAlias = tuple[int, BatchT | Deferred[BatchT], Seal | None]
"""A step's batch as the loader gave it, and its seal."""

Part: TypeAlias = tuple[BatchT, Any, Seal | None]
"""What a trainer is handed out of a batch, the ids in that, and its seal."""


@dataclass(frozen=True, kw_only=True)
class ReadBatch(Generic[BatchT, IdsT]):
    """A batch that has been read, and what planning needs of its ids."""

    parts: list[Part[BatchT]]  # for each of the topology's `ranks`
    ids: IdsT
    ids_hash: str | None
    payload_bytes: int
    share_sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Planned(Generic[BatchT]):
    """A batch and its plan."""

    plan: HostStepPlan
    batch: BatchT
    sparse: Any
    """The ids of what is handed out, the very object that it holds."""
    peak_slots: tuple[int, ...]
    oracle_bytes: int  # of the oracle's own state
    ids_hash: str | None = None
    """A hash of the global batch's ids, by which trainers see whether they read the same.

    None where all of them are planned in one place.
    """
    seal: Seal | None = None
    """Tells whether the batch has changed.

    None where nobody could change it, since it was read for this stream or copied out.
    """
    loader_states: bytes = b""
    """The loader's states up to behind this batch, of an oracle process."""
    release: Callable[[], None] | None = None
    """To be called once nothing reads the plan's arrays any more, in the order of steps.

    None where the arrays live by themselves.
    """


def plan_stream(
    batches: Iterable[BatchT | Deferred[BatchT]],
    options: StreamOptions,
    adapter: BatchAdapter = DEFAULT_ADAPTER,
    open_batches: OpenBatches | None = None,
) -> Generator[tuple[Planned[BatchT], ...]]:
    """Yields for each batch, in order, what each of the topology's `ranks` gets, with its plan.

    An error is raised after all batches before it.

    Args:
        batches: What to read; with several trainers, global batches.
        options: How to plan.
        adapter: How batches are read.
        open_batches: Is told of all that is read.

    Raises:
        CacheTooSmallError: A batch needs more rows than the cache has.
        DataError: A batch can't be used, or has changed.
        BackgroundError: `batches` has raised an error that is none of ours, which is the cause.
    """
    oracle = options.make_oracle()
    num_threads = options.num_dedup_threads
    with Workers("bagpipe-dedup", num_threads) as workers:
        numbered = sealed(batches, options.first_step, open_batches)
        deduped = ordered_map(
            partial(_dedup, options, adapter), numbered, workers, ahead=2 * num_threads
        )
        linked = BackgroundIterator(oracle.link(deduped), ahead=_LINKED_AHEAD, name="reader")
        planned = oracle.plan(linked, workers)
        if options.check:
            # A replay needs the plans of all ranks, so the oracle makes those of others, too.
            every = checked(options.groups, options.num_slots, planned, options.topology)
            ranks = options.topology.ranks
            planned = ((tuple(plans[rank] for rank in ranks), batch) for plans, batch in every)
        try:
            for plans, deduped_batch in planned:
                parts, ids_hash = deduped_batch.payload
                peak_slots, oracle_bytes = oracle.peak_slots, oracle.nbytes
                yield tuple(
                    Planned(
                        plan=plan,
                        batch=batch,
                        sparse=sparse,
                        peak_slots=peak_slots,
                        oracle_bytes=oracle_bytes,
                        ids_hash=ids_hash,
                        seal=seal,
                    )
                    for plan, (batch, sparse, seal) in zip(plans, parts, strict=True)
                )
        finally:
            # Or its thread would wait for room in a queue that nobody empties.
            linked.close()


def sealed(
    batches: Iterable[BatchT | Deferred[BatchT]], first_step: int, open_batches: OpenBatches | None
) -> Iterator[NumberedBatch[BatchT]]:
    """Seals what is read before the loader, which may use its buffers again, is asked for more.

    A `Deferred` gets no seal: what it reads is nobody else's.
    """
    for step, item in enumerate(batches, first_step):
        seal = None if isinstance(item, Deferred) else Seal(item, step)
        if seal is not None and open_batches is not None:
            open_batches.add(seal)
        yield step, item, seal
        if open_batches is not None:
            open_batches.forget_ended()


def _dedup(
    options: StreamOptions, adapter: BatchAdapter, numbered: NumberedBatch[BatchT]
) -> DedupedBatch[tuple[list[Part[BatchT]], str | None]]:
    """Reads and de-duplicates a batch."""

    def dedup_all(shares: Sequence[Jagged]) -> tuple[MergedGroup, ...]:
        with span("oracle.dedup"):
            return tuple(
                merge(group, [dedup(group, each) for each in shares]) for group in options.groups
            )

    read = read_batch(options, adapter, dedup_all, numbered)
    return DedupedBatch(
        payload=(read.parts, read.ids_hash),
        payload_bytes=read.payload_bytes,
        groups=read.ids,
        share_sizes=read.share_sizes,
    )


def read_batch(
    options: StreamOptions,
    adapter: BatchAdapter,
    take: Callable[[Sequence[Jagged]], IdsT],
    numbered: NumberedBatch[BatchT],
) -> ReadBatch[BatchT, IdsT]:
    """Reads a batch and finds its ids, and makes what each of `ranks` is handed out.

    Args:
        options: How the stream is planned.
        adapter: How batches are read.
        take: Takes of the ids of all ranks' shares what planning needs. They may change afterwards.
        numbered: The batch.

    Raises:
        DataError: It can't be used, or has changed.
    """
    step, item, seal = numbered
    with span("oracle.read"):
        batch = item.read() if isinstance(item, Deferred) else item
    num_trainers = options.topology.num_trainers
    try:
        sparse = adapter.sparse(batch)
        jagged = as_jagged(sparse)
        check_features(options.groups, jagged)
        if num_trainers == 1:
            # The batch is handed out as it is: no copy, and no `share` of the user's is called.
            shares = [jagged]
            own_parts = [(batch, sparse)]
        else:
            # Before the user's `share` takes it apart, or its error would hide this one.
            check_ids(jagged)
            ranks = options.topology.ranks
            own = {rank: _share_of(batch, jagged, rank, num_trainers, adapter) for rank in ranks}
            # Those of other ranks are planned with, but nobody here is handed their samples.
            shares = [
                own[rank][2] if rank in own else share_of(jagged, rank, num_trainers)
                for rank in range(num_trainers)
            ]
            own_parts = [own[rank][:2] for rank in ranks]
        ids = take(shares)
        parts = _handed_out(own_parts, adapter, batch, seal)
    except DataError as error:
        change = None if seal is None else seal.change()  # a change may be the error's cause
        raise DataError(f"step {step}: {change or error}") from error
    # With several trainers the size of all ids, whatever is handed out: hosts must grow their
    # windows alike, and each hands out to its own ranks only.
    handed_out = (
        [jagged]
        if adapter.hand_out is None or num_trainers > 1
        else [as_jagged(sparse) for _, sparse, _ in parts]
    )
    return ReadBatch(
        parts=parts,
        ids=ids,
        ids_hash=hash_ids(jagged) if options.is_planned_elsewhere else None,
        payload_bytes=sum(_num_bytes(each) for each in handed_out),
        share_sizes=tuple(each.batch_size for each in shares),
    )


def _handed_out(
    own_parts: list[tuple[BatchT, Any]], adapter: BatchAdapter, batch: BatchT, seal: Seal | None
) -> list[Part[BatchT]]:
    """What each trainer is given of its samples, the ids in that, and its seal.

    Raises DataError if the batch has changed before all of that was made.
    """
    is_batch = adapter.hand_out is None and own_parts[0][0] is batch
    if seal is not None and not is_batch and (change := seal.change()) is not None:
        raise DataError(change)
    parts = [adapter.handed_out(*part) for part in own_parts]
    return [
        (part, sparse, seal if seal is None or is_batch else Seal(part, seal.step))
        for part, sparse in parts
    ]


def _share_of(
    batch: Any, jagged: Jagged, rank: int, num_trainers: int, adapter: BatchAdapter
) -> tuple[Any, Any, Jagged]:
    """A rank's samples of a batch of ids `jagged`, and their ids, as found and as `Jagged`.

    Raises DataError if the user's `share` gives other samples than the rank's.
    """
    part = adapter.share(batch, rank, num_trainers)
    sparse = adapter.sparse(part)
    ids = as_jagged(sparse)
    if not is_share(ids, jagged, rank, num_trainers):
        begin, end = share_bounds(jagged.batch_size, rank, num_trainers)
        raise DataError(
            f"share(batch, {rank}, {num_trainers}) has other ids than samples {begin:,} to {end:,} "
            "of the batch, which are planned for that rank"
        )
    return part, sparse, ids


def _num_bytes(ids: Jagged) -> int:
    return sum(
        array.nbytes for array in (ids.values, ids.offsets, ids.weights) if array is not None
    )
