"""What the system tells of processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def of_process(pid: int, what: str) -> str:
    """A file of /proc; empty once the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_text()
    return ""


def is_alive(pid: int) -> bool:
    """Whether it has not ended; one that has ended may wait for who adopted it to ask how."""
    fields = of_process(pid, "stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] != "Z"


def children_of(pid: int) -> list[int]:
    """Of all threads of a process, oldest first."""
    threads = []
    with suppress(OSError):
        threads = [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()]
    children = (of_process(pid, f"task/{thread}/children") for thread in threads)
    return sorted(int(child) for found in children for child in found.split())
