"""The arms of `gpu` that need no FBGEMM: each is one way to hold tables, read and update rows.

    dense       no embedding work at all: the least that a step can take
    bagpipe     tables in a store in host memory or a file; `bagpipe.lookahead` reads prepared files
                and plans live
    torch_cpu   tables in host memory, looked up by `torch.nn.functional.embedding_bag` on the CPU;
                pooled embeddings and their gradients are copied; sparse gradients, row-wise Adagrad
                written with torch operations

An arm writes pooled embeddings into the buffer that the dense part reads, and takes their gradients
from there. The arm of a shard server is in `served`, those of FBGEMM in `fbgemm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bagpipe.cache.graph_rows import GraphRows
from bagpipe.data.base import Batch
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.lookahead import lookahead
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.store.base import EmbeddingStore
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.types import Float32Array, Group, Int64Array
from benchmarks.prepared_stream import ResidentBatch, Stream
from benchmarks.workloads import Workload


class StepArm(Protocol):
    """One way to train embedding tables.

    A step is `next_batch`, `lookup`, the dense part, `update`.
    """

    name: str

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """Sets `rows` (n,), ascending, to `records` (n, record_width).

        With several trainers every rank is given all of them.
        """

    def start(self) -> None:
        """Prepares for the first batch, once all rows are loaded."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Dense features and labels of the next batch, or of the rank's share of it.

        They are on the device or in pinned memory.
        """

    def lookup(self, pooled: Tensor) -> None:
        """Fills `pooled` (B, F, D) for the batch."""

    def update(self, grads: Tensor) -> None:
        """Updates the batch's rows with `grads` (B, F, D), averaged over ranks."""

    def close(self) -> None:
        """Frees the tables, all ranks together; the last step may lack its update."""


class GpuArm(StepArm, Protocol):
    """An arm of `gpu`, whose embedding work is also timed alone."""

    def kernels(self, pooled: Tensor, grads: Tensor) -> dict[str, Callable[[], object]]:
        """The embedding work of the last batch that was looked up, by name.

        Each part can be called any number of times.
        """


class _Batch(Protocol):
    @property
    def dense(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


class DenseArm:
    """The dense part alone, on embeddings that stay; it repeats its few batches."""

    name = "dense"

    def __init__(self, batches: Sequence[_Batch]) -> None:
        self._batches = batches
        self._step = 0

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """Has no rows."""

    def start(self) -> None:
        """See `StepArm.start`."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        batch = self._batches[self._step % len(self._batches)]
        self._step += 1
        return batch.dense, batch.labels

    def lookup(self, pooled: Tensor) -> None:
        """Leaves `pooled` as it is."""

    def update(self, grads: Tensor) -> None:
        """Does nothing."""

    def kernels(self, pooled: Tensor, grads: Tensor) -> dict[str, Callable[[], object]]:
        """Has none."""
        return {}

    def close(self) -> None:
        """See `StepArm.close`."""


class BagpipeArm:
    """Bagpipe as `bagpipe train` runs it: reader, oracle and transfers are live.

    On CUDA the oracle is in a process of its own, unless the workload says where.
    """

    def __init__(
        self,
        workload: Workload,
        group: Group,
        batches: Iterable[Any],
        *,
        device: torch.device,
        name: str = "bagpipe",
        store: Callable[[Group, int], EmbeddingStore] | None = None,
        communicator: Communicator | None = None,
        overlap: bool = True,
    ) -> None:
        """Makes the arm.

        Args:
            workload: what is trained.
            group: its tables.
            batches: what is trained on; with a communicator, global batches.
            device: of the cache.
            name: of the arm.
            store: makes the group's store; None: a store in memory.
            communicator: makes this one rank of several; None: there is one trainer.
            overlap: as in `bagpipe.lookahead`.
        """
        self.name, self._workload, self._batches = name, workload, batches
        self._overlap, self._device = overlap, device
        self._is_writer = communicator is None or communicator.rank == 0
        self._num_trainers = 1 if communicator is None else communicator.num_trainers
        self.embeddings = EmbeddingBagCollection(
            group.tables,
            optimizer=group.optimizer,
            device=device,
            store=store,
            communicator=communicator,
        )
        self._lookahead: Lookahead[TorchBatch] | None = None
        self._batch: TorchBatch | None = None

    @property
    def lookahead(self) -> Lookahead[TorchBatch]:
        """The running lookahead."""
        assert self._lookahead is not None
        return self._lookahead

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """See `StepArm.load`. Rows count as written from then on, as in a run's second epoch.

        Ranks share their store, so the first one writes.
        """
        if self._is_writer:
            self.embeddings.stores[0].write(rows, records)

    def start(self) -> None:
        """See `StepArm.start`."""
        self._lookahead = lookahead(
            self._batches,
            self.embeddings,
            cache=self._workload.cache_rows,
            lookahead=self._workload.lookahead,
            dedup_threads=self._workload.dedup_threads,
            prefetch_depth=self._workload.prefetch_depth,
            oracle=self._workload.oracle
            or ("process" if self._device.type == "cuda" else "thread"),
            hand_out=Batch.without_ids,
            move=TorchBatch.moved,
            overlap=self._overlap,
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        self._batch = next(self.lookahead)
        return self._batch.dense, self._batch.labels

    def lookup(self, pooled: Tensor) -> None:
        """See `StepArm.lookup`."""
        assert self._batch is not None
        self.embeddings.lookup(self._batch.sparse, out=[pooled])

    def update(self, grads: Tensor) -> None:
        """See `StepArm.update`."""
        self.embeddings.update([grads])

    def rows(self) -> GraphRows | None:
        """What does both within the dense part's graph, if it can hold them."""
        assert self._batch is not None
        return self.embeddings.rows_in_graph(self._batch.sparse)

    def kernels(self, pooled: Tensor, grads: Tensor) -> dict[str, Callable[[], object]]:
        """See `GpuArm.kernels`."""
        executor = self.embeddings.executor
        assert executor is not None
        assert executor.current is not None
        (cache,), (plan,) = executor.caches, executor.current
        return {
            "lookup": lambda: cache.lookup(plan, out=pooled),
            "update": lambda: cache.update(plan, grads),
        }

    def counters(self) -> dict[str, float]:
        """What the oracle decided so far, and the milliseconds that the loop waited."""
        report, waits = self.lookahead.report, self.lookahead.waits
        names = (
            "num_steps",
            "num_uniques",
            "num_fetched",
            "num_fetched_urgent",
            "num_written_back",
        )
        waited = {
            name.replace("_s", "_wait_ms"): 1e3 * seconds for name, seconds in asdict(waits).items()
        }
        return {name: float(getattr(report, name)) for name in names} | waited

    def counters_since(self, before: dict[str, float]) -> dict[str, float]:
        """`counters` a step since `before`, and how full the cache is."""
        after = self.counters()
        num_steps = after["num_steps"] - before["num_steps"]
        per_step = {
            name: (after[name] - before[name]) / num_steps for name in after if name != "num_steps"
        }
        return per_step | {
            "hit_rate": 1.0 - per_step["num_fetched"] / per_step["num_uniques"],
            "cache_filled": self.lookahead.report.peak_slots
            / (self._workload.cache_rows * self._num_trainers),
        }

    def close(self) -> None:
        """See `StepArm.close`."""
        if self._lookahead is not None:
            self._lookahead.close()
        self.embeddings.close()


class TorchCpuArm:
    """What torch offers without help: a tensor a table, sparse gradients, everything by copies."""

    name = "torch_cpu"

    def __init__(self, group: Group, stream: Stream) -> None:
        assert isinstance(group.optimizer, RowWiseAdagrad)
        self._group, self._optimizer = group, group.optimizer
        self._batches: Sequence[ResidentBatch] = stream.resident
        self._step = 0
        dim = group.embedding_dim
        self._weights = [
            torch.empty(table.num_embeddings, dim, requires_grad=True) for table in group.tables
        ]
        self._state = [torch.zeros(table.num_embeddings, 1) for table in group.tables]
        self._pooled: Tensor | None = None

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """See `StepArm.load`."""
        with torch.no_grad():
            load_tables(self._group, self._weights, rows, records)

    def start(self) -> None:
        """See `StepArm.start`."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        batch = self._batches[self._step % len(self._batches)]
        self._step += 1
        indices, offsets = batch.indices.cpu(), batch.offsets.cpu().to(torch.int32)
        size = len(batch.labels)
        pooled = []
        for index, weight in enumerate(self._weights):
            bounds = offsets[index * size : (index + 1) * size + 1]
            ids = indices[int(bounds[0]) : int(bounds[-1])]
            pooled.append(
                embedding_bag(ids, weight, bounds[:-1] - bounds[0], mode="sum", sparse=True)
            )
        self._pooled = torch.stack(pooled, dim=1)
        return batch.dense, batch.labels

    def lookup(self, pooled: Tensor) -> None:
        """See `StepArm.lookup`. Only copies: the CPU has done its part in `next_batch`."""
        assert self._pooled is not None
        pooled.copy_(self._pooled.detach())

    def update(self, grads: Tensor) -> None:
        """See `StepArm.update`."""
        assert self._pooled is not None
        self._pooled.backward(grads.to("cpu", torch.float32))
        with torch.no_grad():
            for weight, state in zip(self._weights, self._state, strict=True):
                assert weight.grad is not None
                grad = weight.grad.coalesce()
                rows, values = grad.indices()[0], grad.values()
                squares = state[rows] + values.square().mean(1, keepdim=True)
                state[rows] = squares
                weight[rows] -= self._optimizer.lr * values / (squares.sqrt() + self._optimizer.eps)
                weight.grad = None

    def kernels(self, pooled: Tensor, grads: Tensor) -> dict[str, Callable[[], object]]:
        """Has none on the device."""
        return {}

    def close(self) -> None:
        """See `StepArm.close`."""
        self._weights, self._state = [], []


def load_tables(
    group: Group,
    weights: Sequence[Any],
    rows: Int64Array,
    records: Float32Array,
    firsts: Sequence[int] | None = None,
) -> None:
    """Copies to each table's weights the records of its rows.

    Args:
        group: the tables.
        weights: a tensor a table, on any device, or a part of the table.
        rows: (n,) int64, ascending.
        records: (n, record_width) float32.
        firsts: the id at which each tensor begins, where these are parts; None: 0.
    """
    for index, weight in enumerate(weights):
        first = int(group.row_offsets[index]) + (0 if firsts is None else firsts[index])
        begin, end = np.searchsorted(rows, [first, first + len(weight)]).tolist()
        if begin < end:
            ids = torch.from_numpy(rows[begin:end] - first).to(weight.device)
            values = torch.from_numpy(
                np.ascontiguousarray(records[begin:end, : group.embedding_dim])
            )
            weight[ids] = values.to(weight.device)
