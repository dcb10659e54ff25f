"""The dense part of a training step as one call, around which the embedding stages run.

    pooled = step.pooled(batch_size)          # write the embeddings here
    loss, grads = step(dense, labels)         # forward, loss, backward, dense optimizer; grads are the pooled embeddings'

With `graph`, batches of `batch_size` samples replay one CUDA graph: a step of hundreds of small kernels then costs the host one
launch. Its inputs and outputs have fixed places, so what is returned is good until the next call. Other batches, such as a smaller
last one, run eagerly with the same arithmetic.

The graph is captured at the first batch of its size, after a warm-up that changes nothing: parameters and optimizer state are put
back. `bagpipe train` restores checkpoints before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.cache.spans import span

DensePart: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From dense features (B, num_dense) and pooled embeddings (B, sum of D) to logits (B,)."""
Precision: TypeAlias = Literal["fp32", "bf16"]

_NUM_WARMUPS = 3
"""Before a capture, as torch asks for: libraries choose their algorithms then."""


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """A graph with the places of what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    dense: Tensor
    labels: Tensor
    loss: Tensor
    grads: list[Tensor]


class DenseStep:
    """See the module. `optimizer` holds the dense part's parameters; the loss is binary cross-entropy on logits."""

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
    ) -> None:
        """`groups` are (number of features, embedding_dim) of the pooled embeddings. `compile_part` passes it to torch.compile."""
        self._part: DensePart = torch.compile(dense_part, dynamic=False) if compile_part else dense_part
        self._optimizer, self._device = optimizer, device
        self._groups, self._batch_size = tuple(groups), batch_size
        self._precision, self._uses_graph = precision, graph
        self._buffers: dict[int, list[Tensor]] = {}
        self._captured: _Captured | None = None
        self._num_replays = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of pooled embeddings and their gradients."""
        return torch.bfloat16 if self._precision == "bf16" else torch.float32

    def pooled(self, batch_size: int) -> list[Tensor]:
        """Where a batch's pooled embeddings (B, F, D) belong, one tensor a group; the same ones at each call."""
        if batch_size not in self._buffers:
            kept = {size: buffers for size, buffers in self._buffers.items() if size == self._batch_size}
            self._buffers = kept | {
                batch_size: [
                    torch.empty(batch_size, num_features, dim, dtype=self.dtype, device=self._device)
                    for num_features, dim in self._groups
                ]
            }
        return self._buffers[batch_size]

    def __call__(self, dense: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step on the embeddings in `pooled`: the loss (), and their gradients (B, F, D), good until the next call.

        `dense` (B, num_dense) and `labels` (B,) float32 may lie in pinned host memory.
        """
        with span("dense"):
            if self._uses_graph and len(labels) == self._batch_size:
                return self._replay(dense, labels)
            dense, labels = (tensor.to(self._device, non_blocking=True) for tensor in (dense, labels))
            return self._compute(dense, labels, [buffer.detach().requires_grad_() for buffer in self.pooled(len(labels))])

    def settle(self) -> None:
        """Brings what the optimizer counts on the host up to date with the replays; to be called before its state is saved."""
        for state in self._optimizer.state.values():
            if "step" in state and state["step"].device.type == "cpu":
                state["step"] += self._num_replays
        self._num_replays = 0

    def _compute(self, dense: Tensor, labels: Tensor, pooled: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(dense, labels, pooled)
        self._optimizer.step()
        return loss, [_grad(leaf) for leaf in pooled]

    def _backward(self, dense: Tensor, labels: Tensor, pooled: list[Tensor]) -> Tensor:
        flat = [leaf.flatten(1) for leaf in pooled]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False):
            logits = self._part(dense, flat[0] if len(flat) == 1 else torch.cat(flat, dim=1))
        loss = binary_cross_entropy_with_logits(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _replay(self, dense: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self._captured is None:
            self._captured = self._capture(dense, labels)
        captured = self._captured
        captured.dense.copy_(dense, non_blocking=True)
        captured.labels.copy_(labels, non_blocking=True)
        captured.graph.replay()
        self._num_replays += 1
        return captured.loss.clone(), captured.grads

    def _capture(self, dense: Tensor, labels: Tensor) -> _Captured:
        dense, labels = (tensor.to(self._device, copy=True) for tensor in (dense, labels))  # replays write here
        pooled = [buffer.detach().requires_grad_() for buffer in self.pooled(len(labels))]
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._warm_up(dense, labels, pooled)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        counted = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        counts = [count.clone() for count in counted]
        for leaf in pooled:
            leaf.grad = None
        # The executor's threads go on meanwhile: only this thread must not do what a capture forbids.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            loss, grads = self._compute(dense, labels, pooled)
        for count, before in zip(counted, counts, strict=True):
            if count.device.type == "cpu":  # a capture runs what is on the host, and only that
                count.copy_(before)
        return _Captured(graph=graph, dense=dense, labels=labels, loss=loss, grads=grads)

    def _warm_up(self, dense: Tensor, labels: Tensor, pooled: list[Tensor]) -> None:
        """Runs whole steps, and puts back what they changed."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        weights = [parameter.detach().clone() for parameter in parameters]
        before = {
            parameter: {name: value.clone() for name, value in state.items()} for parameter, state in self._optimizer.state.items()
        }
        for _ in range(_NUM_WARMUPS):
            for leaf in pooled:
                leaf.grad = None
            self._compute(dense, labels, pooled)
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
            for parameter, state in self._optimizer.state.items():
                for name, value in state.items():
                    old = before.get(parameter, {}).get(name)
                    # State that the first step has made starts from zero, with every optimizer that `bagpipe train` offers.
                    value.copy_(torch.zeros_like(value) if old is None else old)


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
