"""Whole tables in RAM, as fast as Bagpipe's own kernels allow: what a cached step is compared with.

All tables are one (N, D) tensor. Nothing is known ahead, so backward first has to find the unique
rows of the batch and the order of their sums. Neighbouring tables form parts: a thread pool
de-duplicates them while the kernels of the cache sum and update finished ones.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bagpipe.cache import kernels_cpu
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.embeddings.pooled import PooledEmbeddings
from bagpipe.lookups import group_lookups, group_rows
from bagpipe.native.jit import jit
from bagpipe.oracle.dedup import dedup
from bagpipe.types import Group, Int32Array, Jagged, group_tables

_PARTS_A_THREAD = 2


@dataclass(frozen=True, kw_only=True)
class FusedBatch:
    """A batch's ids, and the same as rows of the one big table."""

    sparse: Jagged
    rows: Tensor  # (L,) int32


class FusedTables(nn.Module):
    """One (N, D) tensor for all tables of a group.

    Backward de-duplicates on a thread pool and applies the optimizer.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group, self.groups = group, (group,)
        self.weights = torch.empty(group.num_rows, group.embedding_dim)
        self.state = torch.empty(group.num_rows, group.state_width)
        self.step = 0
        num_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fused-dedup")
        self._parts = _split(group, _PARTS_A_THREAD * num_threads)
        # Autograd calls backward only where an input of forward needs a gradient.
        self._anchor = torch.zeros((), requires_grad=True)

    def prepare(self, sparse: Jagged) -> FusedBatch:
        """Adds the row numbers of all lookups to a batch, before the step."""
        rows = group_rows(self.group, sparse, group_lookups(self.group, sparse))
        return FusedBatch(sparse=sparse, rows=torch.from_numpy(rows.astype(np.int32)))

    def forward(self, batch: FusedBatch) -> PooledEmbeddings:
        """Looks up the pooled embeddings of a batch, (B, F, D) float32."""
        pooled = _FusedLookup.apply(self._anchor, self, batch)  # type: ignore[no-untyped-call]
        return PooledEmbeddings([self.group.features], [pooled])

    def lookup(self, batch: FusedBatch) -> Tensor:
        """Sums each bag's rows: (B, F, D) float32."""
        num_samples, num_features = batch.sparse.batch_size, len(self.group.features)
        plan = _plan(self.step, num_samples, num_features, batch.rows, _NOTHING)
        pooled = torch.empty(num_samples, num_features, self.weights.shape[1])
        kernels_cpu.lookup(self.weights, plan, pooled.view(num_samples * num_features, -1))
        return pooled

    def update(self, batch: FusedBatch, grads: Tensor) -> None:
        """Sums `grads` (B, F, D) float32 by row and applies the optimizer."""
        num_samples, num_features = batch.sparse.batch_size, len(self.group.features)
        flat = grads.reshape(num_samples * num_features, -1).contiguous()
        rate = self.group.optimizer.update_rate(self.step + 1)
        for part in self._pool.map(
            lambda part: part.dedup(batch.sparse, num_features), self._parts
        ):
            plan = _plan(self.step, num_samples, num_features, batch.rows, part)
            kernels_cpu.update(self.weights, self.state, plan, flat, self.group.optimizer, rate)
        self.step += 1

    def close(self) -> None:
        """Ends the pool and frees the tables."""
        self._pool.shutdown()
        self.weights = self.state = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """A `GradientSchedule` that calls rows by their numbers in the big table."""

    rows: Int32Array
    bags: Int32Array
    piece_offsets: Int32Array
    long_uniques: Int32Array
    long_offsets: Int32Array


_NONE = np.empty(0, np.int32)
_NOTHING = _Schedule(
    rows=_NONE, bags=_NONE, piece_offsets=_NONE, long_uniques=_NONE, long_offsets=_NONE
)


def _plan(
    step: int, num_samples: int, num_features: int, rows: Tensor, schedule: _Schedule
) -> DevicePlan:
    return DevicePlan(
        step=step,
        batch_size=num_samples,
        num_features=num_features,
        lookup_slots=rows,
        bag_offsets=None,
        bag_scales=None,
        unique_slots=torch.from_numpy(schedule.rows),
        bags=torch.from_numpy(schedule.bags),
        piece_offsets=torch.from_numpy(schedule.piece_offsets),
        long_uniques=torch.from_numpy(schedule.long_uniques),
        long_offsets=torch.from_numpy(schedule.long_offsets),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Neighbouring tables, with one feature each, that one call de-duplicates."""

    group: Group
    first_feature: int
    first_row: int

    def dedup(self, sparse: Jagged, num_features: int) -> _Schedule:
        """The part's rows and their schedule, in the numbers of the whole group."""
        found = dedup(self.group, sparse)
        _renumber_bags(found.bags, len(self.group.features), num_features, self.first_feature)
        return _Schedule(
            rows=(found.unique_rows + self.first_row).astype(np.int32),
            bags=found.bags,
            piece_offsets=found.piece_offsets,
            long_uniques=found.long_uniques,
            long_offsets=found.long_offsets,
        )


def _split(group: Group, num_parts: int) -> list[_Part]:
    """Cuts a group's tables into `num_parts` parts of about equally many tables."""
    num_tables = len(group.tables)
    bounds = np.linspace(0, num_tables, min(num_parts, num_tables) + 1).astype(int).tolist()
    return [
        _Part(
            group=group_tables(group.tables[first:last], group.optimizer)[0],
            first_feature=first,
            first_row=int(group.row_offsets[first]),
        )
        for first, last in pairwise(bounds)
    ]


@jit
def _renumber_bags(
    bags: Int32Array, num_features: int, all_features: int, first_feature: int
) -> None:
    """Turns output rows of a part into those of the whole group, in place."""
    for index in range(len(bags)):
        sample = np.uint32(bags[index]) // np.uint32(num_features)
        bags[index] += np.int32(sample) * (all_features - num_features) + first_feature


class _FusedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: FusedTables, batch: FusedBatch) -> Tensor:
        ctx.tables, ctx.batch = tables, batch
        return tables.lookup(batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[None, None, None]:
        ctx.tables.update(ctx.batch, grads)
        return None, None, None
