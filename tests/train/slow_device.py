"""Lets a GPU sleep before each piece of work of one kind: what should wait for it and does not then
comes too early every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.exchange_messages import RowMessages
from bagpipe.cache.executor import Executor
from bagpipe.cache.transfers import RecordMover

KINDS: dict[str, tuple[type, str]] = {
    "plans": (Executor, "_plan_to_device"),
    "evictions": (RecordMover, "_evict_all"),
    "fills": (RecordMover, "_fill_slots"),
    "lookups": (DeviceCache, "lookup"),
    "updates": (DeviceCache, "apply"),
    "sums": (DeviceCache, "sum_into"),
    "exchanges": (RowMessages, "_exchange"),
}
OF_SEVERAL_TRAINERS = ("sums", "exchanges")
_CYCLES = 1_000_000
"""Half a millisecond or so."""


def slow_down(kind: str, replace: Callable[[type, str, Any], None] = setattr) -> None:
    """Sleeps on whatever stream the work of this kind is asked for."""
    owner, name = KINDS[kind]
    original = getattr(owner, name)

    def slowed(*args: Any, **options: Any) -> Any:
        torch.cuda._sleep(_CYCLES)
        return original(*args, **options)

    replace(owner, name, slowed)
