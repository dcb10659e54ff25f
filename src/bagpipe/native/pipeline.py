"""Stages that run beside each other in threads, in order and with bounded queues between them.

Threads suffice for loops that release the GIL. Back-pressure: when a queue is full nothing upstream
of it moves.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from bagpipe.errors import BackgroundError, BagpipeError
from bagpipe.native.workers import Call, Workers

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: Workers,
    ahead: int,
    *,
    urgent: bool = False,
) -> Iterator[Result]:
    """`map` on `workers`; yields results in the order of `items`.

    What `items` raises is raised after the results of all items before it.

    Args:
        function: what a worker's thread does with an item.
        items: read in the caller's thread, as results are asked for.
        workers: the threads; they may have other calls, too.
        ahead: how many calls may be under way or waiting.
        urgent: whether these calls go before the workers' others.
    """
    submit = workers.submit_urgent if urgent else workers.submit
    calls: deque[Call[Result]] = deque()
    iterator = iter(items)
    failure: BaseException | None = None
    while failure is None:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except BaseException as error:
            failure = error
            break
        calls.append(submit(function, item))
        while len(calls) >= ahead or calls[0].is_over:
            yield calls.popleft().result()
            # A slow consumer finds all calls over: were they all yielded first, workers would idle,
            # and then have all at once.
            if len(calls) <= ahead // 2:
                break
    while calls:
        yield calls.popleft().result()
    if failure is not None:
        raise failure


class BackgroundIterator(Generic[Item]):
    """Iterates `items` in a thread of its own, at most `ahead` items ahead of the consumer.

    What `items` raises is raised by `next` in its place in the order: a BagpipeError as it is,
    since its message says all, anything else as the cause of a BackgroundError. `close` ends the
    thread; so does the end of the iteration, and of this object.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        ahead: int,
        name: str,
        on_item: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_item` is called by the thread after each item, and after the end."""
        self._line, self._name = _Line(max(1, ahead), on_item), name
        self._has_ended = False
        weakref.finalize(self, self._line.close)
        self._thread = threading.Thread(
            target=_run, args=(items, self._line), name=f"bagpipe-{name}", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._line.is_closed:
            raise StopIteration
        return self._deliver(_END if self._has_ended else self._line.take())

    @property
    def is_ready(self) -> bool:
        """Whether `next` would not wait."""
        return self._has_ended or self._line.is_closed or not self._line.is_empty

    def next_if_ready(self) -> Item | None:
        """The next item if there is one without waiting, else None.

        The end, or a failure, is left for `next`.
        """
        return None if self._line.is_empty else self.next_or_none()

    def next_or_none(self) -> Item | None:
        """Waits for the next item; None at the end, or a failure, which is left for `next`."""
        if self._line.is_closed or self._has_ended:
            return None
        item = self._line.take()
        if item is _END:
            self._has_ended = True
            return None
        return item  # type: ignore[return-value]

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Ends the thread and drops what it had ready. Closing twice is allowed.

        Returns:
            False if the thread has not come back from `items` within `timeout_s`. It ends when it
            does, or with the program.
        """
        self._line.close()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _deliver(self, item: object) -> Item:
        """Returns an item; at the end, raises what ended the iteration."""
        if item is not _END:
            return item  # type: ignore[return-value]
        self.close()
        failure = self._line.failure
        if failure is None:
            raise StopIteration
        if isinstance(failure, BagpipeError):
            raise failure
        raise BackgroundError(f"the {self._name} thread failed: {failure!r}") from failure


_END = object()


class _Line:
    """The way from the thread to the consumer.

    The thread holds nothing else, or a consumer that is dropped would never end it.
    """

    def __init__(self, ahead: int, on_item: Callable[[], None]) -> None:
        # Two of these are one bounded queue, at a tenth of the price of `queue.Queue`, which takes
        # Python code and a condition.
        self._items, self._room = SimpleQueue[object](), SimpleQueue[None]()
        for _ in range(ahead):
            self._room.put(None)
        self._on_item = on_item
        self.is_closed = False
        self.failure: BaseException | None = None

    @property
    def is_empty(self) -> bool:
        return self._items.empty()

    def put(self, item: object) -> bool:
        """Waits for room; False when the consumer has gone."""
        # `close` makes room after it has said so: this never waits for a consumer that has gone
        if not self.is_closed:
            self._room.get()
        if self.is_closed:
            return False
        self._items.put(item)
        self._on_item()
        return True

    def take(self) -> object:
        """Waits for an item."""
        item = self._items.get()
        self._room.put(None)
        return item

    def close(self) -> None:
        """Says that the consumer has gone; allowed twice."""
        self.is_closed = True
        self._room.put(None)  # for the thread, should it wait for some
        while not self._items.empty():
            self._items.get_nowait()
        self._items.put(_END)  # for the consumer, should another thread close


def _run(items: Iterable[Item], line: _Line) -> None:
    """The thread: passes items on until they end, or the consumer has gone."""
    iterator: Iterator[Item] | None = None
    try:
        iterator = iter(items)
        for item in iterator:
            if not line.put(item):
                break
            del item  # or it would live until there is another one
    except BaseException as error:  # whatever it is, it must reach the training loop
        line.failure = error
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
        line.put(_END)
