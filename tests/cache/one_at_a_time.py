"""Calls that take turns: Triton's interpreter is for one thread, and writes back all memory that a
launch's arguments are of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from bagpipe.cache.plan_rings import HostRings
from bagpipe.cache.triton_launch import Kernel


def in_turn(lock: AbstractContextManager[Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` while it holds a lock that its thread may hold already."""

    def called(*arguments: Any, **options: Any) -> Any:
        with lock:
            return call(*arguments, **options)

    return called


def launch_in_turn(lock: AbstractContextManager[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets threads launch kernels and move plans one after the other."""
    for owner, name in ((Kernel, "launch"), (HostRings, "move")):
        monkeypatch.setattr(owner, name, in_turn(lock, getattr(owner, name)))
