"""What a forked child lets go of, and what it is refused.

A fork copies all objects of the process but one thread only, and shares its files. So a child that
ends as programs do would end its parent's oracle process, and one that goes on would keep
connections and locks open after its parent's death.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from bagpipe.errors import UsageError

Owner = TypeVar("Owner")

_on_fork: WeakKeyDictionary[Any, Callable[[Any], object]] = WeakKeyDictionary()


def in_child(owner: Owner, let_go: Callable[[Owner], object]) -> None:
    """Calls `let_go(owner)` in each process forked from now on, before anything else there."""
    _on_fork[owner] = let_go


def check_same_process(pid: int, what: str) -> None:
    """Raises UsageError in a process that was forked from that of `what`."""
    if os.getpid() != pid:
        raise UsageError(
            f"process {os.getpid()} was forked from {pid}, whose {what} it can't use, since it has "
            "none of that one's threads: read the tables before the fork, or in the process that "
            "trains"
        )


def _let_go_of_all() -> None:
    for owner, let_go in list(_on_fork.items()):
        let_go(owner)


os.register_at_fork(after_in_child=_let_go_of_all)
