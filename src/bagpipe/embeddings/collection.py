"""`EmbeddingBagCollection`: embedding tables that live in stores, used as an ordinary `nn.Module`.

In training it serves only the batches that `bagpipe.lookahead` hands out, since the plan of a step
says where its rows are. Backward updates the rows: the tables are no parameters, as with TorchRec's
fused optimizers. In evaluation (`eval()`) it reads the stores, for any batch, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from bagpipe.cache.executor import Executor
from bagpipe.cache.graph_rows import GraphRows
from bagpipe.distributed.alone import Peers
from bagpipe.embeddings.batch_in_hand import BatchInHand, Stream
from bagpipe.embeddings.capacity import make_caches
from bagpipe.embeddings.executor_part import ExecutorPart
from bagpipe.embeddings.grad_scaling import GradScaling
from bagpipe.embeddings.lookup_function import Lookup
from bagpipe.embeddings.pooled import PooledEmbeddings
from bagpipe.embeddings.stored_tables import StoredTables
from bagpipe.embeddings.user_tensors import autocast_dtype, check_dtype, check_stays, check_tensors
from bagpipe.errors import UsageError
from bagpipe.feed.loader_states import LoaderStates
from bagpipe.jagged import as_jagged
from bagpipe.native.fork import check_same_process
from bagpipe.native.spans import span
from bagpipe.optimizers import Optimizer
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Group


class EmbeddingBagCollection(StoredTables):
    """Pooled embeddings of several tables, with the optimizer fused into backward.

    ``forward`` takes a batch's jagged ids (a KeyedJaggedTensor, a `bagpipe.Jagged` or a dict) and
    returns `PooledEmbeddings`.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        *,
        optimizer: Optimizer | Mapping[str, Optimizer],
        device: str | torch.device = "cpu",
        seed: int = 0,
        store: Callable[[Group, int], EmbeddingStore] | None = None,
        communicator: Peers | None = None,
    ) -> None:
        """Makes the stores of the tables.

        Args:
            tables: each a `TableConfig` or TorchRec's `EmbeddingBagConfig`. Tables of one
                dimension, data type and optimizer share a group.
            optimizer: fused into backward; of all tables, or of each by its name.
            device: where rows are cached, looked up and updated.
            seed: from it rows are initialised on first use.
            store: called with a group and `seed`, returns the group's store; by default memory.
                With several trainers it returns this trainer's way to a store that all share
                (`bagpipe.store.OrderedStore`). By default the first trainer of each host starts a
                shard server there. The server ends when all trainers of its host have closed these
                tables or ended.
            communicator: connects the other trainers, if there are any. Each trainer has its share
                of every batch, and gradients are averaged over trainers. For each batch all must
                call `backward`, also those without samples, or none.

        Raises:
            ConfigError: tables do not fit together, or the store is one for a single trainer.
            StoreError: a store can't be made, or a shard server can't be started.
        """
        super().__init__(
            tables,
            optimizer=optimizer,
            device=device,
            seed=seed,
            store=store,
            communicator=communicator,
        )
        self.num_skipped = [0] * len(self.groups)
        """How many of these steps did not update each group's tables, for want of a backward."""
        self.executor: Executor | ExecutorPart | None = None
        self._features = [group.features for group in self.groups]
        self._failure: BaseException | None = None
        self._in_hand = BatchInHand()
        self.stream: Callable[[], Stream | None] = lambda: None
        """The `bagpipe.lookahead` that serves these embeddings, or served them last."""
        self.loader_states: LoaderStates[Any] | None = None
        """Where its loader was, behind each batch."""
        self._num_streams = 0
        # Autograd calls a function's backward only if one of its inputs wants a gradient; the
        # tables are no tensors here.
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._scaling = GradScaling()

    @property
    def step(self) -> int:
        """Steps trained so far; the number that the next one gets."""
        return self._in_hand.step

    @step.setter
    def step(self, step: int) -> None:
        self._in_hand.step = step

    def set_grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Says which `torch.amp.GradScaler` scales the loss, or None: none does.

        From then on gradients are unscaled before they update rows. A group's gradient that is not
        finite updates nothing, and the scaler lowers its scale, as it does for the dense part. That
        costs a wait for the device in each backward.

        Raises:
            UsageError: there are several trainers.
        """
        if scaler is not None and self.peers.has_others:
            raise UsageError(
                "a GradScaler is not supported with several trainers, of which one alone may "
                "overflow: use autocast with bfloat16, which needs none"
            )
        self._scaling.tell(scaler)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Says whether backward updates the rows.

        The tables are no parameters, so a call on a module around this one does not reach them.
        """
        self._anchor.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `half` and their like do, also those of a module around this one."""
        check_stays(self._anchor.device, fn(torch.zeros(1, device=self.device)))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def forward(self, sparse: Any) -> PooledEmbeddings:
        """Looks up and pools the ids of one batch.

        In training, `sparse` must be that of the batch which `bagpipe.lookahead` handed out last,
        and may be passed once.
        """
        if not self.training:
            return PooledEmbeddings(self._features, self._read(as_jagged(sparse)))
        plans = self._in_hand.plans_of(sparse, self.executor)
        self._in_hand.was_served = torch.is_grad_enabled() and self._anchor.requires_grad
        assert self.executor is not None
        return PooledEmbeddings(
            self._features,
            [
                Lookup.apply(
                    self._anchor,
                    self.executor,
                    index,
                    plan,
                    autocast_dtype(self.device),
                    self._scaling,
                )  # type: ignore[no-untyped-call]
                for index, plan in enumerate(plans)
            ],
        )

    def lookup(
        self,
        sparse: Any,
        *,
        dtype: torch.dtype = torch.float32,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """`forward` outside of autograd, for training loops that call `update` themselves.

        Args:
            sparse: as in `forward`.
            dtype: of the result, float32 or bfloat16.
            out: contiguous tensors of either type, by group, to which the result is written.

        Returns:
            Pooled embeddings (B, F, D), by group.
        """
        with span("lookup"):
            plans = self._in_hand.plans_of(sparse, self.executor)
            check_dtype(self.step, dtype)
            if out is not None:
                what = f"step {self.step}: lookup's out"
                check_tensors(
                    what, out, self.groups, plans, device=self._anchor.device, contiguous=True
                )
            self._in_hand.was_served, self._in_hand.to_update = True, plans
            assert self.executor is not None
            outs = [None] * len(plans) if out is None else out
            return [
                cache.lookup(plan, dtype=dtype, out=into)
                for cache, plan, into in zip(self.executor.caches, plans, outs, strict=True)
            ]

    def update(self, grads: Sequence[Tensor]) -> None:
        """Updates the rows of the last `lookup`; once a step.

        Args:
            grads: gradients of its result, (B, F, D) in float32 or bfloat16, by group.

        Raises:
            UsageError: there was no lookup in this step, it was updated already, the embeddings
                are frozen, or a gradient has another shape, type or device.
        """
        plans = self._in_hand.to_update
        if self.executor is None or not plans or self.executor.current is not plans:
            raise UsageError(
                f"step {self.step}: update was called without a lookup in this step, or twice: "
                "call lookup, then update, once each"
            )
        if not self._anchor.requires_grad:
            raise UsageError(
                f"step {self.step}: update was called, but requires_grad_(False) has frozen the "
                "embeddings"
            )
        what = f"step {self.step}: update's gradients"
        check_tensors(what, grads, self.groups, plans, device=self._anchor.device)
        unscaled = [self._scaling.unscaled(grad) for grad in grads]
        with span("update"), self.executor.undivided():
            for index, (plan, grad) in enumerate(zip(plans, unscaled, strict=True)):
                if grad is not None:
                    self.executor.update(index, plan, grad)
            self._in_hand.to_update = ()

    def rows_in_graph(self, sparse: Any) -> GraphRows | None:
        """What looks up and updates a batch's rows within a CUDA graph, in place of both calls.

        Args:
            sparse: as in `forward`.

        Returns:
            None where only `lookup` and `update` can: on a CPU, in the first steps, and with
            several trainers whose rows don't travel by peer memory.
        """
        can_hold = self._anchor.requires_grad and self._scaling.scaler() is None
        return self._in_hand.rows_in_graph(sparse, self.executor) if can_hold else None

    def start(
        self, num_slots: Sequence[int], num_replica_slots: Sequence[int] | None = None
    ) -> Executor:
        """Gives the tables a cache and an executor of plans; an earlier one must be stopped first.

        Args:
            num_slots: of the cache, by group.
            num_replica_slots: with several trainers, by group, for the rows of one step that others
                own.
        """
        caches = make_caches(
            self.groups, num_slots, num_replica_slots, device=self.device, seed=self.seed
        )
        stream = self._num_streams + 1
        executor = Executor(caches, self.stores, self.peers, self.num_skipped, stream)
        self.serve(executor)
        return executor

    def serve(self, executor: Executor | ExecutorPart) -> None:
        """Lets lookups and updates go to `executor`, up to `stop`."""
        assert self.executor is None
        self._pid = os.getpid()
        self._num_streams += 1
        self.executor = executor

    def begin_step(self, sparse: object) -> None:
        """Makes the rows of the next submitted plan ready.

        `sparse` is the batch's sparse part as the user will pass it.
        """
        assert isinstance(self.executor, Executor)
        self.executor.begin_step()
        self.expect(sparse)

    def expect(self, sparse: object) -> None:
        """Takes `sparse` as that of the step whose rows are ready."""
        self._in_hand.expect(sparse)

    def end_step(self) -> None:
        """Closes the step that `begin_step` opened, if there is one."""
        if self.executor is None or not self.executor.is_in_step:
            return
        self.note_step(self.executor.step + 1)  # twice is once, should an interrupt come here
        self.executor.end_step()

    def note_step(self, step: int) -> None:
        """Notes that `step` steps are trained, and that no batch is being trained."""
        self._in_hand.step = step
        self._in_hand.let_go()

    @property
    def is_batch_unused(self) -> bool:
        """Whether a batch has been handed out whose embeddings nobody has asked for yet."""
        executor = self.executor
        return executor is not None and executor.is_in_step and not self._in_hand.was_asked

    def note_stream(self, stream: Callable[[], Stream | None], states: LoaderStates[Any]) -> None:
        """Notes the `bagpipe.lookahead` that serves these embeddings."""
        self.stream, self.loader_states = stream, states

    @contextmanager
    def being_restored(self) -> Iterator[None]:
        """A context in which all records are replaced; after a failure the tables refuse all use.

        Raises:
            UsageError: a stream is running.
        """
        self._check_idle("restore")
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise
        self._failure, self.stream, self.loader_states = None, lambda: None, None

    def flush(self) -> None:
        """Writes all resident rows to the stores, which hold everything until the next update.

        Raises:
            UsageError: rows were lost by an earlier failure.
        """
        self._check_nothing_lost()
        self._check_not_forked()
        if self.executor is not None:
            self.executor.flush()

    def _check_not_forked(self) -> None:
        if self.executor is not None:
            check_same_process(self._pid, "embeddings in training")

    def _check_nothing_lost(self) -> None:
        if self._failure is not None:
            raise UsageError(
                f"embedding rows were lost after step {self.step} ({self._failure}): restore a "
                "checkpoint into new embeddings"
            ) from self._failure

    def stop(self) -> None:
        """Closes an open step, flushes and gives the cache back.

        `eval()` and a new `bagpipe.lookahead` go on from here.
        """
        self._check_not_forked()
        try:
            self.end_step()
            self.flush()
        except BaseException as error:
            # After an interrupt it can be called again, unless other trainers have gone on.
            if isinstance(error, Exception) or self.peers.has_others:
                self.fail(error)
            raise
        self._end_executor()

    def fail(self, error: BaseException) -> None:
        """Gives the cache back without flushing, because moving rows failed.

        The tables refuse all use from now on.
        """
        if self.executor is not None:
            self._failure = error
            self.peers.tell_failed(error)
            self._end_executor()

    def _end_executor(self) -> None:
        if self.executor is not None:
            self.executor.close(has_failed=self._failure is not None)
            self.leave(self._failure)

    def leave(self, failure: BaseException | None) -> None:
        """Leaves a stream that is over; with a failure the tables refuse all use from now on."""
        self.executor, self._failure = None, failure
        self._in_hand.let_go()

    @property
    def failure(self) -> BaseException | None:
        """What lost rows, if anything did."""
        return self._failure

    def close(self) -> None:
        """Stops and closes the stores; nothing can be read afterwards.

        After a failure, which was raised then, and in a forked child it only closes the stores.
        """
        try:
            if self._failure is None and (self.executor is None or self._pid == os.getpid()):
                self.stop()
        finally:
            for store in self.stores:
                store.close()
            self._let_go()

    def _check_idle(self, what: str) -> None:
        """Refuses to write to the stores while the cache has newer rows, and would undo it."""
        if self.executor is not None:
            raise UsageError(
                f"{what} while bagpipe.lookahead is running: load before the training loop, or "
                "call stop()"
            )
