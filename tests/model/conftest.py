"""The model's plans are small: compiled loops run in one thread, others would only spin."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(num_threads)
