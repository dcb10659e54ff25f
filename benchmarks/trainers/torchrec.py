"""The TorchRec arms of `trainers`: tables sharded by row, TorchRec's own messages and kernels.

    torchrec               shards in the devices' memory
    torchrec_uvm           shards in host memory, behind a cache of as many rows a rank as Bagpipe's
                           (LRU)
    torchrec_uvm_prefetch  the same; the next batch's rows are fetched into the cache between
                           forward and backward

The steps are those of TorchRec's pipelines (`torchrec.distributed.train_pipeline`), of which only
the part that concerns embeddings is left, on streams of their own. In `TrainPipelineSparseDist` the
next batch's ids travel while this one is computed; in `PrefetchTrainPipelineSparseDist` it is the
ids of the batch after that. Ids and lengths are on the device beforehand. The optimizer is row-wise
Adagrad on float32 weights, and gradients are averaged over ranks as TorchRec does. On CUDA pooled
embeddings and their gradients are bfloat16, in messages too.

Counted as sent are: ids and lengths for other ranks, behind compute; and on the critical path
pooled partial sums to the ranks that have the samples (a reduce-scatter) and their gradients back
(an all-gather).

Needs TorchRec 1.6 or later, and FBGEMM of the same version.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bagpipe.lookups import group_lookups
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.types import Float32Array, Group, Int64Array, Jagged
from benchmarks.gpu.arms import load_tables
from benchmarks.gpu.fbgemm import cache_sets
from benchmarks.trainers.arms import Sent, Share
from benchmarks.workloads import Workload

_ID_BYTES: Final = 8
_LENGTH_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class TorchRecSettings:
    """What distinguishes the arms."""

    kernel: str = "fused"
    prefetch: bool = False


TORCHREC_ARMS: Final[Mapping[str, TorchRecSettings]] = {
    "torchrec": TorchRecSettings(),
    "torchrec_uvm": TorchRecSettings(kernel="fused_uvm_caching"),
    "torchrec_uvm_prefetch": TorchRecSettings(kernel="fused_uvm_caching", prefetch=True),
}


def missing_torchrec(names: Sequence[str], device: str) -> dict[str, str]:
    """Which of the arms `names` can't run on `device`, and why."""
    wanted = [name for name in names if name in TORCHREC_ARMS]
    if not wanted:
        return {}
    try:
        # Importing it warns of optional parts that FBGEMM lacks here; it works without.
        with warnings.catch_warnings(action="ignore"):
            import torchrec  # noqa: F401
    except ImportError as error:
        return dict.fromkeys(
            wanted, f"{error}; pip install torchrec, of the version that belongs to this torch"
        )
    return {
        name: "host memory behind a cache needs --device cuda"
        for name in wanted
        if name != "torchrec" and device == "cpu"
    }


@dataclass(kw_only=True)
class _Input:
    """A batch's ids on their way."""

    context: Any
    ids: Any  # what TorchRec awaits: how many ids come, then the ids
    has_sizes: bool = False
    is_prefetched: bool = False


class TorchRecArm:
    """One rank's side of one of `TORCHREC_ARMS`."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        group: Group,
        shares: Sequence[Share],
        device: torch.device,
        num_devices: int,
    ) -> None:
        """Shards the tables over the ranks of the default process group.

        Args:
            name: one of `TORCHREC_ARMS`.
            workload: tells how many rows a cache has.
            group: the tables.
            shares: the rank's shares of all batches, in order.
            device: of the rank.
            num_devices: devices that the ranks have together.

        Raises:
            ImportError: torchrec is not installed.
        """
        self.name, self.sent = name, Sent()
        self._group, self._shares, self._device = group, shares, device
        self._settings = TORCHREC_ARMS[name]
        self._num_trainers, self._rank = dist.get_world_size(), dist.get_rank()
        self._tables = _shard(group, self._settings, workload.cache_rows, device, num_devices)
        self._batches = [_keyed_jagged(share.sparse, device) for share in shares]
        self._foreign_bytes = [self._bytes_for_others(share.sparse, group) for share in shares]
        self._side, self._prefetching = _Stream(device), _Stream(device)
        self._inputs: deque[_Input] = deque()
        self._num_begun = 0
        self._step = -1
        self._pooled: Tensor | None = None

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """See `StepArm.load`. Keeps the rows of this rank's shards.

        The optimizer's state starts at zero, as TorchRec makes it.
        """
        shards = self._tables.state_dict()
        weights, firsts = [], []
        for table in self._group.tables:
            local = shards[f"embedding_bags.{table.name}.weight"].local_shards()
            weights.append(local[0].tensor if local else torch.empty(0, table.embedding_dim))
            firsts.append(local[0].metadata.shard_offsets[0] if local else 0)
        with torch.no_grad():
            load_tables(self._group, weights, rows, records, firsts)

    def start(self) -> None:
        """See `StepArm.start`."""
        self._begin_next()
        self._await_sizes(self._inputs[0])
        if self._settings.prefetch:
            self._begin_next()
            self._await_sizes(self._inputs[1])
            self._prefetch(self._inputs[0])

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        self._step += 1
        share = self._shares[self._step]
        return share.dense, share.labels

    def lookup(self, pooled: Tensor) -> None:
        """See `StepArm.lookup`."""
        current = self._inputs.popleft()
        self._begin_next()
        self._await_ids(current)
        (self._prefetching if current.is_prefetched else self._side).hand_to_current(current)
        result = self._tables.compute_and_output_dist(current.context, current.ids).wait()
        self._pooled = result.values()
        pooled.copy_(self._pooled.detach().view(pooled.shape))
        if self._settings.prefetch and self._inputs:
            self._prefetch(self._inputs[0])
        if self._inputs:
            self._await_sizes(self._inputs[-1])
        self.sent.add(self._step, "overlapped", self._foreign_bytes[self._step])
        # Twice, since their gradients come back.
        self.sent.add(self._step, "urgent", 2 * self._pooled.nbytes * (self._num_trainers - 1))

    def update(self, grads: Tensor) -> None:
        """See `StepArm.update`."""
        assert self._pooled is not None
        self._pooled.backward(grads.reshape(len(grads), -1).to(self._pooled.dtype))
        self._pooled = None

    def close(self) -> None:
        """See `StepArm.close`. Awaits the ids on their way, since the other ranks send them."""
        for left in self._inputs:
            self._await_sizes(left)
            self._await_ids(left)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        del self._tables, self._batches, self._inputs

    def _begin_next(self) -> None:
        """Begins to send the ids of the next batch, if there is one."""
        if self._num_begun < len(self._batches):
            with self._side.entered():
                context = self._tables.create_context()
                ids = self._tables.input_dist(context, self._batches[self._num_begun])
            self._inputs.append(_Input(context=context, ids=ids))
            self._num_begun += 1

    def _await_sizes(self, waiting: _Input) -> None:
        """Waits until it is known how many ids come, and asks for them; on CUDA the host waits."""
        if not waiting.has_sizes:
            with self._side.entered():
                waiting.ids, waiting.has_sizes = waiting.ids.wait(), True

    def _await_ids(self, waiting: _Input) -> None:
        """Awaits the ids themselves, on the stream on which they come."""
        if not waiting.is_prefetched:
            with self._side.entered():
                waiting.ids = waiting.ids.wait()

    def _prefetch(self, waiting: _Input) -> None:
        """Fetches a batch's rows into the cache, on a stream of its own."""
        self._await_ids(waiting)
        main = torch.cuda.current_stream(self._device)
        with self._prefetching.entered():
            self._side.hand_to_current(waiting)
            self._tables.prefetch(ctx=waiting.context, dist_input=waiting.ids, forward_stream=main)
        waiting.is_prefetched = True

    def _bytes_for_others(self, sparse: Jagged, group: Group) -> int:
        """Bytes of the ids whose rows other ranks have, and of all bags' lengths for each rank."""
        lookups, num_foreign = group_lookups(group, sparse), 0
        for feature, table in enumerate(group.feature_tables):
            first = int(lookups.feature_starts[feature])
            ids = sparse.values[first : first + int(lookups.feature_lengths[feature])]
            rows_a_rank = -(-group.tables[table].num_embeddings // self._num_trainers)
            num_foreign += int(np.count_nonzero(ids // rows_a_rank != self._rank))
        num_lengths = len(group.features) * sparse.batch_size * (self._num_trainers - 1)
        return _ID_BYTES * num_foreign + _LENGTH_BYTES * num_lengths


class _Stream:
    """A CUDA stream beside the current one; on a CPU, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def entered(self) -> AbstractContextManager[object]:
        """Makes it the current stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def hand_to_current(self, made: _Input) -> None:
        """Makes the current stream wait for this one, and use what it has made."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            made.ids.record_stream(current)
            made.context.record_stream(current)


def _shard(
    group: Group,
    settings: TorchRecSettings,
    cache_rows: int,
    device: torch.device,
    num_devices: int,
) -> Any:  # a ShardedEmbeddingBagCollection
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv

    assert isinstance(group.optimizer, RowWiseAdagrad)
    tables = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.feature_names),
            pooling=PoolingType.SUM,
        )
        for table in group.tables
    ]
    fused: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": group.optimizer.lr,
        "eps": group.optimizer.eps,
        "stochastic_rounding": False,
        "output_dtype": SparseType.BF16 if device.type == "cuda" else SparseType.FP32,
    }
    if settings.kernel == "fused_uvm_caching":
        fused |= {
            "cache_sets": cache_sets(cache_rows),
            "prefetch_pipeline": settings.prefetch,
            "uvm_host_mapped": True,
        }
    sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    module = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
    plan = construct_module_sharding_plan(
        module,
        {table.name: row_wise(compute_kernel=settings.kernel) for table in group.tables},
        sharder,
        local_size=num_devices,
        world_size=dist.get_world_size(),
        device_type=device.type,
    )
    return sharder.shard(module, plan, ShardingEnv.from_process_group(dist.group.WORLD), device)


def _keyed_jagged(sparse: Jagged, device: torch.device) -> Any:
    """A batch in TorchRec's form, on the device: int64 ids and int32 lengths."""
    from torchrec import KeyedJaggedTensor

    num_bags = len(sparse.keys) * sparse.batch_size
    lengths = (
        np.ones(num_bags, np.int32)
        if sparse.offsets is None
        else np.diff(sparse.offsets).astype(np.int32)
    )
    return KeyedJaggedTensor(
        keys=list(sparse.keys),
        values=torch.from_numpy(sparse.values.astype(np.int64)).to(device),
        lengths=torch.from_numpy(lengths).to(device),
    )
