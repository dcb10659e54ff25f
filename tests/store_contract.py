"""The contract of `bagpipe.store.base.EmbeddingStore`.

A store's tests subclass `StoreContract` and make one.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.soon import SOON_S

from bagpipe.errors import StoreError
from bagpipe.optimizers import Adagrad, RowWiseAdagrad
from bagpipe.store import EmbeddingStore, MemoryStore, RowInitializer
from bagpipe.types import Float32Array, Group, Int64Array, Normal, TableConfig, Uniform

StoreFactory: TypeAlias = Callable[[Group, int], EmbeddingStore]

NUM_ROWS = 1_300
WIDTH = 7
SEED = 5

# Each example makes stores of its own, so it shares nothing through the fixture `make` nor with the
# other subclasses' runs.
SHARED_BY_SUBCLASSES = [
    *(HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow)
]


def make_group(num_rows: int = NUM_ROWS, dim: int = WIDTH - 1) -> Group:
    """Two tables of different distributions; a record is the weights and one float of state."""
    first = num_rows // 3
    return Group(
        index=2,
        tables=(
            TableConfig(
                name="a",
                num_embeddings=first,
                embedding_dim=dim,
                feature_names=["a"],
                init=Uniform(low=1.0, high=2.0),
            ),
            TableConfig(
                name="b",
                num_embeddings=num_rows - first,
                embedding_dim=dim,
                feature_names=["b"],
                init=Normal(mean=-9.0),
            ),
        ),
        optimizer=RowWiseAdagrad(lr=0.1, initial_accumulator_value=0.25),
    )


def rows_of(*rows: int) -> Int64Array:
    return np.array(rows, np.int64)


def records_of(rows: Int64Array, salt: float = 0.0, width: int = WIDTH) -> Float32Array:
    """Records that name their row, so that any mix-up shows."""
    return (rows[:, None] + np.arange(width) / 16 + salt).astype(np.float32)


def fetch(store: EmbeddingStore, rows: Int64Array) -> Float32Array:
    out = np.full((len(rows), store.group.record_width), np.nan, np.float32)
    store.fetch(rows, out)
    return out


def initial(group: Group, rows: Int64Array, seed: int = SEED) -> Float32Array:
    out = np.full((len(rows), group.record_width), np.nan, np.float32)
    RowInitializer(group, seed).fill(rows, out)
    return out


def touched_rows(store: EmbeddingStore, block_rows: int = 65_536) -> list[int]:
    return [row for rows, _ in store.snapshot(block_rows) for row in rows.tolist()]


def resident_pages() -> int:
    """How many pages of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1])


class StoreContract:
    """Every test runs on a fresh store from the fixture `make`, which the subclass provides."""

    @pytest.fixture
    def make(self) -> StoreFactory:
        raise NotImplementedError

    @pytest.fixture
    def store(self, make: StoreFactory) -> EmbeddingStore:
        return make(make_group(), SEED)

    def test_untouched_rows_read_as_initial_records_and_stay_untouched(
        self, store: EmbeddingStore
    ) -> None:
        rows = np.arange(NUM_ROWS)[::-1].copy()
        np.testing.assert_array_equal(fetch(store, rows), initial(store.group, rows))
        assert touched_rows(store) == []

    def test_fetch_sees_what_was_written_and_initial_records_between(
        self, store: EmbeddingStore
    ) -> None:
        written = rows_of(0, 1_299, 433, 432)
        store.write(written, records_of(written))
        rows = rows_of(432, 5, 1_299, 0, 600)
        expected = records_of(rows)
        expected[[1, 4]] = initial(store.group, rows[[1, 4]])
        np.testing.assert_array_equal(fetch(store, rows), expected)

    def test_a_row_may_be_fetched_twice_at_once(self, store: EmbeddingStore) -> None:
        store.write(rows_of(7), records_of(rows_of(7)))
        np.testing.assert_array_equal(fetch(store, rows_of(7, 7)), records_of(rows_of(7, 7)))

    def test_several_asked_at_once_come_when_waited_for(self, store: EmbeddingStore) -> None:
        written = rows_of(7, 8, 1_299)
        store.write(written, records_of(written))
        asked = [rows_of(7, 3), rows_of(), rows_of(1_299, 8)]
        outs = [np.full((len(rows), WIDTH), np.nan, np.float32) for rows in asked]
        waits = [store.ask(rows, out) for rows, out in zip(asked, outs, strict=True)]
        for wait in reversed(waits):
            wait()
        np.testing.assert_array_equal(outs[0][0], records_of(rows_of(7))[0])
        np.testing.assert_array_equal(outs[0][1:], initial(store.group, rows_of(3)))
        np.testing.assert_array_equal(outs[2], records_of(rows_of(1_299, 8)))

    def test_what_is_asked_wrongly_is_refused_at_the_latest_when_waited_for(
        self, store: EmbeddingStore
    ) -> None:
        with pytest.raises(StoreError, match="row 1,300 lies outside group 2"):
            store.ask(rows_of(1_300), np.zeros((1, WIDTH), np.float32))()

    def test_the_last_write_counts_and_a_row_is_touched_once(self, store: EmbeddingStore) -> None:
        rows = rows_of(3, 8)
        store.write(rows, records_of(rows))
        store.write(rows_of(8, 4), records_of(rows_of(8, 4), salt=0.5))
        np.testing.assert_array_equal(
            fetch(store, rows_of(3, 8)),
            [*records_of(rows_of(3)), *records_of(rows_of(8), salt=0.5)],
        )
        assert len(touched_rows(store)) == 3

    def test_zeros_and_special_values_are_kept_to_the_bit(self, store: EmbeddingStore) -> None:
        rows = rows_of(1, 2)
        bits = np.array(
            [[0x80000000, 0x7FC12345, 0x00000001, 0x7F800000, 0, 1, 2], [0] * WIDTH], np.uint32
        )
        store.write(rows, bits.view(np.float32))
        np.testing.assert_array_equal(fetch(store, rows).view(np.uint32), bits)

    def test_no_rows_is_allowed(self, store: EmbeddingStore) -> None:
        store.write(rows_of(), np.empty((0, WIDTH), np.float32))
        assert fetch(store, rows_of()).shape == (0, WIDTH)
        assert touched_rows(store) == []

    def test_the_callers_arrays_are_not_kept(self, store: EmbeddingStore) -> None:
        rows = rows_of(10, 11)
        records = records_of(rows)
        store.write(rows, records)
        records[:] = -1
        fetch(store, rows)[:] = -1
        np.testing.assert_array_equal(fetch(store, rows), records_of(rows))

    @settings(max_examples=25, deadline=None, suppress_health_check=SHARED_BY_SUBCLASSES)
    @given(
        writes=st.lists(
            st.lists(st.integers(0, NUM_ROWS - 1), unique=True, max_size=40), max_size=6
        ),
        block_rows=st.integers(1, 50),
    )
    def test_equals_a_dict_and_the_memory_store(
        self, make: StoreFactory, writes: list[list[int]], block_rows: int
    ) -> None:
        store, peer = make(make_group(), SEED), MemoryStore(make_group(), SEED)
        model: dict[int, Float32Array] = {}
        for salt, written in enumerate(writes):
            rows = np.array(written, np.int64)
            for each in (store, peer):
                each.write(rows, records_of(rows, salt))
            model.update(zip(written, records_of(rows, salt), strict=True))
        everything = np.arange(NUM_ROWS)
        np.testing.assert_array_equal(fetch(store, everything), fetch(peer, everything))
        blocks = list(store.snapshot(block_rows))
        assert all(0 < len(rows) <= block_rows for rows, _ in blocks)
        assert [row for rows, _ in blocks for row in rows.tolist()] == sorted(model)
        for rows, records in blocks:
            assert (rows.dtype, records.dtype) == (np.int64, np.float32)
            np.testing.assert_array_equal(records, [model[row] for row in rows.tolist()])
        assert len(touched_rows(store)) == len(model)
        store.close()

    def test_a_snapshot_needs_at_least_one_row_a_block(self, store: EmbeddingStore) -> None:
        with pytest.raises(StoreError, match=r"block_rows .* group 2 .* is 0, must be at least 1"):
            store.snapshot(0)

    def test_clear_forgets_everything(self, store: EmbeddingStore) -> None:
        rows = rows_of(0, 500, 1_299)
        store.write(rows, records_of(rows))
        store.clear()
        assert touched_rows(store) == []
        np.testing.assert_array_equal(fetch(store, rows), initial(store.group, rows))
        store.write(rows_of(500), records_of(rows_of(500)))
        assert touched_rows(store) == [500]

    @pytest.mark.parametrize("bad", [-1, NUM_ROWS, 2**40, -(2**63), 2**63 - 1])
    def test_a_row_out_of_range_is_refused_before_anything_is_written(
        self, store: EmbeddingStore, bad: int
    ) -> None:
        rows = rows_of(5, bad, 6)
        message = rf"row {bad:,} lies outside group 2 \(dim 6\), whose rows are 0 to 1,299"
        with pytest.raises(StoreError, match=message):
            store.write(rows, np.ones((3, WIDTH), np.float32))
        out = np.full((3, WIDTH), 77, np.float32)
        with pytest.raises(StoreError, match=message):
            store.fetch(rows, out)
        assert (out == 77).all()
        assert touched_rows(store) == []
        np.testing.assert_array_equal(
            fetch(store, rows_of(5, 6)), initial(store.group, rows_of(5, 6))
        )

    @pytest.mark.parametrize(
        ("rows", "records", "facts"),
        [
            (
                np.zeros(2, np.int32),
                np.zeros((2, WIDTH), np.float32),
                "1-D int64 array, are int32 of shape",
            ),
            (
                np.zeros((2, 1), np.int64),
                np.zeros((2, WIDTH), np.float32),
                r"1-D int64 array, are int64 of shape \(2, 1\)",
            ),
            (np.int64(3), np.zeros((1, WIDTH), np.float32), "1-D int64 array, are a int64"),
            ([0, 1], np.zeros((2, WIDTH), np.float32), "1-D int64 array, are a list"),
            (
                np.zeros(2, np.int64),
                np.zeros((2, WIDTH), np.float64),
                r"of shape \(2, 7\), is float64 of shape \(2, 7\)",
            ),
            (
                np.zeros(2, np.int64),
                np.zeros((2, WIDTH - 1), np.float32),
                r"of shape \(2, 7\), is float32 of shape \(2, 6\)",
            ),
            (
                np.zeros(2, np.int64),
                np.zeros((3, WIDTH), np.float32),
                r"of shape \(2, 7\), is float32 of shape \(3, 7\)",
            ),
            (
                np.zeros(2, np.int64),
                np.zeros((WIDTH, 2), np.float32).T,
                r"of shape \(2, 7\), not C-contiguous",
            ),
            (np.zeros(2, np.int64), [[0.0] * WIDTH] * 2, "is a list"),
        ],
    )
    def test_arrays_that_do_not_fit_are_refused(
        self, store: EmbeddingStore, rows: Int64Array, records: Float32Array, facts: str
    ) -> None:
        for call in (store.fetch, store.write):
            with pytest.raises(StoreError, match=facts):
                call(rows, records)
        assert touched_rows(store) == []

    def test_a_fetch_into_a_read_only_array_is_refused(self, store: EmbeddingStore) -> None:
        out = np.zeros((1, WIDTH), np.float32)
        out.flags.writeable = False
        with pytest.raises(
            StoreError, match=r"out for a fetch of 1 rows of group 2 .* is read-only"
        ):
            store.fetch(rows_of(0), out)

    def test_read_only_rows_and_records_are_written(self, store: EmbeddingStore) -> None:
        rows = rows_of(9, 1_000)
        records = records_of(rows)
        rows.flags.writeable = records.flags.writeable = False
        store.write(rows, records)
        np.testing.assert_array_equal(fetch(store, rows), records)

    def test_disjoint_fetches_and_writes_run_at_once(self, store: EmbeddingStore) -> None:
        """The threads' rows interleave: neighbours share cache lines, pages and stretches."""
        num_threads, num_rounds = 4, 12

        def work(thread: int) -> None:
            rows = np.arange(thread, NUM_ROWS, num_threads)
            for salt in range(num_rounds):
                store.write(rows, records_of(rows, salt))
                np.testing.assert_array_equal(fetch(store, rows), records_of(rows, salt))

        with ThreadPoolExecutor(num_threads) as pool:
            for future in [pool.submit(work, thread) for thread in range(num_threads)]:
                future.result(timeout=SOON_S)
        assert len(touched_rows(store)) == NUM_ROWS
        np.testing.assert_array_equal(
            fetch(store, np.arange(NUM_ROWS)), records_of(np.arange(NUM_ROWS), num_rounds - 1)
        )

    def test_closing_twice_is_allowed_and_use_afterwards_is_an_error(
        self, store: EmbeddingStore
    ) -> None:
        rows = rows_of(1, 2)
        store.write(rows, records_of(rows))
        begun = store.snapshot(1)
        next(begun)
        store.close()
        store.close()
        uses: list[Callable[[], object]] = [
            lambda: fetch(store, rows),
            lambda: store.write(rows, records_of(rows)),
            lambda: store.snapshot(),
            lambda: next(begun),
            store.clear,
        ]
        for use in uses:
            with pytest.raises(StoreError, match=r"store of group 2 \(dim 6\) is closed"):
                use()

    def test_closing_under_running_calls_ends_them_well_or_with_a_store_error(
        self, store: EmbeddingStore
    ) -> None:
        """As when a run fails while its write-backs are under way."""
        started = threading.Barrier(3)

        def work(first: int) -> None:
            rows = np.arange(first, NUM_ROWS, 2)
            started.wait(timeout=SOON_S)
            while True:
                store.write(rows, records_of(rows))
                np.testing.assert_array_equal(fetch(store, rows), records_of(rows))

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work, first) for first in (0, 1)]
            started.wait(timeout=SOON_S)
            store.close()
            for future in futures:
                with pytest.raises(StoreError, match="closed"):
                    future.result(timeout=SOON_S)

    def test_a_huge_group_is_made_lazily(self, make: StoreFactory) -> None:
        """Its records take 24 GiB: materialised, they would exhaust memory or disk."""
        group = make_group(100_000_000, dim=64)
        before = resident_pages()
        store = make(group, SEED)
        assert (resident_pages() - before) * resource.getpagesize() < 1 << 30
        rows = rows_of(0, 33_333_333, 99_999_999)
        store.write(rows[1:], records_of(rows[1:], width=65))
        np.testing.assert_array_equal(
            fetch(store, rows), [*initial(group, rows[:1]), *records_of(rows[1:], width=65)]
        )
        assert len(touched_rows(store)) == 2
        store.close()

    def test_records_depend_on_the_seed_only(self, make: StoreFactory) -> None:
        group = make_group()
        group_adagrad = Group(
            index=0, tables=group.tables, optimizer=Adagrad(lr=0.1, initial_accumulator_value=3.0)
        )
        rows = np.arange(NUM_ROWS)
        np.testing.assert_array_equal(fetch(make(group, 8), rows), initial(group, rows, seed=8))
        assert not np.array_equal(fetch(make(group, 8), rows), initial(group, rows, seed=9))
        assert (fetch(make(group_adagrad, 8), rows)[:, WIDTH - 1 :] == 3.0).all()
