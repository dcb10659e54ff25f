"""CUDA graphs that are captured beside other threads, and failures that leave torch unharmed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FAILED_GRAPHS: list[torch.cuda.CUDAGraph] = []
"""Kept as long as the process lives: torch's allocator of pinned memory asks them about streams."""


@contextmanager
def captured_graph(stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what this thread does inside, for replays.

    The executor's threads go on meanwhile: only this one must not do what a capture forbids.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    current = torch.cuda.current_stream(stream.device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield graph
    except RuntimeError:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own
        _leave_failed_capture(graph, pool, stream)
        raise


def _leave_failed_capture(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream
) -> None:
    """Brings torch back from a capture that CUDA has ended with an error.

    `capture_end` leaves too early then (https://github.com/pytorch/pytorch/pull/180395, not yet in
    torch 2.11), which has three consequences. The device's allocator takes the capture for
    unfinished and never reuses memory that another stream has read: a leak in each step from there
    on. The allocator of pinned memory goes on asking the graph, which is therefore kept. And random
    numbers are refused as inside of a capture ("Offset increment outside graph capture"), until
    another capture ends well.
    """
    try:
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    except (RuntimeError, AttributeError):
        # left by `capture_end`: torch has nothing to end, or in versions to come no such function
        was_left = True
    else:
        was_left = False
    if not was_left:  # else the end of the graph releases its pool
        torch._C._cuda_releasePool(stream.device_index, pool)
        _FAILED_GRAPHS.append(graph)
    counter = torch.zeros(1, device=stream.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        counter.add_(1)
