"""What a user may call a size: rows (675_000), a share of all rows ("2%") or memory ("4GiB"); and
slots for each group from it.
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
"""Share of a cache that is divided evenly among the groups, so that one with few rows is not
starved by one with many."""


def parse_bytes(size: int | str, name: str) -> int:
    """Bytes of "512MiB", "4GB", "1.5GiB" or a plain number, at least 1. Raises ConfigError naming
    `name`.
    """
    number, unit = _parse(str(size))
    if number is None or (unit is not None and unit not in _UNITS) or number < 1:
        raise ConfigError(f"{name} is {size!r}, must be a size such as '512MiB' or '4GB'")
    return int(number * _UNITS[unit or "B"])


def parse_rows(size: int | str, groups: Sequence[Group], name: str) -> int:
    """Rows over all groups that `size` stands for, at most all there are. ConfigError, naming
    `name`, when it is none or zero.
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
        rows = (
            number
            * _UNITS[unit]
            * num_rows
            / sum(group.num_rows * group.record_bytes for group in groups)
        )
    if rows < len(groups):
        raise ConfigError(
            f"{name} is {size!r}, less than a row for each of {len(groups)} groups with "
            f"{num_rows:,} rows: make it larger"
        )
    return min(int(rows), num_rows)


def slots_of(cache_rows: int, groups: Sequence[Group]) -> list[int]:
    """Slots for each group of a cache of `cache_rows`, which is at least one a group and at most
    all rows.

    A tenth is shared evenly, the rest in proportion to the groups' rows; no group gets more slots
    than it has rows.
    """
    num_rows = np.array([group.num_rows for group in groups])
    slots = np.minimum(num_rows, max(1, int(_FLOOR_SHARE * cache_rows / len(groups))))
    share = (cache_rows - slots.sum()) / max(1, (num_rows - slots).sum())
    return [
        int(count) for count in slots + np.floor(share * (num_rows - slots) + 1e-9).astype(np.int64)
    ]


def rows_that_hold(
    num_needed: Sequence[int] | Int64Array,
    groups: Sequence[Group],
    slots: Callable[[int], Sequence[int]],
) -> int:
    """The smallest cache, in rows over all groups, of which `slots` gives each group at least
    `num_needed`; that of all rows where none does.
    """
    sizes = range(len(groups), sum(group.num_rows for group in groups))
    needed = np.asarray(num_needed)
    return len(groups) + bisect_left(
        sizes, True, key=lambda rows: bool((np.asarray(slots(rows)) >= needed).all())
    )


def _parse(size: str) -> tuple[float | None, str | None]:
    match = _SIZE.fullmatch(size.strip())
    return (
        (None, None) if match is None else (float(match["number"].replace("_", "")), match["unit"])
    )
