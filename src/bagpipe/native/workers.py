"""Background threads that run calls: `concurrent.futures` at a twentieth of its price.

Handing a call to a ThreadPoolExecutor takes its caller 40 us, most of it for the future's condition
variable, and threads with steps of under 2 ms hand out several calls a step. Here a call's outcome
is guarded by one plain lock.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

Result = TypeVar("Result")


class Call(Generic[Result]):
    """A call handed to `Workers`, and its outcome."""

    __slots__ = ("_arguments", "_error", "_function", "_is_over", "_result")

    def __init__(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._is_over = threading.Lock()  # held until then
        self._is_over.acquire()
        self._result: Result
        self._error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has returned or raised."""
        return not self._is_over.locked()

    @property
    def has_failed(self) -> bool:
        """Whether it has raised."""
        return self._error is not None

    @property
    def has_succeeded(self) -> bool:
        """Whether it has returned."""
        return self.is_over and self._error is None

    def result(self) -> Result:
        """Waits for it; returns or raises what it did. Any thread may ask, any number of times."""
        if self._is_over.locked():
            with self._is_over:
                pass
        if self._error is not None:
            raise self._error
        return self._result

    def run(self) -> None:
        """Called by a worker, once."""
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:  # whatever it is, it must reach who asks for the result
            self._error = error
        finally:
            del self._function, self._arguments  # else they would live as long as the outcome
            self._is_over.release()

    def drop(self) -> None:
        """Called by a worker in place of `run`: another call in hand may wait for this one."""
        self._error = RuntimeError("the call was dropped, since its workers were closed")
        del self._function, self._arguments
        self._is_over.release()


class Workers:
    """Owns threads, which end with `close`, after a `with` block, or with the object itself."""

    def __init__(self, name: str, num_threads: int = 1) -> None:
        """Starts the threads.

        Calls begin in the order in which they are submitted, urgent ones first. With one thread
        they end in that order, too.
        """
        self._name = name
        self._urgent, self._others = deque[Call[Any]](), deque[Call[Any]]()
        # False, put once a call is queued, wakes a thread; True ends one
        self._tokens = SimpleQueue[bool]()
        self._closed = _Flag()
        # a call that is queued behind the end would never run, nor fail
        self._is_closing = threading.Lock()
        self._threads = [
            threading.Thread(
                target=_run,
                args=(self._tokens, self._urgent, self._others, self._closed),
                name=f"{name}_{index}",
                daemon=True,
            )
            for index in range(num_threads)
        ]
        end = weakref.finalize(self, _end, self._tokens, num_threads)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # the system starts no more threads: those that run must end
            end()
            raise

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Call[Result]:
        """Queues a call."""
        return self._submit(self._others, Call(function, arguments))

    def submit_urgent(self, function: Callable[..., Result], *arguments: Any) -> Call[Result]:
        """Queues a call before all that are not urgent."""
        return self._submit(self._urgent, Call(function, arguments))

    def _submit(self, queue: deque[Call[Any]], call: Call[Result]) -> Call[Result]:
        with self._is_closing:
            if self._closed.is_set:
                raise RuntimeError(f"{self._name} is closed")
            queue.append(call)
            # An interrupt before this leaves a call that the next token's thread finds, too.
            self._tokens.put(False)
        return call

    def close(self, *, wait: bool = True) -> None:
        """Waits for the calls in hand and drops those behind them. Closing twice is allowed.

        The `result` of a dropped call raises RuntimeError. Without `wait` this returns at once: the
        threads end after the calls in hand, or with the process.
        """
        with self._is_closing:
            self._closed.is_set = True
            _end(self._tokens, len(self._threads))
        for thread in self._threads if wait else ():
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Flag:
    """Set once. Setting a `threading.Event` takes a lock, which an interrupt would leave taken."""

    is_set = False


def _end(tokens: SimpleQueue[bool], num_threads: int) -> None:
    for _ in range(num_threads):
        tokens.put(True)


def _run(
    tokens: SimpleQueue[bool], urgent: deque[Call[Any]], others: deque[Call[Any]], closed: _Flag
) -> None:
    """A thread: runs calls until it is ended. It holds no `Workers`, which so can be dropped."""
    is_end = False
    while not is_end:
        is_end = tokens.get()
        # all that is queued, whatever the number of tokens: an interrupt may come before one is put
        while call := _pop(urgent) or _pop(others):
            if closed.is_set:
                call.drop()
            else:
                call.run()
            del call  # or its outcome would live until the next call


def _pop(queue: deque[Call[Any]]) -> Call[Any] | None:
    """The first call, or None."""
    try:
        return queue.popleft()
    except IndexError:  # asking first would not do: another thread may be faster
        return None
