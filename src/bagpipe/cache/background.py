"""Where what trainers send each other behind the compute of a step is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bagpipe.cache.overlap import Streams
from bagpipe.native.workers import Workers


class BackgroundThread:
    """Work behind a CPU's compute, one after the other, up to the first that fails."""

    def __init__(self) -> None:
        self._thread = Workers("bagpipe-exchange")
        self._failure: BaseException | None = None

    def start(self, work: Callable[..., None], *arguments: Any) -> Callable[[], object]:
        """Hands out a call; what is returned waits for it and raises what it raised."""
        return self._thread.submit(self._do, work, *arguments).result

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        # A failed call has left messages out. Other ranks would take those of the next call for
        # them, and gloo ends a process that is sent more than it waits for.
        if self._failure is not None:
            raise self._failure
        try:
            work(*arguments)
        except BaseException as failure:
            self._failure = failure
            raise

    def close(self, *, wait: bool) -> None:
        self._thread.close(wait=wait)


class BackgroundStream:
    """Work behind a GPU's compute: after that of the last tick, beside what is issued next."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._stream: torch.cuda.Stream = torch.cuda.Stream(streams.compute.device)
        self._followed: tuple[torch.cuda.Event, torch.cuda.Stream] | None = None  # what, and who

    def start(self, work: Callable[..., None], *arguments: Any) -> Callable[[], object]:
        """Asks the device for it; what is returned lets the current stream follow it."""
        with self._streams.on(self._stream):
            self._stream.wait_event(self._streams.computed)
            work(*arguments)
            done = self._stream.record_event()
        return partial(self._follow, done)

    def close(self, *, wait: bool) -> None:
        """Nothing to end: the executor waits for the device."""

    def _follow(self, done: torch.cuda.Event) -> None:
        """Once for each stream.

        A step's rows, and the gradients before them, are asked for at once and waited for twice.
        """
        current = self._streams.current()
        if self._followed != (done, current):
            current.wait_event(done)
            self._followed = done, current
