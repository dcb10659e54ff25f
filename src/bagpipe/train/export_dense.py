"""A model's dense part as a program of torch.export, and as ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bagpipe.errors import ConfigError
from bagpipe.models import RankingModel
from bagpipe.plots import DISTRIBUTION
from bagpipe.train.build import make_model
from bagpipe.train.dense_step import Precision
from bagpipe.train.saved import SavedModel, put_model

_COMPARED = (1, 2, 7, 64)
"""Batch sizes at which a program is compared with the model that it was made of."""


class DensePart(nn.Module):
    """From dense features (B, num_dense) and pooled embeddings (B, F * D) to logits, float32."""

    def __init__(self, model: RankingModel, precision: Precision) -> None:
        super().__init__()
        self.model, self._is_bf16 = model, precision == "bf16"

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Computes the logits as an evaluation does."""
        if not self._is_bf16:
            return self.model.dense_part(dense, pooled).float()
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.dense_part(dense, pooled).float()


class _Sizes(nn.Module):
    """Stands where the model has its embeddings; tells their groups, and holds no tables."""

    def __init__(self, of: SavedModel) -> None:
        super().__init__()
        self.groups = of.groups


def export_dense_part(of: SavedModel, path: Path) -> None:
    """Writes the program, for batches of any size on a CPU.

    Raises:
        ConfigError: torch.export can't follow the model, or the program computes something else.
    """
    part = _dense_part(of, of.config.train.precision)
    try:
        program = _program(of, part)
        made = program.module()
        with torch.no_grad():
            differing = [
                size
                for size in _COMPARED
                if not torch.equal(made(*(given := _examples(of, size))), part(*given))
            ]
    except Exception as error:  # torch raises what it likes
        raise ConfigError(
            f"model.kind = {of.config.model.kind!r}: its dense part can't be exported, as "
            f"torch.export can't follow it: {error}: let dense_part compute with tensors alone, "
            "for batches of any size"
        ) from error
    if differing:
        raise ConfigError(
            f"model.kind = {of.config.model.kind!r}: its dense part can't be exported: the program "
            f"computes other logits than the model at batches of {differing} rows: let dense_part "
            "depend on its arguments alone"
        )
    torch.export.save(program, path)


def export_onnx(of: SavedModel, path: Path) -> None:
    """Writes the dense part as ONNX, in float32 whatever the run's precision.

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
    program = _program(of, _dense_part(of, "fp32"))  # onnxruntime multiplies no bfloat16 on a CPU
    try:
        with warnings.catch_warnings():  # torch uses what torch has deprecated
            warnings.simplefilter("ignore")
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


def _dense_part(of: SavedModel, precision: Precision) -> DensePart:
    model = make_model(of.config.model, _Sizes(of), of.num_dense)
    put_model(of.saved, model)
    return DensePart(model, precision).eval()


def _program(of: SavedModel, part: DensePart) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(
        part, _examples(of, 8), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )


def _examples(of: SavedModel, size: int) -> tuple[Tensor, Tensor]:
    """Dense features and pooled embeddings of a batch, the same each time."""
    width = sum(len(group.features) * group.embedding_dim for group in of.groups)
    generator = torch.Generator().manual_seed(size)
    return (
        torch.rand(size, of.num_dense, generator=generator),
        torch.randn(size, width, generator=generator),
    )
