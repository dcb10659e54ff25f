"""The dense part of a training step as one call, around which the embedding stages run.

    pooled = step.pooled(batch_size)          # write the embeddings here
    loss, grads = step(dense, labels)         # forward, loss, backward, dense optimizer

`grads` are the gradients of the pooled embeddings.

With `graph`, batches of `batch_size` samples replay one CUDA graph: a step of hundreds of small
kernels then costs the host one launch. Its inputs and outputs have fixed places, so what is
returned is good until the next call. With `rows` another graph holds the lookup before and the
update behind, too. Other batches, such as a smaller last one, run eagerly with the same arithmetic.

The graph is captured at the first batch of its size, after a warm-up. Parameters, buffers,
optimizer state and random numbers are then put back as they were. `bagpipe train` restores
checkpoints before the first batch.

With `compile_part` the captured dense part is torch.compile's. Batches of other sizes run as
written, since each size would be compiled anew. Compiling can fail, for instance because the
machine has no C compiler: the part is then captured as written. A capture can fail, because the
part does what no graph can hold: every batch then runs eagerly. A sentence says so.

With several trainers `average` is given: then there are two graphs, and between them the gradients
are averaged. What peer memory averages, the graph with `rows` holds, and so all of the step. A
capture sends no message, and rows are updated before the average whatever graphs hold. So it does
not matter when, or whether, the other trainers capture theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bagpipe.cache.averaging import PeerAverage
from bagpipe.cache.captured import captured_graph
from bagpipe.cache.graph_rows import GraphRows
from bagpipe.native.spans import span
from bagpipe.train.averaged import AveragedGradients
from bagpipe.train.capture import DensePart, parameters_of, unchanged, ways_to_capture
from bagpipe.train.objective import Objective

Update: TypeAlias = Callable[[Sequence[Tensor]], None]
"""Takes gradients (B, F, D) of pooled embeddings, by group."""
Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]
"""tf32 is a setting of the process, which `build_run` makes; here it is fp32."""

_NUM_WARMUPS = 3
"""Before a capture, as torch asks for: libraries choose their algorithms then."""


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """Graphs with the places of what they read and write."""

    graph: torch.cuda.CUDAGraph
    # where gradients are averaged between the two, else it is part of the first
    optimizer_graph: torch.cuda.CUDAGraph | None
    inputs: list[Tensor]
    loss: Tensor
    grads: list[Tensor]
    parameter_grads: list[Tensor | None]
    rows: GraphRows | None
    """Whose lookup and update the first graph holds, too."""
    average: PeerAverage | None = None
    """By which it averages, too."""


class DenseStep:
    """Forward, loss, backward and optimizer of the dense part; see the module.

    `bagpipe.train.objective` says what the loss is.
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
        rate_changes: bool = False,
        max_grad_norm: float | None = None,
        buffers: Sequence[Tensor] = (),
        objective: Objective | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Makes a step that captures nothing yet.

        Args:
            dense_part: from dense features and pooled embeddings to logits.
            optimizer: holds the dense part's parameters.
            groups: number of features and embedding_dim of each group of pooled embeddings.
            device: where the dense part computes.
            batch_size: samples of the batches that replay a graph.
            precision: bf16 computes under autocast; pooled embeddings are bfloat16 then.
            graph: whether to capture.
            compile_part: captures what torch.compile makes of the dense part; needs `graph`.
            average: with several trainers, averages the gradients (n,) over them, in place and on
                the current stream, where a call names no other means.
            rate_changes: whether the optimizer's learning rate changes. A graph would keep that
                of its capture, so the optimizer then steps outside of it.
            max_grad_norm: the norm to which longer gradients of all parameters together, averaged
                over the trainers, are scaled.
            buffers: what the dense part changes besides, such as batch norm's averages.
            objective: the loss; by default that of one label.
            say: told what does not work.
        """
        self._part, self._optimizer, self._device = dense_part, optimizer, device
        self._groups, self._batch_size = tuple(groups), batch_size
        self._precision, self._say = precision, say
        self._kept, self._objective = tuple(buffers), objective or Objective()
        self._rate_changes, self._max_grad_norm = rate_changes, max_grad_norm
        self._averaged = (
            None if average is None else AveragedGradients(parameters_of(optimizer), average)
        )
        self._ways = ways_to_capture(dense_part, graph=graph, compile_part=compile_part)
        self._buffers: dict[int, list[Tensor]] = {}
        self._captured: _Captured | None = None
        self._whole: _Captured | None = None  # with rows
        self._num_replays = 0

    @property
    def dtype(self) -> torch.dtype:
        """The data type of pooled embeddings and their gradients."""
        return torch.bfloat16 if self._precision == "bf16" else torch.float32

    def pooled(self, batch_size: int) -> list[Tensor]:
        """Where a batch's pooled embeddings (B, F, D) belong, one tensor a group.

        They are the same at each call.
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
        self,
        dense: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        sample_weights: Tensor | None = None,
        *,
        rows: GraphRows | None = None,
        update: Update | None = None,
        average: PeerAverage | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Makes one step on the embeddings in `pooled`.

        With several trainers rows are updated between backward and the average, whether a graph
        holds the update or `update` makes it: ranks that do it in different orders would wait for
        each other.

        Args:
            dense: (B, num_dense) float32, on the device or in host memory.
            labels: (B,), or (B, L) of L labels, float32, likewise.
            weight: by what the loss is multiplied, for a trainer with more or fewer samples than
                the others.
            sample_weights: (B,) float32, likewise; all batches have some, or none has.
            rows: what looks embeddings up and updates them, to be done here, too.
            update: without `rows`, updates embeddings with the gradients of `pooled`. By default
                the caller does, later.
            average: that of the stream which `rows` are of. It averages in place of the
                constructor's, if that has one. All ranks give theirs, or none, in the same steps.

        Returns:
            The loss, as `Objective.loss` gives it, and the gradients (B, F, D) of `pooled`, good
            until the next call.
        """
        inputs = [dense, labels] if sample_weights is None else [dense, labels, sample_weights]
        if self._averaged is not None:
            self._averaged.use(average)
        if self.can_replay(len(labels)) and weight == 1.0:
            captured = self._graph_for(inputs, rows)
            if captured is not None:
                return self._replay(captured, inputs, update)
        if rows is not None:
            update = rows.look_up_now(self.pooled(len(labels)))
            return self(dense, labels, weight, sample_weights, update=update, average=average)
        return self._compute(inputs, weight, update)

    def can_replay(self, batch_size: int) -> bool:
        """Whether batches of so many samples replay a graph."""
        return batch_size == self._batch_size and (self._captured is not None or bool(self._ways))

    def _graph_for(self, inputs: list[Tensor], rows: GraphRows | None) -> _Captured | None:
        """The graph without rows, or with these; None if it can't be captured."""
        if rows is None:
            self._captured = self._captured or self._try_to_capture(inputs, None)
            return self._captured
        if self._whole is None or self._whole.rows is not rows:
            self._whole = None  # its memory is free for the next one
            self._whole = self._try_to_capture(inputs, rows)
        return self._whole

    def count_replays(self) -> None:
        """Adds the replays to the steps that the optimizer counts on the host.

        It must be called before the optimizer's state is saved.
        """
        for state in self._optimizer.state.values():
            if "step" in state and state["step"].device.type == "cpu":
                state["step"] += self._num_replays
        self._num_replays = 0

    def _compute(
        self, inputs: list[Tensor], weight: float, update: Update | None
    ) -> tuple[Tensor, list[Tensor]]:
        with span("dense"):
            pooled = [leaf.detach().requires_grad_() for leaf in self.pooled(len(inputs[0]))]
            inputs = [tensor.to(self._device, non_blocking=True) for tensor in inputs]
            loss = self._backward(self._part, inputs, pooled, weight)
            grads = [_grad(leaf) for leaf in pooled]
        if update is not None:
            update(grads)
        with span("dense"):
            if self._averaged is not None:
                self._averaged.average()
            self._update()
        return loss, grads

    def _backward(
        self, part: DensePart, inputs: list[Tensor], pooled: list[Tensor], weight: float = 1.0
    ) -> Tensor:
        dense, *targets = inputs
        self._optimizer.zero_grad(set_to_none=True)
        flat = [leaf.flatten(1) for leaf in pooled]
        with torch.autocast(
            self._device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=False,
        ):
            logits = part(dense, flat[0] if len(flat) == 1 else torch.cat(flat, dim=1))
        # a trainer may have no sample of a small batch
        loss = self._objective.loss(logits, *targets)
        if weight != 1.0:
            loss = loss * weight
        trained = loss if loss.dim() == 0 else loss[0]
        trained.backward()
        if self._averaged is not None:
            self._averaged.collect()
        return loss.detach()

    def _update(self) -> None:
        if self._max_grad_norm is not None:
            clip_grad_norm_(parameters_of(self._optimizer), self._max_grad_norm)
        self._optimizer.step()

    def _replay(
        self, captured: _Captured, inputs: list[Tensor], update: Update | None
    ) -> tuple[Tensor, list[Tensor]]:
        with span("dense"):
            # one launch from the device
            torch._foreach_copy_(captured.inputs, inputs, non_blocking=True)
            if captured.rows is None:
                captured.graph.replay()
            else:
                captured.rows.replay(captured.graph)
        if captured.rows is None and update is not None:
            update(captured.grads)
        with span("dense"):
            if captured.average is not None:
                captured.average.note()
            elif self._averaged is not None:
                self._averaged.average()
            self._step_after(captured)
            return captured.loss.clone(), captured.grads

    def _step_after(self, captured: _Captured) -> None:
        """The optimizer's step, unless the first graph held it."""
        if self._rate_changes:
            # an eager step since the capture has left gradients of its own
            for parameter, grad in zip(
                parameters_of(self._optimizer), captured.parameter_grads, strict=True
            ):
                parameter.grad = grad
            self._update()
            return
        if captured.optimizer_graph is not None:
            captured.optimizer_graph.replay()
        self._num_replays += 1

    def _try_to_capture(self, inputs: list[Tensor], rows: GraphRows | None) -> _Captured | None:
        """Captures in the first way that works; None, and no other try, where none does."""
        while self._ways:
            way = self._ways[0]
            try:
                with unchanged(self._optimizer, self._device, self._kept):
                    return self._capture(way.make(), inputs, rows)
            except RuntimeError as error:  # as torch raises those of compilers, CUDA and memory
                self._ways.pop(0)
                what, otherwise = way.name, way.otherwise
                if self._captured is not None:  # in this way: another would give other numbers
                    self._ways.clear()
                    what += ", with embeddings in it,"
                    otherwise = "they are looked up and updated beside it"
                # leaving a capture fails too
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                reason = str(first).strip().partition("\n")[0]
                self._say(f"{what} failed ({type(first).__name__}: {reason}): {otherwise}")
        return None

    def _capture(self, part: DensePart, inputs: list[Tensor], rows: GraphRows | None) -> _Captured:
        # replays write here
        inputs = [tensor.to(self._device, copy=True) for tensor in inputs]
        pooled = [buffer.detach().requires_grad_() for buffer in self.pooled(len(inputs[0]))]
        in_graph = self._averaged_with(rows)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._warm_up(part, inputs, pooled, rows)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        for leaf in pooled:
            leaf.grad = None
        with captured_graph(stream) as graph:
            if rows is not None:
                rows.lookup(self.pooled(len(inputs[0])))
            loss = self._backward(part, inputs, pooled)
            if rows is not None:
                rows.update([_grad(leaf) for leaf in pooled])
            if in_graph is not None:
                in_graph.launch()
            if self._averaged is in_graph and not self._rate_changes:
                self._update()
        optimizer_graph = None
        if self._averaged is not in_graph and not self._rate_changes:
            with captured_graph(stream) as optimizer_graph:
                self._update()
        return _Captured(
            graph=graph,
            optimizer_graph=optimizer_graph,
            inputs=inputs,
            loss=loss,
            grads=[_grad(leaf) for leaf in pooled],
            parameter_grads=[parameter.grad for parameter in parameters_of(self._optimizer)],
            rows=rows,
            average=None if in_graph is None else in_graph.by,
        )

    def _warm_up(
        self, part: DensePart, inputs: list[Tensor], pooled: list[Tensor], rows: GraphRows | None
    ) -> None:
        """Does what a capture needs to have been done."""
        for _ in range(_NUM_WARMUPS):
            for leaf in pooled:
                leaf.grad = None
            self._backward(part, inputs, pooled)
            self._update()
        if rows is not None:
            rows.warm_up(self.pooled(len(inputs[0])))
        in_graph = self._averaged_with(rows)
        if in_graph is not None:
            in_graph.warm_up()

    def _averaged_with(self, rows: GraphRows | None) -> AveragedGradients | None:
        """What a graph averages that holds these rows."""
        averaged = self._averaged
        is_held = rows is not None and averaged is not None and averaged.by is not None
        return averaged if is_held else None


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
