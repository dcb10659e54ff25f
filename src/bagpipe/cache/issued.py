"""A step's transfers once they are handed out, and failures that name their step."""

from __future__ import annotations

from contextlib import AbstractContextManager
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


def naming_step(step: int) -> AbstractContextManager[None]:
    """Raises any failure inside as the cause of a BackgroundError."""
    return _Naming(step)


class _Naming:
    """No generator, which would take the trainer's thread three times as long."""

    __slots__ = ("_step",)

    def __init__(self, step: int) -> None:
        self._step = step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # the last two: trainers part
        if isinstance(error, Exception) and not isinstance(
            error, BackgroundError | DataError | UsageError
        ):
            raise BackgroundError(
                f"moving embedding rows for step {self._step} failed: {error}"
            ) from error
