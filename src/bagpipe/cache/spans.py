"""Names for the stages of a step in a profile; they cost nothing unless someone is tracing.

`torch.profiler.record_function` costs microseconds even when nobody looks, and steps are short. So
stages are named only while `tracing()` is on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.profiler import record_function

_NOTHING: AbstractContextManager[Any] = nullcontext()
_is_on = False


def span(name: str) -> AbstractContextManager[Any]:
    """A range of this thread's time, shown as ``bagpipe.<name>`` while tracing."""
    return record_function(f"bagpipe.{name}") if _is_on else _NOTHING


@contextmanager
def tracing() -> Iterator[None]:
    """Names the stages of all threads in the block."""
    global _is_on
    _is_on = True
    try:
        yield
    finally:
        _is_on = False
