"""From what the user says of the cache to slots and caches of each group, on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral

import torch

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.errors import ConfigError
from bagpipe.oracle.sizes import parse_rows, slots_of
from bagpipe.types import Group

AUTO_SHARE = 0.5
"""Share of the device's free memory that `cache="auto"` takes: the model and its activations need
the rest."""


def slots_for(
    cache: int | str | Sequence[int],
    groups: Sequence[Group],
    device: torch.device,
    peers: Peers = ALONE,
    bytes_beside: Sequence[int] = (),
) -> list[int]:
    """Slots for each group; none gets more than it has rows.

    Args:
        cache: a number of rows over all groups, a share of them ("2%"), memory for records
            ("4GiB"), "auto", or a number of rows for each group. With several trainers it is that
            of each.
        groups: of tables.
        device: whose free memory "auto" divides.
        peers: the other trainers; by default none. "auto" is the same for all: what the one with
            the least free memory can have. On CPUs the trainers of a host share its memory.
        bytes_beside: what else a slot takes of that memory, by group, for "auto" to count; by
            default nothing.

    Raises:
        ConfigError: `cache` is anything else.
    """
    if isinstance(cache, bool) or not isinstance(cache, Integral | str | Sequence):
        raise ConfigError(
            f"cache is {cache!r}, must be rows, a size such as '4GiB' or '2%', 'auto', or a list "
            "of rows by group"
        )
    if isinstance(cache, Sequence) and not isinstance(cache, str):
        if len(cache) != len(groups):
            raise ConfigError(f"cache has {len(cache)} entries for {len(groups)} groups")
        return [min(int(slots), group.num_rows) for slots, group in zip(cache, groups, strict=True)]
    size = str(cache)
    if cache == "auto":
        num_bytes = _automatic_bytes(device, peers)
        if any(bytes_beside):
            num_bytes = int(num_bytes * _share_of_records(groups, bytes_beside))
        size = f"{num_bytes}B"
    return slots_of(parse_rows(size, groups, "cache"), groups)


def make_caches(
    groups: Sequence[Group],
    num_slots: Sequence[int],
    num_replica_slots: Sequence[int] | None,
    *,
    device: torch.device,
    seed: int,
) -> list[DeviceCache]:
    """A cache for each group; see `EmbeddingBagCollection.start`."""
    if len(num_slots) != len(groups):
        raise ConfigError(f"num_slots has {len(num_slots)} entries for {len(groups)} groups")
    replicas = (
        [0] * len(groups)
        if num_replica_slots is None
        else [2 * slots for slots in num_replica_slots]
    )
    return [
        DeviceCache(group=group, num_slots=slots, num_replica_slots=more, device=device, seed=seed)
        for group, slots, more in zip(groups, num_slots, replicas, strict=True)
    ]


def _share_of_records(groups: Sequence[Group], bytes_beside: Sequence[int]) -> float:
    """Of the memory that slots take, where all groups keep the same share of their rows."""
    records = sum(group.num_rows * group.record_bytes for group in groups)
    others = (group.num_rows * beside for group, beside in zip(groups, bytes_beside, strict=True))
    return records / (records + sum(others))


def _automatic_bytes(device: torch.device, peers: Peers) -> int:
    free = -int(peers.largest(-_free_bytes(device)))
    if device.type == "cpu":
        free //= len(peers.hosts.own_ranks)
    return int(AUTO_SHARE * free)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_by_torch
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
