"""One typed door to numba: compiled on first call, cached on disk, run without the GIL so that threads overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles `function` with numba in nopython mode. No fast-math: results are the same on every machine."""
    compiled: Callable[P, R] = numba.njit(nogil=True, cache=True)(function)
    return compiled
