"""Columns that several threads fill."""

from __future__ import annotations

import numpy as np
import pytest

from bagpipe.native import memory


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 23])
@pytest.mark.parametrize("cores", [1, 3, None])
def test_every_row_is_filled(
    num_rows: int, cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_THREAD_ITEMS", 4)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    column = memory.filled(num_rows, -1)
    assert column.dtype == np.int32
    assert column.shape == (num_rows, 1)
    assert (column == -1).all()
