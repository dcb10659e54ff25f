"""Equality on a GPU: bit for bit over caches, lookaheads, depths, stores and restarts; close to the
same run on a CPU.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.device_oracle.test_device_oracle import keep
from tests.train import equality
from tests.train.slow_device import KINDS, OF_SEVERAL_TRAINERS, slow_down
from tests.train.test_trainers import linear_loss, make_batches, make_tables

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad
from bagpipe.store import FileStore, MemoryStore

pytestmark = pytest.mark.gpu


class UnevenStore(MemoryStore):
    """Whose calls take their time, some more than others: later steps' rows are often there before
    earlier ones'.
    """

    num_calls = itertools.count()

    def fetch(self, rows: Any, out: Any) -> None:
        time.sleep(next(self.num_calls) % 5 * 0.002)
        super().fetch(rows, out)

    def write(self, rows: Any, records: Any) -> None:
        time.sleep(next(self.num_calls) % 7 * 0.002)
        super().write(rows, records)


OPTIMIZERS: list[Optimizer] = [SGD(lr=0.5), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1), Adam(lr=0.05)]
VARIANTS: list[dict[str, Any]] = [
    {"extra_slots": 0},
    {"extra_slots": 30, "lookahead": 1},
    {"extra_slots": 30, "lookahead": 20, "prefetch_depth": 0},
    {"extra_slots": 30, "lookahead": 20, "prefetch_depth": 5},
    {"extra_slots": 30, "restarts": [11, 30]},
    {"extra_slots": 10_000},
    {"extra_slots": 30, "file": True},
    {"extra_slots": 30, "store": MemoryStore, "restarts": [11, 30]},
    {"extra_slots": 0, "store": UnevenStore},
    {"extra_slots": 30, "store": UnevenStore, "prefetch_depth": 6},
    {"extra_slots": 0, "oracle": "device"},
    {"extra_slots": 30, "oracle": "device", "lookahead": "auto", "restarts": [11, 30]},
    {"extra_slots": 30, "oracle": "device", "lookahead": 9, "store": UnevenStore},
    {"extra_slots": 0, "oracle": "device", "lookahead": 1, "row_map": True},
    {"extra_slots": 30, "oracle": "device", "restarts": [11, 30], "row_map": True},
]


def run(
    device: str, optimizer: Optimizer, folder: Path, **variant: Any
) -> tuple[list[float], list[np.ndarray]]:
    """Losses and final records of one way to train the same batches."""
    batches = equality.skewed_batches(50)
    store = variant.pop("store", None)
    if variant.pop("file", False):
        store = lambda group, seed: FileStore(  # noqa: E731
            group, seed, folder / str(group.index), existing="overwrite"
        )
    embeddings = EmbeddingBagCollection(
        equality.TABLES, optimizer=optimizer, device=device, seed=11, store=store
    )
    extra_slots, restarts = variant.pop("extra_slots"), variant.pop("restarts", [])
    cache = [slots + extra_slots for slots in equality.smallest_caches(embeddings.groups, batches)]
    dense = equality.make_dense(embeddings.groups).to(device)
    losses: list[float] = []
    bounds = [0, *restarts, len(batches)]
    with pytest.MonkeyPatch.context() as patch:
        if variant.pop("row_map", False):
            keep("map", patch)
        for begin, end in itertools.pairwise(bounds):
            losses += equality.train_cached(
                embeddings, batches[begin:end], dense, cache=cache, **variant
            )
    records = equality.all_records(embeddings)
    embeddings.close()
    return losses, records


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_bit_for_bit_on_one_device_and_close_to_the_cpu(
    optimizer: Optimizer, tmp_path: Path
) -> None:
    results = [
        run("cuda", optimizer, tmp_path / str(index), **dict(variant))
        for index, variant in enumerate(VARIANTS)
    ]
    for losses, records in results[1:]:
        assert losses == results[0][0]
        for one, other in zip(records, results[0][1], strict=True):
            np.testing.assert_array_equal(one, other)
    cpu_losses, cpu_records = run("cpu", optimizer, tmp_path / "cpu", extra_slots=30)
    np.testing.assert_allclose(results[0][0], cpu_losses, rtol=1e-3)
    for one, other in zip(results[0][1], cpu_records, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OF_SEVERAL_TRAINERS])
def test_bit_for_bit_however_slow_the_device_is_at_one_thing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("cuda", OPTIMIZERS[0], tmp_path, extra_slots=0)
    slow_down(kind, monkeypatch.setattr)
    losses, records = run("cuda", OPTIMIZERS[0], tmp_path, extra_slots=0)
    assert losses == expected[0]
    for one, other in zip(records, expected[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_device_memory_is_left_behind(tmp_path: Path) -> None:
    run("cuda", SGD(lr=0.5), tmp_path, extra_slots=30)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for index in range(3):
        run("cuda", SGD(lr=0.5), tmp_path / str(index), extra_slots=30)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_a_device_far_behind_the_host_does_not_stop_the_oracle() -> None:
    """The oracle process has room for few plans, which is free when the device has computed them:
    the host must wait for it.
    """
    batches = make_batches(40)
    embeddings = EmbeddingBagCollection(make_tables(), optimizer=SGD(lr=0.5), device="cuda")
    num_trained = 0
    with bagpipe.lookahead(
        batches, embeddings, cache=[400, 50], lookahead=4, oracle="process"
    ) as stream:
        for batch in stream:
            linear_loss(embeddings(batch).groups).backward()
            torch.cuda._sleep(40_000_000)  # some 20 ms
            num_trained += 1
    assert num_trained == embeddings.step == len(batches)  # it waited for ever
    embeddings.close()
