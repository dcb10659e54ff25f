"""A step's transfers once they are handed out, and failures that name their step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bagpipe.cache.device_plan import DeviceTransfers
from bagpipe.cache.overlap import Buffer
from bagpipe.errors import BackgroundError, DataError, UsageError
from bagpipe.native.workers import Call


@dataclass(kw_only=True)
class IssuedTransfers:
    """A step's overlapped or urgent transfers, handed out."""

    on_device: tuple[DeviceTransfers, ...]  # by group, as what is gathered
    gathered: Call[list[Buffer]]
    evicted: torch.cuda.Event | None  # what fills must wait for
    filled: torch.cuda.Event | None = None  # what compute must wait for
    is_filled: bool = False


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Raises any failure inside as the cause of a BackgroundError."""
    try:
        yield
    except (BackgroundError, DataError, UsageError):  # the last two: trainers part
        raise
    except Exception as error:
        raise BackgroundError(f"moving embedding rows for step {step} failed: {error}") from error
