"""The CUDA streams of one executor."""

from __future__ import annotations

import torch


class Streams:
    """The streams of a CUDA device: `compute` is the trainer's own, at `record_compute` the current
    one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.out: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.into: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.compute: torch.cuda.Stream
        self.computed: torch.cuda.Event
        self.record_compute()

    def record_compute(self) -> torch.cuda.Event:
        """Makes `computed` an event after all compute issued so far."""
        self.compute = torch.cuda.current_stream(self._device)
        self.computed = self.compute.record_event()
        return self.computed
