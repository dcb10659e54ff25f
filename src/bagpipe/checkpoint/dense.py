"""The dense part of a checkpoint: model, dense optimizer and random state."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bagpipe.errors import CheckpointError


def dense_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> memoryview:
    """Model, optimizer and random state, without embeddings, as torch.save writes them."""
    buffer = io.BytesIO()
    content = {
        "model": {
            name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
        },
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(content, buffer)
    return buffer.getbuffer()


def load_dense_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what `dense_state` has made. CheckpointError: it is another model's."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    expected = {name for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if expected != content["model"].keys():
        raise CheckpointError(
            f"{path}: holds another model: {sorted(expected ^ content['model'].keys())} are in "
            "only one of them"
        )
    try:
        # embeddings are loaded from their records
        model.load_state_dict(content["model"], strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: holds another model: {error}") from error
    load_optimizer(optimizer, content["optimizer"])
    torch.set_rng_state(content["random"])
    if len(content["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["random_cuda"])


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a state that may have been saved on another kind of device.

    Adam goes on counting its steps where this run's optimizer does, on the host or the device.
    """
    capturable = [group.get("capturable") for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, is_capturable in zip(optimizer.param_groups, capturable, strict=True):
        if is_capturable is None:
            continue
        group["capturable"] = is_capturable
        for parameter in group["params"]:
            values = optimizer.state.get(parameter, {})
            if "step" in values:
                values["step"] = values["step"].to(parameter.device if is_capturable else "cpu")
