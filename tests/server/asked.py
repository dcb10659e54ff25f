"""What shard servers are asked in tests, and whether it waits or is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest

from bagpipe.errors import StoreError
from bagpipe.server.client import ShardServers
from bagpipe.store import Steps
from bagpipe.types import Float32Array

ALL = np.arange(1_300)


def asked(
    trainer: ShardServers, rows: object, fence: Steps
) -> tuple[Callable[[], None], Float32Array]:
    out = np.full((len(rows), 7), np.nan, np.float32)  # type: ignore[arg-type]
    return trainer.stores[0].ask(rows, out, fence), out  # type: ignore[arg-type]


def is_waiting(future: Future[object]) -> bool:
    time.sleep(0.05)
    return not future.done()


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        call()
    return str(caught.value)
