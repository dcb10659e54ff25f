"""The rules that hold rows out for validation and a test."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bagpipe.data.raw import RawBlock
from bagpipe.data.splitting import ByRow, ByShare, ByTime, nth_smallest


def block(rows: list[int], times: list[int] | None = None) -> RawBlock:
    n = len(rows)
    return RawBlock(
        rows=np.array(rows, np.int64),
        labels=np.zeros(n, np.float32),
        dense=np.zeros((n, 0), np.float32),
        keys=(),
        times=None if times is None else np.array(times, np.int64),
    )


@given(
    blocks=st.lists(
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)), min_size=1, max_size=5
    ),
    data=st.data(),
)
def test_nth_smallest(blocks: list[list[int]], data: st.DataObject) -> None:
    values = sorted(value for part in blocks for value in part)
    if not values:
        return
    rank = data.draw(st.integers(0, len(values) - 1))
    assert nth_smallest(lambda: [np.array(part, np.int64) for part in blocks], rank) == values[rank]


def test_rules() -> None:
    assert ByRow(3, 5).split_of(block([2, 3, 4, 5])).tolist() == [0, 1, 1, 2]
    assert ByTime(7, None).split_of(block([0, 1, 2], [8, 6, 7])).tolist() == [1, 0, 1]
    assert ByTime(7, 8).split_of(block([0, 1, 2], [8, 6, 7])).tolist() == [2, 0, 1]


def test_share_depends_on_row_number_and_seed_only() -> None:
    rows = list(range(20_000))
    chosen = ByShare(0.1, 0.2, 3).split_of(block(rows))
    assert 0.09 < (chosen == 1).mean() < 0.11
    assert 0.19 < (chosen == 2).mean() < 0.21
    assert ByShare(0.1, 0.2, 3).split_of(block(rows[5000:])).tolist() == chosen[5000:].tolist()
    assert ByShare(0.1, 0.2, 4).split_of(block(rows)).tolist() != chosen.tolist()
    # a test split changes no row of validation
    assert (ByShare(0.1, 0.0, 3).split_of(block(rows)) == (chosen == 1)).all()
    assert not ByShare(0.0, 0.0, 3).split_of(block(rows)).any()
