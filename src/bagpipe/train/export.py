"""`bagpipe export`: a run's saved model as a folder that needs no trainer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bagpipe.config.data import PreparedData
from bagpipe.data.manifest import PreparedManifest, check_file
from bagpipe.exporting.dense import TableSizes
from bagpipe.exporting.folder import write_folder
from bagpipe.exporting.parts import Exported, OnStage
from bagpipe.models import RankingModel
from bagpipe.serving.manifest import ExportManifest, TableEntry
from bagpipe.store.record_files import check_num_records, read_records
from bagpipe.train.build import make_model
from bagpipe.train.dense_step import Precision
from bagpipe.train.raw_inputs import columns_of, tables_of
from bagpipe.train.saved import SavedModel, put_model
from bagpipe.types import Float32Array, Group, Int64Array


def export(
    of: SavedModel,
    folder: Path,
    *,
    arrow: bool = True,
    onnx: bool = False,
    on_stage: OnStage = lambda stage, done, total: None,
) -> ExportManifest:
    """Exports a saved model in bounded memory.

    Args:
        of: the model.
        folder: where to; it must not be there yet.
        arrow: whether tables are written as Arrow files, too.
        onnx: whether the dense part is written as ONNX, too.
        on_stage: told of progress.

    Returns:
        The manifest.

    Raises:
        ConfigError: the folder is there or can't be written, the disk has no room, the dense part
            can't be exported, or ONNX is not installed.
        CheckpointError: a file of the checkpoint is damaged.
        DataError: the run's data, whose dictionaries are exported, are gone.
    """
    model = make_model(of.config.model, TableSizes(of.groups), of.num_dense, len(of.label_names))
    put_model(of.saved, model)
    precision = of.config.train.precision
    exported = Exported(
        name=f"model.kind = {of.config.model.kind!r}",
        groups=of.groups,
        seed=of.config.train.seed,
        step=of.saved.step,
        precision=precision,
        label_names=of.label_names,
        columns=columns_of(of.config, of.groups, of.num_dense),
        tables=tables_of(of.config, of.groups),
        part=_Part(model, precision).eval(),
        onnx_part=_Part(model, "fp32").eval(),
        records=lambda group: _records(of, group),
        write_dictionary=lambda table, path: _copy_dictionary(of, table, path),
    )
    return write_folder(exported, folder, arrow=arrow, onnx=onnx, on_stage=on_stage)


class _Part(nn.Module):
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


def _records(of: SavedModel, group: Group) -> Iterator[tuple[Int64Array, Float32Array]]:
    """The records of a group in a checkpoint, file by file."""
    path = of.saved.path
    for file in of.saved.record_files[group.index]:
        num_read = 0
        for rows, records in read_records(path / file.name, group.record_width):
            yield rows, records
            num_read += len(rows)
        check_num_records(path, file, num_read)


def _copy_dictionary(of: SavedModel, table: TableEntry, to: Path) -> None:
    assert isinstance(of.config.data, PreparedData)
    folder = of.config.data.folder
    entry = PreparedManifest.load(folder).dictionaries[table.name]
    shutil.copyfile(check_file(folder, entry, verify=True), to)
