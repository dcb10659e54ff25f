"""What the numbers that a user gives may be: of the right kind, and not so large that a typing
error hangs a run or ends it with an error from deep within.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from bagpipe.errors import ConfigError

MAX_NUM_EMBEDDINGS = 2**40
MAX_EMBEDDING_DIM = 16_384
MAX_RATE = 1e6
"""Of learning rates and of what initializers draw: far beyond what trains, far within float32."""


def as_count(what: str, value: object, most: int) -> int:
    """`value`, an integer of any type. ConfigError: it is none, or not from 1 to `most`."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and 1 <= value <= most:
        return int(value)
    raise ConfigError(f"{what} is {value!r}, must be a whole number from 1 to {most:,}")


def check_number(owner: object, name: str, *, least: float = 0.0) -> None:
    """ConfigError: the attribute is no number from `least` to `MAX_RATE`."""
    value = getattr(owner, name)
    if not (is_number(value) and least <= value <= MAX_RATE):
        raise ConfigError(
            f"{type(owner).__name__}: {name} is {value!r}, must be a number from {least:,.0f} to "
            f"{MAX_RATE:,.0f}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number of any type, but no truth value."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
