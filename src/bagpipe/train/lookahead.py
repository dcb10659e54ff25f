"""`bagpipe.lookahead`: wraps an iterable of batches so that each one's embedding rows are in the cache when it is handed out.

    with bagpipe.lookahead(loader, embeddings, cache="4GiB") as batches:
        for batch in batches:
            loss = criterion(model(batch.dense, batch.sparse), batch.labels)
            loss.backward()            # embeddings are updated here
            optimizer.step(); optimizer.zero_grad()

Batches pass through unchanged and in order. Handing out batch t closes step t - 1: between two batches the trainer's thread
only passes plans on, and waits if the next step's plan or rows are not there (`waits` says for how long).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from bagpipe.cache.collection import EmbeddingBagCollection
from bagpipe.cache.executor import Waits
from bagpipe.errors import BackgroundError, ConfigError, DataError, UsageError
from bagpipe.jagged import as_jagged, check_features
from bagpipe.oracle.checks import checked
from bagpipe.oracle.dedup import dedup
from bagpipe.oracle.pipeline import BackgroundIterator, ordered_map
from bagpipe.oracle.report import OracleReport
from bagpipe.oracle.sizes import parse_bytes
from bagpipe.oracle.window import DedupedBatch, Oracle
from bagpipe.train.capacity import slots_for
from bagpipe.types import Group, Jagged, StepPlan

BatchT = TypeVar("BatchT")

_SPARSE_NAMES = ("sparse", "sparse_features")
_LINKED_AHEAD = 2
"""Batches read, de-duplicated and linked beyond the oracle's window."""
_PLANS_AHEAD = 2
"""Finished plans that wait for the trainer beyond those already being executed."""


def lookahead(
    batches: Iterable[BatchT],
    embeddings: EmbeddingBagCollection,
    *,
    cache: int | str | Sequence[int] = "auto",
    lookahead: int | Literal["auto"] = "auto",
    lookahead_memory: int | str = "1GiB",
    prefetch_depth: int = 2,
    dedup_threads: int | None = None,
    check: bool = False,
    sparse: Callable[[BatchT], Any] | None = None,
) -> Lookahead[BatchT]:
    """Iterates `batches` with `embeddings` prepared for each; see `Lookahead` for what else the iterator tells.

    `batches` may be any iterable, a torch DataLoader too; it is read in a thread of its own, `lookahead` batches ahead.
    `cache` is the device cache over all tables: rows, a share of them ("2%"), memory ("4GiB"), rows for each group of tables of one
    dimension, or "auto" (half of the free memory).
    `lookahead="auto"` grows the window while more of it saves fetches and it fits `lookahead_memory`.
    `prefetch_depth` is how many steps before its use a row may be fetched.
    `dedup_threads` defaults to the number of cores less one. `check` replays every plan against the invariants before it is used.
    `sparse` finds a batch's jagged ids; by default the batch itself or its `sparse` or `sparse_features` attribute or key.

    Only `backward` reaches the tables: with a gradient scaler or clipping, unscale or clip the loss's gradient before it does.

    Raises ConfigError for values out of range. Iterating raises CacheTooSmallError, DataError and what the loader raised (as the
    cause of a BackgroundError) after all batches before the bad one were handed out.
    """
    if dedup_threads is not None and dedup_threads < 1:
        raise ConfigError(f"dedup_threads is {dedup_threads}, must be at least 1")
    embeddings.stop()  # an earlier stream's cache must be free before this one is sized, and its last step closed
    num_slots = slots_for(cache, embeddings.groups, embeddings.device)
    oracle = Oracle(
        embeddings.groups,
        num_slots=num_slots,
        lookahead=lookahead,
        lookahead_bytes=parse_bytes(lookahead_memory, "lookahead_memory"),
        prefetch_depth=prefetch_depth,
        first_step=embeddings.step,
    )
    find_sparse = sparse if sparse is not None else _find_sparse
    return Lookahead(batches, embeddings, oracle, num_slots, prefetch_depth, dedup_threads, check, find_sparse)


class Lookahead(Generic[BatchT]):
    """The iterator that `lookahead` returns, and a context manager that ends it.

    `report` adds up what the oracle decided for the batches handed out so far, `waits` what the training loop waited for.
    """

    def __init__(
        self,
        batches: Iterable[BatchT],
        embeddings: EmbeddingBagCollection,
        oracle: Oracle,
        num_slots: Sequence[int],
        prefetch_depth: int,
        dedup_threads: int | None,
        check: bool,
        find_sparse: Callable[[BatchT], Any],
    ) -> None:
        self.report = OracleReport.for_groups(embeddings.groups)
        self._embeddings, self._oracle = embeddings, oracle
        self._executor = embeddings.start(num_slots)
        self._submitted: list[tuple[StepPlan, BatchT, Any]] = []
        self._prefetch_depth = prefetch_depth
        self._in_step = False
        self._is_open = True
        num_threads = dedup_threads or max(1, (os.cpu_count() or 2) - 1)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="bagpipe-dedup")
        numbered = enumerate(batches, embeddings.step)
        deduped = ordered_map(partial(_dedup, embeddings.groups, find_sparse), numbered, self._pool, ahead=2 * num_threads)
        self._linked = BackgroundIterator(oracle.link(deduped), ahead=_LINKED_AHEAD, name="reader")
        planned = oracle.plan_linked(self._linked)
        if check:
            planned = checked(embeddings.groups, num_slots, planned)
        self._plans = BackgroundIterator(planned, ahead=_PLANS_AHEAD, name="oracle")

    @property
    def waits(self) -> Waits:
        """Seconds that the training loop waited for plans, rows and slots, so far."""
        return self._executor.waits

    @property
    def oracle_bytes(self) -> int:
        """Bytes of the oracle's own state, without the batches in its window."""
        return self._oracle.nbytes

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        """Closes the step before and hands out the next batch once its rows are in the cache."""
        if not self._is_open:
            raise StopIteration
        if not self._owns_embeddings:
            self.close()
            raise UsageError("these embeddings were stopped, or given to another bagpipe.lookahead; this one can't go on")
        try:
            self._end_step()
            if not self._submit_ahead():
                self.close()
                raise StopIteration
            plan, batch, sparse = self._submitted.pop(0)
            self._begin_step(sparse)
        except BaseException:
            self.close()
            raise
        self.report.add(plan, self._oracle.peak_slots)
        return batch

    def __enter__(self) -> Lookahead[BatchT]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the step, writes everything back and ends the threads. Closing twice is allowed.

        The rows are written back after an error in the loop, the loader or the data too: the cache is as good as before it.
        """
        if not self._is_open:
            return
        self._end_threads()
        if self._owns_embeddings:
            self._end_step()
            self._embeddings.stop()

    def __del__(self) -> None:
        # A loop left by `break` drops the iterator: its threads must not outlive it. The rows stay in the embeddings' cache.
        if getattr(self, "_plans", None) is not None and self._is_open:
            self._end_threads()
            if self._owns_embeddings:
                self._end_step()

    def flush(self) -> None:
        """Closes the step and writes all resident rows to the stores, as before a checkpoint; the iteration goes on."""
        self._end_step()
        self._embeddings.flush()

    @property
    def _owns_embeddings(self) -> bool:
        return self._embeddings.executor is self._executor

    def _begin_step(self, sparse: object) -> None:
        try:
            self._embeddings.begin_step(sparse)
        except BackgroundError as error:
            self._embeddings.fail(error)
            raise
        self._in_step = True

    def _end_threads(self) -> None:
        self._is_open = False
        self._linked.close()
        self._plans.close()
        self._oracle.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _end_step(self) -> None:
        if self._in_step:
            self._embeddings.end_step()
            self._in_step = False

    def _submit_ahead(self) -> bool:
        """Passes plans on to the executor, up to the prefetch depth; waits only for the next step's. False at the end."""
        if not self._submitted:
            started = time.perf_counter()
            planned = next(self._plans, None)
            self.waits.plan_s += time.perf_counter() - started
            if planned is None:
                return False
            self._submit(*planned)
        while len(self._submitted) <= self._prefetch_depth:
            planned = self._plans.next_if_ready()
            if planned is None:
                break
            self._submit(*planned)
        return True

    def _submit(self, plan: StepPlan, batch: DedupedBatch[tuple[BatchT, Any]]) -> None:
        self._executor.submit(plan)
        self._submitted.append((plan, *batch.payload))


def _dedup(
    groups: Sequence[Group], find_sparse: Callable[[BatchT], Any], numbered: tuple[int, BatchT]
) -> DedupedBatch[tuple[BatchT, Any]]:
    step, batch = numbered
    try:
        sparse = find_sparse(batch)
        jagged = as_jagged(sparse)
        check_features(groups, jagged)
        deduped = tuple(dedup(group, jagged) for group in groups)
    except DataError as error:
        raise DataError(f"step {step}: {error}") from error
    return DedupedBatch(
        payload=(batch, sparse),
        payload_bytes=_payload_bytes(jagged),
        batch_size=jagged.batch_size,
        groups=deduped,
    )


def _find_sparse(batch: Any) -> Any:
    """The jagged part of a batch: itself, or its attribute or key `sparse` or `sparse_features`."""
    if isinstance(batch, Jagged) or callable(getattr(batch, "offsets", None)):
        return batch
    for name in _SPARSE_NAMES:
        if isinstance(batch, dict) and name in batch:
            return batch[name]
        if hasattr(batch, name):
            return getattr(batch, name)
    raise DataError(
        f"a batch of type {type(batch).__name__} has no attribute or key {' or '.join(_SPARSE_NAMES)}: tell bagpipe.lookahead "
        "where its jagged ids are, for example sparse=lambda batch: batch[1]"
    )


def _payload_bytes(batch: Jagged) -> int:
    return batch.values.nbytes + (0 if batch.offsets is None else batch.offsets.nbytes)
