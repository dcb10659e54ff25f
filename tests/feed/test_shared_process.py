"""One oracle process for several trainers, all in this process here: the same plans, back-pressure,
and every way to end.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.oracle.ends import end_as
from tests.soon import SOON_S, TIMEOUT_S, wait_until

from bagpipe.errors import BackgroundError, LostError
from bagpipe.feed import process
from bagpipe.feed.process import OracleProcess, SharedOracle
from bagpipe.feed.stream import BatchAdapter, Deferred, Planned, StreamOptions, plan_stream
from bagpipe.jagged import share_of
from bagpipe.optimizers import SGD
from bagpipe.topology import Topology
from bagpipe.types import Jagged, TableConfig, group_tables

GROUPS = group_tables(
    [
        TableConfig(name="wide", num_embeddings=3000, embedding_dim=4, feature_names=["a"]),
        TableConfig(name="narrow", num_embeddings=50, embedding_dim=2, feature_names=["b"]),
    ],
    SGD(lr=1.0),
)
NUM_PLACES = 4
Plan = Planned[dict[str, Any]]


@dataclasses.dataclass
class Batches:
    """Multi-hot batches that grow. Counts in `reads`, a file, how many were read; may fail, die or
    hang behind the last, and then makes the file `at_end`.
    """

    num_batches: int
    end: str = ""
    reads: Path | None = None
    at_end: Path | None = None

    def __iter__(self) -> Iterator[Deferred[dict[str, Any]]]:
        for number in range(self.num_batches):
            yield Deferred(lambda number=number: self.read(number))
        if self.at_end is not None:
            self.at_end.touch()
        end_as(self.end)

    def read(self, number: int) -> dict[str, Any]:
        if self.reads is not None:
            with self.reads.open("a") as file:
                file.write(".")
        rng, size = np.random.default_rng(number), 30 + 10 * number
        lengths = rng.integers(0, 3, (2, size))
        ids = [
            (rows * rng.random(int(lengths[index].sum())) ** 4).astype(np.int64)
            for index, rows in enumerate((3000, 50))
        ]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return {
            "number": number,
            "sparse": Jagged(
                keys=("a", "b"), values=np.concatenate(ids), batch_size=size, offsets=offsets
            ),
        }


def share(batch: dict[str, Any], rank: int, num_trainers: int) -> dict[str, Any]:
    return {"number": batch["number"], "sparse": share_of(batch["sparse"], rank, num_trainers)}


def options(num_trainers: int, rank: int = 0) -> StreamOptions:
    topology = Topology(num_trainers=num_trainers, ranks=(rank,), num_replica_slots=(2000, 50))
    return StreamOptions(
        groups=GROUPS,
        num_slots=(900, 50),
        lookahead=5,
        first_step=3,
        dedup_threads=2,
        topology=topology,
    )


@contextmanager
def shared(
    num_trainers: int, batches: Batches, **settings: Any
) -> Iterator[list[SharedOracle[dict[str, Any]]]]:
    """All ranks' ends, which are closed after the test; the process must be gone then."""
    first = OracleProcess(
        batches, options(num_trainers), BatchAdapter(share=share), num_places=NUM_PLACES, **settings
    )
    ends: list[SharedOracle[dict[str, Any]]] = [first]
    try:
        ends += [SharedOracle.join(first.address, rank) for rank in range(1, num_trainers)]
        yield ends
    finally:
        for end in ends:
            end.close()
        assert first._process is not None
        assert not first._process.is_alive()


def use(item: Plan) -> None:
    assert item.release is not None
    item.release()


def drain(end: SharedOracle[dict[str, Any]]) -> int:
    num_items = 0
    for item in end.items():
        use(item)
        num_items += 1
    return num_items


def outcomes(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call returns or raises; all at a time, and soon."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        errors = [future.exception(timeout=SOON_S) for future in futures]
        return [
            future.result() if error is None else error
            for future, error in zip(futures, errors, strict=True)
        ]


def assert_same(one: Any, other: Any, where: str = "plan") -> None:
    """Field by field."""
    assert type(one) is type(other), where
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name not in ("release", "ids_hash", "joint_hash"):
                assert_same(
                    getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}"
                )
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(one, other, err_msg=where)
    elif isinstance(one, tuple):
        assert len(one) == len(other), where
        for index, parts in enumerate(zip(one, other, strict=True)):
            assert_same(*parts, f"{where}[{index}]")
    elif isinstance(one, dict):
        assert_same(tuple(sorted(one.items())), tuple(sorted(other.items())), where)
    else:
        assert one == other, where


@pytest.mark.parametrize("num_trainers", [2, 3])
def test_each_rank_gets_what_it_would_plan_for_itself(num_trainers: int) -> None:
    batches = Batches(25)

    def compare(rank: int, end: SharedOracle[dict[str, Any]]) -> int:
        own = plan_stream(batches, options(num_trainers, rank), BatchAdapter(share=share))
        num_items = 0
        for (mine,), theirs in zip(own, end.items(), strict=True):
            assert_same(theirs, mine)
            # a hash tells ranks that plan apart whether they plan alike
            assert mine.ids_hash is not None
            assert mine.plan.joint_hash is not None
            assert theirs.ids_hash is theirs.plan.joint_hash is None
            assert_same(theirs.batch, share(batches.read(num_items), rank, num_trainers), "batch")
            assert theirs.sparse is theirs.batch["sparse"]
            use(theirs)
            num_items += 1
        return num_items

    with shared(num_trainers, batches) as ends:
        assert [end.spans is not None for end in ends] == [True] + [False] * (num_trainers - 1)
        assert (
            outcomes(
                [lambda rank=rank, end=end: compare(rank, end) for rank, end in enumerate(ends)]
            )
            == [25] * num_trainers
        )


def test_plans_stay_until_they_are_released_and_the_slowest_rank_holds_all_back(
    tmp_path: Path,
) -> None:
    reads = tmp_path / "reads"
    with ThreadPoolExecutor(1) as pool, shared(2, Batches(60, reads=reads)) as (fast, slow):
        behind = slow.items()
        held = [next(behind) for _ in range(NUM_PLACES)]
        kept = [np.array(item.plan.groups[0].lookup_slots) for item in held]
        numbers: list[int] = []

        def run_ahead() -> None:
            for item in fast.items():
                numbers.append(item.batch["number"])
                use(item)

        done = pool.submit(run_ahead)
        wait_until(lambda: len(numbers) >= NUM_PLACES)
        time.sleep(1.0)
        assert numbers == list(range(NUM_PLACES))  # no more than the slow one has had
        # Then a step that waits for places, the planner's 2 and 1, the 4 steps whose ranks are
        # planned at a time but the one that waits, the window of 5, the linker's 2 and 1, the
        # pool's 4 and 1.
        assert reads.stat().st_size <= NUM_PLACES + 1 + 3 + 3 + 5 + 3 + 5
        for item, slots in zip(held, kept, strict=True):
            np.testing.assert_array_equal(item.plan.groups[0].lookup_slots, slots)
        use(held[0])
        held.append(next(behind))
        wait_until(lambda: len(numbers) > NUM_PLACES)
        time.sleep(0.3)
        assert numbers == list(range(NUM_PLACES + 1))
        for item in held[1:]:
            use(item)
        for item in behind:
            use(item)
        done.result(timeout=SOON_S)
        assert numbers == list(range(60))


def test_what_the_reader_raises_comes_to_every_rank_in_its_place() -> None:
    num_items = [0, 0, 0]

    def count(rank: int, end: SharedOracle[dict[str, Any]]) -> None:
        for item in end.items():
            num_items[rank] += 1
            use(item)

    with shared(3, Batches(9, "fail")) as ends:
        errors = outcomes(
            [lambda rank=rank, end=end: count(rank, end) for rank, end in enumerate(ends)]
        )
    assert num_items == [9, 9, 9]
    for error in errors:
        assert isinstance(error, BackgroundError)
        assert not isinstance(error, LostError)  # all know the same steps
        assert "the disk is gone" in str(error)


def test_the_death_of_the_process_is_an_error_everywhere() -> None:
    with shared(2, Batches(9, "die")) as ends:
        errors = outcomes([lambda end=end: drain(end) for end in ends])
    assert all(isinstance(error, LostError) for error in errors)
    assert "ended by itself (exit code -9" in str(errors[0])
    assert "the oracle process, which the host's first rank started, ended by itself" in str(
        errors[1]
    )


def hang_up(end: SharedOracle[dict[str, Any]]) -> None:
    """As the death of a trainer does."""
    with socket.socket(fileno=os.dup(end._connection.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_dies_ends_the_others_behind_what_was_sent(gone: int) -> None:
    with shared(3, Batches(1000)) as ends:
        streams = [end.items() for end in ends]
        for stream in streams:
            use(next(stream))
        hang_up(ends[gone])
        errors = outcomes(
            [lambda end=end: drain(end) for rank, end in enumerate(ends) if rank != gone]
        )
    for error in errors:
        assert isinstance(error, LostError)
        assert (
            f"rank {gone}'s connection to the oracle process closed: that trainer has ended"
            in str(error)
        )


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_ends_its_stream_ends_the_others_behind_what_it_was_sent(gone: int) -> None:
    with shared(2, Batches(1000)) as ends:
        left, going_on = ends[gone].items(), ends[1 - gone].items()
        for _ in range(NUM_PLACES):
            use(next(left))
        ends[gone].stop()
        for _ in range(NUM_PLACES):
            use(next(going_on))
        with pytest.raises(LostError, match=f"rank {gone} has ended its stream of batches"):
            next(going_on)
        assert list(left) == []


def test_ranks_may_come_to_the_end_at_different_times() -> None:
    with shared(2, Batches(NUM_PLACES)) as (first, second):
        assert drain(first) == NUM_PLACES
        first.stop()
        time.sleep(0.3)
        assert drain(second) == NUM_PLACES


def hanging(tmp_path: Path, num_batches: int = 12) -> tuple[Batches, Callable[[], None]]:
    """Batches behind which the reader hangs, and what waits until it does."""
    hangs = tmp_path / "hangs"

    def wait() -> None:
        wait_until(hangs.exists)

    return Batches(num_batches, "hang", at_end=hangs), wait


def test_a_reader_that_hangs_neither_hides_a_death_nor_outlives_it(tmp_path: Path) -> None:
    batches, wait_until_it_hangs = hanging(tmp_path)
    with shared(2, batches) as (first, second):
        assert first._process is not None
        items = first.items()
        use(next(items))
        wait_until_it_hangs()
        hang_up(second)
        with pytest.raises(LostError, match="rank 1's connection"):
            deque(map(use, items))
        first._process.join(SOON_S)
        assert first._process.exitcode == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank kills the process a second after it has told it to end."""
    monkeypatch.setattr(process, "_STOP_TIMEOUT_S", 1.0)


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_rank_that_ends_its_stream_while_the_reader_hangs_ends_the_others(
    leaving: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_STOP_TIMEOUT_S", TIMEOUT_S)  # none is told by a kill
    batches, wait_until_it_hangs = hanging(tmp_path)
    with shared(3, batches) as ends:
        assert ends[0]._process is not None
        streams = [end.items() for end in ends]
        with ThreadPoolExecutor(4) as pool:
            # all that is planned, then they wait for more: the window holds 5
            drained = [
                pool.submit(lambda stream: deque(map(use, stream)), each) for each in streams
            ]
            wait_until_it_hangs()
            time.sleep(0.5)
            assert not any(each.done() for each in drained)
            stopped = pool.submit(ends[leaving].stop)
            errors = [each.exception(timeout=SOON_S) for each in drained]
            ends[0]._process.kill()  # whose reader hangs
            stopped.result(timeout=SOON_S)
    assert errors[leaving] is None
    for rank, error in enumerate(errors):
        if rank != leaving:
            assert isinstance(error, LostError)
            assert f"rank {leaving} " in str(error)


@pytest.mark.usefixtures("impatient")
def test_a_process_that_answers_nothing_holds_up_no_rank_that_ends_its_stream() -> None:
    with shared(2, Batches(1000)) as (first, second), ThreadPoolExecutor(1) as pool:
        assert first._process is not None
        stream = second.items()
        use(next(stream))
        os.kill(first._process.pid or 0, signal.SIGSTOP)
        rest = pool.submit(lambda: len(list(stream)))
        time.sleep(0.2)
        second.stop()
        assert rest.result(timeout=SOON_S) <= NUM_PLACES
