"""Rows are updated, and the dense part's gradients averaged, in one order on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tests.train.test_dense_step import BATCH_SIZE, dense_step, make

from bagpipe.train import dense_step as dense_step_module
from bagpipe.train.dense_step import DenseStep, _Captured


class RowsThatNote:
    """Stands for the rows of a graph."""

    def __init__(self, noted: list[str]) -> None:
        self._noted = noted

    def replay(self, graph: Any) -> None:
        self._noted.append("update")

    def lookup(self, pooled: Any) -> None:
        self._noted.append("lookup")

    def update(self, grads: Any) -> None:
        self._noted.append("update")

    def warm_up(self, pooled: Any) -> None:
        self._noted.append("rows made ready")

    def look_up_now(self, pooled: Any) -> Callable[[Any], None]:
        return lambda grads: self._noted.append("update")


class AverageThatNotes:
    """Peer memory's."""

    def __init__(self, noted: list[str]) -> None:
        self._noted = noted

    def __call__(self, values: Any) -> None:
        self._noted.append("average by peer memory")

    def warm_up(self, values: Any) -> None:
        self._noted.append("average made ready")

    def launch(self, values: Any) -> None:
        self._noted.append("average in the graph")

    def note(self) -> None:
        self._noted.append("average noted")


INPUTS = [torch.zeros(BATCH_SIZE, 3), torch.zeros(BATCH_SIZE)]


def captured(rows: Any, average: Any = None) -> _Captured:
    return _Captured(
        graph=MagicMock(),
        optimizer_graph=MagicMock(),
        inputs=[each.clone() for each in INPUTS],
        loss=torch.zeros(()),
        grads=[],
        parameter_grads=[],
        rows=rows,
        average=average,
    )


@pytest.mark.parametrize("by_peer_memory", [False, True], ids=["", "by peer memory"])
@pytest.mark.parametrize("way", ["by call", "by rows", "in a graph"])
def test_rows_are_updated_before_the_average_on_every_way(way: str, by_peer_memory: bool) -> None:
    """A rank that updates on one way would wait for one on another, and that for the first."""
    _, model, optimizer = make()
    noted: list[str] = []
    step = dense_step(model, optimizer, average=lambda grads: noted.append("average"))
    step.pooled(BATCH_SIZE)[0].zero_()
    average: Any = AverageThatNotes(noted) if by_peer_memory else None
    if way == "by call":
        step(*INPUTS, update=lambda grads: noted.append("update"), average=average)
    else:
        rows: Any = RowsThatNote(noted)
        if way == "in a graph":
            step._captured = step._whole = captured(rows, average)
        step(*INPUTS, rows=rows, average=average)
    averaged = "average"
    if by_peer_memory:
        averaged = "average noted" if way == "in a graph" else "average by peer memory"
    assert noted == ["update", averaged]


def test_a_graph_without_rows_leaves_the_average_to_calls() -> None:
    """It may be replayed in streams of other peer memory."""
    _, model, optimizer = make()
    noted: list[str] = []
    step = dense_step(model, optimizer, average=lambda grads: noted.append("average"))
    step._captured = captured(None)
    by_peer_memory: Any = AverageThatNotes(noted)
    for average in (by_peer_memory, None):
        step(*INPUTS, update=lambda grads: noted.append("update"), average=average)
    assert noted == ["update", "average by peer memory", "update", "average"]


def test_peer_memory_averages_no_part_of_another_type_than_it_moves() -> None:
    noted: list[str] = []
    layer = torch.nn.Linear(8, 1, dtype=torch.float64)
    step = DenseStep(
        lambda dense, pooled: layer(pooled.double()).squeeze(1),
        torch.optim.SGD(layer.parameters()),
        groups=[(2, 4)],
        device=torch.device("cpu"),
        batch_size=BATCH_SIZE,
        average=lambda grads: noted.append("average"),
    )
    step.pooled(BATCH_SIZE)[0].zero_()
    average: Any = AverageThatNotes(noted)
    step(*INPUTS, average=average)
    assert noted == ["average"]


@pytest.mark.parametrize("rate_changes", [False, True])
@pytest.mark.parametrize("by_peer_memory", [False, True])
def test_a_graph_with_rows_holds_what_peer_memory_averages_and_the_optimizers_step(
    by_peer_memory: bool, rate_changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, what a capture does is done at once."""
    _, model, optimizer = make()
    noted: list[str] = []

    @contextmanager
    def graph(stream: Any) -> Iterator[Any]:
        noted.append("graph begins")
        yield MagicMock()
        noted.append("graph ends")

    monkeypatch.setattr(dense_step_module, "captured_graph", graph)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(optimizer, "step", lambda: noted.append("optimizer"))
    options: Any = {"average": lambda grads: noted.append("average"), "rate_changes": rate_changes}
    step = dense_step(model, optimizer, **options)
    step.pooled(BATCH_SIZE)[0].zero_()
    average: Any = AverageThatNotes(noted) if by_peer_memory else None
    assert step._averaged is not None
    step._averaged.use(average)
    rows: Any = RowsThatNote(noted)
    held = step._capture(model.dense_part, INPUTS, rows)
    assert held.average is average
    assert (held.optimizer_graph is None) == (by_peer_memory or rate_changes)
    optimized = ["optimizer"] * (not rate_changes)
    ready = ["average made ready"] * by_peer_memory
    begin = ["optimizer"] * 3 + ["rows made ready", *ready, "graph begins", "lookup", "update"]
    if by_peer_memory:
        end = ["average in the graph", *optimized, "graph ends"]
    else:
        end = ["graph ends", *(["graph begins", "optimizer", "graph ends"] * (not rate_changes))]
    assert noted == begin + end
