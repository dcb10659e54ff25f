"""An evaluation gives the same scores for any number of trainers, each of which predicts its part
of the batches.
"""

from __future__ import annotations

import io
from typing import get_args

import pytest
import torch
from rich.console import Console
from tests.train.ranks import run_ranks
from torch import Tensor, nn

from bagpipe.config.metrics import Metric
from bagpipe.data.synthetic import SyntheticSource
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.train.evaluate import evaluate
from bagpipe.train.metrics import Scores
from bagpipe.train.progress import ConsoleReporter
from bagpipe.types import Jagged

NUM_SAMPLES = 330


class Model(nn.Module):
    """Predicts from dense features and ids; remembers how many samples it was given, and whether it
    was training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(-1, 1, 4))
        self.seen: list[tuple[int, bool]] = []

    def forward(self, dense: Tensor, sparse: Jagged) -> Tensor:
        self.seen.append((len(dense), self.training))
        ids = torch.from_numpy(sparse.values).view(2, -1).float().sum(0)
        return dense @ self.weights + ids % 5 - 2


def evaluated(
    batch_size: int, peers: Peers = ALONE
) -> tuple[Scores | None, Model, list[tuple[int, int]]]:
    source = SyntheticSource([40, 9], split="validation", num_samples=NUM_SAMPLES, num_dense=4)
    model, told = Model(), list[tuple[int, int]]()
    scores = evaluate(
        model,
        source,
        batch_size=batch_size,
        device=torch.device("cpu"),
        precision="fp32",
        metrics=get_args(Metric),
        group_by=source.features[1].name,
        peers=peers,
        on_batch=lambda *progress: told.append(progress),
    )
    assert model.training
    return scores, model, told


@pytest.mark.parametrize("num_trainers", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [50, 110, 400], ids=["ragged", "even", "one batch"])
def test_scores_are_the_same_for_any_number_of_trainers(batch_size: int, num_trainers: int) -> None:
    expected, model, told = evaluated(batch_size)
    num_batches = len(model.seen)
    assert expected is not None
    assert expected.num_samples == NUM_SAMPLES
    assert None not in expected.values.values()
    assert told == [
        (min(number, num_batches - 1), num_batches) for number in range(1, num_batches + 1)
    ] + [(num_batches, num_batches)]
    found = run_ranks(num_trainers, lambda communicator: evaluated(batch_size, communicator))
    assert found[0][0] == expected
    assert [scores for scores, _, _ in found[1:]] == [None] * (num_trainers - 1)
    for rank, (_, own, told) in enumerate(found):
        assert own.seen == model.seen[rank::num_trainers]
        assert told[-1] == (num_batches, num_batches)
        assert all(num_done < num_batches for num_done, _ in told[:-1])
    assert not any(is_training for _, is_training in model.seen)


def test_the_console_shows_an_evaluation_while_it_lasts() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ConsoleReporter(console) as reporter:
        reporter.start(0, 10)
        reporter.evaluating(1, 3)
        assert [task.description for task in reporter._bar.tasks][1:] == ["batches evaluated"]
        reporter.evaluating(3, 3)
        assert len(reporter._bar.tasks) == 1
        reporter.evaluating(1, 1)
        assert len(reporter._bar.tasks) == 1
