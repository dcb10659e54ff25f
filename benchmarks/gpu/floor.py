"""The floor of `gpu`: the bytes that embedding work must move, over the run's own bandwidths."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from bagpipe.types import Group
from benchmarks.workloads import NUM_DENSE, Workload

_COPY_BYTES = 1 << 28
_REPEATS = 10


def measure_bandwidths(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy on the device, to it, and from it.

    On the device bytes read and written both count. Host memory is pinned.
    """
    on_cuda = device.type == "cuda"
    size = _COPY_BYTES if on_cuda else _COPY_BYTES >> 6
    first, second = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
    pairs = {
        "device": (second, first, 2),
        "to_device": (first, host, 1),
        "to_host": (host, first, 1),
    }
    found = {}
    for name, (target, source, factor) in pairs.items():
        target.copy_(source, non_blocking=True)
        _wait(on_cuda)
        started = time.perf_counter()
        for _ in range(_REPEATS):
            target.copy_(source, non_blocking=True)
        _wait(on_cuda)
        found[name] = factor * size * _REPEATS / (time.perf_counter() - started)
    return found


def embedding_floor(
    workload: Workload,
    group: Group,
    num_lookups: int,
    counted: Mapping[str, float],
    bandwidths: Mapping[str, float],
) -> dict[str, Any]:
    """The least bytes that a step must move, and the milliseconds that they take at full bandwidth.

    - Lookup reads each unique row once and a slot for each lookup, and writes bfloat16 output.
    - Update reads bfloat16 gradients once and the bags' numbers, and reads and writes the record of
      each unique row.
    - Over PCIe go records both ways, the plan, dense features and labels.

    Args:
        workload: what is trained.
        group: its tables.
        num_lookups: ids in a batch.
        counted: what a step needed, of which `num_uniques`, `num_fetched` and `num_written_back`
            count.
        bandwidths: see `measure_bandwidths`.

    Returns:
        "bytes" and "ms" of each part.
    """
    num_bags = workload.batch_size * len(workload.lengths)
    uniques, pooled_bytes = counted["num_uniques"], 2 * num_bags * group.embedding_dim
    offset_bytes = 4 * num_bags if workload.multi_hot else 0
    sizes = {
        "lookup": 4 * uniques * group.embedding_dim + 4 * num_lookups + offset_bytes + pooled_bytes,
        "update": pooled_bytes + 4 * num_lookups + 8 * uniques + 2 * uniques * group.record_bytes,
        "to_device": counted["num_fetched"] * (group.record_bytes + 4)
        + 8 * num_lookups
        + offset_bytes
        + 8 * uniques
        + 4 * workload.batch_size * (NUM_DENSE + 1),
        "to_host": counted["num_written_back"] * group.record_bytes,
    }
    links = {"lookup": "device", "update": "device", "to_device": "to_device", "to_host": "to_host"}
    return {
        name: {"bytes": size, "ms": 1e3 * size / bandwidths[links[name]]}
        for name, size in sizes.items()
    }


def _wait(on_cuda: bool) -> None:
    if on_cuda:
        torch.cuda.synchronize()
