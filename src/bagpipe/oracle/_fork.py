"""Splits a loop between threads, for the sequential stages of planning: steps depend on each other, the rows of one step don't."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

Result = TypeVar("Result")

_MIN_PART = 4096
"""Items below which a part is not worth handing to another thread."""


class Fork:
    """A number of threads that work on the parts of one loop at a time. Results must not depend on how many there are."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._others = ThreadPoolExecutor(num_threads - 1, thread_name_prefix=f"bagpipe-{name}") if num_threads > 1 else None

    def map(self, work: Callable[[int, int], Result], num_items: int) -> list[Result]:
        """`work(begin, end)` for consecutive parts that cover `num_items`; at least one, results in order."""
        num_parts = min(self._num_threads, num_items // _MIN_PART)
        if self._others is None or num_parts < 2:
            return [work(0, num_items)]
        bounds = [part * num_items // num_parts for part in range(num_parts + 1)]
        *others, last = pairwise(bounds)
        futures = [self._others.submit(work, *part) for part in others]
        result = work(*last)
        return [*(future.result() for future in futures), result]

    def close(self) -> None:
        """Ends the threads."""
        if self._others is not None:
            self._others.shutdown(wait=True, cancel_futures=True)
