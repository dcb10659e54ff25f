"""Which machine each rank runs on, and whether the ranks of each host really share one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from bagpipe.errors import ConfigError
from bagpipe.topology import neighbours_on

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def describe_process(num_hosts: int) -> str:
    """What a rank tells the others of itself: process, number of hosts it was told, machine."""
    return f"{os.getpid()} {num_hosts} {_machine()}"


def check_machines(told: Sequence[str], num_hosts: int) -> list[int]:
    """Checks what all ranks have told of themselves, in the order of ranks; returns their pids.

    Raises:
        ConfigError: ranks were told different numbers of hosts, or those of one host run on several
            machines.
    """
    pids, nums_hosts, machines = zip(*(text.split(maxsplit=2) for text in told), strict=True)
    on_hosts = [
        {machines[rank] for rank in neighbours_on(host, len(told), num_hosts)}
        for host in range(num_hosts)
    ]
    if len(set(nums_hosts)) > 1 or any(len(found) > 1 for found in on_hosts):
        numbers = ", ".join(sorted({f"num_hosts={number}" for number in nums_hosts}))
        where = "; ".join(
            " and ".join(name.split()[0] for name in sorted(found)) for found in on_hosts
        )
        raise ConfigError(
            f"{len(told)} trainers were told {numbers}, but run, host by host, on {where}: give "
            "all the number of hosts, "
            f"Communicator.from_default_group(num_hosts={len(set(machines))}), and start as many "
            "on each, beside each other"
        )
    return [int(pid) for pid in pids]


def _machine() -> str:
    """The name of this machine, and what tells it from others of that name."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot_id}".strip()
