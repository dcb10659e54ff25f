"""Rows are updated, and the dense part's gradients averaged, in one order on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tests.train.test_dense_step import BATCH_SIZE, dense_step, make

from bagpipe.train.dense_step import _Captured


class RowsThatNote:
    """Stands for the rows of a graph."""

    def __init__(self, noted: list[str]) -> None:
        self._noted = noted

    def replay(self, graph: Any) -> None:
        self._noted.append("update")

    def look_up_now(self, pooled: Any) -> Callable[[Any], None]:
        return lambda grads: self._noted.append("update")


@pytest.mark.parametrize("way", ["by call", "by rows", "in a graph"])
def test_rows_are_updated_before_the_average_on_every_way(way: str) -> None:
    """A rank that updates on one way would wait for one on another, and that for the first."""
    _, model, optimizer = make()
    noted: list[str] = []
    step = dense_step(model, optimizer, average=lambda grads: noted.append("average"))
    step.pooled(BATCH_SIZE)[0].zero_()
    inputs = [torch.zeros(BATCH_SIZE, 3), torch.zeros(BATCH_SIZE)]
    rows: Any = RowsThatNote(noted)
    if way == "by call":
        step(*inputs, update=lambda grads: noted.append("update"))
    else:
        if way == "in a graph":
            step._captured = step._whole = _Captured(
                graph=MagicMock(),
                optimizer_graph=MagicMock(),
                inputs=[each.clone() for each in inputs],
                loss=torch.zeros(()),
                grads=[],
                parameter_grads=[],
                rows=rows,
            )
        step(*inputs, rows=rows)
    assert noted == ["update", "average"]
