"""The dense part of a checkpoint: model, dense optimizers and random state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagpipe.errors import CheckpointError

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
_OWN = "own"
_EXTRA_STATE = "_extra_state"  # how torch ends the keys of `nn.Module.get_extra_state`
_SAFE: list[Any] = [  # what a numpy array or number is pickled as
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    *(type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"),
]


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` without embedding tables, for `torch.save`.

    Nothing is read of the tables. What wraps the model, DistributedDataParallel or torch.compile,
    leaves no trace in the keys.

    Args:
        model: any module, with or without a `bagpipe.EmbeddingBagCollection` in it.

    Returns:
        Tensors, and what modules' `get_extra_state` gives, by name. Load it by
        ``load_state_dict(state, strict=False)``, as the tables' keys are missing. Use
        `save_tables` and `load_tables` for the tables.
    """
    return {
        name: value
        for name, value in unwrapped(model).state_dict().items()
        if isinstance(value, Tensor) or name.endswith(_EXTRA_STATE)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def dense_state(
    model: nn.Module, optimizers: Optimizers, own: Mapping[str, Any] | None = None
) -> memoryview:
    """Model, optimizers and random state, without embeddings, as torch.save writes them.

    `own` is what an own loop adds.
    """
    buffer = io.BytesIO()
    content: dict[str, Any] = {
        "model": dense_state_dict(model),
        "optimizer": (
            optimizers.state_dict()
            if isinstance(optimizers, torch.optim.Optimizer)
            else [optimizer.state_dict() for optimizer in optimizers]
        ),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if own is not None:
        content[_OWN] = own
    torch.save(content, buffer)
    return buffer.getbuffer()


def read_dense(path: Path) -> dict[str, Any]:
    """What `dense_state` has made. CheckpointError: it is not that."""
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    if not isinstance(content, dict) or not {"model", "optimizer", "random"} <= content.keys():
        raise CheckpointError(f"{path}: is not the dense part of a checkpoint")
    return content


def own_part(content: Mapping[str, Any]) -> dict[str, Any]:
    """What an own loop has added; nothing where `bagpipe train` wrote it."""
    return dict(content.get(_OWN, {}))


def is_readable(value: object) -> bool:
    """Whether a checkpoint gives `value` back: torch reads no classes of others."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        with torch.serialization.safe_globals(_SAFE):
            torch.load(buffer, weights_only=True)
    except Exception:  # pickle and torch raise what they like
        return False
    return True


def load_dense_state(path: Path, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Puts back what `dense_state` has made, and returns what was added to it.

    Raises:
        CheckpointError: it is another model's.
    """
    content = read_dense(path)
    check_dense(path, content, model, optimizers)
    put_dense(content, model, optimizers)
    put_random(content["random"], content["random_cuda"])
    return own_part(content)


def check_dense(
    path: Path, content: Mapping[str, Any], model: nn.Module, optimizers: Optimizers
) -> None:
    """Raises CheckpointError unless the model and its optimizers can take a content."""
    check_model(path, content["model"], dense_state_dict(model))
    numbers = [_parameters(state["param_groups"]) for state in _states(content)]
    own_numbers = [_parameters(optimizer.param_groups) for optimizer in _listed(optimizers)]
    if numbers != own_numbers:
        raise CheckpointError(
            f"{path}: holds other dense optimizers: their groups have {numbers} parameters there "
            f"and {own_numbers} here (a list for each optimizer)"
        )


def check_model(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless two states of models have the same shapes by name."""
    if saved.keys() != now.keys():
        raise CheckpointError(
            f"{path}: holds another model: {sorted(saved.keys() ^ now.keys())} are in only one of "
            "them"
        )
    for name, value in now.items():
        there, here = _kind(saved[name]), _kind(value)
        if there != here:
            raise CheckpointError(
                f"{path}: holds another model: {name} is {there} there and {here} here"
            )


def put_dense(content: Mapping[str, Any], model: nn.Module, optimizers: Optimizers) -> None:
    """Puts a content that has been checked into a model and its optimizers."""
    # embeddings are loaded from their records
    unwrapped(model).load_state_dict(content["model"], strict=False)
    for optimizer, state in zip(_listed(optimizers), _states(content), strict=True):
        load_optimizer(optimizer, state)


def put_fitting(
    path: Path, content: Mapping[str, Any], model: nn.Module, *, is_other: bool
) -> list[str]:
    """Puts what fits of another run's content into a model, without its optimizer.

    Args:
        path: Where the content is from.
        content: What `read_dense` has returned.
        model: As it was made.
        is_other: Whether the model may be another one; else all must fit.

    Returns:
        The names of what stays as it was made.

    Raises:
        CheckpointError: It is another model. Nothing was changed.
    """
    saved, now = content["model"], dense_state_dict(model)
    fitting = _fitting(saved, now)
    if not is_other:
        check_model(path, saved, now)
    unwrapped(model).load_state_dict(fitting, strict=False)
    return sorted(now.keys() - fitting.keys())


def put_fitting_optimizer(
    content: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> bool:
    """Puts another run's state of each parameter that fits into the optimizer of all of a model's.

    Learning rates and other settings stay as they are. Nothing is put where the models do not have
    the same parameters by name, since a state does not say whose it is.

    Returns:
        Whether any was.
    """
    saved, now = content["model"], dense_state_dict(model)
    if saved.keys() != now.keys():
        return False
    fitting = _fitting(saved, now)
    fresh, (there,) = optimizer.state_dict(), _states(content)
    names = [name for name, _ in unwrapped(model).named_parameters()]
    states = dict(fresh["state"]) | {
        index: there["state"][index]
        for index, name in enumerate(names)
        if name in fitting and index in there["state"]
    }
    load_optimizer(optimizer, {"state": states, "param_groups": fresh["param_groups"]})
    return True


def _fitting(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: saved[name]
        for name, value in now.items()
        if name in saved and _kind(saved[name]) == _kind(value)
    }


def put_random(random: Tensor, random_cuda: Sequence[Tensor]) -> None:
    """Sets torch's random state; that of GPUs where there are as many as there were."""
    torch.set_rng_state(random)
    if len(random_cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(random_cuda)


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


def _listed(optimizers: Optimizers) -> Sequence[torch.optim.Optimizer]:
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers


def _states(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    state = content["optimizer"]
    return state if isinstance(state, list) else [state]


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _parameters(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]
