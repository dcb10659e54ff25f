"""Ctrl-C at any chosen moment of the library's work in the main thread: the signal is set without
running Python code, so that its handler raises exactly where a real one would.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import bagpipe

_PLACES = (str(Path(bagpipe.__file__).parent), contextlib.__file__, threading.__file__)
_START_TIMEOUT_S = 5.0
_set_interrupt: Any = ctypes.PYFUNCTYPE(None, ctypes.py_object, ctypes.py_object, ctypes.py_object)(
    ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, ctypes.c_void_p).value
)


class Moments:
    """Counts the moments of the library's work in this thread: instructions, or lines."""

    def __init__(self, at: int | None, *, by_line: bool = False) -> None:
        """The interrupt comes after moment `at`; None: never."""
        self.num_seen, self.place = 0, ""
        self._at, self._kind = at, "line" if by_line else "opcode"

    def enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        """For `sys.settrace`."""
        if not frame.f_code.co_filename.startswith(_PLACES):
            return None
        frame.f_trace_opcodes = self._kind == "opcode"
        return self._trace

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == self._kind and (self._at is None or self.num_seen <= self._at):
            if self.num_seen == self._at:
                code = frame.f_code
                self.place = f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}"
                self.num_seen += 1
                return _set_interrupt  # at this frame's next event
            self.num_seen += 1
        return self._trace


@contextlib.contextmanager
def interrupted(at: int | None, *, by_line: bool = False) -> Iterator[Moments]:
    """Raises KeyboardInterrupt inside after moment `at` of the library's work."""
    moments = Moments(at, by_line=by_line)

    def handle(number: int, frame: FrameType | None) -> None:
        sys.settrace(None)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        sys.settrace(moments.enter)
        yield moments
    finally:
        sys.settrace(None)
        is_restored = False
        while not is_restored:  # one that is pending comes here at the latest
            with contextlib.suppress(KeyboardInterrupt):
                signal.signal(signal.SIGINT, before)
                is_restored = True
        _forget_unstarted()


def _forget_unstarted() -> None:
    """Python counts a thread whose start was interrupted among those that run, for ever."""
    limbo: dict[threading.Thread, Any] = threading._limbo  # type: ignore[attr-defined]
    for thread in list(limbo):
        if not thread._started.wait(_START_TIMEOUT_S):  # type: ignore[attr-defined]
            limbo.pop(thread, None)
