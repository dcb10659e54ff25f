"""Limits of the numbers that a user gives.

A number must be of the right kind, and not so large that a typing error hangs a run or ends it with
an error from deep within.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from bagpipe.errors import ConfigError

MAX_NUM_EMBEDDINGS = 2**40
MAX_EMBEDDING_DIM = 16_384
MAX_RATE = 1e6
"""The limit of learning rates and of initializers: far beyond what trains, far within float32."""


def as_count(what: str, value: object, most: int) -> int:
    """Returns a count as an int.

    Args:
        what: The name of the count, for the error.
        value: An integer of any type, numpy's too.
        most: The largest count that is allowed.

    Raises:
        ConfigError: It is no integer, or not from 1 to `most`.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and 1 <= value <= most:
        return int(value)
    raise ConfigError(f"{what} is {value!r}, must be a whole number from 1 to {most:,}")


def check_number(owner: object, name: str, *, least: float = 0.0) -> None:
    """Checks an attribute of a value, as its `__post_init__` does.

    Raises:
        ConfigError: The attribute is no number from `least` to `MAX_RATE`.
    """
    value = getattr(owner, name)
    if not (is_number(value) and least <= value <= MAX_RATE):
        raise ConfigError(
            f"{type(owner).__name__}: {name} is {value!r}, must be a number from {least:,.0f} to "
            f"{MAX_RATE:,.0f}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number of any type, but no truth value."""
    # bool is an int to Python, but True as a rate is a mistake
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
