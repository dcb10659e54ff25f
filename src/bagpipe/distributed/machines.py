"""On which host each rank runs: ranks of one host share a shard server and an oracle process.

Each rank tells which host it is on. There may be any number of hosts, and of ranks on each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of all ranks, as one rank sees them."""

    rank: int
    of_ranks: tuple[int, ...]
    """The host of each rank, from 0 on in the order of their first ranks."""

    @property
    def own(self) -> int:
        """Which host this rank is on."""
        return self.of_ranks[self.rank]

    @property
    def num_hosts(self) -> int:
        """How many hosts there are."""
        return max(self.of_ranks) + 1

    @property
    def own_ranks(self) -> tuple[int, ...]:
        """The ranks of this one's host."""
        return tuple(rank for rank, host in enumerate(self.of_ranks) if host == self.own)

    @property
    def is_first(self) -> bool:
        """Whether this rank makes what those of its host share."""
        return self.rank == self.own_ranks[0]


def describe_process(host: str | None) -> str:
    """What a rank tells the others of itself: its process, and its host."""
    return f"{os.getpid()} {host or _own_host()}"


def processes_and_hosts(told: Sequence[str]) -> tuple[list[int], tuple[int, ...]]:
    """What all ranks have told of themselves, in the order of ranks.

    Returns:
        The process of each, and the number of its host; hosts count in the order of their first
        ranks.
    """
    pids, names = zip(*(text.split(maxsplit=1) for text in told), strict=True)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [int(pid) for pid in pids], tuple(numbers[name] for name in names)


def _own_host() -> str:
    """The name of this machine, and what tells it from others of that name.

    Two agents of torchrun on one machine are two hosts, since their trainers live with them.
    """
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot_id} {os.environ.get('GROUP_RANK', '')}".strip()
