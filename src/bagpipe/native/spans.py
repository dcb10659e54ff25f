"""Names for the stages of a step in a profile; they cost nothing unless someone is tracing.

The profiler is torch's, which is not loaded here: `named_by` is given what names a range of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

_NOTHING: AbstractContextManager[Any] = nullcontext()
_name: Callable[[str], AbstractContextManager[Any]] | None = None


def span(name: str) -> AbstractContextManager[Any]:
    """A range of this thread's time, shown as ``bagpipe.<name>`` while someone is tracing."""
    naming = _name  # which another thread may take away
    return _NOTHING if naming is None else naming(f"bagpipe.{name}")


@contextmanager
def named_by(name: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Lets `name` name the stages of all threads in the block."""
    global _name
    _name = name
    try:
        yield
    finally:
        _name = None
