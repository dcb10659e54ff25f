"""CUDA graphs of a part of a step: captured beside other threads, unharmed by failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_FAILED_GRAPHS: list[torch.cuda.CUDAGraph] = []
"""Kept as long as the process lives: torch's allocator of pinned memory asks them about streams."""


@contextmanager
def captured_graph(stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what this thread does inside, for replays.

    The executor's threads go on meanwhile: only this one must not do what a capture forbids.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield graph
    except RuntimeError:
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


@contextmanager
def unchanged(
    optimizer: torch.optim.Optimizer, device: torch.device, buffers: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Puts back what a capture changes.

    That is parameters, optimizer state, `buffers`, random numbers and the stream.

    It does so after an error, too. Values are put back in place, since a captured graph knows their
    addresses. What a capture counts on the host is among them.
    """
    is_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if is_cuda else None
    kept = [*parameters_of(optimizer), *buffers]
    values_kept = [each.detach().clone() for each in kept]
    before = {
        parameter: {name: value.clone() for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }
    with torch.random.fork_rng([device] if is_cuda else []):
        try:
            yield
        finally:
            if stream is not None:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own
                torch.cuda.synchronize(device)  # a warm-up that fails leaves work there
            with torch.no_grad():
                for each, value_kept in zip(kept, values_kept, strict=True):
                    each.copy_(value_kept)
                for parameter, state in optimizer.state.items():
                    for name, value in state.items():
                        old = before.get(parameter, {}).get(name)
                        # State that the first step has made starts from zero, with every optimizer
                        # of `bagpipe train`.
                        value.copy_(torch.zeros_like(value) if old is None else old)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
