"""A model's dense part as a program of torch.export, and as ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bagpipe.errors import ConfigError
from bagpipe.exporting.parts import Exported
from bagpipe.plots import DISTRIBUTION
from bagpipe.types import Group

_COMPARED = (1, 2, 7, 64)
"""Batch sizes at which a program is compared with the model that it was made of."""


class TableSizes(nn.Module):
    """Stands where the model has its embeddings; tells their groups, and holds no tables."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self.groups = groups


def export_dense_part(of: Exported, path: Path) -> None:
    """Writes the program, for batches of any size on a CPU.

    Raises:
        ConfigError: torch.export can't follow the model, or the program computes something else.
    """
    _check_logits(of)
    try:
        program = _program(of, of.part)
        made = program.module()
        with torch.no_grad():
            differing = [
                size
                for size in _COMPARED
                if not torch.equal(made(*(given := of.examples(size))), of.part(*given))
            ]
    except Exception as error:  # torch raises what it likes
        raise ConfigError(
            f"{of.name}: its dense part can't be exported, as torch.export can't follow it: "
            f"{error}: let it compute with tensors alone, for batches of any size"
        ) from error
    if differing:
        raise ConfigError(
            f"{of.name}: its dense part can't be exported: the program computes other logits than "
            f"the model at batches of {differing} rows: let it depend on its arguments alone"
        )
    torch.export.save(program, path)


def _check_logits(of: Exported) -> None:
    """Raises ConfigError unless the dense part makes a logit of each row and label."""
    size = 3
    try:
        with torch.no_grad():
            logits = of.part(*of.examples(size))
    except Exception as error:  # the model raises what it likes
        raise ConfigError(
            f"{of.name}: its dense part can't be computed on a CPU for {size} rows with "
            f"{len(of.columns.dense)} dense features: {type(error).__name__}: {error}"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    labels = of.label_names
    expected = (size,) if len(labels) == 1 else (size, len(labels))
    if shape != expected:
        raise ConfigError(
            f"{of.name}: its dense part makes {shape} of {size} rows, must be {expected}, a logit "
            f"each for {', '.join(labels)}"
        )


def export_onnx(of: Exported, path: Path) -> None:
    """Writes the dense part as ONNX, in float32 where it was trained in bfloat16.

    Raises:
        ConfigError: ONNX is not installed, or has no operator that the dense part needs.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--onnx needs the packages onnx and onnxscript ({error}): install them by "
            f"pip install '{DISTRIBUTION}[onnx]'"
        ) from error
    try:
        with warnings.catch_warnings():  # torch uses what torch has deprecated
            warnings.simplefilter("ignore")
            program = _program(of, of.onnx_part)
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                output_names=["logits"],
                dynamic_shapes=({0: "batch"}, {0: "batch"}),
            )
        made.save(str(path))
    except Exception as error:  # torch raises what it likes
        raise ConfigError(
            f"the dense part can't be converted to ONNX: {error}: leave --onnx out; dense.pt2 has "
            "it for torch"
        ) from error


def _program(of: Exported, part: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(
        part, of.examples(8), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
