"""The FBGEMM arms of `gpu`: one SplitTableBatchedEmbeddingBagsCodegen for all tables.

    fbgemm_hbm                whole tables in the GPU's memory
    fbgemm_hbm_int32          the same with int32 ids instead of int64
    fbgemm_hbm_fp32           the same with float32 output instead of bfloat16
    fbgemm_uvm_lru, _lfu      tables in host memory, a cache of as many rows as Bagpipe's on the GPU
    fbgemm_uvm_lru_prefetch   the same, batch t + 1 prefetched on a side stream between forward and
                              backward of t, as TorchRec's PrefetchTrainPipelineSparseDist does;
                              FBGEMM prefetches with LRU only
    fbgemm_uvm                tables in host memory, no cache

All have FBGEMM's best settings: row-wise Adagrad on float32 weights, no stochastic rounding, no
bounds check, bfloat16 output; host memory is mapped, not managed. A cache has whole sets of 32
rows, as many as give at least Bagpipe's rows. FBGEMM allocates its output, so it is copied into the
dense part's buffer, 55 MB of device traffic a step each way. Without CUDA only `fbgemm_hbm` runs,
with float32 tables on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.types import Float32Array, Group, Int64Array
from benchmarks.gpu.arms import load_tables
from benchmarks.prepared_stream import Stream

_CACHE_WAYS: Final = 32
"""Rows in a set of FBGEMM's cache on NVIDIA GPUs."""


def cache_sets(cache_rows: int) -> int:
    """Whole sets that hold `cache_rows`, or a few more."""
    return -(-cache_rows // _CACHE_WAYS)


@dataclass(frozen=True, kw_only=True)
class FbgemmSettings:
    """What distinguishes the arms."""

    location: Literal["hbm", "uvm", "uvm_caching"]
    algorithm: Literal["LRU", "LFU"] = "LRU"
    prefetch: bool = False
    index_dtype: torch.dtype = torch.int64
    output: Literal["BF16", "FP32"] = "BF16"


FBGEMM_ARMS: Final[Mapping[str, FbgemmSettings]] = {
    "fbgemm_hbm": FbgemmSettings(location="hbm"),
    "fbgemm_uvm_lru_prefetch": FbgemmSettings(location="uvm_caching", prefetch=True),
    "fbgemm_uvm_lru": FbgemmSettings(location="uvm_caching"),
    "fbgemm_uvm_lfu": FbgemmSettings(location="uvm_caching", algorithm="LFU"),
    "fbgemm_hbm_int32": FbgemmSettings(location="hbm", index_dtype=torch.int32),
    "fbgemm_hbm_fp32": FbgemmSettings(location="hbm", output="FP32"),
    "fbgemm_uvm": FbgemmSettings(location="uvm"),
}


class FbgemmArm:
    """One of `FBGEMM_ARMS`, which trains the stream's resident batches.

    Raises:
        ImportError: fbgemm-gpu is not installed.
    """

    def __init__(
        self, name: str, group: Group, stream: Stream, *, cache_rows: int, device: torch.device
    ) -> None:
        self.name, self._group, self._settings = name, group, FBGEMM_ARMS[name]
        self._on_cuda = device.type == "cuda"
        dtype = self._settings.index_dtype
        offsets = stream.resident[0].offsets.to(dtype)
        self._batches = [
            (batch.dense, batch.labels, batch.indices.to(dtype), offsets)
            for batch in stream.resident
        ]
        self._step = -1
        self._tables = _make_tables(self._settings, group, cache_rows, device)
        self._side = torch.cuda.Stream(device) if self._settings.prefetch else None
        self._pooled: Tensor | None = None

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """See `StepArm.load`. The optimizer's state starts at zero, as FBGEMM makes it."""
        load_tables(self._group, self._tables.split_embedding_weights(), rows, records)

    def start(self) -> None:
        """See `StepArm.start`."""
        if self._on_cuda:
            torch.cuda.synchronize()
        self._prefetch(0)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        self._step += 1
        dense, labels, _, _ = self._batches[self._step]
        return dense, labels

    def lookup(self, pooled: Tensor) -> None:
        """See `StepArm.lookup`."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        _, _, indices, offsets = self._batches[self._step]
        self._pooled = self._tables(indices, offsets)  # (B, F * D)
        assert self._pooled is not None
        pooled.view(len(pooled), -1).copy_(self._pooled.detach())
        self._prefetch(self._step + 1)

    def update(self, grads: Tensor) -> None:
        """See `StepArm.update`."""
        assert self._pooled is not None
        self._pooled.backward(grads.view(len(grads), -1).to(self._pooled.dtype))
        self._pooled = None

    def kernels(self, pooled: Tensor, grads: Tensor) -> dict[str, Callable[[], object]]:
        """See `GpuArm.kernels`. Where a batch was prefetched, it is the one that is timed.

        Its rows are in the cache after the first call.
        """
        # The next forward takes what was prefetched last, whatever ids it is given.
        step = self._step if self._side is None else min(self._step + 1, len(self._batches) - 1)
        _, _, indices, offsets = self._batches[step]
        flat = grads.view(len(grads), -1)

        def both() -> None:
            output = self._tables(indices, offsets)
            output.backward(flat.to(output.dtype))

        return {"forward and backward": both}

    def close(self) -> None:
        """See `StepArm.close`."""
        if self._on_cuda:
            torch.cuda.synchronize()
        del self._tables, self._batches

    def _prefetch(self, step: int) -> None:
        if self._side is None or step >= len(self._batches):
            return
        _, _, indices, offsets = self._batches[step]
        forward_stream = torch.cuda.current_stream()
        with torch.cuda.stream(self._side):
            self._tables.prefetch(indices, offsets, forward_stream)


def _make_tables(
    settings: FbgemmSettings, group: Group, cache_rows: int, device: torch.device
) -> Any:
    with warnings.catch_warnings():
        # Importing it warns of optional parts that a build does not have, which users can't change.
        warnings.simplefilter("ignore")
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            CacheAlgorithm,
            ComputeDevice,
            EmbeddingLocation,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

    assert isinstance(group.optimizer, RowWiseAdagrad)
    locations = {
        "hbm": EmbeddingLocation.DEVICE,
        "uvm": EmbeddingLocation.MANAGED,
        "uvm_caching": EmbeddingLocation.MANAGED_CACHING,
    }
    on_cuda = device.type == "cuda"
    compute = ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU
    location = locations[settings.location] if on_cuda else EmbeddingLocation.HOST
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(table.num_embeddings, table.embedding_dim, location, compute) for table in group.tables],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=group.optimizer.lr,
        eps=group.optimizer.eps,
        stochastic_rounding=False,
        output_dtype=SparseType[settings.output] if on_cuda else SparseType.FP32,
        cache_algorithm=CacheAlgorithm[settings.algorithm],
        cache_sets=cache_sets(cache_rows) if settings.location == "uvm_caching" else 0,
        prefetch_pipeline=settings.prefetch,
        uvm_host_mapped=True,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
    )
