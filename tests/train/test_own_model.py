"""A run's file names a model class of the user's own."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.ranks import run_ranks
from tests.train.runs import small_config
from torch import Tensor, nn

from bagpipe.distributed.communicator import Communicator
from bagpipe.errors import ConfigError
from bagpipe.models import RankingModel
from bagpipe.train.build import build_run
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

HERE = "tests.train.test_own_model"
PAGE = Path(__file__).parents[2] / "docs" / "training.md"


class Linear(RankingModel):
    """Logistic regression over everything."""

    def __init__(self, embeddings: nn.Module, num_dense: int, *, bias: bool = True) -> None:
        super().__init__(embeddings)
        self.linear = nn.Linear(num_dense + self.num_features * self.embedding_dim, 1, bias=bias)

    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.cat([dense, pooled], dim=1))
        return logits.squeeze(1)


_NUMBERS = itertools.count(1)


class Apart(Linear):
    """Begins with other numbers each time, which torch's seed does not rule."""

    def __init__(self, embeddings: nn.Module, num_dense: int, *, is_odd: bool = False) -> None:
        super().__init__(embeddings, num_dense)
        number = next(_NUMBERS)
        nn.init.constant_(self.linear.weight, number)
        self.register_buffer("number", torch.tensor(number))
        if is_odd and number % 2:
            self.register_buffer("odd", torch.ones(1))


def run(folder: Path, **model: Any) -> None:
    train(small_config(folder, model=model, train={"steps": 2}), reporter=SilentReporter())


def test_it_is_trained_with_its_arguments(tmp_path: Path) -> None:
    run(tmp_path, kind=f"{HERE}:Linear", arguments={"bias": False})
    (dense,) = (tmp_path / "checkpoints").glob("*/dense.pt")
    assert torch.load(dense)["model"].keys() == {"linear.weight"}


def test_all_trainers_begin_with_the_weights_of_the_first(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"kind": f"{HERE}:Apart"})

    def work(communicator: Communicator) -> list[Tensor]:
        with build_run(config, peers=communicator) as parts:
            model = parts.model
            return [each.detach() for each in (*model.parameters(), *model.buffers())]

    ranks = run_ranks(3, work)
    for rank in ranks[1:]:
        for found, first in zip(rank, ranks[0], strict=True):
            assert torch.equal(found, first)


def test_trainers_with_other_models_are_told(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"kind": f"{HERE}:Apart", "arguments": {"is_odd": True}})

    def work(communicator: Communicator) -> None:
        with (
            pytest.raises(ConfigError, match="Apart has other parameters on rank 1 than on rank 0"),
            build_run(config, peers=communicator),
        ):
            pass

    run_ranks(2, work)


def test_the_model_of_the_page_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(# mymodels\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mymodels.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    run(tmp_path / "run", kind="mymodels:TwoTowers", arguments={"size": 4})
    (dense,) = (tmp_path / "run" / "checkpoints").glob("*/dense.pt")
    assert torch.load(dense)["model"]["user.weight"].shape == (4, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "nowhere.at_all:Linear"}, "nowhere.at_all can't be imported: .*PYTHONPATH"),
        ({"kind": f"{HERE}:Liner"}, "no subclass of .*RankingModel .*: did you mean 'Linear'"),
        ({"kind": f"{HERE}:HERE"}, "no subclass of bagpipe.models.RankingModel"),
        ({"kind": f"{HERE}:Linear", "arguments": {"bia": 1}}, r"with \['bia'\]: .*bia"),
        ({"kind": "a b:C"}, r'model\.kind = "a b:C": string should match pattern'),
        ({"kind": f"{HERE}:Linear", "top": [1]}, "model.top: unknown key"),
    ],
)
def test_what_is_wrong_with_it_is_told(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **model)
