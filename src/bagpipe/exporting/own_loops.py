"""`bagpipe.export`: what an own loop has trained, as a folder that `bagpipe.serving` answers from.

It is written by the code that exports a run. What a run's configuration and data tell there, an
own loop tells by example rows and vocabularies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from bagpipe.checkpoint.dense import unwrapped
from bagpipe.checkpoint.own_loops import OwnEmbeddings, check_embeddings, flush_between_steps
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.pooled import PooledEmbeddings
from bagpipe.errors import ConfigError
from bagpipe.exporting.dense import TableSizes
from bagpipe.exporting.folder import write_folder
from bagpipe.exporting.own_inputs import OwnVocabulary, own_inputs
from bagpipe.exporting.parts import Exported
from bagpipe.models import RankingModel
from bagpipe.types import Group

Forward: TypeAlias = Callable[[Any, Tensor, PooledEmbeddings], Tensor]
"""From the model, dense features (B, num_dense) float32, and what the embeddings have pooled, to
logits (B,), or (B, L) of L labels."""


def export(
    folder: str | Path,
    embeddings: OwnEmbeddings,
    *,
    model: nn.Module,
    example: Any,
    forward: Forward | None = None,
    vocabulary: Mapping[str, OwnVocabulary] | None = None,
    columns: Mapping[str, str] | None = None,
    dense_transform: Literal["log", "none"] = "none",
    labels: Sequence[str] = ("label",),
    arrow: bool = True,
    onnx: bool = False,
) -> Path:
    """Writes what a loop has trained to a folder that `bagpipe.serving.load` answers requests from.

    The scores have the same bits as those of the loop in evaluation mode on a CPU, for batches of
    the same rows. Tables pass in blocks, so memory does not grow with them. It may be called where
    `save` may. With several trainers all must call it, and rank 0 writes. The model stays as it is.

    Args:
        folder: a new one.
        embeddings: the tables.
        model: the dense part, or a module around it and the embeddings.
        example: a few rows as requests will be: a list of dicts, or a pyarrow Table or RecordBatch.
            They tell which columns hold lists. Columns that no feature is read from are the dense
            features, in this order.
        forward: called as ``forward(model, dense, pooled)`` for the logits. `dense` is (B,
            num_dense) float32, and `pooled` what ``embeddings(batch)`` returns. The default is
            ``model(dense, pooled)``, and `dense_part` for a model of `bagpipe.models`.
        vocabulary: by table, how values become ids. "ids", the default, takes values as ids. "hash"
            hashes as `bagpipe data prepare` does. A mapping has the id of each value; its key None
            stands for the missing value. A value that the mapping lacks gets id 0, or is refused if
            the mapping gives id 0 to a value of its own.
        columns: by feature, the column that it is read from; by default that of its name.
        dense_transform: "log" takes ``log(max(x, 0) + 1)`` of dense numbers.
        labels: the names of what is predicted. Logits are (B,) of one, and (B, L) of L, in this
            order.
        arrow: whether tables are written as Arrow files, too.
        onnx: whether the dense part is written as ONNX, too.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder is there or can't be written, the disk has no room, the model can't
            be exported, a vocabulary does not fit its table, or ONNX is not installed.
        DataError: an example row can't be read.
        StoreError: rows can't be read.
        UsageError: these are no embeddings, or rows were lost.
    """
    check_embeddings(embeddings)
    if not labels or isinstance(labels, str) or len(set(labels)) < len(labels):
        raise ConfigError(f"labels is {labels!r}, must be a list of names, each once")
    groups, trainers = embeddings.groups, Trainers(embeddings.peers)
    flush_between_steps(embeddings)

    def write() -> None:
        if not trainers.is_first:
            return
        inputs = own_inputs(groups, example, vocabulary or {}, columns or {}, dense_transform)
        part = _Part(_on_cpu(model, embeddings), forward, groups).eval()
        of = Exported(
            name=type(unwrapped(model)).__name__,
            groups=groups,
            seed=embeddings.seed,
            step=embeddings.step,
            precision="fp32",
            label_names=tuple(labels),
            columns=inputs.columns,
            tables=inputs.tables,
            part=part,
            onnx_part=part,
            records=lambda group: embeddings.stores[group.index].snapshot(),
            write_dictionary=inputs.write_dictionary,
        )
        write_folder(of, Path(folder), arrow=arrow, onnx=onnx)

    trainers.all_do("an export", write, ConfigError)
    return Path(folder)


class _Part(nn.Module):
    """From dense features (B, num_dense) and pooled embeddings (B, sum of D) to logits."""

    def __init__(self, model: nn.Module, forward: Forward | None, groups: Sequence[Group]) -> None:
        super().__init__()
        self.model, self._forward = model, forward
        self._features = [group.features for group in groups]
        self._dims = [group.embedding_dim for group in groups]

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Computes the logits, float32."""
        if self._forward is None and isinstance(self.model, RankingModel):
            return self.model.dense_part(dense, pooled).float()
        of_groups, end = [], 0
        for names, dim in zip(self._features, self._dims, strict=True):
            begin, end = end, end + len(names) * dim
            of_groups.append(pooled[:, begin:end].reshape(-1, len(names), dim))
        keyed = PooledEmbeddings(self._features, of_groups)
        if self._forward is None:
            logits: Tensor = self.model(dense, keyed)
        else:
            logits = self._forward(self.model, dense, keyed)
        return logits.float() if isinstance(logits, Tensor) else logits


def _on_cpu(model: nn.Module, embeddings: OwnEmbeddings) -> nn.Module:
    """A copy of a model without its tables, which stay where they are."""
    model = unwrapped(model)
    try:
        return copy.deepcopy(model, {id(embeddings): TableSizes(embeddings.groups)}).cpu()
    except Exception as error:  # modules raise what they like
        raise ConfigError(
            f"{type(model).__name__}: can't be copied, which an export does to leave it as it is: "
            f"{type(error).__name__}: {error}: export between two steps, of these embeddings"
        ) from error
