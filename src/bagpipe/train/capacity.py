"""From what the user says of the cache ("auto", "4GiB", rows) to slots for each group."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
import torch

from bagpipe.errors import ConfigError
from bagpipe.types import Group

AUTO_SHARE = 0.5
"""Share of the device's free memory that `cache="auto"` takes: the model and its activations need the rest."""

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1) for base, suffix in ((1000, "B"), (1024, "iB")) for power, prefix in enumerate("KMGT")
}


def parse_bytes(size: int | str, name: str) -> int:
    """Bytes of "512MiB", "4GB", "1.5GiB" or a plain number. Raises ConfigError naming `name`."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{name} is {size!r}, must be a size such as '512MiB' or '4GB'")
    return int(float(match[1]) * _UNITS[match[2]])


def slots_for(cache: int | str | Sequence[int], groups: Sequence[Group], device: torch.device) -> list[int]:
    """Slots for each group. A total is shared in proportion to the groups' rows; no group gets more slots than it has rows.

    `cache` is a number of rows over all groups, a size in bytes of records, "auto", or a number of rows for each group.
    """
    num_rows = np.array([group.num_rows for group in groups])
    if not isinstance(cache, int | str):
        if len(cache) != len(groups):
            raise ConfigError(f"cache has {len(cache)} entries for {len(groups)} groups")
        wanted = np.array(cache)
    else:
        row_bytes = np.array([group.record_bytes for group in groups])
        if isinstance(cache, int):
            share = cache / num_rows.sum()
        else:
            size = int(AUTO_SHARE * _free_bytes(device)) if cache == "auto" else parse_bytes(cache, "cache")
            share = size / float(num_rows @ row_bytes)
        wanted = np.floor(share * num_rows + 1e-9).astype(np.int64)
    if (wanted < 1).any():
        group = groups[int(np.argmin(wanted))]
        raise ConfigError(f"cache={cache!r} leaves no slot for {group.name} with {group.num_rows:,} rows: make it larger")
    return [int(slots) for slots in np.minimum(wanted, num_rows)]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
