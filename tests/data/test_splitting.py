"""The rules that hold rows out for validation."""

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
    assert ByRow(3).is_validation(block([2, 3, 4])).tolist() == [False, True, True]
    assert ByTime(7).is_validation(block([0, 1, 2], [8, 6, 7])).tolist() == [True, False, True]


def test_share_depends_on_row_number_and_seed_only() -> None:
    rows = list(range(20_000))
    chosen = ByShare(0.1, 3).is_validation(block(rows))
    assert 0.09 < chosen.mean() < 0.11
    assert ByShare(0.1, 3).is_validation(block(rows[5000:])).tolist() == chosen[5000:].tolist()
    assert ByShare(0.1, 4).is_validation(block(rows)).tolist() != chosen.tolist()
    assert not ByShare(0.0, 3).is_validation(block(rows)).any()
