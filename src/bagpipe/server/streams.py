"""A trainer's streams to one shard server, and what waits for their answers.

Each stream has a thread that reads answers, so a server never waits for a trainer to look. A fetch
that can't be sent at once, since the server still owes answers on that stream, is sent by a second
thread: asking never blocks, however long a fence holds the requests before.

A stream that fails is of no more use. It tells `fail`, which ends all others, too: then every part
of every request ends, and nobody touches a caller's array after its wait has returned.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

from bagpipe.errors import StoreError
from bagpipe.server.channels import Channel
from bagpipe.server.parts import Part
from bagpipe.server.wire import Header
from bagpipe.types import Group, UInt8Array

_END_TIMEOUT_S = 5.0


class Stream:
    """One stream; any thread may send."""

    def __init__(
        self,
        channel: Channel,
        groups: tuple[Group, ...],
        fail: Callable[[Exception], StoreError],
        *,
        of_fetches: bool,
    ) -> None:
        """Starts its threads.

        Args:
            channel: Leads to the server; taken over.
            groups: All groups.
            fail: Told why the stream has failed; returns how to tell it.
            of_fetches: Whether it may `send_later`.
        """
        self._channel, self._groups, self._fail = channel, groups, fail
        self._lock = threading.Lock()
        self._owed: deque[Part] = deque()
        self._error: StoreError | None = None
        self._num_sent = 0
        self.last_s = time.monotonic()
        """When an answer came last, or was first owed."""
        self._to_send: SimpleQueue[Part | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._receive, name="receive", daemon=True)]
        if of_fetches:
            self._threads.append(threading.Thread(target=self._send, name="send", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def num_owed(self) -> int:
        """How many answers are to come."""
        return len(self._owed)

    def send(self, part: Part) -> None:
        """Sends a message and notes what is owed; messages are answered in order.

        Blocks until the system takes it, which a server of writes soon does.

        Raises:
            StoreError: The stream has failed, or the server has ended it.
        """
        with self._lock:
            self._note(part)
            self._write(part)

    def send_later(self, part: Part) -> None:
        """As `send`, but never blocks for long.

        Raises:
            StoreError: The stream has failed.
        """
        with self._lock:
            is_idle = not self._owed
            self._note(part)
            if is_idle:  # then the server reads, and takes it at once
                self._write(part)
            else:
                self._to_send.put(part)

    def stalled_s(self) -> float:
        """How long an answer has been owed without any that came."""
        return time.monotonic() - self.last_s if self._owed else 0.0

    def cancel(self, error: StoreError) -> None:
        """Ends the stream; what is owed fails with `error`."""
        self._error = self._error or error
        self._channel.cancel()

    def close(self) -> None:
        """Ends the stream, once what is owed has come or failed."""
        self._to_send.put(None)
        self._channel.finish()
        for thread in self._threads:
            thread.join(_END_TIMEOUT_S)
        self._channel.close()

    def _note(self, part: Part) -> None:
        if self._error is _ENDED:
            self._error = self._fail(_ENDED)
        if self._error is not None:
            raise StoreError(str(self._error)) from self._error
        if not self._owed:
            self.last_s = time.monotonic()
        part.number, self._num_sent = self._num_sent, self._num_sent + 1
        self._owed.append(part)

    def _write(self, part: Part) -> None:
        try:
            self._channel.write(part, replace(part.header, number=part.number))
        except Exception as error:  # then the thread that reads ends what is owed
            self._fail(error)

    def _send(self) -> None:
        while (part := self._to_send.get()) is not None:
            self._write(part)

    def _receive(self) -> None:
        error: StoreError
        try:
            while True:
                self._take(*self._channel.read())
        except StopIteration:
            error = self._error or _ENDED
        except Exception as failure:  # whatever it is, it must reach those who wait
            error = self._fail(failure)
        with self._lock:
            # one that owes nothing may end: no fault, unless something is asked of it later
            if error is _ENDED and self._owed:
                error = self._fail(error)
            self._error = error
            owed = list(self._owed)
            self._owed.clear()
        for part in owed:
            part.pending.end_part(error)

    def _take(self, header: Header, data: UInt8Array | None) -> None:
        if not self._owed or self._owed[0].number != header.number:
            raise StoreError(f"an answer to message {header.number} came, which owes none")
        part = self._owed[0]
        self.last_s = time.monotonic()
        if data is None or part.receive(data, self._groups[part.header.group]):
            self._owed.popleft()
            part.pending.end_part()


_ENDED = StoreError("it has ended the stream")
