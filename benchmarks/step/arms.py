"""The arms of `step`: each is one way to hold tables, look rows up, and update them in backward.

    bagpipe      tables in a `MemoryStore`, a small cache; `bagpipe.lookahead` reads ahead and plans
                 live
    fused        whole tables in RAM, Bagpipe's own kernels; de-duplication on the critical path, on
                 all cores
    fbgemm       whole tables in RAM, FBGEMM's CPU table-batched embedding bags, with row-wise
                 Adagrad fused
    torch_bags   whole tables in RAM, one `nn.EmbeddingBag(sparse=True)` a table; plain SGD instead
                 of Adagrad, for orientation

All take the same batches and, through `load`, the same initial rows. For the arms in memory,
whatever a data loader could do beforehand is done beforehand: linear row numbers for `fused`, index
and offset tensors for `fbgemm` and `torch_bags`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.lookahead import lookahead
from bagpipe.embeddings.pooled import PooledEmbeddings
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.types import Float32Array, Group, Jagged, TableConfig
from benchmarks.step.fused import FusedTables


class Arm(Protocol):
    """One way to train embedding tables; batches are given once, then trained in order."""

    name: str

    @property
    def embeddings(self) -> nn.Module:
        """Maps the sparse part that `batches` yields to `PooledEmbeddings`.

        Backward updates the rows, but for what `finish_step` does.
        """

    def load(self, first_row: int, records: Float32Array) -> None:
        """Sets rows `first_row` .. `first_row + n` to `records` (n, record_width)."""

    def batches(self, batches: Sequence[TorchBatch]) -> Iterator[tuple[TorchBatch, Any]]:
        """Yields each batch, and its sparse part as `embeddings` takes it."""

    def finish_step(self) -> None:
        """Does what remains to be done after backward."""

    def close(self) -> None:
        """Frees the tables."""


class BagpipeArm:
    """Bagpipe with its defaults; only the cache's size and the lookahead are given."""

    name = "bagpipe"

    def __init__(self, group: Group, *, cache_rows: int, lookahead: int) -> None:
        self._cache_rows, self._lookahead = cache_rows, lookahead
        self._stream: Lookahead[TorchBatch] | None = None
        self.embeddings = EmbeddingBagCollection(group.tables, optimizer=group.optimizer)

    @property
    def stream(self) -> Lookahead[TorchBatch]:
        """The running lookahead."""
        assert self._stream is not None
        return self._stream

    def load(self, first_row: int, records: Float32Array) -> None:
        """See `Arm.load`. All rows count as written from then on, as in a run of some age."""
        self.embeddings.stores[0].write(np.arange(first_row, first_row + len(records)), records)

    def batches(self, batches: Sequence[TorchBatch]) -> Iterator[tuple[TorchBatch, Any]]:
        """See `Arm.batches`."""
        self._stream = lookahead(
            batches, self.embeddings, cache=self._cache_rows, lookahead=self._lookahead
        )
        return ((batch, batch.sparse) for batch in self._stream)

    def finish_step(self) -> None:
        """See `Arm.finish_step`. Nothing is left to do."""

    def close(self) -> None:
        """See `Arm.close`."""
        if self._stream is not None:
            self._stream.close()
        self.embeddings.close()


class FusedArm:
    """The strongest tables in RAM that Bagpipe's kernels allow."""

    name = "fused"

    def __init__(self, group: Group) -> None:
        self.embeddings = FusedTables(group)

    def load(self, first_row: int, records: Float32Array) -> None:
        """See `Arm.load`."""
        dim = self.embeddings.group.embedding_dim
        rows = slice(first_row, first_row + len(records))
        self.embeddings.weights[rows] = torch.from_numpy(records[:, :dim])
        self.embeddings.state[rows] = torch.from_numpy(records[:, dim:])

    def batches(self, batches: Sequence[TorchBatch]) -> Iterator[tuple[TorchBatch, Any]]:
        """See `Arm.batches`."""
        return iter([(batch, self.embeddings.prepare(batch.sparse)) for batch in batches])

    def finish_step(self) -> None:
        """See `Arm.finish_step`. Nothing is left to do."""

    def close(self) -> None:
        """See `Arm.close`."""
        self.embeddings.close()


class FbgemmArm:
    """FBGEMM's tables on the CPU, with the optimizer fused.

    Indices are int64; int32 ones take as long (measured).

    Raises:
        ImportError: fbgemm-gpu-cpu is not installed.
    """

    name = "fbgemm"

    def __init__(self, group: Group) -> None:
        with warnings.catch_warnings():
            # Importing it warns of optional parts that its CPU build does not have, which users
            # can't change.
            warnings.simplefilter("ignore")
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                EmbeddingLocation,
                SplitTableBatchedEmbeddingBagsCodegen,
            )

        assert isinstance(group.optimizer, RowWiseAdagrad)
        self._group = group
        place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self._tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(table.num_embeddings, table.embedding_dim, *place) for table in group.tables],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=group.optimizer.lr,
            eps=group.optimizer.eps,
        )
        self.embeddings = _FbgemmTables(group, self._tables)

    def load(self, first_row: int, records: Float32Array) -> None:
        """See `Arm.load`. The optimizer's state starts at zero, as FBGEMM makes it."""
        weights = self._tables.split_embedding_weights()
        _load_tables(self._group, weights, first_row, records)

    def batches(self, batches: Sequence[TorchBatch]) -> Iterator[tuple[TorchBatch, Any]]:
        """See `Arm.batches`."""
        return iter([(batch, _indices_and_offsets(batch.sparse)) for batch in batches])

    def finish_step(self) -> None:
        """See `Arm.finish_step`. Nothing is left to do."""

    def close(self) -> None:
        """See `Arm.close`."""
        del self._tables, self.embeddings


class _FbgemmTables(nn.Module):
    def __init__(self, group: Group, tables: nn.Module) -> None:
        super().__init__()
        self.groups, self.tables = (group,), tables

    def forward(self, sparse: tuple[Tensor, Tensor]) -> PooledEmbeddings:
        group = self.groups[0]
        pooled: Tensor = self.tables(*sparse)  # (B, F * D)
        return PooledEmbeddings(
            [group.features], [pooled.view(len(pooled), len(group.features), -1)]
        )


def _indices_and_offsets(sparse: Jagged) -> tuple[Tensor, Tensor]:
    indices = torch.from_numpy(sparse.values.astype(np.int64))
    return indices, torch.arange(len(indices) + 1)


class TorchBagsArm:
    """What torch offers without help: a module a table, gradients as sparse tensors, SGD."""

    name = "torch_bags"

    def __init__(self, group: Group) -> None:
        self._group = group
        self.embeddings = _TorchBags(group)
        self._optimizer = torch.optim.SGD(self.embeddings.parameters(), lr=group.optimizer.lr)

    def load(self, first_row: int, records: Float32Array) -> None:
        """See `Arm.load`."""
        _load_tables(
            self._group, [bag.weight.detach() for bag in self.embeddings.bags], first_row, records
        )

    def batches(self, batches: Sequence[TorchBatch]) -> Iterator[tuple[TorchBatch, Any]]:
        """See `Arm.batches`."""
        return iter(
            [
                (batch, _indices_and_offsets(batch.sparse)[0].view(-1, batch.batch_size))
                for batch in batches
            ]
        )

    def finish_step(self) -> None:
        """See `Arm.finish_step`. Runs the optimizer, since torch's backward does not."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """See `Arm.close`."""
        del self.embeddings, self._optimizer


class _TorchBags(nn.Module):
    bags: Sequence[nn.EmbeddingBag]

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.groups = (group,)
        bags = [
            nn.EmbeddingBag.from_pretrained(_empty(table), freeze=False, mode="sum", sparse=True)
            for table in group.tables
        ]
        self.bags = nn.ModuleList(bags)  # type: ignore[assignment]

    def forward(self, indices: Tensor) -> PooledEmbeddings:
        pooled = [bag(ids[:, None]) for bag, ids in zip(self.bags, indices, strict=True)]
        return PooledEmbeddings([self.groups[0].features], [torch.stack(pooled, dim=1)])


def _empty(table: TableConfig) -> Tensor:
    return torch.empty(table.num_embeddings, table.embedding_dim)


def _load_tables(
    group: Group, weights: Sequence[Tensor], first_row: int, records: Float32Array
) -> None:
    """Copies to each table's weights the part of `records` that belongs to its rows."""
    for index, weight in enumerate(weights):
        start, end = int(group.row_offsets[index]), int(group.row_offsets[index + 1])
        low, high = max(start, first_row), min(end, first_row + len(records))
        if low < high:
            part = records[low - first_row : high - first_row, : group.embedding_dim]
            weight[low - start : high - start] = torch.from_numpy(part)
