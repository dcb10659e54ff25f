"""What is exported, be it a run's or an own loop's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bagpipe.serving.inputs import Columns
from bagpipe.serving.manifest import TableEntry
from bagpipe.types import Float32Array, Group, Int64Array

OnStage: TypeAlias = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model, and where its tables come from."""

    name: str
    """What a message calls the model."""
    groups: Sequence[Group]
    seed: int
    """What rows without a record are drawn from."""
    step: int
    precision: str
    label_names: tuple[str, ...]
    columns: Columns
    """Features in the order of the groups'."""
    tables: tuple[TableEntry, ...]
    part: nn.Module
    """From dense features (B, num_dense) and pooled embeddings (B, sum of D) to logits (B,), or
    (B, L) of L labels, on the CPU, in evaluation mode."""
    onnx_part: nn.Module
    """The same in float32."""
    records: Callable[[Group], Iterator[tuple[Int64Array, Float32Array]]]
    """Yields a group's rows that were ever written, with their records, in blocks; of a row that
    comes again the last record counts."""
    write_dictionary: Callable[[TableEntry, Path], None]
    """Writes the dictionary of a table that has one to a file."""

    def examples(self, size: int) -> tuple[Tensor, Tensor]:
        """Dense features and pooled embeddings of a batch, the same each time."""
        width = sum(len(group.features) * group.embedding_dim for group in self.groups)
        generator = torch.Generator().manual_seed(size)
        return (
            torch.rand(size, len(self.columns.dense), generator=generator),
            torch.randn(size, width, generator=generator),
        )
