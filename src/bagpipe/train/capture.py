"""What a capture of a part of a step changes, and puts back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


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
