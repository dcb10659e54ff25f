"""Gradients of the dense part in one tensor, which is averaged over trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bagpipe.cache.averaging import PeerAverage


class AveragedGradients:
    """The dense part's gradients of several trainers, averaged by one message.

    DistributedDataParallel averages while backward runs, in messages of some layers each. A CUDA
    graph that held its messages would hold the process group too, and making one imports torch's
    compiler, which takes a second. So gradients end up in one tensor. Peer memory averages it
    within a graph, a process group behind backward, or behind the graph that has it.

    The parameters are all of one dtype and on one device. Those that are frozen stay without a
    gradient, but have a place: they may be trained later, on all trainers alike. `average` replaces
    a tensor (n,) by its mean over the trainers, in place.
    """

    def __init__(self, parameters: Iterable[Tensor], average: Callable[[Tensor], None]) -> None:
        self._parameters, self._average = list(parameters), average
        self.by: PeerAverage | None = None
        """What averages in place of `average`, in the current step."""
        self._all = torch.cat(
            [
                torch.zeros_like(parameter, requires_grad=False).flatten()
                for parameter in self._parameters
            ]
        )
        parts = torch.split(self._all, [parameter.numel() for parameter in self._parameters])
        self._parts = [
            part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)
        ]

    def collect(self) -> None:
        """Copies what backward has left.

        Until `zero_grad` the parameters' gradients are then parts of the one tensor.
        """
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            # a parameter that this trainer's share does not use, but perhaps another's
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)
            if parameter.requires_grad:
                parameter.grad = part

    def use(self, by: PeerAverage | None) -> None:
        """Takes what averages in the step that comes, if that can: it moves float32 alone."""
        self.by = by if self._all.dtype == torch.float32 else None

    def warm_up(self) -> None:
        """Does what must come before a capture of `launch`."""
        assert self.by is not None
        self.by.warm_up(self._all)

    def launch(self) -> None:
        """As `average`, for a graph that is captured now; replays are to be noted."""
        assert self.by is not None
        self.by.launch(self._all)

    def average(self) -> None:
        """Averages what is collected over the trainers."""
        average = self.by or self._average
        average(self._all)
