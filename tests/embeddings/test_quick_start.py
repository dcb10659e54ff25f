"""Optimizers without torch's compiler are torch's optimizers: same numbers, same states."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from bagpipe.embeddings.quick_start import without_compiler

KINDS = {
    torch.optim.SGD: {"momentum": 0.9},
    torch.optim.Adagrad: {},
    torch.optim.Adam: {"weight_decay": 0.1},
    torch.optim.AdamW: {"weight_decay": 0.1},
}


def trained(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Parameters and the optimizer's state after steps, a restart and a change of the rate."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer: Any = kind(layer.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    for step in range(6):
        if step == 3:
            state = deepcopy(optimizer.state_dict())
            optimizer = kind(layer.parameters(), lr=1.0, **options)  # type: ignore[call-arg]
            optimizer.load_state_dict(state)
            scheduler.optimizer = optimizer
        optimizer.zero_grad()
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert all(each.requires_grad and each.is_leaf for each in layer.parameters())
    return list(layer.parameters()), optimizer.state_dict()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_equal_to_torchs(kind: type[torch.optim.Optimizer]) -> None:
    expected, expected_state = trained(kind, KINDS[kind])
    quick = without_compiler(kind)
    found, state = trained(quick, KINDS[kind])
    assert quick.__name__ == kind.__name__
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


def test_hooks_are_called() -> None:
    calls: list[str] = []
    optimizer = without_compiler(torch.optim.SGD)(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
