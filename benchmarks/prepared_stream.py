"""The stream of `gpu` and `trainers`: in prepared files for Bagpipe, on the device for other arms.

No batch repeats. They are made on a thread pool (the generator's loops release the GIL) and written
in order. The other arms get ids, offsets, dense features and labels on the device before they
start, which favours them: Bagpipe reads, checks, plans and copies all of it while it trains.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bagpipe.data.base import Batch, Position
from bagpipe.data.manifest import FeatureEntry, PreparedManifest, SourceEntry
from bagpipe.data.prepared import PreparedSource
from bagpipe.data.synthetic import SyntheticSource
from bagpipe.data.writer import SplitWriter, prepared_schema, record_batch
from bagpipe.native.jit import jit
from bagpipe.native.pipeline import ordered_map
from bagpipe.native.workers import Workers
from bagpipe.train.schedule import RemainingBatches, Schedule
from bagpipe.types import Int64Array
from benchmarks.measure import Progress
from benchmarks.workloads import NUM_DENSE, Workload

_ROWS_PER_RECORD_BATCH = 65_536
"""As many as `bagpipe data prepare` writes."""
_RECORD_BATCHES_A_FILE = 25


@dataclass(frozen=True, kw_only=True)
class ResidentBatch:
    """A batch on the device; ids and offsets are feature-major like a KeyedJaggedTensor's."""

    dense: Tensor  # (B, num_dense) float32
    labels: Tensor  # (B,) float32
    indices: Tensor  # (L,) int32
    offsets: Tensor  # (F * B + 1,) int32; one tensor for all batches where bags are of fixed length


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The same batches in files and on the device."""

    folder: Path
    num_batches: int
    resident: Sequence[ResidentBatch]  # the first ones
    touched_rows: Int64Array  # ascending, of all batches
    resident_rows: Int64Array  # ascending, of the resident batches


def make_stream(
    workload: Workload,
    folder: Path,
    *,
    num_batches: int,
    num_resident: int,
    device: torch.device,
    progress: Progress,
) -> Stream:
    """Makes a workload's stream.

    Args:
        workload: what is trained.
        folder: where the prepared files go; it must not exist yet.
        num_batches: batches in the files.
        num_resident: how many of the first ones are also kept on `device`.
        device: of the resident batches.
        progress: is told how far it is.
    """
    group, size = workload.group, workload.batch_size
    source = synthetic_source(workload, num_batches)
    features = [
        FeatureEntry(name=spec.name, table=spec.table, multi_hot=spec.multi_hot)
        for spec in source.features
    ]
    schema = prepared_schema(features, NUM_DENSE)
    touched = np.zeros(group.num_rows, np.bool_)
    offsets = _fixed_offsets(workload)
    on_device = torch.from_numpy(offsets).to(device)
    num_threads = os.cpu_count() or 1
    folder.mkdir(parents=True)
    make = partial(_make, source, size, schema, offsets)
    resident: list[ResidentBatch] = []
    resident_rows = np.empty(0, np.int64)
    with (
        Workers("stream", num_threads) as workers,
        SplitWriter(
            folder.joinpath,
            "train",
            schema,
            rows_per_batch=_ROWS_PER_RECORD_BATCH,
            batches_per_file=_RECORD_BATCHES_A_FILE,
        ) as writer,
    ):
        for number, (batch, record) in enumerate(
            ordered_map(make, range(num_batches), workers, ahead=2 * num_threads)
        ):
            writer.write(record)
            # Not in the threads that make batches: `np.flatnonzero` loses rows where another thread
            # writes flags meanwhile.
            _mark(batch.sparse.values, offsets[::size], group.row_offsets, touched)
            if number < num_resident:
                resident.append(_to_device(batch, on_device, device))
                resident_rows = (
                    np.flatnonzero(touched) if number == num_resident - 1 else resident_rows
                )
            progress("making and writing batches", number + 1, num_batches)
    _manifest(source, features, writer).save(folder)
    return Stream(
        folder=folder,
        num_batches=num_batches,
        resident=resident,
        touched_rows=np.flatnonzero(touched),
        resident_rows=resident_rows,
    )


def all_batches(source: PreparedSource, batch_size: int, num_batches: int) -> RemainingBatches:
    """The first `num_batches` of a stream's prepared files, to be read live."""
    schedule = Schedule(
        batch_size=batch_size, drop_last=True, num_batches=num_batches, num_steps=num_batches
    )
    return RemainingBatches(source=source, schedule=schedule, start=Position(epoch=0, batch=0))


def synthetic_source(workload: Workload, num_batches: int) -> SyntheticSource:
    """So many batches of a workload's samples, drawn as they are asked for."""
    sizes = [table.num_embeddings for table in workload.group.tables]
    return SyntheticSource(
        sizes,
        split="train",
        num_samples=num_batches * workload.batch_size,
        num_dense=NUM_DENSE,
        skew=workload.skew,
        bag_lengths={
            f"C{index}": (length, length) for index, length in enumerate(workload.lengths, start=1)
        },
    )


def _fixed_offsets(workload: Workload) -> npt.NDArray[np.int32]:
    """Offsets (F * B + 1,) of every batch: the bags of one feature all have the same length."""
    return np.concatenate(
        [[0], np.cumsum(np.repeat(workload.lengths, workload.batch_size))]
    ).astype(np.int32)


def _make(
    source: SyntheticSource,
    batch_size: int,
    schema: Any,
    offsets: npt.NDArray[np.int32],
    number: int,
) -> tuple[Batch, Any]:
    """Makes one batch, and the same as a record batch of Arrow."""
    batch = next(source.batches(batch_size=batch_size, start=number))
    ids = []
    for index, spec in enumerate(source.features):
        bounds = offsets[index * batch_size : (index + 1) * batch_size + 1]
        values = np.ascontiguousarray(batch.sparse.values[bounds[0] : bounds[-1]], np.int32)
        ids.append((values, bounds - bounds[0] if spec.multi_hot else None))
    return batch, record_batch(schema, batch.labels, batch.dense, ids)


@jit
def _mark(
    values: npt.NDArray[np.integer],
    bounds: npt.NDArray[np.int32],
    row_offsets: Int64Array,
    touched: npt.NDArray[np.bool_],
) -> None:
    """Marks the rows of a batch's ids.

    The ids of feature f, and so of table f, are values[bounds[f] : bounds[f + 1]].
    """
    for feature in range(len(bounds) - 1):
        for value in values[bounds[feature] : bounds[feature + 1]]:
            touched[row_offsets[feature] + value] = True


def _to_device(batch: Batch, offsets: Tensor, device: torch.device) -> ResidentBatch:
    return ResidentBatch(
        dense=torch.from_numpy(batch.dense).to(device),
        labels=torch.from_numpy(batch.labels).to(device),
        indices=torch.from_numpy(batch.sparse.values.astype(np.int32, copy=False)).to(device),
        offsets=offsets,
    )


def _manifest(
    source: SyntheticSource, features: Sequence[FeatureEntry], writer: SplitWriter
) -> PreparedManifest:
    return PreparedManifest(
        label="label",
        dense_names=tuple(f"I{index}" for index in range(1, source.num_dense + 1)),
        dense_transform="none",
        features=tuple(features),
        num_embeddings={spec.table: spec.num_embeddings for spec in source.features},
        vocabulary="hash",
        dictionaries={},
        rows_per_batch=_ROWS_PER_RECORD_BATCH,
        splits={"train": tuple(writer.entries)},
        source=SourceEntry(
            kind="synthetic", files=(), num_rows_read=source.num_samples, skipped={}
        ),
    )
