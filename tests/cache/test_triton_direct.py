"""Records that kernels copy between slots and a table in the host's memory.

Without CUDA they run in Triton's interpreter, on plain memory.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.managed import ManagedStore, memory_store_on
from bagpipe.optimizers import SGD, Adagrad, Optimizer, RowWiseAdagrad
from bagpipe.types import DataType, Group, TableConfig, group_tables

triton_direct = pytest.importorskip("bagpipe.cache.triton_direct")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, NUM_SLOTS = 60, 40


def make_group(dim: int, optimizer: Optimizer, data_type: DataType) -> Group:
    table = TableConfig(
        name="t",
        num_embeddings=NUM_ROWS,
        embedding_dim=dim,
        feature_names=["f"],
        data_type=data_type,
    )
    (group,) = group_tables([table], optimizer)
    return group


def make_store(group: Group) -> ManagedStore:
    if DEVICE.type == "cpu":
        return ManagedStore(group, 0, partial(np.zeros, dtype=np.uint8))
    store = memory_store_on(DEVICE, [group])(group, 0)
    assert isinstance(store, ManagedStore)
    return store


@pytest.mark.parametrize(
    ("dim", "optimizer", "data_type"),
    [
        (4, SGD(lr=0.1), "fp32"),
        (5, RowWiseAdagrad(lr=0.1), "fp32"),
        (7, Adagrad(lr=0.1), "fp32"),
        (3, RowWiseAdagrad(lr=0.1), "bf16"),
    ],
)
def test_rows_go_to_slots_and_back(dim: int, optimizer: Optimizer, data_type: DataType) -> None:
    group = make_group(dim, optimizer, data_type)
    store = make_store(group)
    store.records[:] = np.random.default_rng(0).normal(size=store.records.shape)
    before = store.records.copy()
    cache = DeviceCache(group=group, num_slots=NUM_SLOTS, device=DEVICE, num_replica_slots=2)
    table = triton_direct.CachedTable.of(store.records, cache)
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.permutation(NUM_ROWS)[:30]).to(DEVICE)
    slots = torch.from_numpy(rng.permutation(NUM_SLOTS)[:30].astype(np.int32)).to(DEVICE)

    triton_direct.fill_from(table, rows, slots)
    filled = cache.read(slots).cpu().numpy()
    np.testing.assert_array_equal(filled, before[rows.cpu()])
    assert table.rows_of_slots[slots.long()].tolist() == rows.tolist()
    assert (table.rows_of_slots >= 0).sum() == 30

    cache.words[:NUM_SLOTS] += 1
    cache.state += 2
    changed = cache.read(slots).cpu().numpy()
    triton_direct.write_to(table, rows[:7].int(), slots[:7])
    triton_direct.write_all_to(table)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    expected = before.copy()
    expected[rows.cpu()] = changed
    np.testing.assert_array_equal(store.records, expected)
    assert table.rows_of_slots[slots[:7].long()].tolist() == [-1] * 7
    assert table.rows_of_slots[slots[7:].long()].tolist() == rows[7:].tolist()


def test_nothing_to_move_is_nothing_done() -> None:
    group = make_group(4, SGD(lr=0.1), "fp32")
    cache = DeviceCache(group=group, num_slots=NUM_SLOTS, device=DEVICE)
    table = triton_direct.CachedTable.of(make_store(group).records, cache)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    triton_direct.fill_from(table, nothing, nothing.int())
    triton_direct.write_to(table, nothing, nothing.int())
    assert (table.rows_of_slots == -1).all()
