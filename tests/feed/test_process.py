"""The oracle in a process of its own: the same plans as in a thread, and no end of either side goes
unnoticed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tests.oracle.ends import end_as
from tests.soon import SOON_S, TIMEOUT_S, ends_soon

from bagpipe.errors import BackgroundError, CacheTooSmallError, ConfigError, LostError
from bagpipe.feed.process import OracleProcess
from bagpipe.feed.stream import Deferred, StreamOptions, plan_stream
from bagpipe.optimizers import SGD
from bagpipe.topology import Topology
from bagpipe.types import Jagged, TableConfig, group_tables

GROUPS = group_tables(
    [TableConfig(name="t", num_embeddings=3000, embedding_dim=4, feature_names=["f"])], SGD(lr=1.0)
)
NUM_PLACES = 4


class Batches:
    """Batches whose size grows, read where they are planned; may fail, die or hang after some of
    them.
    """

    def __init__(self, num_batches: int, end: str = "") -> None:
        self.num_batches, self.end = num_batches, end

    def __iter__(self) -> Iterator[Deferred[dict[str, object]]]:
        for number in range(self.num_batches):
            yield Deferred(lambda number=number: read(number))
        end_as(self.end)


def read(number: int) -> dict[str, object]:
    size = 50 + 20 * number
    values = (3000 * np.random.default_rng(number).random(size) ** 4).astype(np.int64)
    return {
        "number": number,
        "sparse": Jagged(keys=("f",), values=values, batch_size=size),
        "nothing": np.empty((0, 3), np.float32),
    }


def options(num_slots: int = 1500) -> StreamOptions:
    return StreamOptions(
        groups=GROUPS, num_slots=(num_slots,), lookahead=5, first_step=3, dedup_threads=2
    )


def start(batches: Batches, num_slots: int = 1500) -> OracleProcess[dict[str, object]]:
    return OracleProcess(batches, options(num_slots), num_places=NUM_PLACES)


@pytest.fixture
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is a new program, which imports all that it needs; see `tests/conftest.py`."""
    monkeypatch.setattr("bagpipe.feed.process._CONTEXT", multiprocessing.get_context("spawn"))


@pytest.mark.usefixtures("as_users_have_it")
def test_plans_and_batches_are_those_of_a_thread() -> None:
    batches = Batches(60)
    process = start(batches)
    num_items = 0
    for (one,), other in zip(plan_stream(batches, options()), process.items(), strict=True):
        mine, theirs = one.plan.groups[0], other.plan.groups[0]
        assert (one.plan.step, one.plan.issue_tick, one.peak_slots) == (
            other.plan.step,
            other.plan.issue_tick,
            other.peak_slots,
        )
        np.testing.assert_array_equal(mine.lookup_slots, theirs.lookup_slots)
        np.testing.assert_array_equal(mine.schedule.bags, theirs.schedule.bags)
        np.testing.assert_array_equal(mine.overlapped.fetch_rows, theirs.overlapped.fetch_rows)
        assert other.batch["number"] == num_items
        assert other.sparse is other.batch["sparse"]
        np.testing.assert_array_equal(other.sparse.values, one.sparse.values)
        assert other.batch["nothing"].shape == (0, 3)  # type: ignore[attr-defined]
        assert other.release is not None
        other.release()
        num_items += 1
    assert num_items == 60
    process.close()


def test_plans_stay_until_they_are_released_and_batches_for_ever() -> None:
    process = start(Batches(60))
    items = process.items()
    held = [next(items) for _ in range(NUM_PLACES)]
    kept = [np.array(item.plan.groups[0].lookup_slots) for item in held]
    time.sleep(0.3)  # the child is ahead as far as it may
    for item, slots in zip(held, kept, strict=True):
        np.testing.assert_array_equal(item.plan.groups[0].lookup_slots, slots)
    for item in held:
        assert item.release is not None
        item.release()
    for item in items:
        assert item.release is not None
        item.release()
    for number, item in enumerate(held):
        np.testing.assert_array_equal(item.sparse.values, read(number)["sparse"].values)  # type: ignore[attr-defined]
    process.close()


def drain(process: OracleProcess[dict[str, object]]) -> int:
    num_items = 0
    for item in process.items():
        assert item.release is not None
        item.release()
        num_items += 1
    return num_items


def test_what_the_reader_raises_comes_in_its_place_with_its_cause() -> None:
    process = start(Batches(9, "fail"))
    items = process.items()
    for _ in range(9):
        item = next(items)
        assert item.release is not None
        item.release()
    with pytest.raises(BackgroundError, match="the disk is gone") as caught:
        next(items)
    assert isinstance(caught.value.__cause__, OSError)
    assert "in __iter__" in "".join(caught.value.__cause__.__notes__)
    process.close()


def test_errors_of_ours_arrive_as_they_are() -> None:
    process = start(Batches(60), num_slots=200)
    with pytest.raises(CacheTooSmallError, match="200 slots") as caught:
        drain(process)
    assert caught.value.num_slots == 200
    process.close()


def test_spans_are_noted_from_the_beginning_to_the_end_of_a_trace_alone() -> None:
    process, num_items = start(Batches(150)), 0
    assert process.spans is not None
    items = process.items()

    def take(num: int) -> None:
        nonlocal num_items
        for item in islice(items, num):
            assert item.release is not None
            item.release()
            num_items += 1

    take(20)
    assert process.spans.end() == []
    began_ns = time.time_ns()
    process.spans.begin()
    take(50)
    noted = process.spans.end()
    ended_ns = time.time_ns()
    assert {span.name for span in noted} == {
        f"bagpipe.oracle.{stage}" for stage in ("read", "dedup", "link", "plan")
    }
    # what the process has ready before it is told to note, it has not planned since
    assert sum(span.name == "bagpipe.oracle.plan" for span in noted) <= 50 + NUM_PLACES + 4
    for span in noted:
        assert began_ns <= span.begin_ns <= span.end_ns <= ended_ns
        assert span.process_id == process._process.pid  # type: ignore[union-attr]
    take(40)  # by now it has heard of the end
    num_noted = len(process.spans.end())
    take(150)
    assert num_items == 150
    process.close()
    assert len(noted) <= num_noted == len(process.spans.end())  # which outlives the process


@pytest.mark.usefixtures("as_users_have_it")
def test_the_death_of_the_process_is_an_error() -> None:
    process = start(Batches(9, "die"))
    with pytest.raises(BackgroundError, match="exit code -9"):
        drain(process)
    process.close()


def test_a_process_that_a_signal_has_stopped_is_an_error_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bagpipe.feed.process._LOOK_EVERY_S", 0.01)
    stops = OracleProcess(Batches(9, "stop"), options(), num_places=NUM_PLACES, join_timeout_s=0.1)
    with pytest.raises(LostError, match=r"pid \d+\) has been stopped by a signal for 0\.1"):
        drain(stops)
    assert stops._process is not None
    stops._process.kill()
    stops.close()


def test_stopping_ends_the_process_at_once_or_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(Batches(10**6))
    items = process.items()
    next(items)
    monkeypatch.setattr("bagpipe.feed.process._STOP_TIMEOUT_S", TIMEOUT_S)
    with ends_soon():
        process.stop()
    assert len(list(items)) < NUM_PLACES
    process.close()
    monkeypatch.setattr("bagpipe.feed.process._STOP_TIMEOUT_S", 0.0)
    process = start(Batches(10, "hang"))
    next(process.items())
    process.close()


def test_a_program_that_leaves_it_running_still_ends(tmp_path: Path) -> None:
    # Whoever makes a finalizer before multiprocessing is loaded has finalizers run after it has
    # waited for its processes.
    script = tmp_path / "script.py"
    script.write_text(
        "import weakref\n"
        "def finalized(): pass\n"
        "finalizer = weakref.finalize(finalized, int)\n"
        "if __name__ == '__main__':\n"
        f"    import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "    from tests.feed import test_process\n"
        "    process = test_process.start(test_process.Batches(10**6))\n"
        "    items = process.items()\n"
        "    next(items)\n"
        "    raise RuntimeError('of the user')\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=SOON_S, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: of the user\n")


@pytest.mark.usefixtures("as_users_have_it")
def test_signals_to_the_whole_group_leave_it_alone_while_it_starts_too() -> None:
    process = start(Batches(60))
    assert process._process is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process._process.pid or 0, number)
    items = process.items()
    item = next(items)
    os.kill(process._process.pid or 0, signal.SIGTERM)
    assert item.release is not None
    item.release()
    assert drain(process) == 59
    process.close()


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"can't be sent to another process.*oracle = 'thread'"):
        OracleProcess(iter([lambda: None]), options(), num_places=NUM_PLACES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_cores", "num_trainers", "num_threads"), [(1, 1, 1), (2, 2, 1), (16, 1, 4), (32, 2, 12)]
)
def test_more_trainers_have_more_threads(
    num_cores: int, num_trainers: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    topology = Topology(
        num_trainers=num_trainers, ranks=(0,), num_replica_slots=(50,) * (num_trainers > 1)
    )
    assert replace(options(), topology=topology).num_dedup_threads == 2
    assert (
        replace(options(), topology=topology, dedup_threads=None).num_dedup_threads == num_threads
    )
