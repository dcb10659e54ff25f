"""Ways to capture the dense part, and what a capture changes and puts back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

DensePart: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From dense features (B, num_dense) and pooled embeddings (B, sum of D) to logits (B,), or (B, L)
of L labels."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A form of the dense part to capture, and what is done where that fails."""

    name: str
    make: Callable[[], DensePart]
    otherwise: str


def ways_to_capture(dense_part: DensePart, *, graph: bool, compile_part: bool) -> list[Way]:
    """In which the dense part may be captured; the first that works is to be taken."""
    ways = []
    if compile_part:
        ways.append(
            Way(
                name="compiling the dense part",
                make=partial(torch.compile, dense_part, dynamic=False),
                otherwise="it is captured as it is written",
            )
        )
    if graph:
        ways.append(
            Way(
                name="capturing the dense part as a CUDA graph",
                make=lambda: dense_part,
                otherwise="it runs eagerly",
            )
        )
    return ways


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
