"""Cache sizes as users write them, and the slots that each group gets from one.

A size is a number of rows (675_000), a share of all rows ("2%") or memory ("4GiB").
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from bagpipe.errors import ConfigError
from bagpipe.types import Group, Int64Array

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for base, suffix in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate("KMGT")
}
_SIZE = re.compile(r"(?P<number>\d[\d_]{0,30}(?:\.\d{1,30})?)\s*(?P<unit>%|[A-Za-z]+)?")
_FLOOR_SHARE = 0.1
"""Share of a cache that is divided evenly, so that no group starves beside one with many rows."""


def parse_bytes(size: int | str, name: str) -> int:
    """Returns the bytes that "512MiB", "4GB", "1.5GiB" or a plain number stands for, at least 1.

    Raises:
        ConfigError: It is no such size; the message calls it `name`.
    """
    number, unit = _parse(str(size))
    if number is None or (unit is not None and unit not in _UNITS) or number < 1:
        raise ConfigError(f"{name} is {size!r}, must be a size such as '512MiB' or '4GB'")
    return int(number * _UNITS[unit or "B"])


def parse_rows(size: int | str, groups: Sequence[Group], name: str) -> int:
    """Returns the rows over all groups that `size` stands for, at most all there are.

    Raises:
        ConfigError: It is no size, or less than a row for each group; the message calls it `name`.
    """
    num_rows = sum(group.num_rows for group in groups)
    number, unit = _parse(str(size))
    if number is None or (unit not in (None, "%") and unit not in _UNITS):
        raise ConfigError(
            f"{name} is {size!r}, must be rows such as 675_000, a share of the rows such as '2%', "
            "or memory such as '4GiB'"
        )
    if unit == "%":
        rows = number / 100 * num_rows
    elif unit is None:
        rows = number
    else:
        num_bytes = sum(group.num_rows * group.record_bytes for group in groups)
        rows = number * _UNITS[unit] * num_rows / num_bytes
    if rows < len(groups):
        raise ConfigError(
            f"{name} is {size!r}, less than a row for each of {len(groups)} groups with "
            f"{num_rows:,} rows: make it larger"
        )
    return min(int(rows), num_rows)


def slots_of(cache_rows: int, groups: Sequence[Group]) -> list[int]:
    """Divides a cache of `cache_rows` rows among the groups; returns the slots of each.

    A tenth is divided evenly, the rest in proportion to the groups' rows. No group gets more slots
    than it has rows. `cache_rows` is at least one for each group and at most all rows.
    """
    num_rows = np.array([group.num_rows for group in groups])
    slots = np.minimum(num_rows, max(1, int(_FLOOR_SHARE * cache_rows / len(groups))))
    share = (cache_rows - slots.sum()) / max(1, (num_rows - slots).sum())
    # The sum in floats may fall just short of a whole slot, hence the 1e-9.
    slots += np.floor(share * (num_rows - slots) + 1e-9).astype(np.int64)
    return [int(count) for count in slots]


def rows_that_hold(
    num_needed: Sequence[int] | Int64Array,
    groups: Sequence[Group],
    slots: Callable[[int], Sequence[int]],
) -> int:
    """Returns the smallest cache, in rows over all groups, that gives each group what it needs.

    Args:
        num_needed: Slots that each group needs.
        groups: The groups.
        slots: Gives the slots of each group for a cache of so many rows.

    Returns:
        The cache's rows; all rows of the groups where no cache does.
    """
    sizes = range(len(groups), sum(group.num_rows for group in groups))
    needed = np.asarray(num_needed)
    return len(groups) + bisect_left(
        sizes, True, key=lambda rows: bool((np.asarray(slots(rows)) >= needed).all())
    )


def _parse(size: str) -> tuple[float | None, str | None]:
    """Splits a size into number and unit, None for what it lacks."""
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        return None, None
    return float(match["number"].replace("_", "")), match["unit"]
