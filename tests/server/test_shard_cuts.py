"""One shard's cuts without a network: its checkpoints, and calls that come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.server.asked import raised
from tests.server.held import HeldStore, checkpoint_at
from tests.server.shards import header_of, make_shard
from tests.store_contract import records_of, rows_of

from bagpipe.server.shard import Shard
from bagpipe.types import Int64Array


def test_a_checkpoint_that_can_not_be_read_leaves_the_shard_without_epoch() -> None:
    shard = make_shard(store=HeldStore())
    shard.begin(1, 1, None)
    assert raised(lambda: shard.begin(2, 1, checkpoint_at(Path("damaged")))) == "can't be read"
    assert (shard.epoch, shard.base) == (None, None)
    assert "no epoch is" in raised(lambda: shard.mark(header_of(shard, 2)))
    assert "epoch 2 can't begin" in raised(lambda: shard.begin(2, 1, None))
    shard.begin(3, 1, None)
    assert shard.epoch == 3


def test_clear_forgets_the_rows_and_the_base(shard: Shard) -> None:
    shard.begin(2, 1, checkpoint_at(Path(), name="1.7"))
    assert shard.base == "1.7"
    shard.write(header_of(shard, 2), rows_of(1), records_of(rows_of(1)))
    shard.clear(header_of(shard, 2))
    assert list(shard.snapshot(header_of(shard, 2))) == []
    assert shard.base is None


def write_and_cut(shard: Shard, number: int, rows: Int64Array, salt: float, folder: Path) -> Any:
    shard.write(header_of(shard), rows, records_of(rows, salt))
    return shard.cut(1, number)(folder)


def test_a_new_epoch_has_the_records_of_its_checkpoint(shard: Shard, tmp_path: Path) -> None:
    """Those of the base, of another one, and of none."""
    (first,) = write_and_cut(shard, 1, rows_of(1, 2), 0.25, tmp_path)
    assert first.name == "group-0.shard-0-of-1.cut-1.1.arrow"
    assert shard.committed(1, 1)
    (second,) = write_and_cut(shard, 2, rows_of(2, 3), 0.5, tmp_path)
    assert second.num_records == 2
    assert shard.base == "1.1"
    assert shard.committed(1, 2)
    shard.write(header_of(shard), rows_of(1, 4), records_of(rows_of(1, 4), salt=0.75))
    for epoch, (name, files) in enumerate((("1.2", (first, second)), ("1.1", (first,))), 2):
        shard.begin(epoch, 1, checkpoint_at(tmp_path, *files, name=name))
        assert shard.base == name
        ((rows, records),) = shard.snapshot(header_of(shard, epoch))
        expected = [records_of(rows_of(1), 0.25)[0], records_of(rows_of(2), 0.25)[0]]
        if second in files:
            expected[1:] = records_of(rows_of(2, 3), 0.5)
        assert rows.tolist() == [1, 2, 3][: len(expected)]
        np.testing.assert_array_equal(records, expected)
    shard.begin(4, 1, None)
    assert list(shard.snapshot(header_of(shard, 4))) == []


def test_a_cut_that_is_abandoned_or_left_is_no_base(shard: Shard, tmp_path: Path) -> None:
    write_and_cut(shard, 1, rows_of(1), 0, tmp_path)
    shard.abandon(1, 1)
    assert not shard.committed(1, 1)
    write_and_cut(shard, 2, rows_of(2), 0, tmp_path)
    (file,) = write_and_cut(shard, 3, rows_of(3), 0, tmp_path)  # 2 is still in hand
    assert file.num_records == 3
    assert not shard.committed(1, 2)
    assert shard.base is None
    assert shard.committed(1, 3)
    assert shard.base == "1.3"


def test_calls_for_cuts_that_come_late_do_no_harm(shard: Shard, tmp_path: Path) -> None:
    shard.abandon(1, 3)  # has overtaken its cut
    for number in (3, 2):
        message = raised(lambda number=number: shard.cut(1, number))
        assert f"cut 1.{number} comes late, 1.3 was known" in message
    write = shard.cut(1, 4)
    shard.abandon(1, 3)
    assert not shard.committed(1, 3)
    assert "none is in hand whose file is on disk" in raised(lambda: shard.committed(1, 4))
    write(tmp_path)
    assert shard.committed(1, 4)


def test_a_cut_of_an_older_epoch_is_refused_and_begin_gives_it_up(
    shard: Shard, tmp_path: Path
) -> None:
    write = shard.cut(1, 1)
    shard.begin(2, 2, None)
    for call in (
        lambda: shard.committed(1, 1),
        lambda: shard.abandon(1, 1),
        lambda: shard.cut(1, 2),
    ):
        assert "epoch 1 is not served, epoch 2 is" in raised(call)
    assert "the cut of group 2 (dim 6) was given up" in raised(lambda: write(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert not shard.committed(2, 1)
    shard.cut(2, 2)(tmp_path)  # its own numbers


def test_a_server_serves_one_run_in_its_life(shard: Shard) -> None:
    message = raised(lambda: shard.begin(9, 1, None, run="other"))
    assert "holds the tables of run '', not of 'other': restart it" in message
    assert shard.epoch == 1
