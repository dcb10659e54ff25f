"""A gate through which any number of threads pass at a time, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets threads pass beside each other; one that must be alone waits until they are through.

    Who comes while a thread is alone, or waits to be, waits too.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_passing, self._is_shut = 0, False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """For what may run beside others of its kind."""
        with self._changed:
            while self._is_shut:
                self._changed.wait()
            self._num_passing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_passing -= 1
                if self._is_shut:
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For what must run beside nothing else. A thread that is passing must not ask for it."""
        with self._changed:
            while self._is_shut:
                self._changed.wait()
            self._is_shut = True
        try:
            with self._changed:
                while self._num_passing:
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self._is_shut = False
                self._changed.notify_all()
