"""The iterator around the loader: any iterable, order, back-pressure, failures, ending early."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from tests.soon import wait_until
from tests.store_contract import touched_rows
from torch.utils.data import DataLoader

import bagpipe
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.capacity import slots_for
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import (
    BackgroundError,
    CacheTooSmallError,
    ConfigError,
    DataError,
    StoreError,
    UsageError,
)
from bagpipe.native.workers import Call
from bagpipe.optimizers import SGD
from bagpipe.oracle.sizes import parse_bytes
from bagpipe.store import MemoryStore
from bagpipe.types import Float32Array, Int64Array, Jagged, TableConfig, group_tables

TABLES = [TableConfig(name="t", num_embeddings=1000, embedding_dim=4, feature_names=["f"])]


@dataclass
class Batch:
    """A user's batch type."""

    sparse: Jagged
    number: int


def batches(count: int, size: int = 16) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    for number in range(count):
        yield Batch(
            sparse=Jagged(keys=("f",), values=rng.integers(0, 1000, size), batch_size=size),
            number=number,
        )


def make_embeddings(store: type[MemoryStore] = MemoryStore) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.1), store=store)


def train(embeddings: EmbeddingBagCollection, stream: Lookahead[Batch]) -> list[int]:
    numbers = []
    for batch in stream:
        embeddings(batch.sparse).values().sum().backward()
        numbers.append(batch.number)
    return numbers


def bagpipe_threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(("bagpipe-o", "bagpipe-t", "bagpipe-w"))
    ]


def test_batches_come_through_unchanged_and_in_order_and_threads_end() -> None:
    embeddings = make_embeddings()
    stream = bagpipe.lookahead(batches(30), embeddings, cache=64, lookahead=5)
    assert train(embeddings, stream) == list(range(30))
    assert stream.report.num_steps == 30
    assert stream.report.max_lookahead == 5
    assert embeddings.step == 30
    assert bagpipe_threads() == []


def test_a_data_loader_dicts_and_a_sparse_function_work() -> None:
    embeddings = make_embeddings()
    loader = DataLoader(
        list(range(64)), batch_size=8, collate_fn=lambda ids: {"ids": torch.tensor(ids)}
    )  # type: ignore[arg-type]

    def find(batch: dict[str, torch.Tensor]) -> Jagged:
        return Jagged(keys=("f",), values=batch["ids"].numpy(), batch_size=len(batch["ids"]))

    for batch in bagpipe.lookahead(loader, embeddings, sparse=find):
        embeddings(find(batch)).values().sum().backward()
    assert len(touched_rows(embeddings.stores[0])) == 64
    for wrapped in bagpipe.lookahead(
        [{"sparse": batch.sparse} for batch in batches(2)], embeddings
    ):
        embeddings(wrapped["sparse"])
    with pytest.raises(
        DataError,
        match=r"type dict has no attribute or key sparse or sparse_features.*sparse=lambda",
    ):
        next(iter(bagpipe.lookahead(loader, embeddings)))


def test_the_reader_is_not_read_further_ahead_than_the_window() -> None:
    read = []

    def counted() -> Iterator[Batch]:
        for batch in batches(1000):
            read.append(batch.number)
            yield batch

    embeddings = make_embeddings()
    stream = bagpipe.lookahead(
        counted(), embeddings, cache=200, lookahead=10, prefetch_depth=1, dedup_threads=1
    )
    next(stream)
    wait_until(lambda: len(read) >= 11)
    threading.Event().wait(0.2)
    # one handed out, one prefetched, two plans ready and one waiting, ten in the window, two being
    # de-duplicated, one in hand
    assert 11 <= len(read) <= 20
    stream.close()
    assert bagpipe_threads() == []


def test_a_break_leaves_trained_rows_readable_and_a_new_stream_possible() -> None:
    embeddings = make_embeddings()
    for batch in bagpipe.lookahead(batches(30), embeddings, cache=64):
        embeddings(batch.sparse).values().sum().backward()
        if batch.number == 3:
            break
    assert embeddings.step == 4
    embeddings.flush()
    assert len(touched_rows(embeddings.stores[0])) > 16
    assert train(embeddings, bagpipe.lookahead(batches(5), embeddings, cache=64)) == list(range(5))
    assert embeddings.step == 9


def test_a_new_stream_replaces_one_that_is_in_a_step() -> None:
    embeddings = make_embeddings()
    first = bagpipe.lookahead(batches(500), embeddings, cache=200)
    for batch in first:
        embeddings(batch.sparse).values().sum().backward()
        if batch.number == 5:
            break
    second = bagpipe.lookahead(batches(3), embeddings, cache=200)
    assert embeddings.step == 6
    with pytest.raises(UsageError, match=r"given to another bagpipe\.lookahead"):
        next(first)
    assert train(embeddings, second) == [0, 1, 2]
    assert embeddings.step == 9
    assert bagpipe_threads() == []


def test_a_failing_reader_is_raised_in_its_place_with_its_cause() -> None:
    def failing() -> Iterator[Batch]:
        yield from batches(7)
        raise OSError("the disk is gone")

    embeddings = make_embeddings()
    stream = bagpipe.lookahead(failing(), embeddings, cache=64, lookahead=2, dedup_threads=1)
    with pytest.raises(
        BackgroundError, match=r"the reader thread failed: OSError\('the disk is gone'\)"
    ) as caught:
        train(embeddings, stream)
    assert isinstance(caught.value.__cause__, OSError)
    assert embeddings.step == 7
    assert bagpipe_threads() == []


def test_a_bad_id_and_a_cache_too_small_are_raised_as_they_are() -> None:
    embeddings = make_embeddings()
    bad = [
        *batches(2),
        Batch(sparse=Jagged(keys=("f",), values=np.array([1000]), batch_size=1), number=2),
    ]
    with pytest.raises(DataError, match="step 2: feature 'f': id 1000") as caught:
        train(embeddings, bagpipe.lookahead(bad, embeddings))
    assert embeddings.step == 2
    told = "".join(traceback.format_exception(caught.value))  # as a script that fails prints it
    assert told.count("Traceback") == 1
    assert len(told.splitlines()) < 10
    assert len(touched_rows(embeddings.stores[0])) > 16  # what was trained before is kept
    with pytest.raises(CacheTooSmallError, match="its cache has 3 slots"):
        train(embeddings, bagpipe.lookahead(batches(3), embeddings, cache=3))


class SlowToWrite(MemoryStore):
    """Whose write-backs come long after the plans that name their rows have been given back."""

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        time.sleep(0.02)
        super().write(rows, records)


def test_what_is_written_late_goes_to_the_rows_that_were_evicted() -> None:
    """The oracle process writes later plans over those that have been given back."""
    tables = [TableConfig(name="t", num_embeddings=4000, embedding_dim=4, feature_names=["f"])]
    # no row comes again soon, so that nobody waits for its write-back
    steps = [
        Jagged(keys=("f",), values=(np.arange(16) + 16 * step) % 4000, batch_size=16)
        for step in range(60)
    ]

    def records(store: type[MemoryStore], oracle: Literal["thread", "process"]) -> Float32Array:
        embeddings = EmbeddingBagCollection(tables, optimizer=SGD(lr=0.1), store=store)
        with bagpipe.lookahead(steps, embeddings, cache=64, lookahead=3, oracle=oracle) as stream:
            for batch in stream:
                embeddings(batch).values().sum().backward()
        found = np.empty((4000, 4), np.float32)
        embeddings.stores[0].fetch(np.arange(4000), found)
        return found

    np.testing.assert_array_equal(records(SlowToWrite, "process"), records(MemoryStore, "thread"))


@pytest.mark.parametrize("method", ["fetch", "write"])
def test_a_failing_store_is_raised_at_the_next_step(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = make_embeddings()
    original = getattr(MemoryStore, method)
    calls = []

    def failing(store: MemoryStore, rows: Int64Array, records: Float32Array) -> None:
        calls.append(len(rows))
        if len(calls) > 5:
            raise StoreError("no space left on the medium")
        original(store, rows, records)

    monkeypatch.setattr(MemoryStore, method, failing)
    with pytest.raises(
        BackgroundError, match=r"moving embedding rows for step \d+ failed: no space left"
    ) as caught:
        train(embeddings, bagpipe.lookahead(batches(500), embeddings, cache=40, lookahead=4))
    assert isinstance(caught.value.__cause__, StoreError)
    assert embeddings.step < 100
    with pytest.raises(
        UsageError, match=r"embedding rows were lost after step \d+ .*restore a checkpoint"
    ):
        embeddings.tables()
    assert bagpipe_threads() == []


def test_an_error_in_the_loop_ends_the_stream_and_is_not_hidden() -> None:
    embeddings = make_embeddings()

    def loop() -> None:
        with bagpipe.lookahead(batches(30), embeddings, cache=64) as stream:
            for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert bagpipe_threads() == []
    assert embeddings.step == 1
    assert len(touched_rows(embeddings.stores[0])) > 0


def test_waits_are_counted_where_they_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    original, trainer = MemoryStore.fetch, threading.get_ident()

    def is_waited_for() -> bool:
        return sys._current_frames()[trainer].f_code is Call.result.__code__

    def slow(store: MemoryStore, rows: Int64Array, out: Float32Array) -> None:
        wait_until(is_waited_for)
        threading.Event().wait(0.02)
        original(store, rows, out)

    monkeypatch.setattr(MemoryStore, "fetch", slow)
    embeddings = make_embeddings()
    stream = bagpipe.lookahead(batches(6), embeddings, cache=1000, prefetch_depth=1)
    train(embeddings, stream)
    assert stream.waits.rows_s > 0.02
    assert stream.waits.slots_s == 0.0  # nothing is urgent where all rows have room


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512MiB", 512 << 20), ("4GB", 4 * 10**9), ("1.5KiB", 1536), ("7", 7), (99, 99)],
)
def test_sizes_are_parsed(size: int | str, expected: int) -> None:
    assert parse_bytes(size, "cache") == expected


@pytest.mark.parametrize("size", ["4 gigs", "-1GB", "GB", "4GBs"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"cache is .*must be a size such as '512MiB'"):
        parse_bytes(size, "cache")


def test_slots_are_shared_by_rows_and_never_exceed_a_table() -> None:
    tables = [
        TableConfig(name="a", num_embeddings=900, embedding_dim=4, feature_names=["a"]),
        TableConfig(name="b", num_embeddings=100, embedding_dim=2, feature_names=["b"]),
    ]
    groups, cpu = group_tables(tables, SGD(lr=0.1)), torch.device("cpu")
    assert slots_for(100, groups, cpu) == [86, 13]  # five each, and 90 by rows
    assert slots_for(np.int64(100), groups, cpu) == slots_for("10%", groups, cpu) == [86, 13]
    assert slots_for([7, 500], groups, cpu) == [7, 100]
    assert slots_for(f"{(900 * 16 + 100 * 8) // 10}B", groups, cpu) == [86, 13]
    assert slots_for("auto", groups, cpu) == [900, 100]
    assert slots_for(2, groups, cpu) == [1, 1]
    with pytest.raises(
        ConfigError, match="cache is '1', less than a row for each of 2 groups with 1,000 rows"
    ):
        slots_for(1, groups, cpu)
    with pytest.raises(ConfigError, match="cache is True, must be rows"):
        slots_for(True, groups, cpu)
    with pytest.raises(ConfigError, match="cache has 3 entries for 2 groups"):
        slots_for([1, 2, 3], groups, cpu)


@dataclass
class Picklable:
    """An iterable that can be sent to another process."""

    count: int

    def __iter__(self) -> Iterator[Batch]:
        return batches(self.count)


def without_ids(batch: Batch) -> Batch:
    """What a loop needs once the batch is planned."""
    return Batch(
        sparse=Jagged(keys=(), values=np.empty(0, np.int64), batch_size=batch.sparse.batch_size),
        number=batch.number,
    )


@pytest.mark.parametrize("where", ["thread", "process", "device"])
@pytest.mark.parametrize("hand_out", [None, without_ids])
def test_where_the_oracle_is_and_what_it_hands_out_change_no_table(
    where: Literal["thread", "process", "device"], hand_out: Callable[[Batch], Batch] | None
) -> None:
    expected, embeddings = make_embeddings(), make_embeddings()
    assert train(
        expected, bagpipe.lookahead(Picklable(40), expected, cache=70, lookahead=5)
    ) == list(range(40))
    stream = bagpipe.lookahead(
        Picklable(40),
        embeddings,
        cache=70,
        lookahead=5,
        prefetch_depth=1,
        oracle=where,
        hand_out=hand_out,
    )
    assert train(embeddings, stream) == list(range(40))
    assert (stream.report.num_steps, stream.report.peak_slots) == (40, 70)
    torch.testing.assert_close(
        embeddings.tables()["t"][:], expected.tables()["t"][:], rtol=0, atol=0
    )
    embeddings.close()
    expected.close()


def test_ids_that_are_not_handed_out_are_missed_where_they_are_looked_up() -> None:
    embeddings = make_embeddings()
    for batch in bagpipe.lookahead(batches(2), embeddings, cache=70, hand_out=without_ids):
        assert batch.sparse.keys == ()
        with pytest.raises(UsageError, match="other ids than"):
            embeddings(next(batches(1)).sparse)
    with pytest.raises(DataError, match="the batch has no feature 'f', which"):
        embeddings.eval()(batch.sparse)
    with (
        bagpipe.lookahead(
            batches(2), embeddings.train(), cache=70, hand_out=lambda batch: batch.number
        ) as stream,
        pytest.raises(
            DataError, match="step 2: a batch of type int has no attribute or key sparse"
        ),
    ):
        next(stream)
    embeddings.close()


def test_a_stream_in_a_process_may_be_left_and_embeddings_go_on() -> None:
    embeddings = make_embeddings()
    for batch in bagpipe.lookahead(Picklable(40), embeddings, cache=70, oracle="process"):
        embeddings(batch.sparse).values().sum().backward()
        if batch.number == 5:
            break
    assert train(embeddings, bagpipe.lookahead(batches(3), embeddings, cache=200)) == [0, 1, 2]
    assert embeddings.step == 9
    with pytest.raises(ConfigError, match="oracle is 'elsewhere'"):
        bagpipe.lookahead(batches(3), embeddings, oracle="elsewhere")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="can't be sent to another process"):
        bagpipe.lookahead(batches(3), embeddings, cache=100, oracle="process")
    embeddings.close()
