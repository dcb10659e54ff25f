"""Gradients of a scaled loss, which the embeddings unscale for themselves.

`torch.amp.GradScaler` reaches only what an optimizer of torch's holds, and backward updates the
embeddings. They must be told of the scaler. If nobody tells them, rows would silently move by
thousands of times too much, so they look for a scaler among the objects that refer to its class.
That takes some ten milliseconds, so they look only when the count of references has changed since
there was none.
"""

from __future__ import annotations

import contextlib
import gc
import sys

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from bagpipe.errors import UsageError

_counts_without: list[int] = []
"""References to the scalers' classes when no scaler was found."""


class GradScaling:
    """What one collection does about a scaled loss."""

    def __init__(self) -> None:
        self._is_told = False
        self._scaler: GradScaler | None = None
        self._stand_in: torch.optim.Optimizer | None = None

    def tell(self, scaler: GradScaler | None) -> None:
        """The scaler of the loss, or None: it is not scaled."""
        self._is_told, self._scaler = True, scaler

    def unscaled(self, grads: Tensor) -> Tensor | None:
        """The gradient as of the loss itself; None where it is not finite.

        The step of a gradient that is not finite is left out.

        Raises:
            UsageError: there is a scaler of which nobody has told the embeddings.
        """
        scaler = self.scaler()
        if scaler is None:
            return grads
        if not bool(torch.isfinite(grads).all()):
            self._tell_of_overflow(scaler, grads.device)
            return None
        return grads * (1.0 / scaler.get_scale())

    def scaler(self) -> GradScaler | None:
        """What scales the loss, if anything does.

        Raises:
            UsageError: there is a scaler of which nobody has told the embeddings.
        """
        if not self._is_told and _find_scaler() is not None:
            raise UsageError(
                "a GradScaler is in use, and the embeddings, which backward updates, do not know "
                "whether the loss is scaled by it: call embeddings.set_grad_scaler(scaler) before "
                "the loop, or embeddings.set_grad_scaler(None) if this loss is not"
            )
        return self._scaler if self._scaler is not None and self._scaler.is_enabled() else None

    def _tell_of_overflow(self, scaler: GradScaler, device: torch.device) -> None:
        """Lets the scaler's next `update` lower the scale, as after any optimizer's overflow."""
        if self._stand_in is None:
            self._stand_in = torch.optim.SGD([torch.zeros(1, device=device, requires_grad=True)])
        for parameter in self._stand_in.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, torch.inf)
        with contextlib.suppress(RuntimeError):  # another group has told it in this step
            scaler.unscale_(self._stand_in)


def _find_scaler() -> GradScaler | None:
    """One that has scaled a loss."""
    kinds = _with_subclasses(GradScaler)
    counts = [sys.getrefcount(kind) for kind in kinds]
    if counts == _counts_without:
        return None
    # An object refers to its class. `gc.get_objects` would also take hold of tuples that other
    # threads are just making, which they do not survive.
    scalers = [found for found in gc.get_referrers(*kinds) if issubclass(type(found), kinds)]
    if not scalers:
        _counts_without[:] = counts
    # a scale is made when the first loss is scaled
    return next((each for each in scalers if each.is_enabled() and each._scale is not None), None)


def _with_subclasses(kind: type) -> tuple[type, ...]:
    kinds = [kind]
    for each in kinds:  # which grows meanwhile
        kinds += each.__subclasses__()
    return tuple(kinds)
