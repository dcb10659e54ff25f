"""The dense part of a training step as one call, around which the embedding stages run.

    pooled = step.pooled(batch_size)          # write the embeddings here
    loss, grads = step(dense, labels)         # forward, loss, backward, dense optimizer; grads are
                                              the pooled embeddings'

With `graph`, batches of `batch_size` samples replay one CUDA graph: a step of hundreds of small
kernels then costs the host one launch. Its inputs and outputs have fixed places, so what is
returned is good until the next call. Other batches, such as a smaller last one, run eagerly with
the same arithmetic.

The graph is captured at the first batch of its size, after a warm-up; parameters, optimizer state
and random numbers are as before then. `bagpipe train` restores checkpoints before.

With `compile_part` the captured dense part is torch.compile's; batches of other sizes run as
written, since each size would be compiled anew. Where compiling fails, say because the machine has
no C compiler, the part is captured as written, and where a capture fails, because the part does
what no graph can hold, every batch runs eagerly: a sentence says so, nothing else changes.

With several trainers the dense part may be a DistributedDataParallel, which averages gradients
itself but is not captured, or `average` is given: then there are two graphs, and between them one
message averages the gradients (`bagpipe.train.averaging`). A capture sends none, so it does not
matter when, or whether, the other trainers capture theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.cache.spans import span
from bagpipe.train.averaging import AveragedGradients

DensePart: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From dense features (B, num_dense) and pooled embeddings (B, sum of D) to logits (B,)."""
Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]
"""tf32 is a setting of the process, which `build_run` makes; here it is fp32."""

_NUM_WARMUPS = 3
"""Before a capture, as torch asks for: libraries choose their algorithms then."""
_FAILED_GRAPHS: list[torch.cuda.CUDAGraph] = []
"""Kept for as long as the process lives: torch's allocator of pinned memory asks them about
streams."""


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """Graphs with the places of what they read and write."""

    graph: torch.cuda.CUDAGraph
    # where gradients are averaged between the two, else it is part of the first
    optimizer_graph: torch.cuda.CUDAGraph | None
    dense: Tensor
    labels: Tensor
    loss: Tensor
    grads: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A form of the dense part to capture, with what is said when that fails."""

    name: str
    make: Callable[[], DensePart]
    otherwise: str


class DenseStep:
    """See the module. `optimizer` holds the dense part's parameters; the loss is binary
    cross-entropy on logits.
    """

    def __init__(
        self,
        dense_part: DensePart,
        optimizer: torch.optim.Optimizer,
        *,
        groups: Sequence[tuple[int, int]],
        device: torch.device,
        batch_size: int,
        precision: Precision = "fp32",
        graph: bool = False,
        compile_part: bool = False,
        average: Callable[[Tensor], None] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`groups` are (number of features, embedding_dim) of the pooled embeddings.

        `average`, with several trainers, averages the gradients (n,) over them, in place and on the
        current stream. `compile_part` captures what torch.compile makes of the dense part, and
        needs `graph`. `say` is told what does not work.
        """
        self._part, self._optimizer, self._device = dense_part, optimizer, device
        self._groups, self._batch_size = tuple(groups), batch_size
        self._precision, self._say = precision, say
        self._averaged = (
            None if average is None else AveragedGradients(_parameters(optimizer), average)
        )
        self._ways: list[
            _Way
        ] = []  # in which the dense part may be captured; the first that works is taken
        if compile_part:
            compiled = partial(torch.compile, dense_part, dynamic=False)
            self._ways.append(
                _Way(
                    name="compiling the dense part",
                    make=compiled,
                    otherwise="it is captured as it is written",
                )
            )
        if graph:
            self._ways.append(
                _Way(
                    name="capturing the dense part as a CUDA graph",
                    make=lambda: dense_part,
                    otherwise="it runs eagerly",
                )
            )
        self._buffers: dict[int, list[Tensor]] = {}
        self._captured: _Captured | None = None
        self._num_replays = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of pooled embeddings and their gradients."""
        return torch.bfloat16 if self._precision == "bf16" else torch.float32

    def pooled(self, batch_size: int) -> list[Tensor]:
        """Where a batch's pooled embeddings (B, F, D) belong, one tensor a group; the same ones at
        each call.
        """
        if batch_size not in self._buffers:
            kept = {
                size: buffers for size, buffers in self._buffers.items() if size == self._batch_size
            }
            self._buffers = kept | {
                batch_size: [
                    torch.empty(
                        batch_size, num_features, dim, dtype=self.dtype, device=self._device
                    )
                    for num_features, dim in self._groups
                ]
            }
        return self._buffers[batch_size]

    def __call__(
        self, dense: Tensor, labels: Tensor, weight: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """One step on the embeddings in `pooled`: the loss (), and their gradients (B, F, D), good
        until the next call.

        `dense` (B, num_dense) and `labels` (B,) float32 lie on the device or in host memory. The
        loss is multiplied by `weight`, as for a trainer with more or fewer samples than the others.
        """
        with span("dense"):
            if (
                len(labels) == self._batch_size
                and weight == 1.0
                and (self._captured is not None or self._ways)
            ):
                captured = self._captured = self._captured or self._try_to_capture(dense, labels)
                if captured is not None:
                    return self._replay(captured, dense, labels)
            dense, labels = (
                tensor.to(self._device, non_blocking=True) for tensor in (dense, labels)
            )
            pooled = [leaf.detach().requires_grad_() for leaf in self.pooled(len(labels))]
            return self._compute(self._part, dense, labels, pooled, weight)

    def settle(self) -> None:
        """Brings what the optimizer counts on the host up to date with the replays; to be called
        before its state is saved.
        """
        for state in self._optimizer.state.values():
            if "step" in state and state["step"].device.type == "cpu":
                state["step"] += self._num_replays
        self._num_replays = 0

    def _compute(
        self,
        part: DensePart,
        dense: Tensor,
        labels: Tensor,
        pooled: list[Tensor],
        weight: float = 1.0,
    ) -> tuple[Tensor, list[Tensor]]:
        loss = self._backward(part, dense, labels, pooled, weight)
        if self._averaged is not None:
            self._averaged.average()
        self._optimizer.step()
        return loss, [_grad(leaf) for leaf in pooled]

    def _backward(
        self,
        part: DensePart,
        dense: Tensor,
        labels: Tensor,
        pooled: list[Tensor],
        weight: float = 1.0,
    ) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        flat = [leaf.flatten(1) for leaf in pooled]
        with torch.autocast(
            self._device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=False,
        ):
            logits = part(dense, flat[0] if len(flat) == 1 else torch.cat(flat, dim=1))
        # A trainer may have no sample of a small batch; the mean of nothing would be NaN.
        loss = (
            binary_cross_entropy_with_logits(logits.float(), labels)
            if len(labels)
            else logits.sum()
        )
        if weight != 1.0:
            loss = loss * weight
        loss.backward()  # type: ignore[no-untyped-call]
        if self._averaged is not None:
            self._averaged.collect()
        return loss.detach()

    def _replay(
        self, captured: _Captured, dense: Tensor, labels: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        # one launch from the device
        torch._foreach_copy_([captured.dense, captured.labels], [dense, labels], non_blocking=True)
        captured.graph.replay()
        if captured.optimizer_graph is not None:
            assert self._averaged is not None
            self._averaged.average()
            captured.optimizer_graph.replay()
        self._num_replays += 1
        return captured.loss.clone(), captured.grads

    def _try_to_capture(self, dense: Tensor, labels: Tensor) -> _Captured | None:
        """Captures in the first way that works; None, and no other try, where none does."""
        while self._ways:
            way = self._ways[0]
            try:
                with _unchanged(self._optimizer, self._device):
                    return self._capture(way.make(), dense, labels)
            except (
                RuntimeError
            ) as error:  # torch raises its compilers', CUDA's and memory's errors as such
                self._ways.pop(0)
                # leaving a capture fails too
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                reason = str(first).strip().partition("\n")[0]
                self._say(f"{way.name} failed ({type(first).__name__}: {reason}): {way.otherwise}")
        return None

    def _capture(self, part: DensePart, dense: Tensor, labels: Tensor) -> _Captured:
        # replays write here
        dense, labels = (tensor.to(self._device, copy=True) for tensor in (dense, labels))
        pooled = [buffer.detach().requires_grad_() for buffer in self.pooled(len(labels))]
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARMUPS):
                for leaf in pooled:
                    leaf.grad = None
                self._backward(part, dense, labels, pooled)
                self._optimizer.step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        for leaf in pooled:
            leaf.grad = None
        with _capture(stream) as graph:
            loss = self._backward(part, dense, labels, pooled)
            if self._averaged is None:
                self._optimizer.step()
        optimizer_graph = None
        if self._averaged is not None:
            with _capture(stream) as optimizer_graph:
                self._optimizer.step()
        return _Captured(
            graph=graph,
            optimizer_graph=optimizer_graph,
            dense=dense,
            labels=labels,
            loss=loss,
            grads=[_grad(leaf) for leaf in pooled],
        )


@contextmanager
def _capture(stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is done inside. The executor's threads go on meanwhile: only this one must not
    do what a capture forbids.
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
    """Brings torch back from a capture that CUDA has ended with an error, from which `capture_end`
    leaves too early.

    Then the device's allocator takes the capture for unfinished and never reuses memory that
    another stream has read: a leak in each step from there on
    (https://github.com/pytorch/pytorch/pull/180395, not yet in torch 2.11). That of pinned memory
    goes on asking the graph, which is kept. And random numbers are refused as inside of a capture
    ("Offset increment outside graph capture"), until another one ends well.
    """
    try:
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    except (RuntimeError, AttributeError):
        # by `capture_end`: then torch has nothing to end, or in versions to come no such
        # function
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
def _unchanged(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Puts parameters, optimizer state, random numbers and the current stream back, also after an
    error.

    Values are put back in place: a captured graph knows their addresses. What a capture counts on
    the host is among them.
    """
    is_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if is_cuda else None
    parameters = _parameters(optimizer)
    weights = [parameter.detach().clone() for parameter in parameters]
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
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
                for parameter, state in optimizer.state.items():
                    for name, value in state.items():
                        old = before.get(parameter, {}).get(name)
                        # State that the first step has made starts from zero, with every optimizer
                        # of `bagpipe train`.
                        value.copy_(torch.zeros_like(value) if old is None else old)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
