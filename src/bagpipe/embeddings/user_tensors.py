"""Checks of the user's tensors, and the type that autocast asks for.

Kernels are given addresses, so another device, shape or type would end the process, or worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.errors import UsageError
from bagpipe.types import Group

_DTYPES = (torch.float32, torch.bfloat16)


def check_tensors(
    what: str,
    tensors: Sequence[Tensor],
    groups: Sequence[Group],
    plans: Sequence[DevicePlan],
    *,
    device: torch.device,
    contiguous: bool = False,
) -> None:
    """Raises UsageError where a tensor is not the one that its group needs for a step's plan."""
    if len(tensors) != len(groups):
        raise UsageError(
            f"{what} are {len(tensors)} tensors for {len(groups)} groups: pass one for each group"
        )
    for tensor, of_group, plan in zip(tensors, groups, plans, strict=True):
        group = of_group.name
        shape = (plan.batch_size, plan.num_features, of_group.embedding_dim)
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{what} of {group} are a {type(tensor).__name__}, must be a tensor")
        if tensor.device != device:
            raise UsageError(
                f"{what} of {group} lie on {tensor.device}, the embeddings on {device}: make them "
                "there"
            )
        if tuple(tensor.shape) != shape:
            raise UsageError(
                f"{what} of {group} have the shape {tuple(tensor.shape)}, must have {shape}: "
                "(samples, features, embedding_dim)"
            )
        if tensor.dtype not in _DTYPES:
            raise UsageError(f"{what} of {group} are {tensor.dtype}, must be float32 or bfloat16")
        if contiguous and not tensor.is_contiguous():
            raise UsageError(
                f"{what} of {group} has the strides {tensor.stride()}, must be contiguous"
            )


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where autocast asks for it, else the rows' own type."""
    kind = device.type
    is_bfloat16 = (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    )
    return torch.bfloat16 if is_bfloat16 else torch.float32


def check_dtype(step: int, dtype: torch.dtype) -> None:
    """Raises UsageError for a type that lookups do not give."""
    if dtype not in _DTYPES:
        raise UsageError(f"step {step}: lookup's dtype is {dtype}, must be float32 or bfloat16")


def check_stays(device: torch.device, probe: Tensor) -> None:
    """Raises UsageError where a module would be moved to another device or type.

    `probe` is what the module's conversion makes of a float32 tensor on `device`.
    """
    if probe.device != device:
        raise UsageError(
            f"embeddings on {device} can't be moved to {probe.device}: make them there, "
            "EmbeddingBagCollection(..., device=...), and move other modules only"
        )
    if probe.dtype != torch.float32:
        raise UsageError(
            f"embeddings can't be converted to {probe.dtype}: rows of 16 bits are asked for by "
            "TableConfig(data_type=...), pooled embeddings in bfloat16 by torch.autocast; convert "
            "other modules only"
        )
