"""The iterator behind `bagpipe.lookahead`: hands out batches whose rows are in the cache.

Batches pass through unchanged and in order. Handing out batch t closes step t - 1: between two
batches the trainer's thread only passes plans on, and waits if the next step's plan or rows are not
there (`waits` says for how long).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

from bagpipe.cache.overlap import Staging
from bagpipe.cache.waits import Waits
from bagpipe.device_oracle.source import DeviceSource
from bagpipe.distributed.lockstep import plan_act
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.joint import JointCollections
from bagpipe.embeddings.move import MakeBatch, Move, packed_apart, take_apart
from bagpipe.embeddings.oracle_process import start_oracle
from bagpipe.errors import BackgroundError, ConfigError, DataError, LostError, UsageError
from bagpipe.feed.loader_states import LoaderStates
from bagpipe.feed.noted import OracleSpans
from bagpipe.feed.source import PlanSource, ProcessSource, ThreadSource, num_places
from bagpipe.feed.stream import BatchAdapter, Planned, StreamOptions
from bagpipe.native.fork import check_same_process
from bagpipe.native.jit import is_compiling
from bagpipe.oracle.report import OracleReport
from bagpipe.types import OraclePlace

BatchT = TypeVar("BatchT")
_STOP_TIMEOUT_S = 5.0
_logger = logging.getLogger("bagpipe.lookahead")


class Lookahead(Generic[BatchT]):
    """The iterator that `lookahead` returns, and a context manager that ends it.

    `report` adds up what the oracle decided for the batches handed out so far, `waits` what the
    training loop waited for.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        embeddings: EmbeddingBagCollection | JointCollections,
        options: StreamOptions,
        adapter: BatchAdapter,
        move: Move | None,
        *,
        oracle: OraclePlace,
    ) -> None:
        self.report = OracleReport.for_groups(embeddings.groups)
        self.oracle_bytes = 0
        """Bytes of the oracle's own state, without the batches in its window."""
        self._embeddings, self._prefetch_depth = embeddings, options.prefetch_depth
        self._move, self._loader = move, batches
        self._submitted: deque[tuple[Planned[Any], MakeBatch]] = deque()
        self._plans_error: Exception | None = None
        self.has_failed_alike = False
        """Whether all of several ranks had an error in their plans at the same step, so that all
        rows were written back."""
        self._peers = embeddings.peers
        self._has_others = self._peers.has_others
        self._pid = os.getpid()
        self._states = LoaderStates(batches, options.first_step)
        read = self._states if self._states.has_state else batches
        # Held while a batch is asked for, and for ever by a call that was interrupted.
        self._turn = threading.Lock()
        self._is_closed = False
        self._failure = ""  # which error has ended the stream
        self._executor = embeddings.start(
            options.num_slots, options.topology.num_replica_slots or None
        )
        try:
            self._source: PlanSource[Any]
            if oracle == "process":
                self._source = self._process_source(read, options, adapter)
            elif oracle == "device":
                pack = (
                    None
                    if move is None
                    else partial(packed_apart, move, Staging(embeddings.device))
                )
                self._source = DeviceSource(read, options, adapter, embeddings.device, pack)
            else:
                self._source = ThreadSource(read, options, adapter)
        except BaseException:
            embeddings.stop()
            raise
        _logger.info(
            "step %d: reading ahead (lookahead %s, prefetch depth %d), a cache of %s rows",
            options.first_step,
            options.lookahead,
            options.prefetch_depth,
            " + ".join(f"{slots:,}" for slots in options.num_slots),
        )
        embeddings.note_stream(weakref.ref(self), self._states)

    @property
    def waits(self) -> Waits:
        """Seconds that the training loop waited for plans, rows and slots, so far."""
        return self._executor.waits

    @property
    def oracle_spans(self) -> OracleSpans | None:
        """What notes the spans of an oracle process that this trainer has started, for a trace."""
        return self._source.process.spans if isinstance(self._source, ProcessSource) else None

    def __len__(self) -> int:
        """How many batches the loader has, those that were handed out included.

        Raises:
            TypeError: it has no length, as a generator has not.
        """
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(
                f"the loader, a {type(self._loader).__name__}, has no length: {error}"
            ) from None

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        """Closes the step before and hands out the next batch once its rows are in the cache.

        Raises:
            UsageError: the stream has failed, or it is used in two threads or a forked process.
        """
        check_same_process(self._pid, "stream of batches")
        if not self._turn.acquire(blocking=False):
            raise UsageError(
                "another thread asks this stream for its next batch, or was interrupted when it "
                "did: iterate in one thread; after an interrupt make a new stream"
            )
        try:
            batch = self._next()
        except BaseException as error:
            if not isinstance(error, StopIteration):
                self._give_up(error)
            self._turn.release()
            if isinstance(error, ConfigError | DataError):
                # The message says all. The frames and causes of our threads would hide it.
                raise error.with_traceback(None) from None
            raise
        self._turn.release()
        return batch

    def _next(self) -> BatchT:
        if self._failure:
            raise UsageError(
                f"this stream of batches has ended with an error ({self._failure}) and can't go "
                "on: make a new one"
            )
        if self._is_closed:
            raise StopIteration
        if not self._owns_embeddings:
            raise UsageError(
                "these embeddings were stopped, or given to another bagpipe.lookahead; this one "
                "can't go on"
            )
        self._end_step()
        self._source.end_step(self._embeddings.step - 1)
        if not self._submit_ahead():
            self.close()
            self._states.take_end(self._source.loader_end)
            raise StopIteration
        planned, make_batch = self._submitted.popleft()
        try:
            self._embeddings.begin_step(planned.sparse)
        except BackgroundError as error:
            self._embeddings.fail(error)
            raise
        batch: BatchT = make_batch(self._executor.moved_along)
        self._source.check(planned)
        self.report.add(planned.plan, planned.peak_slots)
        self.oracle_bytes = planned.oracle_bytes
        return batch

    def __enter__(self) -> Lookahead[BatchT]:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            self._source.end_step(self._embeddings.step - 1)
        else:
            self._give_up(error)

    def close(self) -> None:
        """Closes the step, writes everything back and ends the threads. Closing twice is allowed.

        With several trainers all must call it. A single trainer's rows are written back after an
        error in the loop, the loader or the data too, since the cache is as good as before. Those
        of several are not, since the others may wait for this one's next message: go on from a
        checkpoint then.
        """
        if self._is_closed or self._is_forked:
            return
        self._end_threads()
        if self._owns_embeddings:
            self._end_step()
            self._embeddings.stop()
        self._is_closed = True  # last: after an interrupt it can be called again

    def __del__(self) -> None:
        # A loop left by `break` drops the iterator: its threads must not outlive it. The rows stay
        # in the embeddings' cache.
        is_made = getattr(self, "_source", None) is not None
        if is_made and not self._is_closed and not self._is_forked:
            self._end_threads()
            self._end_step()

    def flush(self) -> None:
        """Closes the step and writes all resident rows to the stores, as before a checkpoint.

        The iteration goes on. With several trainers all must call it.
        """
        self._end_step()
        self._source.end_step(self._embeddings.step - 1)
        self._embeddings.flush()

    def flush_between_steps(self) -> None:
        """As `flush`, but a batch of which nothing was looked up yet stays to be trained."""
        if self._owns_embeddings and not self._embeddings.is_batch_unused:
            self.flush()
        else:
            self._embeddings.flush()

    def _give_up(self, error: BaseException) -> None:
        """Ends the stream after an error.

        With several trainers it waits for none of them, unless all have the error.
        """
        if self._is_closed or self._is_forked:
            return
        self._failure = self._failure or repr(error)  # the error would hold the stream
        if not self._has_others or self._have_all(error):
            try:
                self.close()
            except Exception as more:  # the first one is the cause; the tables know of this one
                error.add_note(f"closing bagpipe.lookahead failed, too: {more}")
            return
        self._end_threads()
        if self._owns_embeddings:
            self._embeddings.fail(error)
        self._is_closed = True

    def _have_all(self, error: BaseException) -> bool:
        """Whether all ranks have it in their plans at the same step, of which nobody sent anything.

        Ranks that lost their oracle process may be at different steps, and needn't ask.
        """
        if error is self._plans_error and not isinstance(error, LostError):
            self.has_failed_alike = self._peers.all_stop_before(self._embeddings.step)
        return self.has_failed_alike

    @property
    def _owns_embeddings(self) -> bool:
        return self._embeddings.executor is self._executor

    @property
    def _is_forked(self) -> bool:
        """Whether this is a forked child's copy, with no threads to end and no rows to write."""
        return os.getpid() != self._pid

    def _end_threads(self) -> None:
        while not self._source.stop(timeout_s=_STOP_TIMEOUT_S):
            if is_compiling():  # which ends
                continue
            warnings.warn(
                f"bagpipe.lookahead has ended, but its reader has not come back within "
                f"{_STOP_TIMEOUT_S:.0f} s from the loader (or from `sparse`, `share` or "
                "`hand_out`): its threads end when it does, or with the program",
                RuntimeWarning,
                stacklevel=2,
            )
            return

    def _process_source(
        self, batches: Iterable[Any], options: StreamOptions, adapter: BatchAdapter
    ) -> ProcessSource[Any]:
        process = start_oracle(
            batches,
            options,
            adapter,
            self._peers,
            num_places=num_places(options.prefetch_depth, has_others=self._has_others),
            device=self._embeddings.device,
            at_close=self._executor.at_close,
        )
        return ProcessSource(process, copy_batches=self._move is None)

    def _end_step(self) -> None:
        if self._owns_embeddings:
            self._embeddings.end_step()

    def _submit_ahead(self) -> bool:
        """Passes plans on to the executor, up to the prefetch depth; False at the end.

        A single trainer waits only for the next step's plan.
        """
        if not self._submitted:
            try:
                planned = self._wait_for_plan(partial(next, self._source, None))
            except Exception as error:
                self._plans_error = error
                raise
            if planned is None:
                return False
            self._submit(planned)
        # All ranks must be equally far ahead: which messages they send depends on it.
        while len(self._submitted) <= max(self._prefetch_depth, int(self._has_others)):
            planned = (
                self._wait_for_plan(self._source.next_or_none)
                if self._has_others
                else self._source.next_if_ready()
            )
            if planned is None:
                break
            self._submit(planned)
        return True

    def _wait_for_plan(self, wait: Callable[[], Planned[BatchT] | None]) -> Planned[BatchT] | None:
        """The next plan, or what `wait` returns where none is ready."""
        planned = self._source.next_if_ready()
        if planned is None:
            started = time.perf_counter()
            self._executor.release_computed()
            planned = wait()
            self.waits.plan_s += time.perf_counter() - started
        return planned

    def _submit(self, planned: Planned[BatchT]) -> None:
        plan = planned.plan
        self._states.take(planned.loader_states)
        if planned.ids_hash and plan.joint_hash:
            act = plan_act(plan.step, plan.lookahead, planned.ids_hash, plan.joint_hash)
            # the step before sends gradients that this one needs, and replicas for it
            self._peers.tell(act, needed_at=plan.step - 1, note=plan.failure)
        arrays, make_batch = take_apart(planned.batch, self._move, planned.plan.step)
        self._executor.submit(planned.plan, planned.release, arrays)
        self._submitted.append((planned, make_batch))
