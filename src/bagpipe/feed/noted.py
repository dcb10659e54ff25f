"""The spans of an oracle process, for the trace that its trainer records.

Both hold a file without a name. While the process is told to, it writes a line there for each span
that ends. So neither waits for the other, and what was noted is there whatever became of the
process.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from bagpipe.feed.wire import NOTE_NO_SPANS, NOTE_SPANS
from bagpipe.native.spans import named_by


@dataclass(frozen=True, kw_only=True)
class NotedSpan:
    """A range of a thread's time."""

    name: str
    process_id: int
    thread_id: int  # the system's
    thread: str  # its name
    begin_ns: int  # of Unix time, as torch's profiler has it
    end_ns: int


class SpanWriter:
    """The process's end."""

    def __init__(self, file: int) -> None:
        self._file, self._naming = file, ExitStack()

    def obeys(self, message: bytes) -> bool:
        """Notes the spans of all threads from now on, or no more; False if told neither."""
        if message not in (NOTE_SPANS, NOTE_NO_SPANS):
            return False
        self._naming.close()
        if message == NOTE_SPANS:
            self._naming.enter_context(named_by(self._noted))
        return True

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        begin_ns = time.time_ns()
        try:
            yield
        finally:
            span = NotedSpan(
                name=name,
                process_id=os.getpid(),
                thread_id=threading.get_native_id(),
                thread=threading.current_thread().name,
                begin_ns=begin_ns,
                end_ns=time.time_ns(),
            )
            with contextlib.suppress(OSError):  # no memory is left: planning is worth more
                os.write(self._file, json.dumps(asdict(span)).encode() + b"\n")


class OracleSpans:
    """The trainer's end; notes once at most. It outlives the process."""

    def __init__(self, file: int, tell: Callable[[bytes], None]) -> None:
        """Closes `file` at its own end; `tell` sends the process a message."""
        self._file, self._tell = file, tell
        weakref.finalize(self, os.close, file)

    def begin(self) -> None:
        """Has the process note its spans."""
        self._send(NOTE_SPANS)

    def end(self) -> list[NotedSpan]:
        """Returns what it has noted, and has it note no more."""
        self._send(NOTE_NO_SPANS)
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        whole = content[: content.rfind(b"\n") + 1]  # of the last line half may be there
        return [NotedSpan(**json.loads(line)) for line in whole.splitlines()]

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the process has ended
            self._tell(message)
