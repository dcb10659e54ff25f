"""The dense part of several trainers: its gradients are averaged in one message."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.soon import SOON_S

from bagpipe.config.run import TrainConfig
from bagpipe.errors import ConfigError
from bagpipe.models import DLRM
from bagpipe.train.averaged import AveragedGradients
from bagpipe.train.build import make_dense_step
from bagpipe.train.objective import Objective

GROUP = SimpleNamespace(features=("a", "b"), embedding_dim=4)
CPU = torch.device("cpu")


def make_step(
    average: Any, *, dtype: torch.dtype = torch.float32, frozen: bool = False
) -> tuple[Any, DLRM]:
    torch.manual_seed(0)
    model = DLRM(torch.nn.Module(), 3, num_features=2, bottom=[4], top=[2, 1]).to(dtype)
    if frozen:
        kept = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
        model.register_parameter("kept", kept)
    peers = SimpleNamespace(has_others=True, num_trainers=2, average=average)
    embeddings: Any = SimpleNamespace(groups=(GROUP,), peers=peers)
    config = TrainConfig.model_validate({"batch_size": 8})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make_dense_step(config, model, optimizer, embeddings, CPU, Objective(), print)
    step.pooled(4)[0].fill_(0.5)
    return step, model


def test_one_message_averages_all_gradients_before_the_optimizers_step() -> None:
    sizes = []

    def average(gradients: torch.Tensor) -> None:
        sizes.append(len(gradients))
        gradients.fill_(1.0)

    step, model = make_step(average)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(torch.ones(4, 3), torch.ones(4))
    assert sizes == [sum(parameter.numel() for parameter in model.parameters())]
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.1, rtol=0, atol=0)


def test_several_trainers_do_not_import_torchs_compiler() -> None:
    """torch.optim's classes do as one is made; those of a run are taken without that."""
    code = (
        "import sys, torch\n"
        "import bagpipe.embeddings.quick_start as quick\n"
        "torch.optim.SGD = quick.without_compiler(torch.optim.SGD)\n"
        "from tests.train.test_averaged import make_step\n"
        "make_step(lambda gradients: None)[0](torch.ones(4, 3), torch.ones(4))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SOON_S)


def test_a_frozen_parameter_stays_without_a_gradient() -> None:
    frozen, trained = torch.ones(2), torch.ones(3, requires_grad=True)
    averaged = AveragedGradients([frozen, trained], lambda gradients: gradients.mul_(0.5))
    (trained * 2.0).sum().backward()
    averaged.collect()
    averaged.average()
    assert frozen.grad is None
    assert trained.grad is not None
    assert trained.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_parameter_that_is_trained_later_is_averaged_from_then_on() -> None:
    frozen = torch.ones(2)
    averaged = AveragedGradients([frozen], lambda gradients: gradients.mul_(0.5))
    frozen.requires_grad_(True)
    (frozen * 2.0).sum().backward()
    averaged.collect()
    averaged.average()
    assert frozen.grad is not None
    assert frozen.grad.tolist() == [1.0, 1.0]


def test_parameters_of_16_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"DLRM: its parameter 'dense_arch\.0\.weight' is .*bfl"):
        make_step(lambda gradients: None, dtype=torch.bfloat16)


def test_frozen_parameters_may_have_16_bits() -> None:
    averaged = list[torch.dtype]()
    step, model = make_step(lambda gradients: averaged.append(gradients.dtype), frozen=True)
    step(torch.ones(4, 3), torch.ones(4))
    assert averaged == [torch.float32]
    assert [each.grad is None for each in model.parameters()] == [
        not each.requires_grad for each in model.parameters()
    ]
