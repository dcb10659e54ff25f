"""One shard's state without a network: epochs, marks and fences, rows."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.server.asked import is_waiting, raised
from tests.server.held import HeldStore, checkpoint_at
from tests.server.shards import fetched, header_of, make_shard, own_rows
from tests.soon import SOON_S, wait_until
from tests.store_contract import initial, make_group, records_of, rows_of

from bagpipe.server.shard import Shard
from bagpipe.server.wire import What
from bagpipe.store import Steps

# ---------------------------------------------------------------------------------------- fences


def test_a_fetch_waits_for_the_marks_of_all_ranks_and_of_both_kinds(
    shard: Shard, pool: ThreadPoolExecutor
) -> None:
    rows = own_rows(shard)[:3]
    fence = header_of(shard, what=What.FETCH, steps=Steps(overlapped=4, urgent=3))
    found = pool.submit(fetched, shard, fence, rows)
    shard.write(
        header_of(shard, steps=Steps(overlapped=4, urgent=3)), rows, records_of(rows, salt=0.5)
    )
    assert is_waiting(found)  # for rank 1
    shard.mark(header_of(shard, rank=1, steps=Steps(overlapped=7)))
    assert is_waiting(found)  # for its urgent ones
    shard.mark(header_of(shard, rank=1, steps=Steps(urgent=2)))
    assert is_waiting(found)  # for a step more
    shard.mark(header_of(shard, rank=1, steps=Steps(urgent=3)))
    np.testing.assert_array_equal(found.result(SOON_S), records_of(rows, salt=0.5))


def test_the_newest_mark_counts_and_a_fetch_without_a_fence_waits_for_nobody(shard: Shard) -> None:
    for rank in (0, 1):
        shard.mark(header_of(shard, rank=rank, steps=Steps(urgent=9, overlapped=9)))
        shard.mark(header_of(shard, rank=rank, steps=Steps(urgent=2)))  # came late
    rows = own_rows(shard)[:2]
    for steps in (Steps(urgent=9), Steps(overlapped=8, urgent=9), Steps()):
        found = fetched(shard, header_of(shard, what=What.FETCH, steps=steps), rows)
        np.testing.assert_array_equal(found, initial(make_group(), rows))


def test_a_mark_counts_once_its_write_is_there(pool: ThreadPoolExecutor) -> None:
    shard = make_shard(store=(held := HeldStore()))
    shard.begin(1, 1, None)
    rows, steps = rows_of(1, 2), Steps(urgent=1)
    written = pool.submit(shard.write, header_of(shard, steps=steps), rows, records_of(rows))
    found = pool.submit(fetched, shard, header_of(shard, what=What.FETCH, steps=steps), rows)
    assert held.is_reached.wait(SOON_S)
    assert is_waiting(found)
    held.go_on.set()
    written.result(SOON_S)
    np.testing.assert_array_equal(found.result(SOON_S), records_of(rows))


def test_a_rank_that_stands_still_is_named_in_time() -> None:
    shard = make_shard(wait_timeout_s=0.1)
    shard.begin(3, 3, None)
    for rank in (0, 2):
        shard.mark(header_of(shard, 3, rank=rank, steps=Steps(overlapped=8, urgent=8)))
    shard.mark(header_of(shard, 3, rank=1, steps=Steps(overlapped=8, urgent=5)))
    fence = header_of(shard, 3, rank=2, what=What.FETCH, steps=Steps(overlapped=7, urgent=6))
    assert raised(lambda: fetched(shard, fence, rows_of(1))) == (
        "shard server 0 of 1: rank 2 of epoch 3 waited 0.1 s for rank 1 to write what its "
        "overlapped and urgent transfers up to steps 7 and 6 evict; it has come to 8 and 5: see "
        "why it stands still, and start all trainers again"
    )


# ---------------------------------------------------------------------------------------- epochs


def test_before_an_epoch_and_after_closing_nobody_is_served(shard: Shard) -> None:
    fresh, rows = make_shard(), rows_of(1)
    message = raised(lambda: fetched(fresh, header_of(fresh), rows))
    assert "epoch 1 is not served, no epoch is" in message
    header = header_of(shard)
    shard.close()
    shard.close()
    for call in (
        lambda: fetched(shard, header, rows),
        lambda: shard.mark(header),
        lambda: shard.begin(2, 1, None),
        lambda: shard.cut(1, 1),
    ):
        assert "is closed: start it again" in raised(call)


@pytest.mark.parametrize("epoch", [0, 2])
def test_another_epoch_and_another_instance_are_refused_and_nothing_is_written(
    shard: Shard, epoch: int
) -> None:
    rows = rows_of(5)
    wrong = header_of(shard, epoch)
    other = dataclasses.replace(header_of(shard), instance="ab" * 16)
    for header, facts in (
        (wrong, f"rank 0 of epoch {epoch} is not served, epoch 1 is"),
        (other, "rank 0 of epoch 1 speaks to another life of this server"),
        (header_of(shard, rank=2), "epoch 1 has 2 trainers and no rank 2"),
    ):
        for call in (
            lambda header=header: shard.write(header, rows, records_of(rows)),
            lambda header=header: shard.mark(header),
            lambda header=header: fetched(shard, header, rows),
            lambda header=header: list(shard.snapshot(header)),
            lambda header=header: shard.clear(header),
            lambda header=header: shard.claim_writes(header),
        ):
            assert facts in raised(call)
    assert list(shard.snapshot(header_of(shard))) == []


@pytest.mark.parametrize("epoch", [1, 0])
def test_an_epoch_that_is_not_above_all_before_it_can_not_begin(shard: Shard, epoch: int) -> None:
    shard.write(header_of(shard), rows_of(1), records_of(rows_of(1)))
    message = raised(lambda: shard.begin(epoch, 2, None))
    assert f"epoch {epoch} can't begin, since epoch 1 has" in message
    assert shard.epoch == 1
    np.testing.assert_array_equal(
        fetched(shard, header_of(shard), rows_of(1)), records_of(rows_of(1))
    )


def test_begin_forgets_marks_and_fails_what_waits_for_them(
    shard: Shard, pool: ThreadPoolExecutor
) -> None:
    fence = header_of(shard, what=What.FETCH, steps=Steps(urgent=1))
    shard.mark(header_of(shard, steps=Steps(urgent=1)))
    waiting = pool.submit(fetched, shard, fence, rows_of(1))
    assert is_waiting(waiting)
    instance = shard.instance
    assert shard.begin(2, 1, None) == instance
    assert "rank 0 of epoch 1 is not served" in raised(lambda: waiting.result(SOON_S))
    again = pool.submit(fetched, shard, dataclasses.replace(fence, epoch=2), rows_of(1))
    assert is_waiting(again)
    shard.mark(header_of(shard, 2, steps=Steps(urgent=1)))
    again.result(SOON_S)


def test_begin_waits_for_a_running_write_and_puts_it_back(pool: ThreadPoolExecutor) -> None:
    shard = make_shard(store=(held := HeldStore()))
    shard.begin(1, 1, None)
    rows = rows_of(4)
    written = pool.submit(shard.write, header_of(shard), rows, records_of(rows))
    assert held.is_reached.wait(SOON_S)
    begun = pool.submit(shard.begin, 2, 1, None)
    wait_until(lambda: shard.serving._newest_epoch == 2)
    assert is_waiting(begun)
    late = raised(lambda: shard.write(header_of(shard), rows, records_of(rows)))
    assert "rank 0 of epoch 1 is not served, no epoch is" in late
    held.go_on.set()
    begun.result(SOON_S)
    # its mark comes when its epoch is over
    assert "epoch 1 is not served" in raised(lambda: written.result(SOON_S))
    np.testing.assert_array_equal(
        fetched(shard, header_of(shard, 2), rows), initial(make_group(), rows)
    )


def test_a_write_that_does_not_end_is_named_in_time(pool: ThreadPoolExecutor) -> None:
    shard = make_shard(store=(held := HeldStore()), apply_timeout_s=0.1)
    shard.begin(1, 1, None)
    written = pool.submit(shard.write, header_of(shard), rows_of(4), records_of(rows_of(4)))
    assert held.is_reached.wait(SOON_S)
    assert "1 writes and 0 reads have not ended within 0.1 s" in raised(
        lambda: shard.begin(2, 1, None)
    )
    held.go_on.set()
    raised(lambda: written.result(SOON_S))
    shard.begin(3, 1, None)


def test_a_zombies_write_after_begin_changes_nothing(shard: Shard) -> None:
    zombie = header_of(shard)
    shard.begin(2, 2, None)
    rows = rows_of(1, 2)
    raised(lambda: shard.write(zombie, rows, records_of(rows)))
    assert list(shard.snapshot(header_of(shard, 2))) == []


def test_an_epoch_that_is_overtaken_while_it_begins_serves_nobody(
    pool: ThreadPoolExecutor,
) -> None:
    shard = make_shard(store=(held := HeldStore()))
    first = pool.submit(shard.begin, 1, 1, checkpoint_at(Path("slow")))
    assert held.is_reached.wait(SOON_S)
    second = pool.submit(shard.begin, 2, 1, checkpoint_at(Path("any")))
    assert "epoch 1 ended while it began, since epoch 2 has begun" in raised(
        lambda: first.result(SOON_S)
    )
    second.result(SOON_S)
    assert (shard.epoch, shard.base) == (2, "0.9")


def test_an_epoch_that_is_overtaken_need_not_wait_for_what_is_being_applied(
    pool: ThreadPoolExecutor,
) -> None:
    shard = make_shard(store=(held := HeldStore()))
    shard.begin(1, 1, None)
    written = pool.submit(shard.write, header_of(shard), rows_of(4), records_of(rows_of(4)))
    assert held.is_reached.wait(SOON_S)
    second = pool.submit(shard.begin, 2, 1, None)
    wait_until(lambda: shard.serving._newest_epoch == 2)
    third = pool.submit(shard.begin, 3, 1, None)
    assert "epoch 2 ended while it began, since epoch 3" in raised(lambda: second.result(SOON_S))
    held.go_on.set()
    third.result(SOON_S)
    raised(lambda: written.result(SOON_S))


@pytest.mark.parametrize("num_ranks", [0, 65])
def test_an_epoch_has_1_to_64_trainers(num_ranks: int) -> None:
    assert f"an epoch of {num_ranks} trainers, must be from 1 to 64" in raised(
        lambda: make_shard().begin(1, num_ranks, None)
    )


def test_a_rank_has_one_stream_of_writes_an_epoch(shard: Shard) -> None:
    shard.claim_writes(header_of(shard, rank=1))
    shard.claim_writes(header_of(shard))
    message = raised(lambda: shard.claim_writes(header_of(shard, rank=1)))
    assert "rank 1 has had its stream of writes in epoch 1" in message
    shard.begin(2, 2, None)
    shard.claim_writes(header_of(shard, 2, rank=1))


# ------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_each_shard_has_its_rows_and_refuses_all_others(num_shards: int) -> None:
    shards = [make_shard(number, num_shards) for number in range(num_shards)]
    seen = []
    for shard in shards:
        shard.begin(1, 1, None)
        rows = own_rows(shard)
        seen += rows.tolist()
        shard.write(header_of(shard), rows, records_of(rows))
        foreign = np.setdiff1d(np.arange(1_300), rows)[:1]
        mixed = np.concatenate([rows[:2], foreign])
        for call in (
            lambda s=shard, r=mixed: s.write(header_of(s), r, records_of(r, salt=9)),
            lambda s=shard, r=mixed: fetched(s, header_of(s), r),
        ):
            assert f"row {foreign[0]:,} of group 2 (dim 6) is of shard" in raised(call)
        np.testing.assert_array_equal(fetched(shard, header_of(shard), rows), records_of(rows))
        found = [row for block, _ in shard.snapshot(header_of(shard)) for row in block.tolist()]
        assert found == rows.tolist()
    assert sorted(seen) == list(range(1_300))


@pytest.mark.parametrize("bad", [-1, 1_300, 2**62, -(2**63)])
def test_a_row_out_of_range_is_refused_and_nothing_is_written(shard: Shard, bad: int) -> None:
    rows = rows_of(3, bad)
    for call in (
        lambda: shard.write(header_of(shard), rows, np.ones((2, 7), np.float32)),
        lambda: fetched(shard, header_of(shard), rows),
    ):
        assert f"row {bad:,} lies outside group 2 (dim 6), whose rows are 0 to 1,299" in raised(
            call
        )
    assert list(shard.snapshot(header_of(shard))) == []


def test_a_group_that_is_not_there_is_refused(shard: Shard) -> None:
    assert "rank 0 names group 1, there are 1" in raised(
        lambda: shard.write(header_of(shard, group=1), rows_of(), np.empty((0, 7), np.float32))
    )
