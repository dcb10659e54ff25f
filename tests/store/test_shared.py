"""The shared memory store: the contract, and what is its own: other processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tests.store_contract import (
    SEED,
    StoreContract,
    StoreFactory,
    fetch,
    initial,
    make_group,
    records_of,
    rows_of,
    touched_rows,
)

from bagpipe.errors import StoreError
from bagpipe.store import SharedMemoryStore
from bagpipe.store.shared import SharedFiles


class TestSharedMemoryStore(StoreContract):
    @pytest.fixture
    def make(self) -> StoreFactory:
        return SharedMemoryStore


class TestOneOfSeveralHosts(StoreContract):
    """The contract's rows stand for those of one host: neighbours, of which it has all."""

    @pytest.fixture
    def make(self, monkeypatch: pytest.MonkeyPatch) -> StoreFactory:
        monkeypatch.setattr(
            "bagpipe.store.array.lines_of_shard",
            lambda num_rows, host, num_hosts: reversed_lines(num_rows),
        )
        return lambda group, seed: SharedMemoryStore(group, seed, host=1, num_hosts=2)


def reversed_lines(num_rows: int) -> tuple[np.ndarray, int]:
    num_lines = -(-num_rows // 16)
    return np.arange(num_lines, dtype=np.int32)[::-1].copy(), num_lines


_OTHER = """
import sys
import numpy as np
from tests.store_contract import SEED, make_group, records_of, touched_rows
from bagpipe.store import SharedMemoryStore
from bagpipe.store.shared import SharedFiles

store = SharedMemoryStore(make_group(), SEED, SharedFiles(records=sys.argv[1], touched=sys.argv[2]))
rows = np.array([3, 900])
out = np.empty((2, store.group.record_width), np.float32)
store.fetch(rows, out)
assert (out[0] == records_of(rows)[0]).all()
store.write(np.array([900, 1200]), records_of(np.array([900, 1200])))
print(len(touched_rows(store)))
"""


def test_another_process_reads_and_writes_the_same_rows() -> None:
    group = make_group()
    store = SharedMemoryStore(group, SEED)
    store.write(rows_of(3, 4), records_of(rows_of(3, 4)))
    arguments = [sys.executable, "-c", _OTHER, store.files.records, store.files.touched]
    assert (
        subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip() == "4"
    )
    assert len(touched_rows(store)) == 4
    np.testing.assert_array_equal(fetch(store, rows_of(900, 1200)), records_of(rows_of(900, 1200)))
    np.testing.assert_array_equal(fetch(store, rows_of(5)), initial(group, rows_of(5)))


def test_clearing_is_seen_by_all() -> None:
    group = make_group()
    store = SharedMemoryStore(group, SEED)
    other = SharedMemoryStore(group, SEED, store.files)
    store.write(rows_of(3), records_of(rows_of(3)))
    store.clear()
    np.testing.assert_array_equal(fetch(other, rows_of(3)), initial(group, rows_of(3)))
    assert touched_rows(other) == []


def test_files_that_are_gone_are_a_store_error() -> None:
    files = SharedFiles(records="/proc/self/fd/9999", touched="/proc/self/fd/9999")
    with pytest.raises(StoreError, match=r"can't share [\d,]+ bytes of memory for group 2"):
        SharedMemoryStore(make_group(), SEED, files)
