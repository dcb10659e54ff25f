"""What a user may call a cache size, in slots for each group: rows ("675_000"), a share of all rows ("2%"), memory ("4GiB").

A size is over all groups and is shared in proportion to their rows, as `bagpipe.lookahead` shares it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bagpipe.errors import ConfigError
from bagpipe.types import Group

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1) for base, suffix in ((1000, "B"), (1024, "iB")) for power, prefix in enumerate("KMGT")
}
_SIZE = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?)\s*(?P<unit>%|[A-Za-z]+)?")


def parse_rows(size: str, groups: Sequence[Group], name: str) -> int:
    """Rows over all groups that `size` stands for, at most all there are. ConfigError, naming `name`, when it is none or zero."""
    num_rows = sum(group.num_rows for group in groups)
    match = _SIZE.fullmatch(size.strip())
    unit = match["unit"] if match else None
    if match is None or (unit not in (None, "%") and unit not in _UNITS):
        raise ConfigError(f"{name} {size}: must be rows such as 675_000, a share of the rows such as 2%, or memory such as 4GiB")
    number = float(match["number"].replace("_", ""))
    if unit == "%":
        rows = number / 100 * num_rows
    elif unit is None:
        rows = number
    else:
        rows = number * _UNITS[unit] * num_rows / sum(group.num_rows * group.record_bytes for group in groups)
    if min(slots_of(int(rows), groups)) < 1:
        raise ConfigError(f"{name} {size}: leaves no slot for one of the groups, which have {num_rows:,} rows: make it larger")
    return min(int(rows), num_rows)


def slots_of(cache_rows: int, groups: Sequence[Group]) -> list[int]:
    """Slots for each group of a cache of `cache_rows` over all groups; no group gets more slots than it has rows."""
    num_rows = np.array([group.num_rows for group in groups])
    slots = np.floor(cache_rows / num_rows.sum() * num_rows + 1e-9).astype(np.int64)
    return [int(count) for count in np.minimum(slots, num_rows)]
