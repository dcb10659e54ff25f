"""A lookup as autograd knows it, whose backward updates the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.executor import Executor
from bagpipe.embeddings.executor_part import ExecutorPart
from bagpipe.embeddings.grad_scaling import GradScaling
from bagpipe.errors import UsageError


class Lookup(torch.autograd.Function):
    """Lookup of one group.

    Its backward sums the gradients along the plan and applies the optimizer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        executor: Executor | ExecutorPart,
        group: int,
        plan: DevicePlan,
        dtype: torch.dtype,
        scaling: GradScaling,
    ) -> Tensor:
        """`anchor` carries no value; it makes autograd call backward."""
        ctx.executor, ctx.group, ctx.plan, ctx.was_applied = executor, group, plan, False
        ctx.scaling = scaling
        return executor.caches[group].lookup(plan, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[None, None, None, None, None, None]:
        """Updates the rows with `grads` (B, F, D)."""
        if not ctx.executor.is_current(ctx.plan):
            raise UsageError(
                f"step {ctx.plan.step}: backward ran after the next batch was asked for, when its "
                "rows may have left the cache: call backward on each batch's loss before the next "
                "iteration"
            )
        if ctx.was_applied:
            raise UsageError(
                f"step {ctx.plan.step}: backward ran twice through the same lookup; its rows are "
                "updated only once"
            )
        unscaled = ctx.scaling.unscaled(grads)
        ctx.was_applied = True
        if unscaled is not None:
            with ctx.executor.undivided():
                ctx.executor.update(ctx.group, ctx.plan, unscaled)
        return None, None, None, None, None, None
