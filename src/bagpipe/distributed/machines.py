"""On which host each rank runs: ranks of one host share a shard server and an oracle process."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
