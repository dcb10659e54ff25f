"""`bagpipe.lookahead`: wraps an iterable of batches so that each one's embedding rows are in the
cache when it is handed out.

    with bagpipe.lookahead(loader, embeddings, cache="4GiB") as batches:
        for batch in batches:
            loss = criterion(model(batch.dense, batch.sparse), batch.labels)
            loss.backward()            # embeddings are updated here
            optimizer.step(); optimizer.zero_grad()

Batches pass through unchanged and in order. Handing out batch t closes step t - 1: between two
batches the trainer's thread only passes plans on, and waits if the next step's plan or rows are not
there (`waits` says for how long).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from torch import Tensor

from bagpipe.cache.device_plan import MovedArray
from bagpipe.cache.executor import Waits
from bagpipe.distributed.lockstep import plan_act
from bagpipe.embeddings.agreement import check_same_settings
from bagpipe.embeddings.capacity import slots_for
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.oracle_process import PinnedMemory, start_oracle
from bagpipe.errors import BackgroundError, ConfigError, LostError, UsageError
from bagpipe.feed.source import PLANS_AHEAD, PlanSource, ProcessSource, ThreadSource
from bagpipe.feed.stream import BatchAdapter, Deferred, Planned, StreamOptions
from bagpipe.jagged import find_sparse, share_batch
from bagpipe.native.fork import check_same_process
from bagpipe.oracle.report import OracleReport
from bagpipe.oracle.sizes import parse_bytes
from bagpipe.topology import ONE_TRAINER, Topology

BatchT = TypeVar("BatchT")
Move: TypeAlias = Callable[[Any], tuple[Sequence[MovedArray], Callable[[Sequence[Tensor]], Any]]]
"""Takes a batch apart: arrays that go to the device, and what makes of their tensors the batch to
hand out."""

_MAX_THREADS = 256
_MIN_REPLICAS = 4096
_STOP_TIMEOUT_S = 5.0


def lookahead(
    batches: Iterable[BatchT | Deferred[BatchT]],
    embeddings: EmbeddingBagCollection,
    *,
    cache: int | str | Sequence[int] = "auto",
    lookahead: int | Literal["auto"] = "auto",
    lookahead_memory: int | str = "1GiB",
    prefetch_depth: int = 2,
    dedup_threads: int | None = None,
    check: bool = False,
    sparse: Callable[[BatchT], Any] | None = None,
    oracle: Literal["thread", "process"] = "thread",
    hand_out: Callable[[BatchT], Any] | None = None,
    move: Move | None = None,
    replicas: int | Sequence[int] | None = None,
    share: Callable[[BatchT, int, int], BatchT] = share_batch,
    overlap: bool = True,
) -> Lookahead[Any]:
    """Iterates `batches` with `embeddings` prepared for each; see `Lookahead` for what else the
    iterator tells.

    `batches` may be any iterable, a torch DataLoader too; it is read in a thread of its own,
    `lookahead` batches ahead. So a batch must stay as it was yielded until its step is over: a
    loader that fills the same buffers again yields copies of them, and the loop changes in place no
    batch that comes again. What a batch's arrays, tensors and lists of numbers hold, in containers,
    KeyedJaggedTensors and objects' public attributes, is hashed when it is read and compared when
    it is handed out (0.1 ms a MB each; of tensors on a GPU torch's count of writes): a batch that
    has changed is a DataError. The same batches may come again and again.

    `cache` is the device cache over all tables: rows, a share of them
    ("2%"), memory ("4GiB"), rows for each group of tables of one dimension, or "auto" (half of the
    free memory). `lookahead="auto"` grows the window while more of it saves fetches and it fits
    `lookahead_memory`. `prefetch_depth` is how many steps before its use a row may be fetched.
    `dedup_threads` defaults to a quarter of the cores, with several trainers to three eighths.
    `check` replays every plan against the invariants before it is used. `sparse` finds a batch's
    jagged ids; by default the batch itself or its `sparse` or `sparse_features` attribute or key.
    `oracle` says where batches are read and planned: in threads of this process, or in a process of
    its own (Linux), which keeps steps of a few milliseconds free of it. `batches` and `sparse` must
    be picklable then, and as with a DataLoader's workers a script needs ``if __name__ ==
    "__main__":``. Several trainers of one host share such a process: the first of them starts it,
    and it reads `batches` once for all. In threads each rank reads and plans the global batches for
    itself. `hand_out` makes of each batch, where it is read and planned, what goes on from there:
    the place to leave out what training does not need, above all the ids, which would be copied to
    this process (`bagpipe.data.base.Batch.without_ids`). What `sparse` finds in the result is then
    what the embeddings are called with. `move` says what of a batch goes to the device of
    `embeddings` ahead, along with the plan. It is called with the batch, or what `hand_out` made of
    it, and returns numpy arrays, C-contiguous and of float32 or int32, and a function that makes of
    their tensors what the iteration yields::

        move=lambda batch: ([batch.dense, batch.labels], lambda tensors: (tensors[0], batch.sparse,
        tensors[1]))

    It runs in the training loop's thread, up to `prefetch_depth` steps ahead, so conversions belong
    into `hand_out`; an error in it ends the iteration at once. All arrays of a step share one piece
    of the device's memory: keep a `clone()` of what shall outlive the step. With an oracle process
    a batch's other arrays, and without a GPU the tensors too, which share the arrays' memory, are
    good until the step after the batch's.

    Where the embeddings have a communicator, `batches` are those of all trainers together, the same
    on every rank, and each rank is handed its `share(batch, rank, num_trainers)`. `replicas` is how
    many rows of other ranks one step may need, or so many for each group; by default half the
    cache's rows, and at least 4,096. Without `overlap` all that travels between trainers is on the
    critical path, with the same result: the benchmark `trainers` measures what overlapping saves.
    All ranks must do the same with every batch, in the same order: backward or none, the same
    learning rate, flush, evaluate and leave the loop. Before each step they compare what they did,
    and where they read for themselves the batches and plans, too: where one parts all raise
    UsageError or DataError, which say which rank, at which step, and what.

    Only `backward` reaches the tables. Of a `torch.amp.GradScaler` they must be told by
    `embeddings.set_grad_scaler`: backward refuses a scaled loss else. What clips gradients after
    backward does not reach them.

    Raises ConfigError for values out of range. Iterating raises CacheTooSmallError, DataError and
    what the loader raised (as the cause of a BackgroundError) after all batches before the bad one
    were handed out.
    """
    if dedup_threads is not None and not 1 <= dedup_threads <= _MAX_THREADS:
        raise ConfigError(f"dedup_threads is {dedup_threads}, must be from 1 to {_MAX_THREADS}")
    if oracle not in ("thread", "process"):
        raise ConfigError(f"oracle is {oracle!r}, must be 'thread' or 'process'")
    # an earlier stream's cache must be free before this one is sized, and its last step
    # closed
    embeddings.stop()
    communicator = embeddings.communicator
    num_slots = slots_for(cache, embeddings.groups, embeddings.device, communicator)
    options = StreamOptions(
        groups=embeddings.groups,
        num_slots=tuple(num_slots),
        topology=_topology(embeddings, num_slots, replicas, overlap),
        lookahead=lookahead,
        lookahead_bytes=parse_bytes(lookahead_memory, "lookahead_memory"),
        prefetch_depth=prefetch_depth,
        first_step=embeddings.step,
        dedup_threads=dedup_threads,
        check=check,
    )
    if communicator is not None:
        check_same_settings(communicator, options, seed=embeddings.seed)
    adapter = BatchAdapter(sparse=sparse or find_sparse, share=share, hand_out=hand_out)
    return Lookahead(batches, embeddings, options, adapter, move, in_process=oracle == "process")


def _topology(
    embeddings: EmbeddingBagCollection,
    num_slots: Sequence[int],
    replicas: int | Sequence[int] | None,
    overlap: bool,
) -> Topology:
    communicator = embeddings.communicator
    if communicator is None:
        return ONE_TRAINER
    if replicas is None:
        replicas = [max(slots // 2, _MIN_REPLICAS) for slots in num_slots]
    elif isinstance(replicas, int):
        replicas = [replicas] * len(num_slots)
    return Topology(
        num_trainers=communicator.num_trainers,
        num_hosts=communicator.num_hosts,
        ranks=(communicator.rank,),
        num_replica_slots=tuple(replicas),
        overlap=overlap,
    )


class Lookahead(Generic[BatchT]):
    """The iterator that `lookahead` returns, and a context manager that ends it.

    `report` adds up what the oracle decided for the batches handed out so far, `waits` what the
    training loop waited for.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        embeddings: EmbeddingBagCollection,
        options: StreamOptions,
        adapter: BatchAdapter,
        move: Move | None,
        *,
        in_process: bool,
    ) -> None:
        self.report = OracleReport.for_groups(embeddings.groups)
        self.oracle_bytes = 0
        """Bytes of the oracle's own state, without the batches in its window."""
        self._embeddings, self._prefetch_depth = embeddings, options.prefetch_depth
        self._move = move
        # and what makes the batch
        self._submitted: deque[tuple[Planned[Any], Callable[[Sequence[Tensor]], BatchT]]] = deque()
        self._plans_error: Exception | None = None
        self.has_failed_alike = False
        """Whether the plans ended in an error at the same step on all of several ranks, so that all
        rows were written back."""
        self._communicator = embeddings.communicator
        self._pid = os.getpid()
        # Held while a batch is asked for, and for ever by a call that was interrupted.
        self._turn = threading.Lock()
        self._is_closed = False
        self._failure = ""  # which error has ended the stream
        self._executor = embeddings.start(
            options.num_slots, options.topology.num_replica_slots or None
        )
        try:
            self._source: PlanSource[Any] = (
                self._process_source(batches, options, adapter)
                if in_process
                else ThreadSource(batches, options, adapter)
            )
        except BaseException:
            embeddings.stop()
            raise

    @property
    def waits(self) -> Waits:
        """Seconds that the training loop waited for plans, rows and slots, so far."""
        return self._executor.waits

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        """Closes the step before and hands out the next batch once its rows are in the cache.

        UsageError: after an error, in two threads at a time, or in a forked process.
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
            raise StopIteration
        planned, make_batch = self._submitted.popleft()
        try:
            self._embeddings.begin_step(planned.sparse)
        except BackgroundError as error:
            self._embeddings.fail(error)
            raise
        batch = make_batch(self._executor.moved_along)
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

        With other trainers all must call it. The rows of a single one are written back after an
        error in the loop, the loader or the data too: the cache is as good as before it. With
        others, which may wait for this one's next message, they are not: go on from a checkpoint
        then.
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
        """Closes the step and writes all resident rows to the stores, as before a checkpoint; the
        iteration goes on. With other trainers all must call it.
        """
        self._end_step()
        self._source.end_step(self._embeddings.step - 1)
        self._embeddings.flush()

    def _give_up(self, error: BaseException) -> None:
        """Ends the stream after an error, with other trainers without waiting for any of them
        unless all have it.
        """
        if self._is_closed or self._is_forked:
            return
        self._failure = self._failure or repr(error)  # the error would hold the stream
        if self._communicator is None or self._have_all(error):
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
        """Whether it is the plans', at the same step on all ranks: then nobody has sent anything of
        that step. Those that lost their process may be at different steps, and needn't ask.
        """
        if error is self._plans_error and not isinstance(error, LostError):
            assert self._communicator is not None
            self.has_failed_alike = self._communicator.all_stop_before(self._embeddings.step)
        return self.has_failed_alike

    @property
    def _owns_embeddings(self) -> bool:
        return self._embeddings.executor is self._executor

    @property
    def _is_forked(self) -> bool:
        """Whether this is a forked child's copy, which has no threads to end and no rows to
        write.
        """
        return os.getpid() != self._pid

    def _end_threads(self) -> None:
        if not self._source.stop(timeout_s=_STOP_TIMEOUT_S):
            warnings.warn(
                f"bagpipe.lookahead has ended, but its reader has not come back within "
                f"{_STOP_TIMEOUT_S:.0f} s from the loader (or from `sparse`, `share` or "
                "`hand_out`): its threads end when it does, or with the program",
                RuntimeWarning,
                stacklevel=2,
            )

    def _process_source(
        self,
        batches: Iterable[Any],
        options: StreamOptions,
        adapter: BatchAdapter,
    ) -> ProcessSource[Any]:
        # Nothing that outlives this object may hold it, or it would never end the threads of a loop
        # left by `break`.
        pinned = PinnedMemory()
        process = start_oracle(
            batches,
            options,
            adapter,
            self._embeddings.communicator,
            # Of several trainers a step's plan is held until the next one's gradients are under
            # way.
            num_places=options.prefetch_depth
            + 2 * PLANS_AHEAD
            + int(self._communicator is not None),
            on_region=pinned.pin if self._embeddings.device.type == "cuda" else lambda _: None,
        )
        # The device reads plans where the process put them: that memory goes when the executor has
        # ended.
        self._executor.at_close.append(pinned.unpin)
        self._executor.at_close.append(process.close)
        return ProcessSource(process, copy_batches=self._move is None)

    def _end_step(self) -> None:
        if self._owns_embeddings:
            self._embeddings.end_step()

    def _submit_ahead(self) -> bool:
        """Passes plans on to the executor, up to the prefetch depth; waits only for the next
        step's. False at the end.
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
        # All ranks must be as far ahead: which messages they send depends on it.
        others = self._communicator is not None
        while len(self._submitted) <= max(self._prefetch_depth, 1 if others else 0):
            planned = (
                self._wait_for_plan(self._source.next_or_none)
                if others
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
        if self._communicator is not None and planned.ids_hash and plan.joint_hash:
            act = plan_act(plan.step, plan.lookahead, planned.ids_hash, plan.joint_hash)
            # the step before sends gradients that this one needs, and replicas for it
            self._communicator.tell(act, needed_at=plan.step - 1, note=plan.failure)
        arrays, make_batch = _take_apart(planned.batch, self._move, planned.plan.step)
        self._executor.submit(planned.plan, planned.release, arrays)
        self._submitted.append((planned, make_batch))


def _take_apart(
    batch: Any, move: Move | None, step: int
) -> tuple[Sequence[MovedArray], Callable[[Sequence[Tensor]], Any]]:
    """What moves and what makes the batch of it; refuses what would arrive as something else, since
    the device copies words.
    """
    if move is None:
        return (), lambda tensors: batch
    moved: object = move(batch)
    if not (
        isinstance(moved, tuple)
        and len(moved) == 2
        and isinstance(moved[0], Sequence)
        and callable(moved[1])
    ):
        raise UsageError(
            f"step {step}: move returned a {type(moved).__name__}, must return (arrays, a function "
            "of their tensors)"
        )
    for index, array in enumerate(moved[0]):
        is_array = isinstance(array, np.ndarray)
        if (
            not is_array
            or array.dtype not in (np.int32, np.float32)
            or not array.flags.c_contiguous
        ):
            found = (
                f"{array.dtype} with strides {array.strides}"
                if is_array
                else f"a {type(array).__name__}"
            )
            raise UsageError(
                f"step {step}: array {index} of move is {found}, must be a C-contiguous numpy "
                "array of float32 or int32: "
                "convert it in hand_out, as by np.ascontiguousarray(x, np.float32)"
            )
    return moved
