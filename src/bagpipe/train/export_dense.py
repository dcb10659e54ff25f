"""A model's dense part as a program of torch.export, and as ONNX."""

from __future__ import annotations

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


def export_dense_part(of: SavedModel, path: Path) -> torch.export.ExportedProgram:
    """Writes the program, for batches of any size on a CPU.

    Raises:
        ConfigError: torch.export can't follow the model, or the program computes something else.
    """
    model = make_model(of.config.model, _Sizes(of), of.num_dense)
    put_model(of.saved, model)
    part = DensePart(model, of.config.train.precision).eval()
    width = sum(len(group.features) * group.embedding_dim for group in of.groups)
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(
            part,
            _examples(8, of.num_dense, width),
            dynamic_shapes=({0: batch}, {0: batch}),
            strict=False,
        )
        made = program.module()
        with torch.no_grad():
            differing = [
                size
                for size in _COMPARED
                if not torch.equal(
                    made(*(given := _examples(size, of.num_dense, width))), part(*given)
                )
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
    return program


def export_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes a program as ONNX.

    Raises:
        ConfigError: ONNX is not installed, or has no operator that the program needs.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--onnx needs the packages onnx and onnxscript ({error}): install them by "
            f"pip install '{DISTRIBUTION}[onnx]'"
        ) from error
    try:
        made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
        made.save(str(path))
    except Exception as error:  # torch raises what it likes
        raise ConfigError(
            f"the dense part can't be converted to ONNX: {error}: leave --onnx out; dense.pt2 has "
            "it for torch"
        ) from error


def _examples(size: int, num_dense: int, width: int) -> tuple[Tensor, Tensor]:
    """Dense features and pooled embeddings of a batch, the same each time."""
    generator = torch.Generator().manual_seed(size)
    return (
        torch.rand(size, num_dense, generator=generator),
        torch.randn(size, width, generator=generator),
    )
