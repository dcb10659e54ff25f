"""Training whose rows the device would move by itself equals training in memory.

It runs without a GPU: streams are made up, so all is done in the order in which it is issued, and
Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.train import equality

from bagpipe.cache import executor
from bagpipe.cache.managed import ManagedStore
from bagpipe.optimizers import Optimizer, RowWiseAdagrad

direct = pytest.importorskip("bagpipe.cache.direct")
OPTIMIZER: Optimizer = RowWiseAdagrad(lr=0.1)


@pytest.fixture
def made_up_device(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets every stream use `DirectMover`; returns those that were made."""
    movers = list[Any]()
    out, into = (
        SimpleNamespace(wait_event=lambda _: None, record_event=lambda event=event: event)
        for event in ("evicted", None)  # None: compute, on a CPU, waits for no event
    )
    streams = SimpleNamespace(
        out=out,
        into=into,
        on=lambda _: contextlib.nullcontext(),
        let_out_follow=lambda: None,
        record_compute=lambda: None,
    )

    def mover_for(caches: Any, stores: Any, *_: object) -> Any:
        movers.append(direct.DirectMover(caches, stores, streams))
        return movers[-1]

    monkeypatch.setattr(executor, "mover_for", mover_for)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return movers


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/train/test_equality_gpu.py does it")
@pytest.mark.parametrize("oracle", ["thread", "device"])
@pytest.mark.parametrize(("extra_slots", "restarts"), [(0, []), (30, [7])])
def test_rows_that_the_device_moves_equal_tables_in_memory(
    oracle: str, extra_slots: int, restarts: list[int], made_up_device: list[Any]
) -> None:
    equality.check_equal(
        equality.TABLES,
        OPTIMIZER,
        equality.skewed_batches(16),
        extra_slots=extra_slots,
        restarts=restarts,
        store=lambda group, seed: ManagedStore(group, seed, partial(np.zeros, dtype=np.uint8)),
        oracle=oracle,
        lookahead=4,
        prefetch_depth=2,
    )
    assert len(made_up_device) == 1 + len(restarts)
